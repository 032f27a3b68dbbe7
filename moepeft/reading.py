"""What the code of a model's modules says of their layers: which are called first, and whose weights it computes with.

An adapter acts where its layer is called. Some modules take a layer's weight and multiply by it themselves:
`torch.nn.MultiheadAttention`, Mamba's fused kernels, WavLM. No call shows that, and nothing can be run when adapters
are attached: the inputs are unknown, and the model may have no memory yet. So the source of every module's `forward`
is read, and of the methods that it calls. A class without source is taken to call its layers as they are registered.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# What is asked of a weight without computing with it.
_ABOUT = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_meta", "data_ptr"}
_ABOUT_CALLS = {"isinstance", "hasattr", "type"}
_COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}
_POSITIONS = re.compile(r"(^|_)(rel|relative|pos|positions?)(_|$)")


Condition = tuple[ast.expr, bool]  # the test of an `if`, and which of its branches


@dataclass
class Code:
    """What `forward` of one class says, and the methods that it calls.

    Attributes:
        mentions: paths below ``self`` in the order of evaluation, e.g. ``dense``, ``attention.query``.
        read: paths of layers whose ``weight`` is computed with, each with the conditions under which it is.
        of_positions: paths of layers whose every call takes a table of positions.
        also_of_positions: paths of layers that take such a table in one call, and something else in another.
        several: whether every value that `forward` returns is a tuple.
    """

    mentions: list[str] = field(default_factory=list)
    read: list[tuple[str, tuple[Condition, ...]]] = field(default_factory=list)
    of_positions: set[str] = field(default_factory=set)
    also_of_positions: set[str] = field(default_factory=set)
    several: bool = False


def names_in_order(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of all modules; a module's children in the order in which its code mentions them."""
    yield prefix
    code = code_of(model)
    places = {path.partition(".")[0]: place for place, path in reversed([*enumerate(code.mentions)])}
    for name, child in sorted(model.named_children(), key=lambda child: places.get(child[0], len(code.mentions))):
        yield from names_in_order(child, below(prefix, name))


def weights_read(module: nn.Module) -> set[str]:
    """Paths of the layers whose weight a module computes with itself, as it is configured."""
    found = code_of(module).read
    return {path for path, conditions in found if not any(_is_unusual(*each, module) for each in conditions)}


def _is_unusual(test: ast.expr, branch: bool, module: nn.Module) -> bool:
    """Whether a branch is not taken: the configuration says so, or it is for an argument that is given rarely.

    DeBERTa splits its projection ``else`` than ``if query_states is None``.
    """
    rare = isinstance(test, ast.Compare) and isinstance(test.left, ast.Name) and isinstance(test.ops[0], ast.Is)
    holds = _value(test, module)
    return (rare and not branch) or (holds is not None and bool(holds) != branch)


def _value(node: ast.expr, module: nn.Module) -> Any:
    """What an expression over a module's plain attributes is; None if it is over anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.BoolOp):
        values = [_value(part, module) for part in node.values]
        decided = isinstance(node.op, ast.Or)
        if any(value is not None and bool(value) == decided for value in values):
            return decided
        return None if None in values else not decided
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARED:
        sides = _value(node.left, module), _value(node.comparators[0], module)
        return None if None in sides else _COMPARED[type(node.ops[0])](*sides)
    path = _path(node)
    value = module.__dict__.get(path) if path else None
    return value if isinstance(value, (bool, int, float, str)) else None


def below(prefix: str, path: str) -> str:
    """The name of what a module at `prefix` calls `path`."""
    return f"{prefix}.{path}" if prefix else path


def code_of(module: nn.Module) -> Code:
    """What the code of a module's class says; a class is read once."""
    kind: Any = type(module)
    return _code_of(kind)


@functools.cache
def _code_of(kind: type[nn.Module]) -> Code:
    code = Code()
    reader = _Reader(kind, code)
    reader.follow("forward")
    code.of_positions = {path for path, taken in reader.taken.items() if all(taken)}
    code.also_of_positions = {path for path, taken in reader.taken.items() if any(taken)} - code.of_positions
    tree = _source(kind.forward)
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)] if tree else []
    code.several = bool(returned) and all(isinstance(value, ast.Tuple) for value in returned)
    return code


class _Reader(ast.NodeVisitor):
    """Goes through a method in the order of evaluation, and into the methods of the class that it calls."""

    def __init__(self, kind: type[nn.Module], code: Code) -> None:
        self.kind = kind
        self.code = code
        self.under_way: list[str] = []
        self.conditions: list[Condition] = []
        self.taken: dict[str, list[bool]] = {}

    def follow(self, name: str) -> None:
        """Read a method of the class, unless it is being read."""
        tree = None if name in self.under_way else _source(inspect.getattr_static(self.kind, name, None))
        if tree is not None:
            self.under_way.append(name)
            self.visit(tree)
            self.under_way.pop()

    def visit_If(self, node: ast.If) -> None:
        """Both branches, each under its condition."""
        self.visit(node.test)
        for branch, statements in ((True, node.body), (False, node.orelse)):
            self.conditions.append((node.test, branch))
            for statement in statements:
                self.visit(statement)
            self.conditions.pop()

    def visit_Call(self, node: ast.Call) -> None:
        """Arguments are evaluated before the call, and after what the called function is taken from."""
        if isinstance(node.func, ast.Name) and node.func.id in _ABOUT_CALLS:
            return
        arguments = [*node.args, *node.keywords]
        path = _path(node.func)
        for part in [*arguments, node.func] if path else [node.func, *arguments]:
            self.visit(part)
        if path is not None and node.args:
            names = {part for argument in ast.walk(node.args[0]) for part in _names(argument)}
            self.taken.setdefault(path, []).append(any(_POSITIONS.search(name) for name in names))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """A child of the module, its weight, or a method."""
        path = _path(node)
        if path is None:
            self.generic_visit(node)
            return
        first, *_ = path.split(".")
        layer, _, use = path.partition(".weight")
        if inspect.isroutine(inspect.getattr_static(self.kind, first, None)):
            self.follow(first)
        elif use.removeprefix(".") in _ABOUT:
            return
        elif layer != path and "." in path:
            self.code.read.append((layer, tuple(self.conditions)))
        self.code.mentions.append(path)


def _path(node: ast.AST) -> str | None:
    """``a.b`` of ``self.a.b``."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if parts and isinstance(node, ast.Name) and node.id == "self" else None


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute):
        yield node.attr


def _source(function: Any) -> ast.AST | None:
    function = inspect.unwrap(function) if callable(function) else getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # typed in, generated, compiled: there is nothing to read
        return None
