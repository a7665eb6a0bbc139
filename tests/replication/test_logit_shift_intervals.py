"""replication.pages.logit_shift.median_r2: its value against `score`, its error against fresh prompts and atoms."""

import numpy as np
import pandas as pd
import pytest

from replication.pages import logit_shift
from writesae.evaluate.shifts import PREDICTORS


def points(generator, atoms=40, prompts=60) -> pd.DataFrame:
    """Shifts of which prompts and atoms each decide a part of the noise, at two sizes of the edit."""
    noise = generator.exponential(size=(atoms, 1, 1)) + generator.exponential(size=(1, 1, prompts))
    measured = generator.normal(size=(atoms, 2, prompts))
    predicted = measured + 0.5 * noise * generator.normal(size=measured.shape)
    atom, size, prompt = (x.ravel() for x in np.indices(measured.shape))
    table = pd.DataFrame(dict(atom=atom, eps=np.array([0.1, 1.0])[size], prompt=prompt, measured=measured.ravel()))
    return table.assign(**dict.fromkeys(PREDICTORS, 0.0)).assign(exact=predicted.ravel(), host="a", rank=1)


def test_the_median_is_that_of_the_scores():
    table = points(np.random.default_rng(0))
    scores = logit_shift.score(table)
    found = logit_shift.median_r2(table, "exact")
    assert found.value == pytest.approx(scores[scores.predictor == "exact"].r2.median())
    assert (found.n, found.df) == (80, 39)
    rows = logit_shift.by_rank(table).set_index("predictor")
    assert rows.loc["exact", ["r2_median", "ci_low", "ci_high"]].tolist() == [found.value, *found.interval()]


def test_the_error_covers_fresh_prompts_and_atoms():
    """The standard deviation over 60 fresh samples, compared with the mean of the estimated errors."""
    generator = np.random.default_rng(1)
    found = [logit_shift.median_r2(points(generator), "exact", resamples=100) for _ in range(60)]
    spread = np.std([x.value for x in found], ddof=1)
    assert np.mean([x.error for x in found]) == pytest.approx(spread, rel=0.25)
