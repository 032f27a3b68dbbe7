"""Verdicts against a reference, and what changed between two results folders."""

from __future__ import annotations

import pandas as pd
import pytest

from benchmarks.records.frame import Results
from benchmarks.records.schema import Tuning
from benchmarks.records.store import RecordError
from benchmarks.reporting.changes import difference_markdown, difference_table
from benchmarks.reporting.comparison import AT_EDGE, REFERENCE_AT_EDGE, comparison_table
from benchmarks.reporting.endpoint import Endpoint
from benchmarks.reporting.scores import average_scores
from benchmarks.reporting.tuning import find_trials
from benchmarks.statistics.intervals import level_at_each_of
from tests.support.record_factory import TASKS, make_record
from tests.support.tables import fill, row_of, with_scores

# ---------------------------------------------------------------------- comparison


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Results:
    root = tmp_path_factory.mktemp("filled")
    fill(root)
    return Results.load(root)


def compare(results: Results, reference: str = "alpha", **keywords):
    return comparison_table(results.frame(), results.outcomes(), reference, **keywords)


def test_verdicts_against_the_reference(filled):
    table = compare(filled)
    assert list(table.text["method"]) == ["head", "bravo", "charlie"]
    assert list(table.data["verdict"]) == ["worse", "better", "undecided"]
    means = {row.label: row.mean.mean for row in average_scores(filled.frame())}
    assert row_of(table.data, "bravo")["difference"] == pytest.approx(means["bravo"] - means["alpha"])


def test_baselines_are_no_part_of_the_family(filled):
    data = compare(filled).data.set_index("method")
    assert data.loc["head", "p_holm"] == data.loc["head", "p_value"]
    p = data.loc[["bravo", "charlie"], "p_value"]
    # Holm by hand: the smaller of two p-values counts twice.
    assert data.loc[p.idxmin(), "p_holm"] == pytest.approx(min(1, 2 * p.min()))


def test_wide_band_makes_equivalents(filled):
    assert set(compare(filled, band=0.9).data["verdict"]) == {"equivalent"}


def test_a_folder_that_is_looked_at_twice_decides_by_a_stricter_level(tmp_path):
    fill(tmp_path)
    once = compare_folder(tmp_path)
    (tmp_path / "analysis.toml").write_text("looks = 2\n")
    twice = compare_folder(tmp_path)
    ratio = twice.data["p_value"] / once.data["p_value"]
    assert ratio[once.data["p_value"] > 1e-11].tolist() == pytest.approx(
        [0.05 / level_at_each_of(2)] * ratio.notna().sum()
    )
    assert (twice.data["half_width"] > once.data["half_width"]).all()
    assert any("Looked at 2 times" in note for note in twice.notes)
    assert not any("Looked at" in note for note in once.notes)


@pytest.mark.parametrize("text", ["looks = 0", "looks = 1.5", "look = 2", "looks 2"])
def test_an_analysis_that_declares_something_else_is_refused(tmp_path, text):
    fill(tmp_path)
    (tmp_path / "analysis.toml").write_text(text)
    with pytest.raises(RecordError, match=r"analysis\.toml is no declaration"):
        compare_folder(tmp_path)


def compare_folder(root):
    results = Results.load(root)
    (group,) = results.groups()
    return compare(results, endpoint=Endpoint.of(group.protocol, results))


def test_no_comparison_without_the_reference(filled):
    assert compare(filled, "nobody") is None


def test_single_seed_is_undecided_however_large_the_gap(tmp_path):
    fill(tmp_path, seeds=(0,))
    table = compare(Results.load(tmp_path))
    assert set(table.data["verdict"]) == {"undecided"}
    assert set(table.text["detectable"]) == {"unknown"}


