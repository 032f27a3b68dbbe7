"""LoRA-shaped checkpoints to and from the `peft` package.

Only public functions of `peft` are called. Importing a checkpoint needs no `peft` at all: it is a JSON and a
safetensors file.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from moepeft import merging
from moepeft.attach import Attachment, attach
from moepeft.bridges.low_rank import Factors, factorise, truncate
from moepeft.config import task_number
from moepeft.errors import AdapterFileError, MoepeftError, NotMergeable, Unsupported
from moepeft.files import check_values, read_json, read_tensors, replacing, write_tensors
from moepeft.methods.lora import LoRA
from moepeft.protocols import LinearSite, RoutedUpdate
from moepeft.sites import find_sites
from moepeft.trained import owners

_LOG = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(rf"{re.escape(_PREFIX)}(?P<site>.+)\.lora_(?P<factor>[AB])\.weight")

# Fields of peft's LoraConfig that change no output of a loaded checkpoint. Any other one must be unset: a field that
# this list does not know may be a variant of LoRA that computes something else.
_HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "init_lora_weights"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "runtime_config", "qalora_group_size"),
}
# Other starts (PiSSA, OLoRA, LoftQ, ...) take something out of the base weights, which the factors then add to.
_STARTS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


class PeftMissing(MoepeftError, ImportError):
    """The `peft` package is not installed."""


@dataclass(frozen=True)
class Export:
    """What an exported checkpoint holds.

    Attributes:
        folder: where the checkpoint is.
        ranks: by site, the number of rank-one terms.
        errors: by site, the norm of what was cut off over the norm of the update; 0 where the export is exact.
    """

    folder: Path
    ranks: Mapping[str, int]
    errors: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The site with the largest error."""
        return max(self.errors.items(), key=lambda item: item[1])


def export_lora(
    attachment: Attachment,
    folder: str | Path,
    *,
    task: int | None = None,
    rank: int | None = None,
    gates: Tensor | None = None,
) -> Export:
    """Write a checkpoint that ``peft.PeftModel.from_pretrained(base, folder)`` loads.

    Without `rank` the checkpoint reproduces the adapters up to rounding: every site has as many rank-one terms as its
    update. Servers of many LoRAs want one rank for all sites; `rank` cuts or pads every site to that.

    Args:
        attachment: adapters whose update is a fixed change of the weights (per task, for methods that route by task).
        folder: where to write; made if need be.
        task: which task's update; needed by methods that route by task, refused by those that do not.
        rank: of every site; None for as many terms as each update has.
        gates: one routing that is taken as fixed, for a method whose input chooses it (TuckA): the weight of every
            expert, as `Attachment.recording` collects it under ``gates``. The checkpoint answers as the adapters do
            wherever they route so, and otherwise where they do not.

    Returns:
        Ranks and relative errors of the sites. Where something was cut, the worst site is logged as a warning.

    Raises:
        PeftMissing: `peft` is not installed.
        NotMergeable: the update depends on the input, and no fixed routing makes it a change of weights.
        MissingRouting: `task` is missing, or given to a method that knows no tasks.
        Unsupported: fused experts carry adapters.
    """
    peft = import_peft()
    if any(site.fused for site in attachment.sites):
        raise Unsupported(
            "adapters of fused experts have no form in a LoRA checkpoint that servers read: call merge() and save the "
            "whole model, or leave 'experts' out of `sites`"
        )
    factors = _of_task(attachment, task, rank) if gates is None else _of_routing(attachment, gates, rank)
    beside = owners(attachment.state)
    if beside:
        _LOG.warning("%s: %s trained beside the adapters; a LoRA has no place for them", folder, ", ".join(beside))
    export = Export(
        Path(folder),
        {name: pair.rank for name, pair in factors.items()},
        {name: pair.error for name, pair in factors.items()},
    )
    tensors = {}
    for name, pair in factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = pair.A, pair.B
    with replacing(export.folder / WEIGHTS) as partial:
        write_tensors(partial, tensors)
    _peft_config(peft, attachment, factors).save_pretrained(export.folder)
    site, error = export.worst
    if error:
        _LOG.warning("%s: rank %s cuts off %.2g of the update of %s, the worst site", folder, rank, error, site)
    return export


