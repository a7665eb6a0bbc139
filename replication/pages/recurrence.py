"""Page 19: do the atoms of another training come back, and do their firings follow from the text?

Each dictionary of the middle cell is fitted several times: SAEs with other seeds (initial atoms, order of the
data), codebooks on other writes. An entry *fires* where an SAE's coefficient is the largest, or, for a
codebook, where its absolute cosine with the native write is the largest.

| dictionary  | entries                                                              |
|-------------|----------------------------------------------------------------------|
| sae         | atoms of an SAE of states or writes, centred or not                  |
| tied        | atoms of an SAE whose encoder is the decoder (<encoder, decoder> = 1) |
| kmeans      | centroids of normalised writes: matrices of any rank                 |
| raw         | writes of the SAE split, drawn at random                             |
| random      | pairs of random unit vectors                                         |
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from replication import layout
from replication import statistics as stats
from replication.study.firings import firing_windows
from replication.study.profile import Centre, Target
from replication.study.study import Study
from replication.study.training import TIED, main_variants, tied_specs, train_tied
from writesae.evaluate.atoms import MATCH, Pairs, inner_products
from writesae.evaluate.detection import detect
from writesae.harvesting import harvest
from writesae.history import History
from writesae.recurrence import Factors
from writesae.sae.model import SAE

FITTED = 8192  # training writes of k-means, drawn per fit; the share that comes back grows with them
NAMES = {
    ("sae", "write", "none"): "SAE of writes",
    ("sae", "write", "mean"): "SAE of writes, centred",
    ("sae", "state", "none"): "SAE of states",
    ("sae", "state", "mean"): "SAE of states, centred",
    ("tied", "write", "none"): "SAE of writes, tied encoder",
    ("kmeans", "write", "none"): "k-means of writes",
    ("raw", "write", "none"): "raw writes",
    ("random", "write", "none"): "random pairs",
}
KIND = ["dictionary", "target", "centre"]


class Kind(NamedTuple):
    """A way to fit a dictionary of a cell."""

    dictionary: str
    target: Target
    centre: Centre


def run(study: Study) -> pd.DataFrame:
    """Write results recurrence.csv, one row per entry that fires, of all dictionaries. Return it."""
    train_tied(study)
    return study.gather("recurrence", [_run_host(study, name) for name in study.profile.hosts])


def _run_host(study: Study, name: str) -> pd.DataFrame:
    profile = study.profile
    place, settings = profile.section("atoms", name).place, profile.section("recurrence", name)
    cell, windows = study.cell(name, place), firing_windows(study, name)
    saes: dict[Kind, dict[int, SAE]] = {}
    variants = [x for x in main_variants(study, name, place) if x.centre in ("none", "mean")]
    for target, variant in product(profile.saes.targets, variants):
        sae = study.sae(name, *cell, target, variant.role)
        saes.setdefault(Kind("sae", target, variant.centre), {})[variant.seed] = sae
    for spec in tied_specs(study, name, place) if name == study.main else ():
        sae = study.sae(name, *cell, "write", f"{TIED}-{spec.settings.seed}")
        saes.setdefault(Kind("tied", "write", "none"), {})[spec.settings.seed] = sae
    saes = {kind: trained for kind, trained in saes.items() if len(trained) > 1}
    if not saes:
        raise ValueError("This page compares trainings: give saes.trainings of the profile at least 2 of a kind.")
    seeds = list(next(iter(saes.values())))
    kinds = [*saes, *(Kind(dictionary, "write", "none") for dictionary in ("kmeans", "raw", "random"))]
    given = dict(saes=saes, seeds=seeds, windows=windows, write=profile.saes.write, atoms=settings.atoms)
    given |= dict(training=study.harvested(name, *cell), first=profile.data.first_position, seed=profile.seed)
    tokens, batch = windows.tokens, profile.data.batch_windows
    given["factors"] = harvest(study.host(name), tokens, [cell], batch, progress=False)[cell]
    table = study.stage("recurrence", name, kinds, examine, **given)
    return table.assign(host=name, place=place, layer=cell[0], head=cell[1])


def examine(
    kind: Kind, saes: dict, seeds, training: Factors, factors: Factors, windows, write, atoms, first, seed
) -> pd.DataFrame:
    """Return one row per entry that fires on the windows: KIND, seed, atom, firings, best, recurs, auc_VIEW.

    best: largest abs(cosine) with an entry of another training, the mean over the other trainings; recurs:
    the share of other trainings where it exceeds MATCH. auc_VIEW (`detect`): of at most `atoms` random
    entries per training. factors: of the windows; training: of the SAE split."""
    entries, writes = next(iter(saes.values()))[seeds[0]].n_atoms, training.history("write", write)
    books = saes[kind] if kind in saes else {s: codebook(kind, writes, entries, s) for s in seeds}
    matrices = {s: x.atoms() if isinstance(x, SAE) else x for s, x in books.items()}
    fit = fitting(windows.passage, seed)
    rows = []
    for number, book in books.items():
        history = factors.history(kind.target if isinstance(book, SAE) else "write", write)
        labels = fires(book, history)
        alive, firings = labels[:, first:][labels[:, first:] >= 0].unique(return_counts=True)
        others = [x for other, x in matrices.items() if other != number]
        best = torch.stack([cosines(matrices[number], x).abs().amax(1)[alive] for x in others])
        columns = dict(atom=alive, firings=firings, best=best.mean(0), recurs=(best > MATCH).float().mean(0))
        table = pd.DataFrame(dict(seed=number) | {name: x.numpy() for name, x in columns.items()})
        drawn = np.random.default_rng(seed).permutation(alive.numpy())[:atoms]
        rows.append(table.merge(detect(labels, windows.tokens, fit, np.sort(drawn), first), how="left", on="atom"))
    return pd.concat(rows).assign(**kind._asdict())


def fitting(passage: Tensor, seed: int) -> Tensor:
    """Return which windows are for fitting, [N] bool: those of a random half of the passages."""
    different = passage.unique()
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed))
    return torch.isin(passage, different[order[: len(different) // 2]])


def codebook(kind: Kind, writes: History, entries: int, seed: int) -> Pairs | Tensor:
    """Return a codebook of training writes: unit pairs, or for k-means centroids [entries, d_k, d_v]."""
    generator = torch.Generator().manual_seed(seed)
    if kind.dictionary == "random":
        sides = (torch.randn(entries, d, generator=generator) for d in (writes.d_k, writes.d_v))
        return tuple(F.normalize(x, dim=-1) for x in sides)
    key, value = (F.normalize(x.flatten(0, 1), dim=-1) for x in (writes.key, writes.value))
    drawn = torch.randperm(len(key), generator=generator)[: entries if kind.dictionary == "raw" else FITTED]
    if kind.dictionary == "raw":
        return key[drawn], value[drawn]
    matrices = (key[drawn][:, :, None] * value[drawn][:, None]).flatten(1)
    return torch.from_numpy(stats.kmeans(matrices.numpy(), entries, seed)).float().view(-1, writes.d_k, writes.d_v)


def cosines(book: Pairs | Tensor, others: Pairs | Tensor) -> Tensor:
    """Return the cosine of each matrix of a codebook with each of another of its kind, [n, m]."""
    if isinstance(book, tuple):
        return inner_products(book, others)
    one, other = (F.normalize(x.flatten(1), dim=-1) for x in (book, others))
    return one @ other.T


def fires(book: SAE | Pairs | Tensor, history: History) -> Tensor:
    """Return the entry that fires at each place of a history, [N, T] int64; -1: none is active."""
    if isinstance(book, SAE):
        active = book.encode_history(history)
        largest, slot = active.coefficients.max(-1)
        return torch.where(largest > 0, active.indices.gather(-1, slot[..., None])[..., 0], -1)
    rows = []
    for key, value in zip(history.key, history.value):
        write = (key, value) if isinstance(book, tuple) else key[:, :, None] * value[:, None]
        rows.append(cosines(write, book).abs().argmax(1))
    return torch.stack(rows)


def summarise(table: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return one row per host and dictionary, with 95% intervals that cover retraining.

    recurs: share of entries that come back; recurs_by_firing: the same per firing; best: mean; auc_VIEW: mean
    over the examined entries. n, examined: entries per training."""

    def row(part: pd.DataFrame) -> dict:
        examined, numbers = part[part.auc_all.notna()], dict(trainings=part.seed.nunique())
        by_firing = np.column_stack([part.recurs * part.firings, part.firings])
        for name, values in dict(recurs=part.recurs, recurs_by_firing=by_firing, best=part.best).items():
            made = stats.over_pairs(values, part.seed)
            numbers |= stats.with_ends(name, made.value, made.interval())
        own = dict(atoms=examined.atom, trainings=examined.seed, resamples=resamples, seed=seed)
        for name in ("auc_position", "auc_token", "auc_pair", "auc_all"):
            made = stats.over_trainings(examined[name], **own)
            numbers |= stats.with_ends(name, made.value, made.interval())
        m = numbers["trainings"]
        return numbers | dict(n=len(part) // m, examined=len(examined) // m)

    return stats.per_group(table, ["host", *KIND], row)


# What the notebook shows


def in_order(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the summary of one host in the order of NAMES, with `name` and its number `row`."""
    kinds = list(summary[KIND].itertuples(index=False, name=None))
    made = summary.assign(name=[NAMES[kind] for kind in kinds], row=[list(NAMES).index(kind) for kind in kinds])
    return made.sort_values("row")


def within(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the summary with the intervals of shares between 0 and 1."""
    ends = [f"{name}_{end}" for name in ("recurs", "recurs_by_firing") for end in ("low", "high")]
    return summary.assign(**summary[ends].clip(0, 1))


def readable(summary: pd.DataFrame, host: str) -> pd.DataFrame:
    """Return a table of one host for the notebook."""
    made = within(in_order(summary[summary.host == host]))
    columns = {"entries": layout.numbers(made.n, ",.0f"), "come back (%)": layout.estimates(made, "recurs")}
    columns |= {"come back, per firing (%)": layout.estimates(made, "recurs_by_firing")}
    headings = dict(best="mean best cosine", auc_token="AUC, token", auc_pair="AUC, pair", auc_all="AUC, all")
    columns |= {heading: layout.numbers(made[column]) for column, heading in headings.items()}
    return layout.shown(made.rename(columns=dict(name="dictionary of")), ["dictionary of"], columns)
