"""The set-up files agree with one another and with what is imported, and make does what it says."""

import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def read_pins(*names: str) -> dict[str, str]:
    """{canonical name: version} of requirement files; every line must be name==version."""
    pins = {}
    for name in names:
        for line in (ROOT / "requirements" / name).read_text().splitlines():
            if not line or line.startswith("#"):
                continue
            project, version = line.split("==")
            assert canonicalize_name(project) not in pins, f"{project} stands twice in {names}"
            pins[canonicalize_name(project)] = version
    return pins


def compare_names(requirements: list[str], pins: dict[str, str]) -> None:
    """Both name the same packages, and each pin is a version that the requirement admits."""
    ranges = {canonicalize_name(r.name): r.specifier for r in map(Requirement, requirements)}
    assert ranges.keys() == pins.keys()
    for name, version in pins.items():
        assert version in ranges[name], f"{name}=={version} is outside {ranges[name]}"


def test_pyproject_names_what_core_pins():
    compare_names(PROJECT["project"]["dependencies"], read_pins("core.txt"))


def test_pyproject_names_what_dev_pins():
    compare_names(PROJECT["dependency-groups"]["dev"], read_pins("dev.txt"))


def test_pyproject_names_what_export_pins():
    compare_names(EXTRAS["export"], read_pins("export.txt"))


def test_constraints_hold_every_pin():
    constraints = read_pins("constraints.txt")
    pins = read_pins("core.txt", "dev.txt") | read_pins("export.txt")
    for name, version in pins.items():
        assert constraints.get(name) == version
    for extra in [Requirement(r) for requirements in EXTRAS.values() for r in requirements]:
        assert constraints[canonicalize_name(extra.name)] in extra.specifier


def test_torch_is_exact_and_stands_without_torchvision():
    assert read_pins("core.txt")["torch"] == "2.13.0"
    assert "torch==2.13.0" in PROJECT["project"]["dependencies"]
    files = [*(ROOT / "requirements").glob("*.txt"), ROOT / "pyproject.toml"]
    for path in [*files, ROOT / "environment.yaml"]:
        text = path.read_text()
        assert "torchvision" not in text, path
        # A local version (2.13.0+cpu) would keep GPU hosts from the CUDA build of the same release.
        assert "+cpu" not in text and "+cu" not in text, path


def test_conda_environment_has_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    *conda, block = environment["dependencies"]
    assert conda == ["python=3.11", "pip"]
    options = [line for line in block["pip"] if line.startswith("-")]
    assert options == ["-c requirements/constraints.txt", "-e ."]
    pins = [line.split("==") for line in block["pip"] if not line.startswith("-")]
    assert {canonicalize_name(n): v for n, v in pins} == read_pins("core.txt", "dev.txt")
    assert Requirement(f"python{PROJECT['project']['requires-python']}").specifier.contains("3.11")


def test_installed_versions_are_the_pinned_ones():
    for name, pin in read_pins("core.txt", "dev.txt").items():
        # torch reports its build too, as 2.13.0+cpu.
        assert importlib.metadata.version(name).split("+")[0] == pin, name


def find_imports(source: str) -> tuple[set[str], set[str]]:
    """Absolute imports of a module: those that run when it is imported, and all of them."""
    tree = ast.parse(source)
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try | ast.If)
        for node in ast.walk(function)
    }
    at_import, all_of_them = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = {node.module.split(".")[0]}
        else:
            continue
        all_of_them |= names
        if id(node) not in inner:
            at_import |= names
    return at_import, all_of_them


def read_code() -> list[tuple[Path, str]]:
    """Every module of the library, and the code cells of every notebook without magics."""
    code = [(path, path.read_text()) for path in sorted((ROOT / "rorem_lib").rglob("*.py"))]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        lines = [
            line.rstrip("\n")
            for cell in cells
            if cell["cell_type"] == "code"
            for line in "".join(cell["source"]).splitlines()
            if not line.lstrip().startswith(("%", "!"))
        ]
        code.append((path, "\n".join(lines)))
    return code


