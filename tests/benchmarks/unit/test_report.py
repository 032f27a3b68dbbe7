"""Tables and figures: right numbers in the right rows, failures shown, equal records give equal bytes."""

from __future__ import annotations

import io
import math
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from benchmarks import report
from benchmarks.records.schema import RunRecord, Score, SiteRouting, Tuning
from benchmarks.records.store import RecordError, Store
from benchmarks.report import Options, run
from benchmarks.reporting.build import NoRecordsError, build_report, find_differences, write_files, write_report
from benchmarks.reporting.changes import difference_markdown
from benchmarks.reporting.comparable import group_records
from benchmarks.reporting.comparison import comparison_table
from benchmarks.reporting.figures.experts import blocks_of, subtitle
from benchmarks.reporting.figures.figures import draw_figures, loss_gaps, pareto_front
from benchmarks.reporting.figures.labels import LETTER, LINE, place_labels
from benchmarks.reporting.footnotes import group_caption, records_hash
from benchmarks.reporting.scores import scores_table
from benchmarks.reporting.tables import InconsistentRecordsError, parameters_table, throughput_table
from tests.support.record_factory import TASKS, make_provenance, make_record, make_routing

SKILLS = {"majority": 0.5, "head": 0.6, "alpha": 0.7, "bravo": 0.9, "charlie": 0.7}


def fill(root: Path, seeds: tuple[int, ...] = (0, 1, 2), **changes) -> Store:
    store = Store(root)
    for method, skill in SKILLS.items():
        for seed in seeds:
            store.put(*make_record(method, seed, skill=skill, **changes))
    return store


def with_scores(record: RunRecord, **values: float | None) -> RunRecord:
    """The record with the given primary scores, by task, out of 100 rows; all other tasks keep theirs."""
    scores = dict(record.scores)
    for task, value in values.items():
        scores[task] = Score(metrics={"accuracy": value}, primary="accuracy", rows=100)
    return record.model_copy(update={"scores": scores})


def only_group(*records: RunRecord):
    (group,) = group_records(records)
    return group


def cells(frame: pd.DataFrame, method: str) -> dict[str, str]:
    (row,) = frame[frame["method"] == method].to_dict("records")
    return row


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("work") / "results" / "small"
    fill(root)
    write_report(root, "alpha")
    return root


# ---------------------------------------------------------------------- scores


def test_mean_and_interval_over_seeds():
    values = (0.70, 0.74, 0.75)
    records = [with_scores(make_record(seed=seed)[0], rte=value) for seed, value in enumerate(values)]
    table = scores_table(only_group(*records))
    half = scipy_stats.t.interval(0.95, 2, 0.73, scipy_stats.sem(values))[1] - 0.73
    assert cells(table.text, "alpha")["rte (accuracy)"] == f"73.0 ± {100 * half:.1f}"
    fact = table.data[(table.data["task"] == "rte") & (table.data["metric"] == "accuracy")].iloc[0]
    assert (fact["mean"], fact["half_width"]) == pytest.approx((0.73, half))
    assert fact["seeds"] == 3


def test_mean_is_over_primary_metrics_and_its_interval_over_the_means_of_runs():
    records = [make_record(seed=seed)[0] for seed in range(3)]
    table = scores_table(only_group(*records))
    per_run = [np.mean([score.metrics[score.primary] for score in record.scores.values()]) for record in records]
    half = scipy_stats.t.ppf(0.975, 2) * scipy_stats.sem(per_run)
    assert cells(table.text, "alpha")["mean"] == f"{100 * np.mean(per_run):.1f} ± {100 * half:.1f}"


def test_two_metrics_share_a_cell_the_primary_one_first():
    record, _ = make_record()
    (row,) = scores_table(only_group(record)).text.to_dict("records")
    figures = record.scores["mrpc"].metrics
    assert row["mrpc (accuracy / f1)"] == f"{100 * figures['accuracy']:.1f} / {100 * figures['f1']:.1f}"


def test_baselines_open_the_table_and_methods_follow_by_mean():
    records = [make_record(method, skill=skill)[0] for method, skill in SKILLS.items()]
    low = with_scores(make_record("zulu", skill=0.55)[0])
    table = scores_table(only_group(low, *records)).text
    means = [float(mean) for mean in table["mean"]]
    assert list(table["method"][:3]) == ["majority", "head", "bravo"]
    assert means[2:] == sorted(means[2:], reverse=True)
    assert table["method"].iloc[-1] == "zulu"


