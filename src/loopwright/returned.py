"""Which names a step can return, told without calling it: by what is written of it, else by its annotation.

An upper bound: a name that is not among them cannot come. Where neither tells, nothing is claimed.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, get_type_hints, is_typeddict

from torch import Tensor, nn

from loopwright.written import is_name, parsed

__all__ = ["names_returned"]

Names = frozenset[str] | None  # None: not known

_LOSS = frozenset({"loss"})  # what a tensor or a number alone is logged as
_OF_TENSORS = ("mean", "sum", "item", "square", "abs", "sqrt", "exp", "squeeze", "detach", "clone")  # methods
_NUMBERS = ("float", "int", "abs", "sum", "len")
_HARMLESS = ("dict", "float", "isinstance", "len", "list", "print", "sorted", "str", "type", "update")  # with a dict
_READS = ("copy", "get", "items", "keys", "pop", "setdefault", "update", "values")  # of a dict, and what it puts there
_OF_NUMBERS = ("torch._C", "torch._VF", "torch.functional", "torch.nn.functional", "torch.nn.modules")  # give tensors
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)


def names_returned(step: Callable[..., Any], known: Mapping[Any, Names] | None = None) -> Names:
    """The keys of the dict that ``step`` returns, ``{"loss"}`` for a tensor; None where that cannot be told.

    Its source is read: dicts that are written out, operators, functions of torch, other methods of ``self`` and
    functions of one's own. What that does not tell an annotation may: ``-> Tensor``, or ``->`` a ``TypedDict``.
    ``known``: what is known of functions already.

    >>> def step(batch):
    ...     out = {"loss": batch.mean()}
    ...     out["kl"] = 0.0
    ...     return out
    >>> sorted(names_returned(step) or ())
    ['kl', 'loss']
    """
    return _Reader(known or {}).of(step)


class _Reader:
    """Follows what functions return; one that it is inside of already tells nothing more."""

    def __init__(self, known: Mapping[Any, Names]) -> None:
        self.known, self.inside = known, set[Any]()

    def of(self, step: Any, owner: Any = None) -> Names:
        """``owner``: what is passed on to a function that a decorator has wrapped."""
        function = getattr(step, "__func__", step)
        if isinstance(step, nn.Module):
            return self.of_module(step)
        if function in self.known:
            return self.known[function]
        if _is_torch(function):
            return _LOSS if inspect.isbuiltin(function) or _is_torch(function, _OF_NUMBERS) else None
        if not inspect.isfunction(function) or function in self.inside or inspect.isgeneratorfunction(function):
            return None
        tree, found = parsed(function), None
        if tree is not None:  # its decorators are no part of it: what they made is another function
            self.inside.add(function)
            found = _Body(self, tree, function, getattr(step, "__self__", owner)).returned()
            self.inside.discard(function)
        return _annotated(function) if found is None else found

    def of_module(self, module: nn.Module) -> Names:
        """What calling a module returns: a hook of its own may make anything of it."""
        if module._forward_hooks:
            return None
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module):
            return self.of_module(module[-1])
        if _is_torch(type(module)):  # one that calls another returns what that one does
            return _LOSS if _is_torch(type(module), _OF_NUMBERS) and not any(module.children()) else None
        return self.of(module.forward)


class _Body:
    """The source of one function, and what the names in it stand for."""

    def __init__(self, reader: _Reader, tree: ast.FunctionDef, function: Any, owner: Any) -> None:
        self.reader, self.tree, self.function, self.owner = reader, tree, function, owner
        self.nodes = list(_own_nodes(tree))
        self.foreign = {arg.arg for arg in ast.walk(tree.args) if isinstance(arg, ast.arg)}  # what others may change
        within = (node for node in self.nodes if isinstance(node, _FUNCTIONS))
        self.foreign |= {name.id for node in within for name in ast.walk(node) if isinstance(name, ast.Name)}
        self.following = set[str]()  # variables that are being looked at

    def returned(self) -> Names:
        return _all(self.value(node.value) for node in self.nodes if isinstance(node, ast.Return) and node.value)

    def value(self, node: ast.expr | None) -> Names:
        if isinstance(node, ast.Dict):
            return _all(self._entry(k, v) for k, v in zip(node.keys, node.values, strict=True))
        if isinstance(node, ast.Name):
            return self.variable(node.id)
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, ast.IfExp):
            return _all([self.value(node.body), self.value(node.orelse)])
        if isinstance(node, ast.BinOp):
            return _all([self.value(node.left), self.value(node.right)]) if isinstance(node.op, ast.BitOr) else _LOSS
        if isinstance(node, ast.Constant):
            return _LOSS if isinstance(node.value, (int, float)) else frozenset() if node.value is None else None
        return _LOSS if isinstance(node, ast.UnaryOp) else None

    def _entry(self, key: ast.expr | None, value: ast.expr) -> Names:
        if key is None:  # {**other}
            return self.value(value)
        return frozenset({key.value}) if isinstance(key, ast.Constant) and isinstance(key.value, str) else None

    def variable(self, name: str) -> Names:
        """All that is put into a variable, anywhere in the function; None if something else may change it."""
        if name in self.following:
            return frozenset()
        self.following.add(name)
        put = [one for node in self.nodes for one in self._put(node, name)]
        self.following.discard(name)
        seen, names = {id(target) for target, _ in put}, _all(names for _, names in put)
        elsewhere = any(_binds(n, name) and id(n) not in seen for n in self.nodes)  # a tuple, a loop
        if not put or elsewhere or name in self.foreign or (names is not _LOSS and self._is_handed_on(name)):
            return None
        return names

    def _put(self, node: ast.AST, name: str) -> Iterator[tuple[ast.AST, Names]]:
        """What ``node`` puts into the variable, with the node that says so."""
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if is_name(target, name):
                    yield target, self.value(node.value)
                elif isinstance(target, ast.Subscript) and is_name(target.value, name):
                    yield target, self._entry(target.slice, target.slice)
        elif isinstance(node, ast.AugAssign) and is_name(node.target, name):
            yield node.target, self.value(node.value) if isinstance(node.op, ast.BitOr) else _LOSS
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Subscript):
            if is_name(node.target.value, name):
                yield node.target, self._entry(node.target.slice, node.target.slice)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_name(node.func.value, name):
            if node.func.attr == "update":
                yield node, _all([*map(self.value, node.args), *map(self._keyword, node.keywords)])
            elif node.func.attr == "setdefault":
                yield node, self._entry(node.args[0], node.args[0]) if node.args else None

    def _is_handed_on(self, name: str) -> bool:
        """True if something else gets hold of a dict, and may put more into it."""
        fine = {id(node.value) for node in self.nodes if isinstance(node, (ast.Return, ast.Subscript))}
        for node in self.nodes:
            if isinstance(node, ast.Assign) and len(node.targets) > 1 and any(is_name(t, name) for t in node.targets):
                return True  # under another name as well
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _READS:
                fine.add(id(node.func.value))
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in _HARMLESS:
                fine |= set(map(id, node.args))
            elif isinstance(node, ast.Dict):
                fine |= {id(v) for k, v in zip(node.keys, node.values, strict=True) if k is None}
            elif isinstance(node, (ast.Compare, ast.BinOp)):
                fine |= set(map(id, ast.iter_child_nodes(node)))
        return any(is_name(n, name) and not _stores(n) and id(n) not in fine for n in self.nodes)

    def call(self, node: ast.Call) -> Names:
        func = node.func
        if isinstance(func, ast.Name) and func.id == "dict":
            return _all([*map(self.value, node.args), *map(self._keyword, node.keywords)])
        found = self._called(func)
        if found is not None:
            return self.reader.of(found, self.owner if any(isinstance(a, ast.Starred) for a in node.args) else None)
        known = _NUMBERS if isinstance(func, ast.Name) else _OF_TENSORS
        return _LOSS if getattr(func, "attr", getattr(func, "id", "")) in known else None

    def _keyword(self, keyword: ast.keyword) -> Names:
        return self.value(keyword.value) if keyword.arg is None else frozenset({keyword.arg})

    def _called(self, node: ast.expr) -> Any:
        """The object that is called; None where that is not known."""
        if isinstance(node, ast.Name):
            return _seen_from(self.function).get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        base = node.value
        if isinstance(base, ast.Call) and isinstance(base.func, ast.Name) and base.func.id == "super":
            kinds = type(self.owner).__mro__
            here = next((k for k in kinds if self.function in vars(k).values()), None)
            return None if here is None else getattr(super(here, self.owner), node.attr, None)
        is_self = self.owner is not None and is_name(base, next((a.arg for a in self.tree.args.args), ""))
        held = self.owner if is_self else self._called(base)
        asked = hasattr(inspect.getattr_static(type(held), node.attr, None), "__set__")  # a property: nothing is called
        return None if held is None or asked else getattr(held, node.attr, None)


def _annotated(function: Any) -> Names:
    """What an annotation of the returned value says, if it says something."""
    if "return" not in getattr(function, "__annotations__", {}):
        return None
    try:
        said = get_type_hints(function)["return"]
    except Exception:  # a name that only the type checker knows
        return None
    if is_typeddict(said):
        return frozenset(said.__annotations__)
    return _LOSS if isinstance(said, type) and issubclass(said, (Tensor, float)) else None


def _is_torch(thing: Any, parts: tuple[str, ...] = ("torch",)) -> bool:
    module = str(getattr(thing, "__module__", None))
    return any(module == part or module.startswith(f"{part}.") for part in parts)


def _seen_from(function: Any) -> dict[str, Any]:
    """Variables outside of a function, by the names that they have in it."""
    outer = inspect.getclosurevars(function)
    return {**outer.globals, **outer.nonlocals}


def _own_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, without those of functions within."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, _FUNCTIONS):
            yield from _own_nodes(node)


def _all(parts: Iterable[Names]) -> Names:
    """All names together; None if one of the parts is not known."""
    found = list(parts)
    if any(part is None for part in found):
        return None
    if found and all(part is _LOSS for part in found):
        return _LOSS
    return frozenset[str]().union(*(part for part in found if part is not None))


def _binds(node: ast.AST, name: str) -> bool:
    """True where ``name`` or an entry of it is given a value, also by ``case {**name}`` and ``except ... as name``."""
    if isinstance(node, (ast.MatchAs, ast.MatchStar, ast.ExceptHandler)):
        return node.name == name
    if isinstance(node, ast.MatchMapping):
        return node.rest == name
    if isinstance(node, (ast.Global, ast.Nonlocal)):
        return name in node.names
    stored = node.value if isinstance(node, ast.Subscript) else node
    return isinstance(getattr(node, "ctx", None), ast.Store) and is_name(stored, name)


def _stores(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))
