"""The notes on papers: their tables add up, their citations and names of code exist."""

import ast
import csv
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAPERS, LIBRARY = ROOT / "papers", ROOT / "rorem_lib"
NOTES = sorted(PAPERS.glob("*.md"))
BIBLIOGRAPHY = (PAPERS / "references.bib").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^@\w+\{(\w+),(.*?)^\}", BIBLIOGRAPHY, re.MULTILINE | re.DOTALL)


def read_table(name: str) -> list[dict]:
    with open(PAPERS / "tables" / name, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def read_prose(note: Path) -> str:
    return note.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------- tables


def test_table_1_adds_up():
    total = 0
    for row in read_table("table1.csv")[1:]:
        total += int(row["selected"])
        assert int(row["total"]) == total, row["row"]
    assert total == 201_134


def test_table_1_shares_are_selected_of_candidates():
    rows = [row for row in read_table("table1.csv") if row["accept_percent"]]
    assert [row["row"].split()[0] for row in rows] == ["human", "automation"] * 3
    for row in rows:
        share = 100 * int(row["selected"]) / int(row["candidates"])
        assert round(share, 1) == float(row["accept_percent"]), row["row"]


def test_note_repeats_table_1():
    text = read_prose(PAPERS / "rorem.md")
    for row in read_table("table1.csv"):
        for key in ("candidates", "selected", "total"):
            if row[key]:
                assert f"{int(row[key]):,}" in text, row["row"]
        assert f"{row['success_percent']} % | {row['psnr_db']}" in text, row["row"]


@pytest.mark.parametrize("size", ["512", "1024"])
def test_table_2_rates_are_of_500_pictures(size):
    rows = read_table(f"table2_{size}.csv")
    assert len({row["method"] for row in rows}) == len(rows) == 9
    for row in rows:
        for key in ("success_human_percent", "success_discriminator_percent"):
            assert round(5 * float(row[key]), 6).is_integer(), (row["method"], key)


def test_discriminator_is_as_far_from_people_as_the_note_says():
    rows = read_table("table2_512.csv") + read_table("table2_1024.csv")
    gaps = [
        round(
            abs(float(row["success_human_percent"]) - float(row["success_discriminator_percent"])),
            1,
        )
        for row in rows
    ]
    assert round(sum(gaps) / len(gaps), 1) == 2.9
    assert max(gaps) == 7.8
    assert sum(gap < 3 for gap in gaps) == 10


def test_tables_agree_on_the_final_model():
    last = read_table("table1.csv")[-1]
    rorem = next(row for row in read_table("table2_512.csv") if row["method"] == "RORem")
    assert (last["success_percent"], last["psnr_db"]) == (
        rorem["success_human_percent"],
        rorem["psnr_db"],
    )


# ------------------------------------------------------------------------------ names of code


@cache
def parse_module(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def list_names(body) -> dict[str, ast.AST]:
    """What a module or class body defines or imports: name -> the node that does."""
    names = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
        elif isinstance(node, ast.Assign):
            names |= {
                part.id: node
                for target in node.targets
                for part in ast.walk(target)
                if isinstance(part, ast.Name)
            }
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: node for alias in node.names}
    return names


def find_code(name: str) -> bool:
    """Whether `module.thing` or `package.module.Class.thing` exists in the library."""
    place, parts = LIBRARY, name.split(".")
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    if not parts:
        return (place / "__init__.py").is_file()
    path = place / f"{parts.pop(0)}.py"
    if not path.is_file():
        return False
    body = parse_module(path).body
    for part in parts:
        node = list_names(body).get(part)
        if node is None:
            return False
        body = getattr(node, "body", [])
    return True


def find_mentions(note: Path) -> set[str]:
    """Names of code in a note: whatever is dotted, in backticks, and no file."""
    text = read_prose(note)
    dotted = re.findall(r"`([a-z_]\w*(?:\.\w+)+)`", text)
    endings = ("md", "csv", "json", "jsonl", "bib", "safetensors", "py", "yaml", "ipynb")
    return {name for name in dotted if name.rsplit(".", 1)[1] not in endings}


def test_names_of_code_are_told_from_others():
    assert find_code("remover.RemoverObjective.compute_loss")
    assert find_code("builtin.scenes.render_scene")
    assert find_code("labels.votes.Label")  # defined elsewhere, reachable here
    assert not find_code("remover.RemoverObjective.compute_losses")
    assert not find_code("removers.train_remover")
    assert not find_code("loop.LoopConfig.mask_weight")


@pytest.mark.parametrize("note", NOTES, ids=lambda note: note.stem)
def test_code_that_notes_name_exists(note):
    mentions = find_mentions(note)
    assert sorted(name for name in mentions if not find_code(name)) == []


def test_every_step_of_the_method_names_its_module():
    text = read_prose(PAPERS / "rorem.md").split("## Data")[0]
    rows = [line.split("|")[4] for line in text.splitlines() if re.match(r"\| .+\| 0\d \|", line)]
    modules = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert len(rows) == 10 and len(modules) >= len(rows)
    assert [name for name in modules if not find_code(name)] == []


def test_notes_map_equations_to_code():
    counts = {note.stem: len(find_mentions(note)) for note in NOTES}
    assert counts["rorem"] > 40 and counts["lcm"] > 8 and counts["zero_snr"] > 5, counts


def test_files_that_notes_name_exist():
    for note in NOTES:
        for link in re.findall(r"\]\(([^)#:]+)\)", read_prose(note)):
            assert (PAPERS / link).is_file(), f"{note.name}: {link}"
        for name in re.findall(r"`((?:rorem_lib|tests)/[\w/]+\.py)`", read_prose(note)):
            assert (ROOT / name).is_file(), f"{note.name}: {name}"


# ------------------------------------------------------------------------------- bibliography


def test_citations_have_entries():
    keys = [key for key, _ in ENTRIES]
    assert len(set(keys)) == len(keys) == BIBLIOGRAPHY.count("\n@")
    cited = {key for note in NOTES for key in re.findall(r"\[@(\w+)\]", read_prose(note))}
    assert cited - set(keys) == set()
    assert "li2025rorem" in cited


@pytest.mark.parametrize("key, fields", ENTRIES, ids=[key for key, _ in ENTRIES])
def test_entries_are_complete(key, fields):
    for name in ("title", "author", "year"):
        assert re.search(rf"^\s*{name}\s*=\s*\{{.+\}}", fields, re.MULTILINE), (key, name)
    assert re.search(r"^\s*(journal|booktitle)\s*=", fields, re.MULTILINE), key
    assert fields.count("{") == fields.count("}"), key
