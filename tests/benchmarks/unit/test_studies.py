"""Simulated studies whose truth is known: the intervals cover it, and equal methods are rarely told apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from benchmarks.statistics.intervals import Difference, verdict
from benchmarks.statistics.paired import PairedTask, paired_difference

SIZES = (150, 250, 400)
STUDIES = 500


def simulate(
    generator: np.random.Generator, *, seeds: int, gap: float, spread: float, shared: bool, own: float = 0.0
) -> Difference:
    """One study of two methods on three tasks, whose expected accuracies differ by `gap`.

    Examples differ in difficulty, a new test set is drawn in every study, and runs differ by `spread`: jointly over
    tasks when `shared`, as one multi-task run does, otherwise task by task. To a method an example is as hard for all
    runs alike as `own` says.
    """
    joint = generator.normal(0, spread, size=(2, seeds, 1))
    tasks = []
    for size in SIZES:
        ease = generator.normal(0, 1, size) + own * generator.normal(0, 1, size=(2, 1, size))
        noise = joint if shared else generator.normal(0, spread, size=(2, seeds, 1))
        # P(ease + noise + gap + standard normal > 0): probit, so that the truth has a closed form.
        latent = ease + noise + np.array([gap, 0]).reshape(2, 1, 1) + generator.normal(0, 1, size=(2, seeds, size))
        method, reference = (latent + 0.9 > 0).astype(float)
        tasks.append(PairedTask("accuracy", np.ones(size), method, reference))
    return paired_difference(tasks, replicates=200, seed=int(generator.integers(2**31)))


def find_truth(gap: float, spread: float, own: float) -> float:
    total = math.sqrt(2 + own**2 + spread**2)
    return float(scipy_stats.norm.cdf((0.9 + gap) / total) - scipy_stats.norm.cdf(0.9 / total))


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("own", [0.0, 1.0])
@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.02), (3, 0.2), (5, 0.1), (10, 0.05)])
def test_intervals_cover_the_truth(seeds, spread, shared, own):
    generator = np.random.default_rng([seeds, round(100 * spread), shared, round(own)])
    studies = [simulate(generator, seeds=seeds, gap=0.1, spread=spread, shared=shared, own=own) for _ in range(STUDIES)]
    truth = find_truth(0.1, spread, own)
    covered = np.mean([abs(study.estimate - truth) <= study.half_width for study in studies])
    # Nominal 95 %; the error of the simulation is 1 %.
    assert 0.93 <= covered <= 0.985


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.02), (3, 0.2), (5, 0.1)])
def test_equal_methods_are_rarely_called_different(seeds, spread):
    generator = np.random.default_rng([7, seeds, round(100 * spread)])
    studies = [simulate(generator, seeds=seeds, gap=0.0, spread=spread, shared=True) for _ in range(STUDIES)]
    verdicts = [verdict(study, study.p_value) for study in studies]
    # At most 5 % in truth: three standard errors of a share of 5 % above.
    assert np.mean([said in {"better", "worse"} for said in verdicts]) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / STUDIES)


def test_a_large_gap_is_found():
    generator = np.random.default_rng(11)
    studies = [simulate(generator, seeds=5, gap=0.5, spread=0.05, shared=True) for _ in range(100)]
    assert np.mean([verdict(study, study.p_value) == "better" for study in studies]) >= 0.95


@pytest.mark.slow
def test_equal_methods_compared_in_a_family_are_rarely_called_different():
    generator = np.random.default_rng(13)
    wrong = 0
    for _ in range(200):
        family = [simulate(generator, seeds=3, gap=0.0, spread=0.1, shared=True) for _ in range(5)]
        adjusted = multipletests([study.p_value for study in family], method="holm")[1]
        wrong += any(verdict(study, p) in {"better", "worse"} for study, p in zip(family, adjusted, strict=True))
    # At most 5 % in truth: three standard errors of a share of 5 % above.
    assert wrong / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)
