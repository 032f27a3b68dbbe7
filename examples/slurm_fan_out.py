"""Deal the cells of a benchmark to jobs of a SLURM cluster that write into one results folder.

    python examples/slurm_fan_out.py --shards 8 --partition gpu -- --suite glue --methods all --seeds 0,1,2

What a lost job has finished is kept: the same command goes on. `--cluster local` makes processes of this machine.
"""

import argparse
import subprocess
import sys

import submitit  # pip install 'moepeft[launch]'


def main() -> int:
    """Submit the jobs, wait for them, and end as the worst of them did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=2, help="number of jobs")
    parser.add_argument("--cluster", choices=["slurm", "local"], default="slurm")
    parser.add_argument("--partition")
    parser.add_argument("--hours", type=int, default=12, help="time limit of a job")
    parser.add_argument("--logs", default="slurm-logs", help="folder that all machines see")
    parser.add_argument("run", nargs="*", help="flags of benchmarks.run, after --")
    options = parser.parse_args()

    executor = submitit.AutoExecutor(folder=options.logs, cluster=options.cluster)
    executor.update_parameters(timeout_min=60 * options.hours, slurm_gpus_per_node=1, slurm_partition=options.partition)
    run = [sys.executable, "-m", "benchmarks.run", *options.run]
    jobs = [executor.submit(subprocess.run, [*run, "--shard", f"{i}/{options.shards}"]) for i in range(options.shards)]
    print("jobs:", *(job.job_id for job in jobs))  # noqa: T201
    lost = [job.job_id for job in jobs if job.exception() is not None]  # waits for it
    if lost:
        print("lost:", *lost, "- the same command goes on where they stopped")  # noqa: T201
        return 1
    return max(job.result().returncode for job in jobs)


if __name__ == "__main__":
    sys.exit(main())
