"""How scores changed between two results folders: before and after a change of the code, say."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchmarks.records.comparable import Group
from benchmarks.records.frame import Results
from benchmarks.reporting.render import Table, to_markdown
from benchmarks.reporting.scores import MethodScores, average_scores
from benchmarks.reporting.views import NOT_AVAILABLE, find_tasks


def difference_markdown(before: Results, after: Results) -> str:
    """A table per protocol: every method's primary scores, second set minus first, in points."""
    first, second = before.groups(), after.groups()
    frames = before.frame(), after.frame()
    pairs = _pair_up(first, second)
    parts = [to_markdown(difference_table(a, b, *frames)) for a, b in pairs]
    alone = [
        f"- Only in the {which} set: protocol {group.label} ({len(group.records)} records).\n"
        for which, groups, side in (("first", first, 0), ("second", second, 1))
        for group in groups
        if all(pair[side] is not group for pair in pairs)
    ]
    if alone:
        parts.append("".join(alone))
    return "\n".join(parts) if parts else "Neither set holds records.\n"


def difference_table(a: Group, b: Group, before: pd.DataFrame, after: pd.DataFrame) -> Table:
    """The table of one protocol, or of two of the same name."""
    before, after = before[before["protocol_id"] == a.key], after[after["protocol_id"] == b.key]
    tasks = list(dict.fromkeys([*find_tasks(before), *find_tasks(after)]))
    old, new = ({row.label: row for row in average_scores(frame)} for frame in (before, after))
    lines, facts = [], []
    for label in dict.fromkeys([*old, *new]):
        first, second = old.get(label), new.get(label)
        changes = {task: _subtract(first, second, task) for task in tasks} | {"mean": _subtract_means(first, second)}
        means = {"before": _find_mean(first), "after": _find_mean(second)}
        cells = {name: _format(change, "+z.1f") for name, change in changes.items()}
        arrow = " → ".join(_format(mean, "z.1f") for mean in means.values())
        lines.append({"method": label, **cells, "mean before and after": arrow})
        facts.append({"method": label, **changes, **means})
    notes = ["Change of the primary score, second set minus first, in points; n/a where one of them has none."]
    for which, has, lacks in (("first", old, new), ("second", new, old)):
        alone = [label for label in has if label not in lacks]
        if alone:
            notes.append(f"Only in the {which} set: {', '.join(alone)}.")
    fields = sorted({*a.shared, *b.shared})
    changed = [
        f"{field} {a.shared.get(field)} -> {b.shared.get(field)}"
        for field in fields
        if a.shared.get(field) != b.shared.get(field)
    ]
    if changed:
        notes.append(f"WARNING: the protocols differ: {'; '.join(changed)}.")
    return Table("difference", f"Changes ({a.label})", pd.DataFrame(lines), pd.DataFrame(facts), tuple(notes))


def _pair_up(first: Sequence[Group], second: Sequence[Group]) -> list[tuple[Group, Group]]:
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


def _subtract(old: MethodScores | None, new: MethodScores | None, task: str) -> float | None:
    if old is None or new is None or task not in old.tasks or task not in new.tasks:
        return None
    before, after = old.tasks[task][0].mean, new.tasks[task][0].mean
    return None if before is None or after is None else after - before


def _subtract_means(old: MethodScores | None, new: MethodScores | None) -> float | None:
    # Means over different tasks do not compare.
    if old is None or new is None or old.mean is None or new.mean is None or set(old.averaged) != set(new.averaged):
        return None
    return None if old.mean.mean is None or new.mean.mean is None else new.mean.mean - old.mean.mean


def _find_mean(row: MethodScores | None) -> float | None:
    return None if row is None or row.mean is None else row.mean.mean


def _format(points: float | None, how: str) -> str:
    return NOT_AVAILABLE if points is None else f"{100 * points:{how}}"
