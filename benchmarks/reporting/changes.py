"""How scores changed between two sets of records: before and after a change of the code, say."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchmarks.records.schema import RunRecord
from benchmarks.reporting.comparable import Group, group_records
from benchmarks.reporting.render import Table, to_markdown
from benchmarks.reporting.scores import NOT_AVAILABLE, MethodScores, method_scores


def difference_markdown(before: Sequence[RunRecord], after: Sequence[RunRecord]) -> str:
    """A table per protocol: every method's primary scores, second set minus first, in points."""
    first, second = group_records(before), group_records(after)
    pairs = _pairs(first, second)
    parts = [to_markdown(_table(a, b)) for a, b in pairs]
    alone = [
        f"- Only in the {which} set: protocol {group.label} ({len(group.records)} records).\n"
        for which, groups, side in (("first", first, 0), ("second", second, 1))
        for group in groups
        if all(pair[side] is not group for pair in pairs)
    ]
    if alone:
        parts.append("".join(alone))
    return "\n".join(parts) if parts else "Neither set holds records.\n"


def _pairs(first: Sequence[Group], second: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Groups of the same protocol; else of the same name, where that leaves no choice."""
    pairs = [(a, b) for a in first for b in second if a.key == b.key]
    left = [a for a in first if all(a is not pair[0] for pair in pairs)]
    right = [b for b in second if all(b is not pair[1] for pair in pairs)]
    for a in left:
        name = a.protocol.name
        named = [b for b in right if b.protocol.name == name]
        if len(named) == 1 and sum(other.protocol.name == name for other in left) == 1:
            pairs.append((a, named[0]))
    return pairs


def _table(a: Group, b: Group) -> Table:
    tasks = tuple(dict.fromkeys([*a.tasks, *b.tasks]))
    labels = dict.fromkeys(runs.label for group in (a, b) for runs in group.rows)
    lines, facts = [], []
    for label in labels:
        old, new = _row(a, label), _row(b, label)
        changes = {task: _change(old, new, task) for task in tasks} | {"mean": _mean_change(old, new)}
        means = {"before": _mean(old), "after": _mean(new)}
        cells = {name: _points(change) for name, change in changes.items()}
        lines.append({"method": label, **cells, "mean before and after": " → ".join(map(_plain, means.values()))})
        facts.append({"method": label, **changes, **means})
    notes = ["Change of the primary score, second set minus first, in points; n/a where one of them has none."]
    fields = sorted({*a.shared, *b.shared})
    for which, one, other in (("first", a, b), ("second", b, a)):
        alone = [label for label in labels if one.row(label) is not None and other.row(label) is None]
        if alone:
            notes.append(f"Only in the {which} set: {', '.join(alone)}.")
    changed = [f"{field} {a.shared.get(field)} -> {b.shared.get(field)}" for field in fields if _differs(a, b, field)]
    if changed:
        notes.append(f"WARNING: the protocols differ: {'; '.join(changed)}.")
    return Table("difference", f"Changes ({a.label})", pd.DataFrame(lines), pd.DataFrame(facts), tuple(notes))


def _differs(a: Group, b: Group, field: str) -> bool:
    return bool(a.shared.get(field) != b.shared.get(field))


def _row(group: Group, label: str) -> MethodScores | None:
    runs = group.row(label)
    return None if runs is None else method_scores(runs, group.tasks)


def _change(old: MethodScores | None, new: MethodScores | None, task: str) -> float | None:
    if old is None or new is None or task not in old.tasks or task not in new.tasks:
        return None
    before, after = old.tasks[task][0].mean, new.tasks[task][0].mean
    return None if before is None or after is None else after - before


def _mean_change(old: MethodScores | None, new: MethodScores | None) -> float | None:
    # Means over different tasks do not compare.
    if old is None or new is None or old.mean is None or new.mean is None or set(old.averaged) != set(new.averaged):
        return None
    return None if old.mean.mean is None or new.mean.mean is None else new.mean.mean - old.mean.mean


def _mean(row: MethodScores | None) -> float | None:
    return None if row is None or row.mean is None else row.mean.mean


def _plain(score: float | None) -> str:
    return NOT_AVAILABLE if score is None else f"{100 * score:z.1f}"


def _points(change: float | None) -> str:
    return NOT_AVAILABLE if change is None else f"{100 * change:+z.1f}"
