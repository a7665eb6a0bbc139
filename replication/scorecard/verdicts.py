"""What a value says about a claim, how sure that is, and whether another run would say it again.

A claim has two borders, on both sides of the value that supports neither it nor its opposite. A verdict
compares a value, its standard error and its degrees of freedom (Student's t) with the borders:

- supported or contradicted: the 95% interval lies beyond the border on the claim's side, or on the other;
- equivalent: the 90% interval lies between the borders (two one-sided tests). A claim of no difference says
  this, and is then supported;
- unsettled: none of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from replication.statistics import Estimate

VERDICTS = ("supported", "contradicted", "equivalent", "unsettled")
NOT_ASKED = "not asked"
Claimed = Literal["above", "below", "equal"]
DRAWS = 2000  # of repeats, for a probability


@dataclass(frozen=True)
class Borders:
    """The borders of a claim, and the side on which the claim is."""

    claimed: Claimed
    low: float
    high: float

    def verdicts(self, value, error, df) -> np.ndarray:
        """Return the verdicts [n] on values, standard errors and degrees of freedom [n]."""
        reach, short = (stats.t.ppf(level, df) * error for level in (0.975, 0.95))
        above, below = value - reach > self.high, value + reach < self.low
        inside = (value - short > self.low) & (value + short < self.high)
        supported = {"above": above, "below": below, "equal": inside}[self.claimed]
        cases = [supported, above | below, inside]
        return np.select(cases, VERDICTS[:3], VERDICTS[3])

    def verdict(self, estimate: Estimate) -> str:
        """Return the verdict on one estimate."""
        return str(self.verdicts(*map(np.asarray, estimate[:3])))

    def p(self, estimate: Estimate) -> float:
        """Return the level at which the verdict would be reached: below 0.05 unless it is "unsettled".

        The three hypotheses (below, between and above the borders) exclude each other, so at most one verdict
        is wrong, and the smaller of the two-sided p of lying outside and the p of lying between is a p-value.
        """
        value, error, df = estimate[:3]
        if not error > 0:
            return float(self.verdict(estimate) == "unsettled")
        low, high = (value - self.low) / error, (value - self.high) / error
        outside = 2 * min(stats.t.sf(high, df), stats.t.cdf(low, df))
        inside = max(stats.t.sf(low, df), stats.t.cdf(high, df))
        return float(min(1.0, outside, inside))

    def repeat_probability(self, estimate: Estimate, seed: int = 0) -> float:
        """Return the probability that a repeat of the same design, with other seeds, has the same verdict.

        The true error is drawn from its posterior given the estimated one and its degrees of freedom, the
        true value around the estimate, and the repeat's value and error around these.
        """
        generator = np.random.default_rng(seed)
        value, error, df = estimate[:3]
        if not error > 0:
            return 1.0
        true_error = error / np.sqrt(generator.chisquare(df, DRAWS) / df)
        repeated = value + np.sqrt(2) * true_error * generator.standard_normal(DRAWS)
        its_error = true_error * np.sqrt(generator.chisquare(df, DRAWS) / df)
        return float((self.verdicts(repeated, its_error, df) == self.verdict(estimate)).mean())


def holm(scorecard: pd.DataFrame) -> pd.Series:
    """Return Holm's p-values within each host, over the claims that count; nan for others."""
    by_host = scorecard[scorecard.counts].groupby("host").p
    return by_host.transform(lambda p: multipletests(p, method="holm")[1]).reindex(scorecard.index)
