"""The store: what is written comes back, nothing half-written counts, and what cannot be read is said."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.records import provenance
from benchmarks.records.schema import CurvePoint
from benchmarks.records.store import RecordError, Store
from tests.support.record_factory import make_cell, make_record, make_routing


def record_file(store: Store) -> Path:
    (path,) = store.records_folder.glob("*.json")
    return path


def test_record_and_outcomes_come_back(tmp_path):
    store = Store(tmp_path / "results")
    record, outcomes = make_record("alpha@released", seed=3)
    assert store.find(record.cell) is None
    assert store.all() == []

    written = store.put(record, outcomes)

    assert written.outcomes == f"{record.cell.id}.parquet"
    assert written == record.model_copy(update={"outcomes": written.outcomes})
    assert Store(store.root).find(record.cell) == written
    assert record_file(store).name == f"alpha_released-s3-{record.cell.id}.json"
    pd.testing.assert_frame_equal(store.outcomes(written), outcomes)


def test_other_seed_config_or_protocol_is_another_cell(tmp_path):
    store = Store(tmp_path)
    store.put(*make_record("alpha", seed=0))
    assert store.find(make_cell("alpha", 1)) is None
    assert store.find(make_cell("alpha", 0, config={"rank": 8})) is None
    assert store.find(make_cell("alpha", 0, protocol={"steps": 101})) is None
    assert store.find(make_cell("alpha", 0)) is not None


def test_all_is_sorted_by_protocol_method_and_seed(tmp_path):
    store = Store(tmp_path)
    for name, method, seed in [("b", "x", 0), ("a", "y", 10), ("a", "y", 2), ("a", "x", 1)]:
        store.put(*make_record(method, seed, protocol={"name": name}))
    found = [(r.cell.protocol.name, r.cell.method, r.cell.seed) for r in store.all()]
    assert found == [("a", "x", 1), ("a", "y", 2), ("a", "y", 10), ("b", "x", 0)]


def test_numbers_that_are_not_finite_survive(tmp_path):
    record, _ = make_record(status="diverged", reason="loss is NaN at step 7")
    point = CurvePoint(step=7, losses={"task": math.nan}, learning_rate=1e-3, gradient_norm=math.inf)
    store = Store(tmp_path)
    store.put(record.model_copy(update={"curve": [point]}))
    (found,) = store.all()
    assert math.isnan(found.curve[0].losses["task"])
    assert found.curve[0].gradient_norm == math.inf
    # Strict JSON, for readers in other languages.
    json.loads(record_file(store).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_cell_that_json_would_change_is_refused_and_nothing_written(tmp_path):
    record, outcomes = make_record(config={"temperature": math.inf})
    with pytest.raises(RecordError, match="alpha, seed 0, changes when it is written as JSON"):
        Store(tmp_path).put(record, outcomes)
    assert list(tmp_path.rglob("*")) == []


def test_rewriting_replaces_record_and_outcomes(tmp_path):
    store = Store(tmp_path)
    store.put(*make_record(skill=0.6))
    better, outcomes = make_record(skill=0.9)
    written = store.put(better, outcomes)
    assert store.all() == [written]
    pd.testing.assert_frame_equal(store.outcomes(written), outcomes)

    failed, _ = make_record(status="oom", reason="out of memory")
    store.put(failed)
    assert [record.status for record in store.all()] == ["oom"]
    assert list(store.outcomes_folder.iterdir()) == []
    with pytest.raises(RecordError, match=r"status oom.*has no per-example outcomes"):
        store.outcomes(failed)


def test_outcomes_without_a_column_are_refused(tmp_path):
    record, outcomes = make_record()
    with pytest.raises(RecordError, match="lack the columns label; they have task, index, prediction, correct"):
        Store(tmp_path).put(record, outcomes.drop(columns="label"))
    assert Store(tmp_path).all() == []


@pytest.mark.parametrize("failing", ["outcomes", "record"])
@pytest.mark.parametrize("first", [True, False])
def test_death_during_a_write_loses_that_cell_only(tmp_path, monkeypatch, failing, first):
    store = Store(tmp_path)
    other = store.put(*make_record("other"))
    if not first:
        store.put(*make_record(skill=0.6))
    record, outcomes = make_record(skill=0.9)
    replace = Path.replace

    def dying(self, target):
        if Path(target).suffix == (".parquet" if failing == "outcomes" else ".json"):
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        store.put(record, outcomes)
    monkeypatch.undo()

    # Neither an old record beside new outcomes nor a record without them.
    assert store.all() == [other]
    written = store.put(record, outcomes)
    assert store.find(record.cell) == written


def _write_forever(root: Path) -> None:
    store = Store(root)
    while True:
        for skill in (0.6, 0.9):
            store.put(*make_record(skill=skill))


def _stop(process: multiprocessing.process.BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=30)


def test_killed_and_concurrent_writers_leave_only_whole_files(tmp_path):
    context = multiprocessing.get_context("fork")
    store = Store(tmp_path)
    kept = store.put(*make_record("kept"))
    writers = [context.Process(target=_write_forever, args=(tmp_path,), daemon=True) for _ in range(2)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "outcomes" / f"{make_cell().id}.parquet").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    for writer in writers:
        _stop(writer)

    records = store.all()
    assert kept in records
    assert len(records) <= 2
    for record in records:
        assert len(store.outcomes(record)) > 0
    record, outcomes = make_record(skill=0.75)
    written = store.put(record, outcomes)
    assert store.find(record.cell) == written


def test_temporary_leftovers_are_ignored(tmp_path):
    store = Store(tmp_path)
    written = store.put(*make_record())
    path = record_file(store)
    path.with_name(f"{path.name}.123-abcdef01.tmp").write_text('{"half": ')
    assert store.all() == [written]
    assert store.find(written.cell) == written


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read as JSON"),
        (lambda text: "[]", "not a JSON object"),
        (lambda text: text.replace('"status": "ok"', '"status": "fine"'), "not a valid record"),
        (lambda text: text.replace('"status"', '"statsu"'), "not a valid record"),
        (lambda text: text.replace('"rank": 4', '"rank": 5'), "not the one in its name"),
        (lambda text: text.replace('"schema_version": 3', '"schema_version": "3"'), "has schema version '3'"),
        (lambda text: text.replace('"schema_version": 3', '"schema_version": 2'), "has schema version 2"),
        (lambda text: text.replace('"schema_version": 3', '"schema_version": 4'), "has schema version 4"),
    ],
)
def test_damaged_record_is_named_with_the_way_out(tmp_path, damage, message):
    store = Store(tmp_path)
    record, outcomes = make_record()
    store.put(record, outcomes)
    path = record_file(store)
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    for read in (store.all, lambda: store.find(record.cell)):
        with pytest.raises(RecordError, match=message) as error:
            read()
        assert path.name in str(error.value)
        assert f"elete {path.name}" in str(error.value)


def test_damaged_outcomes_are_named(tmp_path):
    store = Store(tmp_path)
    written = store.put(*make_record())
    path = store.outcomes_folder / written.outcomes
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RecordError, match=f"Delete {path.name}"):
        store.outcomes(written)


def test_outcomes_outside_of_the_store_are_not_read(tmp_path):
    store = Store(tmp_path / "results")
    written = store.put(*make_record())
    make_record()[1].to_parquet(tmp_path / "elsewhere.parquet")
    with pytest.raises(RecordError, match="cannot read the outcomes"):
        store.outcomes(written.model_copy(update={"outcomes": "../../elsewhere.parquet"}))


def test_routing_of_many_sites_comes_back_from_a_small_file(tmp_path):
    record, outcomes = make_record()
    tasks = [f"task {number}" for number in range(8)]
    routing = make_routing(tasks, top_k=8)
    assert len(routing.sites) * len(tasks) * len(routing.sites[0].weights[0]) == 36 * 8 * 8
    trace = 'no [\n  1,\n  2\n] and no "[\n 3\n]"'
    store = Store(tmp_path)
    written = store.put(record.model_copy(update={"routing": routing, "traceback": trace}), outcomes)
    assert store.all() == [written]
    assert written.routing == routing
    assert written.traceback == trace
    assert record_file(store).stat().st_size < 150_000


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one file of code; what is asked of its state is forgotten before and after."""
    code = tmp_path / "moepeft" / "code.py"
    code.parent.mkdir()
    code.write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    provenance.code_state.cache_clear()
    yield tmp_path
    provenance.code_state.cache_clear()


def git(folder: Path, *arguments: str) -> None:
    author = ("-c", "user.name=A", "-c", "user.email=a@b.c")
    subprocess.run(["git", "-C", str(folder), *author, *arguments], check=True, capture_output=True)


def test_asking_git_leaves_the_users_repository_as_it_was(checkout):
    """`git status` likes to write its index anew: killed with a run, it left a lock, and nothing could be committed."""
    os.utime(checkout / "moepeft" / "code.py", (1, 1))  # the index holds another time: it is stale
    index = (checkout / ".git" / "index").read_bytes()
    commit, changed = provenance.code_state()
    assert commit is not None
    assert changed is False
    assert (checkout / ".git" / "index").read_bytes() == index


def test_a_commit_made_while_a_study_runs_is_not_its_code(checkout):
    begun = provenance.code_state()
    (checkout / "moepeft" / "code.py").write_text("2")
    assert provenance.code_state() == begun
    git(checkout, "commit", "-am", "two")
    assert provenance.code_state() == begun
    provenance.code_state.cache_clear()
    assert provenance.code_state() != begun
