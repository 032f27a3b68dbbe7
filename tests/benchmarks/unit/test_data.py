"""From examples to batches and their loss: held to hand-worked cases and to scipy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.backbones.load import find_backbone, hidden_size, load_backbone, load_tokenizer
from benchmarks.cells.data import TokenisedTask, chosen_rows
from benchmarks.cells.data import tokenise_task as tokenise
from benchmarks.cells.evaluate import evaluate_model
from benchmarks.cells.ledger import Ledger
from benchmarks.cells.order import sorted_within_windows, training_order
from benchmarks.cells.train import one_ahead, training_batches
from benchmarks.families import family_of
from benchmarks.families.batch import HeadRow
from benchmarks.families.encoder import MultiTaskModel, collate, pool, texts_of
from benchmarks.protocols.protocol import Protocol, load_suite
from benchmarks.protocols.seeds import stream, torch_stream
from benchmarks.records.failures import Diverged
from benchmarks.tasks import TASKS, load_task
from benchmarks.tasks.base import Example, TaskData, TaskSpec

CLASSES = TaskSpec("classes", "classification", ("no", "yes"), "accuracy")
SCORES = TaskSpec("scores", "regression", (), "pearson_spearman", label_range=(1.0, 5.0))
CHOICES = TaskSpec("choices", "multiple_choice", (), "accuracy")
PASSAGE = TaskSpec("passage", "classification", ("no", "yes"), "accuracy", truncate="only_second")
SPECS = (CLASSES, SCORES, CHOICES)


CPU = torch.device("cpu")


def protocol(**fields: object) -> Protocol:
    return Protocol.model_validate({"name": "test", "tasks": ("classes",), "steps": 4, "precision": "fp32", **fields})


def tokenise_task(data: TaskData, tokenizer: Any, used: Protocol) -> TokenisedTask:
    return tokenise(data, family_of(used, tokenizer, (data.spec,)))


def head_row(sequences: tuple[tuple[int, ...], ...], label: float) -> HeadRow:
    segments = tuple((0,) * len(tokens) for tokens in sequences)
    return HeadRow(sequences=sequences, segments=segments, label=label, index=0)


def task_data(spec: TaskSpec, rows: list[Example]) -> TaskData:
    return TaskData(spec, rows, rows, "hand-made", "0" * 64)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(find_backbone("tiny-bert"))


# ---------------------------------------------------------------------- seeds


def test_streams_differ_by_name_order_and_boundary():
    names = [("a", "bc"), ("ab", "c"), ("bc", "a"), ("a", "b", "c"), ("a", 1), ("a", 11), ("a", 1, 1)]
    assert len({stream(*one) for one in names}) == len(names)
    assert all(0 <= stream(*one) < 2**63 for one in names)
    assert stream("a", 1) == stream("a", "1") == stream("a", 1)


def test_torch_stream_gives_the_same_numbers_and_leaves_no_trace():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch_stream("weights", 0):
        first = torch.rand(2)
    assert torch.equal(torch.rand(3), expected)
    with torch_stream("weights", 0):
        assert torch.equal(torch.rand(2), first)


# ---------------------------------------------------------------------- tokenising


def test_rows_hold_exactly_what_the_tokenizer_says(tokenizer):
    rows = [Example("a cat sat", "it sat", label=1), Example("no", "never again", label=0)]
    task = tokenise_task(task_data(CLASSES, rows), tokenizer, protocol())
    for row, example in zip(task.train, rows, strict=True):
        expected = tokenizer(example.first, example.second)
        assert row.sequences == (tuple(expected["input_ids"]),)
        assert row.segments == (tuple(expected["token_type_ids"]),)
        assert row.label == example.label
    assert 1 in task.train[0].segments[0]


def test_multiple_choice_rows_become_one_pair_per_choice(tokenizer):
    example = Example("what purrs", "a passage", choices=("cat", "dog", "cow"), label=2)
    assert texts_of(CHOICES, example) == [("a passage what purrs", choice) for choice in ("cat", "dog", "cow")]
    (row,) = tokenise_task(task_data(CHOICES, [example]), tokenizer, protocol()).train
    assert row.sequences[1] == tuple(tokenizer("a passage what purrs", "dog")["input_ids"])
    with pytest.raises(ValueError, match="without choices"):
        texts_of(CHOICES, Example("what purrs"))


def test_truncation_takes_from_the_passage_only_where_the_task_says_so(tokenizer):
    rows = [Example("is it so big", "word " * 60, label=1)]
    (row,) = tokenise_task(task_data(PASSAGE, rows), tokenizer, protocol(max_length=24)).train
    question = tokenizer("is it so big")["input_ids"]
    assert len(row.sequences[0]) == 24
    assert list(row.sequences[0][: len(question)]) == question


def test_a_pair_task_with_a_missing_second_text_is_refused(tokenizer):
    rows = [Example("one", "two"), Example("one")]
    with pytest.raises(ValueError, match="1 of 2 rows lack the second text"):
        tokenise_task(task_data(CLASSES, rows), tokenizer, protocol())


def test_limits_take_a_subset_that_depends_on_nothing_but_task_and_split():
    data = task_data(CLASSES, [Example(str(number), label=number % 2) for number in range(50)])
    indices, rows = chosen_rows(data, "validation", protocol(eval_rows=10, steps=1))
    again, _ = chosen_rows(data, "validation", protocol(eval_rows=10, steps=99, name="other"))
    assert indices == again == sorted(set(indices))
    assert [row.first for row in rows] == list(map(str, indices))
    assert chosen_rows(data, "train", protocol(eval_rows=10))[0] == list(range(50))
    assert chosen_rows(data, "train", protocol(train_rows=10))[0] != indices


def test_scarce_rows_cut_what_is_trained_on_of_the_tasks_of_the_endpoint_alone():
    rows = [Example(str(number), label=number % 2) for number in range(50)]
    scarce, other = (task_data(replace(CLASSES, name=name), rows) for name in ("scarce", "other"))
    fields = {"tasks": ("scarce", "other"), "endpoint_tasks": ("scarce",), "train_rows": 40}
    few, more = (protocol(**fields, scarce_rows=number) for number in (5, 20))
    assert len(chosen_rows(scarce, "train", few)[0]) == 5
    assert len(chosen_rows(other, "train", few)[0]) == 40
    assert len(chosen_rows(scarce, "validation", few)[0]) == 50
    assert set(chosen_rows(scarce, "train", few)[0]) < set(chosen_rows(scarce, "train", more)[0])
    with pytest.raises(ValueError, match="scarce_rows needs endpoint_tasks"):
        protocol(scarce_rows=5)


def test_the_protocol_of_scarce_tasks_is_declared():
    suite = load_suite("transfer")
    assert (suite.endpoint, suite.endpoint_tasks, suite.reference) == ("skill", ("mrpc", "rte"), "lora-per-task")
    assert set(suite.tasks) == {"mrpc", "qqp", "mnli", "rte"}


# ---------------------------------------------------------------------- order


def test_every_epoch_of_a_task_sees_each_row_once():
    sizes = {"a": 7, "b": 3}
    seen = [slot for batch in training_order(sizes, steps=40, batch_size=5, stream=("t", 0)) for slot in batch]
    for task, size in enumerate(sizes.values()):
        rows = [row for owner, row in seen if owner == task]
        epochs = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
        assert len(epochs) > 5
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_tasks_are_drawn_with_equal_probability_whatever_their_size():
    sizes = {"small": 3, "large": 5000, "middle": 100}
    single = list(training_order(sizes, steps=50, batch_size=8, stream=("t", 1), mixed=False))
    assert {len({task for task, _ in batch}) for batch in single} == {1}
    assert {batch[0][0] for batch in single} == set(range(len(sizes)))
    order = training_order(sizes, steps=500, batch_size=32, stream=("t", 1))
    counts = np.bincount([task for batch in order for task, _ in batch])
    assert counts.sum() == 500 * 32
    assert stats.chisquare(counts).pvalue > 1e-3


def test_order_depends_on_the_stream_and_a_longer_run_starts_like_a_shorter_one():
    sizes = {"a": 20, "b": 30}

    def order(seed: int, steps: int) -> list[list[tuple[int, int]]]:
        return list(training_order(sizes, steps=steps, batch_size=8, stream=("t", seed)))

    assert order(0, 10) == order(0, 10) == order(0, 30)[:10]
    assert order(0, 10) != order(1, 10)


# ---------------------------------------------------------------------- batches


def hand_made_rows() -> list[tuple[int, HeadRow]]:
    def row(lengths: tuple[int, ...], label: float) -> HeadRow:
        return head_row(tuple(tuple(range(7, 7 + length)) for length in lengths), label)

    return [(2, row((3, 9), 1)), (0, row((4,), 1)), (2, row((2, 2, 5), 2)), (1, row((6,), 4.0))]


@pytest.mark.parametrize("window", [1, 3, 4, 50])
def test_windows_keep_every_row_and_pad_less(window):
    lengths = {"short": np.arange(5, 15), "long": np.arange(60, 90)}
    steps = list(training_order({"short": 10, "long": 30}, steps=11, batch_size=8, stream=("order",)))
    names = list(lengths)

    def length(slot):
        return int(lengths[names[slot[0]]][slot[1]])

    found = list(sorted_within_windows(steps, length, window=window, stream=("order",)))
    assert found == list(sorted_within_windows(steps, length, window=window, stream=("order",)))
    assert [len(step) for step in found] == [8] * 11
    for start in range(0, 11, window):
        group = slice(start, start + window)
        assert sorted(row for step in found[group] for row in step) == sorted(
            row for step in steps[group] for row in step
        )

    def padded(order):
        return sum(len(step) * max(map(length, step)) for step in order)

    assert padded(found) <= padded(steps)
    assert window == 1 or padded(found) < 0.8 * padded(steps)
    assert window == 1 or [max(map(length, s)) for s in found] != sorted(max(map(length, s)) for s in found)


def test_a_fold_is_cut_from_the_training_rows_and_not_trained_on():
    train = [Example(f"train {number}") for number in range(400)]
    data = TaskData(CLASSES, train, [Example("reported")], "hand-made", "0" * 64)
    fold = protocol(evaluate_on="fold", fold_rows=50)
    (trained, _), (scored, rows) = (chosen_rows(data, split, fold) for split in ("train", "validation"))
    assert len(scored) == 50
    assert sorted([*trained, *scored]) == list(range(400))
    assert all(row in train for row in rows)
    few = fold.with_overrides(train_rows=100, eval_rows=10)
    assert len(chosen_rows(data, "train", few)[0]) == 100
    assert set(chosen_rows(data, "train", few)[0]) <= set(trained)
    assert set(chosen_rows(data, "validation", few)[0]) <= set(scored)
    small = TaskData(CLASSES, train[:20], [Example("reported")], "hand-made", "0" * 64)
    assert len(chosen_rows(small, "validation", fold)[0]) == 4


def test_collate_on_a_hand_worked_batch():
    batch = collate(hand_made_rows(), SPECS, pad_token_id=3)
    assert batch.inputs["input_ids"].shape == (7, 16)  # the longest of nine tokens, in steps of eight
    assert batch.inputs["input_ids"][0].tolist() == [7, 8, 9] + [3] * 13
    assert batch.inputs["attention_mask"].sum(1).tolist() == [3, 9, 4, 2, 2, 5, 6]
    assert batch.tokens == 31
    assert batch.rows == 4
    assert batch.task_ids.tolist() == [2, 2, 0, 2, 2, 2, 1]
    classes, scores, choices = batch.groups
    assert (classes.task, classes.sequences.tolist(), classes.labels.tolist()) == (0, [2], [1])
    assert (scores.task, scores.sequences.tolist(), scores.labels.tolist()) == (1, [6], [0.75])  # (4 - 1) / (5 - 1)
    assert choices.sequences.tolist() == [[0, 1, 0], [3, 4, 5]]
    assert choices.valid.tolist() == [[True, True, False], [True, True, True]]
    assert choices.labels.tolist() == [1, 2]


@pytest.mark.parametrize("mask", [[1, 1, 0], [0, 1, 1]])
def test_pooling_ignores_padding_on_either_side(mask):
    real = [[1.0, 2.0], [3.0, 6.0]]
    hidden = torch.tensor([[*real, [9.0, 9.0]] if mask[0] else [[9.0, 9.0], *real]])
    for how, wanted in (("mean", [2.0, 4.0]), ("first", real[0]), ("last", real[1])):
        assert pool(hidden, torch.tensor([mask]), how).tolist() == [wanted]


def test_a_mixed_batch_costs_the_mean_of_its_rows_alone():
    encoder = load_backbone(find_backbone("tiny-bert"), "encoder", dropout=0.0)
    model = MultiTaskModel(encoder, SPECS, hidden=hidden_size(encoder), stream=("t", 0, "heads")).eval()
    rows = hand_made_rows()
    with torch.no_grad():
        alone = [model.loss(model(batch), batch) for batch in (collate([row], SPECS, 0) for row in rows)]
        mixed = collate(rows, SPECS, 0)
        assert model.loss(model(mixed), mixed).item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-5)


def test_regression_loss_is_least_at_the_score_and_predictions_scale_back():
    encoder = load_backbone(find_backbone("tiny-bert"), "encoder", dropout=0.0)
    model = MultiTaskModel(encoder, SPECS, hidden=hidden_size(encoder), stream=("t", 0, "heads"))
    batch = collate([(1, head_row(((7, 8),), 4.0))], SPECS, 0)
    logits = torch.linspace(-6, 6, 2401)
    losses = torch.stack([model.loss([value.reshape(1)], batch) for value in logits])
    best = logits[losses.argmin()].reshape(1)
    assert model.read(best, batch.groups[0]).chosen.item() == pytest.approx(4.0, abs=0.01)
    low, high = model.read(torch.tensor([-50.0, 50.0]), batch.groups[0]).chosen.tolist()
    assert (low, high) == pytest.approx((1.0, 5.0))


def test_choices_that_do_not_exist_are_never_predicted():
    encoder = load_backbone(find_backbone("tiny-bert"), "encoder", dropout=0.0)
    model = MultiTaskModel(encoder, SPECS, hidden=hidden_size(encoder), stream=("t", 0, "heads")).eval()
    batch = collate(hand_made_rows(), SPECS, 0)
    with torch.no_grad():
        logits = model(batch)[2]
    assert logits[0, 2] == torch.finfo(torch.float32).min
    assert logits[0, :2].min() > -100


def test_heads_of_a_task_start_alike_whatever_the_other_tasks():
    encoder = load_backbone(find_backbone("tiny-bert"), "encoder", dropout=0.0)
    few = MultiTaskModel(encoder, (CHOICES,), hidden=32, stream=("t", 0, "heads"))
    many = MultiTaskModel(encoder, SPECS, hidden=32, stream=("t", 0, "heads"))
    other = MultiTaskModel(encoder, SPECS, hidden=32, stream=("t", 1, "heads"))
    assert torch.equal(few.heads["choices"].weight, many.heads["choices"].weight)
    assert not torch.equal(other.heads["choices"].weight, many.heads["choices"].weight)


# ---------------------------------------------------------------------- account


def test_ledger_counts_a_hand_worked_batch():
    ledger = Ledger([spec.name for spec in SPECS])
    rows = hand_made_rows()
    ledger.add(rows, collate(rows, SPECS, 0))
    budget = ledger.budget()
    assert (budget.steps, budget.rows, budget.sequences, budget.tokens, budget.padded_tokens) == (1, 4, 7, 31, 112)
    assert budget.rows_per_task == {"classes": 1, "scores": 1, "choices": 2}


@pytest.mark.parametrize("change", ["order", "token", "label", "task", "boundary"])
def test_order_hash_notices(change):
    def digest(rows: list[tuple[int, HeadRow]]) -> str:
        ledger = Ledger([spec.name for spec in SPECS])
        ledger.add(rows, collate(rows, SPECS, 0))
        return ledger.budget().order_hash

    rows = hand_made_rows()
    one = rows[1][1]
    changed = {
        "order": [rows[1], rows[0], *rows[2:]],
        "token": [rows[0], (0, head_row(((7, 8, 9, 11),), 1)), *rows[2:]],
        "label": [rows[0], (0, head_row(one.sequences, 0)), *rows[2:]],
        "task": [rows[0], (1, head_row(one.sequences, 1)), *rows[2:]],
        # The same tokens, cut differently into choices.
        "boundary": [(2, head_row(((7, 8, 9, 7), tuple(range(8, 16))), 1)), *rows[1:]],
    }
    assert digest(rows) == digest(hand_made_rows())
    assert digest(changed[change]) != digest(rows)


# ---------------------------------------------------------------------- the task's name


def test_every_text_begins_with_the_name_of_its_task_where_that_is_asked_for(tokenizer):
    rows = [Example("a cat sat", "it sat", label=1)]
    (row,) = tokenise_task(task_data(CLASSES, rows), tokenizer, protocol(task_prefix=True)).train
    assert row.sequences == (tuple(tokenizer("classes: a cat sat", "it sat")["input_ids"]),)
    quiz = Example("what purrs", choices=("cat", "dog"), label=0)
    (row,) = tokenise_task(task_data(CHOICES, [quiz]), tokenizer, protocol(task_prefix=True)).train
    assert row.sequences == tuple(
        tuple(tokenizer("choices: what purrs", choice)["input_ids"]) for choice in ("cat", "dog")
    )


# ---------------------------------------------------------------------- values that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_values_that_are_no_numbers_choose_no_answer(tokenizer, spec, value):
    family = family_of(protocol(), tokenizer, (spec,))
    model = family.load(find_backbone("tiny-bert"), 0).eval()
    torch.nn.init.constant_(model.heads[spec.name].bias, value)
    example = Example("a cat", choices=("one", "two") if spec is CHOICES else (), label=1)
    task = tokenise(task_data(spec, [example] * 3), family)
    with pytest.raises(Diverged, match=f"task {spec.name}: .* 3 of 3 rows"):
        evaluate_model(model, [task], family, batch_size=4, autocast=False)


# ---------------------------------------------------------------------- rows of every kind


def test_rows_of_every_kind_make_the_same_batches_twice(tokenizer):
    used = protocol(
        tasks=("q_cola", "q_stsb", "q_arc_challenge"), train_rows=300, eval_rows=100, steps=5, batch_size=16
    )
    family = family_of(used, tokenizer, [TASKS[name] for name in used.tasks])
    tasks = [tokenise(load_task(name), family) for name in used.tasks]
    assert [(len(task.train), len(task.validation)) for task in tasks] == [(300, 100)] * 3
    assert len({len(row.sequences) for row in tasks[2].train}) > 1  # three to five choices
    assert all(row.length <= used.max_length for task in tasks for row in task.train)
    assert all(row.label < len(row.sequences) for row in tasks[2].train)

    def consume(tasks: list[TokenisedTask], seed: int) -> str:
        ledger = Ledger(used.tasks)
        batches = list(training_batches(tasks, family, seed, ledger, CPU))
        assert sum(batch.rows for batch in batches) == ledger.budget().rows == 5 * 16
        return ledger.budget().order_hash

    assert consume(tasks, 0) == consume(tasks, 0) != consume(tasks, 1)


def test_batches_are_made_as_they_are_asked_for(tokenizer):
    family = family_of(protocol(), tokenizer, (CLASSES,))
    task = tokenise(task_data(CLASSES, [Example("a"), Example("b", label=1)]), family)
    ledger = Ledger(["classes"])
    list(islice(training_batches([task], family, 0, ledger, CPU), 2))
    assert ledger.budget().steps == 2


def test_the_next_batch_is_prepared_while_one_is_used() -> None:
    made = [Event() for _ in range(3)]

    def make() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    for number in one_ahead(make()):
        assert all(event.wait(60) for event in made[: number + 2])
        assert not any(event.is_set() for event in made[number + 2 :])
    assert list(one_ahead([])) == []
    assert list(one_ahead([7])) == [7]


def test_an_error_in_a_batch_is_raised_where_the_batch_is_used() -> None:
    batches = one_ahead(1 / number for number in (1, 0))
    assert next(batches) == 1
    with pytest.raises(ZeroDivisionError):
        next(batches)
