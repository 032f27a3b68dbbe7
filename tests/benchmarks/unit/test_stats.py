"""Statistics held to SciPy, scikit-learn, hand-worked cases, and simulated studies whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn import metrics as sklearn_metrics

from benchmarks.statistics.intervals import (
    Difference,
    average_ranks,
    friedman,
    holm,
    mean_interval,
    nemenyi_distance,
    seeds_to_settle,
    standard_error,
    verdict,
)
from benchmarks.statistics.paired import STATISTICS, PairedTask, metric_value, paired_difference

# ---------------------------------------------------------------------- intervals


def test_mean_interval_is_students():
    values = [0.71, 0.74, 0.69, 0.75, 0.7]
    mean, half = mean_interval(values)
    low, high = scipy_stats.t.interval(0.95, 4, np.mean(values), scipy_stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_mean_interval_by_hand():
    # Mean 2, standard deviation 1, standard error 1/sqrt(3), t(0.975, 2) = 4.3027 (any table).
    assert mean_interval([1, 2, 3]) == pytest.approx((2, 4.3027 / math.sqrt(3)), rel=1e-4)


def test_mean_interval_of_one_value_is_unknown():
    mean, half = mean_interval([0.5])
    assert mean == 0.5
    assert math.isnan(half)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_mean_interval_refuses_what_is_no_sample(values):
    with pytest.raises(ValueError, match="finite numbers"):
        mean_interval(values)


def test_mean_interval_covers():
    samples = np.random.default_rng(0).normal(0.7, 0.02, size=(4000, 3))
    covered = np.mean([abs(mean - 0.7) <= half for mean, half in map(mean_interval, samples)])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_standard_error_is_that_of_repeated_draws():
    generator = np.random.default_rng(0)
    assert standard_error(0.7, 300) == pytest.approx(generator.binomial(300, 0.7, 20000).std() / 300, rel=0.03)
    x, noise = generator.normal(size=(2, 4000, 300))
    y = 0.8 * x + 0.6 * noise
    found = [np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)]
    assert standard_error(0.8, 300, is_correlation=True) == pytest.approx(np.std(found), rel=0.05)


# ---------------------------------------------------------------------- Holm, verdicts, seeds


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03 times 3, 2, 1: 0.03, 0.04, 0.03 -> running maximum 0.03, 0.04, 0.04.
    assert holm([0.02, 0.01, 0.03]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.6]) == pytest.approx([1.0, 1.0])
    assert len(holm([])) == 0


def test_holm_decides_as_the_textbook_procedure():
    generator = np.random.default_rng(0)
    for p in generator.beta(0.3, 3, size=(200, 6)):
        rejected = np.zeros(6, bool)
        for step, index in enumerate(np.argsort(p)):
            if p[index] > 0.05 / (6 - step):
                break
            rejected[index] = True
        assert ((holm(p) <= 0.05) == rejected).all()


def difference(estimate: float, half_width: float, seeds: int = 5) -> Difference:
    """A difference whose interval comes from the examples alone, so that it is normal."""
    return Difference(estimate, 0.0, (half_width / scipy_stats.norm.ppf(0.975)) ** 2, seeds)


@pytest.mark.parametrize(
    ("estimate", "half_width", "said"),
    [
        (0.020, 0.010, "better"),
        (-0.020, 0.010, "worse"),
        (0.001, 0.003, "equivalent"),
        (0.004, 0.0005, "equivalent"),  # certainly above zero, and too small to matter
        (0.004, 0.003, "better"),  # above zero, perhaps above the band
        (0.001, 0.010, "undecided"),
        (0.0, 0.0, "equivalent"),
        (0.02, 0.0, "better"),
    ],
)
def test_verdict(estimate, half_width, said):
    measured = difference(estimate, half_width)
    assert measured.half_width == pytest.approx(half_width)
    assert verdict(measured, measured.p_value, band=0.005) == said


def test_verdict_needs_the_adjusted_p_value():
    measured = difference(0.020, 0.019)
    assert verdict(measured, measured.p_value) == "better"
    assert verdict(measured, 5 * measured.p_value) == "undecided"


def test_verdict_of_a_single_run_is_undecided():
    single = Difference(0.3, math.nan, 1e-6, seeds=1)
    assert single.half_width == pytest.approx(1.96e-3, rel=1e-3)
    assert verdict(single, single.p_value) == "undecided"
    assert seeds_to_settle(single) is None


def test_interval_from_runs_alone_is_the_paired_t_test():
    pairs = np.array([[0.71, 0.70], [0.73, 0.71], [0.72, 0.69], [0.74, 0.74]])
    gaps = pairs[:, 0] - pairs[:, 1]
    measured = Difference(gaps.mean(), gaps.var(ddof=1), 0.0, len(gaps))
    expected = scipy_stats.ttest_rel(*pairs.T)
    assert measured.p_value == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (measured.estimate - measured.half_width, measured.estimate + measured.half_width) == pytest.approx(interval)


def test_seeds_to_settle_is_the_first_number_that_does():
    measured = Difference(0.01, seed_variance=0.02**2, example_variance=0.0, seeds=3)
    needed = seeds_to_settle(measured)

    def half(seeds):
        return scipy_stats.t.ppf(0.975, seeds - 1) * 0.02 / math.sqrt(seeds)

    assert needed == next(seeds for seeds in range(2, 1000) if half(seeds) < 0.01)
    assert half(needed) < 0.01 <= half(needed - 1)


@settings(max_examples=50, deadline=None)
@given(
    p_values=st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=8),
    seeds=st.integers(2, 6),
    examples=st.floats(0.0, 0.01),
)
def test_what_is_undecided_needs_more_seeds_than_it_had(p_values, seeds, examples):
    """Whatever place a row has in Holm's order."""
    spread = 0.02 / math.sqrt(seeds)
    gaps = [scipy_stats.t.isf(p / 2, seeds - 1) * spread for p in p_values]
    measured = [Difference(gap, 0.02**2, examples**2, seeds) for gap in gaps]
    adjusted = holm([each.p_value for each in measured])
    for each, p in zip(measured, adjusted, strict=True):
        if verdict(each, p) == "undecided":
            needed = seeds_to_settle(each, comparisons=len(measured))
            assert needed is None or needed > seeds


