"""Methods of the `peft` package as baselines, on the layers that every method here adapts.

Only public functions of `peft` are called. Poly and MHR mix their skills by the row's task: the ids of a call, or of
`PeftAttachment.route`, reach each of their layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.methods.base import Method, Refused
from moepeft.bridges.peft_checkpoints import fan_in_fan_out, import_peft, target_modules
from moepeft.counting import ParameterCount
from moepeft.errors import AlreadyAttached, MissingRouting, UnknownMethod, Unsupported, did_you_mean
from moepeft.protocols import LinearSite
from moepeft.sites import SLOT, SitePattern, find_sites, select_sites

# Name -> configuration class and the options that make it that method.
BASELINES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "lora": ("LoraConfig", {}),
    "rslora": ("LoraConfig", {"use_rslora": True}),
    "dora": ("LoraConfig", {"use_dora": True}),
    "vera": ("VeraConfig", {}),
    "loha": ("LoHaConfig", {}),
    "lokr": ("LoKrConfig", {}),
    "ia3": ("IA3Config", {}),
    "oft": ("OFTConfig", {}),
    "hra": ("HRAConfig", {}),
    "randlora": ("RandLoraConfig", {}),
    "poly": ("PolyConfig", {}),
    "mhr": ("PolyConfig", {"n_splits": 4}),
}
# Those that route by task, and the option that holds the number of tasks.
TASKS_OPTION: Mapping[str, str] = {"poly": "n_tasks", "mhr": "n_tasks"}
SPEC_PREFIX = "peft:"


@dataclass(frozen=True)
class PeftMethod(Method):
    """A method of the `peft` package, with the options of its configuration class.

    Attributes:
        kind: its name without the prefix, e.g. ``dora``.
        options: over the defaults of `peft`.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in BASELINES:
            raise UnknownMethod(f"no method {self.kind!r} of peft runs here.{did_you_mean(self.kind, BASELINES)}")

    @classmethod
    def parse(cls, spec: str, num_tasks: int | None = None) -> PeftMethod:
        """From what one writes on a command line, ``peft:dora``; methods that know no tasks ignore their number."""
        kind = spec.removeprefix(SPEC_PREFIX)
        knows_tasks = num_tasks is not None and kind in TASKS_OPTION
        return cls(kind, {TASKS_OPTION[kind]: num_tasks} if knows_tasks else {})

    @property
    def name(self) -> str:
        """As written on the command line."""
        return f"{SPEC_PREFIX}{self.kind}"

    def config(self) -> dict[str, Any]:
        """The options over peft's defaults."""
        return {"name": self.kind, "options": dict(self.options)}

    def attach(self, backbone: nn.Module, sites: SitePattern | None = None) -> PeftAttachment:
        """Put it onto a bare model; see `attach_peft`."""
        return attach_peft(backbone, self.kind, sites=sites, **self.options)

    def size_for(self, target: int, sites: Sequence[LinearSite]) -> Method:
        """No size is chosen here."""
        return Refused(self, "its size is known in no closed form, and is not chosen here")


