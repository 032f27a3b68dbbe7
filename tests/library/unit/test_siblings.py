"""A block that is called like the one before it has the scope that it would have if it were looked at anew."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moepeft
from moepeft import calls, entries
from moepeft.calls import Part, Scope
from moepeft.masks import Mask
from moepeft.runtime import Forward
from moepeft.siblings import note
from tests.support.hosts import HOSTS, MORE_HOSTS, batch, build

ROWS, TOKENS = 3, 5
PART = Part(nn.Linear(2, 2), "encoder", two_streams=False, known_masks=True)


def told(scope: Scope) -> tuple[Any, ...]:
    """What a scope says, its masks as what they were given."""
    masks = {stream: [mask.given for mask in found] for stream, found in scope.masks.items()}
    given = [(stream, tuple(mask.flatten().tolist())) for stream, found in masks.items() for mask in found]
    return scope.rows, scope.tokens, scope.copies, scope.sequence_first, scope.square, scope.learned, given


@pytest.mark.parametrize("padded", [0, 2])
@pytest.mark.parametrize("host", [*HOSTS, *MORE_HOSTS])
def test_every_block_has_the_scope_of_a_first_look(host: str, padded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Any, ...]] = []
    looks = {True: 0, False: 0}
    reuses = True

    def counted(*args: Any) -> Scope:
        looks[reuses] += 1
        return calls.open_scope(*args)

    def remembered(forward: Any, entry: Any, call: Any) -> None:
        inner(forward, entry, call)
        main = forward.scope.main
        opened.append(
            (*told(forward.scope), tuple(main.shape), main.data_ptr() == next(iter(call.values())).data_ptr())
        )

    inner = entries._open
    monkeypatch.setattr(entries, "_open", remembered)
    monkeypatch.setattr(entries, "open_scope", counted)
    model = build(host)
    moepeft.attach(model, moepeft.method("ept", num_tasks=2))
    inputs = {**batch(model, padded=padded), "task_ids": torch.tensor([0, 1, 1, 0])}
    found = []
    for reuses in (True, False):
        if not reuses:
            monkeypatch.setattr(entries, "note", lambda *_: None)
        opened.clear()
        model(**inputs)
        found.append(list(opened))
    assert found[0] == found[1]
    assert looks[True] < looks[False]  # blocks of two layers at least are alike


def test_what_outlives_a_compiled_forward_can_be_made_by_torch_2_11() -> None:
    """A graph of torch 2.11 makes no object of ours that is a default value, and no tuple of ours."""
    kinds = (Forward, Scope)
    defaults = [each.default for kind in kinds for each in fields(kind) if each.default is not MISSING]
    assert all(default is None or isinstance(default, (bool, int)) for default in defaults)
    assert not any(issubclass(kind, tuple) for kind in kinds)


def hidden() -> Tensor:
    return torch.randn(ROWS, TOKENS, 2)


def test_what_a_scope_depends_on_is_looked_at_anew() -> None:
    around = Scope(rows=ROWS, tokens=TOKENS)
    mask, bias = torch.ones(ROWS, TOKENS), torch.randn(4)
    call = {"x": hidden(), "attention_mask": mask, "bias": bias, "flag": True}
    scope = calls.open_scope(call, around, PART, None, 1, [])
    opened = note(call, around, PART, scope)
    assert opened is not None
    x = hidden()
    again = opened.again({**call, "x": x}, around, PART)
    assert again is not None
    assert again.main is x
    assert told(again) == told(scope)
    other = PART._replace(module=nn.ReLU())
    differing: dict[str, tuple[dict[str, Any], Scope, Part]] = {
        "another mask of the same values": ({**call, "x": x, "attention_mask": mask.clone()}, around, PART),
        "no mask": ({"x": x, "bias": bias, "flag": True}, around, PART),
        "one more argument": ({**call, "x": x, "encoder_attention_mask": mask}, around, PART),
        "another number of positions": ({**call, "x": x[:, :2].contiguous()}, around, PART),
        "other steps in memory": ({**call, "x": torch.randn(TOKENS, ROWS, 2).transpose(0, 1)}, around, PART),
        "a view": ({**call, "x": x[:]}, around, PART),
        "another type": ({**call, "x": x.double()}, around, PART),
        "another order": ({"bias": bias, "x": x, "attention_mask": mask, "flag": True}, around, PART),
        "inside of a call of other rows": ({**call, "x": x}, Scope(rows=ROWS + 1, tokens=TOKENS), PART),
        "inside of a call with a mask": ({**call, "x": x}, replace(around, masks={"encoder": (Mask(mask),)}), PART),
        "another kind of module": ({**call, "x": x}, around, other),
        "positions first": ({**call, "x": x}, around, PART._replace(sequence_first=True)),
    }
    kept = [what for what, (given, outer, part) in differing.items() if opened.again(given, outer, part) is not None]
    assert not kept


def test_nothing_is_kept_of_an_input_that_is_not_the_rows_of_the_call() -> None:
    around = Scope(rows=ROWS, tokens=TOKENS)
    inputs = {"x": torch.randn(2 * ROWS, TOKENS, 2), "positions": torch.randn(ROWS, TOKENS + 1, 2), "view": hidden()[:]}
    for name, x in {**inputs, "inputs_embeds": hidden()}.items():
        call = {name: x}
        assert note(call, around, PART, calls.open_scope(call, around, PART, None, 1, [])) is None
