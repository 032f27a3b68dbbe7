"""Golden vectors of whole models: the authors' code in a small T5, LLaMA, BERT or DeBERTa.

A case is `<case>.safetensors` and `<case>.json` that names the class of the model. The preset `released` is attached to
the same class of transformers with the same frozen weights. Its own `aux_loss()` is added to the model's own loss, and
everything that the case stores is compared. What the release wrote as a number and not as a rule is given to the preset
as a field: its losses are divided by 72, the number of encoder sites of T5-base, so that a model with fewer of them has
a smaller coefficient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn

import moepeft
from tests.golden.whole_plans import PLANS, Plan, WholeCase


def build(case: WholeCase) -> nn.Module:
    """The model of transformers with the case's frozen weights, in float64."""
    model_class = getattr(transformers, case.model)
    with torch.random.fork_rng():
        # The forks compute attention step by step; torch's own attention differs in the last bits, and rounding
        # LLaMA's norms to float32 makes of that 1e-5.
        config = model_class.config_class(**case.model_config, attn_implementation="eager")
        model: nn.Module = model_class(config).double()
    missing, unexpected = model.load_state_dict(case.under("base/"), strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    if unexpected or [name for name in missing if name not in tied]:
        raise ValueError(f"frozen weights do not fit {case.model}: missing {missing}, unexpected {unexpected}")
    return model


def attach(case: WholeCase, plan: Plan, **fields: Any) -> moepeft.Attachment:
    """The preset on the model, with the case's parameters."""
    model = build(case)
    # MixLoRA's streams go through whole feed-forward networks, also where a projection carries no expert.
    inside = {f"{block}.{last}_proj" for block in case.blocks for last in ("gate", "up", "down")}
    chosen = inside.union(case.sites)
    factory = moepeft.method(f"{case.method}@released", **{**plan.fields, **fields})
    adapters = moepeft.attach(model, factory, sites=lambda site: site.name in chosen, train=[])
    adapted = {site.name for site in adapters.sites}
    if adapted != chosen:
        raise ValueError(f"adapted other layers than the release: {sorted(adapted ^ chosen)}")
    model.double()
    golden = case.under("adapter/").__getitem__
    state = {name: make(golden) for name, make in plan.parameters.items()}
    own = adapters.state_dict()
    if set(own) != set(state):
        raise ValueError(f"the adapters hold other parameters than the case: {sorted(set(own) ^ set(state))}")
    adapters.load_state_dict({name: value.to(own[name].dtype) for name, value in state.items()})
    return adapters


@contextmanager
def stored_draws(case: WholeCase) -> Iterator[None]:
    """Uniform draws are those that the release made, if the case stores any."""
    draws = case.tensors.get("state/init_uniform")
    if draws is None:
        yield
        return
    with mock.patch.object(torch, "rand_like", lambda like: draws.reshape(like.shape).to(like.dtype)):
        yield


def _inputs(case: WholeCase) -> dict[str, Tensor]:
    """Keywords of the model's call, and the rows' tasks as the library counts them."""
    inputs = case.under("input/")
    tasks = inputs.pop("task_id", None)
    if tasks is None:
        return inputs
    if case.method == "moelora":
        return {**inputs, "task_ids": tasks - 1}  # the release counts from 1 and pads with 0
    return {**inputs, "task_ids": tasks.expand(len(inputs["input_ids"])) if len(tasks) == 1 else tasks}


def compute(case: WholeCase) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Everything that the case stores: what the release computed, and what the library does.

    Returns:
        Values and expectations under the same names; a gradient is named as the library's parameter.
    """
    plan = PLANS[case.method](case)
    expected = case.expected
    gradients = {name for name in expected if name.startswith(("grad_lm/", "grad_total/"))}
    wanted = {name: value for name, value in expected.items() if name not in gradients}
    found: dict[str, Tensor] = {}
    inputs = _inputs(case)
    if "logits" in expected:
        adapters = attach(case, plan)
        found |= _forward(case, adapters, inputs)
        if gradients:
            values, expectations = _gradients(case, plan, adapters, found)
            found |= values
            wanted |= expectations
    if "generated" in expected:
        found |= _generate(case, attach(case, plan), inputs)
    if any(name.startswith("site_loss/") for name in wanted):
        found |= _site_losses(case, plan, inputs)
    return found, wanted


def _forward(case: WholeCase, adapters: moepeft.Attachment, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model = adapters.model.train()
    with stored_draws(case), adapters.recording() as stats:
        routes = _routes(adapters)
        output = model(**inputs)
    loss = output.loss.reshape(1)
    found = {"logits": output.logits, "lm_loss": loss, **routes()}
    if case.method == "mixlora":
        found["balance"] = (adapters.aux_loss() / adapters.factory.balance_coefficient).reshape(1)  # type: ignore[attr-defined]
        found["router_logits"] = _router_logits(stats)
    if case.method == "moelora":
        found["gates"] = stats[adapters.sites[0].name]["gates"]
    if case.method == "tucka":
        found["centroids"] = dict(adapters.named_parameters())["shared.centroids"].detach().clone()
    found["total_loss"] = loss.double() + adapters.aux_loss()
    if hasattr(output, "encoder_last_hidden_state"):
        found["encoder_last_hidden_state"] = output.encoder_last_hidden_state
    with adapters.disabled():
        found["bare_logits"] = model(**inputs).logits
    return found


def _routes(adapters: moepeft.Attachment) -> Callable[[], dict[str, Tensor]]:
    """What TuckA's router answers, call by call."""
    answers: list[tuple[Tensor, ...]] = []
    if adapters.factory.name == "tucka":
        assert adapters.shared is not None
        adapters.shared.register_forward_hook(lambda module, args, answer: answers.append(answer))

    def read() -> dict[str, Tensor]:
        if not answers:
            return {}
        groups, weights, _ = zip(*answers, strict=True)
        return {"route_groups": torch.cat(groups), "route_weights": torch.cat(weights)}

    return read


def _router_logits(stats: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """Logarithms of the probabilities, layer after layer: logits up to a constant per token."""
    layers = [seen["probabilities"].flatten(0, -2).log() for seen in stats.values() if "probabilities" in seen]
    return torch.cat(layers)


def _gradients(
    case: WholeCase, plan: Plan, adapters: moepeft.Attachment, found: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters = dict(adapters.named_parameters())
    values, wanted = {}, {}
    for prefix, loss in (("grad_lm", "lm_loss"), ("grad_total", "total_loss")):
        golden = case.under(f"expected/{prefix}/")
        if not golden:
            continue
        shapes = case.under("adapter/")
        grads = torch.autograd.grad(found[loss].sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
            # What autograd never reached has no tensor in the case: zero.
            make = plan.parameters[name]
            wanted[f"{prefix}/{name}"] = make(lambda key, g=golden, s=shapes: g.get(key, torch.zeros_like(s[key])))
            values[f"{prefix}/{name}"] = torch.zeros_like(parameter) if grad is None else grad
    return values, wanted


def _site_losses(case: WholeCase, plan: Plan, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The contrastive loss of each site alone, the decoder's included, which the preset leaves out."""
    adapters = attach(case, plan, contrastive_sites="all", contrastive=1.0)
    adapters.model.train()(**inputs)
    terms = adapters.runtime.last.losses["contrastive"]
    return {f"site_loss/{s}": adapters.factory.aux_loss("contrastive", [term]).reshape(1) for s, term in terms.items()}


def _generate(case: WholeCase, adapters: moepeft.Attachment, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Greedy tokens, as many as the case has, and the logits of each step."""
    model: Any = adapters.model.eval()
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    length = case.expected["generated"].shape[1]
    steps = length - (1 if model.config.is_encoder_decoder else prompt["input_ids"].shape[1])
    routed = adapters.route(task_ids=inputs["task_ids"]) if "task_ids" in inputs else nullcontext()
    with routed, torch.no_grad(), stored_draws(case):
        made = model.generate(
            **prompt,
            do_sample=False,
            max_new_tokens=steps,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = nn.functional.pad(made.sequences, (0, length - made.sequences.shape[1]), value=model.config.pad_token_id)
    return {"generated": tokens, "step_logits": torch.stack(made.logits)}


def check(case: WholeCase) -> dict[str, tuple[float, float]]:
    """Replay a case and compare everything it stores.

    Returns:
        Name of a stored value -> largest absolute error, and what is allowed.

    Raises:
        ValueError: a value was not computed, or has another shape.
    """
    found, wanted = compute(case)
    errors = {}
    for name, stored in wanted.items():
        if name not in found:
            raise ValueError(f"nothing computed for {name!r}")
        value = found[name].detach()
        expected = stored.log_softmax(dim=-1) if name == "router_logits" else stored
        if value.shape != expected.shape:
            raise ValueError(f"{name}: computed shape {tuple(value.shape)}, stored {tuple(expected.shape)}")
        error = (value.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
        errors[name] = (error, case.tolerance(name))
    return errors
