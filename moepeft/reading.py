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
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# What is asked of a weight without computing with it.
_ABOUT = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_meta", "data_ptr"}
_ABOUT_CALLS = {"isinstance", "hasattr", "type"}
_POSITIONS = re.compile(r"(^|_)(rel|relative|pos|positions?)(_|$)")


@dataclass
class Code:
    """What `forward` of one class says, and the methods that it calls.

    Attributes:
        mentions: paths below ``self`` in the order of evaluation, e.g. ``dense``, ``attention.query``.
        read: paths of layers whose ``weight`` is computed with.
        of_positions: paths of layers whose every call takes a table of positions.
        several: whether every value that `forward` returns is a tuple.
    """

    mentions: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    of_positions: set[str] = field(default_factory=set)
    several: bool = False


def names_in_order(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of all modules; a module's children in the order in which its code mentions them."""
    yield prefix
    code = code_of(model)
    places = {path.partition(".")[0]: place for place, path in reversed([*enumerate(code.mentions)])}
    for name, child in sorted(model.named_children(), key=lambda child: places.get(child[0], len(code.mentions))):
        yield from names_in_order(child, below(prefix, name))


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
        self.taken: dict[str, list[bool]] = {}

    def follow(self, name: str) -> None:
        """Read a method of the class, unless it is being read."""
        tree = None if name in self.under_way else _source(inspect.getattr_static(self.kind, name, None))
        if tree is None:
            return
        self.under_way.append(name)
        self.visit(tree)
        self.code.read |= set(_weights(tree))
        self.under_way.pop()

    def visit_Call(self, node: ast.Call) -> None:
        """Arguments are evaluated before the call, and after what the called function is taken from."""
        arguments = [*node.args, *node.keywords]
        for part in [*arguments, node.func] if _path(node.func) else [node.func, *arguments]:
            self.visit(part)
        path = _path(node.func)
        if path is not None and node.args:
            names = {part for argument in ast.walk(node.args[0]) for part in _names(argument)}
            self.taken.setdefault(path, []).append(any(_POSITIONS.search(name) for name in names))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """A child of the module, or a method."""
        path = _path(node)
        if path is None:
            self.generic_visit(node)
        elif inspect.isroutine(inspect.getattr_static(self.kind, path.partition(".")[0], None)):
            self.follow(path)
        else:
            self.code.mentions.append(path)


def _weights(tree: ast.AST) -> Iterator[str]:
    asked_about = {
        id(child)
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in _ABOUT)
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ABOUT_CALLS)
        for child in ast.iter_child_nodes(node)
    }
    unusual = _unusual(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in asked_about | unusual:
            path = _path(node.value)
            if path is not None:
                yield path


def _unusual(tree: ast.AST) -> set[int]:
    """What stands in the else of ``if ARGUMENT is None``: DeBERTa splits its projection if queries are given apart."""
    branches = [
        node.orelse
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and isinstance(node.test.ops[0], ast.Is)
    ]
    return {id(node) for branch in branches for statement in branch for node in ast.walk(statement)}


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
