"""The library's floors: imports point down, no circle closes, the first page names the rooms."""

import ast
import re
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[1] / "rorem_lib"
# From the ground up; what stands on one floor may import what lies below, and a package its own.
FLOORS = (
    ("files", "workers", "parameters", "plots", "metrics", "intervals"),
    ("data", "acceptance"),
    ("models", "labels", "sources", "drawing"),
    ("builtin",),
    ("sets",),
    ("training",),
    ("remover", "removal", "discriminator", "pretrain"),
    ("distill", "evaluation", "app"),
    ("runner",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Rooms that stand above others of their floor.
ABOVE = {("plots", "files"), ("workers", "files"), ("parameters", "files")}


def list_modules(library: Path = LIBRARY) -> dict[str, Path]:
    """Dotted names below the package; a package's `__init__` has the package's name."""
    found = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def list_imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports, wherever in its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where an arrow points"
            origin = node.module
            names = [f"{origin}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            origin, names = "", [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            for candidate in (name, origin):
                below = candidate.removeprefix("rorem_lib").lstrip(".")
                if candidate.startswith("rorem_lib") and below in modules:
                    found.add(below)
                    break
    return found - {""}


def get_room(module: str) -> str:
    return module.partition(".")[0]


def find_faults(imports: dict[str, set[str]]) -> list[str]:
    """Imports that point up or sideways, as "module -> module"."""
    faults = []
    for module, used in imports.items():
        for other in used:
            room, target = get_room(module), get_room(other)
            if room != target and (room, target) not in ABOVE:
                if FLOOR_OF[room] <= FLOOR_OF[target]:
                    faults.append(f"{module} -> {other}")
    return faults


def find_circle(imports: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, or nothing."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return []
        for other in sorted(imports.get(module, ())):
            if circle := walk(other, [*way, module]):
                return circle
        done.add(module)
        return []

    for module in imports:
        if circle := walk(module, []):
            return circle
    return []


@pytest.fixture(scope="module")
def imports():
    modules = list_modules()
    return {name: list_imports(path, modules) for name, path in modules.items() if name}


def test_every_room_has_a_floor(imports):
    rooms = {get_room(module) for module in imports}
    assert rooms - set(FLOOR_OF) == set(), "say in FLOORS where it stands"
    assert set(FLOOR_OF) - rooms == set(), "it is gone: take it out of FLOORS"


def test_imports_point_down(imports):
    assert sum(map(len, imports.values())) > 150, "the walk sees something"
    assert find_faults(imports) == []


def test_no_circle_closes(imports):
    assert find_circle(imports) == []


def test_the_walk_sees_what_is_wrong(imports):
    assert find_faults(imports | {"files": {"data.masks"}}) == ["files -> data.masks"]
    assert find_faults(imports | {"models.sdxl": {"labels.log"}}) == ["models.sdxl -> labels.log"]
    wrong = imports | {"data.masks": {"data.writer"}}
    assert find_faults(wrong) == [] and "data.masks" in find_circle(wrong)


def test_the_first_page_names_every_room():
    text = (LIBRARY / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+)(?:/|\.py)`", text))
    assert set(FLOOR_OF) <= named, sorted(set(FLOOR_OF) - named)
