"""What `import moepeft` gives and what it leaves alone; no module of it imports itself through others."""

from __future__ import annotations

import subprocess
import sys

import grimp
import pytest

import moepeft
from moepeft.registry import METHODS, factory_class

METHOD_CLASSES = ("EPT", "LoRA", "MOELoRA", "MixLoRA", "MoRE", "TuckA")


def test_importing_the_library_imports_neither_transformers_nor_tensorly() -> None:
    code = (
        "import sys, moepeft; heavy = {'transformers', 'tensorly', 'peft'}; print(sorted(heavy & set(sys.modules)));"
        "moepeft.TuckA, moepeft.EPT; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]


def test_configurations_come_from_the_top() -> None:
    for name in METHOD_CLASSES:
        cls = getattr(moepeft, name)
        assert cls is factory_class(cls.name)
        assert cls().name in METHODS
        assert name in dir(moepeft)
        assert name in moepeft.__all__
    assert set(moepeft.__all__) <= set(dir(moepeft))
    with pytest.raises(AttributeError, match="EPTT"):
        moepeft.EPTT  # noqa: B018


def test_no_import_circle() -> None:
    graph = grimp.build_graph("moepeft", exclude_type_checking_imports=False)
    below = {module: graph.find_upstream_modules(module) for module in graph.modules}
    assert len(below) > 20
    assert not {module for module, modules in below.items() if module in modules}
    assert not {(one, other) for one in below for other in below[one] if one in below[other]}
