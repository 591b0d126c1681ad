"""What the code of a notebook's cells does, however it is written.

A stage's fingerprint is made of it: a comment, a message, a renamed variable or another import must
not repeat a training that took weeks.
"""

from __future__ import annotations

import ast

PACKAGE = "rorem_lib"
# Functions and methods whose call as a statement shows something and changes nothing.
LOOKS = frozenset(
    "print display Image Markdown save_figure format_number asdict sorted len round str int float "
    "bool sum min max any all list dict set tuple zip enumerate range abs isinstance type vars "
    "glob iterdir rglob relative_to startswith endswith removeprefix removesuffix join items keys "
    "values get replace split strip format DataFrame Series crosstab concat describe to_frame head "
    "tail set_index reset_index sort_values rename rename_axis value_counts fillna hide astype "
    "tolist nunique mean median std numel parameters".split()
)
_AWAIT = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
_LAZY = (ast.GeneratorExp, ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef)
_SCOPES = (ast.ListComp, ast.SetComp, ast.DictComp, *_LAZY)
_ORDER = {  # fields in the order in which Python evaluates them
    ast.Assign: ("value", "targets"),
    ast.AnnAssign: ("value", "target"),
    ast.AugAssign: ("value", "target", "op"),
    ast.NamedExpr: ("value", "target"),
    ast.For: ("iter", "target", "body", "orelse"),
    ast.ListComp: ("generators", "elt"),
    ast.SetComp: ("generators", "elt"),
    ast.GeneratorExp: ("generators", "elt"),
    ast.DictComp: ("generators", "key", "value"),
    ast.comprehension: ("iter", "target", "ifs", "is_async"),
    ast.arguments: (
        *("defaults", "kw_defaults"),
        *("posonlyargs", "args", "vararg", "kwonlyargs", "kwarg"),
    ),
    ast.Assert: ("test",),  # not its message
}


def describe_code(sources: list[str], *, parameters=()) -> list:
    """What notebook cells do, the same for all ways to write it that change no result.

    Left out are comments, imports, messages of errors and assertions, and statements that only
    print or draw. Variables go by the order in which they are bound, imported names by what they
    were imported as; parameters, attributes and names of arguments stay.

    Args:
        sources: the cells, in order; lines that begin with `%` or `!` are left out.
        parameters: names that stay as they are.

    Returns:
        Nested lists of strings, fit for JSON.

    Raises:
        SyntaxError: a cell is no Python; its `filename` says which.
    """
    body = [statement for tree in parse_cells(sources) for statement in tree.body]
    return _CodeWriter(parameters, body).write(_drop_looks(body))


def parse_cells(sources: list[str]) -> list[ast.Module]:
    """The cells' syntax trees, top-level `await` allowed."""
    trees = []
    for number, source in enumerate(sources, 1):
        lines = ["pass" if line.startswith(("%", "!")) else line for line in source.splitlines()]
        trees.append(
            compile("\n".join(lines), f"code cell {number}", "exec", _AWAIT, dont_inherit=True)
        )
    return trees


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
            draws = name.startswith(("plot_", "tabulate_")) or name[-6:] == "_table"
            if not draws and name not in LOOKS:
                return False
    return True


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


class _CodeWriter:
    """Writes syntax trees as nested lists, see `describe_code`.

    `ast.dump` and `ast.unparse` would do but for the names, and for what they write, which changes
    with Python's version.
    """

    def __init__(self, parameters, body: list[ast.stmt]):
        self.parameters, self.depth, self.count = frozenset(parameters), 0, 0
        self.scopes: list[dict[str, str]] = [{}]  # name -> what is written for it, innermost last
        lazy = [n for tree in body for n in ast.walk(tree) if isinstance(n, _LAZY)]
        self.late = {n.id for tree in lazy for n in ast.walk(tree) if isinstance(n, ast.Name)}

    def write(self, node):
        if isinstance(node, list):
            return [text for item in node if (text := self.write(item)) is not None]
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return self._note_import(node)
        if isinstance(node, (ast.Name, ast.arg)):
            bound = isinstance(getattr(node, "ctx", ast.Store()), ast.Store)
            return self._rename(getattr(node, "id", None) or node.arg, bound)
        if isinstance(node, ast.Raise):  # the class counts, what it says does not
            return ["Raise", self.write(getattr(node.exc, "func", node.exc))]
        self.scopes += [{}] * isinstance(node, _SCOPES)
        written = [type(node).__name__]
        for name in _ORDER.get(type(node), node._fields):
            value = getattr(node, name, None)
            if name == "ctx" or value == [] or (value is None and name != "value"):
                continue  # as in the Pythons that lack this field
            inner = isinstance(value, list) and name in ("body", "orelse", "handlers", "finalbody")
            inner = inner or isinstance(node, ast.AugAssign)  # its target is an old variable
            self.depth += inner
            written.append([name, self.write(value)])
            self.depth -= inner
        if isinstance(node, _SCOPES):
            self.scopes.pop()
        return written

    def _note_import(self, node) -> None:
        """An import counts where its name is used; of the kit's modules, which may move, only the
        name does."""
        for alias in node.names:
            bound = alias.asname or alias.name.partition(".")[0]
            module = getattr(node, "module", None)
            full = f"{module}.{alias.name}" if module else alias.name if alias.asname else bound
            if full.partition(".")[0] == PACKAGE:
                full = full.rpartition(".")[2]
            self.scopes[-1][bound] = f"import {full}"

    def _rename(self, name: str, bound: bool) -> str:
        inner = len(self.scopes) > 1
        known = next((scope[name] for scope in reversed(self.scopes) if name in scope), None)
        if name in self.parameters and known is None and not (bound and inner):
            return name
        if not bound:
            return known or name
        # Bound outside of all blocks, a name begins anew: variables that happen to share it need
        # not be renamed together. Not where a function reads it later.
        anew = name not in self.scopes[-1] if inner else not self.depth and name not in self.late
        if anew or known is None or known.startswith("import "):
            self.count += 1
            self.scopes[-1][name] = known = f"${self.count}"
        return known
