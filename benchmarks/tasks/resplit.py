"""Test sets of at least so many rows: what is missing is drawn from the training rows, once and for all runs.

The official test sets of MRPC and RTE, 408 and 277 rows, leave a standard error of two to three points in a single
score. Nothing here is compared with published scores, so that official splits buy nothing; captions name the variant.
"""

from __future__ import annotations

import dataclasses

from benchmarks.protocols.seeds import generator
from benchmarks.tasks.base import TaskData
from benchmarks.tasks.loading import fingerprint


def resplit(data: TaskData, test_rows: int) -> TaskData:
    """The task with at least `test_rows` reported rows, as long as half of the training rows stay with training.

    Which rows are drawn depends on the name of the task alone. A test set that is large enough stays as it is.
    """
    missing = min(test_rows - len(data.validation), len(data.train) // 2)
    if missing <= 0:
        return data
    drawn = {int(at) for at in generator("test rows", data.spec.name).permutation(len(data.train))[:missing]}
    train = tuple(row for at, row in enumerate(data.train) if at not in drawn)
    tested = (*data.validation, *(row for at, row in enumerate(data.train) if at in drawn))
    source = f"{data.source}; split anew: {missing:,} of the train rows are tested on instead, {len(tested):,} in all"
    return dataclasses.replace(
        data, train=train, validation=tested, source=source, fingerprint=fingerprint(train, tested)
    )
