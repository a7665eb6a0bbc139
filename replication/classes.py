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
from functools import cached_property
from itertools import pairwise

import numpy as np
import pandas as pd
import torch.nn.functional as F
from scipy import stats
from scipy.special import logsumexp
from sklearn.mixture import GaussianMixture

from replication.statistics import Mixture, cluster_bootstrap, gaussian_mixture_bic, wilson
from replication.study.firings import firing_windows, firings_of
from replication.study.study import Suite
from writesae.evaluate.atoms import CLASSES, sides
from writesae.evaluate.firings import CellSAE, Places, encode_cell
from writesae.evaluate.replacement import STEPS
from writesae.harvesting import Cell, harvest
from writesae.recurrence import Factors

# Classes: how many atoms there are of each, and how much better two Gaussians fit their cosines than one


def median(values: pd.Series, seed: int = 0) -> tuple[float, float, float]:
    """(median, low, high), resampled one by one; the interval of fewer than two values is unknown."""
    if not len(values):
        return np.nan, np.nan, np.nan
    return float(values.median()), *cluster_bootstrap(values, np.arange(len(values)), np.median, seed=seed)


def bimodality(values: Sequence[float]) -> float:
    """(skewness^2 + 1) / kurtosis, both without bias: 1/3 for a Gaussian, 5/9 for a uniform; two humps lie above 5/9."""
    n = len(values)
    kurtosis = stats.kurtosis(values, bias=False) + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3))
    return float((stats.skew(values, bias=False) ** 2 + 1) / kurtosis)


def partition(alive: pd.DataFrame, seed: int = 0) -> dict:
    """One SAE's counts of classes, share of registers among its alive atoms (Wilson), median cosine of each class, and of
    all at other atoms' firings. `alive` is a line an atom with cosine, elsewhere, class, n_atoms."""
    counts = alive["class"].value_counts().reindex(CLASSES, fill_value=0)
    row = dict(alive=len(alive), registers=int(counts["register"]), bundles=int(counts["bundle"]))
    row |= dict(null=int(alive.n_atoms.iloc[0]) - len(alive), register_share=counts["register"] / len(alive))
    row["ci_low"], row["ci_high"] = wilson(row["registers"], len(alive))
    for name in CLASSES:
        found = median(alive.cosine[alive["class"] == name], seed)
        row |= zip((f"{name}_cosine", f"{name}_low", f"{name}_high"), found, strict=True)
    return row | dict(elsewhere_cosine=alive.elsewhere.median(), bimodality=bimodality(alive.cosine))


def log_density(mixture: Mixture, values: np.ndarray) -> np.ndarray:
    """log p of each value [n] under a mixture."""
    parts = stats.norm.logpdf(values[:, None], mixture.means, mixture.deviations)
    return logsumexp(parts + np.log(mixture.weights), axis=1)


def mixtures(cosines: Sequence[float], seed: int = 0) -> pd.DataFrame:
    """A line for one, two and three components: BIC, and delta_bic against one fewer, below 0 where the larger is
    preferred. Its interval resamples the values and keeps both fits: delta BIC is a sum over values, and a penalty."""
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
    """A line a tau: registers are the alive atoms whose median cosine is at least tau (Table 15), their share by Wilson."""
    rows, n = [], len(cosines)
    for tau in taus:
        registers = int((cosines >= tau).sum())
        low, high = wilson(registers, n)
        share = dict(register_share=registers / n, ci_low=low, ci_high=high)
        rows.append(dict(tau=tau, registers=registers, bundles=n - registers, **share, n=n))
    return pd.DataFrame(rows)


# The stages of notebook 03


class Scan:
    """A host's cells over the held-out windows, harvested once, when something first asks for them."""

    def __init__(self, suite: Suite, host: str):
        self.suite, self.host, self.windows = suite, host, firing_windows(suite, host)
        self.places = {suite.cell(host, place): place for place in suite.profile.hosts[host].cells}

    @cached_property
    def factors(self) -> dict[Cell, Factors]:
        batch = self.suite.profile.data.batch_windows
        return harvest(self.suite.host(self.host), self.windows.tokens, list(self.places), batch)

    def scanned(self) -> int:
        """Return the number of tokens in which firings are looked for."""
        windows, tokens = self.windows.tokens.shape
        return windows * (tokens - STEPS - self.suite.profile.data.first_position)

    def firings(self, layer: int, head: int, target: str, role: str) -> tuple[CellSAE, pd.DataFrame]:
        """Return the SAE of that role on a cell, and all its firings."""
        sae, write = self.suite.sae(self.host, layer, head, target, role), self.suite.profile.saes.write
        cell_sae = encode_cell((layer, head), target, write, sae, self.factors[layer, head])
        return cell_sae, firings_of(self.suite, cell_sae, self.windows)

    def alive(self, group: tuple) -> pd.DataFrame:
        """Return one row per alive atom of an SAE: class, median cosines, and `elsewhere`, the median cosine
        at as many firings of other atoms. group: layer, head, target, role, seed."""
        *place, role, seed = group
        cell_sae, firings = self.firings(*place, role)
        table = alive_atoms(self.suite, self.host, cell_sae, firings)
        shuffled = np.random.default_rng(self.suite.profile.seed).permutation(firings.atom.to_numpy())
        elsewhere = alive_atoms(self.suite, self.host, cell_sae, firings.assign(atom=shuffled))
        table["elsewhere"] = table.atom.map(elsewhere.set_index("atom").cosine)
        table = table.merge(sides(cell_sae, firings), on="atom")
        whole = dict(rate=table.firings / self.scanned(), place=self.places[cell_sae.layer, cell_sae.head])
        return table.assign(**whole, role=role, k=cell_sae.sae.k, seed=seed, n_atoms=cell_sae.sae.n_atoms)


def classify(cosines: pd.Series, seed: int) -> pd.Series:
    """register or bundle for each alive atom, by a two-component Gaussian mixture on its median cosine to the native
    write (the paper's Sec. 3.1): registers are of the component with the higher mean, and lie above the lower mean (the
    far low tail is of the wider component, whichever that is)."""
    values = cosines.to_numpy()[:, None]
    mixture = GaussianMixture(2, random_state=seed, n_init=5).fit(values)
    upper = mixture.predict(values) == int(np.argmax(mixture.means_[:, 0]))
    register = upper & (values[:, 0] > mixture.means_.min())
    return pd.Series(np.where(register, "register", "bundle"), index=cosines.index, name="class")


# The stage of notebook 07.


def alive_atoms(suite: Suite, host: str, cell_sae: CellSAE, firings: pd.DataFrame) -> pd.DataFrame:
    """Return one row per alive atom: held-out firings, median cosine to the native write, class."""
    places, writes = Places.of(firings), cell_sae.writes
    key, value = cell_sae.sae.atoms()
    left = (F.normalize(writes.key[places.window, places.position], dim=-1) * key[places.atom]).sum(-1)
    right = (F.normalize(writes.value[places.window, places.position], dim=-1) * value[places.atom]).sum(-1)
    table = firings.assign(cosine=(left * right).numpy()).groupby("atom", as_index=False)
    table = table.agg(cosine=("cosine", "median"), firings=("cosine", "size"), passages=("passage", "nunique"))
    table["class"] = classify(table.cosine, suite.profile.seed).to_numpy()
    return table.assign(host=host, layer=cell_sae.layer, head=cell_sae.head, target=cell_sae.target)