def _of_task(attachment: Attachment, task: int | None, rank: int | None) -> dict[str, Factors]:
    adapters = attachment.adapters
    if all(isinstance(adapter, RoutedUpdate) for adapter in adapters.values()):
        why = attachment.factory.capabilities.not_mergeable
        raise NotMergeable(
            f"{attachment.factory.name} cannot be exported as it stands: {why}. For one routing it can: "
            "export_lora(..., gates=...) with the `gates` that recording() collects"
        )
    merging.check(attachment.state, task)
    return {name: factorise(adapter, task, rank) for name, adapter in adapters.items()}


def _of_routing(attachment: Attachment, gates: Tensor, rank: int | None) -> dict[str, Factors]:
    state, factors = attachment.state, {}
    for site in attachment.sites:
        adapter = attachment.adapters[site.name]
        if not isinstance(adapter, RoutedUpdate):
            raise NotMergeable(
                f"{attachment.factory.name} has no update for a fixed routing: "
                + (attachment.factory.capabilities.not_mergeable or "it exports as it stands, without gates")
            )
        with torch.no_grad():
            update = adapter.fixed_update(gates.detach().reshape(-1), merging.frozen_weight(state, site))
        factors[site.name] = truncate(update, rank)
    return factors


def export_all_tasks(
    attachment: Attachment, folder: str | Path, *, names: Sequence[str] | None = None, rank: int | None = None
) -> tuple[Export, ...]:
    """Write one checkpoint for each task, as servers of many LoRAs want them.

    Args:
        attachment: adapters of a method that routes by task.
        folder: gets one folder per task.
        names: of the folders, one per task; default: ``task-0``, ``task-1``, ...
        rank: see `export_lora`.

    Raises:
        Unsupported: the method knows no tasks, or the number of names is wrong.
        NotMergeable: the update depends on the input.
    """
    tasks = task_number(attachment.factory)
    if tasks is None or attachment.factory.capabilities.routing != "task":
        raise Unsupported(f"{attachment.factory.name} has one update for all tasks: call export_lora(...) once")
    names = [f"task-{task}" for task in range(tasks)] if names is None else names
    if len(names) != tasks:
        raise Unsupported(f"got {len(names)} names for {tasks} tasks: give one name per task")
    return tuple(export_lora(attachment, Path(folder) / names[task], task=task, rank=rank) for task in range(tasks))


def _peft_config(peft: ModuleType, attachment: Attachment, factors: Mapping[str, Factors]) -> Any:
    """The checkpoint's configuration. Sites whose rank or scale is not the commonest one are listed by name."""
    factory, model = attachment.factory, attachment.model
    (rank, scale), _ = Counter((pair.rank, pair.scale) for pair in factors.values()).most_common(1)[0]
    others = {name: pair for name, pair in factors.items() if (pair.rank, pair.scale) != (rank, scale)}
    plain = isinstance(factory, LoRA) and not others and rank == factory.rank
    alpha, rslora = (factory.alpha, factory.rslora) if plain and isinstance(factory, LoRA) else (scale * rank, False)
    return peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        # peft matches these patterns against the ends of names; the anchor keeps one site from meaning another.
        rank_pattern={f"^{re.escape(name)}": pair.rank for name, pair in others.items()},
        alpha_pattern={f"^{re.escape(name)}": pair.scale * pair.rank for name, pair in others.items()},
        lora_dropout=getattr(factory, "dropout", 0.0),
        target_modules=target_modules(model, attachment.sites),
        fan_in_fan_out=fan_in_fan_out(model, attachment.sites),
        inference_mode=True,
        base_model_name_or_path=getattr(getattr(model, "config", None), "_name_or_path", None) or None,
    )