class PeftAttachment:
    """Handle on a model that carries a baseline, with what a training loop needs of an `Attachment`.

    The model is still called as itself; its adapted layers were replaced in place.
    """

    def __init__(self, method: PeftMethod, model: nn.Module, sites: Sequence[LinearSite], config: Any) -> None:
        """Replace the layers; `attach_peft` checks what goes in here."""
        self.method, self.model, self.sites = method, model, tuple(sites)
        self._trained_before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._base = sum(parameter.numel() for parameter in model.parameters())
        own_layers = {site.name: model.get_submodule(site.name) for site in sites}
        try:
            self._wrapper = import_peft().get_peft_model(model, config)
        except BaseException:
            # peft replaces layer by layer and stops at the first it cannot adapt.
            for name, layer in own_layers.items():
                model.set_submodule(name, layer)
            self._restore()
            raise
        for site in sites:  # peft's layers are new, and train; Poly samples its mixture while training
            model.get_submodule(site.name).train(own_layers[site.name].training)
        self._routing = _Routing()
        self._hook = model.register_forward_pre_hook(partial(_take_task_ids, self._routing), with_kwargs=True)
        if method.kind in TASKS_OPTION:
            for site in sites:
                layer = model.get_submodule(site.name)
                layer.register_forward_pre_hook(partial(_give_task_ids, self._routing, site.name), with_kwargs=True)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable parameters, under the model's names."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters, for the optimiser."""
        return (parameter for _, parameter in self.named_parameters())

    def aux_losses(self) -> dict[str, Tensor]:
        """None of these methods has any."""
        return {}

    def aux_loss(self) -> Tensor:
        """A zero without graph."""
        return torch.zeros((), device=next(self.parameters()).device)

    def after_step(self) -> None:
        """Nothing: the optimiser is all that changes these methods."""

    @contextmanager
    def route(self, *, task_ids: Tensor | list[int] | int) -> Iterator[None]:
        """Inside, rows have these task ids; one id stands for all rows. Methods that know no tasks ignore them."""
        before, self._routing.routed = self._routing.routed, torch.as_tensor(task_ids).reshape(-1)
        self._routing.of_call = None
        try:
            yield
        finally:
            self._routing.routed = before

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes what it computes without adapters."""
        with self._wrapper.disable_adapter():
            yield

    def parameter_count(self) -> ParameterCount:
        """Trainable numbers as measured; no closed form is known here, so it repeats the measured one."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return ParameterCount(
            total=total,
            shared=0,
            task_tables=sum(p.numel() for name, p in self.named_parameters() if ".poly_router." in name),
            router=0,
            beside=0,
            closed_form=total,
            base=self._base,
            sites=len(self.sites),
        )

    def summary(self) -> str:
        """A few lines for a person."""
        count = self.parameter_count()
        return (
            f"{self.method.name} {dict(self.method.options)}\n{count.sites} sites\n"
            f"{count.total:,} trainable parameters; "
            f"{count.total / max(count.base, 1):.2%} of {count.base:,} frozen ones"
        )

    def detach(self) -> nn.Module:
        """Put the model's own layers back."""
        self._hook.remove()
        self._wrapper.unload()
        self._restore()
        return self.model

    def _restore(self) -> None:
        if hasattr(self.model, "peft_config"):  # older releases of peft leave it behind
            del self.model.peft_config
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trained_before[name])


def attach_peft(model: nn.Module, name: str, *, sites: SitePattern | None = None, **options: Any) -> PeftAttachment:
    """Freeze `model` and put a method of the `peft` package onto its linear layers.

    Args:
        model: a bare model.
        name: one of `BASELINES`.
        sites: which layers, as for `moepeft.attach`. None: the same layers that every method here adapts.
        **options: fields of the method's configuration class in `peft`.

    Raises:
        PeftMissing: `peft` is not installed.
        UnknownMethod: no such method.
        AlreadyAttached: the model carries adapters, ours or peft's.
        Unsupported: `peft` does not take these options, or cannot adapt these layers.
    """
    peft = import_peft()
    method = PeftMethod(name, options)
    if hasattr(model, "peft_config") or any(hasattr(module, SLOT) for module in model.modules()):
        raise AlreadyAttached("the model has adapters already: call detach() on their attachment first")
    chosen = select_sites(find_sites(model), sites)
    class_name, fixed = BASELINES[name]
    config_class = getattr(peft, class_name)
    known = config_class.__dataclass_fields__
    computed: dict[str, Any] = {"target_modules": target_modules(model, chosen)}
    if "fan_in_fan_out" in known:
        computed["fan_in_fan_out"] = fan_in_fan_out(model, chosen)
    if "feedforward_modules" in known:  # scaled at their input, so that it is the inner activation that is scaled
        computed["feedforward_modules"] = target_modules(model, [site for site in chosen if site.role == "down"])
    try:
        return PeftAttachment(method, model, chosen, config_class(**{**computed, **fixed, **options}))
    except (TypeError, ValueError) as error:
        raise Unsupported(f"peft cannot put {name} onto this {type(model).__name__}: {error}") from error


@dataclass
class _Routing:
    """Task ids of the rows: those of the call under way, or of `PeftAttachment.route`.

    A call's stay until the next one begins: gradient checkpointing recomputes layers during backward.
    """

    routed: Tensor | None = None
    of_call: Tensor | None = None


def _take_task_ids(
    routing: _Routing, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ids = kwargs.pop("task_ids", None)
    routing.of_call = None if ids is None else torch.as_tensor(ids)
    return args, kwargs


def _give_task_ids(
    routing: _Routing, site: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ids = routing.routed if routing.of_call is None else routing.of_call
    if layer.disable_adapters:
        return args, kwargs
    rows = args[0].shape[0]
    if ids is None or rows % len(ids):
        given = "none" if ids is None else f"{len(ids)}"
        raise MissingRouting(
            f"layer {site!r} mixes its skills by task: got {given} task ids for {rows} rows, pass one per row to the "
            "model call, or call it inside `with adapters.route(task_ids=...)`"
        )
    # Beam search repeats every row in place.
    return args, {**kwargs, "task_ids": ids.to(args[0].device).repeat_interleave(rows // len(ids))}
