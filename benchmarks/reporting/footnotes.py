"""What stands below every table: the protocol, the data, the order, the hardware, the failures."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable

from benchmarks.protocols.protocol import Protocol
from benchmarks.records.comparable import Group
from benchmarks.records.schema import Budget, Provenance, RunRecord, Tuning

SHOWN_PACKAGES = ("torch", "transformers")


def group_caption(group: Group) -> tuple[str, ...]:
    """The lines that every table of a group shares."""
    return (
        _protocol_line(group),
        *_recipe_lines(group),
        *_scarce_lines(group),
        *_data_lines(group),
        *_budget_lines(group),
        *_compiler_lines(group),
        *_hardware_lines(group),
        *_command_lines(group),
        *_failure_lines(group),
    )


def records_hash(records: Iterable[RunRecord]) -> str:
    """SHA-256 of a set of records, whatever their order and file names."""
    texts = sorted(record.model_dump_json() for record in records)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _protocol_line(group: Group) -> str:
    protocol = group.protocol
    seeds = sorted({record.cell.seed for record in group.records})
    parts = [f"Protocol {group.label}", f"backbone {protocol.backbone}"]
    parts.append(f"{protocol.steps:,} steps of {protocol.batch_size:,} rows")
    if protocol.batches == "single":
        parts.append("each training batch of one task")
    if protocol.train_rows is not None:
        parts.append(f"trained on at most {protocol.train_rows:,} rows per task")
    if protocol.test_rows is not None:
        parts.append(f"not the official splits: test sets of fewer than {protocol.test_rows:,} rows filled from train")
    if protocol.eval_rows is not None:
        parts.append(f"scored on at most {protocol.eval_rows:,} rows per task")
    if protocol.prompt == "cloze":
        parts.append("cloze prompts: no choice is shown, each is tried as what follows")
    if protocol.pooling != "mean":
        parts.append(f"heads read the {protocol.pooling} token")
    if protocol.task_prefix:
        parts.append("every text begins with its task's name")
    if protocol.evaluate_on == "fold":
        parts.append("scored on rows cut from train, not on the reported ones")
    if protocol.track != "as-published":
        parts.append(f"track {protocol.track}: sizes chosen for about as many parameters as the reference has")
    parts.append(f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}")
    return f"{'; '.join(parts)}."


def _recipe_lines(group: Group) -> list[str]:
    """Learning rates and the rest of the optimiser."""
    protocol = group.protocol
    rates = _common_rate(group) if group.tuned is None else _tuned_rates(group, group.tuned)
    parts = [
        rates,
        f"weight decay {protocol.weight_decay:g}",
        _schedule(protocol),
        f"gradient norm clipped at {protocol.clip_norm:g}",
    ]
    return [f"AdamW: {'; '.join(parts)}."]


def _schedule(protocol: Protocol) -> str:
    warmup = f"{100 * protocol.warmup_ratio:.3g} %" if protocol.warmup is None else f"{protocol.warmup} steps of"
    parts = [f"{'linear decay' if protocol.schedule == 'linear' else 'constant'} after {warmup} warm-up"]
    if protocol.averaging is not None:
        parts.append(f"scored with averaged weights (decay {protocol.averaging:g})")
    if protocol.head_start == "ridge":
        parts.append(f"heads start from a converged ridge fit on {protocol.head_start_rows:,} training rows per task")
    return "; ".join(parts)


def _scarce_lines(group: Group) -> list[str]:
    protocol = group.protocol
    tasks = ", ".join(protocol.endpoint_tasks)
    return [] if protocol.scarce_rows is None else [f"Of {tasks} at most {protocol.scarce_rows:,} rows are trained on."]


def _common_rate(group: Group) -> str:
    protocol = group.protocol
    return f"learning rate {protocol.learning_rate:g}{_head_rate(group, protocol.head_learning_rate)} for all methods"


def _tuned_rates(group: Group, how: Tuning) -> str:
    """What every method tried, and what it ended with: its records have the rate, the group has not."""
    tried = ", ".join(f"{rate:g}" for rate in how.rates)
    by_label = {
        row.label: _first_seen(f"{record.cell.protocol.learning_rate:g}" for record in row.records)
        for row in group.rows
        if any(record.budget is not None for record in row.records)
    }
    chosen = ", ".join(f"{label} {' and '.join(rates)}" for label, rates in by_label.items())
    seeds = f"seed{'s' if how.more_seeds else ''} {', '.join(map(str, how.seeds))}"
    rungs = "" if how.first_steps is None else f"; the better half after {how.first_steps:,} steps"
    rungs += f"; grown up to {how.extensions} times" if how.extensions else ""
    return (
        f"learning rate of every method the best of {tried} on rows cut from train ({seeds}, "
        f"{how.steps:,} steps{rungs}): {chosen or 'none yet'}{_head_rate(group, how.head_learning_rate)}"
    )


def _head_rate(group: Group, rate: float | None) -> str:
    has_heads = any(record.parameters is not None and record.parameters.heads > 0 for record in group.records)
    return f" (task heads {rate:g})" if has_heads and rate is not None else ""


def _data_lines(group: Group) -> list[str]:
    """One line per distinct source; a key that is no task, such as ``backbone``, is told in the same way."""
    sources: defaultdict[str, list[str]] = defaultdict(list)
    for subject in _first_seen(name for record in group.records for name in record.sources):
        for line in _first_seen(record.sources[subject] for record in group.records if subject in record.sources):
            sources[line].append(subject)
    return [f"{', '.join(subjects)}: {line.rstrip('.')}." for line, subjects in sources.items()]


def find_unequal_budgets(group: Group) -> list[int]:
    """Seeds whose trained runs did not all see the same tokens in the same order."""
    return [
        seed
        for seed, budgets in _budgets_by_seed(group).items()
        if len({(budget.order_hash, budget.tokens) for budget in budgets}) > 1
    ]


def _budgets_by_seed(group: Group) -> dict[int, list[Budget]]:
    by_seed: defaultdict[int, list[Budget]] = defaultdict(list)
    for record in group.records:
        if record.status == "ok" and record.budget is not None and record.budget.steps > 0:
            by_seed[record.cell.seed].append(record.budget)
    return dict(sorted(by_seed.items()))


def _budget_lines(group: Group) -> list[str]:
    lines = []
    unequal = find_unequal_budgets(group)
    for seed, budgets in _budgets_by_seed(group).items():
        orders = _first_seen(budget.order_hash[:16] for budget in budgets)
        tokens = _first_seen(f"{budget.tokens:,}" for budget in budgets)
        if seed not in unequal:
            lines.append(
                f"Seed {seed}: {_runs(len(budgets))} {budgets[0].rows:,} rows, {tokens[0]} tokens without "
                f"padding, in the order with hash {orders[0]}."
            )
        else:
            lines.append(
                f"WARNING: with seed {seed} the budgets differ (order hashes {', '.join(orders)}; "
                f"tokens {', '.join(tokens)}); these rows do not compare."
            )
    return lines


def _runs(number: int) -> str:
    return "the one trained run saw" if number == 1 else f"all {number} trained runs saw the same"


def _compiler_lines(group: Group) -> list[str]:
    mode = group.protocol.compiled
    said = f"Training steps compiled (torch.compile, mode {mode}), scores computed eagerly. Compiling is in no time."
    return [] if mode is None else [said]


def _hardware_lines(group: Group) -> list[str]:
    lines = _first_seen(hardware(record.provenance) for record in group.records)
    timed = {hardware(record.provenance) for record in group.records if record.train_step is not None}
    if len(lines) > 1:
        lines = [line if line in timed else f"{line} Nothing was timed there." for line in lines]
    if timed:
        shape = group.protocol.timing
        lines.append(f"Timed on steps of {shape.rows} sequences of {shape.length} tokens.")
    if len(timed) > 1:
        lines.append("WARNING: timed on more than one machine or set of packages; times do not compare between them.")
    return [*lines, f"Code: {', '.join(_first_seen(_code(record.provenance) for record in group.records))}."]


def hardware(provenance: Provenance) -> str:
    """Device, threads, precision and packages in one line."""
    packages = [f"{name} {provenance.packages[name]}" for name in SHOWN_PACKAGES if name in provenance.packages]
    threads = f"{provenance.threads} thread{'s' if provenance.threads != 1 else ''}"
    return "; ".join([f"{provenance.device}, {threads}, {provenance.precision}", *packages]) + "."


def _code(provenance: Provenance) -> str:
    code = "version unknown" if provenance.commit is None else f"commit {provenance.commit[:10]}"
    return f"{code} with uncommitted changes" if provenance.dirty else code


def _command_lines(group: Group) -> list[str]:
    commands = _first_seen(record.provenance.command for record in group.records)
    return [f"Made by `{command}`." for command in commands]


def _failure_lines(group: Group) -> list[str]:
    failed = ((row.label, record) for row in group.rows for record in row.records if record.status != "ok")
    return [
        f"{label}, seed {record.cell.seed}: {record.status}: {_one_line(record.reason or 'no reason recorded')}"
        for label, record in failed
    ]


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:297]}..."


def _first_seen(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
