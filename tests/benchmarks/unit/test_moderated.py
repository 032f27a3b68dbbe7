"""Moderated variances held to limma, and to simulated comparisons whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks.statistics.intervals import Difference
from benchmarks.statistics.moderated import FEWEST, fit_prior, moderate, moderate_all

# `squeezeVar(variances, degrees)` of limma 3.54.1 (Bioconductor): df.prior, var.prior, var.post.
LIMMA = [
    (
        (1.2, 0.4, 2.5, 0.9, 1.1, 7.0),
        4,
        7.41459054905,
        1.62012501409,
        (1.47290115625, 1.19255820516, 1.92845845177, 1.36777254959, 1.43785828736, 3.50538755165),
    ),
    (
        (1.2, 0.4, 2.5, 0.9, 1.1, 700.0),
        4,
        0.832703759223,
        0.835756849718,
        (1.13723872689, 0.475083511207, 2.21324095236, 0.888930521007, 1.05446932493, 579.529819622),
    ),
    (
        (0.8, 0.1, 6.0, 2.0, 1.0, 0.3, 0.02, 9.0),
        2,
        1.48821106719,
        0.54985658816,
        (
            0.693278764755,
            0.291926904724,
            3.67474972499,
            1.38131052481,
            0.807950724764,
            0.406598864733,
            0.24605812072,
            5.39482912512,
        ),
    ),
    ((1.0, 1.1, 0.9, 1.05), 4, np.inf, 1.0125, (1.0125,) * 4),
    ((0.5, 3.0, 1.0), (2, 4, 9), np.inf, 1.5, (1.5,) * 3),
]


@pytest.mark.parametrize(("variances", "degrees", "prior_degrees", "prior_variance", "moderated"), LIMMA)
def test_prior_and_variances_are_limmas(variances, degrees, prior_degrees, prior_variance, moderated):
    prior = fit_prior(variances, degrees)
    assert prior == pytest.approx((prior_degrees, prior_variance), rel=1e-9)
    assert moderate(variances, degrees, prior) == pytest.approx(moderated, rel=1e-9)


@pytest.mark.parametrize("prior_degrees", [4, 1e6])
@pytest.mark.parametrize(("number", "studies", "errs"), [(7, 2000, 0.065), (200, 200, 0.05)])
def test_moderated_p_values_find_more_and_err_too_often_where_comparisons_are_few(prior_degrees, number, studies, errs):
    """Comparisons of five runs each, whose true variances differ, or are one."""
    generator, seeds = np.random.default_rng(0), 5
    wrong, found, found_alone = [], [], []
    for _ in range(studies):
        variances = prior_degrees / generator.chisquare(prior_degrees, number)
        runs = generator.normal(size=(number, seeds)) * np.sqrt(variances)[:, None]
        own = runs.var(axis=1, ddof=1)
        prior = fit_prior(own, seeds - 1)
        shared, degrees = moderate(own, seeds - 1, prior), seeds - 1 + prior.degrees
        wrong.append(p_values(runs.mean(axis=1), shared / seeds, degrees) < 0.05)
        found.append(p_values(runs.mean(axis=1) + 2, shared / seeds, degrees) < 0.01)
        found_alone.append(p_values(runs.mean(axis=1) + 2, own / seeds, seeds - 1) < 0.01)
    assert np.mean(wrong) == pytest.approx(errs, abs=0.006)
    assert np.mean(found) > np.mean(found_alone) + 0.2


def p_values(means, squared_errors, degrees):
    return 2 * stats.t.sf(np.abs(means) / np.sqrt(squared_errors), degrees)


def test_p_values_of_differences_are_those_of_the_moderated_t_test():
    variances = LIMMA[0][0]
    moderated = moderate_all([Difference(1.5, variance, 0.0, 5) for variance in variances])
    assert moderated is not None
    prior = fit_prior(variances, 4)
    expected = p_values(np.full(6, 1.5), moderate(variances, 4, prior) / 5, 4 + prior.degrees)
    assert [each.p_value for each in moderated] == pytest.approx(expected, rel=1e-6)


def test_nothing_is_learnt_of_few_comparisons_single_runs_or_equal_runs():
    difference = Difference(0.01, 1e-4, 0.0, 5)
    assert moderate_all([difference] * (FEWEST - 1)) is None
    assert moderate_all([difference] * FEWEST) is not None
    assert moderate_all([Difference(0.01, float("nan"), 1e-4, 1)] * FEWEST) is None
    assert moderate_all([Difference(0.01, 0.0, 1e-4, 5)] * FEWEST) is None


def test_a_variance_of_zero_outweighs_nothing():
    rest = [Difference(0.01, variance, 0.0, 5) for variance in (1e-4, 2e-4, 0.5e-4, 1.5e-4, 1e-4)]
    moderated = moderate_all([*rest, Difference(0.01, 0.0, 0.0, 5)])
    assert moderated is not None
    assert all(np.isfinite(each.p_value) for each in moderated)
    assert moderated[-1].seed_variance > 0
