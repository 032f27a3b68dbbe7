"""The verdict: answers and rulings come from records; what is missing is said or refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from benchmarks import report
from benchmarks.mechanisms.asked import Asked
from benchmarks.mechanisms.command import run_mechanisms
from benchmarks.mechanisms.experiments import Experiment
from benchmarks.mechanisms.frame import Incomplete
from benchmarks.records.schema import Tuning
from benchmarks.report import Options, run
from benchmarks.reporting.build import write_report
from benchmarks.verdict.claims import (
    CountClaim,
    ExperimentClaim,
    Found,
    MergeClaim,
    MultiplierClaim,
    SuiteClaim,
    read_claims,
    rule_on_claims,
)
from benchmarks.verdict.contest import find_best
from benchmarks.verdict.evidence import Answer, Evidence, Mechanism, Strength
from benchmarks.verdict.page import write_verdict
from benchmarks.verdict.questions import answer_all
from tests.benchmarks.unit.test_mechanism_suite import TINY
from tests.support.tables import fill

CONFLICT = TINY.model_copy(update={"name": "conflict", "oracle": "lora-per-task"})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite and an experiment below one root."""
    root = tmp_path_factory.mktemp("work") / "results"
    fill(root / "small", tuned=Tuning(rates=(1e-4, 1e-3), seed=1000, steps=20, head_learning_rate=None))
    write_report(root / "small")
    methods = ("moelora", "mixlora")
    run_mechanisms([CONFLICT], methods, root / "mechanisms", jobs=1, command="as typed", say=lambda _: None)
    return root