def test_seeds_cannot_settle_what_the_examples_leave_open():
    measured = Difference(0.01, seed_variance=0.001**2, example_variance=0.02**2, seeds=3)
    assert seeds_to_settle(measured) is None


# ---------------------------------------------------------------------- ranks


def test_ranks_share_ties_and_put_failures_last():
    scores = [[0.9, 0.8, 0.7], [0.5, 0.5, math.nan], [0.2, 0.1, 0.3]]
    # Ranks by hand: (1, 2, 3), (1.5, 1.5, 3), (2, 3, 1).
    assert average_ranks(scores) == pytest.approx([1.5, 6.5 / 3, 7 / 3])


def test_friedman_is_scipys_and_knows_ties():
    scores = np.random.default_rng(0).random((8, 4))
    assert friedman(scores) == pytest.approx(scipy_stats.friedmanchisquare(*scores.T).pvalue)
    assert friedman(np.ones((5, 3))) == 1.0
    with pytest.raises(ValueError, match="at least 3 methods, got 2"):
        friedman(scores[:, :2])


@pytest.mark.parametrize(("methods", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (10, 3.164)])
def test_nemenyi_distance_is_that_of_demsars_table(methods, q):
    # Critical values at 5 %: Demsar 2006, JMLR 7, table 5(a).
    assert nemenyi_distance(methods, 14) == pytest.approx(q * math.sqrt(methods * (methods + 1) / 84), rel=1e-3)


# ---------------------------------------------------------------------- resampling


REFERENCES = {
    "accuracy": sklearn_metrics.accuracy_score,
    "f1": sklearn_metrics.f1_score,
    "matthews": sklearn_metrics.matthews_corrcoef,
    "pearson": lambda labels, predictions: scipy_stats.pearsonr(labels, predictions).statistic,
}


@pytest.mark.parametrize("metric", sorted(STATISTICS))
def test_metric_from_sums_is_the_librarys(metric):
    generator = np.random.default_rng(0)
    for _ in range(20):
        if metric == "pearson":
            labels = generator.uniform(0, 5, 40)
            predictions = 1000 + labels + generator.normal(size=40)
        else:
            classes = 2 if metric == "f1" else 3
            labels, predictions = generator.integers(classes, size=(2, 40)).astype(float)
        assert metric_value(metric, labels, predictions) == pytest.approx(REFERENCES[metric](labels, predictions))


def test_undefined_metrics_are_zero():
    labels, constant = np.array([0.0, 1.0, 1.0]), np.zeros(3)
    assert metric_value("matthews", labels, constant) == 0
    assert metric_value("pearson", labels, constant) == 0
    assert metric_value("f1", np.zeros(3), constant) == 0


@pytest.mark.slow
@pytest.mark.parametrize("metric", sorted(STATISTICS))
def test_example_variance_is_that_of_explicit_resampling(metric):
    generator = np.random.default_rng(1)
    labels = generator.integers(2, size=150).astype(float)
    if metric == "pearson":
        method, reference = labels + generator.normal(size=(2, 2, 150))
    else:
        method, reference = np.where(generator.random((2, 2, 150)) < 0.7, labels, 1 - labels)
    task = PairedTask(metric, labels, method, reference)
    measured = paired_difference([task], replicates=4000)

    def value(rows, run):
        return REFERENCES[metric](labels[rows], run[rows])

    everything = np.arange(150)
    gaps = [value(everything, a) - value(everything, b) for a, b in zip(method, reference, strict=True)]
    assert measured.estimate == pytest.approx(np.mean(gaps))
    assert measured.seed_variance == pytest.approx(np.var(gaps, ddof=1))
    drawn = [generator.integers(150, size=150) for _ in range(300)]
    resampled = [
        np.mean([value(rows, a) - value(rows, b) for a, b in zip(method, reference, strict=True)]) for rows in drawn
    ]
    assert math.sqrt(measured.example_variance) == pytest.approx(np.std(resampled), rel=0.15)


