"""Write a folder that is a Hugging Face Space: `make space`.

It holds the app, the modules of the kit that the app reaches by its imports, the built-in model,
the pins of what they import, and a card that says how to push it and which variables there are.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import shutil
import sys
from pathlib import Path

from rorem_lib.app.app import OPTIONS
from rorem_lib.files import ROOT, is_filled, write_text

LIBRARY = ROOT / "rorem_lib"
UNSEEN = {"accelerate", "safetensors"}  # diffusers and transformers look for them
CARD = """\
---
title: RORem
emoji: 🧹
colorFrom: pink
colorTo: gray
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
license: apache-2.0
short_description: Remove an object from a photo, the rest untouched
suggested_hardware: zero-a10g
---

# Remove an object from a photo

The app of the RORem kit (CVPR 2025, arXiv 2501.00740). To publish it:

    hf repos create YOU/rorem --type space --sdk gradio
    hf upload YOU/rorem {folder} . --type space

Without a variable it runs the built-in miniature, which is for rendered scenes and not for
photographs. Set in the Space's settings, under Variables:

| variable | |
|---|---|
{variables}

On ZeroGPU each removal borrows a GPU. Photos and results are deleted after an hour.
"""


def find_modules(start: str = "rorem_lib.app.app") -> tuple[dict[str, Path], set[str]]:
    """The kit's modules that one reaches by imports, wherever in the code, and other packages.

    Returns:
        Dotted names with their files, packages' `__init__.py` included; and the top-level names of
        what is imported from outside.
    """
    found, outside, waiting = {}, set(), [start]
    while waiting:
        name = waiting.pop()
        path = ROOT / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in found or not path.is_file():
            continue  # a name in a module
        found[name] = path
        waiting.append(name.rpartition(".")[0] or name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            waiting += [x for x in names if x.partition(".")[0] == "rorem_lib"]
            outside |= {x.partition(".")[0] for x in names}
    return found, outside - {"rorem_lib", *sys.stdlib_module_names}


def choose_pins(imported: set[str]) -> list[str]:
    """The lines of requirements/core.txt that pin what is imported."""
    owners = importlib.metadata.packages_distributions()
    found = (owner for name in imported for owner in owners.get(name, []))
    wanted = {owner.lower().replace("_", "-") for owner in found} | UNSEEN
    lines = (ROOT / "requirements" / "core.txt").read_text().splitlines()
    return [line for line in lines if line.partition("==")[0] in wanted]


def write_space(folder: Path, *, overwrite: bool = False) -> Path:
    """Write the Space.

    Raises:
        FileExistsError: the folder holds something and `overwrite` is off. With it files of the
            same names are replaced and all others stay, such as a clone's `.git`.
    """
    if is_filled(folder) and not overwrite:
        raise FileExistsError(
            f'{folder} holds files already: make space ARGS="--overwrite" replaces those of the '
            'same names and keeps the others, ARGS="FOLDER" takes another folder'
        )
    modules, imported = find_modules()
    pins = choose_pins(imported)
    data = [p for p in (LIBRARY / "builtin").rglob("*") if p.is_file() and p.suffix != ".py"]
    for path in [*modules.values(), *(p for p in data if "__pycache__" not in p.parts)]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    shutil.copyfile(modules["rorem_lib.app.app"], folder / "app.py")
    write_text(folder / "requirements.txt", "".join(f"{pin}\n" for pin in pins))
    (gradio,) = (pin.partition("==")[2] for pin in pins if pin.startswith("gradio=="))
    variables = [
        f"| `{name}` | {text}{f' (default: {default})' if default else ''} |"
        for _, name, default, _, text in OPTIONS
    ]
    card = CARD.format(gradio=gradio, folder=folder.name, variables="\n".join(variables))
    write_text(folder / "README.md", card)
    return folder


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rorem_lib.app.space", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "space")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    options = parser.parse_args(arguments)
    try:
        folder = write_space(options.folder, overwrite=options.overwrite)
    except OSError as error:
        print(f"make space: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB. Its README.md says how to push it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
