"""The classes of atoms (the paper's Sec. 3.1, Table 1, App. E, G.1).

An atom fires at the positions where its coefficient is the largest of all. Over the held-out windows, an atom
is *null* if it never fires; otherwise it is alive, and a *register* or a *bundle* by its median cosine to the
native write (`classify`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import torch.nn.functional as F
from scipy import stats
from sklearn.mixture import GaussianMixture

from replication.statistics import Estimate, cluster_bootstrap, fit_mixture, over_pairs, wilson
from writesae.evaluate.atoms import CLASSES, MATCH, sides
from writesae.evaluate.firings import CellSAE, Places
from writesae.evaluate.replacement import STEPS
from writesae.text import Windows


def median(values: pd.Series, seed: int = 0) -> tuple[float, float, float]:
    """Return (median, low, high) from a bootstrap over values; the ends are nan for fewer than two."""
    if not len(values):
        return np.nan, np.nan, np.nan
    return float(values.median()), *cluster_bootstrap(values, np.arange(len(values)), np.median, seed=seed)


def bimodality(values: Sequence[float]) -> float:
    """Return (skewness^2 + 1) / kurtosis, unbiased: 1/3 for a Gaussian, above 5/9 for two modes."""
    n = len(values)
    kurtosis = stats.kurtosis(values, bias=False) + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3))
    return float((stats.skew(values, bias=False) ** 2 + 1) / kurtosis)


def partition(alive: pd.DataFrame, seed: int = 0) -> dict:
    """Return the counts and cosines of the classes of one SAE, and the share of registers among alive atoms.

    alive: the rows of `described_atoms`, with n_atoms."""
    registers, bundles = (int((alive["class"] == name).sum()) for name in ("register", "bundle"))
    row = dict(alive=len(alive), registers=registers, bundles=bundles)
    row |= dict(null=int(alive.n_atoms.iloc[0]) - len(alive), register_share=registers / len(alive))
    row["ci_low"], row["ci_high"] = wilson(registers, len(alive))
    for name in CLASSES:
        cosine = median(alive.cosine[alive["class"] == name], seed)
        row |= zip((f"{name}_cosine", f"{name}_low", f"{name}_high"), cosine, strict=True)
    return row | dict(elsewhere_cosine=alive.elsewhere.median(), bimodality=bimodality(alive.cosine))


def recurrence(pairs: pd.DataFrame) -> Estimate:
    """Return the share of (atom, other training) pairs of `matches` with a cosine above MATCH."""
    matched = (pairs.best > MATCH).groupby([pairs.seed, pairs.atom]).mean()
    return over_pairs(matched, matched.index.get_level_values("seed"))


def mixtures(cosines: Sequence[float], seed: int = 0) -> pd.DataFrame:
    """Return the BIC of mixtures with one, two and three components, one row each.

    delta_bic is the BIC minus that with one component fewer, below 0 if the larger mixture is better. It is a
    sum over values plus a penalty, so its interval is from a bootstrap of the values under unchanged fits.
    """
    values = np.asarray(cosines, dtype=np.float64)[:, None]
    n, fits = len(values), [fit_mixture(values, count, seed) for count in (1, 2, 3)]
    bic = [fit.bic(values) for fit in fits]
    rows = [dict(components=1, bic=bic[0], n=n)]
    for i, (fewer, more) in enumerate(pairwise(fits)):
        gain = 2 * n * (fewer.score_samples(values) - more.score_samples(values))
        penalty = 3 * np.log(n)  # weight, mean and deviation of the additional component
        low, high = (end + penalty for end in cluster_bootstrap(gain, np.arange(n), seed=seed))
        row = dict(components=more.n_components, bic=bic[i + 1], delta_bic=bic[i + 1] - bic[i])
        rows.append(row | dict(ci_low=low, ci_high=high, n=n))
    return pd.DataFrame(rows)


def thresholds(cosines: pd.Series, taus: Iterable[float]) -> pd.DataFrame:
    """Return one row per tau: how many alive atoms have a median cosine of at least tau (Table 15)."""
    rows, n = [], len(cosines)
    for tau in taus:
        registers = int((cosines >= tau).sum())
        low, high = wilson(registers, n)
        share = dict(register_share=registers / n, ci_low=low, ci_high=high)
        rows.append(dict(tau=tau, registers=registers, bundles=n - registers, **share, n=n))
    return pd.DataFrame(rows)


def registers(cosines: np.ndarray, mixture: GaussianMixture) -> np.ndarray:
    """Return which atoms [n] are registers by their cosines [n] and a mixture of two Gaussians (Sec. 3.1).

    Registers belong to the component with the higher mean, and are above the lower mean. Without the second
    condition, atoms of very low cosine could be registers, because they belong to the wider component."""
    means = mixture.means_[:, 0]
    return (mixture.predict(cosines[:, None]) == np.argmax(means)) & (cosines > means.min())


def classify(cosines: pd.Series, seed: int) -> pd.Series:
    """Return "register" or "bundle" for each alive atom, by `registers` and the mixture of their cosines."""
    values = cosines.to_numpy()
    register = registers(values, fit_mixture(values[:, None], 2, seed))
    return pd.Series(np.where(register, "register", "bundle"), index=cosines.index, name="class")


def scanned(windows: Windows, first_position: int) -> int:
    """Return the number of tokens that are searched for firings."""
    count, tokens = windows.tokens.shape
    return count * (tokens - STEPS - first_position)


def write_cosines(cell_sae: CellSAE, firings: pd.DataFrame) -> np.ndarray:
    """Return the cosine [n] of each firing's atom to the native write at its position."""
    places, writes = Places.of(firings), cell_sae.writes
    key, value = cell_sae.sae.atoms()
    left = (F.normalize(writes.key[places.window, places.position], dim=-1) * key[places.atom]).sum(-1)
    right = (F.normalize(writes.value[places.window, places.position], dim=-1) * value[places.atom]).sum(-1)
    return (left * right).numpy()


def alive_atoms(host: str, cell_sae: CellSAE, firings: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return one row per alive atom: number of firings, median cosine to the native write, class."""
    table = firings.assign(cosine=write_cosines(cell_sae, firings)).groupby("atom", as_index=False)
    columns = dict(cosine=("cosine", "median"), firings=("cosine", "size"), passages=("passage", "nunique"))
    table = table.agg(**columns)
    table["class"] = classify(table.cosine, seed).to_numpy()
    return table.assign(host=host, layer=cell_sae.layer, head=cell_sae.head, target=cell_sae.target)


def described_atoms(host: str, cell_sae: CellSAE, firings: pd.DataFrame, seed: int, tokens: int):
    """Return `alive_atoms` with the median cosines of both sides and the rate of firings over `tokens`.

    elsewhere: the atom's median cosine to the native write at as many random firings, of any atoms."""
    table = alive_atoms(host, cell_sae, firings, seed)
    shuffled = np.random.default_rng(seed).permutation(firings.atom.to_numpy())
    elsewhere = alive_atoms(host, cell_sae, firings.assign(atom=shuffled), seed)
    table["elsewhere"] = table.atom.map(elsewhere.set_index("atom").cosine)
    table = table.merge(sides(cell_sae, firings), on="atom")
    return table.assign(rate=table.firings / tokens)
