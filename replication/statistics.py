"""Statistics from numpy, scipy, statsmodels and scikit-learn. All intervals are 95% intervals.

Functions take whatever numpy reads as a vector, and compute in fp64. Unless a docstring says otherwise, they
raise ValueError for empty input, for values that are not finite, and for pairs of unequal length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import r2_score
from sklearn.mixture import GaussianMixture
from statsmodels.stats.proportion import proportion_confint


class Interval(NamedTuple):
    """A 95% interval; the ends are arrays [m] for a statistic with m columns."""

    low: float
    high: float


class Correlation(NamedTuple):
    """A correlation, its 95% interval, and the p-value of the hypothesis that it is zero."""

    value: float
    low: float
    high: float
    p: float
    n: int


class Test(NamedTuple):
    """The statistic and p-value of a test; n is the number of values, or of pairs in a paired test."""

    __test__ = False  # not a test case of pytest

    statistic: float
    p: float
    n: int


class Mixture(NamedTuple):
    """A one-dimensional Gaussian mixture, with components in order of their means."""

    components: int
    bic: float
    weights: tuple[float, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]
    n: int


def _finite(values) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if not values.size:
        raise ValueError("A statistic needs data: the values are empty.")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} values are not finite.")
    return values


def _vector(values) -> np.ndarray:
    return _finite(values).ravel()


def _pair(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = _vector(a), _vector(b)
    if a.size != b.size:
        raise ValueError(f"Paired values must be equally many: {a.size} and {b.size}.")
    return a, b


# Intervals


def wilson(successes: int, n: int) -> Interval:
    """Return Wilson's interval of a proportion. Raises ValueError for n = 0 or successes outside 0..n."""
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"A proportion needs 0 <= successes <= n and n > 0, not {successes} of {n}.")
    low, high = proportion_confint(successes, n, alpha=0.05, method="wilson")
    return Interval(float(low), float(high))


def _percentiles(samples: np.ndarray) -> Interval:
    low, high = np.quantile(samples, [0.025, 0.975], axis=-1)
    return Interval(low, high) if low.ndim else Interval(float(low), float(high))


def _codes(clusters) -> tuple[np.ndarray, int]:
    """Return the number of each label's cluster, and the number of clusters."""
    codes = np.unique(np.asarray(clusters), return_inverse=True)[1]
    return codes, int(codes.max()) + 1


def _draws(count: int, resamples: int, rng: np.random.Generator, draw: str = "multinomial") -> np.ndarray:
    """Return [resamples, count]: how often each cluster is in each bootstrap sample."""
    if draw == "multinomial":
        return rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.stack([np.bincount(x, minlength=count) for x in rng.integers(0, count, (resamples, count))])


