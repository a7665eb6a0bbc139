"""Notebook 03: the classes of atoms (Sec. 3.1, Table 1, App. E, G.1) and their differences (App. F.2, H).

Besides the main SAEs there are *variants* for one cell, each with another k or with another seed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
from scipy import stats

from replication import layout
from replication.classes import described_atoms, mixtures, partition, recurrence, scanned, thresholds
from replication.statistics import Interval, ci, cliffs_delta, cluster_bootstrap, per_group
from replication.study.fingerprint import Later
from replication.study.firings import firing_windows
from replication.study.study import Study
from replication.study.training import host_variants, variant_name
from writesae.evaluate.atoms import (
    ATOM_KEYS,
    CLASSES,
    MATCH,
    frequent_tokens,
    matches,
    top_contexts,
)
from writesae.evaluate.firings import all_firings, encode_cell
from writesae.evaluate.replacement import STEPS
from writesae.harvesting import Cell, harvest

SAE_KEYS = ["host", "place", "layer", "head", "target", "role", "k", "seed", "n_atoms"]


def variation(counts: Sequence[float]) -> dict:
    """Return the coefficient of variation of at least two counts, with its chi-square interval."""
    n = len(counts)
    cv = float(stats.variation(counts, ddof=1))
    low, high = cv * np.sqrt((n - 1) / stats.chi2.ppf([0.975, 0.025], n - 1))
    return dict(mean=float(np.mean(counts)), cv=cv, ci_low=float(low), ci_high=float(high), n=n)


def match_shares(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return the share of (atom, other seed) pairs with |cosine| > MATCH, by class, with `over_pairs`' interval."""
    rows = []
    for name, part in [("all", pairs), *pairs.groupby("class")]:
        found = recurrence(part)
        low, high = found.interval()
        row = {"class": name, "share": found.value} | ci(Interval(max(0.0, low), min(1.0, high)))
        row |= dict(chance=(part.chance > MATCH).mean(), median_best=part.best.median())
        rows.append(row | dict(n_atoms=part.groupby(["seed", "atom"]).ngroups, n=len(part)))
    return pd.DataFrame(rows)


COSINE_EDGES = (0.0, 0.05, 0.2, 0.3)  # Table 13


def with_atoms(table: pd.DataFrame, alive: pd.DataFrame) -> pd.DataFrame:
    """Add each atom's class, atom_cosine and firings to a table. ValueError for an atom not in `alive`."""
    classes = alive[[*ATOM_KEYS, "class", "cosine", "firings"]].rename(columns=dict(cosine="atom_cosine"))
    table = table.merge(classes, how="left", on=ATOM_KEYS, validate="many_to_one")
    if missing := int(table["class"].isna().sum()):
        raise ValueError(f"{missing} of {len(table)} rows are of atoms that have no class.")
    return table


def axes_per_atom(firings: pd.DataFrame, alive: pd.DataFrame, scanned: int) -> pd.DataFrame:
    """Return one row per (atom, amplitude) with the four axes of Table 17.

    delta_kl: median KL(delete) - KL(atom); flip_CONDITION: the share of firings whose top-1 token the
    condition changes; firings_per_10k: of the `scanned` tokens."""
    changed = {f"flip_{name}": firings[f"top1_{name}"] != firings.top1_native for name in ("delete", "atom")}
    table = firings.assign(delta_kl=firings.kl_delete - firings.kl_atom, **changed)
    columns = dict(delta_kl=("delta_kl", "median"), flip_delete=("flip_delete", "mean"))
    columns |= dict(flip_atom=("flip_atom", "mean"), n=("delta_kl", "size"))
    table = table.groupby([*ATOM_KEYS, "amplitude"], as_index=False).agg(**columns)
    return with_atoms(table, alive).assign(firings_per_10k=lambda x: x.firings * 1e4 / scanned)


