"""What the contestants do: a training step, a prompt's forward (prefill), one token with a cache (decode)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.instruments.clock import Step
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.seeds import generator, torch_stream
from benchmarks.speed.contestants import Contestant
from benchmarks.speed.hosts import Kind, kind_of
from benchmarks.speed.options import MODES, Mode, Options

HOST_TOKENS = 4, 16

Surroundings = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Workload:
    """What one step works on; the same for all contestants.

    Attributes:
        mode: what is done.
        rows: sequences in the batch.
        length: tokens per sequence; of target sequences and caches as well.
        tasks: number of tasks that the rows belong to.
        autocast: whether the forward runs under autocast to bfloat16.
        optimiser: whether a training step ends with a step of AdamW.
    """

    mode: Mode
    rows: int
    length: int
    tasks: int
    autocast: bool = False
    optimiser: bool = False

    @property
    def trains(self) -> bool:
        """Whether a step goes backward."""
        return self.mode in ("train", "host")

    @property
    def settle(self) -> int:
        """Untimed steps before each timed one: in training and in serving a step follows others of its own.

        A small step takes up to a tenth longer after other contestants' steps, which leave it cold caches, and the more
        so the more contestants there are. At true shapes a training step is long, and its caches do not matter.
        """
        return {"train": 0, "host": 3}.get(self.mode, 1)  # 1: merging has touched the weights as well

    def tokens(self, kind: Kind) -> int:
        """Tokens per step, none of them padding; a sequence-to-sequence model trains on those of the target too."""
        if self.mode == "decode":
            return self.rows
        return self.rows * self.length * (2 if kind == "seq2seq" and self.trains else 1)


def supports(kind: Kind, mode: Mode) -> bool:
    """Whether a model of that kind does that: only models that generate have a cache to decode with."""
    return mode != "decode" or kind in ("causal", "seq2seq")


def choose_workloads(options: Options, host: nn.Module) -> list[Workload]:
    """All that the host can do of what was asked for.

    Raises:
        UsageError: it can do none of it.
    """
    if options.tiny:
        return [Workload("host", *HOST_TOKENS, options.tasks, options.autocasts, options.optimiser)]
    kind = kind_of(host)
    chosen = [
        Workload(mode, rows, options.length, options.tasks, options.autocasts, options.optimiser)
        for mode in MODES
        if mode in options.mode and supports(kind, mode)
        for rows in ((options.rows,) if mode == "train" else options.inference_rows)
    ]
    if not chosen:
        raise UsageError(f"--mode {','.join(options.mode)}: {options.host} does not generate; give train or prefill")
    return chosen


def training_workload(options: Options) -> Workload:
    """The training step that growth is measured on."""
    return Workload("train", options.rows, options.length, options.tasks, options.autocasts, options.optimiser)


def make_step(contestant: Contestant, host: nn.Module, workload: Workload, *, counted: bool = False) -> Step:
    """The step of one contestant.

    Args:
        contestant: who is called.
        host: the bare model that all contestants were made of.
        workload: on what.
        counted: for counting operations, not for timing: inference mode hides from the counter what autocast does.
    """
    kind = kind_of(host)
    tensors = _batch(host, kind, workload)
    ids = contestant.task_ids(workload.rows, workload.tasks)
    routed = {} if ids is None else {"task_ids": ids}
    device = next(host.parameters()).device

    @contextmanager
    def surroundings() -> Iterator[None]:
        training = workload.trains
        gradients = nullcontext() if training else torch.no_grad() if counted else torch.inference_mode()
        with gradients, torch.autocast(device.type, dtype=torch.bfloat16, enabled=workload.autocast):
            yield

    if workload.trains:
        run = _training(contestant, kind, {**tensors, **routed}, workload, surroundings)
        return Step(contestant.label, run, around=contestant.turn)
    if workload.mode == "prefill":
        inputs = {**_prompt(kind, tensors), **routed}

        def prefill() -> None:
            with surroundings():
                contestant.call(**inputs)

        return Step(contestant.label, prefill, around=contestant.turn)
    decoding = _Decoding(contestant, kind, tensors, routed, surroundings)
    return Step(contestant.label, decoding.run, prepare=decoding.prepare, around=contestant.turn)


def _batch(host: nn.Module, kind: Kind, workload: Workload) -> dict[str, Tensor]:
    """Random tokens in a full rectangle; random features for a single layer, whose input needs a gradient."""
    weight = next(host.parameters())
    rows, length = workload.rows, workload.length
    if kind == "layer":
        with torch_stream("speed", "features"):
            features = torch.randn(rows, length, weight.shape[1])
        return {"input": features.to(weight.device, weight.dtype).requires_grad_(workload.trains)}
    size: int = host.config.vocab_size  # type: ignore[union-attr, assignment]
    drawn = generator("speed", "tokens").integers(size // 2, size, size=(2, rows, length))
    ids, target = torch.from_numpy(drawn).to(weight.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "causal":
        batch["labels"] = ids
    if kind == "seq2seq":
        batch["labels"] = target
    return batch


def _training(
    contestant: Contestant,
    kind: Kind,
    inputs: Mapping[str, Tensor],
    workload: Workload,
    surroundings: Surroundings,
) -> Callable[[], None]:
    optimiser = None
    if workload.optimiser and contestant.parameters:
        optimiser = torch.optim.AdamW(contestant.parameters, lr=0.0)
    more: dict[str, Any] = {"use_cache": False} if kind in ("causal", "seq2seq") else {}
    reset = [*contestant.parameters, *inputs.values()]

    def step() -> None:
        for tensor in reset:
            tensor.grad = None
        with torch.set_grad_enabled(contestant.trains):
            with surroundings():
                loss = _loss(contestant.call(**inputs, **more))
            if contestant.attachment is not None:
                loss = loss + contestant.attachment.aux_loss()
        if contestant.trains:
            loss.backward()  # type: ignore[no-untyped-call]
        if optimiser is not None:
            optimiser.step()
            if contestant.attachment is not None:
                contestant.attachment.after_step()

    return step


def _loss(output: Any) -> Tensor:
    """The language model's own loss; mean square of what a layer or an encoder gives."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss.float()
    hidden: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state
    return hidden.float().square().mean()


