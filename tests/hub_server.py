"""A small server that speaks the Hub's protocol, and Google Drive's, to the real clients.

What huggingface_hub and datasets ask for over HTTP (no Xet): repository info, trees, files with
ranges, creating, uploading (pre-upload, LFS, commit), branches. It can break connections, and it
keeps a log of what was sent, by file.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool

    @property
    def sha256(self):
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob_id(self):
        data = self.data
        if self.lfs:
            data = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
                f"size {len(data)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def content_id(self):
        return self.sha256 if self.lfs else self.blob_id

    def describe(self, path):
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": self.blob_id}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        return entry


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)  # hash -> {path: File}
    branches: dict = field(default_factory=dict)  # name -> hash

    def commit(self, files, branch="main"):
        """Put {path: bytes, File, or None to delete} on a branch; returns the commit's hash."""
        tree = dict(self.commits.get(self.branches.get(branch), {}))
        for path, file in files.items():
            if file is None:
                tree.pop(path, None)
            else:
                tree[path] = file if isinstance(file, File) else File(file, len(file) > 1000)
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(tree)} {id(self)}".encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha

    def find(self, revision):
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Request:
    method: str
    path: str
    start: int = 0  # of the range asked for
    size: int = 0  # bytes of content sent (GET) or taken (PUT, POST)
    status: int = 0


@dataclass
class Break:
    method: str
    part: str  # of the path
    after: int  # bytes
    times: int


class Broken(Exception):
    pass


# In front of a client's code: `show` sends a value back, Google's servers are this one.
PRELUDE = """
import json, os, re, sys, time
import requests

def show(value):
    print("=> " + json.dumps(value))

_send = requests.adapters.HTTPAdapter.send
def send(self, request, **options):
    request.url = re.sub(r"https://(drive|docs|drive\\.usercontent)\\.google\\.com",
                         os.environ["HF_ENDPOINT"] + "/drive", request.url)
    return _send(self, request, **options)
requests.adapters.HTTPAdapter.send = send

_sleep = time.sleep
time.sleep = lambda seconds: _sleep(min(seconds, 0.05))  # what it waits before it tries again
"""


