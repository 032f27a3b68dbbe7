"""Test sets filled from training rows, fields of methods on the command line, and the study's own protocol."""

from __future__ import annotations

import pytest

from benchmarks.methods.parse import parse_method
from benchmarks.plan.options import Options, resolve_suite
from benchmarks.tasks.base import Example, TaskData, TaskSpec
from benchmarks.tasks.resplit import resplit
from moepeft.errors import ConfigError

SPEC = TaskSpec("classes", "classification", ("no", "yes"), "accuracy")


def made(train: int, tested: int) -> TaskData:
    rows = [Example(f"row {at}", label=at % 2) for at in range(train + tested)]
    return TaskData(SPEC, rows[:train], rows[train:], "hand-made", "f" * 64)


def test_a_small_test_set_is_filled_from_training_rows_that_are_trained_on_no_more():
    before, after = made(50, 5), resplit(made(50, 5), 20)
    assert (len(after.train), len(after.validation)) == (35, 20)
    assert sorted(row.first for row in (*after.train, *after.validation)) == sorted(
        row.first for row in (*before.train, *before.validation)
    )
    assert after.validation[:5] == tuple(before.validation)
    assert after.fingerprint != before.fingerprint
    assert "15" in after.source
    assert resplit(made(50, 5), 20).validation == after.validation
    assert resplit(made(50, 20), 20).fingerprint == "f" * 64
    assert len(resplit(made(50, 5), 1000).train) == 25


def test_the_study_declares_an_endpoint_over_tasks_that_it_trains_and_official_splits_are_a_flag_away():
    study = resolve_suite(Options(suite="glue"))
    assert (study.test_rows, study.endpoint, len(study.endpoint_tasks), len(study.tasks)) == (1000, "skill", 6, 8)
    assert study.examinations == (100, 200, 400, 800)
    official = resolve_suite(Options(suite="glue", official_splits=True, tasks=("rte", "mrpc")))
    assert (official.test_rows, official.endpoint_tasks) == (None, ("mrpc",))


def test_fields_of_a_method_are_written_after_its_preset():
    assert parse_method("lora@rank=40", 2).config()["rank"] == 40
    found = parse_method("tucka@released+routing=row+groups=3", 2)
    assert found.name == "tucka@released+routing=row+groups=3"
    config = found.config()
    assert (config["routing"], config["groups"], config["choice"]) == ("row", 3, "normalised")
    with pytest.raises(ConfigError, match="no hyper-parameter"):
        parse_method("lora@size=3", 2)
