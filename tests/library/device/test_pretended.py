"""Every method on pretended cuda:0: no operation mixes devices, no steady step makes the host wait for the device."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import moepeft
from tests.support.asked import asked
from tests.support.variants import variants

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ builds the device guard that torch without CUDA lacks"),
]

ROOT = Path(__file__).resolve().parents[3]
HOSTS = ("bert", "t5", "llama", "deberta")
VARIANTS = variants(num_tasks=3)
PUBLISHED = "@published"


@pytest.fixture(scope="module")
def walked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Host -> configuration -> phase -> what was found; each host has a process of its own.

    Processes of pytest-xdist share what one of them found.
    """
    shared = tmp_path_factory.getbasetemp()
    folder = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared

    @functools.cache
    def walk(host: str, module: str = "walk") -> dict[str, dict[str, dict[str, Any]]]:
        path = folder / f"{module}-{host}.json"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                cases = asked(request, "host", "label") if module == "walk" else []
                run_device(module, host, str(path), *(str(label) for at, label in cases if at == host))
        found: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text())
        return found

    return walk


def run_device(module: str, *words: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.with_cuda_guard", f"tests.library.device.{module}", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def must_refuse(label: str) -> bool:
    """These hosts put the batch first."""
    return not VARIANTS[label].capabilities.batch_first


def may_refuse(host: str, label: str) -> bool:
    """DeBERTa's projections also read a table of positions, which has no rows whose task or padding could be asked."""
    return host == "deberta" and VARIANTS[label].capabilities.routing == "token"


@pytest.mark.parametrize("label", VARIANTS)
@pytest.mark.parametrize("host", HOSTS)
def test_every_phase_stays_on_the_device(walked: Any, host: str, label: str) -> None:
    phases = walked(host)[label]
    errors = {name: phase["error"] for name, phase in phases.items() if phase["error"]}
    if host == "deberta" and VARIANTS[label].capabilities.routing == "task":
        # Its table of positions belongs to no task, so that a task cannot be merged.
        assert "NotMergeable" in errors.pop("merge", "NotMergeable")
    if must_refuse(label) or (may_refuse(host, label) and errors):
        assert errors
        assert all("MissingRouting" in error for error in errors.values())
        return
    assert not errors
    waits = {name: phase["waits"] for name, phase in phases.items() if name.startswith("steady")}
    assert {"steady step", "steady checkpointed step", "steady evaluation"} <= set(waits)
    ours = {name: [wait for wait in found if "transformers" not in wait] for name, found in waits.items()}
    if not VARIANTS[label].capabilities.cache_consistent:
        # What a prompt has left holds if the cache holds a prompt: the host asks once per token.
        assert len(ours.pop("steady decoding", [])) <= 1
    assert not any(ours.values()), ours


@pytest.mark.parametrize("method", moepeft.available())
@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-llama"])
def test_the_runner_stays_on_the_device(walked: Any, backbone: str, method: str) -> None:
    phases = walked(backbone, "loop")[method]
    assert not {name: phase["error"] for name, phase in phases.items() if phase["error"]}
    steps = {name: phase["waits"] for name, phase in phases.items() if name.startswith("step ")}
    assert list(steps) == ["step 1", "step 2", "step 3"]
    del steps["step 1"]  # a method may look at its first batch
    ours = {name: [wait for wait in waits if "transformers" not in wait] for name, waits in steps.items()}
    assert not any(ours.values()), ours


@pytest.mark.parametrize("label", [label for label, each in VARIANTS.items() if each.capabilities.batch_first])
def test_faults_put_into_a_site_by_hand_are_found(walked: Any, label: str) -> None:
    """In a site of every configuration: a value that is read, and a tensor that is made on the host."""
    found = walked(PUBLISHED if label.endswith(PUBLISHED) else "", "spoilt")[label]
    assert any("spoilt.py" in wait for wait in found["reads a value"]["waits"])
    assert found["reads a value"]["error"] is None
    assert "device" in found["makes a tensor on the host"]["error"]


# Of a step at T5-base's shapes in bf16, for each adapted layer: the `peft` package's LoRA has 18. Whoever makes a
# method leaner lowers its number. A cache that fails under autocast shows here: shares of tokens cost 2.5 operations.
MOST_OPERATIONS = {"lora": 11, "mixlora": 20.5, "moelora": 17, "more": 22.5, "tucka": 22, "ept": 27}


def test_steps_at_true_shapes_have_few_operations(tmp_path: Path) -> None:
    run_device("operations", ",".join(MOST_OPERATIONS), str(tmp_path / "counted.json"))
    counted = json.loads((tmp_path / "counted.json").read_text())
    assert {method: number for method, number in counted.items() if number > MOST_OPERATIONS[method]} == {}
