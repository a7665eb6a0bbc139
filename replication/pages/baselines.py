"""Page 08: is the SAE's atom better than what else of the same size could be put in the write's place?

All replacements are measured at the same places, the draw `positions`: KL(native, patched) in nats at t + 1,
read scope `write`, against deletion. Codebooks are fitted on the writes of the SAE split, before any outcome.

| method          | what is put in for the native write n                                               |
|-----------------|-------------------------------------------------------------------------------------|
| atom            | the atom with the largest coefficient there; atom_and_mean: and the SAE's mean      |
| best_atom       | the atom a of the dictionary with the largest abs(<n, a>)                           |
| random          | another alive atom: the floor                                                       |
| native_rescaled | n itself, at the atom's coefficient: the ceiling of any direction at this amplitude |
| reconstruction  | all active atoms, with the mean if the SAE of writes has one                        |
| k1_...          | the same of an SAE with as many atoms, of which one is active per token (k = 1)     |
| nearest_write   | the training write with the largest absolute cosine with n, among `size` drawn ones |
| kmeans          | a k-means centroid of normalised writes; kmeans_pair: its top singular pair         |
| token_mean      | the mean training write at the same token; token_mean_pair: its top singular pair   |
| mean_write      | the mean training write                                                             |
| pca             | n projected on the first `size` principal components of the writes (matrices)       |
| side_pca        | n with its key and its value each projected on their first `size` components        |

Amplitudes: `coefficient` (the atom's own), `matched_norm` (of n), `projection` (nearest to n in Frobenius
norm), `fitted` (given by the method). PCA subtracts no mean, as the uncentred SAE.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.decomposition import TruncatedSVD
from torch import Tensor

from replication import layout
from replication import statistics as stats
from replication.study.fingerprint import Later
from replication.study.firings import by_place, drawn_positions, firing_windows, run_firings, saes_on
from replication.study.profile import Baselines
from replication.study.study import Study
from replication.study.training import SINGLE_ATOM, main_variants, train_single_atoms
from writesae.evaluate.atoms import inner_products
from writesae.evaluate.firings import CellSAE, Places, firings_at
from writesae.evaluate.replacement import (
    Terms,
    full_rank,
    inner,
    measure_terms,
    projected,
    rank_one,
    replacements,
    scaled,
    squared_norm,
)
from writesae.history import History
from writesae.hosts.base import Host, Run
from writesae.sae.train import top_singular_pair

KEYS = ["method", "target", "centre", "size", "amplitude", "stored", "per_write"]
PLACE = ["host", "layer", "head", "window", "position"]
REFERENCES = [("best_atom", "write", "none"), ("atom", "write", "none")]  # compared with every other method
POWER_ITERATIONS = 2  # of the randomised singular value decomposition
NAMES = dict(
    native_rescaled="write itself, rescaled (ceiling)",
    reconstruction="all active atoms",
    best_atom="best atom",
    atom="firing's atom",
    atom_and_mean="firing's atom and the mean",
    random="random atom (floor)",
    k1_best_atom="best atom, SAE with k = 1",
    k1_atom="firing's atom, SAE with k = 1",
    nearest_write="nearest of {size:,} raw writes",
    kmeans="k-means, {size:,} centroids",
    kmeans_pair="k-means, top singular pair",
    token_mean="token's mean write",
    token_mean_pair="token's mean write, top singular pair",
    mean_write="mean write",
    pca="PCA of writes, {size:,} components",
    side_pca="PCA per side, {size:,} + {size:,}",
)
FAMILY = dict.fromkeys(("native_rescaled", "random"), "floor and ceiling") | dict(nearest_write="raw writes")
MEANS = ("kmeans", "kmeans_pair", "token_mean", "token_mean_pair", "mean_write")
FAMILY |= dict.fromkeys(MEANS, "means of writes")
FAMILY |= dict.fromkeys(("pca", "side_pca"), "principal components")
FAMILY |= dict.fromkeys(set(NAMES) - set(FAMILY), "SAEs")
OF_SAES = ("reconstruction", "best_atom", "atom", "atom_and_mean", "random", "native_rescaled")
CENTRES = dict(mean="centred", none="uncentred")


class Method(NamedTuple):
    """A replacement; stored: numbers in its codebook, once per cell; per_write: numbers that name one write.

    target, centre: what its codebook was fitted on, and whether minus the mean. size: its entries."""

    method: str
    target: str
    centre: str
    size: int
    amplitude: str
    stored: int
    per_write: int


class Codebooks(NamedTuple):
    """What is fitted on the training writes of a cell.

    key [m, d_k], value [m, d_v]: unit sides of writes drawn at random; the codebooks of raw writes are the
    first `sizes` of them. centroids [c, d_k, d_v]. components [r, d_k, d_v]: orthonormal, the largest first.
    key_axes [d_k, d_k], value_axes [d_v, d_v]: orthonormal columns, the largest first. mean [d_k, d_v]: of
    all writes. token_ids [u], token_means [u, d_k, d_v]: mean write at a token, for a token without training
    writes the mean of all. tokens: the number of different tokens with training writes."""

    sizes: list[int]
    key: Tensor
    value: Tensor
    centroids: Tensor
    components: Tensor
    key_axes: Tensor
    value_axes: Tensor
    mean: Tensor
    token_ids: Tensor
    token_means: Tensor
    tokens: int


# Codebooks


def fit_codebooks(
    writes: History, tokens: Tensor, ids: Tensor, entries: int, settings: Baselines, seed: int
) -> Codebooks:
    """Return the Codebooks of training writes [N, T] at tokens [N, T]; ids [u]: tokens that need a mean.

    ids is ascending. entries: the SAE's number of atoms, which is also the number of centroids."""
    key, value = writes.key.flatten(0, 1), writes.value.flatten(0, 1)
    order = torch.randperm(len(key), generator=torch.Generator().manual_seed(seed))
    sizes = [entries * times for times in settings.nearest]
    drawn, some = order[: max(sizes)], order[: settings.fitted]
    matrices = (key[some][:, :, None] * value[some][:, None]).flatten(1)
    centroids = stats.kmeans(F.normalize(matrices, dim=-1).numpy(), entries, seed)
    svd = TruncatedSVD(max(settings.components), n_iter=POWER_ITERATIONS, random_state=seed)
    svd = svd.fit(matrices.numpy())
    centroids, components = (
        torch.from_numpy(x).float().unflatten(1, (writes.d_k, writes.d_v)) for x in (centroids, svd.components_)
    )
    sides, mean = (F.normalize(x[drawn], dim=-1) for x in (key, value)), writes.mean()
    both = (axes(x * other.norm(dim=-1, keepdim=True)) for x, other in ((key, value), (value, key)))
    means = token_means(key, value, tokens.flatten(), ids, mean)
    return Codebooks(sizes, *sides, centroids, components, *both, mean, ids, means, len(tokens.unique()))


