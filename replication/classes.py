"""The classes of atoms (the paper's Sec. 3.1, Table 1, App. E, G.1).

An atom fires where its coefficient is the largest of all. Over the held-out windows it is then

| class    | which                                                                                          |
|----------|------------------------------------------------------------------------------------------------|
| register | alive, of the upper of two Gaussian components in the median cosine to the native write, and   |
|          | above the lower one's mean                                                                     |
| bundle   | alive, and not a register                                                                      |
| null     | never fires                                                                                    |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import torch.nn.functional as F
from scipy import stats
from scipy.special import logsumexp

from replication.statistics import Mixture, cluster_bootstrap, fit_mixture, gaussian_mixture_bic, wilson
from writesae.evaluate.atoms import CLASSES, sides
from writesae.evaluate.firings import CellSAE, Places
from writesae.evaluate.replacement import STEPS
from writesae.text import Windows

# Classes: how many atoms there are of each, and how much better two Gaussians fit their cosines than one


def median(values: pd.Series, seed: int = 0) -> tuple[float, float, float]:
    """Return (median, low, high), bootstrap over single values; the ends are nan for fewer than two."""
    if not len(values):
        return np.nan, np.nan, np.nan
    return float(values.median()), *cluster_bootstrap(values, np.arange(len(values)), np.median, seed=seed)


def bimodality(values: Sequence[float]) -> float:
    """Return (skewness^2 + 1) / kurtosis, unbiased: 1/3 for a Gaussian, above 5/9 for two humps."""
    n = len(values)
    kurtosis = stats.kurtosis(values, bias=False) + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3))
    return float((stats.skew(values, bias=False) ** 2 + 1) / kurtosis)


def partition(alive: pd.DataFrame, seed: int = 0) -> dict:
    """Return the classes of one SAE: their counts, the share of registers among alive atoms (Wilson),
    cosines.

    alive: one row per alive atom, with the columns cosine, elsewhere (the cosine at other atoms' firings),
    class, n_atoms.
    """
    counts = alive["class"].value_counts().reindex(CLASSES, fill_value=0)
    row = dict(alive=len(alive), registers=int(counts["register"]), bundles=int(counts["bundle"]))
    row |= dict(null=int(alive.n_atoms.iloc[0]) - len(alive), register_share=counts["register"] / len(alive))
    row["ci_low"], row["ci_high"] = wilson(row["registers"], len(alive))
    for name in CLASSES:
        cosine = median(alive.cosine[alive["class"] == name], seed)
        row |= zip((f"{name}_cosine", f"{name}_low", f"{name}_high"), cosine, strict=True)
    return row | dict(elsewhere_cosine=alive.elsewhere.median(), bimodality=bimodality(alive.cosine))


def log_density(mixture: Mixture, values: np.ndarray) -> np.ndarray:
    """Return log p [n] of the values [n] under a mixture."""
    parts = stats.norm.logpdf(values[:, None], mixture.means, mixture.deviations)
    return logsumexp(parts + np.log(mixture.weights), axis=1)


def mixtures(cosines: Sequence[float], seed: int = 0) -> pd.DataFrame:
    """Return the BIC of mixtures of one, two and three components, one row each.

    delta_bic is the BIC minus that of one component fewer; it is below 0 where the larger mixture is
    preferred. Its interval resamples the values and keeps both fits, because delta BIC is a sum over values
    plus a penalty.
    """
    values = np.asarray(cosines, dtype=np.float64)
    n, fits = len(values), gaussian_mixture_bic(cosines, (1, 2, 3), seed)
    rows = [dict(components=1, bic=fits[0].bic, n=n)]
    for fewer, more in pairwise(fits):
        gain = 2 * n * (log_density(fewer, values) - log_density(more, values))
        penalty = 3 * np.log(n)  # weight, mean and deviation of the further component
        low, high = cluster_bootstrap(gain, np.arange(n), seed=seed)
        interval = dict(ci_low=low + penalty, ci_high=high + penalty)
        rows.append(dict(components=more.components, bic=more.bic, delta_bic=more.bic - fewer.bic, **interval, n=n))
    return pd.DataFrame(rows)


def thresholds(cosines: pd.Series, taus: Iterable[float]) -> pd.DataFrame:
    """Return the share of registers with Wilson's interval, one row per tau (Table 15).

    A register is here an alive atom with a median cosine of at least tau.
    """
    rows, n = [], len(cosines)
    for tau in taus:
        registers = int((cosines >= tau).sum())
        low, high = wilson(registers, n)
        share = dict(register_share=registers / n, ci_low=low, ci_high=high)
        rows.append(dict(tau=tau, registers=registers, bundles=n - registers, **share, n=n))
    return pd.DataFrame(rows)


def classify(cosines: pd.Series, seed: int) -> pd.Series:
    """Return "register" or "bundle" per alive atom, by a two-component Gaussian mixture (Sec. 3.1).

    The mixture is one of the median cosines to the native write. Registers belong to the component with the
    higher mean and are above the lower mean: without the second condition, the far low tail would belong to
    the wider component, whichever that is.
    """
    values = cosines.to_numpy()[:, None]
    mixture = fit_mixture(values, 2, seed)
    upper = mixture.predict(values) == int(np.argmax(mixture.means_[:, 0]))
    register = upper & (values[:, 0] > mixture.means_.min())
    return pd.Series(np.where(register, "register", "bundle"), index=cosines.index, name="class")


# What is known of each alive atom


def scanned(windows: Windows, first_position: int) -> int:
    """Return the number of tokens in which firings are looked for."""
    count, tokens = windows.tokens.shape
    return count * (tokens - STEPS - first_position)


def alive_atoms(host: str, cell_sae: CellSAE, firings: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return one row per alive atom: its held-out firings, its median cosine to the native write, its class."""
    places, writes = Places.of(firings), cell_sae.writes
    key, value = cell_sae.sae.atoms()
    left = (F.normalize(writes.key[places.window, places.position], dim=-1) * key[places.atom]).sum(-1)
    right = (F.normalize(writes.value[places.window, places.position], dim=-1) * value[places.atom]).sum(-1)
    table = firings.assign(cosine=(left * right).numpy()).groupby("atom", as_index=False)
    table = table.agg(cosine=("cosine", "median"), firings=("cosine", "size"), passages=("passage", "nunique"))
    table["class"] = classify(table.cosine, seed).to_numpy()
    return table.assign(host=host, layer=cell_sae.layer, head=cell_sae.head, target=cell_sae.target)


def described_atoms(host: str, cell_sae: CellSAE, firings: pd.DataFrame, seed: int, tokens: int) -> pd.DataFrame:
    """Return `alive_atoms` with the median cosines of both sides, firings per scanned token, and `elsewhere`.

    elsewhere: the median cosine at as many firings of other atoms; tokens: how many were scanned for firings.
    """
    table = alive_atoms(host, cell_sae, firings, seed)
    shuffled = np.random.default_rng(seed).permutation(firings.atom.to_numpy())
    elsewhere = alive_atoms(host, cell_sae, firings.assign(atom=shuffled), seed)
    table["elsewhere"] = table.atom.map(elsewhere.set_index("atom").cosine)
    table = table.merge(sides(cell_sae, firings), on="atom")
    return table.assign(rate=table.firings / tokens)