def test_every_import_is_of_a_pinned_package():
    core = set(read_pins("core.txt"))
    optional = {canonicalize_name(Requirement(r).name) for extra in EXTRAS.values() for r in extra}
    distributions = importlib.metadata.packages_distributions()
    code = read_code()
    assert code, "no module was found"
    for path, source in code:
        at_import, all_of_them = find_imports(source)
        for name in all_of_them - set(sys.stdlib_module_names) - {"rorem_lib"}:
            owners = {canonicalize_name(d) for d in distributions.get(name, [name])}
            assert owners & (core | optional), f"{path} imports {name}, which nothing pins"
            # An extra may be missing: it is imported where it is used, not with the module.
            assert name not in at_import or owners & core, f"{path} needs the extra {name} to load"


def test_library_itself_imports_nothing_heavy():
    probe = "import sys, rorem_lib; print(rorem_lib.__version__, 'torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.split() == [importlib.metadata.version("rorem-lib"), "False"]


def test_console_script_is_the_cli():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="rorem")
    assert {script.value for script in scripts} == {"rorem_lib.runner.cli:main"}


def test_license_is_the_whole_apache_text():
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "9. Accepting Warranty or Additional Liability" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_ignores_what_runs_make_and_keeps_what_ships():
    def is_ignored(path: str) -> bool:
        command = ["git", "-C", str(ROOT), "check-ignore", "--no-index", "-q", path]
        return subprocess.run(command, check=False).returncode == 0

    for path in (".venv/bin/python", "runs/demo/report.html", "training/base/checkpoint-100/x"):
        assert is_ignored(path), path
    for path in (
        "rorem_lib/builtin/model/unet/x.safetensors",
        "notebooks/recipes/demo.yaml",
        ".ci/run",
    ):
        assert not is_ignored(path), path


# make and .ci/run are run for real, in a copy with stand-ins for make and for Python.


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize("status", [0, 3])
def test_ci_calls_make_test_and_keeps_its_status(tmp_path, status):
    write_program(
        tmp_path / "bin" / "make",
        f'#!/bin/sh\necho "$PWD" "$@" >> {tmp_path}/calls\nexit {status}\n',
    )
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    result = subprocess.run(
        ["bash", str(ROOT / ".ci" / "run")], env=environment, cwd=tmp_path, check=False
    )
    assert result.returncode == status
    assert (tmp_path / "calls").read_text() == f"{ROOT} test\n"


