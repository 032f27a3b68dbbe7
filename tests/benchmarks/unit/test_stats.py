"""Statistics held to SciPy, scikit-learn, hand-worked cases, and simulated studies whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from sklearn import metrics as sklearn_metrics
from statsmodels.stats.power import TTestPower

from benchmarks.statistics.intervals import Difference, level_at_each_of, mean_interval, standard_error, verdict
from benchmarks.statistics.paired import STATISTICS, PairedTask, metric_value, paired_difference
from benchmarks.statistics.ranks import rank_methods

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


# ---------------------------------------------------------------------- verdicts, power


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
    assert math.isnan(single.find_detectable())


def test_interval_from_runs_alone_is_the_paired_t_test():
    pairs = np.array([[0.71, 0.70], [0.73, 0.71], [0.72, 0.69], [0.74, 0.74]])
    gaps = pairs[:, 0] - pairs[:, 1]
    measured = Difference(gaps.mean(), gaps.var(ddof=1), 0.0, len(gaps))
    expected = scipy_stats.ttest_rel(*pairs.T)
    assert measured.p_value == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (measured.estimate - measured.half_width, measured.estimate + measured.half_width) == pytest.approx(interval)


def test_interval_of_both_errors_by_hand():
    # Runs: t(0.975, 2) = 4.3027 times 0.03 / sqrt(3); examples: 1.95996 times 0.02; the root of the sum of squares.
    measured = Difference(0.05, 0.03**2, 0.02**2, seeds=3)
    assert measured.half_width == pytest.approx(math.hypot(4.3027 * 0.03 / math.sqrt(3), 1.95996 * 0.02), rel=1e-4)


@pytest.mark.parametrize("seeds", [3, 5, 8, 20])
def test_detectable_difference_is_that_of_the_t_test(seeds):
    measured = Difference(0.01, 0.02**2, 0.0, seeds)
    # Statsmodels gives it in standard deviations.
    expected = TTestPower().solve_power(nobs=seeds, alpha=0.05, power=0.8)
    assert measured.find_detectable() == pytest.approx(0.02 * expected, rel=1e-4)


def test_detectable_difference_is_larger_at_the_first_step_of_holm():
    measured = Difference(0.01, 0.02**2, 0.0, seeds=5)
    expected = TTestPower().solve_power(nobs=5, alpha=0.05 / 6, power=0.8)
    assert measured.find_detectable(comparisons=6) == pytest.approx(0.02 * expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "of_runs", "of_examples"), [(3, 1e-4, 1e-5), (5, 1e-4, 1e-4), (5, 0.0, 1e-4)])
def test_what_is_detectable_is_found_four_times_of_five(seeds, of_runs, of_examples):
    generator = np.random.default_rng(0)
    size = Difference(0.0, of_runs, of_examples, seeds).find_detectable()
    shown = 0
    for _ in range(2000):
        gaps = size + generator.normal(0, math.sqrt(of_runs), seeds) + generator.normal(0, math.sqrt(of_examples))
        shown += Difference(gaps.mean(), gaps.var(ddof=1), of_examples, seeds).p_value < 0.05
    assert shown / 2000 == pytest.approx(0.8, abs=0.03)


# Jennison and Turnbull (2000), Group Sequential Methods, table 2.1: Pocock's constants at 5 %, two-sided.
@pytest.mark.parametrize(("looks", "bound"), [(1, 1.960), (2, 2.178), (3, 2.289), (4, 2.361), (5, 2.413)])
def test_level_at_each_look_is_pococks(looks, bound):
    assert scipy_stats.norm.isf(level_at_each_of(looks) / 2) == pytest.approx(bound, abs=1e-3)


@pytest.mark.parametrize("looks", [0, 6])
def test_looks_out_of_range_are_refused(looks):
    with pytest.raises(ValueError, match="wanted a whole number from 1 to 5"):
        level_at_each_of(looks)


def test_interval_and_p_value_hold_for_all_looks_together():
    once, twice = (Difference(0.02, 0.02**2, 0.01**2, seeds=5, looks=looks) for looks in (1, 2))
    assert twice.half_width > once.half_width
    assert twice.p_value == pytest.approx(once.p_value * 0.05 / level_at_each_of(2))
    # Where the interval just reaches zero, the p-value is 5 %.
    edge = Difference(twice.half_width, 0.02**2, 0.01**2, seeds=5, looks=2)
    assert edge.p_value == pytest.approx(0.05, rel=1e-6)


# What the choice of examples does is the same at both looks: there is less than two chances to err by it.
@pytest.mark.slow
@pytest.mark.parametrize(("of_examples", "least", "most"), [(0.0, 0.043, 0.06), (0.01, 0.02, 0.05)])
def test_two_looks_err_in_one_case_of_twenty(of_examples, least, most):
    generator, erred = np.random.default_rng(0), 0
    for _ in range(2000):
        gaps = generator.normal(0, 0.02, 10) + generator.normal(0, of_examples)
        for seeds in (5, 10):
            seen = gaps[:seeds]
            looked = Difference(seen.mean(), seen.var(ddof=1), of_examples**2, seeds, looks=2)
            if looked.p_value < 0.05:
                erred += 1
                break
    assert least < erred / 2000 < most


# ---------------------------------------------------------------------- ranks


def test_ranks_share_ties_and_put_failures_last():
    scores = pd.DataFrame([[0.9, 0.8, 0.7], [0.5, 0.5, math.nan], [0.2, 0.1, 0.3]], columns=list("abc"))
    # Ranks by hand: (1, 2, 3), (1.5, 1.5, 3), (2, 3, 1).
    assert dict(rank_methods(scores).mean) == pytest.approx({"a": 1.5, "b": 6.5 / 3, "c": 7 / 3})


def test_scores_that_differ_in_their_last_digit_are_tied():
    scores = pd.DataFrame([[0.1 + 0.2, 0.3, 0.1]] * 5)
    assert list(rank_methods(scores).mean) == [1.5, 1.5, 3]


def test_friedman_is_scipys_and_knows_ties():
    scores = pd.DataFrame(np.random.default_rng(0).random((8, 4)))
    assert rank_methods(scores).p_value == pytest.approx(scipy_stats.friedmanchisquare(*scores.to_numpy().T).pvalue)
    assert rank_methods(pd.DataFrame(np.ones((5, 3)))).p_value == 1.0
    with pytest.raises(ValueError, match="scores of 2 methods on 8 tasks"):
        rank_methods(scores[[0, 1]])


@pytest.mark.parametrize(("methods", "q"), [(3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (10, 3.164)])
def test_pairs_are_told_apart_beyond_the_distance_of_demsars_table(methods, q):
    # Critical values at 5 %: Demsar 2006, JMLR 7, table 5(a).
    tasks = 30
    scores = np.random.default_rng(0).normal(np.linspace(0, 2, methods), 1.0, (tasks, methods))
    ranks = rank_methods(pd.DataFrame(scores))
    gaps = np.abs(ranks.mean.to_numpy()[:, None] - ranks.mean.to_numpy())
    distance = q * math.sqrt(methods * (methods + 1) / (6 * tasks))
    assert ((ranks.pairs.to_numpy() < 0.05) == (gaps > distance)).all()
    assert 0 < (gaps > distance).sum() < gaps.size


# ---------------------------------------------------------------------- resampling


REFERENCES = {
    "accuracy": sklearn_metrics.accuracy_score,
    "f1": sklearn_metrics.f1_score,
    "matthews": sklearn_metrics.matthews_corrcoef,
    "pearson": lambda labels, predictions: scipy_stats.pearsonr(labels, predictions).statistic,
    "skill": lambda prior, own: 1 - own.mean() / prior.mean(),  # of log-likelihoods, row by row
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
    resampled = [[value(rows, a) - value(rows, b) for a, b in zip(method, reference, strict=True)] for rows in drawn]
    spread = np.cov(resampled, rowvar=False)
    # Two independent runs have little in common: the error of a covariance is that of the variances.
    assert measured.example_variance == pytest.approx(max(0.0, spread[0, 1]), abs=0.15 * spread.trace() / 2)


def test_example_variance_of_accuracy_has_a_closed_form():
    generator = np.random.default_rng(2)
    labels = np.zeros(400)
    method, reference = (generator.random((2, 1, 400)) < 0.3).astype(float)
    gaps = (method == labels).astype(float) - (reference == labels)
    measured = paired_difference([PairedTask("accuracy", labels, method, reference)], replicates=20000)
    assert measured.example_variance == pytest.approx(gaps.var() / 400, rel=0.05)


def test_example_variance_is_what_runs_have_in_common():
    """Rows that all runs of a method get wrong, beside rows that each run gets wrong on its own."""
    generator = np.random.default_rng(4)
    seeds, rows = 4, 2000
    common = generator.random((2, 1, rows)) < 0.2
    own = generator.random((2, seeds, rows)) < 0.2
    method, reference = (common | own).astype(float)
    measured = paired_difference([PairedTask("accuracy", np.zeros(rows), method, reference)], replicates=4000)
    # A row is wrong with 0.2 + 0.8 * 0.2; given the row's own fate, its mean over runs is 1 or 0.2.
    spread_of_means = 0.2 * 0.8 * (1 - 0.2) ** 2
    assert measured.example_variance == pytest.approx(2 * spread_of_means / rows, rel=0.15)


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