def test_undefined_score_is_said_and_the_mean_says_over_how_many_tasks():
    full = with_scores(make_record("alpha")[0], rte=0.8)
    gap = with_scores(make_record("bravo", skill=0.99)[0], rte=None)
    table = scores_table(only_group(full, gap)).text
    assert cells(table, "bravo")["rte (accuracy)"] == "n/a"
    others = [score.metrics[score.primary] for task, score in gap.scores.items() if task != "rte"]
    assert cells(table, "bravo")["mean"] == f"{100 * np.mean(others):.1f} (4 of 5 tasks)"
    # A mean over fewer tasks is no better mean.
    assert list(table["method"]) == ["alpha", "bravo"]


def test_score_undefined_in_one_seed_is_not_averaged_over_the_others():
    records = [with_scores(make_record(seed=seed)[0], rte=value) for seed, value in enumerate((0.7, None, 0.8))]
    table = scores_table(only_group(*records)).text
    assert cells(table, "alpha")["rte (accuracy)"] == "n/a"


def test_failed_cell_shows_its_status_and_the_caption_its_reason():
    failed, _ = make_record("bravo", status="oom", reason="needed 90 GB\nhad 80")
    group = only_group(make_record("alpha")[0], failed)
    row = cells(scores_table(group).text, "bravo")
    assert row["seeds"] == "0 of 1 (oom)"
    assert {row[column] for column in row if column not in {"method", "seeds"}} == {"oom"}
    assert "bravo, seed 0: oom: needed 90 GB had 80" in group_caption(group)
    assert cells(scores_table(group).data, "bravo")["status"] == "oom"


def test_some_failed_seeds_are_counted():
    records = [make_record(seed=0)[0], make_record(seed=1)[0], make_record(seed=2, status="diverged")[0]]
    row = cells(scores_table(only_group(*records)).text, "alpha")
    assert row["seeds"] == "2 of 3 (1 diverged)"
    assert "±" in row["mean"]


def test_a_group_of_failures_only_is_a_table():
    records = [make_record(method, status="unsupported", reason="no layer")[0] for method in ("alpha", "bravo")]
    group = only_group(*records)
    assert set(scores_table(group).text["mean"]) == {"unsupported"}
    assert set(throughput_table(group).text["train step ms [p10-p90]"]) == {"unsupported"}
    assert draw_figures(group) == {}


def test_one_seed_has_no_interval_and_the_note_says_what_is_noise():
    values = dict.fromkeys(TASKS, 0.8)
    table = scores_table(only_group(with_scores(make_record()[0], **values)))
    assert "±" not in table.text.to_string()
    # Binomial: sqrt(0.8 * 0.2 / 100) = 0.04 per task, over sqrt(5) for the mean; times 1.96 sqrt(2).
    assert f"standard error of a mean is {100 * 0.04 / math.sqrt(5):.1f}," in table.notes[1]
    assert f"below {100 * 0.04 / math.sqrt(5) * 1.96 * math.sqrt(2):.1f} are noise" in table.notes[1]


def test_notes_of_the_metrics_are_told_once_per_method():
    def noted(seed):
        record, _ = make_record(seed=seed)
        scores = {
            t: s.model_copy(update={"note": "constant." if t in {"rte", "mnli"} else None})
            for t, s in record.scores.items()
        }
        return record.model_copy(update={"scores": scores})

    notes = scores_table(only_group(noted(0), noted(1))).notes
    assert [note for note in notes if "constant" in note] == ["alpha: constant (mnli, rte)."]


# ---------------------------------------------------------------------- groups


def test_protocols_never_share_a_table(tmp_path):
    store = fill(tmp_path, seeds=(0,))
    store.put(*make_record("alpha", protocol={"steps": 7}))
    groups = group_records(store.all())
    assert [group.label for group in groups] == ["small (steps=100)", "small (steps=7)"]
    assert [len(group.records) for group in groups] == [5, 1]
    report_ = build_report(tmp_path)
    assert report_.markdown.count("### Scores (small (steps=") == 2
    frame = pd.read_csv(io.BytesIO(report_.tables["tables/parameters.csv"]), comment="#")
    assert frame["protocol"].value_counts().to_dict() == {"small (steps=100)": 5, "small (steps=7)": 1}
    assert len([name for name in report_.figures if name.startswith("figures/score-parameters")]) == 2


