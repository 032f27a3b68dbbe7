"""Replayers of the relatives: methods whose released code is one layer around one linear map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

import moepeft
from tests.golden.replay import Case, Host, Replay

View = Callable[[str, Tensor], Tensor]


def replay_layer(
    case: Case,
    factory: moepeft.AdapterFactory,
    names: Mapping[str, str],
    *,
    into: View = lambda name, value: value,
    view: View = lambda name, gradient: gradient,
    host: nn.Module | None = None,
    aux_unit: float = 1.0,
) -> Replay:
    """One adapted layer, and its auxiliary loss where the case has one.

    Args:
        case: the case.
        factory: the method's configuration.
        names: golden name -> the adapter's parameter; ``B.0|B.1`` are golden tensors that one parameter stacks.
        into: brings a golden parameter to the library's layout.
        view: brings a gradient back.
        host: a model whose layer `base` is the case's; one that has no other layer unless given.
        aux_unit: the library's loss where the case's is 1.
    """
    t = case.tensors
    host = Host(t, "base") if host is None else host
    attachment = moepeft.attach(host, factory)
    host.to(t["x"].dtype).train()
    attachment.load_state_dict(
        attachment.state_dict()
        | {
            f"sites.base.{own}": torch.stack([t[name] for name in golden.split("|")])
            if "|" in golden
            else into(golden, t[golden])
            for golden, own in names.items()
        }
    )
    x = t["x"].clone().requires_grad_()
    with attachment.route(task_ids=t["task_id"]) if "task_id" in t else nullcontext():
        y = host(x)
        losses = {"auxgrad": attachment.aux_loss() / aux_unit} if "aux_loss" in t else {}
        if "attention_mask" in t:
            host(x, attention_mask=t["attention_mask"])
            losses["auxmaskgrad"] = attachment.aux_loss() / aux_unit
    with attachment.disabled():
        bare = host(x)
    parameters = dict(attachment.named_parameters())
    leaves = {golden: parameters[f"sites.base.{own}"] for golden, own in names.items()}
    values = {"y": y, "adapter_out": y - bare}
    values |= {LOSS_OF[prefix]: value.reshape(1) for prefix, value in losses.items()}
    return Replay(values, {"x": x, **leaves}, y, t["g"], losses, view)


LOSS_OF = {"auxgrad": "aux_loss", "auxmaskgrad": "aux_loss_masked"}


def stacked(name: str, number: int) -> str:
    """Golden names of the tensors that one parameter stacks."""
    return "|".join(f"{name}.{index}" for index in range(number))


def pairs_of(case: Case) -> dict[str, str]:
    """Golden names of routed pairs -> the adapter's."""
    experts = case.config["num_experts"]
    return {
        "router": "experts.router",
        stacked("A", experts): "experts.A",
        stacked("B", experts): "experts.B",
    }


def replay_moslora(case: Case) -> Replay:
    """`moslora__*`."""
    factory = moepeft.method("moslora@released", rank=case.config["r"], alpha=case.config["alpha"])
    return replay_layer(case, factory, {"A": "A", "mixer": "mixer", "B": "B"})


def replay_hydralora(case: Case) -> Replay:
    """`hydralora__*`."""
    c = case.config
    factory = moepeft.method("hydralora@released", rank=c["r"], alpha=c["alpha"], num_experts=c["num_experts"])
    return replay_layer(case, factory, {"A": "A", "router": "router", stacked("B", c["num_experts"]): "B"})


def replay_mtl_lora(case: Case) -> Replay:
    """`mtl-lora__*`."""
    c = case.config
    fields = {name: c[name] for name in ("alpha", "num_experts", "num_tasks", "temperature")}
    factory = moepeft.method("mtl-lora@released", rank=c["r"], **fields)
    names = {"A": "A", "Lambda": "transforms", "B": "B", "w": "weights"}
    return replay_layer(
        case,
        factory,
        names,
        into=lambda name, value: value[0] if name == "A" else value,
        view=lambda name, grad: grad[None] if name == "A" else grad,
    )


def replay_mola(case: Case) -> Replay:
    """`mola__*`: the layer, and its balance loss with and without mask."""
    c = case.config
    factory = moepeft.method("mola", rank=c["r"], alpha=c["alpha"], allocation=(c["num_experts"],), top_k=c["top_k"])
    # That release divides the counts by tokens, the authors' by choices.
    return replay_layer(case, factory, pairs_of(case), aux_unit=factory.balance_coefficient / factory.top_k)


RELATIVES: dict[str, Callable[[Case], Replay]] = {
    "moslora": replay_moslora,
    "hydralora": replay_hydralora,
    "mtl-lora": replay_mtl_lora,
    "mola": replay_mola,
}