def _prompt(kind: Kind, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The prompt's call as `generate` makes it: a cache to go on with, and the last position's logits only."""
    inputs: dict[str, Any] = {name: value for name, value in tensors.items() if name != "labels"}
    if kind == "causal":
        inputs.update(use_cache=True, logits_to_keep=1)
    if kind == "seq2seq":
        inputs.update(use_cache=True, decoder_input_ids=tensors["labels"][:, :1])
    return inputs


class _Decoding:
    """One token per row, with a cache that holds `length` tokens already."""

    def __init__(
        self,
        contestant: Contestant,
        kind: Kind,
        tensors: Mapping[str, Tensor],
        routed: Mapping[str, Tensor],
        surroundings: Surroundings,
    ) -> None:
        self._call, self._surroundings = contestant.call, surroundings
        start = {**_prompt(kind, tensors), **routed}
        if kind == "seq2seq":
            start["decoder_input_ids"] = tensors["labels"]
        with contestant.turn(), surroundings():
            first = contestant.model(**start)
        self._filled = first.past_key_values
        next_token, mask = tensors["labels"][:, :1], tensors["attention_mask"]
        self._inputs: dict[str, Any] = {"use_cache": True, **routed}
        if kind == "causal":
            self._inputs.update(input_ids=next_token, attention_mask=torch.cat((mask, mask[:, :1]), dim=1))
        else:
            encoded = (first.encoder_last_hidden_state,)
            self._inputs.update(decoder_input_ids=next_token, attention_mask=mask, encoder_outputs=encoded)

    def prepare(self) -> None:
        """A cache as the prompt left it: each step appends to the one it is given."""
        with self._surroundings():
            self._inputs["past_key_values"] = copy.deepcopy(self._filled)

    def run(self) -> None:
        """Decode one token."""
        with self._surroundings():
            self._call(**self._inputs)