def test_configurations_of_one_method_are_rows_of_their_own():
    records = [make_record(config={"rank": rank, "alpha": 16})[0] for rank in (4, 8)]
    assert [row.label for row in only_group(*records).rows] == ["alpha (rank=4)", "alpha (rank=8)"]


def test_caption_names_conditions_data_and_order():
    group = only_group(*(make_record(method, seed)[0] for method in ("alpha", "bravo") for seed in (0, 1)))
    caption = group_caption(group)
    order = group.records[0].budget.order_hash[:16]
    assert caption[0] == "Protocol small; backbone tiny-bert; 100 steps of 8 rows; seeds 0, 1."
    assert "rte: rte set, 500 train and 120 validation rows." in caption
    assert (
        "Seed 0: all 2 trained runs saw the same 800 rows, 12,345 tokens without padding, in the order with hash "
        f"{order}."
    ) in caption
    assert "Example CPU, 2 cores, 2 threads, fp32; torch 2.13.0; transformers 5.23.0." in caption
    assert "Code: commit 0123456789." in caption
    assert "Made by `python -m benchmarks.run --suite small`." in caption
    assert not any("WARNING" in line for line in caption)


def test_tasks_of_one_source_share_a_line():
    record, _ = make_record()
    same = record.model_copy(update={"sources": dict.fromkeys(record.sources, "generated")})
    assert "cola, mrpc, stsb, mnli, rte: generated." in group_caption(only_group(same))


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda r: {"budget": r.budget.model_copy(update={"order_hash": "f" * 64})}, "with seed 0 the budgets differ"),
        (lambda r: {"budget": r.budget.model_copy(update={"tokens": 1})}, "with seed 0 the budgets differ"),
        (lambda r: {"provenance": make_provenance(device="GPU")}, "more than one machine"),
    ],
)
def test_unequal_conditions_are_a_warning_in_the_caption(change, warning):
    record, _ = make_record("bravo")
    caption = group_caption(only_group(make_record("alpha")[0], record.model_copy(update=change(record))))
    assert [line for line in caption if "WARNING" in line and warning in line]


def test_a_second_machine_without_times_is_named_but_no_warning():
    record, _ = make_record("bravo")
    assert record.timing is not None
    untimed = record.timing.model_copy(update={"train_step": None})
    elsewhere = record.model_copy(update={"provenance": make_provenance(device="GPU"), "timing": untimed})
    caption = group_caption(only_group(make_record("alpha")[0], elsewhere))
    assert [line for line in caption if line.startswith("GPU") and line.endswith("Nothing was timed there.")]
    assert not [line for line in caption if "machine" in line]


def test_caption_tells_the_recipe_and_what_was_left_out():
    def caption(**fields):
        return group_caption(only_group(make_record(protocol=fields)[0]))

    plain = caption(learning_rate=5e-4, head_learning_rate=2e-3, weight_decay=0.01, clip_norm=1.0,
                    warmup_ratio=0.06, evaluate_on="reported", track="as-published")  # fmt: skip
    assert plain[0] == "Protocol small; backbone tiny-bert; 100 steps of 8 rows; seed 0."
    assert plain[1] == (
        "AdamW: learning rate 0.0005 (task heads 0.002) for all methods; weight decay 0.01; linear decay after 6 % "
        "warm-up; gradient norm clipped at 1."
    )
    limited = caption(train_rows=1000, eval_rows=50, evaluate_on="fold", track="matched", target_parameters=9)[0]
    assert "trained on at most 1,000 rows per task; scored on at most 50 rows per task" in limited
    assert "scored on rows cut from train, not on the reported ones" in limited
    assert "track matched: " in limited


def test_caption_lists_tuned_rates_by_method():
    how = Tuning(rates=(1e-4, 1e-3), seed=1000, steps=50, head_learning_rate=2e-3)
    records = [
        make_record(method, seed, protocol={"learning_rate": rate}, tuned=how)[0]
        for method, rate in (("alpha", 1e-4), ("bravo", 1e-3))
        for seed in (0, 1)
    ]
    assert group_caption(only_group(*records))[1].startswith(
        "AdamW: learning rate of every method the best of 0.0001, 0.001 on rows cut from train (seed 1000, 50 steps): "
        "alpha 0.0001, bravo 0.001 (task heads 0.002)"
    )


