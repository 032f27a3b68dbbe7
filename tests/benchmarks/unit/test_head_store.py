"""Fitted heads are kept in the results folder: who comes later starts from the very same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from benchmarks.backbones.load import find_backbone
from benchmarks.cells import head_store
from benchmarks.cells.cell import Bench, prepare
from benchmarks.cells.heads import Head
from benchmarks.protocols.protocol import Protocol
from benchmarks.records.store import RecordError
from benchmarks.tasks.base import Example, TaskData, TaskSpec

SPEC = TaskSpec("classes", "classification", ("no", "yes"), "accuracy")
WORDS = ("good", "bad", "fine", "poor")
ROWS = [Example(f"a {WORDS[number % 4]} row {number}", label=number % 2) for number in range(24)]
PROTOCOL = Protocol(
    name="t", tasks=("classes",), steps=2, batch_size=4, backbone="tiny-bert", precision="fp32", warmup=1,
    head_start="ridge",
)  # fmt: skip


def bench(root: Path, protocol: Protocol = PROTOCOL, rows: list[Example] = ROWS) -> Bench:
    data = (TaskData(SPEC, rows, rows, "hand-made", "f" * 64),)
    return prepare(data, protocol, find_backbone("tiny-bert"), torch.device("cpu"), "test", root)


def kept(root: Path) -> list[Path]:
    return sorted((root / "heads").iterdir())


def test_who_comes_later_starts_from_the_heads_that_are_there(tmp_path: Path) -> None:
    first = bench(tmp_path)
    (path,) = kept(tmp_path)
    assert first.heads is not None
    tensors = load_file(path)
    np.testing.assert_array_equal(tensors["classes.weight"], first.heads["classes"].weight)
    tensors["classes.weight"] += 1.0  # a fit would not give this
    save_file(tensors, path)
    second = bench(tmp_path)
    assert second.heads is not None
    np.testing.assert_array_equal(second.heads["classes"].weight, first.heads["classes"].weight + 1.0)


@pytest.mark.parametrize(
    ("what", "protocol", "rows"),
    [
        ("pooling", PROTOCOL.model_copy(update={"pooling": "first"}), ROWS),
        ("type of the frozen model", PROTOCOL.model_copy(update={"base_dtype": "bf16"}), ROWS),
        ("rows of the fit", PROTOCOL.model_copy(update={"head_start_rows": 12}), ROWS),
        ("cut to another length", PROTOCOL.model_copy(update={"max_length": 4}), ROWS),
        ("held-out rows", PROTOCOL.model_copy(update={"evaluate_on": "fold"}), ROWS),
        ("a label", PROTOCOL, [*ROWS[:-1], Example(ROWS[-1].first, label=0)]),
        ("a text", PROTOCOL, [*ROWS[:-1], Example("another text", label=1)]),
    ],
)  # fmt: skip
def test_what_a_fit_depends_on_has_heads_of_its_own(
    tmp_path: Path, what: str, protocol: Protocol, rows: list[Example]
) -> None:
    bench(tmp_path)
    bench(tmp_path, protocol, rows)
    assert len(kept(tmp_path)) == 2, what


def test_rates_and_steps_change_no_fit(tmp_path: Path) -> None:
    bench(tmp_path)
    bench(tmp_path, PROTOCOL.model_copy(update={"learning_rate": 0.5, "steps": 9}))
    assert len(kept(tmp_path)) == 1


def test_all_shards_start_from_the_file_of_the_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fastest = bench(tmp_path)
    (path,) = kept(tmp_path)
    content = path.read_bytes()
    path.unlink()

    def fit_meanwhile(*arguments: object) -> dict[str, Head]:
        path.write_bytes(content)  # by another shard
        return {"classes": Head(np.ones((2, 32)), np.ones(2))}

    monkeypatch.setattr(head_store, "fit_heads", fit_meanwhile)
    slower = bench(tmp_path)
    assert slower.heads is not None
    assert fastest.heads is not None
    np.testing.assert_array_equal(slower.heads["classes"].weight, fastest.heads["classes"].weight)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    bench(tmp_path)
    (path,) = kept(tmp_path)
    if content is None:
        save_file({"other.weight": np.zeros(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(RecordError, match="delete the file"):
        bench(tmp_path)