class HubServer:
    """Attributes: repos {id: Repo}, drive {id: bytes or text of an error page}, token (None lets
    everyone in), is_full (takes no object more), log, objects {sha256: bytes} as uploaded, url."""

    def __init__(self):
        self.repos, self.drive, self.objects = {}, {}, {}
        self.token, self.is_full, self.log, self.breaks = None, False, [], []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repo_id, files, **options):
        self.repos[repo_id] = Repo(**options)
        return self.repos[repo_id].commit(files)

    def break_connection(self, method, part, after, times=1):
        """Cut requests whose path holds `part` after so many bytes of content, `times` times."""
        self.breaks.append(Break(method, part, after, times))

    def take_break(self, method, path):
        with self._lock:
            for found in self.breaks:
                if found.times and found.method == method and found.part in path:
                    found.times -= 1
                    return found.after
        return None

    def select(self, method, part):
        """The requests of a method whose path holds `part`."""
        return [r for r in self.log if r.method == method and part in r.path]

    def start_client(self, home, code, **environment):
        """A process that runs `code` against this server, with a cache of its own in `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        kept |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "ROREM_BATCH": "1",
        }
        return subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
            env=kept | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run_client(self, home, code, **environment):
        """What the client's code has shown, as a list; `errors` keeps what it wrote to stderr."""
        process = self.start_client(home, code, **environment)
        output, self.errors = process.communicate(timeout=300)
        assert process.returncode == 0, self.errors
        return [json.loads(line[3:]) for line in output.splitlines() if line.startswith("=> ")]

    @contextmanager
    def run(self):
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (Broken, ConnectionError):
            self.close_connection = True

    def route(self):
        split = urlsplit(self.path)
        self.query, path = parse_qs(split.query), unquote(split.path)
        self.request_log = Request(self.command, path)
        self.hub.log.append(self.request_log)
        for method, pattern, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == self.command:
                body = self.read_body(path) if method in ("PUT", "POST") else b""
                return action(self, body, **found.groupdict())
        self.answer(404, {"error": "Not found"})

    do_GET = do_HEAD = do_PUT = do_POST = route

    def read_body(self, path):
        left, body = int(self.headers.get("Content-Length") or 0), []
        limit = self.hub.take_break(self.command, path)
        while left:
            data = self.rfile.read(min(left, 1 << 16))
            if not data:
                raise Broken
            left -= len(data)
            body.append(data)
            self.request_log.size += len(data)
            if limit is not None and self.request_log.size >= limit:
                raise Broken
        return b"".join(body)

    def answer(self, status, content=b"", **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.request_log.status = status
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if not isinstance(content, bytes):
            headers.setdefault("Content_Type", "application/json")
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.hub.take_break(self.command, self.request_log.path)
        for start in range(0, len(data), 1 << 14):
            part = data[start : start + (1 << 14)]
            if limit is not None and self.request_log.size + len(part) > limit:
                self.wfile.flush()
                raise Broken
            self.wfile.write(part)
            self.request_log.size += len(part)

    def answer_range(self, data, **headers):
        found = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers |= {"Accept_Ranges": "bytes"}
        if not found:
            return self.answer(200, data, **headers)
        start = self.request_log.start = int(found[1])
        stop = min(len(data), int(found[2]) + 1 if found[2] else len(data))
        return self.answer(
            206, data[start:stop], **headers, Content_Range=f"bytes {start}-{stop - 1}/{len(data)}"
        )

    def refuse(self, status, code, message=""):
        self.answer(
            status, {"error": message or code}, X_Error_Code=code, X_Error_Message=message or code
        )

    @property
    def is_known(self):
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def open_repo(self, repo, revision=None, write=False):
        """The repository and the commit's hash; None after a refusal was sent."""
        found = self.hub.repos.get(repo)
        if self.headers.get("Authorization") and not self.is_known:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if not found or (found.private or write) and self.hub.token and not self.is_known:
            return self.refuse(404 if self.is_known else 401, "RepoNotFound")
        sha = found.find(revision or "main")
        if not sha:
            return self.refuse(404, "RevisionNotFound")
        return found, sha

    # ------------------------------------------------------------------------------- reading

    def get_info(self, body, repo, revision=None):
        if opened := self.open_repo(repo, revision):
            found, sha = opened
            sized = "blobs" in self.query
            self.answer(
                200,
                {
                    "_id": "0",
                    "id": repo,
                    "sha": sha,
                    "private": found.private,
                    "gated": found.gated,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "lastModified": "2025-01-01T00:00:00.000Z",
                    "siblings": [
                        {"rfilename": path, "size": len(file.data)}
                        if sized
                        else {"rfilename": path}
                        for path, file in sorted(found.commits[sha].items())
                    ],
                },
            )

    def get_tree(self, body, repo, revision, folder=None):
        if opened := self.open_repo(repo, revision):
            tree, prefix = opened[0].commits[opened[1]], f"{folder}/" if folder else ""
            recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
            entries, folders = [], set()
            for path, file in sorted(tree.items()):
                rest = path.removeprefix(prefix)
                if not path.startswith(prefix):
                    continue
                parents = rest.split("/")[:-1]
                folders |= {
                    prefix + "/".join(parents[: n + 1])
                    for n in range(len(parents) if recursive else min(1, len(parents)))
                }
                if recursive or not parents:
                    entries.append(file.describe(path))
            if folder and not entries and not folders:
                return self.refuse(404, "EntryNotFound")
            self.answer(
                200,
                [
                    {"type": "directory", "path": p, "oid": "0" * 40, "size": 0}
                    for p in sorted(folders)
                ]
                + entries,
            )

    def get_paths(self, body, repo, revision):
        if opened := self.open_repo(repo, revision):
            tree = opened[0].commits[opened[1]]
            if "json" in self.headers.get("Content-Type", ""):
                paths = json.loads(body)["paths"]
            else:
                paths = parse_qs(body.decode()).get("paths", [])
            self.answer(
                200,
                [
                    tree[p].describe(p)
                    if p in tree
                    else {"type": "directory", "path": p, "oid": "0" * 40, "size": 0}
                    for p in paths
                    if p in tree or any(q.startswith(f"{p}/") for q in tree)
                ],
            )

    def get_file(self, body, repo, revision, path):
        if opened := self.open_repo(repo, revision):
            found, sha = opened
            if found.gated and not self.is_known:
                return self.refuse(401, "GatedRepo", "Access to this dataset is restricted")
            file = found.commits[sha].get(path)
            if not file:
                return self.answer(
                    404, {"error": "no entry"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha
                )
            self.answer_range(file.data, X_Repo_Commit=sha, ETag=f'"{file.content_id}"')

    # ------------------------------------------------------------------------------- writing

    def create_repo(self, body):
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if self.hub.token and not self.is_known:
            return self.refuse(401, "", "Invalid username or password.")
        url = {"url": f"{self.hub.url}/datasets/{repo}", "id": "0", "name": repo}
        if repo in self.hub.repos:
            return self.answer(409, url | {"error": "You already created this dataset repo"})
        self.hub.repos[repo] = Repo(
            private=asked.get("visibility") == "private" or asked.get("private", False)
        )
        self.hub.repos[repo].commit({".gitattributes": b"*.parquet filter=lfs\n"})
        self.answer(200, url)

    def create_branch(self, body, repo, branch):
        if opened := self.open_repo(repo, write=True):
            if branch in opened[0].branches:
                return self.answer(409, {"error": "Reference already exists"})
            opened[0].branches[branch] = opened[1]
            self.answer(200, {})

    def validate_card(self, body):
        valid = json.loads(body)["content"].startswith("---\n")
        self.answer(
            200 if valid else 400,
            {"errors": [] if valid else [{"message": "no header"}], "warnings": []},
        )

    def preupload(self, body, repo, revision):
        if opened := self.open_repo(repo, revision, write=True):
            tree = opened[0].commits[opened[1]]
            self.answer(
                200,
                {
                    "files": [
                        {
                            "path": f["path"],
                            "shouldIgnore": False,
                            "uploadMode": "lfs" if f["path"].endswith(".parquet") else "regular",
                            **({"oid": tree[f["path"]].content_id} if f["path"] in tree else {}),
                        }
                        for f in json.loads(body)["files"]
                    ]
                },
            )

    def batch(self, body, repo):
        if self.open_repo(repo, write=True):
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    **(
                        {}
                        if o["oid"] in self.hub.objects
                        else {
                            "actions": {
                                "upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"},
                                "verify": {"href": f"{self.hub.url}/lfs-verify"},
                            }
                        }
                    ),
                }
                for o in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})

    def put_object(self, body, oid):
        if self.hub.is_full:
            return self.answer(507, {"error": "Insufficient storage"})
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "the content is not that of its hash"})
        self.hub.objects[oid] = body
        self.answer(200)

    def verify_object(self, body):
        asked = json.loads(body)
        sound = len(self.hub.objects.get(asked["oid"], b"")) == asked["size"]
        self.answer(200 if sound else 404, {})

    def commit(self, body, repo, revision):
        if not (opened := self.open_repo(repo, revision, write=True)):
            return
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.answer(400, {"error": f"{value['path']} was never uploaded"})
                files[value["path"]] = File(self.hub.objects[value["oid"]], True)
            elif line["key"] == "deletedFile":
                files[value["path"]] = None
        sha = opened[0].commit(files, revision)
        self.answer(
            200,
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.hub.url}/datasets/{repo}/commit/{sha}",
            },
        )

    # ------------------------------------------------------------------------- Google Drive

    def get_drive(self, body, page):
        name = self.query["id"][0]
        found = self.hub.drive.get(name, "Sorry, the file you have requested does not exist.")
        if isinstance(found, str):
            return self.answer(
                200,
                f'<p class="uc-error-subcaption">{found}</p>'.encode(),
                Content_Type="text/html; charset=utf-8",
            )
        if page == "uc" and len(found) > 1000:  # too large for Google's virus scan: ask first
            return self.answer(
                200,
                (
                    '<html><form id="download-form" method="get" '
                    'action="https://drive.usercontent.google.com/download">'
                    f'<input type="hidden" name="id" value="{name}"><input type="hidden" '
                    'name="confirm" value="t"></form></html>'
                ).encode(),
                Content_Type="text/html; charset=utf-8",
            )
        return self.answer_range(
            found,
            Content_Type="application/octet-stream",
            Content_Disposition='attachment; filename="set.tar.gz"',
            Last_Modified="Wed, 01 Jan 2025 00:00:00 GMT",
        )


_REPO, _REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[\w.-]+)"
_KIND = "(datasets|models)"
ROUTES = [
    ("GET", rf"/api/{_KIND}/{_REPO}(/revision/{_REVISION})?", _Handler.get_info),
    ("GET", rf"/api/{_KIND}/{_REPO}/tree/{_REVISION}(/(?P<folder>.+))?", _Handler.get_tree),
    ("POST", rf"/api/datasets/{_REPO}/paths-info/{_REVISION}", _Handler.get_paths),
    ("GET", rf"(/datasets)?/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.get_file),
    ("HEAD", rf"(/datasets)?/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.get_file),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", rf"/api/datasets/{_REPO}/branch/(?P<branch>[\w.-]+)", _Handler.create_branch),
    ("POST", r"/api/validate-yaml", _Handler.validate_card),
    ("POST", rf"/api/datasets/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"/datasets/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>\w{64})", _Handler.put_object),
    ("POST", r"/lfs-verify", _Handler.verify_object),
    ("POST", rf"/api/datasets/{_REPO}/commit/{_REVISION}", _Handler.commit),
    ("GET", r"/drive/(?P<page>uc|download)", _Handler.get_drive),
]