def test_runs_on_other_rows_never_share_a_table():
    records = [make_record(data=dict.fromkeys(TASKS, rows))[0] for rows in ("these", "those")]
    assert len(group_records(records)) == 2


def test_tracks_never_share_a_table():
    matched = {"track": "matched", "target_parameters": 9}
    records = [make_record(protocol=track)[0] for track in ({}, matched)]
    assert [group.label for group in group_records(records)] == [
        "small (target_parameters=9, track=matched)",
        "small (target_parameters=None, track=as-published)",
    ]


# ---------------------------------------------------------------------- parameters, throughput


def test_parameters_are_those_of_the_record():
    (row,) = parameters_table(only_group(make_record(adapter=12_345)[0])).text.to_dict("records")
    assert row == {
        "method": "alpha",
        "sites": "12",
        "adapter": "12,345",
        "per task": "2,469",
        "shared by sites": "0",
        "closed form": "12,345",
        "= counted": "yes",
        "% of backbone": "1.234",
        "heads": "650",
    }  # fmt: skip


def test_closed_form_that_disagrees_stands_out():
    record, _ = make_record()
    wrong = record.parameters.model_copy(update={"adapter_closed_form": 1})
    table = parameters_table(only_group(record.model_copy(update={"parameters": wrong})))
    assert list(table.text["= counted"]) == ["NO"]


def test_runs_that_count_differently_are_an_error():
    group = only_group(make_record(seed=0, adapter=10)[0], make_record(seed=1, adapter=11)[0])
    with pytest.raises(
        InconsistentRecordsError, match=r"runs of alpha count their parameters differently.*--rerun all"
    ):
        parameters_table(group)


def test_throughput_is_in_milliseconds_and_relative_to_the_reference():
    group = only_group(*(make_record(method)[0] for method in ("majority", "alpha", "bravissimo")))
    plain = throughput_table(group)
    assert "train time / alpha" not in plain.text
    assert plain.notes[-1] == "Without a timing pass: majority."
    table = throughput_table(group, "alpha")
    row = cells(table.text, "bravissimo")
    # Ten letters: 20 ms against alpha's 15 ms, as the factory makes them.
    assert row["train step ms [p10-p90]"] == "20.0 [18.0-24.0]"
    assert row["train tokens/s"] == "3,200"
    assert row["train time / alpha"] == "1.33"
    assert row["peak memory MiB"] == "200"
    assert cells(table.data, "bravissimo")["train_step_median_seconds"] == pytest.approx(0.020)


def test_ratios_hold_although_the_machine_drifts():
    """The reference was timed while everything took twice as long: in units of the bare forward it does not show."""
    records = []
    for method, over_bare in (("alpha", 3.0), ("bravissimo", 4.5)):
        record, _ = make_record(method)
        records.append(
            record.model_copy(update={"timing": record.timing.model_copy(update={"train_over_bare": over_bare})})
        )
    table = throughput_table(only_group(*records), "alpha")
    assert cells(table.text, "bravissimo")["train time / alpha"] == "1.50"
    assert any("units of the bare model's forward" in note for note in table.notes)


@pytest.mark.parametrize(("shares", "mark"), [((0.01, 0.2), " †"), ((0.04, 0.03), ""), ((None, None), "")])
def test_times_taken_beside_other_processes_are_marked(shares, mark):
    records = []
    for seed, share in enumerate(shares):
        record, _ = make_record(seed=seed)
        timing = record.timing.model_copy(update={"others_share": share})
        records.append(record.model_copy(update={"timing": timing}))
    table = throughput_table(only_group(*records))
    assert cells(table.text, "alpha")["train step ms [p10-p90]"].endswith("]" + mark)
    assert any("alpha 20 %" in note for note in table.notes) == bool(mark)


# ---------------------------------------------------------------------- comparison