def test_example_variance_of_accuracy_has_a_closed_form():
    generator = np.random.default_rng(2)
    labels = np.zeros(400)
    method, reference = (generator.random((2, 1, 400)) < 0.3).astype(float)
    gaps = (method == labels).astype(float) - (reference == labels)
    measured = paired_difference([PairedTask("accuracy", labels, method, reference)], replicates=20000)
    assert measured.example_variance == pytest.approx(gaps.var() / 400, rel=0.05)


def test_same_call_gives_the_same_numbers():
    generator = np.random.default_rng(3)
    task = PairedTask("accuracy", np.zeros(50), *(generator.random((2, 3, 50)) < 0.3).astype(float))
    assert paired_difference([task]) == paired_difference([task])


def test_what_cannot_be_paired_is_refused():
    labels = np.zeros(4)
    with pytest.raises(ValueError, match=r"predictions of shape \(seeds, examples\)"):
        PairedTask("accuracy", labels, np.zeros((2, 4)), np.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"'acuracy'.*accuracy"):
        PairedTask("acuracy", labels, np.zeros((2, 4)), np.zeros((2, 4)))
    two, three = (PairedTask("accuracy", labels, np.zeros((n, 4)), np.zeros((n, 4))) for n in (2, 3))
    with pytest.raises(ValueError, match=r"same number of seeds in every task, got \[2, 3\]"):
        paired_difference([two, three])


# ---------------------------------------------------------------------- simulated studies

SIZES = (150, 250, 400)
STUDIES = 500


def simulate(generator: np.random.Generator, *, seeds: int, gap: float, spread: float, shared: bool) -> Difference:
    """One study of two methods on three tasks, whose expected accuracies differ by `gap`.

    Examples differ in difficulty, a new test set is drawn in every study, and runs differ by `spread`: jointly over
    tasks when `shared`, as one multi-task run does, otherwise task by task.
    """
    joint = generator.normal(0, spread, size=(2, seeds, 1))
    tasks = []
    for size in SIZES:
        ease = generator.normal(0, 1, size)
        noise = joint if shared else generator.normal(0, spread, size=(2, seeds, 1))
        # P(ease + noise + gap + standard normal > 0): probit, so that the truth has a closed form.
        latent = ease + noise + np.array([gap, 0]).reshape(2, 1, 1) + generator.normal(0, 1, size=(2, seeds, size))
        method, reference = (latent + 0.9 > 0).astype(float)
        tasks.append(PairedTask("accuracy", np.ones(size), method, reference))
    return paired_difference(tasks, replicates=200, seed=int(generator.integers(2**31)))


def truth(gap: float, spread: float) -> float:
    total = math.sqrt(2 + spread**2)
    return float(scipy_stats.norm.cdf((0.9 + gap) / total) - scipy_stats.norm.cdf(0.9 / total))


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.02), (3, 0.2), (5, 0.1)])
def test_intervals_cover_the_truth(seeds, spread, shared):
    generator = np.random.default_rng([seeds, round(100 * spread), shared])
    found = [simulate(generator, seeds=seeds, gap=0.1, spread=spread, shared=shared) for _ in range(STUDIES)]
    covered = np.mean([abs(study.estimate - truth(0.1, spread)) <= study.half_width for study in found])
    assert covered >= 0.93
    # An interval that covers because it is far too wide would be no use.
    assert np.mean([study.half_width for study in found]) < 8 * np.std([study.estimate for study in found])


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.02), (3, 0.2), (5, 0.1)])
def test_equal_methods_are_rarely_called_different(seeds, spread):
    generator = np.random.default_rng([7, seeds, round(100 * spread)])
    found = [simulate(generator, seeds=seeds, gap=0.0, spread=spread, shared=True) for _ in range(STUDIES)]
    verdicts = [verdict(study, study.p_value) for study in found]
    assert np.mean([said in {"better", "worse"} for said in verdicts]) <= 0.05


def test_a_large_gap_is_found():
    generator = np.random.default_rng(11)
    found = [simulate(generator, seeds=5, gap=0.5, spread=0.05, shared=True) for _ in range(100)]
    verdicts = [verdict(study, study.p_value) for study in found]
    assert np.mean([said == "better" for said in verdicts]) >= 0.95


@pytest.mark.slow
def test_equal_methods_compared_in_a_family_are_rarely_called_different():
    generator = np.random.default_rng(13)
    wrong = 0
    for _ in range(200):
        family = [simulate(generator, seeds=3, gap=0.0, spread=0.1, shared=True) for _ in range(5)]
        adjusted = holm([study.p_value for study in family])
        wrong += any(verdict(study, p) in {"better", "worse"} for study, p in zip(family, adjusted, strict=True))
    assert wrong <= 10