@pytest.fixture
def work(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may damage; the current folder."""
    shutil.copytree(results, tmp_path / "results")
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pretend(scores: dict[str, list[float]], *, experiment: Experiment = CONFLICT, **columns: object) -> Mechanism:
    """An experiment whose teacher of conflict 1 gave these scores by seed."""
    rows = [
        {"method": method, "conflict": 1.0, "seed": seed, "score": score, "bound": 0.1, "size": np.nan}
        | {"at_edge": False}
        | columns
        for method, own in scores.items()
        for seed, score in enumerate(own)
    ]
    seeds = tuple(range(len(next(iter(scores.values())))))
    asked = Asked(experiment=experiment.model_copy(update={"seeds": seeds}), methods=tuple(scores), command="none")
    return Mechanism(asked, pd.DataFrame(rows))


def with_mechanisms(**mechanisms: Mechanism) -> Evidence:
    evidence = Evidence(Path("nowhere"))
    evidence.__dict__["mechanisms"] = mechanisms
    return evidence


def answered(about: str, **mechanisms: Mechanism) -> Answer:
    """The answer to the one question that has these words."""
    (answer,) = (one for one in answer_all(with_mechanisms(**mechanisms)) if about in one.question)
    return answer


SCORES = {
    "lora": [0.10, 0.11, 0.09, 0.10],
    "moelora": [0.99, 1.00, 0.98, 0.97],
    "more": [0.98, 1.00, 0.99, 0.99],
    "mixlora": [0.30, 0.31, 0.29, 0.31],
    "lora-per-task": [1.0, 1.0, 1.0, 1.0],
}


# ---------------------------------------------------------------------- answers


def test_the_best_is_named_with_whom_it_beats_and_whom_it_does_not() -> None:
    answer = answered("contradict", conflict=pretend(SCORES, swap_loss=0.5))
    first = answer.sentences[0]
    beaten, _, near = first.partition("as good, or not told apart:")
    assert "moelora explains" in beaten or "more explains" in beaten
    assert {"lora", "mixlora"} <= set(beaten.replace(",", " ").replace(";", " ").split())
    assert near.strip(" .") in ("more", "moelora")
    assert answer.strength is Strength.PARTLY


def test_a_difference_that_nobody_would_see_counts_as_none_however_certain() -> None:
    scores = SCORES | {"more": [score - 0.004 - seed / 1e5 for seed, score in enumerate(SCORES["moelora"])]}
    contest = find_best(pretend(scores).at(conflict=1.0).query("method != 'lora-per-task'"))
    assert (contest.best, contest.near) == ("moelora", ("more",))
    assert set(contest.below) == {"lora", "mixlora"}


def test_a_method_that_failed_on_a_seed_neither_wins_nor_loses() -> None:
    scores = SCORES | {"more": [1.5, 1.6, 1.5, float("nan")]}
    answer = answered("contradict", conflict=pretend(scores, swap_loss=0.5))
    assert answer.choice == "moelora"
    assert "failed on a seed: more" in answer.sentences[0]
    assert answer.strength is Strength.PARTLY
    broken = {name: [float("nan")] * 4 for name in SCORES}
    assert answered("contradict", conflict=pretend(broken, swap_loss=0.5)).strength is Strength.UNDECIDED


def test_nothing_is_decided_above_a_method_whose_rate_is_at_an_edge() -> None:
    found = pretend(SCORES, swap_loss=0.5)
    found.frame["at_edge"] = found.frame["method"] == "lora"
    contest = find_best(found.at(conflict=1.0).query("method != 'lora-per-task'"))
    assert "lora" in contest.near
    assert rule_on_claims(with_mechanisms(conflict=found), [claim("moelora", "lora")])[0].ruling == "undecided here"


def test_merged_without_latency_is_what_the_tables_say(tmp_path: Path) -> None:
    folder = tmp_path / "speed-merged" / "tables"
    folder.mkdir(parents=True)
    text = (
        "## Speed of minilm, fp32\n\n### Prefill\n\n"
        "| contestant | x peft |\n|:--|--:|\n| frozen | 0.77 (0.73 to 0.79) |\n| ept (merged) | {} |\n"
    )
    one = MergeClaim(text="?", source="?", kind="merges", method="ept")
    for cell, ruling in (("0.75 (0.73 to 0.79)", "reproduced"), ("0.95 (0.93 to 0.99)", "not reproduced")):
        (folder / "speed.md").write_text(text.format(cell))
        assert rule_on_claims(Evidence(tmp_path), [one])[0].ruling == ruling
    assert Evidence(tmp_path).merged[0].link.text == "Prefill (minilm, fp32)"  # tables of two models differ by it
    assert rule_on_claims(Evidence(tmp_path / "nowhere"), [one])[0].ruling == "untested here"
    other = one.model_copy(update={"method": "mixlora"})
    assert rule_on_claims(Evidence(tmp_path), [other])[0].ruling == "not reproduced"


def test_the_fastest_says_in_how_many_tables_it_is_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "speed" / "tables"
    folder.mkdir(parents=True)
    for host, lora, tucka in (("minilm", 0.99, 0.94), ("t5-base", 1.02, 1.21), ("llama-2-7b", 0.95, 1.05)):
        (folder / f"{host}.md").write_text(
            f"## Speed of {host}, fp32\n\n### Training step: 32 x 64 tokens\n\n| contestant | x peft |\n|:--|--:|\n"
            f"| frozen | 0.5 |\n| lora | {lora} (0.9 to 1.1) |\n| tucka | {tucka} (0.9 to 1.3) |\n"
        )
    answer = next(each for each in answer_all(Evidence(tmp_path)) if each.question.startswith("Fastest"))
    assert answer.choice == "lora (2 of 3), tucka (1 of 3)"


def test_the_best_is_told_for_every_kind_of_update() -> None:
    one, other = pretend(SCORES, swap_loss=0.5), pretend(SCORES | {"lora": [1.6, 1.7, 1.5, 1.6]}, swap_loss=0.5)
    frame = pd.concat([one.frame.assign(structure="pool"), other.frame.assign(structure="nested")])
    asked = one.asked.model_copy(update={"experiment": CONFLICT.model_copy(update={"teacher": {"conflict": 0.25}})})
    answer = answered("contradict", conflict=one, structures=Mechanism(asked, frame))
    (told,) = (sentence for sentence in answer.sentences if "kind of update" in sentence)
    assert "at conflict 0.25: pool: more (as good: moelora); nested: lora." in told


def test_an_oracle_is_no_answer() -> None:
    for answer in (
        answered("contradict", conflict=pretend(SCORES, swap_loss=0.5)),
        answered("merged", conflict=pretend(SCORES, swap_loss=0.5)),
    ):
        assert not any(sentence.startswith("lora-per-task") for sentence in answer.sentences)


def test_what_cannot_be_merged_does_not_win_among_what_must_be() -> None:
    scores = SCORES | {"mixlora": [2.0, 2.1, 2.2, 2.0]}
    answer = answered("merged", conflict=pretend(scores, swap_loss=0.5))
    assert answer.sentences[0].startswith("mixlora ")
    assert "mixlora" not in answer.sentences[1]


def test_methods_that_ids_do_not_reach_are_found_by_their_answers() -> None:
    found = pretend(SCORES)
    found.frame["swap_loss"] = found.frame["method"].map({"lora": 0.0, "mixlora": 0.0}).fillna(0.4)
    answer = answered("No task ids", conflict=found)
    assert answer.sentences[0].startswith("lora, mixlora ")
    assert "mixlora explains" in answer.sentences[1]
    assert answer.strength is Strength.DECIDED


@pytest.mark.parametrize(
    ("declared", "choice"),
    [
        ({"reference": "alpha"}, "bravo"),
        ({"reference": "bravo"}, "bravo (none is decided to be better)"),
        ({"reference": "alpha", "equivalence_band": 90.0}, "alpha (as good: bravo, charlie)"),
    ],
)
def test_without_a_better_one_the_answer_is_the_reference(tmp_path: Path, declared: Any, choice: str) -> None:
    tuned = Tuning(rates=(1e-4, 1e-3), seed=1000, steps=20, head_learning_rate=None)
    fill(tmp_path / "small", protocol=declared, tuned=tuned)
    assert answer_all(Evidence(tmp_path))[0].choice == choice


def test_runs_of_tasks_that_contradict_each_other_are_no_answer_for_related_ones(work: Path) -> None:
    tuned = Tuning(rates=(1e-4, 1e-3), seed=1000, steps=20, head_learning_rate=None)
    fill(work / "results/flips", protocol={"heads": "shared"}, tuned=tuned)
    related, contradicting, *others = answer_all(Evidence(work / "results"))
    assert not any("flips" in sentence for answer in (related, *others) for sentence in answer.sentences)
    (told,) = (sentence for sentence in contradicting.sentences if sentence.startswith("flips, "))
    assert "beside " in told
    assert contradicting.evidence[-1].path == "flips/tables/comparison.md"


def test_what_was_not_run_is_said_with_its_command(tmp_path: Path) -> None:
    answers = answer_all(Evidence(tmp_path))
    assert len(answers) == 7
    assert {answer.strength for answer in answers} == {Strength.NOT_RUN}
    assert all("python -m benchmarks." in answer.sentences[0] for answer in answers)


# ---------------------------------------------------------------------- claims


def claim(method: str, than: str | None, *, below: bool = False) -> ExperimentClaim:
    return ExperimentClaim(
        text="?", source="?", kind="experiment", experiment="conflict", where={"conflict": 1.0}, measure="score",
        method=method, than=than, below=below,
    )  # fmt: skip


def test_rulings_follow_paired_t_and_holm() -> None:
    evidence = with_mechanisms(conflict=pretend(SCORES))
    asked = [
        claim("moelora", "lora"),
        claim("lora", "moelora"),
        claim("moelora", "more"),
        claim("lora", "bound"),
        claim("lora", "moelora", below=True),
        claim("ept", "lora"),
    ]
    ruled = rule_on_claims(evidence, asked)
    rulings = [one.ruling for one in ruled]
    assert rulings == ["reproduced", "refuted here", "undecided here", "undecided here", "reproduced", "untested here"]
    difference = np.subtract(SCORES["moelora"], SCORES["lora"])
    assert ruled[0].found.p == pytest.approx(stats.ttest_1samp(difference, 0).pvalue)


def test_one_claim_among_many_needs_more() -> None:
    scores = SCORES | {"ept": [0.12, 0.14, 0.10, 0.13]}
    evidence = with_mechanisms(conflict=pretend(scores))
    p = claim("ept", "lora").test(evidence).p
    assert p is not None
    assert p < 0.05
    assert rule_on_claims(evidence, [claim("ept", "lora")])[0].ruling == "reproduced"
    many = [claim("ept", "lora"), *[claim("moelora", "more")] * 3, claim("lora", "bound")]
    adjusted = multipletests([one.test(evidence).p for one in many], method="holm")[1][0]
    expected = "reproduced" if adjusted < 0.05 else "undecided here"
    assert rule_on_claims(evidence, many)[0].ruling == expected


def test_a_score_that_is_never_reached_refutes_fewer_parameters() -> None:
    sizes = CONFLICT.model_copy(update={"name": "sizes", "ranks_of_reference": (1, 2)})
    rows = [
        {"method": method, "conflict": 0.0, "seed": seed, "size": size, "parameters": 100 * size, "score": score}
        for seed in range(8)
        for method, score in (("lora", 0.9), ("tucka", 0.2))
        for size in (1, 2)
    ]
    asked = Asked(experiment=sizes.model_copy(update={"seeds": tuple(range(8))}), methods=(), command="none")
    evidence = with_mechanisms(sizes=Mechanism(asked, pd.DataFrame(rows)))
    one = MultiplierClaim(
        text="?", source="?", kind="multiplier", experiment="sizes", where={"conflict": 0.0}, method="tucka"
    )
    assert rule_on_claims(evidence, [one])[0].ruling == "refuted here"


def sizes_of(seeds: int, spread: float) -> Mechanism:
    """Twice as many parameters for each rank; moelora has the score of lora at half of them, but for the spread."""
    sizes = CONFLICT.model_copy(
        update={"name": "sizes", "ranks_of_reference": (1, 2, 4), "vary": {"conflict": (1.0,)}, "seeds": range(seeds)}
    )
    rng = np.random.default_rng(0)
    rows = [
        {"method": method, "conflict": 1.0, "seed": seed, "size": size, "parameters": 100 * size, "at_edge": False}
        | {"score": 0.1 * (rank + gain + spread * rng.normal())}
        for seed in range(seeds)
        for method, gain in (("lora", 0.0), ("moelora", 1.0))
        for rank, size in enumerate((1, 2, 4))
    ]
    return Mechanism(Asked(experiment=sizes, methods=(), command="none"), pd.DataFrame(rows))


def test_fewest_parameters_are_decided_by_holm_and_not_by_one_seed() -> None:
    decided = answered("Fewest parameters", sizes=sizes_of(8, 0.02))
    assert (decided.choice, decided.strength) == ("moelora", Strength.DECIDED)
    assert "compared with lora alone" in decided.sentences[-1]
    assert answered("Fewest parameters", sizes=sizes_of(8, 3.0)).strength is Strength.UNDECIDED
    assert answered("Fewest parameters", sizes=sizes_of(1, 0.0)).strength is Strength.UNDECIDED


def test_five_seeds_are_too_few_for_a_sign_test() -> None:
    one = MultiplierClaim(
        text="?", source="?", kind="multiplier", experiment="sizes", where={"conflict": 1.0}, method="moelora"
    )
    few, enough = (one.test(with_mechanisms(sizes=sizes_of(seeds, 0.0))) for seeds in (5, 6))
    assert few.p == pytest.approx(2 * 0.5**5)
    assert "too few for a sign test" in few.words
    assert "too few" not in enough.words
    assert enough.holds
    assert "its smallest size reaches it" in enough.words
    failed = sizes_of(6, 0.0)
    failed.frame.loc[(failed.frame["method"] == "lora") & (failed.frame["seed"] == 0), "score"] = np.nan
    assert one.test(with_mechanisms(sizes=failed)).p == few.p  # no sign where the reference failed


def test_a_count_that_no_convention_gives_is_not_reproduced(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    text = "# x\n\n| setting | method | verdict | source |\n|:--|:--|:--|:--|\n| s | ept | {} | paper |\n"
    one = CountClaim(text="?", source="?", kind="count", setting="s", methods=("ept",))
    for verdict, expected in (("reproduced: all", "reproduced"), ("unexplained: none", "not reproduced")):
        (tmp_path / "tables" / "claims.md").write_text(text.format(verdict))
        assert rule_on_claims(Evidence(tmp_path), [one])[0].ruling == expected


@pytest.mark.slow
def test_a_suite_claim_is_the_paired_difference_of_the_records(results: Path) -> None:
    evidence = Evidence(results)
    one = SuiteClaim(text="?", source="?", kind="suite", suites=("small",), method="bravo", than="alpha")
    found: Found = one.test(evidence)
    assert found.p is not None
    assert found.evidence[0].path.startswith("small/")
    other = one.model_copy(update={"method": "alpha", "than": "bravo"}).test(evidence)
    assert other.p == pytest.approx(found.p)
    assert other.holds is not found.holds


def test_every_claim_of_the_file_names_what_exists() -> None:
    claims = read_claims()
    assert len(claims) > 20
    assert len({(one.text, one.source) for one in claims}) == len(claims)


# ---------------------------------------------------------------------- the page and its records


@pytest.mark.slow
def test_the_committed_page_is_checked(work: Path) -> None:
    assert run(Options(verdict=True)) == 0
    assert run(Options(verdict=True, check=True)) == 0
    page = work / "docs" / "verdict.md"
    page.write_text(page.read_text().replace("explains", "nearly explains"))
    assert run(Options(verdict=True, check=True)) == 1
    table = work / "results" / "mechanisms" / "tables" / "conflict-scores.md"
    table.write_text(table.read_text() + "x")
    assert run(Options(check=True)) == 1


@pytest.mark.slow
def test_the_page_is_made_of_what_git_knows(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever tries the quick comparison in a checkout does not change what the project says."""

    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], check=True, capture_output=True)

    git("init")
    assert run(Options(verdict=True)) == 0  # git knows nothing: all is the user's
    shutil.copytree(work / "results" / "small", work / "results" / "own")
    assert run(Options()) == 0
    assert run(Options(verdict=True, check=True)) == 1
    git("add", "results/small", "results/mechanisms")
    capsys.readouterr()
    assert run(Options(verdict=True, check=True)) == 0
    assert "results/own" in capsys.readouterr().err
    git("add", "results/own")
    assert run(Options(verdict=True, check=True)) == 1