def test_verdicts_against_the_reference(filled):
    store = Store(filled)
    (group,) = group_records(store.all())
    table = comparison_table(group, store.outcomes, "alpha")
    assert list(table.text["method"]) == ["head", "bravo", "charlie"]
    assert cells(table.text, "bravo")["verdict"] == "better"
    assert cells(table.text, "head")["verdict"] == "worse"
    assert cells(table.text, "charlie")["verdict"] == "undecided"
    means = {
        row.label: np.mean([[s.metrics[s.primary] for s in r.scores.values()] for r in row.records])
        for row in group.rows
    }
    assert cells(table.data, "bravo")["difference"] == pytest.approx(means["bravo"] - means["alpha"])
    assert (table.data["p_holm"] >= table.data["p_value"]).all()


def test_wide_band_makes_equivalents(filled):
    store = Store(filled)
    (group,) = group_records(store.all())
    table = comparison_table(group, store.outcomes, "alpha", band=0.9)
    assert set(table.text["verdict"]) == {"equivalent"}


def test_no_comparison_without_the_reference(filled):
    store = Store(filled)
    (group,) = group_records(store.all())
    assert comparison_table(group, store.outcomes, "nobody") is None


def test_single_seed_is_undecided_however_large_the_gap(tmp_path):
    store = fill(tmp_path, seeds=(0,))
    (group,) = group_records(store.all())
    table = comparison_table(group, store.outcomes, "alpha")
    assert set(table.text["verdict"]) == {"undecided"}
    assert set(table.text["seeds to settle"]) == {"unknown"}
    assert "not the noise of training" in table.notes[-1]


def test_only_common_seeds_are_paired_and_failures_are_named(tmp_path):
    store = fill(tmp_path)
    store.put(*make_record("alpha", 3))
    store.put(*make_record("delta", 0, status="error", reason="no"))
    (group,) = group_records(store.all())
    table = comparison_table(group, store.outcomes, "alpha")
    assert set(table.text["seeds"]) == {"3"}
    assert "in common: delta." in table.notes[-1]


def test_outcomes_of_another_run_are_refused(tmp_path):
    store = fill(tmp_path, seeds=(0,))
    record = next(record for record in store.all() if record.cell.method == "bravo")
    store.outcomes(record).assign(prediction=0.0).to_parquet(store.outcomes_folder / record.outcomes)
    (group,) = group_records(store.all())
    with pytest.raises(RecordError, match=rf"bravo, seed 0 \({record.cell.id}\).*do not belong together"):
        comparison_table(group, store.outcomes, "alpha")


def test_outcomes_over_other_examples_are_refused(tmp_path):
    store = fill(tmp_path, seeds=(0,))
    record = next(record for record in store.all() if record.cell.method == "bravo")
    moved = store.outcomes(record)
    moved.assign(index=moved["index"] + 1).to_parquet(store.outcomes_folder / record.outcomes)
    (group,) = group_records(store.all())
    with pytest.raises(RecordError, match="cover other examples of cola"):
        comparison_table(group, store.outcomes, "alpha")


def test_curves_less_those_of_the_baseline_on_the_same_rows():
    base = {0: {1: 0.7, 10: 0.5}, 1: {1: 0.6, 10: 0.9}}
    # Another seed's rows are others, and so are another step's.
    gaps = loss_gaps({1: {1: 0.5, 10: 0.4, 20: 0.1}, 2: {1: 0.1}}, base)
    assert gaps == {1: {1: pytest.approx(-0.1), 10: pytest.approx(-0.5)}}

    def panels(*methods: str) -> int:
        group = only_group(*(make_record(method)[0] for method in methods))
        drawn = draw_figures(group)["training-curves"].decode()
        return len(re.findall(r'id="axes_[0-9]+"', drawn))

    assert panels("head", "alpha", "bravo") == 2
    assert panels("alpha", "bravo") == panels("head") == 1


# ---------------------------------------------------------------------- files


def test_every_table_in_three_formats_and_the_figures(filled):
    names = {
        path.relative_to(filled).as_posix() for path in filled.glob("*/*") if path.suffix not in {".json", ".parquet"}
    }
    tables = {f"tables/{name}.{kind}" for name in ("scores", "comparison", "parameters", "throughput")
              for kind in ("md", "csv", "tex")}  # fmt: skip
    figures = {"score-parameters", "score-step-time", "training-curves", "critical-difference"}
    assert names == tables | {f"figures/{name}.svg" for name in figures}
    header = (
        "Written by `python -m benchmarks.report --results results/small --reference alpha` from records with SHA-256 "
    )
    for name in names:
        assert header + records_hash(Store(filled).all()) in (filled / name).read_text()


