"""The golden vectors through the library, and the replayer's own failures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import moepeft
from tests.golden import replay

FOLDER = Path(__file__).parent
CASES = sorted(FOLDER.glob("*.json"))
WHOLE = sorted((FOLDER / "whole").glob("*.json"))


@pytest.mark.parametrize("fast", [True, False], ids=["fast paths", "definitions"])
@pytest.mark.parametrize("sidecar", [*CASES, *WHOLE], ids=lambda path: path.stem)
def test_case(sidecar: Path, fast: bool) -> None:
    with moepeft.fast_paths(fast):
        assert replay.check_file(sidecar).within


def test_every_replayer_has_cases() -> None:
    assert {json.loads(path.read_text())["method"] for path in CASES} == set(replay.replayers())


def copy(case: str, folder: Path) -> Path:
    for suffix in (".json", ".safetensors"):
        shutil.copy(FOLDER / f"{case}{suffix}", folder)
    return folder / f"{Path(case).name}.json"


def edit(sidecar: Path, change: Callable[[dict[str, Any]], object]) -> None:
    description = json.loads(sidecar.read_text())
    change(description)
    sidecar.write_text(json.dumps(description))


@pytest.mark.parametrize("name", ["y", "grad.A", "aux_loss"])
def test_a_changed_number_fails(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = copy("ept_released__48x48_k2_t0", tmp_path).with_suffix(".safetensors")
    tensors = load_file(weights)
    tensors[name].view(-1)[0] += 1e-6
    save_file(tensors, weights)
    assert replay.main([str(tmp_path)]) == 1
    assert "ABOVE TOLERANCE" in capsys.readouterr().out


def test_what_cannot_be_replayed_fails_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy("lora_peft__48x48", tmp_path), lambda d: d.update(method="unheard_of"))
    edit(copy("lora_peft__48x96", tmp_path), lambda d: d["tensors"].pop("A"))
    copy("lora_peft__96x48", tmp_path)
    assert replay.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "no replayer for method 'unheard_of'" in out
    assert "name different things: ['A']" in out
    assert "1 passed, 2 failed" in out


def test_a_changed_number_of_a_whole_model_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = copy("whole/tucka_deberta", tmp_path).with_suffix(".safetensors")
    tensors = load_file(weights)
    tensors["expected/grad_lm/router/EC"].view(-1)[0] += 1e-6
    save_file(tensors, weights)
    assert replay.main([str(tmp_path)]) == 1
    assert "ABOVE TOLERANCE" in capsys.readouterr().out


def test_a_folder_without_cases_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(tmp_path)]) == 2
    assert "no golden case" in capsys.readouterr().err
