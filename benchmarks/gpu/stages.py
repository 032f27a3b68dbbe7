"""The stages: what each runs, and what it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.protocols.errors import UsageError

TESTS = Path("tests/library/device/test_accelerator.py")
SHAPES = ("t5-base", "llama-2-7b")
# Each is a stage: on an H200, six rounds of training steps of six methods on T5-base alone took 95 s, and a stage that
# does not resume has to fit into a call. A rehearsal times dispatch alone.
WORKLOADS = {
    "train": ("--mode", "train"),
    **{
        f"{mode}-{rows}": ("--mode", mode, "--inference-rows", str(rows))
        for mode in ("prefill", "decode")
        for rows in (1, 16)
    },
}
REHEARSED = {"host": ("--mode", "host")}
# Compiling all 32 layers of three contestants takes longer than a call.
COMPILED_LAYERS = {"llama-2-7b": 8}
# The commands of docs/study.md.
STUDIED = "lora,lora@rank=40,moelora,more,mixlora,tucka,tucka@routing=row,ept"
ANSWERED = "lora,moelora,more,mixlora,tucka@routing=row,ept"
SCARCE = (50, 200, 800)


@dataclass(frozen=True)
class Options:
    """Run tests, speed tables and the study on a GPU, piece by piece: give the same command until its exit code is 0.

    The exit code is 0 when all stages are done, 75 when there is more to do, 1 when a stage failed, 2 for wrong usage.
    """

    data_dir: Path | None = None
    """Folder with the suites' data as parquet files."""
    results: Path | None = None
    """Folder for all that is written; unset: results/gpu, of a rehearsal build/gpu-rehearsal."""
    minutes: float = 9
    """Time of one call."""
    stages: tuple[str, ...] = ()
    """Comma-separated stages, by name or by the beginning of names, e.g. tests,speed; unset: all."""
    jobs: int = 8
    """Cells at once: a step of a small model leaves a GPU idle for most of its time. With CUDA's multi-process service
    (nvidia-cuda-mps-control -d) their kernels run side by side; without, they take turns."""
    rehearse: bool = False
    """The same stages with tiny shapes on the CPU."""

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.results or Path("build/gpu-rehearsal" if self.rehearse else "results/gpu")


@dataclass(frozen=True, slots=True)
class Stage:
    """One command.

    Attributes:
        name: in messages and files.
        words: what Python is called with.
        output: what the command writes last.
        resumes: whether the command goes on where it was stopped; else one call must be long enough for it.
        again: what is added to the words where the command failed before.
    """

    name: str
    words: tuple[str, ...]
    output: Path
    resumes: bool = False
    again: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """As one types it."""
        return " ".join(["python", *self.words])


def plan_stages(options: Options) -> list[Stage]:
    """All stages, in their order."""
    import moepeft

    rehearse, folder = options.rehearse, options.folder
    compiled = ("lora",) if rehearse else moepeft.available()
    return [
        _tests(folder),
        *(
            _timed(shape, workload, folder, rehearse=rehearse)
            for shape in SHAPES
            for workload in (REHEARSED if rehearse else WORKLOADS)
        ),
        _study(options),
        _commonsense(options),
        _contradiction(options),
        *(() if rehearse else (_transfer(options, rows) for rows in SCARCE)),  # no task that comes along is scarce
        *(_compiled(shape, name, folder, rehearse=rehearse) for shape in SHAPES for name in compiled),
    ]


def _tests(folder: Path) -> Stage:
    output = folder / "tests.xml"
    return Stage("tests", ("-m", "pytest", "-q", "-m", "gpu", f"--junitxml={output}", str(TESTS)), output)


def _speed(shape: str, folder: Path, *more: str, name: str, methods: str = "all", rehearse: bool) -> Stage:
    """Every contestant in one sitting: a ratio is one of turns in one sitting."""
    output = folder / f"{shape}.json"
    flags = ["--backbone", shape, "--dtype", "bf16", "--results", str(folder), "--json", str(output), *more]
    if rehearse:
        flags += ["--methods", "lora", "--device", "cpu", "--warmup", "1", "--repeats", "1"]
    else:
        flags += ["--methods", methods, "--device", "cuda"]
    return Stage(name, ("-m", "benchmarks.speed", *flags), output)


