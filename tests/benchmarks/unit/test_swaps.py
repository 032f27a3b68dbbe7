"""What a record says of wrong ids is what the model answers when the adapters are told another task."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from benchmarks.cells.data import TokenisedTask
from benchmarks.cells.swaps import ROWS, swap_ids
from benchmarks.families.encoder import Encoder, MultiTaskModel
from benchmarks.protocols.protocol import Protocol
from benchmarks.records.schema import Swapped
from benchmarks.reporting.swapped import swapped_tables
from tests.benchmarks.unit.test_routes import SPECS, attached, tasks
from tests.support.record_factory import make_record
from tests.support.tables import frame_of

FAMILY = Encoder(Protocol(name="t", tasks=("a", "b", "c"), steps=1), SimpleNamespace(pad_token_id=0), tuple(SPECS))


def labelled(rows: int) -> list[TokenisedTask]:
    """Rows of both labels; three in four training rows are of class 0."""
    made = []
    for task in tasks(tuple(5 + number % 7 for number in range(rows))):
        own = tuple(replace(row, label=float(row.index % 2)) for row in task.validation)
        train = tuple(replace(row, label=float(row.index % 4 == 0)) for row in own)
        made.append(TokenisedTask(task.spec, train, own))
    return made


def answer(model: MultiTaskModel, task: TokenisedTask, position: int, told: int) -> np.ndarray:
    """Probabilities of class 1, row by row, without any of the code under test."""
    found = []
    for row in task.validation[:ROWS]:
        ids = torch.tensor([row.sequences[0]])
        hidden = model.backbone(input_ids=ids, attention_mask=torch.ones_like(ids), task_ids=[told]).last_hidden_state
        found.append(model.heads[SPECS[position].name](hidden.mean(1)).softmax(-1)[0, 1].item())
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moelora", "ept", "more"])
def test_skills_under_every_id_are_those_of_the_answers(method: str) -> None:
    model, data = attached(method), labelled(12)
    found = swap_ids(model, data, FAMILY, autocast=False)
    assert found is not None
    truth = np.array([row.label for row in data[0].validation])
    seen = [row.label for row in data[0].train]
    prior = log_loss(truth, np.full(len(truth), (sum(seen) + 1) / (len(seen) + 2)))  # no label has probability 0
    for position, task in enumerate(data):
        for told in range(3):
            nll = log_loss(truth, answer(model, task, position, told))
            assert found.skills[position][told] == pytest.approx(1 - nll / prior, abs=1e-5)
    assert abs(found.lost) > 0
    assert found.rows == {"a": 12, "b": 12, "c": 12}


@pytest.mark.parametrize("method", ["lora", "mixlora", "tucka", "head"])
def test_what_ids_do_not_route_has_no_wrong_ids(method: str) -> None:
    assert swap_ids(attached(method), labelled(4), FAMILY, autocast=False) is None


def test_only_the_first_rows_are_scored() -> None:
    found = swap_ids(attached("moelora"), labelled(ROWS + 6), FAMILY, autocast=False)
    assert found is not None
    assert set(found.rows.values()) == {ROWS}


def test_the_table_says_what_wrong_ids_cost() -> None:
    def record(method: str, seed: int, lost: float):
        skills = [[0.5, 0.5 - lost], [0.3 - lost, 0.3]]
        swapped = Swapped(tasks=["sst2", "rte"], rows={"sst2": 4, "rte": 4}, skills=skills)
        return make_record(method, seed)[0].model_copy(update={"swapped": swapped})

    records = [record("alpha", seed, lost) for seed, lost in enumerate((0.2, 0.3))] + [make_record("bravo", 0)[0]]
    (table,) = swapped_tables(frame_of(*records))
    (row,) = table.text.to_dict("records")
    assert row["method"] == "alpha"
    assert row["right id"].startswith("40.0")
    assert row["lost"].startswith("25.0")
    assert len(table.data) == 4
    assert swapped_tables(frame_of(make_record("bravo", 0)[0])) == []
