"""The statistics of the suite, from scipy, statsmodels and scikit-learn. Intervals are of 95%.

Every function takes anything that numpy reads as a vector, works in fp64, and raises ValueError for empty input, for
a value that is not finite, and for vectors whose lengths should agree and do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import r2_score
from sklearn.mixture import GaussianMixture
from statsmodels.stats.proportion import proportion_confint

# Tables


def resampled(statistic: Callable[[np.ndarray], float], clusters, resamples: int, seed: int) -> Interval:
    """The bootstrap interval by cluster of a statistic of row numbers, for what is no function of one column."""
    rows = np.arange(len(clusters))
    return cluster_bootstrap(rows, clusters, lambda drawn: statistic(drawn.astype(int)), resamples, seed)


def difference(a: pd.Series, b: pd.Series, clusters: tuple, resamples: int, seed: int) -> Interval:
    """The bootstrap interval of mean(a) - mean(b), whole clusters of each drawn on their own."""
    generator, means = np.random.default_rng(seed), []
    for values, labels in zip((a, b), clusters, strict=True):
        _, codes = np.unique(labels, return_inverse=True)
        count = codes.max() + 1
        draws = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
        means.append((draws @ np.bincount(codes, weights=values)) / (draws @ np.bincount(codes)))
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    return Interval(float(low), float(high))


def bootstrap_columns(values: np.ndarray, clusters, resamples: int, seed: int) -> np.ndarray:
    """statistics.cluster_bootstrap of the mean of every column of `values` [n, m], all from the same draws: [2, m]; nan from
    one cluster."""
    _, codes = np.unique(np.asarray(clusters), return_inverse=True)
    count = int(codes.max()) + 1
    if count < 2:
        return np.full((2, values.shape[1]), np.nan)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, codes, values)
    return np.quantile((draws @ sums) / (draws @ np.bincount(codes))[:, None], [0.025, 0.975], axis=0)


class Interval(NamedTuple):
    """A 95% interval."""

    low: float
    high: float


class Correlation(NamedTuple):
    """A correlation with its 95% interval and the p of no correlation."""

    value: float
    low: float
    high: float
    p: float
    n: int


class Test(NamedTuple):
    """A test's statistic and p; n counts all values, or pairs in a paired test."""

    __test__ = False  # not a test case of pytest

    statistic: float
    p: float
    n: int


class Mixture(NamedTuple):
    """A one-dimensional Gaussian mixture, components in order of their means."""

    components: int
    bic: float
    weights: tuple[float, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]
    n: int


def _vector(values, name: str = "the values") -> np.ndarray:
    vector = np.asarray(values, dtype=np.float64).ravel()
    if not vector.size:
        raise ValueError(f"A statistic needs data: {name} are empty.")
    if not np.isfinite(vector).all():
        raise ValueError(f"{int((~np.isfinite(vector)).sum())} of {vector.size} values are not finite.")
    return vector


def _pair(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = _vector(a), _vector(b)
    if a.size != b.size:
        raise ValueError(f"Paired values must be equally many: {a.size} and {b.size}.")
    return a, b


def wilson(successes: int, n: int) -> Interval:
    """Wilson's interval of a proportion. Raises ValueError for n = 0 or successes outside 0..n."""
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"A proportion needs 0 <= successes <= n and n > 0, not {successes} of {n}.")
    low, high = proportion_confint(successes, n, alpha=0.05, method="wilson")
    return Interval(float(low), float(high))