def axes(vectors: Tensor) -> Tensor:
    """Return the eigenvectors [d, d] of the second moment of vectors [m, d] as columns, the largest first."""
    return torch.linalg.eigh(vectors.T @ vectors).eigenvectors.flip(1)


def token_means(key: Tensor, value: Tensor, tokens: Tensor, ids: Tensor, mean: Tensor) -> Tensor:
    """Return the mean write [u, d_k, d_v] at each token of ids [u]; `mean` for one that tokens [m] lack."""
    at = [(tokens == number).nonzero()[:, 0] for number in ids]
    return torch.stack([key[x].T @ value[x] / len(x) if len(x) else mean for x in at])


def nearest(key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the entry [n] with the largest abs(<n, a>) for writes key, value [n, d]; entries are [m, d]."""
    return inner_products((key, value), (keys, values)).abs().argmax(1)


# Replacements


def sae_terms(cell_sae: CellSAE, places: Places, factors, seed: int) -> dict[Method, Terms]:
    """Return what an SAE puts in at places of its firings. Where no atom is active, its atom is zero."""
    sae, native = cell_sae.sae, factors.at(places.row, places.position)
    key, value = native.key, native.write(cell_sae.write)
    norm, own = key.norm(dim=-1) * value.norm(dim=-1), places.coefficient.float()
    unit, active = replacements(cell_sae, places, factors, seed), (own > 0).float()
    keys, values = sae.atoms()
    best, stored = nearest(key, value, keys, values), sae.n_atoms * (sae.d_k + sae.d_v)

    def method(name: str, amplitude: str, more: int = 0, per_write: int = 2) -> Method:
        same = cell_sae.target, sae.config.centre, sae.n_atoms
        return Method(name, *same, amplitude, stored + more, per_write)

    atom, random = unit["atom"], unit["random"]
    terms = {
        method("atom", "coefficient"): scaled(atom, own),
        method("atom", "projection"): scaled(projected(atom, key, value), active),
        method("atom", "matched_norm"): scaled(atom, norm * active),
        method("best_atom", "projection"): projected(rank_one(keys[best], values[best]), key, value),
    }
    if sae.k == 1:
        return {x._replace(method=f"k1_{x.method}"): put_in for x, put_in in terms.items()}
    offset = sae.offset.numel() if "atom_and_mean" in unit else 0
    terms |= {
        method("reconstruction", "fitted", offset, 2 * sae.k): unit["reconstruction"],
        method("random", "coefficient"): scaled(random, own),
        method("random", "projection"): projected(random, key, value),
    }
    ceiling = method("native_rescaled", "coefficient", -stored, sae.d_k + sae.d_v)
    terms[ceiling] = scaled(unit["native_rescaled"], own)
    if offset:
        terms[method("atom_and_mean", "coefficient", offset)] = unit["atom_and_mean"]
    return terms


def codebook_terms(books: Codebooks, key: Tensor, value: Tensor, tokens: Tensor) -> dict[Method, Terms]:
    """Return what the codebooks put in for writes key [n, d_k], value [n, d_v] at tokens [n]."""
    sides, terms = key.shape[1] + value.shape[1], {}

    def method(name: str, size: int, each: int, amplitude: str = "projection", per_write: int = 2) -> Method:
        return Method(name, "write", "none", size, amplitude, size * each, per_write)

    for size in books.sizes:
        index = nearest(key, value, books.key[:size], books.value[:size])
        unit = rank_one(books.key[index], books.value[index])
        towards = inner(unit, key, value).sign()  # a raw write may point away from the native one
        same_norm = towards * key.norm(dim=-1) * value.norm(dim=-1)
        terms[method("nearest_write", size, sides)] = projected(unit, key, value)
        terms[method("nearest_write", size, sides, "matched_norm")] = scaled(unit, same_norm)
    count, whole = len(books.centroids), books.mean.numel()
    pairs = top_singular_pair(books.centroids)
    unit_centroids = F.normalize(books.centroids.flatten(1), dim=-1)
    index = ((key[:, :, None] * value[:, None]).flatten(1) @ unit_centroids.T).abs().argmax(1)
    terms[method("kmeans", count, whole)] = projected(full_rank(books.centroids[index]), key, value)
    index = nearest(key, value, *pairs)
    pair = rank_one(pairs[0][index], pairs[1][index])
    terms[method("kmeans_pair", count, sides)] = projected(pair, key, value)
    means = books.token_means[torch.searchsorted(books.token_ids, tokens)]
    terms[method("token_mean", books.tokens, whole)] = projected(full_rank(means), key, value)
    pair = projected(rank_one(*top_singular_pair(means)), key, value)
    terms[method("token_mean_pair", books.tokens, sides)] = pair
    mean = full_rank(books.mean.expand_as(means))
    terms[method("mean_write", 1, whole, per_write=1)] = projected(mean, key, value)
    return terms


def pca_terms(books: Codebooks, key: Tensor, value: Tensor, settings: Baselines) -> dict[Method, Terms]:
    """Return writes key [n, d_k], value [n, d_v] projected on principal components."""
    sides, whole, terms = key.shape[1] + value.shape[1], books.mean.numel(), {}
    coordinates = (key[:, :, None] * value[:, None]).flatten(1) @ books.components.flatten(1).T
    for size in settings.components:
        matrices = coordinates[:, :size] @ books.components[:size].flatten(1)
        method = Method("pca", "write", "none", size, "fitted", size * whole, size)
        terms[method] = full_rank(matrices.unflatten(1, books.mean.shape))
    for size in settings.side_components:
        pairs = (key, books.key_axes[:, :size]), (value, books.value_axes[:, :size])
        method = Method("side_pca", "write", "none", size, "fitted", size * sides, 2 * size)
        terms[method] = tuple((x @ axes @ axes.T)[:, None] for x, axes in pairs)
    return terms


# The measurement


def compare(
    host: Host, run: Run, cell_sae: CellSAE, firings, places, seed, saes, codebooks, settings, batch_rows
) -> pd.DataFrame:
    """Return one row per place and Method: kl, kl_delete (nats at t + 1), cosine with the native write.

    firings, places: the drawn places, as for `replace`, with the firings of `cell_sae`, the first of its
    cell. saes, codebooks: by cell, its list of CellSAE and its Codebooks (`Later`)."""
    cell = cell_sae.layer, cell_sae.head
    factors, books = host.factors(run, *cell), codebooks[cell]()
    native = factors.at(places.row, places.position)
    key, value = native.key, native.write(cell_sae.write)
    terms = {}
    for other in saes[cell]:
        terms |= sae_terms(other, Places.of(firings_at(other, firings), places.row.numpy()), factors, seed)
    terms |= codebook_terms(books, key, value, run.tokens[places.row, places.position])
    terms |= pca_terms(books, key, value, settings)
    put_in = {str(number): x for number, x in enumerate(terms.values())}
    put_in["delete"] = rank_one(torch.zeros_like(key), torch.zeros_like(value))
    kl = measure_terms(host, run, cell_sae, places, put_in, batch_rows=batch_rows)
    shared = firings[["window", "passage", "position"]].reset_index(drop=True)
    shared = shared.assign(host=host.name, layer=cell[0], head=cell[1], kl_delete=kl.delete)
    norm, tables = key.norm(dim=-1) * value.norm(dim=-1), []
    for number, (method, matrices) in enumerate(terms.items()):
        size = squared_norm(matrices).sqrt() * norm
        cosine = torch.where(size > 0, inner(matrices, key, value) / size, 0.0)
        tables.append(shared.assign(**method._asdict(), kl=kl[str(number)], cosine=cosine.numpy()))
    return pd.concat(tables, ignore_index=True)


def run(study: Study) -> pd.DataFrame:
    """Return the rows of `compare` for all cells of all hosts, which are kept in build/.

    Trains the SAEs with k = 1, and writes their table, baseline_saes.csv."""
    train_single_atoms(study)
    return pd.concat([_run_host(study, name) for name in study.profile.hosts], ignore_index=True)


def _run_host(study: Study, name: str) -> pd.DataFrame:
    profile, windows = study.profile, firing_windows(study, name)
    settings, write = profile.section("baselines", name), profile.saes.write
    places = drawn_positions(study, windows, settings.places)
    window, position = (torch.tensor(places[name].to_numpy()) for name in ("window", "position"))
    ids = windows.tokens[window, position].unique()
    training = study.windows(name, "sae").tokens
    cells = [study.cell(name, place) for place in profile.hosts[name].cells]
    roles = [x.role for x in main_variants(study, name) if x.centre in CENTRES and x.seed == profile.seed]
    kinds = [(target, role) for role in roles for target in profile.saes.targets] + [("write", SINGLE_ATOM)]
    wanted = [(cell, *kind) for cell, kind in product(cells, kinds)]
    saes, codebooks = {cell: [] for cell in cells}, {}
    for cell_sae in saes_on(study, name, windows, wanted):
        saes[cell_sae.layer, cell_sae.head].append(cell_sae)
    for cell in cells:
        given = dict(writes=study.harvested(name, *cell).history("write", write), tokens=training, ids=ids)
        given |= dict(entries=saes[cell][0].sae.n_atoms, settings=settings, seed=profile.seed)
        codebooks[cell] = Later(fit_codebooks, **given)
    drawn = [(saes[cell][0], firings_at(saes[cell][0], places)) for cell in cells]
    rows = profile.section("replacement", name).batch_rows
    options = dict(saes=saes, codebooks=codebooks, settings=settings, batch_rows=rows)
    return run_firings(study, name, "baselines", windows, drawn, compare, **options)


# Summaries


def summarise(table: pd.DataFrame, cells: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return one row per host, cell (or the paper's pooled) and method; intervals: bootstrap over passages.

    win_rate: the share of places where the method's KL is below that of deletion. recovered: 1 - mean KL /
    mean KL of deletion. kl_median, kl_delete_median: nats. cosine: the median of that with the native write.
    """

    def row(part: pd.DataFrame) -> dict:
        win = (part.kl < part.kl_delete).to_numpy()
        interval = stats.cluster_bootstrap(win, part.passage, resamples=resamples, seed=seed)
        numbers = dict(n=len(part), win_rate=win.mean()) | stats.ci(interval)
        numbers |= dict(kl_median=part.kl.median(), kl_delete_median=part.kl_delete.median())
        ratio = stats.ratio_bootstrap(part.kl, part.kl_delete, part.passage, resamples, seed)
        ends = stats.Interval(1 - ratio.high, 1 - ratio.low)
        numbers |= stats.with_ends("recovered", 1 - part.kl.mean() / part.kl_delete.mean(), ends)
        return numbers | dict(cosine=part.cosine.median())

    return stats.per_group(by_place(table, cells), ["host", "cells", *KEYS], row)


def contrasts(table: pd.DataFrame, cells: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return each of REFERENCES at its projection against every other method, at the same places.

    atom_closer: the share of places where the reference has the lower KL. difference: its share of recovered
    KL minus that of the method. Both with a bootstrap over passages."""
    rows = []
    for (host, place), part in by_place(table, cells).groupby(["host", "cells"], sort=False):
        index = [*PLACE, "passage", "kl_delete"]
        wide = part.pivot(index=index, columns=KEYS, values="kl")
        passage, delete = (wide.index.get_level_values(name) for name in ("passage", "kl_delete"))
        for reference in REFERENCES:
            (ours,) = [x for x in wide if x[:3] == reference and x[4] == "projection"]
            for other in [x for x in wide if x != ours]:
                closer, more = (wide[ours] < wide[other]).to_numpy(), (wide[other] - wide[ours]).to_numpy()
                row = dict(host=host, cells=place, reference=reference[0], **dict(zip(KEYS, other)))
                row |= dict(n=len(wide), atom_closer=closer.mean())
                row |= stats.ci(stats.cluster_bootstrap(closer, passage, resamples=resamples, seed=seed))
                interval = stats.ratio_bootstrap(more, delete, passage, resamples, seed)
                difference = more.mean() / delete.to_numpy().mean()
                rows.append(row | stats.with_ends("difference", difference, interval))
    return pd.DataFrame(rows)


# What the notebook shows


def described(table: pd.DataFrame) -> list[str]:
    """Return the name of each row's method."""
    names = [NAMES[name].format(size=size) for name, size in zip(table.method, table["size"], strict=True)]
    saes = "; SAE of " + table.target + "s, " + table.centre.map(CENTRES)
    return (pd.Series(names, table.index) + saes.where(table.method.isin(OF_SAES), "")).tolist()


def at_projection(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of one host scaled to fit the write, and the ceiling, in order of the KL recovered.

    Floor and ceiling are those of the uncentred SAE of writes."""
    limit = summary.method.isin(["random", "native_rescaled"])
    best = summary.amplitude.isin(["projection", "fitted"]) & ~limit
    of_writes = limit & summary.target.eq("write") & summary.centre.eq("none")
    ends = of_writes & (summary.amplitude.eq("projection") | summary.method.eq("native_rescaled"))
    chosen = summary[best | ends].sort_values("recovered").reset_index(drop=True)
    return chosen.assign(name=described(chosen))


def by_cell(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `at_projection` for each cell of every host, of replacements of rank one.

    `cell`: host and place in words. `kind`: the method in words, the same on all hosts, in order of the mean
    KL recovered over the cells. Of the SAEs only the uncentred ones of writes."""
    parts = []
    for (host, place), rows in summary[summary.cells != "pooled"].groupby(["host", "cells"], sort=False):
        best = at_projection(rows)
        of_writes = best.target.eq("write") & best.centre.eq("none")
        whole = best.method.isin(["reconstruction", "kmeans", "token_mean", "mean_write", "pca"])
        chosen = best[of_writes & ~whole]
        times = (chosen["size"] // chosen["size"][chosen.method == "best_atom"].item()).astype(str)
        raw = "nearest raw write, of " + times + " per SAE atom"
        kind = chosen.name.str.removesuffix("; SAE of writes, uncentred").mask(chosen.method == "nearest_write", raw)
        parts.append(chosen.assign(kind=kind, cell=f"{host.replace('_', ' ')}, {place}"))
    rows = pd.concat(parts, ignore_index=True)
    return rows.iloc[rows.groupby("kind").recovered.transform("mean").argsort(kind="stable")]


def readable(summary: pd.DataFrame) -> pd.DataFrame:
    """Return a summary for readers; shares in percent, KLs in millinats."""
    rows = summary.assign(**{"put in": described(summary)})
    columns = {
        "numbers stored": layout.numbers(summary.stored, ",.0f"),
        "numbers per write": summary.per_write,
        "KL recovered (%)": layout.estimates(summary, "recovered"),
        "beats deletion (%)": layout.estimates(summary, "win_rate", "ci_low", "ci_high"),
        "median KL (millinats)": layout.numbers(summary.kl_median, ".3f", 1000),
        "median cosine": layout.numbers(summary.cosine),
    }
    return layout.shown(rows, ["put in", "amplitude"], columns)


MATCHED = ("atom", "random", "mean_write", "resampled", "reconstruction")  # conditions at the native write's norm


def matched_norm(firings: pd.DataFrame) -> pd.DataFrame:
    """Return how often each condition beats deletion, per (host, target), at the native write's norm.

    firings: rows of replacement.csv at that norm. atom_beats_it: the share of firings at which the atom has a
    smaller KL than the condition. Bootstrap by passage."""
    rows = []
    for (host, target), part in firings.groupby(["host", "target"]):
        for name in MATCHED:
            won, over = stats.beats(part, name), stats.beats(part, "atom", name)
            row = dict(host=host, target=target, condition=name, n=len(part), beats_delete=won.mean())
            row |= stats.ci(stats.cluster_bootstrap(won, part.passage, resamples=1000))
            row["atom_beats_it"] = over.mean() if name != "atom" else float("nan")
            rows.append(row | dict(kl_median=part[f"kl_{name}"].median(), kl_delete_median=part.kl_delete.median()))
    return pd.DataFrame(rows)


def shown_matched(matched: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `matched_norm` for a reader."""
    columns = {"firings": layout.numbers(matched.n, ",.0f")}
    columns |= {"beats deletion (%)": layout.estimates(matched, "beats_delete", "ci_low", "ci_high")}
    columns |= {"the atom is nearer (%)": layout.numbers(matched.atom_beats_it, ".0f", 100)}
    columns |= {"median KL (millinats)": layout.numbers(matched.kl_median, ".3f", 1000)}
    columns |= {"of deletion": layout.numbers(matched.kl_delete_median, ".3f", 1000)}
    return layout.shown(matched, ["target", "condition"], columns)


def shown_contrasts(table: pd.DataFrame) -> pd.DataFrame:
    """Return for a reader what the SAE's best atom recovers beyond each other replacement, its cells pooled.

    table: of `contrasts`; replacements are scaled to fit the write."""
    rows = table[table.cells.eq("pooled") & table.reference.eq("best_atom") & ~table.method.isin(OF_SAES)]
    rows = rows[rows.amplitude.isin(["projection", "fitted"])]
    columns = {"numbers per write": rows.per_write}
    columns |= {"more KL recovered (points)": layout.estimates(rows, "difference")}
    columns |= {"nearer (% of places)": layout.estimates(rows, "atom_closer", "ci_low", "ci_high")}
    return layout.shown(rows.assign(against=described(rows)), ["host", "against"], columns)
