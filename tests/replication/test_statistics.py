"""Each statistic, compared with an independent computation: a formula, a double loop or another library."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.meta_analysis import combine_effects
from statsmodels.stats.sandwich_covariance import cov_cluster_2groups

from replication import statistics

RNG = np.random.default_rng(3)
A, B = RNG.normal(size=30), RNG.normal(0.7, 1.3, size=30)


def test_wilson_is_the_formula():
    z, p, n = 1.959963984540054, 0.25, 20
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert statistics.wilson(5, 20) == pytest.approx((middle - reach, middle + reach), abs=1e-12)


def test_wilson_agrees_with_the_published_headline():
    low, high = statistics.wilson(round(0.924 * 4851), 4851)
    assert (round(low, 3), round(high, 3)) == (0.916, 0.931)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        statistics.wilson(successes, n)


def test_bootstrap_of_single_values_is_scipys():
    values = RNG.exponential(size=200)
    expected = scipy_stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    low, high = statistics.cluster_bootstrap(values, np.arange(200), resamples=20_000)
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.03 * width)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.03 * width)


def test_bootstrap_of_whole_clusters_is_wider_where_clusters_agree():
    values, labels = np.repeat([0.0, 1.0] * 10, 50), np.repeat(np.arange(20), 50)
    single = statistics.cluster_bootstrap(values, np.arange(1000))
    whole = statistics.cluster_bootstrap(values, [f"passage {i}" for i in labels])
    assert (whole.high - whole.low) / (single.high - single.low) == pytest.approx(math.sqrt(50), rel=0.15)


def test_bootstrap_of_means_is_the_loop_over_resampled_values():
    labels = RNG.integers(0, 7, size=30)
    fast = statistics.cluster_bootstrap(A, labels, resamples=300, seed=5)
    slow = statistics.cluster_bootstrap(A, labels, statistic=lambda x: x.mean(), resamples=300, seed=5)
    assert fast == pytest.approx(slow, abs=1e-12)


def test_a_bootstrap_of_a_function_of_rows_is_that_of_the_values():
    labels = RNG.integers(0, 7, size=30)
    rows = statistics.cluster_bootstrap(lambda rows: np.median(A[rows]), labels, resamples=100, seed=5)
    assert rows == statistics.cluster_bootstrap(A, labels, np.median, resamples=100, seed=5)


def test_the_bootstrap_of_a_difference_draws_both_sides_on_their_own():
    a, b = np.repeat(A, 2), np.repeat(B, 3)
    clusters = np.repeat(range(30), 2), np.repeat(range(30), 3)
    low, high = statistics.difference_bootstrap(a, b, clusters, resamples=4000, seed=0)
    reach = 1.96 * math.sqrt(A.var() / 30 + B.var() / 30)
    assert (low, high) == pytest.approx((A.mean() - B.mean() - reach, A.mean() - B.mean() + reach), abs=0.08)


def test_the_row_of_a_rate_has_wilsons_interval_and_one_bootstrap_per_clustering():
    won, atom, passage = A > 0, np.arange(30) % 6, np.arange(30) % 9
    row = statistics.rate_row(won, 200, 3, "rate", boot=atom, passage=passage)
    assert list(row) == ["rate", "ci_low", "ci_high", "boot_low", "boot_high", "passage_low", "passage_high"]
    assert (row["rate"], row["ci_low"], row["ci_high"]) == (won.mean(), *statistics.wilson(won.sum(), 30))
    by_passage = statistics.cluster_bootstrap(won, passage, resamples=200, seed=3)
    assert (row["passage_low"], row["passage_high"]) == by_passage
    ends = [statistics.Interval(0.1, 0.4), statistics.Interval(0.2, 0.5)]
    assert statistics.wider(*ends) == (0.1, 0.5)


def test_a_condition_beats_a_control_where_its_kl_is_smaller():
    firings = pd.DataFrame(dict(kl_atom=[1.0, 2, 3], kl_delete=[2.0, 2, 2], kl_random=[0.5, 3, 1]))
    assert statistics.beats(firings).tolist() == [True, False, False]
    assert statistics.beats(firings, "random", "atom").tolist() == [True, False, True]


def test_bootstrap_knows_nothing_from_one_cluster_and_needs_a_label_each():
    assert np.isnan(statistics.cluster_bootstrap([1.0, 2.0], [0, 0])).all()
    with pytest.raises(ValueError, match="one cluster"):
        statistics.cluster_bootstrap([1.0, 2.0], [0, 1, 2])


def test_cliffs_delta_is_the_double_loop_with_ties():
    a, b = RNG.integers(0, 5, 17), RNG.integers(1, 6, 11)
    expected = np.mean([np.sign(x - y) for x, y in itertools.product(a.astype(int), b.astype(int))])
    assert statistics.cliffs_delta(a, b) == pytest.approx(expected, abs=1e-12)


def test_paired_wilcoxon_counts_the_signs_that_give_a_sum_of_ranks_as_extreme():
    difference = (A - B)[:10]
    ranks = scipy_stats.rankdata(abs(difference))
    sums = np.array([ranks[list(signs)].sum() for signs in itertools.product([False, True], repeat=10)])
    expected = np.mean(abs(sums - 27.5) >= abs(ranks[difference > 0].sum() - 27.5))
    assert statistics.paired_wilcoxon(A[:10], B[:10]) == pytest.approx(expected)


def test_paired_wilcoxon_of_equal_pairs_finds_nothing():
    assert statistics.paired_wilcoxon(A, A) == 1


def test_r2_fits_neither_slope_nor_offset():
    assert statistics.r2(A, 2 * A + 1) == pytest.approx(1 - ((A + 1) ** 2).sum() / ((A - A.mean()) ** 2).sum())


def test_the_rank_correlation_is_numpys():
    ranks = statistics.spearman(A, A + B)
    assert ranks.value == pytest.approx(np.corrcoef(A.argsort().argsort(), (A + B).argsort().argsort())[0, 1])
    assert ranks.low < ranks.value < ranks.high


def test_infinity_has_a_rank():
    """Compares rho for infinite values with rho for 1e9. Cells without decay have infinite half-lives."""
    large = np.median(A) < A
    far = np.where(large, np.inf, A)
    assert statistics.spearman(far, B) == statistics.spearman(np.where(large, 1e9, A), B)
    assert np.isnan(statistics.spearman(np.full(30, np.inf), B)).all()


def test_a_perfect_order_has_rho_one():
    assert statistics.spearman(A, np.exp(A)) == (1.0, 1.0, 1.0)


def test_nothing_is_known_of_a_correlation_with_a_constant_or_of_three_pairs():
    for a, b in ((A, np.ones(30)), (np.zeros(30), A), (A[:3], np.exp(A[:3]))):
        assert np.isnan(statistics.spearman(a, b)).all()
    assert not np.isnan(statistics.spearman(A[:4], np.exp(A[:4]))).any()


def test_bic_prefers_two_components_for_two_modes():
    values = np.concatenate([RNG.normal(-4, 1, 150), RNG.normal(4, 0.5, 50)])
    mixtures = [statistics.fit_mixture(values[:, None], count, 0) for count in (1, 2, 3)]
    best = min(mixtures, key=lambda m: m.bic(values[:, None]))
    order = best.means_[:, 0].argsort()
    assert best.n_components == 2
    assert best.means_[order, 0] == pytest.approx((-4, 4), abs=0.4)
    assert best.weights_[order] == pytest.approx((0.75, 0.25), abs=0.02)
    one = mixtures[0]  # compared with a normal density of two parameters
    likelihood = scipy_stats.norm.logpdf(values, values.mean(), values.std()).sum()
    assert one.bic(values[:, None]) == pytest.approx(-2 * likelihood + 2 * math.log(200), rel=1e-5)


def test_permutation_p_is_the_exact_count_for_small_samples():
    a, b = [1.0, 2.0, 3.0, 9.0], [4.0, 5.0, 6.0, 8.0]
    whole = np.array(a + b)
    found = [whole[list(chosen)].mean() * 2 - whole.mean() * 2 for chosen in itertools.combinations(range(8), 4)]
    expected = np.mean([abs(x) >= abs(np.mean(a) - np.mean(b)) - 1e-12 for x in found])
    assert statistics.permutation_test(a, b) == pytest.approx(expected)


def test_paired_permutation_flips_signs():
    a, b = np.array([3.0, 4.0, 5.0, 6.0, 7.0]), np.array([1.0, 1.0, 1.0, 1.0, 1.0])
    assert statistics.permutation_test(a, b, paired=True) == pytest.approx(2 / 2**5)


ONE = [lambda x: statistics.cluster_bootstrap(x, [0] * len(x)), statistics.student]
TWO = [
    statistics.paired_wilcoxon,
    statistics.cliffs_delta,
    statistics.r2,
    statistics.spearman,
    statistics.permutation_test,
]


@pytest.mark.parametrize("function", [*ONE, *(lambda x, f=f: f(x, x) for f in TWO)])
def test_empty_and_missing_values_are_refused(function):
    with pytest.raises(ValueError, match="empty"):
        function([])
    with pytest.raises(ValueError, match="1 of 5 values are not finite"):
        function([1.0, 2.0, float("nan"), 4.0, 5.0])


@pytest.mark.parametrize("function", [statistics.paired_wilcoxon, statistics.r2])
def test_pairs_must_be_equally_many(function):
    with pytest.raises(ValueError, match="equally many"):
        function(A, B[:-1])


def long(values, places=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values [places, trainings] as vectors: values, places, trainings."""
    place, training = np.indices(values.shape)
    return values.ravel(), place.ravel() if places is None else np.asarray(places)[place.ravel()], training.ravel()