def _resampled_means(values: np.ndarray, codes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Means of bootstrap samples; `draws` [resamples, clusters] says how often each cluster was drawn."""
    sums, counts = np.bincount(codes, weights=values), np.bincount(codes)
    return (draws @ sums) / (draws @ counts)


def _resampled(statistic: Callable, values: np.ndarray, codes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    return np.array([statistic(np.repeat(values, row[codes])) for row in draws])


def cluster_bootstrap(
    values, clusters: Sequence, statistic: Callable = np.mean, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The percentile interval of a statistic when whole clusters are drawn with replacement.

    `values` [n], `clusters` [n] labels of any kind. Means go by cluster sums, without a loop. From one cluster nothing is
    known: both ends are nan. Raises ValueError for labels that are not one a value, and no resamples.
    """
    if resamples < 1:
        raise ValueError(f"A bootstrap takes at least one resample, not {resamples}.")
    values = _vector(values)
    labels = np.asarray(clusters)
    if labels.shape != values.shape:
        raise ValueError(f"Each value needs one cluster: {values.size} values, {labels.size} labels.")
    _, codes = np.unique(labels, return_inverse=True)
    count = int(codes.max()) + 1
    if count < 2:
        return Interval(np.nan, np.nan)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    mean = statistic is np.mean
    found = _resampled_means(values, codes, draws) if mean else _resampled(statistic, values, codes, draws)
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(float(low), float(high))


def paired_wilcoxon(a, b, alternative: str = "two-sided") -> Test:
    """Wilcoxon's signed-rank test of a - b; p = 1 where all pairs are equal."""
    a, b = _pair(a, b)
    if (a == b).all():
        return Test(0.0, 1.0, a.size)
    result = stats.wilcoxon(a, b, alternative=alternative)
    return Test(float(result.statistic), float(result.pvalue), a.size)


def mann_whitney(a, b, alternative: str = "two-sided") -> Test:
    """The Mann-Whitney U test of two independent samples; the statistic is U of `a`."""
    a, b = _vector(a), _vector(b)
    result = stats.mannwhitneyu(a, b, alternative=alternative)
    return Test(float(result.statistic), float(result.pvalue), a.size + b.size)


def cliffs_delta(a, b) -> float:
    """P(a > b) - P(a < b) over all pairs, by way of U."""
    a, b = _vector(a), _vector(b)
    return float(2 * stats.mannwhitneyu(a, b).statistic / (a.size * b.size) - 1)


def r2(actual, predicted) -> float:
    """1 - residual / total sum of squares, no fitted slope or offset. Raises ValueError for fewer than two pairs."""
    actual, predicted = _pair(actual, predicted)
    if actual.size < 2:
        raise ValueError("R2 needs at least two pairs.")
    return float(r2_score(actual, predicted))


def _unknown(a: np.ndarray, b: np.ndarray) -> Correlation | None:
    """What is said of fewer than four pairs, or where a side is constant: all nan."""
    known = a.size >= 4 and np.ptp(a) > 0 and np.ptp(b) > 0
    return None if known else Correlation(np.nan, np.nan, np.nan, np.nan, a.size)


def pearson(a, b) -> Correlation:
    """Pearson's r, Fisher's interval. From fewer than four pairs, or a constant side, nothing is known: all are nan."""
    a, b = _pair(a, b)
    if unknown := _unknown(a, b):
        return unknown
    result = stats.pearsonr(a, b)
    low, high = result.confidence_interval(0.95)
    return Correlation(float(result.statistic), float(low), float(high), float(result.pvalue), a.size)


def spearman(a, b) -> Correlation:
    """Spearman's rho, Bonett and Wright's interval; infinity has a rank. All are nan where `pearson`'s are."""
    a, b = _pair(*(stats.rankdata(x, nan_policy="omit") for x in (a, b)))
    if unknown := _unknown(a, b):
        return unknown
    result = stats.spearmanr(a, b)
    rho = float(np.clip(result.statistic, -1, 1))
    if abs(rho) == 1:
        return Correlation(rho, rho, rho, float(result.pvalue), a.size)
    reach = stats.norm.ppf(0.975) * np.sqrt((1 + rho**2 / 2) / (a.size - 3))
    low, high = np.tanh(np.arctanh(rho) + np.array([-reach, reach]))
    return Correlation(rho, float(low), float(high), float(result.pvalue), a.size)


def gaussian_mixture_bic(values, components: Sequence[int] = (1, 2, 3), seed: int = 0) -> list[Mixture]:
    """A Gaussian mixture for each number of components; the lowest BIC is the one to prefer.

    Raises ValueError where there are fewer values than components, and for no number of components, as well.
    """
    values = _vector(values)[:, None]
    if not components or min(components) < 1:
        raise ValueError(f"A mixture has at least one component, not {list(components)}.")
    if len(values) < max(components):
        raise ValueError(f"{len(values)} values cannot make a mixture of {max(components)} components.")
    return [_mixture(values, count, seed) for count in components]


def _mixture(values: np.ndarray, count: int, seed: int) -> Mixture:
    model = GaussianMixture(count, n_init=5, random_state=seed).fit(values)
    order = np.argsort(model.means_[:, 0])
    parts = (model.weights_, model.means_[:, 0], np.sqrt(model.covariances_[:, 0, 0]))
    return Mixture(count, float(model.bic(values)), *(tuple(map(float, part[order])) for part in parts), len(values))


def permutation_test(a, b, paired: bool = False, resamples: int = 10_000, seed: int = 0) -> Test:
    """Two-sided permutation test of the difference of means a - b, by exchanging labels, or within pairs.

    Raises ValueError for fewer than two values on a side as well.
    """
    a, b = _pair(a, b) if paired else (_vector(a), _vector(b))
    if min(a.size, b.size) < 2:
        raise ValueError("A permutation test needs at least two values on each side.")
    result = stats.permutation_test(
        (a, b),
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        permutation_type="samples" if paired else "independent",
        vectorized=True,
        n_resamples=resamples,
        batch=500,
        rng=np.random.default_rng(seed),
    )
    return Test(float(result.statistic), float(result.pvalue), a.size if paired else a.size + b.size)
