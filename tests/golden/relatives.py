"""Replayers of the relatives: methods whose released code is one layer around one linear map."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

import moepeft
from tests.golden.replay import Case, Host, Replay, parts

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
    buffers: Mapping[str, str] = MappingProxyType({}),
) -> Replay:
    """One adapted layer, and its auxiliary loss where the case has one.

    Args:
        case: the case.
        factory: the method's configuration.
        names: golden name -> the adapter's parameter; ``B.0|B.1`` are golden tensors that one parameter stacks.
        into: brings a golden parameter to the library's layout.
        view: brings a gradient back.
        host: a model that returns what the case's layer returns; that layer alone unless given.
        aux_unit: the library's loss where the case's is 1.
        buffers: golden name -> the adapter's buffer; what follows an optimiser step is compared as ``NAME_after``.
    """
    t = case.tensors
    host = Host(t, "base") if host is None else host
    attachment = moepeft.attach(host, factory)
    site = site_of(attachment, t["base.weight"])
    host.to(t["x"].dtype).train()
    attachment.load_state_dict(
        attachment.state_dict()
        | {
            f"sites.{site}.{own}": torch.stack([t[name] for name in parts(golden)])
            if "|" in golden
            else into(golden, t[golden])
            for golden, own in {**names, **buffers}.items()
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
    leaves = {golden: parameters[f"sites.{site}.{own}"] for golden, own in names.items()}
    values = {"y": y, "adapter_out": y - bare}
    attachment.after_step()
    held = attachment.state_dict()
    values |= {f"{golden}_after": held[f"sites.{site}.{own}"] for golden, own in buffers.items()}
    values |= {LOSS_OF[prefix]: value.reshape(1) for prefix, value in losses.items()}
    return Replay(values, {"x": x, **leaves}, y, t["g"], losses, view)


def site_of(attachment: moepeft.Attachment, weight: Tensor) -> str:
    """Name of the layer that has the case's shape."""
    (name,) = (site.name for site in attachment.sites if (site.out_features, site.in_features) == tuple(weight.shape))
    return name


LOSS_OF = {"auxgrad": "aux_loss", "auxmaskgrad": "aux_loss_masked"}


def stacked(name: str, number: int) -> str:
    """Golden names of the tensors that one parameter stacks."""
    return "".join(f"{name}.{index}|" for index in range(number))


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


def replay_loramoe(case: Case) -> Replay:
    """`loramoe__*`: one projection of a feed-forward network, and the loss over rows of two types."""
    c, t = case.config, dict(case.tensors)
    factory = moepeft.method(
        "loramoe@released",
        rank=c["r"],
        alpha=c["alpha"],
        num_experts=c["num_experts"],
        delta=c["delta"],
        types=(1, 0),  # the release gives rows of its type 1 the first half of the experts
    )
    t["task_id"] = t.pop("task_types")
    routed = replace(case, tensors=t)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* did not run in the first training forward")  # half of a network
        return replay_layer(routed, factory, pairs_of(case), host=PartOfFFN(t), aux_unit=factory.balance_coefficient)


class PartOfFFN(nn.Module):
    """A feed-forward network of which the case's layer is one projection, and the other one is never called."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        layer = Host(tensors, "base").base
        other = nn.Linear(layer.out_features, layer.in_features)
        self.inward = layer.in_features < layer.out_features
        self.up_proj, self.down_proj = (layer, other) if self.inward else (other, layer)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.up_proj(x) if self.inward else self.down_proj(x)
        return output


def replay_adamole(case: Case) -> Replay:
    """`adamole__*`: the layer and its balance loss."""
    c = case.config
    fields = {name: c[name] for name in ("alpha", "num_experts", "max_threshold")}
    factory = moepeft.method("adamole@released", rank=c["r"], **fields)
    names = {**pairs_of(case), "threshold.weight": "slope", "threshold.bias": "offset"}
    return replay_layer(case, factory, names, aux_unit=factory.balance_coefficient)


def replay_smora(case: Case) -> Replay:
    """`smora__*`: the layer, and its bias after the step."""
    c = case.config
    fields = {name: c[name] for name in ("top_k", "alpha", "update_rate")}
    factory = moepeft.method("smora@released", rank=c["r"], **fields)
    return replay_layer(case, factory, {"A": "A", "B": "B", "router": "router"}, buffers={"bias": "bias"})


def replay_flylora(case: Case) -> Replay:
    """`flylora__*`: the fork of peft, and its bias after the step."""
    c = case.config
    fields = {name: c[name] for name in ("top_k", "alpha", "update_rate")}
    factory = moepeft.method("flylora@released", rank=c["r"], **fields)
    return replay_layer(case, factory, {"B": "B"}, buffers={"A": "A", "bias": "bias"})


def replay_dcft(case: Case) -> Replay:
    """`dcft__*`: the layer and its constraint. The release keeps the kernel transposed."""
    c = case.config
    factory = moepeft.method("dcft@released", alpha=c["scale"])
    return replay_layer(
        case,
        factory,
        {"A": "A", "B": "B", "C": "C"},
        into=lambda name, value: value[0, 0].T if name == "C" else value,
        view=lambda name, grad: grad.T[None, None] if name == "C" else grad,
        aux_unit=factory.orthogonality,
    )


RELATIVES: dict[str, Callable[[Case], Replay]] = {
    "moslora": replay_moslora,
    "hydralora": replay_hydralora,
    "mtl-lora": replay_mtl_lora,
    "mola": replay_mola,
    "loramoe": replay_loramoe,
    "adamole": replay_adamole,
    "smora": replay_smora,
    "flylora": replay_flylora,
    "dcft": replay_dcft,
}