def test_only_common_seeds_are_paired_and_failures_are_named(tmp_path):
    store = fill(tmp_path)
    store.put(*make_record("alpha", 3))
    store.put(*make_record("delta", 0, status="error", reason="no"))
    table = compare(Results.load(tmp_path))
    assert set(table.data["seeds"]) == {3}
    assert "delta" not in set(table.data["method"])
    assert any("delta" in note for note in table.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edge", "verdicts"),
    [
        (None, {"bravo": "better", "head": "worse"}),
        ("bravo", {"bravo": AT_EDGE, "head": "worse"}),
        ("alpha", {"bravo": REFERENCE_AT_EDGE, "head": REFERENCE_AT_EDGE}),
    ],
)
def test_no_verdict_where_the_best_rate_is_at_the_edge_of_its_grid(tmp_path, edge, verdicts):
    how = Tuning(rates=(1e-4, 1e-3, 1e-2), seed=1000, steps=20, head_learning_rate=None)
    records, trials, outcomes = [], [], []
    for method, skill in {"head": 0.55, "alpha": 0.7, "bravo": 0.95}.items():
        best = 1e-2 if method == edge else 1e-3
        for rate in how.rates:
            protocol = {"learning_rate": rate, "evaluate_on": "fold", "steps": 20}
            trial_skill = 0.9 if rate == best else 0.6
            trials.append(make_record(method, 1000, protocol=protocol, trial=True, skill=trial_skill)[0])
        for seed in range(3):
            record, rows = make_record(method, seed, protocol={"learning_rate": best}, tuned=how, skill=skill)
            records.append(record)
            rows = rows.rename(columns={"label": "truth"})
            outcomes.append(rows.assign(cell=record.cell.id, label=method, seed=seed))
    frame = Results(tuple(records), tuple(trials)).frame()
    assert {each.method for each in find_trials(frame) if each.at_edge} == ({edge} if edge else set())
    data = comparison_table(frame, pd.concat(outcomes), "alpha").data.set_index("method")
    assert {method: data.loc[method, "verdict"] for method in verdicts} == verdicts


@pytest.mark.parametrize(("change", "message"), [
    ({"prediction": lambda rows: 0.0}, "do not belong together"),
    ({"index": lambda rows: rows["index"] + 1}, "cover other examples of cola"),
])  # fmt: skip
def test_outcomes_of_another_run_are_refused(tmp_path, change, message):
    store = fill(tmp_path, seeds=(0,))
    record = next(record for record in store.all() if record.cell.method == "bravo")
    store.outcomes(record).assign(**change).to_parquet(store.outcomes_folder / record.outcomes)
    with pytest.raises(RecordError, match=message):
        compare(Results.load(tmp_path))


# ---------------------------------------------------------------------- changes


def test_difference_between_two_sets():
    before = Results((with_scores(make_record("alpha")[0], rte=0.70), make_record("gone")[0]))
    after = Results((with_scores(make_record("alpha")[0], rte=0.75), make_record("new")[0]))
    table = difference_table(*before.groups(), *after.groups(), before.frame(), after.frame())
    row = row_of(table.data, "alpha")
    assert row["rte"] == pytest.approx(0.05)
    assert row["mean"] == row["after"] - row["before"] == pytest.approx(0.01)
    assert [row[task] for task in TASKS if task != "rte"] == [0] * 4
    assert row_of(table.text, "gone")["rte"] == row_of(table.text, "new")["mean"] == "n/a"
    assert not any("WARNING" in note for note in table.notes)


def test_difference_between_protocols_of_one_name_says_what_differs():
    before, after = Results((make_record()[0],)), Results((make_record(protocol={"steps": 200})[0],))
    table = difference_table(*before.groups(), *after.groups(), before.frame(), after.frame())
    assert [note for note in table.notes if "steps 100 -> 200" in note]


def test_difference_of_unrelated_sets_lists_them():
    text = difference_markdown(Results((make_record()[0],)), Results((make_record(protocol={"name": "other"})[0],)))
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert ["small" in lines[0], "other" in lines[1], len(lines)] == [True, True, 2]