def _timed(shape: str, workload: str, folder: Path, *, rehearse: bool) -> Stage:
    """All methods at one workload."""
    flags, name = (REHEARSED if rehearse else WORKLOADS)[workload], f"speed-{shape}-{workload}"
    return _speed(shape, folder / "speed" / workload, *flags, name=name, rehearse=rehearse)


def _compiled(shape: str, method: str, folder: Path, *, rehearse: bool) -> Stage:
    """One method beside the references, all compiled: a sitting for all methods would be one of hours."""
    layers = COMPILED_LAYERS.get(shape)
    flags = REHEARSED["host"] if rehearse else WORKLOADS["train"]
    more = () if layers is None or rehearse else ("--layers", str(layers))
    name, own = f"compiled-{shape}-{method}", folder / "compiled" / method
    return _speed(shape, own, *flags, *more, "--compile", name=name, methods=method, rehearse=rehearse)


def _study(options: Options) -> Stage:
    tiny = ("--methods", "lora", "--tasks", "q_sst2", "--backbone", "tiny-bert")
    return _suite(options, "study", "glue", ("--methods", STUDIED, "--seeds", "0,1,2,3,4"), tiny)


def _commonsense(options: Options) -> Stage:
    tiny = ("--methods", "lora", "--tasks", "q_openbookqa", "--backbone", "tiny-llama")
    full = ("--methods", ANSWERED, "--seeds", "0,1,2")
    return _suite(options, "commonsense", "commonsense-smollm2", full, tiny)


def _contradiction(options: Options) -> Stage:
    tiny = ("--methods", "lora", "--tasks", "q_sst2,q_sst2_flipped", "--backbone", "tiny-bert")
    full = ("--methods", f"{ANSWERED},lora-per-task", "--seeds", "0,1,2,3,4")
    return _suite(options, "contradiction", "conflict-sst2", full, tiny)


def _transfer(options: Options, rows: int) -> Stage:
    full = ("--methods", f"{ANSWERED},lora-per-task", "--seeds", "0,1,2,3,4", "--scarce-rows", str(rows))
    return _suite(options, f"transfer-{rows}", "transfer", full, ())


def _suite(options: Options, name: str, suite: str, full: tuple[str, ...], tiny: tuple[str, ...]) -> Stage:
    folder = options.folder / name
    flags = ["--suite", suite, "--results", str(folder)]
    if options.rehearse:
        flags += [*tiny, "--steps", "2", "--tune", "none", "--eval-rows", "8", "--device", "cpu"]
    else:
        # fp32, as on a CPU. The steps of a small model are launches, of which autocast makes more.
        flags += [*full, "--data-dir", str(options.data_dir), "--device", "cuda", "--precision", "fp32"]
        flags += ["--jobs", str(options.jobs)]
    words, output = ("-m", "benchmarks.run", *flags), folder / "tables" / "scores.md"
    return Stage(name, words, output, resumes=True, again=("--rerun", "failed"))


def choose_stages(options: Options) -> list[Stage]:
    """The stages that are asked for; raises `UsageError` for what cannot be done here."""
    stages = plan_stages(options)
    for asked in options.stages:
        if not any(stage.name.startswith(asked) for stage in stages):
            raise UsageError(f"--stages {asked}: no stage begins so; give some of {', '.join(s.name for s in stages)}")
    chosen = [stage for stage in stages if not options.stages or stage.name.startswith(options.stages)]
    if options.jobs < 1:
        raise UsageError(f"--jobs {options.jobs}: give the number of cells to run at once, 1 or more")
    if not options.minutes > 0:
        raise UsageError(f"--minutes {options.minutes}: give the minutes of one call, more than 0")
    if not TESTS.is_file():
        raise UsageError(f"{TESTS} is not here; run the command from the root of a checkout")
    if options.rehearse:
        return chosen
    if any(stage.resumes for stage in chosen) and not (options.data_dir and options.data_dir.is_dir()):
        raise UsageError(f"--data-dir {options.data_dir}: a suite needs the folder of its data: no stage downloads")
    from benchmarks.backbones.device import resolve_device

    resolve_device("cuda")
    return chosen
