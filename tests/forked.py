"""Processes that have torch, diffusers and the kit imported when they begin.

A process of its own imports for five to nine seconds before it does anything. These are forks of
one process that has imported everything and done nothing else (multiprocessing's fork server); what
a fork starts in turn is a fork of the same process.
accelerate's own launcher starts fake jobs in processes of their own in test_launch; kernels and
jobs of a process of their own are test_pipeline's.
"""

import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import psutil

IMPORTS = [
    "accelerate.commands.launch",
    "datasets",
    "diffusers",
    "ipykernel.kernelapp",
    "papermill.cli",
    "peft",
    "rorem_lib.discriminator",
    "rorem_lib.distill",
    "rorem_lib.evaluation.evaluate",
    "rorem_lib.removal",
    "rorem_lib.remover",
    "torch._dynamo",  # the first optimizer imports it
    "torch.distributed.fsdp",
    "transformers",
]
COMMON = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(IMPORTS)
own_log = None  # where a fork's output goes


def run_job(module: str, words: list[str]) -> None:
    """`python -m MODULE WORDS`, or a file of tests/ by its module's name."""
    sys.argv = [module, *words]
    importlib.import_module(module).main()


@functools.cache
def read_launcher_environment(config_file: Path) -> dict[str, str]:
    """What accelerate's launcher, given a hardware file, tells the processes it starts."""
    # One write each, and less than a pipe takes at once: the two lines cannot mix, with each other
    # or with a warning whose line has no end yet.
    show = """import json, os
given = {k: v for k, v in os.environ.items() if k.startswith(("ACCELERATE_", "FSDP_"))}
os.write(1, ("\\nENVIRONMENT " + json.dumps(given) + "\\n").encode())"""
    words = ["--config_file", str(config_file), "--num_processes", "2", "--main_process_port", "0"]
    words += ["--no_python", sys.executable, "-c", show]
    with tempfile.TemporaryDirectory() as folder:
        job = Job(run_launcher_forked, words, log=Path(folder, "log"))
        assert job.wait() == 0, job.read_log()[-3000:]
        text = job.read_log()
    lines = [x for x in text.splitlines() if x.startswith("ENVIRONMENT ")]
    assert len(lines) == 2, text[-3000:]
    return json.loads(lines[0].removeprefix("ENVIRONMENT "))


def run_rorem(words: list[str]) -> None:
    """`rorem WORDS`."""
    sys.exit(importlib.import_module("rorem_lib.runner.cli").main(words))


def run_rorem_forked(words: list[str]) -> None:
    """`rorem WORDS`, whose kernels and jobs are forks too."""
    fork_commands()
    _run_and_exit(run_rorem, words)


def run_papermill_forked(words: list[str]) -> None:
    """`papermill WORDS`, whose kernel is a fork too."""
    fork_commands()
    _run_and_exit(importlib.import_module("papermill.cli").papermill, words)


def run_launcher_forked(words: list[str]) -> None:
    """`accelerate launch WORDS`, whose processes are forks too."""
    fork_commands()
    sys.argv = ["accelerate-launch", *words]
    _run_and_exit(importlib.import_module("accelerate.commands.launch").main)


def fork_commands() -> None:
    """From now on kernels, jobs and torchrun's processes that this process starts are forks."""
    from jupyter_client import launcher
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from rorem_lib.runner import launch

    launcher.Popen = subprocess_handler.Popen = ForkedCommand
    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT", "TimeoutExpired")}
    launch.subprocess = SimpleNamespace(Popen=ForkedCommand, **names)
    launch.die_with_parent = lambda: None  # run_command has seen to it


def follow_parent() -> None:
    """`die_with_parent` for forks, which are all the fork server's children."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_command(words: list[str], folder) -> None:
    """What `python WORDS` does, for what `fork_commands` names; in a group of its own."""
    os.setsid()
    os.chdir(folder)
    follow_parent()
    fork_commands()
    option, what, *rest = words[words[0] == "-u" :]
    if option == "-c":
        sys.argv = ["-c", *rest]
        _run_and_exit(exec, what, {"__name__": "__main__"})
    elif what == "ipykernel_launcher":
        sys.argv = [what, *rest]
        _run_and_exit(importlib.import_module("ipykernel.kernelapp").launch_new_instance)
    else:
        _run_and_exit(run_job, what, rest)


def _run_and_exit(function, *arguments) -> None:
    """Ends as a script does, and not when its own forks have ended, as multiprocessing would."""
    code = 1
    try:
        function(*arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class ForkedCommand:
    """Of subprocess.Popen what jupyter_client, `launch_job` and torchrun use."""

    stdout = stderr = returncode = None

    def __init__(self, args, *, env, cwd=None, stdout=None, **options):
        log = stdout.name if stdout else own_log
        self.stdin = open(os.devnull, "wb")  # jupyter_client closes it
        self.job = Job(run_command, args[1:], cwd or os.getcwd(), environment=env, log=log)
        self.pid = self.job.processes[0].pid
        with contextlib.suppress(ProcessLookupError):
            while self.poll() is None and os.getpgid(self.pid) != self.pid:  # nobody else's group
                time.sleep(0.001)

    def poll(self) -> int | None:
        self.returncode = self.job.poll()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.job.processes[0].join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a forked command", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _begin(server, environment, log, errors, cwd, target, arguments):
    global own_log
    own_log = log
    # A fork knows its server but for its address, and would start another.
    forkserver._forkserver._forkserver_address = server
    forkserver._forkserver.ensure_running = lambda: None
    multiprocessing.set_start_method(None, force=True)  # workers start as in a user's job
    os.environ.update(environment)
    for path, number in ((log, 1), (errors or log, 2)):
        if path is not None:
            with open(path, "a") as stream:
                os.dup2(stream.fileno(), number)
    if cwd is not None:
        os.chdir(cwd)
    try:
        target(*arguments)
    except Exception:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # a test's full disk ends here
        traceback.print_exc()
        sys.exit(1)


class Job:
    """One target in one process, or in several that find each other as torchrun's do.

    Args:
        target: a function of a module, and its arguments.
        processes: how many; with more than one each has RANK, WORLD_SIZE, ...
        log: file to which standard output and error are added.
        errors: another one for standard error.
        environment: more variables; those that a library reads when it is imported do nothing.
        cwd: the folder it runs in.
    """

    def __init__(
        self,
        target,
        *arguments,
        processes=1,
        log=None,
        errors=None,
        environment=None,
        cwd=None,
    ):
        common = COMMON | (environment or {})
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            common |= {
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        forkserver._forkserver.ensure_running()
        server = forkserver._forkserver._forkserver_address
        self.log, self.processes = log and Path(log), []
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            process = context.Process(
                target=_begin, args=(server, common | ranks, log, errors, cwd, target, arguments)
            )
            process.start()
            self.processes.append(process)

    def poll(self) -> int | None:
        """The first exit code that is not 0, 0 when all have ended, None while they run."""
        codes = [process.exitcode for process in self.processes]
        return next((c for c in codes if c), None if None in codes else 0)

    def wait(self, timeout: float = 300) -> int:
        """`poll` at the end; when a process fails, the others have half a minute to end too."""
        end = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        for process in self.processes:
            process.join(30 if self.poll() else 0)
        code = self.poll()
        self.kill()
        assert code is not None, f"not done after {timeout:.0f} s: {self.read_log()[-3000:]}"
        return code

    def kill(self) -> None:
        """SIGKILL to all of them and to what they started."""
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                for child in [parent, *parent.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            process.join()

    def read_log(self) -> str:
        return self.log.read_text() if self.log else ""
