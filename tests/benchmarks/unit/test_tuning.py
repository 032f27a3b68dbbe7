"""Equal tuning: what is tried, what is chosen, what the report makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks.methods.base import Method
from benchmarks.methods.parse import parse_methods
from benchmarks.plan.cells import PlannedCell, expand
from benchmarks.plan.options import Options, parse_shard, resolve_suite
from benchmarks.plan.tuning import tune, tuned_cells
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import Suite
from benchmarks.records.comparable import group_records
from benchmarks.records.identity import budget_differences
from benchmarks.records.schema import RunRecord, Score, Tuning
from benchmarks.records.store import Store
from benchmarks.records.trials import Trials, belongs, endpoint_score, trial_store
from benchmarks.reporting.build import build_report
from benchmarks.tasks.base import TaskData, TaskSpec
from tests.support.record_factory import PROTOCOL, make_record

RATES = (5e-4, 2e-3, 1e-3)
DATA = (TaskData(TaskSpec("classes", "classification", ("no", "yes"), "accuracy"), (), (), "hand-made", "f" * 64),)


def suite(**fields: object) -> Suite:
    common = {"name": "test", "tasks": ("classes",), "steps": 40, "precision": "fp32", "learning_rate": 3e-4}
    return Suite.model_validate({**common, "head_learning_rate": 7e-3, "tuning_rates": RATES, **fields})


def methods() -> list[Method]:
    return list(
        parse_methods(
            (
                "lora",
                "ept",
            ),
            num_tasks=1,
        ).values()
    )


def trials(scores: Mapping[float, float | None]) -> Trials:
    return Trials("x", scores, {rate: "oom" if score is None else "ok" for rate, score in scores.items()})


# ---------------------------------------------------------------------- planning


def trial_cells(root: Path, **fields: object) -> tuple[PlannedCell, ...]:
    """What is to be tried while nothing has been."""
    return tune(suite(**fields), methods(), DATA, Store(root)).trials


def test_every_method_that_trains_tries_the_same_rates_as_often(tmp_path):
    cells = trial_cells(tmp_path, tuning_steps=10)
    tried: dict[str, list[float]] = {}
    for planned in cells:
        own = planned.cell.protocol
        assert (own.evaluate_on, own.steps, planned.cell.seed, planned.cell.trial) == ("fold", 10, 1000, True)
        tried.setdefault(planned.cell.method, []).append(own.learning_rate)
    assert tried == dict.fromkeys(("head", "lora", "ept"), sorted(RATES))
    # Where nothing but heads trains the rate is theirs; beside an adapter theirs stays.
    for planned in cells:
        alone = planned.cell.method == "head"
        assert planned.cell.protocol.head_learning_rate == (planned.cell.protocol.learning_rate if alone else 7e-3)


def test_a_trial_is_the_same_cell_whatever_else_is_tried_or_reported(tmp_path):
    def ids(**fields: object) -> set[str]:
        return {planned.cell.id for planned in trial_cells(tmp_path, **fields)}

    assert ids(tuning_rates=(1e-3,)) < ids()
    assert ids(seeds=(0, 1, 2)) == ids(tuning_rates=sorted(RATES)) == ids()
    assert not ids(tuning_seeds=(7,)) & ids()
    assert ids() < ids(tuning_seeds=(1000, 1001))
    assert not ids(tuning_steps=5) & ids()
    # Trials may read shorter sequences than what is reported.
    assert ids(max_length=64, trial_length=32) == ids(max_length=32) != ids(max_length=64)
    (reported, *_) = tuned_cells(suite(max_length=64, trial_length=32), methods(), DATA, {"head": 1e-3})
    assert reported.cell.protocol.max_length == 64
    head = [one for one in trial_cells(tmp_path, max_length=32) if one.cell.method == "head"]
    (own,) = [
        one.cell
        for one in tuned_cells(suite(max_length=64, trial_length=32), methods(), DATA, {"head": 1e-3})
        if one.cell.method == "head"
    ]
    assert all(belongs(one.cell, own) for one in head)


@pytest.mark.slow
def test_reported_cells_differ_in_their_rates_alone_and_say_how_they_were_found():
    rates = {"head": 2e-3, "lora": 5e-4, "ept": 1e-3}
    cells = tuned_cells(suite(seeds=(0, 1)), methods(), DATA, rates)
    assert [planned.cell.seed for planned in cells] == [0] * 4 + [1] * 4
    first = {planned.cell.method: planned for planned in cells[:4]}
    assert {name: first[name].cell.protocol.learning_rate for name in rates} == rates
    assert first["head"].cell.protocol.head_learning_rate == 2e-3
    assert first["lora"].cell.protocol.evaluate_on == "reported"
    for planned in cells:
        rising = tuple(sorted(RATES))
        assert planned.cell.tuned == Tuning(rates=rising, seed=1000, steps=40, head_learning_rate=7e-3)
        assert not planned.cell.trial
    assert len(group_records(map(record, cells))) == 1
    # Another grid is another experiment; so is no tuning at all.
    for other in (
        tuned_cells(suite(tuning_rates=RATES[:2]), methods(), DATA, rates),
        tuned_cells(suite(head_learning_rate=1e-3), methods(), DATA, rates),
        expand(suite().protocol, methods(), DATA, (0,)),
    ):
        assert len(group_records(map(record, [*cells, *other]))) == 2


def test_budgets_are_compared_across_tuned_rates():
    cells = tuned_cells(suite(), methods(), DATA, {"head": 1e-3, "lora": 5e-4, "ept": 1e-3})
    records = [record(planned) for planned in cells if planned.cell.method != "majority"]
    assert budget_differences(records) == []
    assert records[-1].budget is not None
    records[-1] = records[-1].model_copy(update={"budget": records[-1].budget.model_copy(update={"tokens": 1})})
    assert len(budget_differences(records)) == 1


def record(planned: PlannedCell) -> RunRecord:
    made, _ = make_record(planned.cell.method, planned.cell.seed, status="error")
    other, _ = make_record("alpha")
    return made.model_copy(update={"cell": planned.cell, "status": "ok", "budget": other.budget})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": (0, 1000)}, "tuning_seeds 1000 is among the reported seeds"),
        ({"evaluate_on": "fold"}, "nothing is left to report"),
        ({"tuning_rates": (1e-3, 1e-3)}, "tuning_rates lists 0.001 twice"),
        ({"tuning_rates": (0.0,)}, "greater than 0"),
    ],
)
def test_a_tuning_that_would_mislead_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        suite(**fields)


def test_flags():
    found = resolve_suite(Options(tune=(1e-3, 5e-4), tune_steps=9))
    assert (found.tuning_rates, found.tuning_steps) == ((1e-3, 5e-4), 9)
    for flags, message in (
        ({"tune": (1e-3,), "learning_rate": 1e-3}, "exclude each other"),
        ({"shard": "2/2"}, "--shard '2/2': give i/n with i from 0"),
        ({"shard": "one"}, "--shard 'one'"),
        ({"jobs": 0}, "--jobs 0"),
    ):
        with pytest.raises(UsageError, match=message):
            resolve_suite(Options(**flags))
    assert parse_shard("1/3") == (1, 3)
    assert parse_shard(None) == (0, 1)


# ---------------------------------------------------------------------- choosing


def test_the_best_rate_is_that_of_the_highest_score_and_of_equals_the_lowest():
    assert trials({1e-4: 0.3, 5e-4: 0.5, 1e-3: 0.5, 2e-3: 0.1}).best == 5e-4
    assert trials({1e-3: 0.5, 1e-4: 0.5}).best == 1e-4
    assert trials({1e-4: None, 1e-3: -0.2}).best == 1e-3  # a failed trial is worse than any score
    assert trials({1e-3: None, 1e-4: None}).best == 1e-4


def test_a_best_rate_at_the_edge_of_the_grid_is_marked():
    assert trials({1: 0.1, 2: 0.3, 3: 0.2}).at_edge is None
    assert trials({1: 0.4, 2: 0.3, 3: 0.2}).at_edge == "lowest"
    assert trials({1: 0.1, 2: 0.3, 3: 0.5}).at_edge == "highest"
    assert trials({1: 0.1}).at_edge is None
    assert trials({1: None, 2: None}).at_edge is None


def test_an_undefined_metric_counts_as_no_skill():
    made, _ = make_record("alpha")
    scores = {
        "a": Score(metrics={"accuracy": 0.6}, primary="accuracy", rows=10),
        "b": Score(metrics={"pearson": None, "spearman": 0.9}, primary="pearson", rows=10),
    }
    assert endpoint_score(made.model_copy(update={"scores": scores})) == pytest.approx(0.3)
    assert endpoint_score(made.model_copy(update={"scores": {}})) is None


def make(store: Store, cells: Sequence[PlannedCell], score: Callable[[float], float], status: str = "ok") -> None:
    """Enter trials into a store whose score depends on the rate alone."""
    for planned in cells:
        scored = Score(metrics={"accuracy": score(planned.cell.protocol.learning_rate)}, primary="accuracy", rows=9)
        made = make_record("alpha")[0].model_copy(update={"scores": {"classes": scored}})
        store.put(made.model_copy(update={"cell": planned.cell, "status": status}))


def test_a_rate_is_chosen_when_all_trials_of_the_method_have_ended(tmp_path):
    store = Store(tmp_path)
    cells = trial_cells(tmp_path)
    high = [planned for planned in cells if planned.cell.protocol.learning_rate == 2e-3]
    make(store, cells, lambda rate: 0.5 + 100 * rate)
    make(store, [planned for planned in high if planned.cell.method == "ept"], lambda _: 0.9, "interrupted")
    make(store, [planned for planned in high if planned.cell.method == "head"], lambda _: 0.9, "diverged")
    tuned = tune(suite(), methods(), DATA, store)
    assert tuned.rates == {"head": 1e-3, "lora": 2e-3}
    assert tuned.waiting == {"ept"}


def test_rungs_and_the_grown_grid_are_asked_for_round_by_round(tmp_path):
    store = Store(tmp_path)
    found = suite(
        tuning_rates=(3e-4, 1e-3, 3.2e-3, 1e-2), tuning_seeds=(1000, 1001), tuning_first_steps=5, tuning_steps=10,
        tuning_extensions=2, schedule="constant", checkpoints=(20,),
    )  # fmt: skip
    lora = parse_methods(("lora",), num_tasks=1)["lora"]
    made: set[str] = set()
    asked = []
    while (tuned := tune(found, [lora], DATA, store)).waiting:
        new = [planned for planned in tuned.trials if planned.cell.id not in made]
        made |= {planned.cell.id for planned in new}
        asked.append({(planned.cell.protocol.steps, planned.cell.protocol.learning_rate) for planned in new})
        assert {planned.cell.seed for planned in new} == {1000, 1001}
        make(store, new, lambda rate: rate)
    assert asked == [
        {(5, rate) for rate in found.tuning_rates},
        {(10, 3.2e-3), (10, 1e-2)},
        {(10, 3.2e-2)},
        {(10, 0.1)},
    ]
    assert tuned.rates == {"lora": 0.1}
    (reported,) = tuned_cells(found, [lora], DATA, tuned.rates)
    assert all(belongs(planned.cell, reported.cell) for planned in tuned.trials)


# ---------------------------------------------------------------------- report


def write_tuned(root: Path) -> None:
    """Reported runs of two methods and a head, and trials of which one method failed at the highest rate."""
    base = {**PROTOCOL, "head_learning_rate": 1e-2, "evaluate_on": "reported", "learning_rate": 1e-3}
    tuned = Tuning(rates=(1e-4, 1e-3, 1e-2), seed=1000, steps=20, head_learning_rate=1e-2)
    skills = {"head": (0.5, 0.6, 0.9), "alpha": (0.6, 0.8, 0.7), "beta": (0.7, 0.75, None)}
    for method, by_rate in skills.items():
        for rate, skill in zip(tuned.rates, by_rate, strict=True):
            heads = {"head_learning_rate": rate} if method == "head" else {}
            trial = {**base, "learning_rate": rate, "evaluate_on": "fold", "steps": 20, **heads}
            status = "ok" if skill is not None else "diverged"
            made, outcomes = make_record(method, 1000, protocol=trial, trial=True, skill=skill or 0.5, status=status)
            trial_store(root).put(made, outcomes)
        best = 1e-2 if method == "head" else 1e-3
        made, outcomes = make_record(method, 0, protocol={**base, "learning_rate": best}, tuned=tuned)
        Store(root).put(made, outcomes)
    # What belongs to another experiment: other steps, another seed, other rows.
    for seed, change in ((1000, {"steps": 21}), (1001, {"steps": 20}), (1000, {"steps": 20, "eval_rows": 5})):
        trial = {**base, "learning_rate": 1e-3, "evaluate_on": "fold", **change}
        made, outcomes = make_record("alpha", seed, protocol=trial, trial=True, skill=0.99)
        trial_store(root).put(made, outcomes)


def test_the_report_shows_the_trials(tmp_path):
    write_tuned(tmp_path)
    report = build_report(tmp_path)
    assert report.tables == build_report(tmp_path).tables
    table = report.tables["tables/tuning.md"].decode()
    lines = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| ")}
    assert list(lines) == ["method", "head", "alpha", "beta"]
    assert "0.01 (highest tried)" in lines["head"]
    assert lines["alpha"].rstrip(" |").endswith(" 0.001")
    assert "diverged" in lines["beta"]
    assert "20 steps and seed 1000" in table
    assert "a better one may lie beyond: head." in table
    means = [endpoint_score(one) for one in trial_store(tmp_path).all() if one.cell.method == "alpha"]
    shown = [float(cell) for cell in lines["alpha"].split("|")[2:5]]
    assert all(any(score == pytest.approx(100 * mean, abs=0.051) for mean in means) for score in shown)

    assert "tuning" not in build_without_tuning(tmp_path / "plain")


def build_without_tuning(root: Path) -> str:
    made, outcomes = make_record("alpha")
    Store(root).put(made, outcomes)
    return "".join(build_report(root).tables)