# Stands for python3 (its version test passes or fails), for .venv/bin/python and for pip.
FAKE_PYTHON = f"""#!/bin/bash
case "$1 $2" in
  "-c import ensurepip"*)
    exec {sys.executable} -c "import sys; sys.version_info = (${{FAKE_VERSION:-3, 11}}, 0); $2" ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo venv >> calls ;;
  "-m pip") echo "$@" >> calls
    if [ -n "$FAKE_KILL" ] && [[ "$*" == *"$FAKE_KILL"* ]]; then kill -9 $PPID; fi
    exit ${{FAKE_PIP_STATUS:-0}} ;;
  "-m jupyterlab") echo "$@" >> calls ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """Function that makes targets in a copy of the set-up files, with a stand-in for Python."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    write_program(tmp_path / "python", FAKE_PYTHON)

    def run_make(target: str, **environment: str) -> subprocess.CompletedProcess:
        # A make that runs these tests leaves its own flags in the environment.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
        return subprocess.run(
            [shutil.which("make"), f"PYTHON={tmp_path / 'python'}", target],
            cwd=folder,
            env=inherited | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    run_make.folder = folder
    run_make.read_calls = lambda: (folder / "calls").read_text().splitlines()
    return run_make


@pytest.mark.parametrize("user", [0, 1000])
def test_make_tells_root_what_it_does_as_root(checkout, tmp_path, user):
    write_program(tmp_path / "tools" / "id", f"#!/bin/bash\necho {user}\n")
    lab = checkout("lab", PATH=f"{tmp_path / 'tools'}:{os.environ['PATH']}")
    assert lab.returncode == 0, lab.stderr
    words = checkout.read_calls()[-1].split()
    assert words[:2] == ["-m", "jupyterlab"] and ("--allow-root" in words) == (user == 0)
    assert len([x for x in lab.stdout.splitlines() if "--allow-root" in x]) == (user == 0)

    write_program(tmp_path / "tools" / "apt-get", f"#!/bin/bash\n: > '{tmp_path}/apt'\nexit 1\n")
    browser = checkout("browser", PATH=str(tmp_path / "tools"))
    assert browser.returncode == 0 and "the browser tests will not run" in browser.stderr
    assert (tmp_path / "apt").exists() == (user == 0)
    assert len([x for x in browser.stdout.splitlines() if "apt-get" in x]) == (user == 0)


def make_older(path: Path) -> None:
    """Set a file's time back, so that what is written next is newer whatever the clock's grain."""
    past = path.stat().st_mtime - 10
    os.utime(path, (past, past))


def test_make_installs_once_and_again_when_pins_change(checkout):
    for path in [checkout.folder / "pyproject.toml", *checkout.folder.glob("requirements/*")]:
        make_older(path)
    result = checkout(".venv/.dev")
    assert result.returncode == 0, result.stderr
    calls = checkout.read_calls()
    assert [call.split()[-1] for call in calls] == ["venv", ".", "requirements/dev.txt"]
    assert all("-c requirements/constraints.txt" in call for call in calls[1:])

    checkout(".venv/.dev")
    assert checkout.read_calls() == calls, "nothing changed, yet it was installed again"

    make_older(checkout.folder / ".venv" / ".core")
    make_older(checkout.folder / ".venv" / ".dev")
    (checkout.folder / "requirements" / "constraints.txt").touch()
    checkout(".venv/.dev")
    assert checkout.read_calls() == calls + calls[1:], "changed pins were not installed"


def test_failed_install_is_tried_again(checkout):
    result = checkout(".venv/.core", FAKE_PIP_STATUS="1")
    assert result.returncode != 0
    assert not (checkout.folder / ".venv" / ".core").exists()
    assert checkout(".venv/.core").returncode == 0
    assert [call.split()[0] for call in checkout.read_calls()] == ["venv", "-m", "-m"]


def test_killed_install_starts_from_an_empty_environment(checkout):
    assert checkout(".venv/.core", FAKE_KILL="-e .").returncode != 0
    assert not (checkout.folder / ".venv" / ".core").exists()
    assert checkout(".venv/.core").returncode == 0
    assert [call.split()[0] for call in checkout.read_calls()] == ["venv", "-m", "venv", "-m"]


def test_killed_install_of_the_test_tools_starts_from_an_empty_environment(checkout):
    assert checkout(".venv/.dev", FAKE_KILL="dev.txt").returncode != 0
    assert checkout(".venv/.core").returncode == 0
    calls = [call.split()[0] for call in checkout.read_calls()]
    assert calls == ["venv", "-m", "-m", "venv", "-m"]


def test_second_make_leaves_an_install_under_way_alone(checkout):
    (checkout.folder / ".venv").mkdir()
    (checkout.folder / ".venv" / ".installing").write_text(f"{os.getpid()}\n")
    result = checkout(".venv/.core")
    assert result.returncode != 0
    assert f"Process {os.getpid()} is installing" in result.stderr
    assert not (checkout.folder / "calls").exists()


def test_moved_environment_is_made_anew(checkout):
    assert checkout(".venv/.core").returncode == 0
    (checkout.folder / ".venv" / ".place").write_text("/somewhere/else\n")
    assert checkout(".venv/.core").returncode == 0
    assert checkout.read_calls().count("venv") == 2


def test_old_python_is_refused_by_name(checkout):
    result = checkout(".venv/.core", FAKE_VERSION="3, 10")
    assert result.returncode != 0
    assert "No Python 3.11 or newer" in result.stderr
    assert not (checkout.folder / ".venv").exists()
