"""What a machine with a GPU is to do: in calls that end in time, go on, and repeat nothing."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import call as calls
from benchmarks.gpu.call import Call, end_tree, only_call
from benchmarks.gpu.stages import Options, Stage, plan_stages
from benchmarks.plan.options import Options as RunOptions
from benchmarks.plan.options import resolve_suite
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.flags import parse_flags
from benchmarks.speed.options import Options as SpeedOptions
from benchmarks.speed.options import check

RUNS = "import pathlib; path = pathlib.Path({path!r}); path.open('a').write('run\\n'); {then}"


def stage(folder: Path, name: str, then: str = "", *, resumes: bool = False) -> Stage:
    """A stage that notes each of its runs in its output."""
    output = folder / f"{name}.txt"
    return Stage(name, ("-c", RUNS.format(path=str(output), then=then)), output, resumes)


def call(folder: Path, *stages: Stage, seconds: float = 600) -> tuple[int, str]:
    console = Console(file=io.StringIO(), soft_wrap=True)
    with only_call(folder) as lock:
        code = Call(folder, seconds, lock, console).work_off(stages)
    return code, console.file.getvalue()  # type: ignore[attr-defined]


def runs(stage: Stage) -> int:
    return len(stage.output.read_text().splitlines())


def test_a_stage_that_is_done_is_not_repeated_and_another_command_is_another_stage(tmp_path: Path) -> None:
    one, two = stage(tmp_path, "one"), stage(tmp_path, "two")
    assert call(tmp_path, one)[0] == 0
    assert call(tmp_path, one, two)[0] == 0
    assert (runs(one), runs(two)) == (1, 1)
    call(tmp_path, stage(tmp_path, "one", "pass"))
    assert runs(one) == 2
    one.output.unlink()
    call(tmp_path, one)
    assert runs(one) == 1


def test_a_failed_stage_stops_no_other_one_and_is_tried_again_last(tmp_path: Path) -> None:
    bad, good = stage(tmp_path, "bad", "raise SystemExit(3)"), stage(tmp_path, "good")
    code, said = call(tmp_path, bad, good)
    assert (code, runs(bad), runs(good)) == (1, 1, 1)
    assert "exit code 3" in said
    _, said = call(tmp_path, bad, good)
    assert (runs(bad), runs(good)) == (2, 1)
    assert said.index("good") < said.index("bad")


def test_cells_that_failed_are_tried_again(tmp_path: Path) -> None:
    """A run of the benchmark keeps a failed cell as a row, so that the same words would fail for ever."""
    fails_once = "import sys; sys.exit('again' not in sys.argv)"
    bad = replace(stage(tmp_path, "bad", fails_once), again=("again",))
    assert call(tmp_path, bad)[0] == 1
    assert call(tmp_path, bad)[0] == 0
    assert call(tmp_path, bad)[0] == 0
    assert runs(bad) == 2
    for one in plan_stages(Options(rehearse=True)):
        assert one.again == (("--rerun", "failed") if one.resumes else ())
        if one.resumes:
            parse_flags(RunOptions, [*one.words[2:], *one.again], "benchmarks")


@pytest.mark.parametrize(("resumes", "code"), [(True, calls.EXIT_MORE), (False, calls.EXIT_FAILED)])
def test_a_call_ends_in_time(tmp_path: Path, resumes: bool, code: int) -> None:
    """What cannot go on where it was stopped has failed if a whole call was not enough."""
    endless = stage(tmp_path, "endless", "import time; time.sleep(3600)", resumes=resumes)
    assert call(tmp_path, endless, seconds=0.2)[0] == code
    later = stage(tmp_path, "later")
    assert call(tmp_path, endless, later, seconds=0)[0] == calls.EXIT_MORE
    assert not later.output.exists()


@pytest.mark.slow
def test_nothing_of_a_stopped_stage_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(3600)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {deaf!r}])"
    monkeypatch.setattr(calls, "GRACE", 0.1)
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"deaf\n"
    (child,) = psutil.Process(process.pid).children()
    end_tree(process)
    process.stdout.close()
    assert process.poll() is not None
    assert not child.is_running()


def test_one_call_at_a_time_and_no_more_than_can_be_taken_along(tmp_path: Path) -> None:
    with only_call(tmp_path), pytest.raises(UsageError, match="another call"), only_call(tmp_path):
        pass
    with (tmp_path / "large").open("wb") as file:
        file.truncate(calls.MOST_BYTES + 1)
    one = stage(tmp_path, "one")
    with pytest.raises(UsageError, match="large"):
        call(tmp_path, one)
    assert not one.output.exists()


def test_every_stage_is_a_command_that_its_module_understands() -> None:
    for rehearse in (True, False):
        stages = plan_stages(Options(rehearse=rehearse, data_dir=Path()))
        assert len({stage.name for stage in stages}) == len({stage.output for stage in stages}) == len(stages)
        first_of_kind = {stage.name.partition("-")[0]: stage for stage in stages}
        suites = ["study", "commonsense", "contradiction", *([] if rehearse else ["transfer"])]
        assert list(first_of_kind) == ["tests", "speed", *suites, "compiled"]
        assert Path(first_of_kind["tests"].words[-1]).is_file()
        for timed in (stage for stage in stages if stage.name.startswith(("speed", "compiled"))):
            check(parse_flags(SpeedOptions, timed.words[2:], "speed"))
        for kind in suites:
            resolve_suite(parse_flags(RunOptions, first_of_kind[kind].words[2:], "run"))


def test_wrong_usage_is_answered_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "results")
    for words, message in (
        (["--stages", "nosuch"], "study"),
        (["--minutes", "0"], "--minutes 0"),
        (["--stages", "study"], "--data-dir"),
    ):
        assert command.main(["--results", folder, *words]) == command.EXIT_USAGE
        said = capsys.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1
    assert not Path(folder).exists()