@pytest.mark.slow
def test_the_block_of_a_readme_follows_the_records(work: Path) -> None:
    readme = work / "README.md"
    markers = ("verdict:begin", "verdict:end", "results:begin results/small", "results:end")
    readme.write_text("# x\n" + "".join(f"<!-- {marker} -->\n" for marker in markers))
    assert run(Options(readme=readme, check=True)) == 1
    assert run(Options(readme=readme)) == 0
    text = readme.read_text()
    assert text.count("<!-- verdict:begin -->") == text.count("<!-- verdict:end -->") == 1
    assert len([line for line in text.splitlines() if line.startswith("| ") and "not run" in line]) == 3
    assert run(Options(readme=readme, check=True)) == 0


@pytest.mark.slow
def test_every_link_of_the_page_leads_to_a_file(work: Path) -> None:
    text = write_verdict(Evidence(work / "results"))
    links = re.findall(r"\]\(\.\./(results/[^)]+)\)", text)
    assert links
    assert all((work / link).is_file() for link in links)


def test_a_deleted_run_is_refused_and_a_deleted_record_changes_the_page(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = write_verdict(Evidence(work / "results"))
    record = next((work / "results" / "small" / "records").glob("bravo-s0*.json"))
    record.unlink()
    assert write_verdict(Evidence(work / "results")) != before
    archive = work / "results" / "mechanisms" / "runs.jsonl"
    lines = archive.read_text().splitlines()
    reported = next(line for line in lines if json.loads(line)["run"]["seed"] == 0)
    archive.write_text("\n".join(line for line in lines if line != reported) + "\n")
    with pytest.raises(Incomplete):
        write_verdict(Evidence(work / "results"))
    monkeypatch.setattr("sys.argv", ["report", "--verdict", "--check"])
    capsys.readouterr()
    assert report.main() == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "missing" in line


def test_a_damaged_note_of_what_was_asked_is_one_line(work: Path) -> None:
    (work / "results" / "mechanisms" / "asked" / "conflict.json").write_text("{}")
    with pytest.raises(report.RecordError, match=r"conflict\.json"):
        run(Options(verdict=True))