def test_intervals_over_trainings_cover_both_sources_of_variance():
    """Trainings that differ by a constant: the variance of their means is known, and so is that over places."""
    generator = np.random.default_rng(3)
    places, shifts = generator.normal(size=(500, 1)), np.array([[-0.3, 0.0, 0.3]])
    values, labels, trainings = long(places + shifts)
    found = statistics.over_trainings(values, labels, trainings=trainings, resamples=4000)
    sampling, between = places.var(ddof=1) / 500, shifts.var(ddof=1) / 3
    degrees = (sampling + between) ** 2 / (sampling**2 / 499 + between**2 / 2)
    assert (found.value, found.n, found.trainings) == (pytest.approx(places.mean()), 500, 3)
    assert found.error == pytest.approx(np.sqrt(sampling + between), rel=0.03)
    assert (found.df, found.between_seeds) == (pytest.approx(degrees, rel=0.05), pytest.approx(0.3))
    low, high = found.interval()
    assert (high - low) / 2 == pytest.approx(scipy_stats.t.ppf(0.975, degrees) * np.sqrt(sampling + between), rel=0.05)
    alone = statistics.over_trainings(places.ravel(), range(500), resamples=4000)
    assert (alone.trainings, alone.df) == (1, pytest.approx(499)) and np.isnan(alone.between_seeds)
    assert alone.error == pytest.approx(np.sqrt(sampling), rel=0.05)


