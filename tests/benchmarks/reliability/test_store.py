"""Two runs on one results folder: one reads the folder while the other takes a record away to write it anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.records.store import RecordError, Store
from tests.support.record_factory import make_cell, make_record


def test_a_record_that_vanishes_while_it_is_read_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    for method in ("alpha", "beta"):
        store.put(*make_record(method))
    read = Path.read_bytes

    def racing(path: Path) -> bytes:
        if path.name.startswith("alpha"):
            path.unlink()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", racing)
    assert [record.cell.method for record in store.all()] == ["beta"]
    monkeypatch.undo()
    store.put(*make_record("alpha"))
    monkeypatch.setattr(Path, "read_bytes", racing)
    assert store.find(make_cell("alpha")) is None
    (tmp_path / "records" / "gamma-s0-0.json").write_text("{")
    with pytest.raises(RecordError, match="gamma"):
        store.all()
