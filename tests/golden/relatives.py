"""Replayers of the relatives: methods whose released code is one layer around one linear map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

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
) -> Replay:
    """One adapted layer.

    Args:
        case: the case.
        factory: the method's configuration.
        names: golden name -> the adapter's parameter; ``B.0|B.1`` are golden tensors that one parameter stacks.
        into: brings a golden parameter to the library's layout.
        view: brings a gradient back.
    """
    t = case.tensors
    host = Host(t, "base")
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
    with attachment.disabled():
        bare = host(x)
    parameters = dict(attachment.named_parameters())
    leaves = {golden: parameters[f"sites.base.{own}"] for golden, own in names.items()}
    return Replay({"y": y, "adapter_out": y - bare}, {"x": x, **leaves}, y, t["g"], view=view)


def stacked(name: str, number: int) -> str:
    """Golden names of the tensors that one parameter stacks."""
    return "|".join(f"{name}.{index}" for index in range(number))


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


RELATIVES: dict[str, Callable[[Case], Replay]] = {
    "moslora": replay_moslora,
    "hydralora": replay_hydralora,
    "mtl-lora": replay_mtl_lora,
}
