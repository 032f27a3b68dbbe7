"""A table of one's own runs beside built-in tasks with one file and one command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.records.frame import Results
from benchmarks.run import main

TOPICS = {
    "sport": "match goal team score coach",
    "food": "soup bread salt dish cook",
    "law": "court judge trial appeal law",
    "sky": "star moon planet orbit comet",
}


@pytest.fixture
def topics(tmp_path: Path) -> Path:
    """300 rows in four classes whose names are texts."""
    lines = ["body,topic"]
    for number in range(300):
        topic = list(TOPICS)[number % 4]
        words = TOPICS[topic].split()
        lines.append(f'"{words[number % 5]} {words[number // 5 % 5]}, number {number}",{topic}')
    (tmp_path / "topics.csv").write_text("\n".join(lines))
    path = tmp_path / "topics.toml"
    path.write_text('name = "topics"\nkind = "classification"\ntext = "body"\nlabel = "topic"\ntrain = "topics.csv"\n')
    return path


def run(topics: Path, results: Path, *flags: str) -> int:
    shared = ["--backbone", "tiny-bert", "--tasks", f"q_rte,{topics}", "--steps", "2", "--batch-size", "8"]
    return main([*shared, "--methods", "lora", "--eval-rows", "10", "--results", str(results), *flags])


@pytest.mark.slow
def test_a_csv_of_four_classes_runs_beside_a_built_in_task(
    topics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(topics, tmp_path / "results") == 0
    printed = capsys.readouterr().out
    assert "topics.csv (SHA-256 " in printed  # the caption names the file and its hash
    frame = Results.load(tmp_path / "results").frame()
    scores = frame[(frame["label"] == "lora") & frame["primary"]]
    assert set(scores["task"]) == {"q_rte", "topics"}
    (record,) = (tmp_path / "results" / "records").glob("lora-*.json")
    cell = json.loads(record.read_text())["cell"]
    assert set(cell["data"]) == {"q_rte", "topics"}
    assert str(topics.parent) not in record.read_text().replace(
        json.loads(record.read_text())["provenance"]["command"], ""
    )


@pytest.mark.slow
def test_changed_rows_are_other_cells(topics: Path, tmp_path: Path) -> None:
    assert run(topics, tmp_path / "results") == 0
    table = topics.parent / "topics.csv"
    table.write_text(table.read_text().replace('number 7"', 'number seven"'))
    assert run(topics, tmp_path / "results") == 0
    assert len(list((tmp_path / "results" / "records").glob("lora-*.json"))) == 2


def test_a_bad_row_is_one_line_with_file_and_row(
    topics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = topics.parent / "topics.csv"
    table.write_text(table.read_text() + "\n,sport")
    assert run(topics, tmp_path / "results") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "topics.csv" in line
    assert "row 300" in line
