"""What the code of a notebook's cells does, however it is written.

A stage's fingerprint is made of it: a comment, a message, a renamed variable or another import must
not repeat a training that took weeks.
"""

from __future__ import annotations

import ast
import io
import itertools
import tokenize

from rorem_lib.files import ROOT

PACKAGE = "rorem_lib"
# Functions and methods whose call as a statement shows something and changes nothing.
LOOKS = frozenset(
    "print display Image Markdown save_figure format_number asdict sorted len round str int float "
    "bool sum min max any all list dict set tuple zip enumerate range abs isinstance type vars "
    "glob iterdir rglob relative_to startswith endswith removeprefix removesuffix join items keys "
    "values get replace split strip format DataFrame Series crosstab concat describe to_frame head "
    "tail set_index reset_index sort_values rename rename_axis value_counts fillna hide astype "
    "tolist nunique mean median std numel parameters "
    "getLogger debug info warning error critical exception warn".split()
)
# Of these the last call of a statement may be a file's: `path.rename(other)` changes something.
_MAY_MOVE = frozenset("rename replace join".split())
# Where one of these is called, a variable may be read without its name.
_READ_ALL = frozenset("globals locals vars eval exec".split())
_IMPORTS = (ast.Import, ast.ImportFrom)
_AWAIT = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT


def describe_code(sources: list[str], *, parameters=()) -> list:
    """What notebook cells do, the same for all ways to write it that change no result.

    Left out are comments, imports, messages of errors and assertions, statements that only print,
    log or draw, and variables that nothing else reads. Variables go by the order in which they are
    bound, imported names by what they were imported as; parameters, attributes and names of
    arguments stay.

    Args:
        sources: the cells, in order; statements that begin with `%` or `!` are left out.
        parameters: names that stay as they are.

    Returns:
        Nested lists of strings, fit for JSON.

    Raises:
        SyntaxError: a cell is no Python; its `filename` says which.
    """
    body = [statement for tree in parse_cells(sources) for statement in tree.body]
    body = _drop_unread(_drop_looks(body), frozenset(parameters))
    return _write(body, _collect_names(body, frozenset(parameters)))


def parse_cells(sources: list[str]) -> list[ast.Module]:
    """The cells' syntax trees, top-level `await` allowed."""
    trees = []
    for number, source in enumerate(sources, 1):
        lines = source.split("\n")
        for place, line in enumerate(lines):
            if line.startswith(("%", "!")) and _is_statement_end(lines[:place]):
                lines[place] = "pass"
        trees.append(
            compile("\n".join(lines), f"code cell {number}", "exec", _AWAIT, dont_inherit=True)
        )
    return trees


def _is_statement_end(lines: list[str]) -> bool:
    """Whether these lines leave no string and no bracket open, so that a statement may follow."""
    try:
        list(tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline))
    except tokenize.TokenError:
        return False
    except SyntaxError:  # told by who compiles all of it
        return True
    return not (lines and lines[-1].endswith("\\"))


def name_call(call: ast.Call) -> str:
    """The name by which a function or method is called, the last part of it."""
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def _only_looks(node: ast.AST) -> bool:
    """Whether evaluating an expression shows something at most."""
    for part in ast.walk(node):
        if isinstance(part, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)):
            return False
        if isinstance(part, ast.Call):
            name = name_call(part)
            draws = name.startswith(("plot_", "tabulate_"))
            draws |= name.startswith("make_") and name.endswith("_table")
            if not draws and name not in LOOKS:
                return False
            if any(keyword.arg == "inplace" for keyword in part.keywords):
                return False
    last = node.value if isinstance(node, ast.Expr) else node
    return not (isinstance(last, ast.Call) and name_call(last) in _MAY_MOVE)


def _drop_looks(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements without those that only show something, in blocks too."""
    kept = []
    for node in body:
        if isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and _only_looks(node)):
            continue
        for block in ("body", "orelse", "finalbody"):
            if isinstance(getattr(node, block, None), list):
                setattr(node, block, _drop_looks(getattr(node, block)))
        head = getattr(node, "test", getattr(node, "iter", None))
        empty = isinstance(node, (ast.If, ast.For, ast.While)) and not (node.body or node.orelse)
        if not (empty and _only_looks(head)):
            kept.append(node)
    return kept


def _drop_unread(body: list[ast.stmt], kept: frozenset[str]) -> list[ast.stmt]:
    """Statements without those that only give a value to variables that nothing reads."""
    while True:
        parts = [part for statement in body for part in ast.walk(statement)]
        read = {part.id for part in parts if isinstance(part, ast.Name) and not _stores(part)}
        changed = {part.target for part in parts if isinstance(part, ast.AugAssign)}
        read |= {node.id for node in changed if isinstance(node, ast.Name)} | kept
        left = [node for node in body if read & _READ_ALL or not _only_binds(node, read)]
        if len(left) == len(body):
            return body
        body = left


def _stores(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


def _only_binds(node: ast.stmt, read: set[str]) -> bool:
    """Whether a statement is an assignment to plain variables, none of them in `read`."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = [target for target in targets if isinstance(target, ast.Name)]
    unread = len(names) == len(targets) and not read & {name.id for name in names}
    return unread and _only_looks(node.value)


def _collect_names(body: list[ast.stmt], kept: frozenset[str]) -> dict[str, str]:
    """Each name that the code binds -> what is written for it: a variable's number, in the order
    of first binding, or what an import brought. `kept` and unbound names (builtins) are not in it.
    """
    found: dict[str, str] = {}
    numbers = itertools.count()
    for node in (part for statement in body for part in ast.walk(statement)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                module = getattr(node, "module", None)
                full = f"{module}.{alias.name}" if module else alias.name if alias.asname else bound
                if full.partition(".")[0] == PACKAGE:  # its modules may move to another folder
                    place = (module or PACKAGE).split(".")
                    full = full.rpartition(".")[2]
                    if not ROOT.joinpath(*place).is_dir():  # a name of a module
                        full = f"{place[-1]}.{full}"
                found[bound] = f"import {full}"
            continue
        name = getattr(node, "arg", None) if isinstance(node, ast.arg) else None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        if name and name not in kept and name not in found:
            found[name] = f"${next(numbers)}"
    return found


def _write(node, names: dict[str, str]):
    """A syntax tree as nested lists. `ast.dump` writes it otherwise in each version of Python."""
    if isinstance(node, list):
        return [_write(item, names) for item in node if not isinstance(item, _IMPORTS)]
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Raise):  # the class counts, what it says does not
        return ["Raise", _write(getattr(node.exc, "func", node.exc), names)]
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
    if isinstance(node, ast.arg):
        fields["arg"] = names.get(node.arg, node.arg)
    if isinstance(node, ast.Assert):
        fields.pop("msg", None)
    fields.pop("ctx", None)
    return [type(node).__name__, *([name, _write(value, names)] for name, value in fields.items())]