def _means(values: np.ndarray, codes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Return the means of bootstrap samples, [resamples] for values [n] and [m, resamples] for [n, m]."""
    sums = np.zeros((draws.shape[1], *values.shape[1:]))
    np.add.at(sums, codes, values)
    return (draws @ sums).T / (draws @ np.bincount(codes))


def cluster_bootstrap(
    values,
    clusters: Sequence,
    statistic: Callable = np.mean,
    resamples: int = 2000,
    seed: int = 0,
    draw: Literal["multinomial", "integers"] = "multinomial",
) -> Interval:
    """Return the percentile interval of a statistic when whole clusters are drawn with replacement.

    values: a vector [n]; a matrix [n, m], for the means of all columns from the same draws (`statistic` is
    the mean, the ends are [m]); or a function of row numbers, for a statistic of several columns. clusters:
    one label per row. draw: "multinomial" draws the counts of clusters, "integers" their numbers. Both ends
    are nan for a single cluster. Raises ValueError also for resamples < 1.
    """
    if resamples < 1:
        raise ValueError(f"A bootstrap takes at least one resample, not {resamples}.")
    if callable(values):
        values, statistic = np.arange(len(clusters)), values
    else:
        values = _finite(values)
    if len(values) != len(clusters):
        raise ValueError(f"Each value needs one cluster: {len(values)} values, {len(clusters)} labels.")
    codes, count = _codes(clusters)
    if count < 2:
        unknown = np.full(values.shape[1:], np.nan) if values.ndim > 1 else np.nan
        return Interval(unknown, unknown)
    draws = _draws(count, resamples, np.random.default_rng(seed), draw)
    if statistic is np.mean:
        return _percentiles(_means(values, codes, draws))
    return _percentiles(np.array([statistic(np.repeat(values, row[codes])) for row in draws]))


def over_trainings(
    values, clusters: Sequence, per=None, resamples: int = 2000, seed: int = 0
) -> tuple[float, Interval]:
    """Return the mean over trainings of mean(values) / mean(per), and its interval, which covers retraining.

    values, per: [n, m], n places in `clusters`, each measured with m trainings; per: 1 by default. The variance
    is that of the mean over these trainings when clusters are drawn again (from the width of its percentile
    interval, because a ratio can have far outliers), plus the variance of the m estimates divided by m. The
    quantile is Student's t, with Satterthwaite's degrees of freedom. With one training the interval covers the
    places only.
    """
    values = _finite(values)
    per = np.ones_like(values) if per is None else _finite(per)
    codes, count = _codes(clusters)
    estimates = values.mean(0) / per.mean(0)
    draws = _draws(count, resamples, np.random.default_rng(seed))
    drawn = (_means(values, codes, draws) / _means(per, codes, draws)).mean(0)
    trainings, mean = values.shape[1], float(estimates.mean())
    low, high = _percentiles(drawn)
    parts, freedom = [((high - low) / (2 * stats.norm.ppf(0.975))) ** 2], [count - 1]
    if trainings > 1:
        parts, freedom = [*parts, estimates.var(ddof=1) / trainings], [*freedom, trainings - 1]
    total = sum(parts)
    if total == 0:
        return mean, Interval(mean, mean)
    degrees = total**2 / sum(part**2 / f for part, f in zip(parts, freedom, strict=True))
    reach = stats.t.ppf(0.975, degrees) * np.sqrt(total)
    return mean, Interval(float(mean - reach), float(mean + reach))


def ratio_bootstrap(a, b, clusters: Sequence, resamples: int, seed: int) -> Interval:
    """Return the percentile interval of mean(a) / mean(b) for pairs [n], when whole clusters are drawn.

    Both ends are nan for a single cluster.
    """
    values = np.stack(_pair(a, b), 1)
    codes, count = _codes(clusters)
    if count < 2:
        return Interval(np.nan, np.nan)
    above, below = _means(values, codes, _draws(count, resamples, np.random.default_rng(seed)))
    return _percentiles(above / below)


def difference_bootstrap(a, b, clusters: tuple[Sequence, Sequence], resamples: int, seed: int) -> Interval:
    """Return the percentile interval of mean(a) - mean(b); clusters are drawn independently in a and b.

    Both ends are nan for a single cluster in a or in b.
    """
    generator, means = np.random.default_rng(seed), []
    for values, labels in zip((a, b), clusters, strict=True):
        codes, count = _codes(labels)
        if count < 2:
            return Interval(np.nan, np.nan)
        means.append(_means(_vector(values), codes, _draws(count, resamples, generator)))
    return _percentiles(means[0] - means[1])


def wider(*intervals: Interval) -> Interval:
    """Return the smallest of the low ends and the largest of the high ends."""
    return Interval(min(x.low for x in intervals), max(x.high for x in intervals))


# Rows of tables


def with_ends(name: str, value, interval: Interval) -> dict:
    """Return the columns NAME, NAME_low and NAME_high."""
    return {name: value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def ci(interval: Interval) -> dict:
    """Return the columns ci_low and ci_high."""
    return dict(ci_low=interval.low, ci_high=interval.high)


def per_group(table: pd.DataFrame, keys: list[str], row: Callable, sort: bool = False) -> pd.DataFrame:
    """Return one row per group of rows with the same keys: the keys, and the columns `row(group)`."""
    groups = table.groupby(keys, sort=sort, observed=True)
    return pd.DataFrame([dict(zip(keys, values, strict=True)) | row(part) for values, part in groups])


# Win rates


def beats(firings: pd.DataFrame, condition: str = "atom", control: str = "delete") -> pd.Series:
    """Return at which firings the KL of a condition is below that of a control."""
    return firings[f"kl_{condition}"] < firings[f"kl_{control}"]


def rate_row(happened, resamples: int, seed: int, name: str = "win_rate", **clusters: Sequence) -> dict:
    """Return the share of True values as columns of a table.

    The columns are `name`, Wilson's interval (ci_low, ci_high), and for each keyword KIND=labels the
    bootstrap interval over these clusters (KIND_low, KIND_high).
    """
    happened = np.asarray(happened, dtype=bool)
    low, high = wilson(int(happened.sum()), len(happened))
    row = {name: happened.mean(), "ci_low": low, "ci_high": high}
    for kind, labels in clusters.items():
        low, high = cluster_bootstrap(happened, labels, resamples=resamples, seed=seed)
        row |= {f"{kind}_low": low, f"{kind}_high": high}
    return row


# Tests and correlations


def paired_wilcoxon(a, b) -> Test:
    """Wilcoxon's two-sided signed-rank test of a - b; p = 1 if all pairs are equal."""
    a, b = _pair(a, b)
    if (a == b).all():
        return Test(0.0, 1.0, a.size)
    return Test(*map(float, stats.wilcoxon(a, b)), a.size)


def mann_whitney(a, b) -> Test:
    """The two-sided Mann-Whitney U test of two independent samples; the statistic is U of `a`."""
    a, b = _vector(a), _vector(b)
    return Test(*map(float, stats.mannwhitneyu(a, b)), a.size + b.size)


def cliffs_delta(a, b) -> float:
    """Return P(a > b) - P(a < b) over all pairs, computed from U."""
    a, b = _vector(a), _vector(b)
    return float(2 * stats.mannwhitneyu(a, b).statistic / (a.size * b.size) - 1)


def permutation_test(a, b, paired: bool = False, resamples: int = 10_000, seed: int = 0) -> Test:
    """Two-sided test of mean(a) - mean(b) by exchange of labels, or of the two values of a pair.

    Also raises ValueError for fewer than two values on a side.
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


def r2(actual, predicted) -> float:
    """Return 1 - residual / total sum of squares, without a fit. Raises ValueError below two pairs."""
    actual, predicted = _pair(actual, predicted)
    if actual.size < 2:
        raise ValueError("R2 needs at least two pairs.")
    return float(r2_score(actual, predicted))


def _is_undefined(a: np.ndarray, b: np.ndarray) -> bool:
    return a.size < 4 or np.ptp(a) == 0 or np.ptp(b) == 0


def pearson(a, b) -> Correlation:
    """Pearson's r with Fisher's interval; all nan for fewer than four pairs or a constant side."""
    a, b = _pair(a, b)
    if _is_undefined(a, b):
        return Correlation(*[np.nan] * 4, a.size)
    result = stats.pearsonr(a, b)
    numbers = (result.statistic, *result.confidence_interval(0.95), result.pvalue)
    return Correlation(*map(float, numbers), a.size)


def spearman(a, b) -> Correlation:
    """Spearman's rho with Bonett and Wright's interval; infinity has a rank. All nan as in `pearson`."""
    a, b = _pair(*(stats.rankdata(x, nan_policy="omit") for x in (a, b)))
    if _is_undefined(a, b):
        return Correlation(*[np.nan] * 4, a.size)
    result = stats.spearmanr(a, b)
    rho = float(np.clip(result.statistic, -1, 1))
    if abs(rho) == 1:
        return Correlation(rho, rho, rho, float(result.pvalue), a.size)
    reach = stats.norm.ppf(0.975) * np.sqrt((1 + rho**2 / 2) / (a.size - 3))
    low, high = np.tanh(np.arctanh(rho) + np.array([-reach, reach]))
    return Correlation(rho, float(low), float(high), float(result.pvalue), a.size)


def clustered_spearman(a, b, clusters: Sequence, resamples: int, seed: int) -> Correlation:
    """Spearman's rho, with the percentile interval of a bootstrap over clusters.

    The ranks are those of the whole sample. All nan as in `pearson`; the ends are nan if a resample is constant,
    and for a single cluster.
    """
    rho, (a, b) = spearman(a, b), _pair(a, b)
    if np.isnan(rho.value):
        return rho
    x, y = (stats.zscore(stats.rankdata(side)) for side in (a, b))
    codes, count = _codes(clusters)
    if count < 2:
        return rho._replace(low=np.nan, high=np.nan)
    sums = np.zeros((count, 6))
    np.add.at(sums, codes, np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1))
    n, sum_x, sum_y, xx, yy, xy = (_draws(count, resamples, np.random.default_rng(seed)) @ sums).T
    with np.errstate(invalid="ignore"):
        samples = (n * xy - sum_x * sum_y) / np.sqrt((n * xx - sum_x**2) * (n * yy - sum_y**2))
    return rho._replace(**_percentiles(samples)._asdict())


# Mixtures


def fit_mixture(values: np.ndarray, components: int, seed: int) -> GaussianMixture:
    """Return scikit-learn's Gaussian mixture of values [n, 1], fitted in their dtype."""
    return GaussianMixture(components, n_init=5, random_state=seed).fit(values)


def gaussian_mixture_bic(values, components: Sequence[int] = (1, 2, 3), seed: int = 0) -> list[Mixture]:
    """Return one Gaussian mixture per number of components; the lowest BIC is the best.

    Also raises ValueError for fewer values than components.
    """
    values = _vector(values)[:, None]
    if len(values) < max(components):
        raise ValueError(f"{len(values)} values cannot make a mixture of {max(components)} components.")
    return [_mixture(fit_mixture(values, count, seed), values) for count in components]


def _mixture(model: GaussianMixture, values: np.ndarray) -> Mixture:
    order = np.argsort(model.means_[:, 0])
    parts = (model.weights_, model.means_[:, 0], np.sqrt(model.covariances_[:, 0, 0]))
    parts = (tuple(map(float, part[order])) for part in parts)
    return Mixture(model.n_components, float(model.bic(values)), *parts, len(values))
