"""Replay golden vectors through the library: ``python -m tests.golden.replay DIR``.

A layer's case is `<case>.safetensors` with the numbers and `<case>.json` with the configuration and each tensor's role.
The numbers were made by running the authors' released code (EPT's equations: torch primitives). A replayer builds a
host model around the case's frozen weights, attaches the method as a user would, loads the parameters, and computes
outputs, losses and gradients; every stored one is compared. A whole model's case is described in `tests.golden.whole`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import moepeft
from moepeft.attach import Attachment
from moepeft.methods.ept import EPT, expert_gates
from moepeft.methods.lora import LoRA
from moepeft.methods.mixlora import MixLoRA
from moepeft.methods.moelora import MOELoRA
from moepeft.ops.losses import load_counts

TOLERANCE = 1e-8
TOLERANCE_FLOAT32 = 1e-6


class CannotReplay(Exception):
    """The case is of a method or a shape that no replayer knows."""


@dataclass
class Case:
    """One golden case."""

    name: str
    method: str
    config: dict[str, Any]
    notes: list[str]
    tensors: dict[str, Tensor]
    roles: dict[str, str]

    @classmethod
    def read(cls, sidecar: Path) -> Case:
        description = json.loads(sidecar.read_text())
        tensors = load_file(sidecar.with_suffix(".safetensors"))
        roles = {name: entry["role"] for name, entry in description["tensors"].items()}
        if set(roles) != set(tensors):
            raise CannotReplay(f"sidecar and tensors name different things: {sorted(set(roles) ^ set(tensors))}")
        return cls(
            sidecar.stem, description["method"], description["config"], description.get("notes", []), tensors, roles
        )

    @property
    def compared(self) -> list[str]:
        """Names of the tensors a replay must reproduce."""
        return [n for n, role in self.roles.items() if role in ("output", "grad", "auxgrad", "auxmaskgrad")]

    def tolerance(self, name: str) -> float:
        """The released MixLoRA balance loss averages a float32 mask, as its sidecar says."""
        rounded = any("float32" in note for note in self.notes) and name.startswith("aux")
        return TOLERANCE_FLOAT32 if rounded or self.tensors[name].dtype == torch.float32 else TOLERANCE


@dataclass
class Replay:
    """What a replayer computed: named values, and leaves whose gradients are asked for under golden names."""

    values: dict[str, Tensor]
    leaves: dict[str, Tensor]
    output: Tensor | None = None
    cotangent: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Gradient prefix (``auxgrad``) -> scalar."""
    view: Callable[[str, Tensor], Tensor] = lambda name, gradient: gradient
    """Brings a gradient from the library's layout to the file's."""

    def gradients(self) -> dict[str, Tensor]:
        """All gradients under golden names."""
        scalars = dict(self.losses)
        if self.output is not None and self.cotangent is not None:
            scalars["grad"] = (self.output * self.cotangent).sum()
        found = {}
        for prefix, scalar in scalars.items():
            grads = torch.autograd.grad(scalar, list(self.leaves.values()), retain_graph=True, allow_unused=True)
            for (name, leaf), grad in zip(self.leaves.items(), grads, strict=True):
                full = torch.zeros_like(leaf) if grad is None else grad
                for golden, value in _split(name, full):
                    found[f"{prefix}.{golden}"] = self.view(golden, value)
        return found


def parts(name: str) -> list[str]:
    """Golden names of what one parameter stacks: ``kernel.0|kernel.1|``. The last bar tells one from none."""
    return name.rstrip("|").split("|")