def test_trainings_that_share_no_places_give_the_interval_of_hartung_and_knapp():
    generator, m, n = np.random.default_rng(0), 6, 300
    values = generator.normal(size=(n, m)) + generator.normal(scale=0.5, size=m)
    flat, _, trainings = long(values)
    found = statistics.over_trainings(flat, atoms=range(n * m), trainings=trainings, resamples=1000)
    other = combine_effects(values.mean(0), values.var(0, ddof=1) / n, method_re="iterated")
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(other.sd_eff_w_re_hksj, rel=0.03)
    assert found.df == pytest.approx(m - 1, rel=0.03)
    assert found.shared < 0.1 * found.error


def test_two_kinds_of_clusters_are_combined_as_in_statsmodels():
    generator, n = np.random.default_rng(1), 3000
    passage, atom = generator.integers(0, 60, n), generator.integers(0, 40, n)
    values = generator.normal(size=60)[passage] + generator.normal(size=40)[atom] + generator.normal(size=n)
    found = statistics.over_trainings(values, passage, atom, resamples=3000)
    wanted = cov_cluster_2groups(OLS(values, np.ones(n)).fit(), passage, atom, use_correction=False)[0]
    assert found.error == pytest.approx(np.sqrt(wanted.item()), rel=0.05)
    assert found.shared == pytest.approx(statistics.over_trainings(values, passage, resamples=3000).error)
    either = [statistics.over_trainings(values, labels, resamples=3000).error for labels in (passage, atom)]
    assert found.error > 1.2 * max(either)