def delta_interval(a: Sequence[float], b: Sequence[float], seed: int = 0, resamples: int = 1000) -> Interval:
    """Return the bootstrap interval of Cliff's delta; the two samples are resampled independently."""

    def delta(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.sign(a[..., :, None] - b[..., None, :]).mean((-1, -2))

    options = dict(n_resamples=resamples, batch=50, vectorized=True, method="percentile")
    samples, options["rng"] = (np.asarray(a), np.asarray(b)), np.random.default_rng(seed)
    return Interval(*map(float, stats.bootstrap(samples, delta, **options).confidence_interval))


def class_axes(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return Table 17: one row per (axis, cell, target, amplitude); delta > 0 if registers are higher."""
    rows, keys = [], ["host", "layer", "head", "target", "amplitude"]
    for values, part in table.groupby(keys, sort=False):
        for axis in SCALES:
            register, bundle = (part.loc[part["class"] == name, axis] for name in CLASSES)
            row = dict(zip(keys, values, strict=True), axis=axis, n_register=len(register), n_bundle=len(bundle))
            row |= dict(register_median=register.median(), bundle_median=bundle.median())
            row |= dict.fromkeys(["cliffs_delta", "ci_low", "ci_high", "p"], np.nan)
            if min(len(register), len(bundle)) > 1:
                row |= ci(delta_interval(register, bundle, seed))
                p = stats.mannwhitneyu(register, bundle).pvalue
                row |= dict(cliffs_delta=cliffs_delta(register, bundle), p=p)
            rows.append(row)
    return pd.DataFrame(rows)


def by_cosine(firings: pd.DataFrame, alive: pd.DataFrame, edges=COSINE_EDGES, seed: int = 0) -> pd.DataFrame:
    """Return Table 13: the atom's win rate over deletion per bin of its median cosine; bootstrap by atom."""
    binned = with_atoms(firings.assign(win=firings.kl_atom < firings.kl_delete), alive)
    names = layout.bin_names(edges)
    binned["cosine_bin"] = pd.cut(binned.atom_cosine, [-np.inf, *edges, np.inf], right=False, labels=names)

    def row(part: pd.DataFrame) -> dict:
        rate = dict(win_rate=part.win.mean()) | ci(cluster_bootstrap(part.win, part.atom, seed=seed))
        return rate | dict(n_atoms=part.atom.nunique(), n_firings=len(part))

    return per_group(binned, ["host", "layer", "head", "target", "amplitude", "cosine_bin"], row, sort=True)


def class_tables(study: Study, alive: pd.DataFrame, firings: pd.DataFrame) -> tuple[pd.DataFrame, ...]:
    """Write results population_axes and population_by_cosine, from notebook 09's alive atoms and firings."""
    hosts, seed = firings.groupby("host", sort=False), study.profile.seed
    first = study.profile.data.first_position
    parts = [axes_per_atom(part, alive, scanned(firing_windows(study, name), first)) for name, part in hosts]
    axes, bins = class_axes(pd.concat(parts), seed), by_cosine(firings, alive, seed=seed)
    return study.write("population_axes", axes), study.write("population_by_cosine", bins)


def run(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write results atoms.csv, one row per alive atom of all SAEs; return it with the main SAEs' firings."""
    profile, tables, firings = study.profile, [], []
    for name in profile.hosts:
        cell, factors = study.cell(name, profile.section("atoms", name).place), _factors(study, name)
        saes = [(*x, "main", profile.seed) for x in _main_saes(study, name)]
        saes += [
            (*cell, target, variant_name(variant), variant.seed)
            for variant, target in product(host_variants(study, name), profile.saes.targets)
        ]
        tables.append(describe(study, name, saes, factors))
        firings.append(main_firings(study, name, factors))
    return study.gather("atoms", tables), pd.concat(firings, ignore_index=True)


def _cells(study: Study, host_name: str) -> dict[Cell, str]:
    return {study.cell(host_name, place): place for place in study.profile.hosts[host_name].paper_places}


def _main_saes(study: Study, host_name: str) -> list[tuple[int, int, str]]:
    return [(*cell, target) for cell in _cells(study, host_name) for target in study.profile.saes.targets]


def describe(study: Study, host_name: str, groups: list[tuple], factors: Later | None = None) -> pd.DataFrame:
    """Return one row per alive atom of a host's SAEs. groups: (layer, head, target, role, seed) of each."""
    saes = {group: study.sae(host_name, *group[:4]) for group in groups}
    tokens = scanned(firing_windows(study, host_name), study.profile.data.first_position)
    given = _given(study, host_name, saes, factors) | dict(places=_cells(study, host_name))
    return study.stage("atoms", host_name, groups, _atoms, **given, seed=study.profile.seed, tokens=tokens)


def main_firings(study: Study, host_name: str, factors: Later | None = None) -> pd.DataFrame:
    """Return every firing of a host's main SAEs (kept in build/); `factors` saves a second harvest."""
    saes = {group: study.sae(host_name, *group) for group in _main_saes(study, host_name)}
    return study.stage("atom_firings", host_name, saes, _firings, **_given(study, host_name, saes, factors))


def _factors(study: Study, host_name: str) -> Later:
    """Return the factors of a host's cells over the held-out windows, harvested at first use."""
    tokens, batch = firing_windows(study, host_name).tokens, study.profile.data.batch_windows
    cells = list(_cells(study, host_name))
    return Later(harvest, host=study.host(host_name), windows=tokens, cells=cells, batch=batch)


def _given(study: Study, host_name: str, saes: dict, factors: Later | None) -> dict:
    given = dict(saes=saes, factors=factors or _factors(study, host_name), write=study.profile.saes.write)
    passage = firing_windows(study, host_name).passage
    return given | dict(host=host_name, passage=passage, first=study.profile.data.first_position)


def _encoded(group: tuple, saes: dict, factors: Later, passage, write: str, first: int):
    """Return the SAE of a group (layer, head, target, ...) on the held-out windows, and all its firings."""
    *cell, target = group[:3]
    cell_sae = encode_cell(tuple(cell), target, write, saes[group], factors()[tuple(cell)])
    return cell_sae, all_firings(cell_sae, passage, first, cell_sae.indices.shape[1] - STEPS)


def _atoms(group: tuple, host: str, places: dict, seed: int, tokens: int, **given) -> pd.DataFrame:
    cell_sae, firings = _encoded(group, **given)
    columns = dict(role=group[3], k=cell_sae.sae.k, seed=group[4], n_atoms=cell_sae.sae.n_atoms)
    table = described_atoms(host, cell_sae, firings, seed, tokens)
    return table.assign(place=places[group[:2]], **columns)


def _firings(group: tuple, host: str, **given) -> pd.DataFrame:
    return _encoded(group, **given)[1].assign(**dict(zip(ATOM_KEYS, (host, *group))))


def tables(study: Study, alive: pd.DataFrame) -> tuple[pd.DataFrame, ...]:
    """Write results atom_partition and atom_mixtures (all SAEs), atom_thresholds (main SAEs)."""
    seed, counts, orders, sweeps = study.profile.seed, [], [], []
    for values, part in alive.groupby(SAE_KEYS, sort=False):
        where = dict(zip(SAE_KEYS, values, strict=True))
        counts.append(where | partition(part, seed))
        orders.append(mixtures(part.cosine, seed).assign(**where))
        if where["role"] == "main":
            taus = study.profile.section("atoms", where["host"]).taus
            sweeps.append(thresholds(part.cosine, taus).assign(**where))
    orders, sweeps = (pd.concat(x).set_index(SAE_KEYS).reset_index() for x in (orders, sweeps))
    results = dict(atom_partition=pd.DataFrame(counts), atom_mixtures=orders, atom_thresholds=sweeps)
    return tuple(study.write(name, table) for name, table in results.items())


def seeds(study: Study, alive: pd.DataFrame, parts: pd.DataFrame) -> tuple[pd.DataFrame, ...]:
    """Write results atom_seeds (variation of the counts), atom_matches and atom_match_shares over the seeds.

    parts: atom_partition.csv. Hosts without variants of several seeds have no rows."""
    counts, matched, shares = [], [], []
    for name in study.profile.hosts:
        k = getattr(study.profile.section("saes", name), study.profile.section("atoms", name).training).k
        variants = parts[(parts.host == name) & (parts.role != "main") & (parts.k == k)]
        for target, part in variants.groupby("target") if variants.seed.nunique() > 1 else ():
            where = {c: part[c].iloc[0] for c in ("host", "layer", "head", "target", "k", "n_atoms")}
            for counted in ("alive", "registers", "bundles"):
                counts.append(where | dict(counted=counted) | variation(part[counted]))
            cell = where["layer"], where["head"]
            saes = {seed: study.sae(name, *cell, target, role) for seed, role in zip(part.seed, part.role)}
            classes = alive[(alive.host == name) & (alive.target == target) & alive.role.isin(part.role)]
            pairs = matches(saes, study.profile.seed).merge(classes[["seed", "atom", "class"]], on=["seed", "atom"])
            matched.append(pairs.assign(**where))
            shares.append(match_shares(pairs).assign(host=name, target=target))
    tables = dict(atom_seeds=pd.DataFrame(counts), atom_matches=pd.concat(matched), atom_match_shares=pd.concat(shares))
    return tuple(study.write(name, table) for name, table in tables.items())


def choose_exemplars(alive: pd.DataFrame, counts: dict[str, int], fewest_passages: int) -> pd.DataFrame:
    """Return per class the counts[class] atoms with the most firings, of those in enough passages."""
    able = alive[alive.passages >= fewest_passages]
    chosen = (able[able["class"] == name].nlargest(count, "firings") for name, count in counts.items())
    return pd.concat(chosen)


def exemplars(study: Study, alive: pd.DataFrame, firings: pd.DataFrame) -> tuple[pd.DataFrame, ...]:
    """Write results atom_exemplars.csv (with the tokens at which each fires most) and atom_contexts.csv."""
    contexts, tokens, main = [], [], alive[alive.role == "main"]
    for name, part in firings.groupby("host", sort=False):
        tokenizer, windows = study.host(name).tokenizer, firing_windows(study, name)
        settings = study.profile.section("atoms", name)
        able = main[(main.host == name) & (main.place == settings.place)].groupby("target")
        chosen = [choose_exemplars(rows, settings.exemplars, settings.fewest_passages) for _, rows in able]
        part = part.merge(pd.concat(chosen)[ATOM_KEYS], on=ATOM_KEYS)
        contexts.append(top_contexts(tokenizer, windows, part, settings.contexts))
        for keys, rows in part.groupby(ATOM_KEYS, sort=False):
            tokens.append((*keys, frequent_tokens(tokenizer, windows, rows)))
    table = pd.DataFrame(tokens, columns=[*ATOM_KEYS, "tokens"]).merge(main, on=ATOM_KEYS)
    contexts = pd.concat(contexts).merge(table[[*ATOM_KEYS, "class"]], on=ATOM_KEYS)
    return study.write("atom_exemplars", table), study.write("atom_contexts", contexts)


# For readers

SAE = ["host", "place", "target"]


def shown_variants(variants: pd.DataFrame) -> pd.DataFrame:
    """Return the SAEs with other k and seeds for a reader."""
    columns = {"atoms": variants.n_atoms, "FVU": layout.numbers(variants.fvu, ".3f")}
    columns |= {"held-out tokens": layout.numbers(variants.n_validation, ",.0f")}
    columns |= {"training (seconds)": layout.numbers(variants.seconds, ".0f")}
    return layout.shown(variants, ["host", "target", "k", "seed"], columns)


def shown_classes(parts: pd.DataFrame, paper: Sequence[float]) -> pd.DataFrame:
    """Return the numbers of atoms per class for a reader. paper: the paper's atoms that fire, registers and
    bundles, which become the first row."""
    columns = {"atoms": parts.n_atoms, "that fire": parts.alive, "registers": parts.registers}
    columns |= {"bundles": parts.bundles}
    columns["registers of those that fire (%)"] = layout.estimates(parts, "register_share", "ci_low", "ci_high")
    fire, registers, _ = paper
    first = ["", *(f"{count:.0f}" for count in paper), f"{100 * registers / fire:.0f}"]
    rows = {heading: [value, *column] for value, (heading, column) in zip(first, columns.items(), strict=True)}
    keys = pd.concat([pd.DataFrame([dict(zip(SAE, ("the paper", "layer 9, head 4", "state")))]), parts[SAE]])
    return layout.shown(keys, SAE, rows)


def shown_cosines(parts: pd.DataFrame) -> pd.DataFrame:
    """Return the median cosines of atoms to the write, per class, for a reader."""
    columns = {"elsewhere": layout.numbers(parts.elsewhere_cosine)}
    for name in CLASSES:
        ends = f"{name}_low", f"{name}_high"
        columns[f"{name}s"] = layout.plain(parts, f"{name}_cosine", *ends)
    return layout.shown(parts, SAE, columns)


def shown_orders(orders: pd.DataFrame) -> pd.DataFrame:
    """Return the comparison of mixtures for a reader. orders: with the column bimodality."""
    columns = {"components": orders.components, "atoms": orders.n}
    columns |= {"ΔBIC": layout.plain(orders, "delta_bic", "ci_low", "ci_high", digits=0)}
    return layout.shown(orders, SAE, columns | {"bimodality": layout.numbers(orders.bimodality)})


def shown_counts(counts: pd.DataFrame) -> pd.DataFrame:
    """Return how the numbers of atoms vary over seeds, for a reader."""
    columns = {"seeds": counts.n, "mean": layout.numbers(counts["mean"], ".0f")}
    columns |= {"coefficient of variation (%)": layout.estimates(counts, "cv", "ci_low", "ci_high", digits=1)}
    return layout.shown(counts, ["host", "target", "counted"], columns)


def shown_matches(shares: pd.DataFrame) -> pd.DataFrame:
    """Return how many atoms come back in another seed, for a reader."""
    columns = {"atoms": shares.n_atoms, "pairs": layout.numbers(shares.n, ",.0f")}
    columns |= {"come back (%)": layout.estimates(shares, "share", "ci_low", "ci_high", digits=1)}
    columns |= {"by chance (%)": layout.numbers(shares.chance, ".1f", 100)}
    columns |= {"median best cosine": layout.numbers(shares.median_best)}
    return layout.shown(shares, ["host", "target", "class"], columns)


def shown_exemplars(chosen: pd.DataFrame) -> pd.DataFrame:
    """Return the exemplars for a reader."""
    sides = zip(chosen.cosine_key, chosen.cosine_value, strict=True)
    columns = {"cosine to the write": layout.numbers(chosen.cosine)}
    columns |= {"of keys, of values": [f"{key:.2f}, {value:.2f}" for key, value in sides]}
    columns |= {"share of tokens (%)": layout.numbers(chosen.rate, ".2f", 100), "fires on": chosen.tokens}
    return layout.shown(chosen, ["host", "target", "class", "atom"], columns)


AXES_IN_WORDS = dict(delta_kl="KL of deletion minus the atom's (millinats)", flip_delete="flipped by deletion (%)")
AXES_IN_WORDS |= dict(flip_atom="flipped by the atom (%)", firings_per_10k="firings per 10,000 tokens")
SCALES = dict(delta_kl=1000, flip_delete=100, flip_atom=100, firings_per_10k=1)


def shown_axes(axes: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `class_axes` for a reader: medians of the registers and of the bundles."""
    sizes = zip(axes.n_register, axes.n_bundle, strict=True)
    columns = {"registers, bundles": [f"{registers}, {bundles}" for registers, bundles in sizes]}
    for name in CLASSES:
        columns[f"median of {name}s"] = layout.numbers(axes[f"{name}_median"] * axes.axis.map(SCALES), ".2g")
    columns |= {"Cliff's delta": layout.plain(axes, "cliffs_delta", "ci_low", "ci_high")}
    rows = axes.assign(axis=axes.axis.map(AXES_IN_WORDS))
    return layout.shown(rows, ["target", "axis"], columns | {"p": layout.p_values(axes.p)})


def shown_by_cosine(bins: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `by_cosine` for a reader."""
    columns = {"atoms": bins.n_atoms, "firings": layout.numbers(bins.n_firings, ",.0f")}
    columns |= {"atom beats deletion (%)": layout.estimates(bins, "win_rate", "ci_low", "ci_high")}
    return layout.shown(bins, ["target", "cosine_bin"], columns)
