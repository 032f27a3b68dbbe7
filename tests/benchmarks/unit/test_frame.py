"""The long frame: every number of the records once, and every committed table again from the frame."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks.protocols.halving import WORST
from benchmarks.records.frame import COLUMNS, NoRecordsError, Results
from benchmarks.records.schema import Tuning
from benchmarks.records.store import Store
from benchmarks.records.trials import trial_store
from benchmarks.reporting.build import make_tables
from benchmarks.reporting.endpoint import Endpoint
from benchmarks.reporting.render import to_csv
from benchmarks.reporting.tuning import find_trials
from tests.support.record_factory import PROTOCOL, TASKS, make_record
from tests.support.tables import fill, frame_of, with_scores

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[3] / "results").glob("*/records"))


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda path: path.name)
def committed(request) -> tuple[Path, Results]:
    return request.param, Results.load(request.param)


def test_every_committed_table_is_a_view_of_the_frame(committed):
    folder, results = committed
    frame = results.frame()
    (group,) = results.groups()
    protocol = group.protocol
    band = protocol.equivalence_band / 100
    tables = make_tables(frame, results.outcomes, protocol.reference, band, Endpoint.of(protocol, results))
    assert {table.name for table in tables} == {path.stem for path in (folder / "tables").glob("*.csv")}
    for table in tables:
        written = (folder / "tables" / f"{table.name}.csv").read_text().partition("\n")[2]
        assert to_csv([(group.label, table)]) == written
        markdown = (folder / "tables" / f"{table.name}.md").read_text().splitlines()
        shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown if line.startswith("| ")]
        assert shown[1:] == table.text.astype(str).values.tolist()


def test_a_pivot_gives_the_scores_of_the_records(committed):
    _, results = committed
    frame = results.frame()
    scores = frame[frame["primary"] & ~frame["trial"]].pivot(index="cell", columns="task", values="value")
    for record in results.records:
        for task, score in record.scores.items():
            assert scores.loc[record.cell.id, task] == (score.metrics[score.primary] or 0.0)


def test_outcomes_hold_every_predicted_row(committed):
    _, results = committed
    outcomes = results.outcomes()
    by_run = outcomes.groupby(["cell", "task"]).size()
    for record in results.records:
        for task, score in record.scores.items():
            assert by_run[record.cell.id, task] == score.rows
    first = results.records[0]
    one = outcomes[outcomes["cell"] == first.cell.id]
    assert set(one["seed"]) == {first.cell.seed}


def test_columns_and_their_types():
    frame = frame_of(make_record("alpha@plain")[0])
    assert list(frame.columns) == list(COLUMNS)
    assert {column: str(dtype) for column, dtype in frame.dtypes.items()} == {
        name: kind for name, (kind, _) in COLUMNS.items()
    }
    assert set(frame["method"]) == {"alpha"}
    assert set(frame["preset"]) == {"plain"}


def test_every_number_of_a_record_stands_in_one_row():
    record, _ = make_record()
    frame = frame_of(record)
    assert not frame.duplicated(["cell", "task", "metric", "step"]).any()
    values = frame[frame["task"].isna() & frame["step"].isna()].set_index("metric")["value"]
    assert values["parameters.adapter"] == record.parameters.adapter
    assert values["timing.train_step.p90"] == record.timing.train_step.p90
    assert values["memory.peak_bytes"] == record.memory.peak_bytes
    assert values["budget.tokens"] == record.budget.tokens
    curve = frame[frame["metric"] == "loss.task"].set_index("step")["value"]
    assert dict(curve) == {point.step: point.losses["task"] for point in record.curve}
    rows = frame[frame["metric"] == "budget.rows"]
    assert (
        dict(zip(rows["task"].dropna(), rows["value"][rows["task"].notna()], strict=True))
        == record.budget.rows_per_task
    )


def test_undefined_is_no_skill_and_a_failed_run_keeps_its_row():
    failed = make_record("bravo", status="oom", reason="no")[0].model_copy(update={"parameters": None})
    frame = frame_of(with_scores(make_record()[0], rte=None), failed)
    rte = frame[(frame["task"] == "rte") & frame["primary"]]
    assert list(rte["value"]) == [0.0]
    (row,) = frame[frame["label"] == "bravo"].to_dict("records")
    assert row["status"] == "oom"
    assert pd.isna(row["metric"])


def test_labels_tell_configurations_and_protocols_apart():
    records = [make_record(config={"rank": rank})[0] for rank in (4, 8)]
    records += [make_record(protocol={"steps": 7})[0]]
    frame = frame_of(*records)
    assert list(frame["protocol"].unique()) == ["small (steps=100)", "small (steps=7)"]
    assert set(frame.loc[frame["steps"] == 100, "label"]) == {"alpha (rank=4)", "alpha (rank=8)"}
    assert frame["protocol_id"].nunique() == 2


def test_trials_stand_under_the_runs_they_are_for(tmp_path):
    tuned = Tuning(rates=(1e-4, 1e-3), seed=1000, steps=20, head_learning_rate=None)
    for rate in tuned.rates:
        trial = {**PROTOCOL, "learning_rate": rate, "evaluate_on": "fold", "steps": 20}
        trial_store(tmp_path).put(*make_record("alpha", 1000, protocol=trial, trial=True))
    stranger = {**PROTOCOL, "learning_rate": 1e-3, "evaluate_on": "fold", "steps": 21}
    trial_store(tmp_path).put(*make_record("alpha", 1000, protocol=stranger, trial=True))
    Store(tmp_path).put(*make_record("alpha", protocol={"learning_rate": 1e-3}, tuned=tuned))
    frame = Results.load(tmp_path).frame()
    (reported,) = frame.loc[~frame["trial"], "protocol_id"].unique()
    trials = frame[frame["trial"]].drop_duplicates("cell")
    assert sorted(trials.loc[trials["protocol_id"] == reported, "learning_rate"]) == [1e-4, 1e-3]
    assert list(trials.loc[trials["protocol_id"] != reported, "steps"]) == [21]


def test_a_trial_stands_under_every_table_that_it_was_for(tmp_path):
    """Else the second table has no rates, and a best one at the edge of its grid gets a verdict."""
    tuned = Tuning(rates=(1e-4, 1e-3), seed=1000, steps=20, head_learning_rate=None)
    for rate in tuned.rates:
        trial = {**PROTOCOL, "learning_rate": rate, "evaluate_on": "fold", "steps": 20}
        trial_store(tmp_path).put(*make_record("alpha", 1000, protocol=trial, trial=True))
    for steps in (100, 200):
        Store(tmp_path).put(*make_record("alpha", protocol={"learning_rate": 1e-3, "steps": steps}, tuned=tuned))
    frame = Results.load(tmp_path).frame()
    trials = frame[frame["trial"]].drop_duplicates(["protocol_id", "cell"])
    assert set(trials["protocol_id"]) == set(frame.loc[~frame["trial"], "protocol_id"])
    for _, own in frame.groupby("protocol_id"):
        (found,) = find_trials(own)
        assert (found.best, found.at_edge) == (1e-4, "lowest")


def test_the_best_rate_of_the_table_is_the_one_that_was_chosen(tmp_path):
    """The choice counts a failed trial, and one below the floor, as the worst there is."""
    tuned = Tuning(rates=(1e-3, 2e-3), seed=1000, more_seeds=(1001,), steps=20, head_learning_rate=None)
    for rate in tuned.rates:
        trial = {**PROTOCOL, "learning_rate": rate, "evaluate_on": "fold", "steps": 20}
        for seed in (1000, 1001):
            status = "oom" if (rate, seed) == (1e-3, 1001) else "ok"
            trial_store(tmp_path).put(*make_record("alpha", seed, protocol=trial, trial=True, status=status))
    Store(tmp_path).put(*make_record("alpha", protocol={"learning_rate": 1e-3}, tuned=tuned))
    frame = Results.load(tmp_path).frame()
    frame.loc[frame["trial"] & frame["primary"] & (frame["learning_rate"] == 2e-3), "value"] = -5.0
    (found,) = find_trials(frame)
    assert found.scores == {1e-3: None, 2e-3: -5.0}  # as they are shown
    assert found.counted[2e-3] == WORST
    assert found.counted[1e-3] > WORST
    assert found.best == 1e-3


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(NoRecordsError, match=str(tmp_path)):
        Results.load(tmp_path)


def test_no_records_are_an_empty_frame():
    assert list(Results(()).frame().columns) == list(COLUMNS)
    assert Results(()).frame().empty
    assert Results(()).outcomes().empty


def test_tasks_and_methods_stand_in_the_order_of_the_tables(tmp_path):
    fill(tmp_path, seeds=(0,))
    frame = Results.load(tmp_path).frame()
    assert list(frame["label"].unique()) == ["majority", "head", "alpha", "bravo", "charlie"]
    assert list(frame["task"].dropna().unique()) == list(TASKS)


def test_the_page_names_every_column():
    page = (Path(__file__).parents[3] / "docs" / "results-frame.md").read_text()
    named = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert set(COLUMNS) <= named
