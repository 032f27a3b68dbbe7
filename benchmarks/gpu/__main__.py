"""What a machine with a GPU is to do, in calls of some minutes each: ``python -m benchmarks.gpu``.

The stages are tests, speed tables at the shapes of T5-base and LLaMA-2-7B, and the studies on GLUE and on commonsense
questions. Each is a command of its own. A call runs what is not done until its time is over; the same command goes on
from there. No stage asks the network.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from rich.console import Console

from benchmarks.gpu.call import EXIT_DONE, EXIT_MORE, Call, only_call
from benchmarks.gpu.stages import Options, choose_stages
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.flags import parse_flags

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit codes as `Options` says."""
    options = parse_flags(Options, list(sys.argv[1:] if arguments is None else arguments), "python -m benchmarks.gpu")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_INTERRUPTED))  # an exception, so that the stage ends too
    try:
        stages = choose_stages(options)
        with only_call(options.folder) as lock:
            code = Call(options.folder, 60 * options.minutes, lock, console).work_off(stages)
    except UsageError as error:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"error: {error}")
        return EXIT_USAGE
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on where this one stopped")
        return EXIT_INTERRUPTED
    said = {EXIT_DONE: "all stages are done", EXIT_MORE: "there is more to do: give the same command again"}
    console.print(said.get(code, "a stage failed; the same command tries it again"))
    return code


if __name__ == "__main__":
    sys.exit(main())