@pytest.mark.parametrize("between", [0.0, 0.05, 0.3])
def test_intervals_over_trainings_hold_the_truth(between):
    """1,000 samples of three trainings at the same places of 30 passages, with the truth 0."""
    generator, held, apart = np.random.default_rng(5), [], []
    passages = np.repeat(np.arange(30), 5)
    for _ in range(1000):
        of_place = (generator.normal(scale=0.4, size=30)[passages] + generator.normal(size=150))[:, None]
        values = of_place + generator.normal(scale=between, size=3) + generator.normal(scale=0.5, size=(150, 3))
        flat, labels, trainings = long(values, passages)
        found = statistics.over_trainings(flat, labels, trainings=trainings, resamples=200)
        held.append(found.interval().low < 0 < found.interval().high)
        reach = scipy_stats.t.ppf(0.975, 2) * values.mean(0).std(ddof=1) / np.sqrt(3)
        apart.append(abs(values.mean()) < reach)
    assert 0.92 < np.mean(held) < 0.98
    assert between == 0.3 or np.mean(apart) < 0.85, "between trainings alone the interval forgets the places"


def test_a_ratio_over_trainings_is_a_mean_of_ratios():
    above, below = np.array([[1.0, 2.0], [3.0, 6.0]]), np.array([[1.0, 1.0], [1.0, 3.0]])
    pairs, trainings = np.stack([above.ravel(), below.ravel()], 1), [0, 1, 0, 1]
    found = statistics.over_trainings(pairs, [0, 0, 1, 1], trainings=trainings, resamples=50)
    assert found.value == pytest.approx((2 + 2) / 2)
    same = statistics.over_trainings(pairs[:, [0, 0]], [0, 0, 1, 1], trainings=trainings, resamples=50)
    assert same.interval() == (1.0, 1.0)


def test_a_function_of_rows_is_the_same_as_the_mean_and_the_ratio():
    generator = np.random.default_rng(2)
    pairs, labels = generator.random((60, 2)) + 1, generator.integers(0, 12, 60)
    trainings, atoms = np.arange(60) % 3, generator.integers(0, 9, 60)
    for values, function in (
        (pairs[:, 0], lambda rows: pairs[rows, 0].mean()),
        (pairs, lambda rows: pairs[rows, 0].mean() / pairs[rows, 1].mean()),
    ):
        fast, slow = (
            statistics.over_trainings(x, labels, atoms, trainings, resamples=200, seed=4) for x in (values, function)
        )
        assert slow == pytest.approx(fast)


def test_one_cluster_says_nothing_about_the_error():
    found = statistics.over_trainings([1.0, 2.0, 4.0], [0, 0, 0])
    assert found.value == pytest.approx(7 / 3) and np.isnan(found.error)
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        statistics.over_trainings([1.0, np.nan], [0, 1])


def test_a_zero_count_has_the_exact_bound_over_prompts():
    prompts = np.repeat(np.arange(30), 10)
    zero = statistics.over_trainings(np.zeros(300), prompts)
    assert zero.interval() == (0, 0)
    exact = statistics.rarely(zero, 0, 30)
    assert exact.interval(0.9).high == pytest.approx(1 - 0.05 ** (1 / 30))


