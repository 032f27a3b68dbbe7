"""The report of a results folder: its files, the check, the README, the command line."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import report
from benchmarks.records.frame import NoRecordsError, Results
from benchmarks.records.store import Store
from benchmarks.report import Options, run
from benchmarks.reporting.build import build_report, find_differences, write_files, write_report
from benchmarks.reporting.footnotes import records_hash
from benchmarks.reporting.scores import scores_table
from tests.support.record_factory import make_record
from tests.support.tables import fill


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("work") / "results" / "small"
    fill(root)
    write_report(root, "alpha")
    return root


# ---------------------------------------------------------------------- files


def test_protocols_never_share_a_table(tmp_path):
    store = fill(tmp_path, seeds=(0,))
    store.put(*make_record("alpha", protocol={"steps": 7}))
    made = build_report(tmp_path)
    frame = pd.read_csv(io.BytesIO(made.tables["tables/parameters.csv"]), comment="#")
    assert frame["protocol"].value_counts().to_dict() == {"small (steps=100)": 5, "small (steps=7)": 1}
    assert len([name for name in made.figures if name.startswith("figures/score-parameters")]) == 2


def test_every_table_in_three_formats_and_the_figures(filled):
    names = {
        path.relative_to(filled).as_posix() for path in filled.glob("*/*") if path.suffix not in {".json", ".parquet"}
    }
    tables = {f"tables/{name}.{kind}" for name in ("scores", "comparison", "ranks", "parameters", "throughput")
              for kind in ("md", "csv", "tex")}  # fmt: skip
    figures = {"score-parameters", "score-step-time", "training-curves", "critical-difference"}
    assert names == tables | {f"figures/{name}.svg" for name in figures}
    header = (
        "Written by `python -m benchmarks.report --results results/small --reference alpha` from records with SHA-256 "
    )
    for name in names:
        assert header + records_hash(Store(filled).all()) in (filled / name).read_text()


def test_same_records_elsewhere_give_the_same_bytes(filled, tmp_path):
    copy = tmp_path / "results" / "small"
    for folder in ("records", "outcomes"):
        shutil.copytree(filled / folder, copy / folder)
    write_report(copy, "alpha")
    for path in sorted([*filled.glob("tables/*"), *filled.glob("figures/*")]):
        assert (copy / path.relative_to(filled)).read_bytes() == path.read_bytes(), path.name


def test_second_report_touches_nothing(filled):
    before = {path: path.stat().st_mtime_ns for path in filled.rglob("*") if path.is_file()}
    write_report(filled, "alpha")
    assert {path: path.stat().st_mtime_ns for path in filled.rglob("*") if path.is_file()} == before


def test_csv_holds_the_unrounded_numbers(filled):
    frame = pd.read_csv(filled / "tables" / "scores.csv", comment="#")
    expected = scores_table(Results.load(filled).frame()).data
    assert frame["mean"].to_numpy() == pytest.approx(expected["mean"].to_numpy(float), rel=1e-11)
    assert list(frame["method"]) == list(expected["method"])


def test_csv_keeps_whole_numbers_whole_beside_a_failure(tmp_path):
    store = fill(tmp_path, seeds=(0,))
    failed, _ = make_record("delta", status="error", reason="no")
    store.put(failed.model_copy(update={"parameters": None}))
    text = build_report(tmp_path).tables["tables/parameters.csv"].decode()
    assert ",1000000," in text
    assert "delta" in text


def test_latex_escapes_what_latex_would_read(tmp_path):
    store = Store(tmp_path)
    store.put(*make_record("under_score", config={"share": "50%"}))
    store.put(*make_record("under_score", config={"share": "60%"}))
    text = build_report(tmp_path).tables["tables/scores.tex"].decode()
    assert r"under\_score (share=50\%)" in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 1
    body = "".join(line for line in text.splitlines() if not line.startswith("%"))
    assert body.replace(r"\_", "").count("_") == 0
    assert body.replace(r"\%", "").count("%") == 0


def test_pipes_do_not_break_a_markdown_row(tmp_path):
    store = Store(tmp_path)
    store.put(*make_record("a|b"))
    assert r"a\|b" in write_report(tmp_path).markdown


# ---------------------------------------------------------------------- check, README, difference, command line


def test_check_names_what_differs(filled, tmp_path):
    root = tmp_path / "results" / "small"
    shutil.copytree(filled, root)
    report_ = build_report(root, "alpha")
    assert find_differences(root, report_) == []
    (root / "tables" / "scores.md").write_text("better")
    (root / "figures" / "training-curves.svg").unlink()
    (root / "tables" / "notes.md").write_text("mine")
    stale = root / "tables" / "old.md"
    stale.write_text("<!-- Written by `python -m benchmarks.report --results x` from records -->")
    expected = [root / "figures" / "training-curves.svg", root / "tables" / "old.md", root / "tables" / "scores.md"]
    assert find_differences(root, report_) == expected
    write_files(root, report_)
    assert find_differences(root, report_) == []
    assert not stale.exists()
    assert (root / "tables" / "notes.md").read_text() == "mine"


def test_reference_of_the_protocol_is_taken(tmp_path):
    fill(tmp_path, protocol={"reference": "alpha", "equivalence_band": 90.0})
    text = build_report(tmp_path).tables["tables/comparison.csv"].decode()
    assert text.count("equivalent") == 3


def test_no_records_is_an_error_that_says_what_to_run(tmp_path):
    with pytest.raises(NoRecordsError, match=r"no records under .*benchmarks\.run"):
        write_report(tmp_path)


@pytest.fixture
def readme(filled, tmp_path) -> tuple[Path, Path]:
    root = tmp_path / "results" / "small"
    shutil.copytree(filled, root)
    path = tmp_path / "README.md"
    path.write_text("# Title\n\n<!-- results:begin results/small -->\nold\n<!-- results:end -->\n\nrest\n")
    return path, root


@pytest.mark.slow
def test_readme_block_is_rewritten_and_checked(readme, capsys):
    path, root = readme
    assert run(Options(results=(root,), readme=path, check=True, reference="alpha")) == 1
    assert str(path) in capsys.readouterr().err
    assert run(Options(results=(root,), readme=path, reference="alpha")) == 0
    text = path.read_text()
    assert text.startswith("# Title\n\n<!-- results:begin results/small -->\n")
    assert text.endswith("<!-- results:end -->\n\nrest\n")
    assert "old" not in text
    assert "\n#### Scores (small)\n" in text
    assert "(results/small/tables)" in text
    assert run(Options(results=(root,), readme=path, reference="alpha")) == 0
    assert path.read_text() == text
    assert run(Options(results=(root,), readme=path, check=True, reference="alpha")) == 0


def test_check_writes_nothing(readme, capsys):
    path, root = readme
    (root / "tables" / "scores.md").write_text("better")
    assert run(Options(results=(root,), readme=path, check=True, reference="alpha")) == 1
    assert str(root / "tables" / "scores.md") in capsys.readouterr().err
    assert (root / "tables" / "scores.md").read_text() == "better"
    assert "old" in path.read_text()


def test_the_bytes_of_a_figure_are_not_compared(readme):
    root = readme[1]
    figure = root / "figures" / "training-curves.svg"
    figure.write_text(f"{figure.read_text()}<!-- drawn by another matplotlib -->")
    options = Options(results=(root,), check=True, reference="alpha")
    assert run(options) == 0
    figure.unlink()
    assert run(options) == 1


@pytest.mark.slow
def test_readme_shows_one_folder_and_check_reads_all(readme, monkeypatch):
    path, root = readme
    other = root.parent / "other"
    shutil.copytree(root, other)
    monkeypatch.chdir(path.parent)
    assert run(Options(readme=Path("README.md"), reference="alpha")) == 0
    assert run(Options(readme=Path("README.md"), reference="alpha", check=True)) == 0
    assert "results/other" not in path.read_text()
    assert run(Options(results=(Path("results/other"),), readme=Path("README.md"), reference="alpha", check=True)) == 0
    (other / "tables" / "scores.md").write_text("better")
    assert run(Options(readme=Path("README.md"), reference="alpha", check=True)) == 1


def test_command_line(readme, monkeypatch, capsys):
    path, root = readme
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr("sys.argv", ["report", "--reference", "alpha", "--check"])
    assert report.main() == 0
    monkeypatch.setattr("sys.argv", ["report", "--results", str(root)])
    assert report.main() == 0
    assert "### Scores (small)" in capsys.readouterr().out
    path.write_text("no markers")
    monkeypatch.setattr("sys.argv", ["report", "--readme", "README.md"])
    assert report.main() == 2
    assert "needs the lines <!-- results:begin" in capsys.readouterr().err
    for arguments in (["--results", "nowhere"], ["--diff", str(root), "nowhere"]):
        monkeypatch.setattr("sys.argv", ["report", *arguments])
        assert report.main() == 2
        assert "no records under nowhere" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["report", "--diff", str(root), str(root)])
    assert report.main() == 0
    assert capsys.readouterr().out.startswith(f"From {root} to {root}")
