"""Code with old names, rewritten: identifiers are exchanged where they stand, and no character beside them changes."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Mapping

__all__ = ["rewritten"]

_PACKAGE = __name__.partition(".")[0]

Scope = dict[str, set[str | None]]  # names, with what they stand for: a path inside of the package, None for all else
Scopes = tuple[Scope, ...]  # those in which Python looks for a name, the innermost first
Use = ast.Attribute | ast.Name | ast.alias  # the last is a part of an import


def rewritten(text: str, renamed: Mapping[str, str]) -> str:
    """The code of a module, with new names for what it takes from the package by old ones; SyntaxError if it is none.

    A name that is imported alone is exchanged wherever it stands. If it stands for something else as well, in a string
    or in a comment, or is imported for others only, the import goes on to give it: ``import new as old``.

    >>> rewritten("import loopwright as lw; lw.optim.old(old)", {"optim.old": "optim.new"})
    'import loopwright as lw; lw.optim.new(old)'
    """
    if _PACKAGE not in text or not any(_last(path) in text for path in renamed):
        return text
    with warnings.catch_warnings(action="ignore"):  # what Python has to say of other lines
        tree = ast.parse(text)
    lines = text.encode().splitlines(keepends=True)  # as ast counts: by newlines only, columns in UTF-8
    uses = [(use, path) for use, path in _uses(tree) if path in renamed and _stands(use, _last(path), lines)]
    edits: list[tuple[int, int, str, str]] = []
    for path, now in renamed.items():
        own, old, new = [use for use, of in uses if of == path], _last(path), _last(now)
        known = sum(_last(of or "") == old for _, of in uses) == len(_all(old, text)) and not _all(new, text)
        everywhere = known and any(isinstance(use, ast.Name) for use in own)
        given = any(isinstance(use, ast.alias) for use in own)  # by a line of its own, and not by import *
        for use in own:
            if isinstance(use, ast.alias) and use.asname is None and not everywhere:
                edits.append((*_place(use), old, f"{new} as {old}"))
            elif everywhere or not given or not isinstance(use, ast.Name):
                edits.append((*_place(use), old, new))
    for line, column, old, new in sorted(edits, reverse=True):
        lines[line] = lines[line][:column] + new.encode() + lines[line][column + len(old) :]
    return b"".join(lines).decode()


def _last(path: str | None) -> str:
    return (path or "").rpartition(".")[2]


def _all(word: str, text: str) -> list[str]:
    return re.findall(rf"\b{word}\b", text)


def _place(use: Use) -> tuple[int, int]:
    """Line and column of the identifier itself, from 0."""
    if isinstance(use, ast.Attribute):  # the end of lw.optim.name
        return (use.end_lineno or 0) - 1, (use.end_col_offset or 0) - len(use.attr.encode())
    return use.lineno - 1, use.col_offset


def _stands(use: Use, word: str, lines: list[bytes]) -> bool:
    """False for a name that an import has changed, and for places in f-strings that Python before 3.12 tells wrong."""
    name = use.attr if isinstance(use, ast.Attribute) else use.id if isinstance(use, ast.Name) else use.name
    line, column = _place(use)
    return name == word and lines[line][max(column, 0) :].startswith(word.encode())


def _uses(tree: ast.AST) -> Iterator[tuple[Use, str | None]]:
    """Every name that ``tree`` reads, and every one that it imports from a module, with what each stands for."""
    module: Scope = {}
    read: list[tuple[ast.Attribute | ast.Name, Scopes]] = []
    none: set[ast.AST] = set()
    todo: list[tuple[ast.AST, Scopes, Scopes]] = [(tree, (module,), (module,))]
    while todo:
        node, scopes, outer = todo.pop()  # outer: the scopes for a function that is written here
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.value.value is None:
            none.update(node.targets)  # `except ImportError: lw = None` makes nothing else of it
        for name, path in _bound(node) if node not in none else ():
            scopes[0].setdefault(name, set()).add(path)
        if isinstance(node, ast.ImportFrom):
            yield from ((one, _from(node, one)) for one in node.names)
        elif isinstance(node, (ast.Attribute, ast.Name)):
            read.append((node, scopes))
        elif isinstance(node, ast.Global):
            scopes[0].update((name, module.setdefault(name, set())) for name in node.names)
        body: list[ast.AST] = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            own: Scope = {}
            inner = outer
            if not isinstance(node, ast.ClassDef):  # what a class binds, its methods do not see
                own = {arg.arg: {None} for arg in ast.iter_child_nodes(node.args) if isinstance(arg, ast.arg)}
                inner = (own, *outer)
            body = [*node.body] if isinstance(node.body, list) else [node.body]
            todo += [(one, (own, *outer), inner) for one in reversed(body)]
        todo += [(child, scopes, outer) for child in reversed([*ast.iter_child_nodes(node)]) if child not in body]
    yield from ((one, _path(one, scopes)) for one, scopes in read)


def _bound(node: ast.AST) -> Iterator[tuple[str, str | None]]:
    """The names that a node binds, with what they stand for."""
    match node:
        case ast.Import(names=names):
            for one in names:
                first = one.name.partition(".")[0]
                yield one.asname or first, _inner(one.name if one.asname else first)
        case ast.ImportFrom(names=names):
            for one in names:
                yield one.asname or one.name, _from(node, one)
        case ast.Name(id=name, ctx=ast.Store()) | ast.MatchMapping(rest=str(name)):
            yield name, None
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name, None
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            yield name, None


def _inner(module: str) -> str | None:
    """The path of a module inside of the package."""
    first, _, rest = module.partition(".")
    return rest if first == _PACKAGE else None


def _from(node: ast.ImportFrom, one: ast.alias) -> str | None:
    return None if node.level else _joined(_inner(node.module or ""), one.name)


def _joined(path: str | None, name: str) -> str | None:
    return None if path is None else f"{path}.{name}".removeprefix(".")


def _path(node: ast.expr, scopes: Scopes) -> str | None:
    """What an expression stands for; None also where that is not one thing."""
    if isinstance(node, ast.Attribute):
        return _joined(_path(node.value, scopes), node.attr)
    if not isinstance(node, ast.Name):
        return None
    means = next((scope[node.id] for scope in scopes if node.id in scope), None)
    if means is None:  # then it comes by import *
        means = {path[:-1] + node.id for path in scopes[-1].get("*", ()) if path is not None}
    return next(iter(means)) if len(means) == 1 else None
