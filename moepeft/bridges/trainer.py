"""Train any method with the Trainer of transformers: routing, auxiliary losses, and checkpoints of adapters only.

    model = AutoModelForSeq2SeqLM.from_pretrained("t5-base")
    moepeft.attach(model, moepeft.method("ept", num_tasks=3))
    AdapterSeq2SeqTrainer(model=model, args=..., train_dataset=rows_with_task_ids).train()

Rows carry ``task_ids`` beside ``input_ids`` and ``labels``; every collator of transformers batches plain integers.
Parameters of the model that were unfrozen after `moepeft.attach`, such as a new classification head, train along and
are saved beside the adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moepeft.attach import Attachment, attachment
from moepeft.errors import TransformersMissing, Unsupported

try:
    from transformers import Seq2SeqTrainer, Trainer, TrainerCallback
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.trainer import TRAINING_ARGS_NAME
except ImportError as error:
    raise TransformersMissing("this needs the transformers package: pip install 'moepeft[trainer]'") from error

if TYPE_CHECKING:  # the mixin stands before a Trainer: its super() is one
    from transformers import Trainer as _Base
else:
    _Base = object


class _AfterStep(TrainerCallback):  # type: ignore[misc]
    """Tells the adapters of every optimiser step."""

    def __init__(self, adapters: Attachment) -> None:
        self.adapters = adapters

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.adapters.after_step()


class AdapterTrainerMixin(_Base):  # type: ignore[misc]
    """What a Trainer does differently when its model carries adapters. Put it before the Trainer's class.

    Checkpoints hold ``adapter.safetensors``, ``adapter.json``, and ``trained.safetensors`` if anything else of the
    model trains. The training log has each auxiliary loss as ``aux_NAME``; ``loss`` includes them. Evaluation and
    prediction, generation included, route by the rows' task ids.
    """

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        """Take what the Trainer takes.

        Raises:
            Unsupported: the model carries no adapters, or would be sharded or replicated in ways that lose them.
        """
        with _as_adapted(model) if model is not None else nullcontext():
            super().__init__(model, *args, **kwargs)
        self._aux_sums: dict[str, Tensor] = {}
        self._aux_calls = 0
        adapters = attachment(self.model)  # refuses a bare model now rather than after the first checkpoint
        self.add_callback(_AfterStep(adapters))
        if not _normalises(self.model):
            self.model_accepts_loss_kwargs = False
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise Unsupported("checkpoints of sharded adapters are not supported: train with plain data parallelism")
        if self.args.n_gpu > 1:
            raise Unsupported(
                f"{self.args.n_gpu} GPUs in one process would share one set of adapters between replicas: start one "
                "process per GPU (torchrun --nproc-per-node), or make one visible (CUDA_VISIBLE_DEVICES)"
            )

    # ------------------------------------------------------------------ batches and losses

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "task_ids" not in self._signature_columns:  # taken out of the call by a hook, so in no signature
            self._signature_columns.append("task_ids")

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The Trainer's loss plus the auxiliary losses that the forward recorded; it records none in evaluation."""
        # Outputs are asked for where they are wanted alone: TRL runs a second forward to give them.
        computed = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss, outputs = computed if return_outputs else (computed, None)
        losses = attachment(self.model).aux_losses()
        if losses:
            total = torch.stack([value.to(loss.device) for value in losses.values()]).sum()
            if self._is_normalised(kwargs.get("num_items_in_batch")):
                # The task loss is already its share of the accumulated batch; a mean over this batch is not.
                total = total / self.current_gradient_accumulation_steps
            loss = loss + total.to(loss.dtype)
            self._note(losses)
        return (loss, outputs) if return_outputs else loss

    def _is_normalised(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the Trainer takes its loss as divided by the items of all accumulated batches."""
        declared: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return declared
        return bool(
            self.compute_loss_func is not None or (self.model_accepts_loss_kwargs and num_items_in_batch is not None)
        )

    def _note(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            self._aux_sums[name] = self._aux_sums.get(name, 0) + value.detach()
        self._aux_calls += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the auxiliary losses since the last training log, over all processes."""
        if "loss" in logs and self._aux_calls:
            for name, value in self._aux_sums.items():
                logs[f"aux_{name}"] = float(self.accelerator.reduce(value / self._aux_calls, "mean"))
            self._aux_sums, self._aux_calls = {}, 0
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, routed by the batch's task ids: `generate` would not take them as a keyword."""
        task_ids = inputs.get("task_ids")
        rest = {name: value for name, value in inputs.items() if name != "task_ids"}
        route = nullcontext() if task_ids is None else attachment(self.model).route(task_ids=task_ids)
        with route:
            return super().prediction_step(model, rest, *args, **kwargs)

    # ------------------------------------------------------------------ checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        attachment(self.model).save(folder)
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        attachment(self.model).restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        attachment(self.model).restore(self.state.best_model_checkpoint)


class KeepTaskIds:
    """A collator that keeps the rows' ``task_ids``, around one that drops columns it does not know, as TRL's does.

    ``SFTTrainer(..., data_collator=KeepTaskIds(DataCollatorForLanguageModeling(pad_token_id)))``. The inner collator
    must give one row per example: leave packing and padding-free batches off.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The inner collator's batch, with ``task_ids`` of shape (rows,)."""
        batch = self.collator([{name: value for name, value in row.items() if name != "task_ids"} for row in rows])
        return {**batch, "task_ids": torch.tensor([int(row["task_ids"]) for row in rows])}


class AdapterTrainer(AdapterTrainerMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` for models that carry adapters."""


class AdapterSeq2SeqTrainer(AdapterTrainerMixin, Seq2SeqTrainer):  # type: ignore[misc]
    """`transformers.Seq2SeqTrainer` for models that carry adapters."""


def _normalises(model: nn.Module) -> bool:
    """Whether the model's loss divides by the items of all accumulated batches and processes that it is told of.

    The Trainer believes so of every `forward` with ``**kwargs`` and multiplies the others' losses, most heads' among
    them, by the number of batches and processes (huggingface/transformers issue 47688). The auxiliary losses are
    means, so their weight against the task loss would depend on how a batch is split.
    """
    declared = getattr(model, "accepts_loss_kwargs", None)
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if declared is None else bool(declared)


@contextmanager
def _as_adapted(model: nn.Module) -> Iterator[None]:
    """Inside, transformers takes a quantised model for one that has trainable adapters: it has, but not peft's."""
    if not getattr(model, "is_quantized", False):
        yield
        return
    model._hf_peft_config_loaded = True  # type: ignore[assignment]
    try:
        yield
    finally:
        del model._hf_peft_config_loaded