def test_a_share_of_trials_counts_pairs_and_draws_prompts():
    """Three distances do not make three targets of one; prompts that differ widen the interval."""
    trials = pd.DataFrame(dict(prompt=np.repeat(np.arange(4), 6), target=np.tile([1, 1, 1, 2, 2, 2], 4)))
    low, high = statistics.share_of_trials(np.ones(24), trials)
    assert (low, high) == pytest.approx((0.025 ** (1 / 8), 1.0))
    trials = pd.DataFrame(dict(prompt=np.repeat(np.arange(20), 50), target=np.arange(1000)))
    found = statistics.share_of_trials(trials.prompt < 10, trials)
    drawn = statistics.cluster_bootstrap(trials.prompt < 10, trials.prompt, resamples=1000)
    assert found == drawn and found.high - found.low > 0.35


def test_few_events_are_less_sure_than_none_only_where_they_say_more():
    """The end of one affected prompt of 30 by the binomial distribution; from FEWEST on the bootstrap's error."""
    prompts, errors = np.repeat(np.arange(30), 10), []
    for affected in range(8):
        happened = np.isin(np.arange(300), 10 * np.arange(affected)).astype(float)
        estimate = statistics.over_trainings(happened, prompts)
        found = statistics.rarely(estimate, affected, 30, size=0.1)
        errors.append(found.error)
        if affected in (1, 4):
            share = 10 * found.interval(0.9).high
            assert scipy_stats.binom.cdf(affected, 30, share) == pytest.approx(0.05)
        assert (found == estimate) == (affected >= statistics.FEWEST)
    assert errors[:5] == sorted(errors[:5]) and min(errors) == errors[0], "an event makes nothing surer"


def test_pairs_of_trainings_are_compared_once():
    """Against trainings whose effects are added to every comparison: over many draws the error is the spread."""
    generator, m, n, found = np.random.default_rng(1), 4, 300, []
    for _ in range(400):
        own, values = generator.normal(0, 0.1, m), np.zeros((m, n, m))
        for one, other in itertools.combinations(range(m), 2):
            same = own[one] + own[other] + generator.normal(0, 1, n)
            values[one, :, other] = values[other, :, one] = same
        found.append(statistics.over_pairs(values.sum(2).ravel() / (m - 1), np.repeat(range(m), n)))
    spread = np.std([x.value for x in found])
    assert np.sqrt(np.mean([x.error**2 for x in found])) == pytest.approx(spread, rel=0.15)
    assert np.mean([x.interval().low < 0 < x.interval().high for x in found]) == pytest.approx(0.95, abs=0.03)
    assert found[0].df == m - 1 and found[0].trainings == m and found[0].n == n


def test_a_ratio_over_pairs_has_the_error_of_its_residuals():
    generator, trainings = np.random.default_rng(2), np.repeat([0, 1], 500)
    weights = generator.integers(1, 9, 1000).astype(float)
    happened = generator.random(1000) < 0.3
    found = statistics.over_pairs(np.stack([happened * weights, weights], 1), trainings)
    parts = [(happened[:500], weights[:500]), (happened[500:], weights[500:])]
    assert found.value == pytest.approx(np.mean([np.average(x, weights=w) for x, w in parts]))
    draws = generator.integers(0, 500, (2000, 500))
    spread = [np.std([np.average(x[rows], weights=w[rows]) for rows in draws]) for x, w in parts]
    assert found.error == pytest.approx(np.sqrt(np.mean(np.square(spread))), rel=0.06)


def test_a_single_document_gives_no_interval_and_not_one_of_no_width():
    values, several, one = [0.1, 0.5, 0.2, 0.9], ["a", "b", "c", "d"], ["a"] * 4
    for clusters in ((one, several), (several, one), (one, one)):
        assert np.isnan(statistics.difference_bootstrap(values, values[::-1], clusters, 50, 0)).all()
    assert np.isfinite(statistics.difference_bootstrap(values, values[::-1], (several, several), 50, 0)).all()
    rho = statistics.clustered_spearman(values, [1, 2, 4, 3], one, 50, 0)
    assert np.isnan([rho.low, rho.high]).all() and np.isfinite(rho.value)
    assert np.isnan(statistics.ratio_bootstrap(values, values, one, 50, 0)).all()
    assert np.isnan(statistics.cluster_bootstrap(values, one)).all()
