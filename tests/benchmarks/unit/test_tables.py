"""Tables: right numbers in the right rows, failures shown, unequal conditions told."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from benchmarks.records.comparable import group_records
from benchmarks.records.schema import Tuning
from benchmarks.reporting.footnotes import find_unequal_budgets, group_caption
from benchmarks.reporting.parameters import InconsistentRecordsError, parameters_table
from benchmarks.reporting.ranks import ranks_tables
from benchmarks.reporting.scores import average_scores, estimate_row_error, scores_table
from benchmarks.reporting.throughput import throughput_table
from tests.support.record_factory import TASKS, make_provenance, make_record
from tests.support.tables import SKILLS, frame_of, only_group, row_of, with_scores

# ---------------------------------------------------------------------- scores


def test_mean_and_interval_over_seeds():
    values = (0.70, 0.74, 0.75)
    frame = frame_of(*(with_scores(make_record(seed=seed)[0], rte=value) for seed, value in enumerate(values)))
    table = scores_table(frame)
    half = scipy_stats.t.interval(0.95, 2, 0.73, scipy_stats.sem(values))[1] - 0.73
    assert row_of(table.text, "alpha")["rte (accuracy)"] == f"73.0 ± {100 * half:.1f}"
    fact = table.data[(table.data["task"] == "rte") & (table.data["metric"] == "accuracy")].iloc[0]
    assert (fact["mean"], fact["half_width"]) == pytest.approx((0.73, half))
    assert fact["seeds"] == 3


def test_mean_is_over_primary_metrics_and_its_interval_over_the_means_of_runs():
    records = [make_record(seed=seed)[0] for seed in range(3)]
    per_run = [np.mean([score.metrics[score.primary] for score in record.scores.values()]) for record in records]
    half = scipy_stats.t.ppf(0.975, 2) * scipy_stats.sem(per_run)
    shown = row_of(scores_table(frame_of(*records)).text, "alpha")["mean"]
    assert shown == f"{100 * np.mean(per_run):.1f} ± {100 * half:.1f}"


def test_two_metrics_share_a_cell_the_primary_one_first():
    record, _ = make_record()
    figures = record.scores["mrpc"].metrics
    row = row_of(scores_table(frame_of(record)).text, "alpha")
    assert row["mrpc (accuracy / f1)"] == f"{100 * figures['accuracy']:.1f} / {100 * figures['f1']:.1f}"


def test_baselines_open_the_table_and_methods_follow_by_mean():
    records = [make_record(method, skill=skill)[0] for method, skill in SKILLS.items()]
    table = scores_table(frame_of(make_record("zulu", skill=0.55)[0], *records)).text
    means = [float(mean) for mean in table["mean"]]
    assert list(table["method"][:3]) == ["majority", "head", "bravo"]
    assert means[2:] == sorted(means[2:], reverse=True)
    assert table["method"].iloc[-1] == "zulu"


def test_undefined_score_is_no_skill_in_its_column_and_in_the_mean():
    gap = with_scores(make_record(skill=0.99)[0], rte=None)
    row = row_of(scores_table(frame_of(gap)).text, "alpha")
    assert row["rte (accuracy)"] == "0.0"
    others = [score.metrics[score.primary] for task, score in gap.scores.items() if task != "rte"]
    assert row["mean"] == f"{100 * np.mean([0.0, *others]):.1f}"


def test_score_undefined_in_one_seed_counts_beside_the_others():
    records = [with_scores(make_record(seed=seed)[0], rte=value) for seed, value in enumerate((0.7, None, 0.8))]
    assert row_of(scores_table(frame_of(*records)).text, "alpha")["rte (accuracy)"].startswith("50.0 ")


def test_a_task_without_a_score_leaves_the_mean_of_the_others():
    whole, part = make_record("alpha")[0], make_record("bravo", skill=0.99)[0]
    part = part.model_copy(update={"scores": {task: s for task, s in part.scores.items() if task != "rte"}})
    table = scores_table(frame_of(whole, part)).text
    assert row_of(table, "bravo")["mean"].endswith("(4 of 5 tasks)")
    # A mean over fewer tasks is no better mean.
    assert list(table["method"]) == ["alpha", "bravo"]


def test_a_task_that_one_run_was_not_scored_on_is_not_averaged_over_the_others():
    whole, part = (make_record(seed=seed)[0] for seed in (0, 1))
    part = part.model_copy(update={"scores": {task: s for task, s in part.scores.items() if task != "rte"}})
    row = row_of(scores_table(frame_of(whole, part)).text, "alpha")
    assert {value for column, value in row.items() if column.startswith("rte")} == {"n/a"}


def test_failed_cell_shows_its_status_and_the_caption_its_reason():
    failed, _ = make_record("bravo", status="oom", reason="needed 90 GB\nhad 80")
    records = make_record("alpha")[0], failed
    table = scores_table(frame_of(*records))
    row = row_of(table.text, "bravo")
    assert row["seeds"] == "0 of 1 (oom)"
    assert {row[column] for column in row if column not in {"method", "seeds"}} == {"oom"}
    assert any("needed 90 GB had 80" in line for line in group_caption(only_group(*records)))
    assert row_of(table.data, "bravo")["status"] == "oom"


def test_some_failed_seeds_are_counted():
    records = [make_record(seed=0)[0], make_record(seed=1)[0], make_record(seed=2, status="diverged")[0]]
    table = scores_table(frame_of(*records))
    assert row_of(table.text, "alpha")["seeds"] == "2 of 3 (1 diverged)"
    assert set(table.data["seeds"]) == {2}


def test_a_group_of_failures_only_is_a_table():
    records = [make_record(method, status="unsupported", reason="no layer")[0] for method in ("alpha", "bravo")]
    frame = frame_of(*records)
    assert set(scores_table(frame).text["mean"]) == {"unsupported"}
    assert set(throughput_table(frame).text["train step ms [p10-p90]"]) == {"unsupported"}


def test_one_seed_has_no_interval_but_an_error_from_its_rows():
    frame = frame_of(with_scores(make_record()[0], **dict.fromkeys(TASKS, 0.8)))
    table = scores_table(frame)
    assert table.data["half_width"].isna().all()
    # Binomial: sqrt(0.8 * 0.2 / 100) = 0.04 per task, over sqrt(5) for the mean.
    (row,) = average_scores(frame)
    assert estimate_row_error(row) == pytest.approx(0.04 / math.sqrt(5))


def test_notes_of_the_metrics_are_told_once_per_method():
    def noted(seed):
        record, _ = make_record(seed=seed)
        scores = {
            t: s.model_copy(update={"note": "constant." if t in {"rte", "mnli"} else None})
            for t, s in record.scores.items()
        }
        return record.model_copy(update={"scores": scores})

    notes = scores_table(frame_of(noted(0), noted(1))).notes
    assert [note for note in notes if "constant" in note] == ["alpha: constant (mnli, rte)."]


# ---------------------------------------------------------------------- groups and captions


def test_configurations_of_one_method_are_rows_of_their_own():
    records = [make_record(config={"rank": rank, "alpha": 16})[0] for rank in (4, 8)]
    assert [row.label for row in only_group(*records).rows] == ["alpha (rank=4)", "alpha (rank=8)"]


def test_tracks_never_share_a_table():
    how = {"track": "matched", "target_parameters": 9}
    records = [make_record()[0], make_record(protocol=how)[0]]
    assert len(group_records(records)) == 2


def test_caption_names_conditions_data_and_order():
    group = only_group(*(make_record(method, seed)[0] for method in ("alpha", "bravo") for seed in (0, 1)))
    caption = "\n".join(group_caption(group))
    record = group.records[0]
    for fact in (
        "tiny-bert", "100 steps", "seeds 0, 1", "500 train and 120 validation rows", record.budget.order_hash[:16],
        "12,345", "Example CPU, 2 cores", "torch 2.13.0", "0123456789", record.provenance.command, "WARNING",
    ):  # fmt: skip
        assert (fact in caption) == (fact != "WARNING")


def test_tasks_of_one_source_share_a_line():
    record, _ = make_record()
    same = record.model_copy(update={"sources": dict.fromkeys(record.sources, "generated")})
    assert "cola, mrpc, stsb, mnli, rte: generated." in group_caption(only_group(same))


@pytest.mark.parametrize("change", [{"order_hash": "f" * 64}, {"tokens": 1}])
def test_unequal_budgets_are_found_and_told(change):
    record, _ = make_record("bravo")
    group = only_group(
        make_record("alpha")[0], record.model_copy(update={"budget": record.budget.model_copy(update=change)})
    )
    assert find_unequal_budgets(group) == [0]
    assert sum("WARNING" in line for line in group_caption(group)) == 1
    assert find_unequal_budgets(only_group(make_record("alpha")[0], record)) == []


@pytest.mark.parametrize("timed", [True, False])
def test_a_second_machine_is_a_warning_only_where_something_was_timed(timed):
    record, _ = make_record("bravo")
    timing = record.timing if timed else record.timing.model_copy(update={"train_step": None})
    elsewhere = record.model_copy(update={"provenance": make_provenance(device="GPU"), "timing": timing})
    caption = group_caption(only_group(make_record("alpha")[0], elsewhere))
    assert any(line.startswith("GPU") for line in caption)
    assert any("WARNING" in line for line in caption) == timed


def test_caption_tells_the_recipe_and_what_was_left_out():
    def caption(**fields):
        return "\n".join(group_caption(only_group(make_record(protocol=fields)[0])))

    plain = caption(learning_rate=5e-4, head_learning_rate=2e-3, weight_decay=0.01, clip_norm=1.5)
    assert all(fact in plain for fact in ("0.0005", "0.002", "0.01", "1.5"))
    limited = caption(train_rows=1000, eval_rows=50, track="matched", target_parameters=9)
    assert all(fact in limited for fact in ("1,000 rows", "50 rows", "matched"))
    assert "matched" not in plain


def test_caption_lists_tuned_rates_by_method():
    how = Tuning(rates=(1e-4, 1e-3), seed=1000, steps=50, head_learning_rate=2e-3)
    records = [
        make_record(method, protocol={"learning_rate": rate}, tuned=how)[0]
        for method, rate in (("alpha", 1e-4), ("bravo", 1e-3))
    ]
    caption = "\n".join(group_caption(only_group(*records)))
    assert all(fact in caption for fact in ("alpha 0.0001", "bravo 0.001", "seed 1000", "50 steps", "0.002"))


# ---------------------------------------------------------------------- parameters, throughput


def test_parameters_are_those_of_the_record():
    table = parameters_table(frame_of(make_record(adapter=12_345)[0]))
    row, fact = row_of(table.text, "alpha"), row_of(table.data, "alpha")
    assert (row["adapter"], row["closed form"], row["= counted"], row["heads"]) == ("12,345", "12,345", "yes", "650")
    assert row["per task"] == "2,469"
    assert row["% of backbone"] == "1.234"
    assert fact["adapter_per_task"] == pytest.approx(2469)


@pytest.mark.parametrize(
    ("added", "mergeable", "cells"),
    [
        (1_000, True, ("7,345", "1,000", "0")),
        (0, False, ("12,345", "0", "not mergeable")),
        (None, None, ("n/a", "n/a", "n/a")),
    ],
)
def test_parameters_tell_what_a_further_task_costs_and_what_merging_leaves(added, mergeable, cells):
    record, _ = make_record(adapter=12_345)
    counts = record.parameters.model_copy(update={"added_by_task": added, "mergeable": mergeable})
    row = row_of(parameters_table(frame_of(record.model_copy(update={"parameters": counts}))).text, "alpha")
    assert (row["fixed"], row["added by one more task"], row["after merging"]) == cells


def test_closed_form_that_disagrees_stands_out():
    record, _ = make_record()
    wrong = record.model_copy(update={"parameters": record.parameters.model_copy(update={"adapter_closed_form": 1})})
    assert list(parameters_table(frame_of(wrong)).text["= counted"]) == ["NO"]


def test_runs_that_count_differently_are_an_error():
    frame = frame_of(make_record(seed=0, adapter=10)[0], make_record(seed=1, adapter=11)[0])
    with pytest.raises(InconsistentRecordsError, match=r"runs of alpha .*10, 11.*--rerun all"):
        parameters_table(frame)


def test_throughput_is_in_milliseconds_and_relative_to_the_reference():
    frame = frame_of(*(make_record(method)[0] for method in ("majority", "alpha", "bravissimo")))
    assert not [column for column in throughput_table(frame).text if "alpha" in column]
    table = throughput_table(frame, "alpha")
    assert list(table.text["method"]) == ["alpha", "bravissimo"]
    row, fact = row_of(table.text, "bravissimo"), row_of(table.data, "bravissimo")
    # Ten letters: 20 ms against alpha's 15 ms, as the factory makes them.
    assert row["train step ms [p10-p90]"] == "20.0 [18.0-24.0]"
    assert row["train tokens/s"] == "3,200"
    assert row["train time / alpha"] == "1.33"
    assert row["peak memory MiB"] == "200"
    assert fact["train_step_median_seconds"] == pytest.approx(0.020)
    assert fact["train_over_reference"] == pytest.approx(4 / 3)


def test_ratios_hold_although_the_machine_drifts():
    """The reference was timed while everything took twice as long: in units of the bare forward it does not show."""
    records = []
    for method, over_bare in (("alpha", 3.0), ("bravissimo", 4.5)):
        record, _ = make_record(method)
        timing = record.timing.model_copy(update={"train_over_bare": over_bare})
        records.append(record.model_copy(update={"timing": timing}))
    assert row_of(throughput_table(frame_of(*records), "alpha").text, "bravissimo")["train time / alpha"] == "1.50"


def test_training_seconds_are_those_of_timed_runs():
    """A run without a timing pass ran beside others."""
    timed, beside = (make_record(seed=seed)[0] for seed in (0, 1))
    slow = beside.timing.model_copy(update={"train_step": None, "train_seconds": 1e6})
    frame = frame_of(timed, beside.model_copy(update={"timing": slow}))
    assert row_of(throughput_table(frame).data, "alpha")["train_seconds"] == pytest.approx(timed.timing.train_seconds)


@pytest.mark.parametrize(("shares", "is_marked"), [((0.01, 0.2), True), ((0.04, 0.03), False), ((None, None), False)])
def test_times_taken_beside_other_processes_are_marked(shares, is_marked):
    records = []
    for seed, share in enumerate(shares):
        record, _ = make_record(seed=seed)
        records.append(record.model_copy(update={"timing": record.timing.model_copy(update={"others_share": share})}))
    table = throughput_table(frame_of(*records))
    assert row_of(table.text, "alpha")["train step ms [p10-p90]"].endswith("†") == is_marked
    assert any("alpha 20 %" in note for note in table.notes) == is_marked


# ---------------------------------------------------------------------- ranks


def test_ranks_by_hand():
    # On all of five tasks alpha is best, and delta last.
    skills = {"alpha": 0.9, "bravo": 0.8, "charlie": 0.7, "delta": 0.6}
    records = [with_scores(make_record(m)[0], **dict.fromkeys(TASKS, s)) for m, s in skills.items()]
    (table,) = ranks_tables(frame_of(*records, make_record("head")[0]))
    assert list(table.text["method"]) == list(skills)
    assert [float(rank) for rank in table.text["mean rank"]] == [1, 2, 3, 4]
    assert row_of(table.text, "alpha")["best on"] == "5 of 5"
    # Critical difference at 5 % of four methods and five tasks: 2.569 * sqrt(4 * 5 / 30) = 2.1.
    assert row_of(table.text, "alpha")["ranks above"] == "delta"
    assert set(table.data.loc[table.data["p_nemenyi"] < 0.05, "method"]) == {"alpha", "delta"}


def test_no_ranks_of_few_methods_or_tasks():
    assert ranks_tables(frame_of(*(make_record(method)[0] for method in ("alpha", "bravo", "head")))) == []
    few = {"tasks": list(TASKS)[:4]}
    assert ranks_tables(frame_of(*(make_record(m, protocol=few)[0] for m in ("alpha", "bravo", "charlie")))) == []