def test_same_records_elsewhere_give_the_same_bytes(filled, tmp_path):
    copy = tmp_path / "results" / "small"
    for folder in ("records", "outcomes"):
        shutil.copytree(filled / folder, copy / folder)
    write_report(copy, "alpha")
    for path in sorted([*filled.glob("tables/*"), *filled.glob("figures/*")]):
        assert (copy / path.relative_to(filled)).read_bytes() == path.read_bytes(), path.name


def test_second_report_touches_nothing(filled):
    before = {path: path.stat().st_mtime_ns for path in filled.rglob("*") if path.is_file()}
    write_report(filled, "alpha")
    assert {path: path.stat().st_mtime_ns for path in filled.rglob("*") if path.is_file()} == before


def test_csv_holds_the_unrounded_numbers(filled):
    frame = pd.read_csv(filled / "tables" / "scores.csv", comment="#")
    (group,) = group_records(Store(filled).all())
    expected = scores_table(group).data
    assert frame["mean"].to_numpy() == pytest.approx(expected["mean"].to_numpy(float), rel=1e-11)
    assert list(frame["method"]) == list(expected["method"])


def test_csv_keeps_whole_numbers_whole_beside_a_failure(tmp_path):
    store = fill(tmp_path, seeds=(0,))
    failed, _ = make_record("delta", status="error", reason="no")
    store.put(failed.model_copy(update={"parameters": None}))
    text = build_report(tmp_path).tables["tables/parameters.csv"].decode()
    assert ",1000000," in text
    assert "delta" in text


def test_latex_escapes_what_latex_would_read(tmp_path):
    store = Store(tmp_path)
    store.put(*make_record("under_score", config={"share": "50%"}))
    store.put(*make_record("under_score", config={"share": "60%"}))
    text = build_report(tmp_path).tables["tables/scores.tex"].decode()
    assert r"under\_score (share=50\%)" in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 1
    body = "".join(line for line in text.splitlines() if not line.startswith("%"))
    assert body.replace(r"\_", "").count("_") == 0
    assert body.replace(r"\%", "").count("%") == 0


def test_pipes_do_not_break_a_markdown_row(tmp_path):
    store = Store(tmp_path)
    store.put(*make_record("a|b"))
    assert r"a\|b" in write_report(tmp_path)


def test_figures_are_svg_without_a_date(filled):
    for path in sorted(filled.glob("figures/*.svg")):
        root = ET.fromstring(path.read_bytes())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert b"dc:date" not in path.read_bytes()
        assert b"Matplotlib" not in path.read_bytes()


def test_figures_do_not_depend_on_the_users_style(filled):
    (group,) = group_records(Store(filled).all())
    plain = draw_figures(group)
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "none"}):
        assert draw_figures(group) == plain
        assert mpl.rcParams["font.size"] == 30


def test_ranks_are_drawn_from_five_tasks_and_three_methods_on():
    methods = [make_record(method)[0] for method in ("alpha", "bravo", "charlie")]
    assert "critical-difference" in draw_figures(only_group(*methods))
    assert "critical-difference" not in draw_figures(only_group(*methods[:2]))
    four = [make_record(m, protocol={"tasks": list(TASKS)[:4]})[0] for m in ("alpha", "bravo", "charlie")]
    assert "critical-difference" not in draw_figures(only_group(*four))


def test_routing_is_drawn_from_the_record_of_the_first_seed_that_has_it():
    def routed(seed, routing):
        return make_record("a@b", seed)[0].model_copy(update={"routing": routing})

    routing = make_routing(list(TASKS), layers=2, roles="q up")
    drawn = draw_figures(only_group(make_record()[0], routed(0, None), routed(1, routing)))
    assert {name for name in drawn if "a_b" in name} == {"routing-a_b", "task-embeddings-a_b"}
    assert drawn == draw_figures(only_group(make_record()[0], routed(0, None), routed(1, routing)))
    bare = draw_figures(only_group(routed(0, routing.model_copy(update={"embeddings": None}))))
    assert {name for name in bare if "a_b" in name} == {"routing-a_b"}