def import_lora(model: nn.Module, folder: str | Path, *, train: Iterable[str] | None = None) -> Attachment:
    """Attach a LoRA checkpoint of the `peft` package as the method `lora`.

    Args:
        model: the base model, bare, of the class that the checkpoint was trained on.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        train: as `moepeft.attach` takes it.

    Raises:
        AdapterFileError: a file is missing or damaged, or is for another model; `model` is untouched.
        Unsupported: the checkpoint is not plain LoRA of one rank; says what it uses.
    """
    folder = Path(folder)
    config = _read_config(folder)
    factors = _read_factors(folder, config["r"])
    own = {site.name: site for site in find_sites(model)}
    for name, (A, B) in factors.items():
        site = own.get(name)
        shape = (B.shape[0], A.shape[1])
        if site is None or (site.out_features, site.in_features) != shape:
            found = f"one of shape {(site.out_features, site.in_features)}" if site else "no such linear layer"
            raise AdapterFileError(f"{folder} adapts a layer {name!r} of shape {shape}, the model has {found}")
    factory = LoRA(
        rank=config["r"],
        alpha=config["lora_alpha"],
        rslora=config.get("use_rslora", False),
        dropout=config.get("lora_dropout", 0.0),
    )
    attachment = attach(model, factory, sites=lambda site: site.name in factors, train=train)
    for name, (A, B) in factors.items():
        # Half-precision factors go on in single precision, as in peft; double precision is kept.
        adapter = attachment.adapters[name].to(torch.promote_types(A.dtype, torch.get_default_dtype()))
        adapter.load_state_dict({"A": A, "B": B})
    return attachment


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    config = read_json(path, missing="give the folder that peft's save_pretrained wrote")
    if "peft_type" not in config:
        raise AdapterFileError(f"{path} is not a configuration written by peft: it has no 'peft_type'")
    kind, rank, alpha = config["peft_type"], config.get("r"), config.get("lora_alpha")
    if kind != "LORA":
        raise Unsupported(f"{path} is of the peft method {kind}, wanted LORA; other methods run as attach_peft(...)")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS_THAT_KEEP_THE_BASE:
        raise Unsupported(
            f"{path} has init_lora_weights={start!r}, which changes the base weights as well: convert it to a plain "
            "LoRA in peft (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for name, value in config.items():
        if name not in _HARMLESS and value not in (None, False, "none") and value != {} and value != []:
            raise Unsupported(f"{path} has {name}={value!r}; only plain LoRA of one rank imports, with {name} unset")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        raise AdapterFileError(f"{path}: r={rank!r} and lora_alpha={alpha!r} should be numbers")
    return config


def _read_factors(folder: Path, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    path = folder / WEIGHTS
    tensors = read_tensors(path, missing="save pickled weights (.bin) again with a newer peft")
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise Unsupported(f"{path} holds {name!r}; only factors lora_A and lora_B of linear layers import")
        pairs.setdefault(match["site"], {})[match["factor"]] = tensor
    for site, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise AdapterFileError(f"{path} has only lora_{''.join(pair)} of {site!r}: it is incomplete")
        if not pair["A"].dim() == pair["B"].dim() == 2 or not pair["A"].shape[0] == pair["B"].shape[1] == rank:
            raise Unsupported(
                f"{path}: the factors of {site!r} have shapes {tuple(pair['A'].shape)} and {tuple(pair['B'].shape)}, "
                f"wanted rank {rank} at every layer"
            )
        kind = torch.float64 if pair["A"].dtype == torch.float64 else torch.get_default_dtype()
        named = {f"{site}.lora_{letter}": pair[letter] for letter in "AB"}
        check_values(path, named, dict.fromkeys(named, kind))
    if not pairs:
        raise AdapterFileError(f"{path} holds no factors")
    return {site: (pair["A"], pair["B"]) for site, pair in pairs.items()}


def target_modules(model: nn.Module, sites: Sequence[LinearSite]) -> list[str] | str:
    """What peft calls target_modules: names, or a pattern where peft would take a name for the end of another one."""
    names = [site.name for site in sites]
    ends = tuple(f".{name}" for name in names)
    if any(name.endswith(ends) for name, _ in model.named_modules()):
        return "|".join(re.escape(name) for name in names)
    return names


def fan_in_fan_out(model: nn.Module, sites: Sequence[LinearSite]) -> bool:
    """What peft calls so: whether the layers store their weights transposed, as GPT-2's do."""
    return any(type(model.get_submodule(site.name)).__name__ == "Conv1D" for site in sites)


def import_peft() -> ModuleType:
    """The package.

    Raises:
        PeftMissing: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise PeftMissing("this needs the peft package: pip install 'moepeft[peft]'") from error
    module: ModuleType = peft
    return module
