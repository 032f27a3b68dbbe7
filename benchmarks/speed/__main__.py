"""Time every method beside the bare model and the `peft` package: ``python -m benchmarks.speed``.

The pass runs on random weights of the true shapes: speed needs shapes, not weights. All contestants are built first and
then take turns, so that their ratios hold although the machine's speed does not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.flags import parse_flags
from benchmarks.speed.options import Options, check, configure_methods, find_definitions

# Whatever imports torch is imported where it is needed: `--help` and wrong flags answer at once.
if TYPE_CHECKING:
    import torch
    from torch import nn

    from benchmarks.records.schema import Provenance
    from benchmarks.speed.contestants import Entry
    from benchmarks.speed.tables import Outcome

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0 if all contestants ran or cannot, 1 if one failed, 2 for wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_flags(Options, words, "python -m benchmarks.speed")
    try:
        return _main(options, " ".join(["python -m benchmarks.speed", *words]))
    except UsageError as error:
        _console(stderr=True).print(f"error: {error}")
        return EXIT_USAGE


def _console(*, stderr: bool = False) -> Console:
    # Markdown tables and messages are printed as they are: no markup, no wrapping.
    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)


def _main(options: Options, command: str) -> int:
    import torch
    import transformers

    from benchmarks.backbones.device import resolve_device
    from benchmarks.instruments.processor import prepare_device
    from benchmarks.records.provenance import gather
    from benchmarks.speed.contestants import enter
    from benchmarks.speed.hosts import build_host

    check(options)
    entries = enter(configure_methods(options), definitions=find_definitions(options))
    device = resolve_device(options.device)
    prepare_device(device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    provenance = gather(device, options.precision, command)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    host = build_host(options.host, layers=options.layers, device=device, dtype=dtype, tiny=options.tiny)
    outcome = (_grow if options.grow else _compare)(options, entries, host)
    return _conclude(options, outcome, provenance, device)


def _compare(options: Options, entries: Mapping[str, Entry], host: nn.Module) -> Outcome:
    """The tables of all modes and batch sizes."""
    from benchmarks.speed.contestants import line_up, reference_label
    from benchmarks.speed.rows import Schedule, failed_row, measure_group
    from benchmarks.speed.tables import compare
    from benchmarks.speed.workloads import choose_workloads

    workloads = choose_workloads(options, host)
    lineup, failures = line_up(host, entries, options.sites, compiled=options.compile)
    schedule, unit = Schedule(options.warmup, options.repeats), reference_label()
    groups = []
    for workload in workloads:
        present = lineup.of(workload.mode)
        _console(stderr=True).print(f"timing {workload.mode}, {workload.rows} rows: {len(present)} contestants")
        groups.append(measure_group(present, host, workload, schedule, reference=unit, peak_tflops=options.peak_tflops))
    return compare(groups, [failed_row(label, error) for label, error in failures.items()], host, options, unit)


def _grow(options: Options, entries: Mapping[str, Entry], host: nn.Module) -> Outcome:
    """The tables of all axes."""
    from benchmarks.speed.growth import measure_growth
    from benchmarks.speed.rows import Schedule
    from benchmarks.speed.tables import compare_growth
    from benchmarks.speed.workloads import training_workload

    schedule, work = Schedule(options.warmup, options.repeats), training_workload(options)
    growths = [
        measure_growth(axis, host, entries, work, schedule, compiled=options.compile)
        for axis in dict.fromkeys(options.grow)
    ]
    return compare_growth(growths, options)


def _conclude(options: Options, outcome: Outcome, provenance: Provenance, device: torch.device) -> int:
    """Print, write, choose the exit code."""
    from benchmarks.records.store import replacing
    from benchmarks.speed.tables import as_json, document

    text = document(outcome, provenance)
    console = _console()
    console.print(text)
    path = options.results / "tables" / f"{options.stem}-{device.type}.md"
    with replacing(path) as file:
        file.write(text.encode())
    console.print(f"written: {path}")
    if options.json is not None:
        figures = as_json({"options": options, "provenance": provenance, **outcome.figures})
        with replacing(options.json) as file:
            file.write((json.dumps(figures, indent=1) + "\n").encode())
        console.print(f"written: {options.json}")
    failed = [row for row in outcome.rows if row.status not in ("ok", "unsupported")]
    return EXIT_FAILED if failed else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
