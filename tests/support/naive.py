"""The methods as one would first write them down: the oracle of the fast paths, and `naive` in speed tables.

Loops over experts or rows, tokens gathered and scattered by expert, dense updates of the weight's size. Parameters and
their names are those of the fast adapters, so that one state dict serves both; of what the fast adapters compute,
only TuckA's router is shared (it has no other form).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepeft.context import SiteContext
from moepeft.methods.ept import EPT, EPTAdapter
from moepeft.methods.lora import LoRAAdapter
from moepeft.methods.mixlora import InwardAdapter, MixLoRA, OutwardAdapter, Routers
from moepeft.methods.moelora import MOELoRA, MOELoRAAdapter, TaskGate
from moepeft.methods.more import MoRE, MoREAdapter
from moepeft.methods.tucka import Router, TuckA, TuckAAdapter, dense_update
from moepeft.protocols import AdapterFactory, Base, LinearSite


def only_top_k(logits: Tensor, k: int) -> Tensor:
    """Softmax over the k largest logits of each row, zero elsewhere."""
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    for row, best in enumerate(logits.topk(k, dim=-1).indices):
        chosen[row, best] = True
    return logits.masked_fill(~chosen, float("-inf")).softmax(dim=-1)


def contrastive(x: Tensor, table: Tensor, tasks: Tensor, ctx: SiteContext, config: EPT | MoRE) -> Tensor:
    """Mean over rows of -log softmax over tasks of cos(summary, task) / temperature, at the row's own task."""
    mask = ctx.mask(x)
    losses = []
    for row, task in enumerate(tasks.tolist()):
        real = x[row] if mask is None else x[row][mask[row]]
        summary = x[row, 0] if config.anchor == "first" else real.mean(dim=0)
        cosines = F.cosine_similarity(summary.to(table.dtype), table, dim=-1)
        losses.append(-(cosines / config.temperature).log_softmax(dim=0)[task])
    return torch.stack(losses).mean()


# ---------------------------------------------------------------------- EPT


@dataclass(frozen=True, kw_only=True)
class NaiveEPT(EPT):
    """EPT with every expert's matrix built."""

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        return NaiveEPTAdapter(site, self)

    def aux_loss(self, name: str, terms: Sequence[Tensor]) -> Tensor:
        return self.contrastive * torch.stack(list(terms)).mean()


