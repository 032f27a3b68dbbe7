"""The runner's own loop, evaluation and timing pass on pretended cuda:0; its words are BACKBONE FILE METHODS.

Writes for each method and phase what failed and what the host waited for.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.optimization  # noqa: F401 - what it imports looks for real CUDA
from torch.utils._python_dispatch import _disable_current_modes

import moepeft
from benchmarks.backbones.load import find_backbone, load_tokenizer
from benchmarks.backbones.tiny import TINY_MODELS
from benchmarks.cells.data import tokenise_task
from benchmarks.cells.evaluate import evaluate_model
from benchmarks.cells.examination import Examiner
from benchmarks.cells.ledger import Ledger
from benchmarks.cells.timing_pass import measure
from benchmarks.cells.train import TrainingLog, make_trainer, train, training_batches
from benchmarks.families import AnyFamily, family_of
from benchmarks.instruments.processor import prepare_device
from benchmarks.protocols.protocol import Protocol, TimingPlan
from benchmarks.records.provenance import gather
from benchmarks.tasks import load_task
from tests.support.pretended_cuda import Device, pretend

CUDA = torch.device("cuda")
STEPS = 3


def make_protocol(backbone: str) -> Protocol:
    return Protocol(
        name="device",
        tasks=("q_sst2", "q_stsb"),
        backbone=backbone,
        family=TINY_MODELS[backbone][0],
        steps=STEPS,
        batch_size=4,
        train_rows=40,
        eval_rows=4,
        max_length=32,
        precision="bf16",
        log_every=100,  # the first and the last step alone are looked at
        timing=TimingPlan(warmup=1, repeats=1, rows=4, length=8),
    )


class HostBatches:
    """A family whose batches are made of real values: which of a batch's positions are answers is asked on the host."""

    def __init__(self, family: AnyFamily) -> None:
        self.family = family

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.family, name)
        if not name.endswith("_batch"):
            return value

        def make(rows: Any) -> Any:
            with _disable_current_modes():
                return value(rows)

        return make


class Cell:
    """What a cell does on the device, method by method on one backbone."""

    def __init__(self, backbone: str) -> None:
        self.protocol = make_protocol(backbone)
        self.source = find_backbone(backbone)
        data = [load_task(name) for name in self.protocol.tasks]
        family = family_of(self.protocol, load_tokenizer(self.source), [task.spec for task in data])
        self.family: Any = HostBatches(family)
        self.tasks = [tokenise_task(task, family) for task in data]

    def run(self, method: str) -> dict[str, dict[str, Any]]:
        """Phase -> its error, if any, and the waits."""
        model = self.family.load(self.source, 0)
        model.attachment = moepeft.attach(model.backbone, moepeft.method(method, num_tasks=len(self.tasks)))
        ledger = Ledger(self.protocol.tasks)
        found: dict[str, dict[str, Any]] = {}
        # No step was the first bad one, and no value is not a number.
        with pretend(device_value=0, host_value=0) as device:
            model.to(CUDA)
            trainer = make_trainer(model, model.attachment, self.protocol)

            def loop() -> None:
                def on_step(step: int, _: float | None) -> None:
                    found[f"step {step}"] = {"error": None, "waits": dict(device.waits)}
                    device.waits.clear()

                train(
                    trainer,
                    training_batches(self.tasks, self.family, 0, ledger, CUDA),
                    protocol=self.protocol,
                    seed=0,
                    log=TrainingLog(),
                    on_step=on_step,
                    examine=Examiner(trainer, self.tasks, self.family),
                )

            phases: dict[str, Callable[[], object]] = {
                "device": prove_device,
                "loop": loop,
                "evaluation": lambda: evaluate_model(model, self.tasks, self.family, batch_size=4, autocast=True),
                "timing pass": lambda: measure(trainer, self.family, self.protocol.timing),
            }
            for name, work in phases.items():
                found[name] = attempt(work, device)
        return found


def prove_device() -> None:
    """The process has a device of its own, and its records say how that device multiplies."""
    prepare_device(CUDA)
    assert "TF32" in gather(CUDA, "bf16", "").precision


def attempt(work: Callable[[], object], device: Device) -> dict[str, Any]:
    device.waits.clear()
    error = None
    try:
        work()
    except Exception as raised:
        frames = traceback.extract_tb(raised.__traceback__)
        error = f"{type(raised).__name__}: {raised} ({frames[-1].filename}:{frames[-1].lineno})"
    return {"error": error, "waits": dict(device.waits)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    backbone, target, *methods = sys.argv[1:]
    cell = Cell(backbone)
    Path(target).write_text(json.dumps({name: cell.run(name) for name in methods or moepeft.available()}, indent=1))
