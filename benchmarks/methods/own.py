"""A method from a file of one's own: ``--methods path/to/file.py:Class``. Nothing of the project is edited."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moepeft
from benchmarks.methods.registered import Moepeft
from benchmarks.protocols.errors import UsageError
from moepeft.config import with_tasks
from moepeft.protocols import AdapterFactory
from moepeft.registry import METHODS

SUFFIX = ".py:"


@dataclass(frozen=True)
class OwnMethod(Moepeft):
    """A method whose class stands in a file.

    Attributes:
        word: the path and the class, as written on the command line.
        source: hash of the file: another text is another method.
    """

    word: str = ""
    source: str = ""

    def config(self) -> dict[str, Any]:
        """The fields, and the hash of the file that says what the fields mean."""
        return {**super().config(), "source": self.source}

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process cannot import the file's module by name: the worker reads the file anew.
        return _restore, (self.word, super().config())


def load_own_method(word: str, num_tasks: int) -> OwnMethod:
    """The method that a word of the command line means.

    Args:
        word: ``path/to/file.py:Class``.
        num_tasks: number of tasks of the protocol.

    Raises:
        UsageError: no such file or class, the file cannot be run, or its class is no method.
    """
    cls, source = _load_class(word)
    try:
        factory = with_tasks(cls(), num_tasks)
    except Exception as error:
        raise UsageError(f"{word}: {cls.__name__}() fails: {type(error).__name__}: {error}") from error
    return OwnMethod(factory.name, factory, word, source)


def _restore(word: str, config: dict[str, Any]) -> OwnMethod:
    cls, source = _load_class(word)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    factory = cls(**values)
    return OwnMethod(factory.name, factory, word, source)


def _load_class(word: str) -> tuple[type[AdapterFactory], str]:
    path_name, _, class_name = word.rpartition(":")
    path = Path(path_name)
    if not path.is_file():
        raise UsageError(f"{word}: there is no file {path}; give path/to/file.py:Class")
    source = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    name = f"own_method_{source}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # before it runs: dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise UsageError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    cls: type[AdapterFactory] | None = getattr(sys.modules[name], class_name, None)
    missing = [part for part in ("name", "build", "count", "select") if not hasattr(cls, part)]
    if cls is None or missing:
        lacks = f"has no class {class_name!r}" if cls is None else f"has a {class_name} without {', '.join(missing)}"
        raise UsageError(f"{path} {lacks}; docs/add-a-method.md shows a whole method")
    if cls.name in (*METHODS, *moepeft.available()):
        raise UsageError(f"{word}: name = {cls.name!r} is a registered method's name; choose another one")
    return cls, source