def test_dead_experts_are_named():
    def site(name, layer, shares):
        return SiteRouting(site=name, role="up", layer=layer, weights=shares, shares=shares, entropy=[0.0, 0.0])

    sites = [
        site("block.0.up", 0, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        site("block.1.up", 1, [[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]),
    ]
    blocks = blocks_of(sites)
    assert list(blocks) == ["layer 0", "layer 1"]
    assert subtitle(blocks, 2)[1] == "Experts that no task chooses: layer 0 up 3."
    alike = blocks_of([sites[0], sites[0].model_copy(update={"site": "block.1.up"})])
    assert list(alike) == ["all 2 sites alike"]
    assert subtitle(alike, 2)[1:] == [
        "Experts that no task chooses: 3.",
        # Two of three experts in turn: log 2 / log 3.
        "Entropy of one choice's weights 0.00, of the use by all tasks together 0.63 of the largest (2 sites).",
    ]
    many = blocks_of([site(f"block.{layer}.up", layer, [[1.0] + [0.0] * 7]) for layer in range(3)] + sites[1:])
    assert subtitle(many, 4)[1].startswith("Experts that no task chooses: on average 5.2 of 8 at a site (")


def test_labels_cover_neither_each_other_nor_the_points():
    names = [f"task_{number}" for number in range(12)]
    points = np.random.default_rng(0).uniform(-0.5, 0.5, (12, 2))
    labels = place_labels(points, names, limit=0.75)
    wide, high = np.array([len(name) * LETTER for name in names]), LINE
    for number, label in enumerate(labels):
        assert label.name == names[number]
        others = [other for other in labels if other is not label]
        assert all(abs(label.x - o.x) >= wide[0] - 0.08 or abs(label.y - o.y) >= high - 1e-9 for o in others)
        assert all(abs(label.x - x) > wide[number] / 2 or abs(label.y - y) > high / 2 for x, y in points)
        assert math.dist((label.x, label.y), points[number]) < 0.5


def test_pareto_front():
    #          dear and best, beaten by 2, cheap, as cheap but worse, as good as 2 but dearer
    assert pareto_front([9, 5, 3, 3, 4], [0.9, 0.6, 0.7, 0.5, 0.7]) == [2, 0]


# ---------------------------------------------------------------------- check, README, difference, command line


def test_check_names_what_differs(filled, tmp_path):
    root = tmp_path / "results" / "small"
    shutil.copytree(filled, root)
    report_ = build_report(root, "alpha")
    assert find_differences(root, report_) == []
    (root / "tables" / "scores.md").write_text("better")
    (root / "figures" / "training-curves.svg").unlink()
    (root / "tables" / "notes.md").write_text("mine")
    stale = root / "tables" / "old.md"
    stale.write_text("<!-- Written by `python -m benchmarks.report --results x` from records -->")
    expected = [root / "figures" / "training-curves.svg", root / "tables" / "old.md", root / "tables" / "scores.md"]
    assert find_differences(root, report_) == expected
    write_files(root, report_)
    assert find_differences(root, report_) == []
    assert not stale.exists()
    assert (root / "tables" / "notes.md").read_text() == "mine"


def test_reference_of_the_protocol_is_taken(tmp_path):
    fill(tmp_path, protocol={"reference": "alpha", "equivalence_band": 90.0})
    text = build_report(tmp_path).tables["tables/comparison.csv"].decode()
    assert text.count("equivalent") == 3


def test_no_records_is_an_error_that_says_what_to_run(tmp_path):
    with pytest.raises(NoRecordsError, match=r"no records under .*benchmarks\.run"):
        write_report(tmp_path)


@pytest.fixture
def readme(filled, tmp_path) -> tuple[Path, Path]:
    root = tmp_path / "results" / "small"
    shutil.copytree(filled, root)
    path = tmp_path / "README.md"
    path.write_text("# Title\n\n<!-- results:begin results/small -->\nold\n<!-- results:end -->\n\nrest\n")
    return path, root


def test_readme_block_is_rewritten_and_checked(readme, capsys):
    path, root = readme
    assert run(Options(results=(root,), readme=path, check=True, reference="alpha")) == 1
    assert str(path) in capsys.readouterr().err
    assert run(Options(results=(root,), readme=path, reference="alpha")) == 0
    text = path.read_text()
    assert text.startswith("# Title\n\n<!-- results:begin results/small -->\n")
    assert text.endswith("<!-- results:end -->\n\nrest\n")
    assert "old" not in text
    assert "\n#### Scores (small)\n" in text
    assert "(results/small/tables)" in text
    assert run(Options(results=(root,), readme=path, reference="alpha")) == 0
    assert path.read_text() == text
    assert run(Options(results=(root,), readme=path, check=True, reference="alpha")) == 0


def test_check_writes_nothing(readme, capsys):
    path, root = readme
    (root / "tables" / "scores.md").write_text("better")
    assert run(Options(results=(root,), readme=path, check=True, reference="alpha")) == 1
    assert str(root / "tables" / "scores.md") in capsys.readouterr().err
    assert (root / "tables" / "scores.md").read_text() == "better"
    assert "old" in path.read_text()


def test_the_bytes_of_a_figure_are_not_compared(readme):
    root = readme[1]
    figure = root / "figures" / "training-curves.svg"
    figure.write_text(f"{figure.read_text()}<!-- drawn by another matplotlib -->")
    options = Options(results=(root,), check=True, reference="alpha")
    assert run(options) == 0
    figure.unlink()
    assert run(options) == 1


def test_readme_shows_one_folder_and_check_reads_all(readme, monkeypatch):
    path, root = readme
    other = root.parent / "other"
    shutil.copytree(root, other)
    monkeypatch.chdir(path.parent)
    assert run(Options(readme=Path("README.md"), reference="alpha")) == 0
    assert run(Options(readme=Path("README.md"), reference="alpha", check=True)) == 0
    assert "results/other" not in path.read_text()
    assert run(Options(results=(Path("results/other"),), readme=Path("README.md"), reference="alpha", check=True)) == 0
    (other / "tables" / "scores.md").write_text("better")
    assert run(Options(readme=Path("README.md"), reference="alpha", check=True)) == 1


def test_command_line(readme, monkeypatch, capsys):
    path, root = readme
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr("sys.argv", ["report", "--reference", "alpha", "--check"])
    assert report.main() == 0
    monkeypatch.setattr("sys.argv", ["report", "--results", str(root)])
    assert report.main() == 0
    assert "### Scores (small)" in capsys.readouterr().out
    path.write_text("no markers")
    monkeypatch.setattr("sys.argv", ["report", "--readme", "README.md"])
    assert report.main() == 2
    assert "needs the lines <!-- results:begin" in capsys.readouterr().err
    for arguments in (["--results", "nowhere"], ["--diff", str(root), "nowhere"]):
        monkeypatch.setattr("sys.argv", ["report", *arguments])
        assert report.main() == 2
        assert "no records under nowhere" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["report", "--diff", str(root), str(root)])
    assert report.main() == 0
    assert capsys.readouterr().out.startswith(f"From {root} to {root}")


def test_difference_between_two_sets():
    before = [with_scores(make_record("alpha")[0], rte=0.70), make_record("gone")[0]]
    after = [with_scores(make_record("alpha")[0], rte=0.75), make_record("new")[0]]
    text = difference_markdown(before, after)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert [cell.strip() for cell in rows["alpha"].split("|")[2:-2]] == ["+0.0", "+0.0", "+0.0", "+0.0", "+5.0", "+1.0"]
    means = [float(mean) for mean in rows["alpha"].split("|")[-2].split("→")]
    assert means[1] - means[0] == pytest.approx(1, abs=0.11)
    assert rows["gone"].count("n/a") == rows["new"].count("n/a") == 7
    assert "Only in the first set: gone." in text
    assert "Only in the second set: new." in text
    assert "WARNING" not in text


def test_difference_between_protocols_of_one_name_says_what_differs():
    text = difference_markdown([make_record()[0]], [make_record(protocol={"steps": 200})[0]])
    assert "WARNING: the protocols differ: steps 100 -> 200." in text


def test_difference_of_unrelated_sets_lists_them():
    text = difference_markdown([make_record()[0]], [make_record(protocol={"name": "other"})[0]])
    assert "Only in the first set: protocol small (1 records)" in text
    assert "Only in the second set: protocol other (1 records)" in text