class NaiveEPTAdapter(EPTAdapter):
    """Each expert multiplies the tokens that chose it by its dense W_e."""

    def forward(self, x: Tensor, base: Base, ctx: SiteContext) -> Tensor:
        config = self.config
        y = base(x)
        tokens = self.dropout(x).flatten(0, -2)
        wants_loss = self.training and config.contrastive > 0
        tasks = ctx.tasks(x.shape[0]) if config.routing == "task" or wants_loss else None
        if tasks is not None and wants_loss:
            ctx.loss("contrastive", contrastive(x, self.task_embedding, tasks, ctx, config))
        if config.routing == "token":
            gates = self.naive_gates(x.flatten(0, -2).to(self.gate.weight.dtype))
        else:
            assert tasks is not None
            gates = self.naive_gates(self.task_embedding[tasks]).repeat_interleave(len(tokens) // len(tasks), dim=0)
        update = torch.zeros(len(tokens), self.out_features, dtype=gates.dtype, device=x.device)
        for expert in range(len(config.kernels)):
            chosen = gates[:, expert].nonzero()[:, 0]
            weight = self.dense_weight(expert).to(tokens.dtype)
            part = gates[chosen, expert, None] * (tokens[chosen] @ weight.T)
            update = update.index_add(0, chosen, part.to(update.dtype))
        return y + update.reshape(*x.shape[:-1], -1).to(y.dtype)

    def naive_gates(self, routed: Tensor) -> Tensor:
        logits = self.gate(routed) / self.config.router_temperature
        if self.config.gates == "double_softmax":
            logits = logits.softmax(dim=-1)
        return only_top_k(logits, self.config.top_k)

    def dense_weight(self, expert: int) -> Tensor:
        """(alpha / r) (d_e / d_max) W_e of shape (out, in), zero where the kernel size does not divide a side."""
        sizes = self.config.kernels
        s, smallest = sizes[expert], min(sizes)
        of_scale = self.kernels[sorted(set(sizes)).index(s)]
        kernel = of_scale[[e for e, size in enumerate(sizes) if size == s].index(expert)]
        height, width = self.out_features // s, self.in_features // s
        seed = self.B[:height] @ self.A[:, :width]
        if self.config.operator == "kronecker":
            expanded = F.conv_transpose2d(seed[None, None], kernel[None, None], stride=s)[0, 0]
        else:
            expanded = torch.cat([kernel[channel, :, None] * seed[channel] for channel in range(height)])
        factor = height / (self.out_features // smallest) if self.config.dimension_scale else 1.0
        dense = expanded.new_zeros(self.out_features, self.in_features)
        dense[: expanded.shape[0], : expanded.shape[1]] = expanded
        return self.config.alpha / self.config.rank * factor * dense


# ---------------------------------------------------------------------- MOELoRA


@dataclass(frozen=True, kw_only=True)
class NaiveMOELoRA(MOELoRA):
    """MOELoRA, expert after expert."""

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        assert shared is None or isinstance(shared, TaskGate)
        return NaiveMOELoRAAdapter(site, self, shared)


class NaiveMOELoRAAdapter(MOELoRAAdapter):
    """Every expert runs on all rows, and its output is weighed by each row's gate."""

    def forward(self, x: Tensor, base: Base, ctx: SiteContext) -> Tensor:
        y = base(x)
        gates = torch.stack([self.row_gate(ids) for ids in ctx.task_sets(x.shape[self.rows_dim])])
        for expert, (A, B) in enumerate(
            zip(torch.split(self.A, self.expert_rank), torch.split(self.B, self.expert_rank, dim=1), strict=True)
        ):
            output = self.dropout(x) @ A.T.to(x.dtype) @ B.T.to(x.dtype)
            weight = gates[:, expert].reshape(-1, 1, 1) if self.rows_dim == 0 else gates[:, expert, None]
            y = y + (self.scale * weight * output).to(y.dtype)
        return y

    def row_gate(self, ids: Tensor) -> Tensor:
        embeddings = self.gate.task_embedding[ids[ids >= 0]]
        return (self.gate.gate @ embeddings.mean(dim=0)).softmax(dim=0)


# ---------------------------------------------------------------------- MoRE


@dataclass(frozen=True, kw_only=True)
class NaiveMoRE(MoRE):
    """MoRE, row after row."""

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        return NaiveMoREAdapter(site, self)

    def aux_loss(self, name: str, terms: Sequence[Tensor]) -> Tensor:
        return self.contrastive * torch.stack(list(terms)).mean()


class NaiveMoREAdapter(MoREAdapter):
    """Each row multiplies by the slices of A and B that its task's rank leaves."""

    def forward(self, x: Tensor, base: Base, ctx: SiteContext) -> Tensor:
        y = base(x)
        tasks = ctx.tasks(x.shape[0])
        if self.training and self.config.contrastive:
            ctx.loss("contrastive", contrastive(x, self.task_embedding, tasks, ctx, self.config))
        updates = [self.row_update(row, task) for row, task in zip(self.dropout(x), tasks.tolist(), strict=True)]
        return y + torch.stack(updates).to(y.dtype)

    def row_update(self, row: Tensor, task: int) -> Tensor:
        rank, straight_through = self.rank_of(task)
        terms = row @ self.A[:rank].T.to(row.dtype)
        if self.config.scaling == "quadratic":
            terms = torch.stack([terms[..., k] * ((k + 1) / 8) ** 2 for k in range(rank)], dim=-1)
        if self.config.scaling == "linear":
            terms = terms * (rank / self.config.rank)
        update = terms @ self.B[:, :rank].T.to(row.dtype)
        return self.config.alpha / self.config.rank * straight_through * update

    def rank_of(self, task: int) -> tuple[int, Tensor]:
        probabilities = (self.gate.weight @ self.task_embedding[task] + self.gate.bias).softmax(dim=0)
        if self.config.selector == "frozen":
            if int(self.task_map[task]) < 0:
                self.task_map[task] = probabilities.argmax()
            return int(self.task_map[task]) + 1, self.A.new_ones(())
        best = int(probabilities.argmax())
        return best + 1, probabilities[best] - probabilities[best].detach() + 1


# ---------------------------------------------------------------------- MixLoRA


class NaiveChoice(NamedTuple):
    """Of the tokens of `x`: weights (tokens, k) and experts (tokens, k)."""

    x: Tensor
    weights: Tensor
    experts: Tensor


@dataclass(frozen=True, kw_only=True)
class NaiveMixLoRA(MixLoRA):
    """MixLoRA, expert after expert, the frozen products once per routed copy of a token."""

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        fast = super().build(site, shared)
        if isinstance(fast, LoRAAdapter):
            return fast
        assert isinstance(shared, Routers)
        return NaiveOutwardAdapter(site, self) if site.role == "down" else NaiveInwardAdapter(site, self, shared)

    def aux_loss(self, name: str, terms: Sequence[Tensor]) -> Tensor:
        layers = [torch.stack(list(terms)).sum(dim=0)] if self.balance == "pooled" else list(terms)
        total = torch.zeros(())
        for chosen, probability, tokens in layers:
            for expert in range(self.num_experts):
                fraction, mean = chosen[expert] / tokens[expert], probability[expert] / tokens[expert]
                total = total + self.num_experts * fraction * mean / len(layers)
        return self.balance_coefficient * total


class NaiveInwardAdapter(InwardAdapter):
    """Routes the tokens, and projects those of every expert on their own."""

    def forward(self, x: Tensor, base: Base, ctx: SiteContext) -> Tensor:
        left: NaiveChoice | None = ctx.get(block_of(ctx))
        choice = left if left is not None and left.x is x else self.route(x, ctx)
        tokens = x.flatten(0, -2)
        streams = [by_expert(self, tokens, experts, base) for experts in choice.experts.T]
        return torch.cat([stream.reshape(*x.shape[:-1], -1) for stream in streams])

    def route(self, x: Tensor, ctx: SiteContext) -> NaiveChoice:
        weight = self._routers[0][block_of(ctx)]
        probabilities = (x.flatten(0, -2).to(weight.dtype) @ weight.T).softmax(dim=-1)
        values, experts = probabilities.topk(self.config.top_k, dim=-1)
        if self.training and self.config.balance_coefficient:
            mask = ctx.mask(x)
            real = torch.ones_like(experts[:, 0]).bool() if mask is None else mask.flatten()
            counts = [
                ((experts[real] == e).sum(), probabilities[real, e].sum(), real.sum())
                for e in range(self.config.num_experts)
            ]
            ctx.loss("balance", torch.stack([torch.stack(column) for column in zip(*counts, strict=True)]))
        choice = NaiveChoice(x, values / values.sum(dim=-1, keepdim=True), experts)
        ctx.put(block_of(ctx), choice)
        return choice


class NaiveOutwardAdapter(OutwardAdapter):
    """Projects every routed copy with its expert, then sums the copies of a token with their weights."""

    def forward(self, x: Tensor, base: Base, ctx: SiteContext) -> Tensor:
        choice: NaiveChoice = ctx.get(block_of(ctx))
        ctx.put(block_of(ctx), None)
        streams = x.reshape(self.config.top_k, -1, x.shape[-1])
        outputs = []
        for stream, experts, weights in zip(streams, choice.experts.T, choice.weights.T, strict=True):
            output = by_expert(self, stream, experts, base)
            outputs.append(weights[:, None].to(output.dtype) * output)
        return torch.stack(outputs).sum(dim=0).reshape(x.shape[0] // self.config.top_k, *x.shape[1:-1], -1)


def block_of(ctx: SiteContext) -> str:
    """The feed-forward network this site is part of."""
    assert ctx.site.block is not None
    return ctx.site.block


def by_expert(adapter: NaiveInwardAdapter | NaiveOutwardAdapter, tokens: Tensor, experts: Tensor, base: Base) -> Tensor:
    """Gather the tokens of each expert, project them with base and expert, put them back in their places."""
    rank = adapter.config.rank
    places, outputs = [], []
    for expert in range(adapter.config.num_experts):
        chosen = (experts == expert).nonzero()[:, 0]
        gathered = tokens[chosen]
        output = base(gathered)
        if adapter.has_experts:
            A, B = adapter.A[expert * rank :][:rank], adapter.B[:, expert * rank :][:, :rank]
            update = adapter.dropout(gathered) @ A.T.to(tokens.dtype) @ B.T.to(tokens.dtype)
            output = output + (adapter.config.alpha / rank * update).to(output.dtype)
        places.append(chosen)
        outputs.append(output)
    return torch.cat(outputs)[torch.cat(places).argsort()]


# ---------------------------------------------------------------------- TuckA


@dataclass(frozen=True, kw_only=True)
class NaiveTuckA(TuckA):
    """TuckA with the update of every routing built by tensorly."""

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        assert isinstance(shared, Router)
        return NaiveTuckAAdapter(site, self, shared)


class NaiveTuckAAdapter(TuckAAdapter):
    """Corrects each row's input by the dense T of its routing."""

    def forward(self, x: Tensor, base: Base, ctx: SiteContext) -> Tensor:
        if self.is_router_site:
            self._router[0].route(x, ctx)
        groups, weights = ctx.get(Router.KEY)
        updates = [
            dense_update(self.core[group], self.factor, self.mixing, row).to(x.dtype)
            for group, row in zip(groups.tolist(), weights, strict=True)
        ]
        if len(updates) == 1:  # one routing for the batch
            return base(x + self.alpha * (x @ updates[0]))
        each = len(x) // len(updates)  # beam search repeats rows
        return base(torch.stack([row + self.alpha * (row @ updates[i // each]) for i, row in enumerate(x)]))


def twin_of(cls: Callable[..., AdapterFactory]) -> Callable[[AdapterFactory], AdapterFactory]:
    """A function that gives a configured factory's naive twin."""

    def convert(factory: AdapterFactory) -> AdapterFactory:
        values: Any = factory
        return cls(**{field.name: getattr(factory, field.name) for field in fields(values)})

    return convert


NAIVE: Mapping[str, Callable[[AdapterFactory], AdapterFactory]] = {
    "ept": twin_of(NaiveEPT),
    "mixlora": twin_of(NaiveMixLoRA),
    "moelora": twin_of(NaiveMOELoRA),
    "more": twin_of(NaiveMoRE),
    "tucka": twin_of(NaiveTuckA),
}
"""Name of a method -> its naive twin."""
