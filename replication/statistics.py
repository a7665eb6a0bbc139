"""Statistics from numpy, scipy, statsmodels and scikit-learn. All intervals are 95% intervals.

Functions take whatever numpy reads as a vector, and compute in fp64. Unless a docstring says otherwise, they
raise ValueError for empty input, for values that are not finite, and for pairs of unequal length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import r2_score
from sklearn.mixture import GaussianMixture
from statsmodels.stats.proportion import proportion_confint

FEWEST = 5  # clusters with an event: a bootstrap of fewer is too narrow


class Interval(NamedTuple):
    """A 95% interval; the ends are arrays [m] for a statistic with m columns."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A value with its standard error and degrees of freedom.

    n: number of values per training; trainings: number of SAEs that it is a mean over (1 also if there is no
    SAE); between_seeds: the standard deviation of the trainings' estimates, nan for one; shared: the part of
    the error that is the same for other trainings at the same places.
    """

    value: float
    error: float
    df: float
    n: int
    trainings: int = 1
    between_seeds: float = np.nan
    shared: float = 0.0

    def interval(self, level: float = 0.95) -> Interval:
        """Return Student's interval at a level."""
        reach = stats.t.ppf((1 + level) / 2, self.df) * self.error
        return Interval(float(self.value - reach), float(self.value + reach))


class Correlation(NamedTuple):
    """A correlation and its 95% interval."""

    value: float
    low: float
    high: float


def _finite(values) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if not values.size:
        raise ValueError("A statistic needs data: the values are empty.")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} values are not finite.")
    return values