def _split(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    return list(zip(parts(name), value, strict=True)) if "|" in name else [(name, value)]


class Host(nn.Module):
    """Linear layers with the case's frozen weights."""

    def __init__(self, tensors: Mapping[str, Tensor], *prefixes: str) -> None:
        super().__init__()
        for prefix in prefixes:
            weight = tensors[f"{prefix}.weight"]
            bias = tensors.get(f"{prefix}.bias")
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
            layer.weight.data.copy_(weight)
            if bias is not None:
                layer.bias.data.copy_(bias)
            self.add_module(prefix.replace(".", "_"), layer)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in list(self.children()):
            if isinstance(layer, nn.Linear):
                x = layer(x)
        return x


def _attach(model: nn.Module, factory: moepeft.AdapterFactory, parameters: Mapping[str, Tensor]) -> Attachment:
    """Attach in the case's precision and give the adapters its parameters, by the names `save` uses."""
    attachment = moepeft.attach(model, factory)
    dtype = next(iter(parameters.values())).dtype
    model.to(dtype)
    state = attachment.state_dict()
    unknown = set(parameters) - set(state)
    if unknown:
        raise CannotReplay(f"the adapters have no parameters {sorted(unknown)}")
    attachment.load_state_dict({**state, **parameters})
    return attachment


def _single_site(case: Case, factory: moepeft.AdapterFactory, parameters: dict[str, Tensor]) -> tuple[Host, Attachment]:
    host = Host(case.tensors, "base")
    return host, _attach(host, factory, {f"sites.base.{name}": value for name, value in parameters.items()})


def _leaf(case: Case, name: str) -> Tensor:
    return case.tensors[name].clone().requires_grad_()


def _leaves(attachment: Attachment, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Golden name -> the library's parameter, by its name in `named_parameters`."""
    own = dict(attachment.named_parameters())
    return {golden: own[name] for golden, name in names.items()}


def _values(y: Tensor, x: Tensor, host: Host, attachment: Attachment) -> dict[str, Tensor]:
    with attachment.disabled():
        bare = host(x)
    return {"y": y, "adapter_out": y - bare}


def replay_lora(case: Case) -> Replay:
    """`lora_peft__*`."""
    c, t = case.config, case.tensors
    factory = LoRA(rank=c["r"], alpha=c["alpha"], rslora=c.get("use_rslora", False))
    host, attachment = _single_site(case, factory, {"A": t["A"], "B": t["B"]})
    x = _leaf(case, "x")
    y = host(x)
    leaves = {"x": x, **_leaves(attachment, {"A": "sites.base.A", "B": "sites.base.B"})}
    return Replay(_values(y, x, host, attachment), leaves, y, t["g"])


def _kernels(case: Case) -> dict[str, str]:
    """Adapter parameter -> golden kernels it stacks, by ascending kernel size."""
    sizes = case.config["kernel_sizes"]
    scales = sorted(set(sizes))
    return {
        f"kernels.{index}": "".join(f"kernel.{e}|" for e, size in enumerate(sizes) if size == s)
        for index, s in enumerate(scales)
    }


def replay_ept_paper(case: Case) -> Replay:
    """`ept_paper__*`: the operator, with the router's logits given."""
    c, t = case.config, case.tensors
    factory = EPT(
        rank=c["r"], alpha=c["alpha"], kernels=tuple(c["kernel_sizes"]), top_k=c["top_k"], dimension_factor="none"
    )
    stacked = _kernels(case)
    parameters = {"A": t["A"], "B": t["B"]}
    parameters |= {own: torch.stack([t[name] for name in parts(golden)]) for own, golden in stacked.items()}
    host, attachment = _single_site(case, factory, parameters)
    adapter = attachment.adapters["base"]
    x, logits = _leaf(case, "x"), _leaf(case, "router_logits")
    # The vectors leave the router open: its logits are an input. They take the place of the gate's answer.
    adapter.choose = lambda own: expert_gates(logits.expand_as(own), c["top_k"], "softmax")
    y = attachment_call(attachment, host, x, 0)
    values = _values(y, x, host, attachment)
    with torch.no_grad():
        eye = torch.eye(c["in_features"], dtype=x.dtype)
        for name in t:
            if name.startswith("W."):
                one_hot = F.one_hot(torch.tensor(int(name[2:])), c["num_experts"]).to(x.dtype)
                nothing = x.new_zeros(len(eye), c["out_features"])
                values[name] = adapter.add_update(nothing, eye, one_hot.expand(len(eye), -1)).T * c["r"] / c["alpha"]
    leaves = {"x": x, "router_logits": logits}
    leaves |= _leaves(attachment, {"A": "sites.base.A", "B": "sites.base.B"})
    leaves |= _leaves(attachment, {golden: f"sites.base.{own}" for own, golden in stacked.items()})
    return Replay(values, leaves, y, t["g"])


def attachment_call(attachment: Attachment, host: nn.Module, x: Tensor, task: int) -> Tensor:
    """Run the host with every row on one task."""
    with attachment.route(task_ids=task):
        output: Tensor = host(x)
    return output


def _run_contrastive(case: Case, factory: Any, parameters: dict[str, Tensor], names: dict[str, str]) -> Replay:
    """EPT's and MoRE's releases: one task per batch, a contrastive loss beside the output."""
    host, attachment = _single_site(case, factory, parameters)
    host.train()
    x = _leaf(case, "x")
    y = attachment_call(attachment, host, x, int(case.tensors["task_id"]))
    aux = attachment.aux_loss() / factory.contrastive  # the files hold the loss without its coefficient
    with attachment.route(task_ids=int(case.tensors["task_id"])):
        values = _values(y, x, host, attachment) | {"aux_loss": aux.reshape(1)}
    leaves = {"x": x, **_leaves(attachment, {golden: f"sites.base.{own}" for golden, own in names.items()})}
    return Replay(values, leaves, y, case.tensors["g"], {"auxgrad": aux})


_GATED = ("A", "B", "gate.weight", "gate.bias", "task_embedding")


def replay_ept_released(case: Case) -> Replay:
    """`ept_released__*`."""
    c, t = case.config, case.tensors
    factory = moepeft.method(
        "ept@released",
        dropout=0.0,
        rank=c["r"],
        alpha=c["alpha"],
        kernels=tuple(c["kernel_sizes"]),
        top_k=c["top_k"],
        num_tasks=c["num_tasks"],
        temperature=c["temperature"],
    )
    stacked = _kernels(case)
    parameters = {name: t[name] for name in _GATED}
    parameters |= {own: torch.stack([t[n][0, :, :, 0] for n in parts(golden)]) for own, golden in stacked.items()}
    names = {name: name for name in _GATED} | {golden: own for own, golden in stacked.items()}
    replay = _run_contrastive(case, factory, parameters, names)
    replay.view = lambda name, grad: grad[None, :, :, None] if name.startswith("kernel.") else grad
    return replay


def replay_more(case: Case) -> Replay:
    """`more_released__*` (frozen map) and `more_ste__*` (the trained selector the release never reaches)."""
    c, t = case.config, case.tensors
    selector = {"released": "frozen", "straight_through": "trained"}[c["path"]]
    factory = moepeft.method(
        "more@released",
        rank=c["r"],
        alpha=c["alpha"],
        num_tasks=c["num_tasks"],
        temperature=c["temperature"],
        selector=selector,
        dropout=0.0,
    )
    parameters = {name: t[name] for name in _GATED}
    if selector == "frozen":
        parameters["task_map"] = t["task_map"]
    return _run_contrastive(case, factory, parameters, {name: name for name in _GATED})


def replay_moelora(case: Case) -> Replay:
    """`moelora__*` (a gate per layer) and `moelora_shared__*` (one gate, two layers, rows of several tasks)."""
    c, t = case.config, case.tensors
    shared = "fc1.A" in t
    factory = MOELoRA(
        rank=c["r"],
        alpha=c["alpha"],
        num_experts=c["num_experts"],
        num_tasks=c["task_num"],
        task_dim=t["gate.weight"].shape[1],
        gate="shared" if shared else "per_site",
        layout="sequence_first",
    )
    layers = {"fc1.base": "fc1.", "fc2.base": "fc2."} if shared else {"base": ""}
    gate = "shared." if shared else "sites.base.own_gate."
    host = TwoLayers(t, *layers) if shared else Host(t, *layers)
    names = {"gate.weight": f"{gate}gate", "task_embedding": f"{gate}task_embedding"}
    parameters = {f"{gate}gate": t["gate.weight"], f"{gate}task_embedding": t["task_embedding"][1:]}
    for layer, prefix in layers.items():
        own = f"sites.{layer.replace('.', '_')}."
        names |= {f"{prefix}{factor}": f"{own}{factor}" for factor in "AB"}
        parameters |= {f"{own}A": t[f"{prefix}A"].flatten(0, 1)}
        parameters |= {f"{own}B": t[f"{prefix}B"].movedim(0, 1).flatten(1)}
    attachment = _attach(host, factory, parameters)
    x = _leaf(case, "x")
    ids = t["task_id"] - 1  # the release counts from 1 and pads with 0
    with attachment.route(task_ids=ids.unsqueeze(1) if ids.dim() == 2 else ids):
        y = host(x)
        values = _values(y, x, host, attachment)
    if shared:
        values["h"] = host.hidden
        values.pop("adapter_out")

    def view(name: str, grad: Tensor) -> Tensor:
        if name.endswith("A"):
            return grad.unflatten(0, (c["num_experts"], -1))
        if name.endswith("B"):
            return grad.unflatten(1, (c["num_experts"], -1)).movedim(1, 0)
        return F.pad(grad, (0, 0, 1, 0)) if name == "task_embedding" else grad  # row 0 of the release's table pads

    return Replay(values, {"x": x, **_leaves(attachment, names)}, y, t["g"], view=view)


class TwoLayers(Host):
    """The host of the shared-gate cases: two layers with a tanh between."""

    hidden: Tensor

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.fc1_base(x)
        if moepeft.attachment(self).runtime.settings.enabled:
            self.hidden = hidden
        output: Tensor = self.fc2_base(hidden.tanh())
        return output


def replay_tucka(case: Case) -> Replay:
    """`tucka_router__*` and `tucka_follower__*` (whose router is a layer in front of it)."""
    c, t = case.config, case.tensors
    factory = moepeft.method(
        "tucka@released", rank=c["r"], groups=c["k"], experts=c["t"], shared_rank=c["p"], alpha=c["alpha"]
    )
    follower = "x_route" in t
    host = RoutedPair(t) if follower else Host(t, "base")
    own = {"core": t["G"], "factor": t["U"], "mixing": t["C"]}
    parameters = {f"sites.base.{name}": value for name, value in own.items()}
    parameters |= {"shared.centroids": t["EC"], "shared.initialised": torch.tensor(True)}
    attachment = _attach(host, factory, parameters)
    x = _leaf(case, "x")
    leaves = {"x": x}
    inputs = (x,)
    if follower:
        leaves["x_route"] = _leaf(case, "x_route")
        inputs = (x, leaves["x_route"])
    y = host(*inputs)
    # What reaches the frozen layer is its input plus the correction: call the adapter with the identity as its base.
    corrected = attachment.adapters["base"](x, lambda z: z, host.base.moepeft.context)
    with attachment.disabled():
        bare = host(*inputs)
    names = {"G": "core", "U": "factor", "C": "mixing"}
    leaves |= _leaves(attachment, {golden: f"sites.base.{name}" for golden, name in names.items()})
    leaves |= _leaves(attachment, {"EC": "shared.centroids"})
    values = {"y": y, "delta_y": y - bare, "adapter_out": corrected - x}
    return Replay(values, leaves, y, t["g"])


class RoutedPair(nn.Module):
    """A router layer whose output nobody reads, then the layer under test."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        width = tensors["x_route"].shape[-1]
        self.router = nn.Linear(width, width)
        self.base = Host(tensors, "base").base

    def forward(self, x: Tensor, x_route: Tensor) -> Tensor:
        self.router(x_route)
        output: Tensor = self.base(x)
        return output


class FFN(nn.Module):
    """A gated feed-forward network with the case's frozen weights."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        host = Host(tensors, "base.gate_proj", "base.up_proj", "base.down_proj")
        self.gate_proj, self.up_proj, self.down_proj = host.children()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


def replay_mixlora(case: Case) -> Replay:
    """`mixlora__*`: the block, and the balance loss with and without mask."""
    c, t = case.config, case.tensors
    targets = tuple(name.removesuffix("_proj") for name in c["lora_on"])
    factory = moepeft.method(
        "mixlora@released",
        rank=c["r"],
        alpha=c["alpha"],
        num_experts=c["num_experts"],
        top_k=c["top_k"],
        targets=targets,
        dropout=0.0,
    )
    model = FFN(t)
    names = {"router.weight": "shared.router./"}
    parameters = {"shared.router./": t["router.weight"]}
    for name in c["lora_on"]:
        names |= {f"{name}.{factor}": f"sites.{name}.{factor}" for factor in "AB"}
        parameters[f"sites.{name}.A"] = t[f"{name}.A"].flatten(0, 1)
        parameters[f"sites.{name}.B"] = t[f"{name}.B"].movedim(0, 1).flatten(1)
    attachment = _attach(model, factory, parameters)
    model.train()
    x = _leaf(case, "x")
    y = model(x)
    aux = attachment.aux_loss() / factory.balance_coefficient
    model(x, attention_mask=t["attention_mask"])
    masked = attachment.aux_loss() / factory.balance_coefficient
    values = _values(y, x, model, attachment) | {"aux_loss": aux.reshape(1), "aux_loss_masked": masked.reshape(1)}

    def view(name: str, grad: Tensor) -> Tensor:
        if name.endswith(".A"):
            return grad.unflatten(0, (c["num_experts"], -1))
        return grad.unflatten(1, (c["num_experts"], -1)).movedim(1, 0) if name.endswith(".B") else grad

    losses = {"auxgrad": aux, "auxmaskgrad": masked}
    return Replay(values, {"x": x, **_leaves(attachment, names)}, y, t["g"], losses, view)


def replay_balance(case: Case) -> Replay:
    """`mixlora_balance__*`: the pooled loss alone, over the stacked logits of all layers."""
    c, t = case.config, case.tensors
    factory = MixLoRA(num_experts=c["num_experts"], top_k=c["top_k"], balance="pooled", balance_coefficient=1.0)
    logits = _leaf(case, "router_logits")
    layers = logits.softmax(-1).reshape(c["num_layers"], c["batch"], c["seq"], -1)
    losses = {}
    for name, mask in {"aux_loss": None, "aux_loss_masked": t["attention_mask"].bool()}.items():
        terms = [load_counts(layer, layer.topk(c["top_k"]).indices, mask) for layer in layers]
        losses[name] = factory.aux_loss("balance", terms)
    values = {name: value.reshape(1) for name, value in losses.items()}
    scalars = {"auxgrad": losses["aux_loss"], "auxmaskgrad": losses["aux_loss_masked"]}
    return Replay(values, {"router_logits": logits}, losses=scalars)


REPLAYERS: dict[str, Callable[[Case], Replay]] = {
    "lora": replay_lora,
    "ept_paper": replay_ept_paper,
    "ept_released": replay_ept_released,
    "more_released": replay_more,
    "moelora": replay_moelora,
    "tucka": replay_tucka,
    "mixlora": replay_mixlora,
    "mixlora_balance": replay_balance,
}


def replayers() -> Mapping[str, Callable[[Case], Replay]]:
    """All replayers, by the method that a case names. Those of `relatives` build on this module: imported late."""
    from tests.golden.relatives import RELATIVES

    return {**REPLAYERS, **RELATIVES}


@dataclass(frozen=True)
class Errors:
    """Largest absolute error by kind, and whether all are within tolerance."""

    output: float
    loss: float
    gradient: float
    within: bool


def check(case: Case) -> Errors:
    """Replay a case and compare everything it stores."""
    known = replayers()
    if case.method not in known:
        raise CannotReplay(f"no replayer for method {case.method!r}; known: {', '.join(known)}")
    replay = known[case.method](case)
    found = {**replay.values, **replay.gradients()}
    missing = [name for name in case.compared if name not in found]
    if missing or not case.compared:
        raise CannotReplay(f"nothing computed for {missing or 'an empty case'}")
    worst = {"output": 0.0, "loss": 0.0, "gradient": 0.0}
    within = True
    for name in case.compared:
        wanted, got = case.tensors[name], found[name].detach()
        if wanted.shape != got.shape:
            raise CannotReplay(f"{name}: computed shape {tuple(got.shape)}, stored {tuple(wanted.shape)}")
        error = (wanted.double() - got.double()).abs().max().item() if wanted.numel() else 0.0
        kind = "gradient" if "grad." in name else "loss" if name.startswith("aux") else "output"
        worst[kind] = max(worst[kind], error) if error == error else float("nan")
        within &= error <= case.tolerance(name)
    return Errors(**worst, within=within)


def check_file(sidecar: Path) -> Errors:
    """Replay the case of a file, of a layer or of a whole model."""
    from tests.golden import whole  # builds models of transformers

    if "model_config" not in json.loads(sidecar.read_text()):
        return check(Case.read(sidecar))
    worst = {"output": 0.0, "loss": 0.0, "gradient": 0.0}
    within = True
    for name, (error, allowed) in whole.check(whole.WholeCase.read(sidecar)).items():
        kind = "gradient" if name.startswith("grad") else "loss" if "loss" in name or name == "balance" else "output"
        worst[kind] = max(worst[kind], error) if error == error else float("nan")
        within &= error <= allowed
    return Errors(**worst, within=within)


def main(arguments: list[str] | None = None) -> int:
    """Replay a folder; 0 when every case agrees."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.replay", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    sidecars = sorted(folder.glob("*.json"))
    if not sidecars:
        print(f"{folder}: no golden case (*.json with *.safetensors) there", file=sys.stderr)
        return 2
    failed = 0
    print(f"{'case':48} {'output':>9} {'loss':>9} {'gradient':>9}")
    for sidecar in sidecars:
        try:
            errors = check_file(sidecar)
        except Exception as error:  # one damaged case must not hide the others
            print(f"{sidecar.stem:48} cannot be replayed: {type(error).__name__}: {error}")
            failed += 1
            continue
        verdict = "" if errors.within else "  ABOVE TOLERANCE"
        print(f"{sidecar.stem:48} {errors.output:9.1e} {errors.loss:9.1e} {errors.gradient:9.1e}{verdict}")
        failed += not errors.within
    print(f"{len(sidecars) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
