"""How each method replays a case of `tests.golden.whole`: fields of the preset, parameters from golden tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.t5 import modeling_t5

Get = Callable[[str], Tensor]
"""Golden name of a parameter or of its gradient -> the tensor."""

T5_ROUNDS = not hasattr(modeling_t5, "eager_attention_forward")
"""Whether this version of transformers takes T5's softmax in float32, as the first versions 5 do."""


@dataclass(frozen=True)
class WholeCase:
    """One case."""

    name: str
    method: str
    model: str
    model_config: dict[str, Any]
    config: dict[str, Any]
    description: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, sidecar: Path) -> WholeCase:
        description = json.loads(sidecar.read_text())
        return cls(
            sidecar.stem,
            description["method"],
            description["model"],
            description["model_config"],
            description["config"],
            description,
            load_file(sidecar.with_suffix(".safetensors")),
        )

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, by the rest of their names."""
        return {name[len(prefix) :]: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    @property
    def expected(self) -> dict[str, Tensor]:
        """What a replay must reproduce."""
        return self.under("expected/")

    @property
    def blocks(self) -> list[str]:
        """The feed-forward networks that have a router."""
        return sorted(name.removesuffix("/router") for name in self.under("adapter/") if name.endswith("/router"))

    @property
    def sites(self) -> list[str]:
        """The adapted layers."""
        parts = {name.rpartition("/")[0] for name in self.under("adapter/")}
        return sorted(parts - {"shared", "router", *self.blocks})

    def tolerance(self, name: str) -> float:
        """LLaMA rounds its loss to float32, the release of MixLoRA its balance loss, an old T5 its attention."""
        if T5_ROUNDS and self.model.startswith("T5"):
            return 5e-6
        stored = self.tensors.get(f"expected/{name}")
        rounded = self.model.startswith("Llama") and name in ("lm_loss", "total_loss")
        if rounded or (stored is not None and stored.dtype == torch.float32):
            return 1e-6
        return 1e-7 if self.method == "mixlora" and name.startswith(("balance", "grad_total")) else 1e-8


@dataclass(frozen=True)
class Plan:
    """How a method replays a case.

    Attributes:
        fields: fields over those of the preset `released`.
        parameters: the library's name of a parameter or buffer -> what makes it of golden tensors.
    """

    fields: dict[str, Any]
    parameters: dict[str, Callable[[Get], Tensor]]


def _named(site: str, part: str) -> Callable[[Get], Tensor]:
    return lambda get: get(f"{site}/{part}")


def _joined(site: str, part: str, number: int, dim: int) -> Callable[[Get], Tensor]:
    return lambda get: torch.cat([get(f"{site}/{part}.{index}") for index in range(number)], dim=dim)


def _contrastive_fields(case: WholeCase) -> dict[str, Any]:
    c = case.config
    encoder_sites = sum(site.startswith("encoder.") for site in case.sites)
    coefficient = c["coefficient"] * encoder_sites / c["divisor"]
    common = {key: c[key] for key in ("rank", "alpha", "num_tasks", "temperature")}
    return {**common, "contrastive": coefficient, "dropout": 0.0}


def plan_ept(case: WholeCase) -> Plan:
    """EPT: kernels of one scale are one parameter; the configuration keeps kernel sizes ascending."""
    sizes = case.config["kernels"]
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    fields = {**_contrastive_fields(case), "kernels": tuple(sizes[e] for e in order), "top_k": case.config["top_k"]}
    parameters: dict[str, Callable[[Get], Tensor]] = {}
    for site in case.sites:
        for part in ("A", "B", "task_embedding"):
            parameters[f"sites.{site}.{part}"] = _named(site, part)
        for part in ("gate.weight", "gate.bias"):
            parameters[f"sites.{site}.{part}"] = lambda get, name=f"{site}/{part}": get(name)[order]
        for index, size in enumerate(sorted(set(sizes))):
            names = [f"{site}/kernel.{e}" for e in order if sizes[e] == size]
            parameters[f"sites.{site}.kernels.{index}"] = lambda get, names=names: torch.stack([get(n) for n in names])
    return Plan(fields, parameters)


def plan_more(case: WholeCase) -> Plan:
    """MoRE: the map that the release's first forward froze is given."""
    parts = ("A", "B", "gate.weight", "gate.bias", "task_embedding", "task_map")
    parameters = {f"sites.{site}.{part}": _named(site, part) for site in case.sites for part in parts}
    return Plan(_contrastive_fields(case), parameters)


def plan_moelora(case: WholeCase) -> Plan:
    """MOELoRA: row 0 of the release's table pads, tasks count from 1."""
    c = case.config
    fields = {key: c[key] for key in ("rank", "alpha", "num_experts", "num_tasks", "task_dim")}
    parameters: dict[str, Callable[[Get], Tensor]] = {
        "shared.gate": lambda get: get("shared/gate.weight"),
        "shared.task_embedding": lambda get: get("shared/task_embedding")[1:],
    }
    for site in case.sites:
        parameters[f"sites.{site}.A"] = _joined(site, "A", c["num_experts"], 0)
        parameters[f"sites.{site}.B"] = _joined(site, "B", c["num_experts"], 1)
    return Plan({**fields, "dropout": 0.0}, parameters)


def plan_mixlora(case: WholeCase) -> Plan:
    """MixLoRA: experts in the feed-forward networks that have a router, plain pairs elsewhere."""
    c = case.config
    golden = case.under("adapter/")
    with_experts = {site for site in case.sites if f"{site}/A.0" in golden}
    roles = {site.rpartition(".")[2].removesuffix("_proj") for site in with_experts}
    fields = {
        **{key: c[key] for key in ("rank", "alpha", "num_experts", "top_k")},
        "targets": tuple(role for role in ("gate", "up", "down") if role in roles),
        "attention": with_experts != set(case.sites),
        "balance_coefficient": c["coefficient"],
        "dropout": 0.0,
    }
    parameters: dict[str, Callable[[Get], Tensor]] = {
        f"shared.router.{block.replace('.', '/')}": _named(block, "router") for block in case.blocks
    }
    for site in case.sites:
        for part, dim in (("A", 0), ("B", 1)):
            joined = _joined(site, part, c["num_experts"], dim)
            parameters[f"sites.{site}.{part}"] = joined if site in with_experts else _named(site, part)
    return Plan(fields, parameters)


def plan_tucka(case: WholeCase) -> Plan:
    """TuckA: the centroids are those before the forward; a case of a first batch draws them in it."""
    c = case.config
    fields = {key: c[key] for key in ("rank", "groups", "experts", "shared_rank", "alpha", "perturbation")}
    drawn = torch.tensor(not c["first_batch"])
    parameters: dict[str, Callable[[Get], Tensor]] = {"shared.centroids": _named("router", "EC")}
    parameters["shared.initialised"] = lambda get: drawn
    for site in case.sites:
        for own, part in (("core", "G"), ("factor", "U"), ("mixing", "C")):
            parameters[f"sites.{site}.{own}"] = _named(site, part)
    return Plan(fields, parameters)


PLANS: Mapping[str, Callable[[WholeCase], Plan]] = {
    "ept": plan_ept,
    "more": plan_more,
    "moelora": plan_moelora,
    "mixlora": plan_mixlora,
    "tucka": plan_tucka,
}