def _pair(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = _finite(a), _finite(b)
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
    return Interval(*np.quantile(samples, [0.025, 0.975], axis=-1))


def _codes(clusters) -> tuple[np.ndarray, int]:
    """Return the number of each label's cluster, and the number of clusters."""
    codes = np.unique(np.asarray(clusters), return_inverse=True)[1]
    return codes, int(codes.max()) + 1


def _draws(count: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return [resamples, count]: how often each cluster is in each bootstrap sample."""
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples)


@lru_cache(maxsize=8)
def _kept_draws(count: int, resamples: int, seed: int) -> np.ndarray:
    """Return `_draws`, kept because many rows of a table take the same ones."""
    return _draws(count, resamples, np.random.default_rng(seed))


def _means(values: np.ndarray, codes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Return the means of bootstrap samples, [resamples] for values [n] and [m, resamples] for [n, m]."""
    sums = np.zeros((draws.shape[1], *values.shape[1:]))
    np.add.at(sums, codes, values)
    return (draws @ sums).T / (draws @ np.bincount(codes, minlength=draws.shape[1]))


def cluster_bootstrap(
    values, clusters: Sequence, statistic: Callable = np.mean, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return the percentile interval of a statistic when whole clusters are drawn with replacement.

    values: a vector [n]; a matrix [n, m], for the means of all columns from the same draws (`statistic` is
    the mean, the ends are [m]); or a function of row numbers, for a statistic of several columns. clusters:
    one label per row. Both ends are nan for a single cluster.
    """
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
    draws = _draws(count, resamples, np.random.default_rng(seed))
    if statistic is np.mean:
        return _percentiles(_means(values, codes, draws))
    return _percentiles(np.array([statistic(np.repeat(values, row[codes])) for row in draws]))


def over_trainings(
    values,
    places: Sequence | None = None,
    atoms: Sequence | None = None,
    trainings: Sequence | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Return the mean over trainings of a statistic, with a standard error that covers retraining.

    values: a vector [n], for its mean; a matrix [n, 2], for the mean of the first column over that of the
    second; or a function of row numbers. places, atoms: n labels of the clusters that are drawn again. Places
    (passages, prompts) are the same for all trainings, atoms belong to their training. trainings: n labels;
    by default there is one training.

    The error has two parts: the sampling error of the places, which m trainings share, and the variance of
    their estimates divided by m, which is at least the sampling variance that they do not share. The second
    part alone is the interval of Hartung and Knapp with equal weights (t with m - 1 degrees of freedom); with
    both, the degrees of freedom are Satterthwaite's. The error is nan for a single cluster.
    """
    values = values if callable(values) else _finite(values)
    n = len(atoms if places is None else places)
    training, count = _codes(np.zeros(n) if trainings is None else trainings)
    rows = [np.flatnonzero(training == number) for number in range(count)]
    kinds = {} if places is None else dict(places=_codes(places))
    if atoms is not None:
        kinds["atoms"] = _codes(_codes(atoms)[0] * count + training)
    estimates = np.array([_of_rows(values, part) for part in rows])
    single, pooled, shared, freedom = _sampling_variance(values, kinds, rows, resamples, seed)
    own, between = max(single - shared, 0.0), np.nan
    if count > 1:
        shared = np.clip((count * pooled - single) / (count - 1), 0, single)
        between = float(estimates.std(ddof=1))
        own = max(between**2, single - shared) / count
        freedom = float(satterthwaite(shared, freedom, own, count - 1))
    value, error, shared = (float(x) for x in (estimates.mean(), np.sqrt(shared + own), np.sqrt(shared)))
    return Estimate(value, error, float(freedom), n // count, count, between, shared)


def satterthwaite(one, its_df, other, other_df) -> np.ndarray:
    """Return the degrees of freedom of a sum of two estimated variances; those of the first if both are 0."""
    parts = np.square(one) / its_df + np.square(other) / other_df
    return np.where(parts > 0, np.square(np.add(one, other)) / np.where(parts > 0, parts, 1), its_df)


def _of_rows(values, rows: np.ndarray) -> float:
    if callable(values):
        return values(rows)
    mean = values[rows].mean(0)
    return mean[0] / mean[1] if values.ndim == 2 else mean


def _sampling_variance(values, kinds: dict, rows: list[np.ndarray], resamples: int, seed: int) -> tuple:
    """Return the sampling variance of one training's estimate (mean over trainings), that of the mean over
    trainings, that of one training when places alone are drawn again, and the degrees of freedom.

    kinds: `_codes` of places and atoms. Two kinds are combined as by Cameron, Gelbach and Miller (2011): the
    sum of the variances minus that of a bootstrap over pairs of labels; not less than the larger of the two.
    """
    if min(count for _, count in kinds.values()) < 2:
        return np.nan, np.nan, np.nan, np.nan
    pairs = []
    if len(kinds) == 2:
        (one, _), (other, size) = kinds.values()
        pairs = [_codes(one * size + other)]
    variances = []
    for codes, count in [*kinds.values(), *pairs]:
        draws = _kept_draws(count, resamples, seed)
        samples = np.stack([_resampled(values, part, codes, draws) for part in rows])
        variances.append(((deviation(samples) ** 2).mean(), deviation(samples.mean(0)) ** 2))
    each = np.array(variances[: len(kinds)])
    single, pooled = np.maximum(each.sum(0) - np.array(variances[len(kinds) :]).sum(0), each.max(0))
    shared = min(each[0, 0], single) if "places" in kinds else 0.0
    counts = np.array([count - 1 for _, count in kinds.values()])
    parts = (each[:, 0] ** 2 / counts).sum()
    return single, pooled, shared, each[:, 0].sum() ** 2 / parts if parts else counts.min()


def _resampled(values, rows: np.ndarray, codes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Return the statistic [resamples] of one training's rows. codes: cluster of every row of the table."""
    if callable(values):
        return np.array([values(np.repeat(rows, row[codes[rows]])) for row in draws])
    means = _means(values[rows], codes[rows], draws)
    return means[0] / means[1] if values.ndim == 2 else means


def deviation(samples: np.ndarray) -> np.ndarray:
    """Return the standard deviation by the width of the central 95%, since a ratio can have far outliers."""
    low, high = np.quantile(samples, [0.025, 0.975], axis=-1)
    return (high - low) / (2 * stats.norm.ppf(0.975))


def rarely(estimate: Estimate, affected: int, clusters: int, size: float = 1.0) -> Estimate:
    """Return the estimate of a share or a change that is 0 but in a few clusters, with the error of so few.

    affected: clusters (prompts) with an event; size: their mean share or change. A bootstrap of zeros has no
    width, and that of a single event is too narrow. Below FEWEST affected clusters the error is at least such
    that the one-sided 95% end is Clopper and Pearson's for the share of affected clusters, times the size.
    """
    if affected >= FEWEST:
        return estimate
    bound = size * proportion_confint(affected, clusters, alpha=0.1, method="beta")[1]
    reach = float((bound - abs(estimate.value)) / stats.t.ppf(0.95, estimate.df))
    return estimate._replace(error=max(estimate.error, reach))


def share_of_trials(happened, trials: pd.DataFrame, resamples: int = 1000) -> Interval:
    """Return the wider of a bootstrap over prompts and Clopper and Pearson's interval of a share of trials.

    The latter counts each pair of prompt and target once. trials: with the columns prompt and target."""
    pairs = len(trials[["prompt", "target"]].drop_duplicates())
    exact = Interval(*proportion_confint(np.mean(happened) * pairs, pairs, method="beta"))
    return wider(exact, cluster_bootstrap(happened, trials.prompt, resamples=resamples))


def over_pairs(values, trainings: Sequence) -> Estimate:
    """Return the mean over trainings of values that compare the entries of one training with all others.

    values: a vector [n], for its mean; or a matrix [n, 2], for the mean of the first column over that of the
    second. trainings: n labels. The means of m trainings share their comparisons (that of A with B is that of
    B with A), so they differ less than means of other trainings would. The variance is the sampling variance
    of one training's mean, plus what the delete-one jackknife finds beyond it (for m = 2 nothing), and the
    degrees of freedom are m - 1.
    """
    codes, count = _codes(trainings)
    values = _finite(values)
    parts = [values[codes == number] for number in range(count)]
    means = np.array([_of_rows(part, slice(None)) for part in parts])
    if values.ndim == 2:  # the residuals of a ratio, to first order
        parts = [(x[:, 0] - mean * x[:, 1]) / x[:, 1].mean() for x, mean in zip(parts, means, strict=True)]
    sampling, beyond = np.mean([x.var(ddof=1) / len(x) if len(x) > 1 else np.nan for x in parts]), 0.0
    if count > 2:
        beyond = max(0.0, means.var(ddof=1) - sampling * (count - 2) / (count - 1))
        beyond *= 4 / count * ((count - 1) / (count - 2)) ** 2
    error, between = float(np.sqrt(sampling + beyond)), float(means.std(ddof=1))
    return Estimate(float(means.mean()), error, count - 1, len(values) // count, count, between)


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
        means.append(_means(_finite(values), codes, _draws(count, resamples, generator)))
    return _percentiles(means[0] - means[1])


def wider(*intervals: Interval) -> Interval:
    """Return the smallest of the low ends and the largest of the high ends."""
    return Interval(min(x.low for x in intervals), max(x.high for x in intervals))


def student(values) -> Interval:
    """Return Student's interval of the mean of independent estimates [n], such as those of n hosts; both ends
    are nan for one."""
    values = _finite(values)
    if len(values) < 2:
        return Interval(np.nan, np.nan)
    reach = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return Interval(float(values.mean() - reach), float(values.mean() + reach))


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
    row = {name: happened.mean()} | ci(wilson(int(happened.sum()), len(happened)))
    for kind, labels in clusters.items():
        low, high = cluster_bootstrap(happened, labels, resamples=resamples, seed=seed)
        row |= {f"{kind}_low": low, f"{kind}_high": high}
    return row


# Tests and correlations


def paired_wilcoxon(a, b) -> float:
    """Return p of Wilcoxon's two-sided signed-rank test of a - b; 1 if all pairs are equal."""
    a, b = _pair(a, b)
    return 1.0 if (a == b).all() else float(stats.wilcoxon(a, b).pvalue)


def cliffs_delta(a, b) -> float:
    """Return P(a > b) - P(a < b) over all pairs, computed from U."""
    a, b = _finite(a), _finite(b)
    return float(2 * stats.mannwhitneyu(a, b).statistic / (a.size * b.size) - 1)


def permutation_test(a, b, paired: bool = False, resamples: int = 10_000, seed: int = 0) -> float:
    """Return p of a two-sided test of mean(a) - mean(b) by exchange of labels, or within pairs.

    Also raises ValueError for fewer than two values on a side.
    """
    a, b = _pair(a, b) if paired else (_finite(a), _finite(b))

    def difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return x.mean(axis=axis) - y.mean(axis=axis)

    options = dict(permutation_type="samples" if paired else "independent", vectorized=True, batch=500)
    options |= dict(n_resamples=resamples, rng=np.random.default_rng(seed))
    return float(stats.permutation_test((a, b), difference, **options).pvalue)


def r2(actual, predicted) -> float:
    """Return 1 - residual / total sum of squares, without a fit. Raises ValueError below two pairs."""
    actual, predicted = _pair(actual, predicted)
    if actual.size < 2:
        raise ValueError("R2 needs at least two pairs.")
    return float(r2_score(actual, predicted))


def spearman(a, b) -> Correlation:
    """Spearman's rho with Bonett and Wright's interval; infinity has a rank. All nan for fewer than four pairs or a
    constant side."""
    a, b = _pair(*(stats.rankdata(x, nan_policy="omit") for x in (a, b)))
    if a.size < 4 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(*[np.nan] * 3)
    rho = float(np.clip(stats.spearmanr(a, b).statistic, -1, 1))
    if abs(rho) == 1:
        return Correlation(rho, rho, rho)
    reach = stats.norm.ppf(0.975) * np.sqrt((1 + rho**2 / 2) / (a.size - 3))
    low, high = np.tanh(np.arctanh(rho) + np.array([-reach, reach]))
    return Correlation(rho, float(low), float(high))


def clustered_spearman(a, b, clusters: Sequence, resamples: int, seed: int) -> Correlation:
    """Spearman's rho, with the percentile interval of a bootstrap over clusters.

    Ranks are of the whole sample. All nan as in `spearman`; the ends are nan if a resample is constant.
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


# Mixtures and clusters


def kmeans(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return `count` centroids of rows [m, d], [count, d], by scikit-learn's k-means in batches."""
    settings = dict(batch_size=1024, max_iter=5, n_init=1, init="random")
    return MiniBatchKMeans(count, random_state=seed, **settings).fit(rows).cluster_centers_


def fit_mixture(values: np.ndarray, components: int, seed: int) -> GaussianMixture:
    """Return scikit-learn's Gaussian mixture of values [n, 1], fitted in their dtype."""
    return GaussianMixture(components, n_init=5, random_state=seed).fit(values)
