"""What the atoms of an SAE are (the paper's Sec. 3.1, Table 1, App. E, G.1) and how their classes differ (App. F.2, H).

An atom fires where its coefficient is the largest of all. Over the held-out windows it is then

| class    | which                                                                                          |
|----------|------------------------------------------------------------------------------------------------|
| register | alive, of the upper of two Gaussian components in the median cosine to the native write, and   |
|          | above the lower one's mean                                                                     |
| bundle   | alive, and not a register                                                                      |
| null     | never fires                                                                                    |

Beside the profile's own SAEs stand *variants* of one cell: other k at the profile's seed, other seeds at their own k.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from scipy import stats

from replication.classes import Scan, mixtures, partition, thresholds
from replication.statistics import Interval, cliffs_delta, cluster_bootstrap, mann_whitney
from replication.study.firings import firing_windows
from replication.study.study import Suite
from replication.study.variant_training import host_variants, variant_name
from writesae.evaluate.atoms import ATOM_KEYS, CLASSES, MATCH, choose_exemplars, frequent_tokens, matches, top_contexts
from writesae.sae.model import WEIGHTS

SAE_KEYS = ["host", "place", "layer", "head", "target", "role", "k", "seed", "n_atoms"]


# Seeds: do counts come back, and do atoms?


def variation(counts: Sequence[float]) -> dict:
    """Coefficient of variation of a few counts (deviation with n - 1), with the chi-square interval of the deviation.

    Raises ValueError for fewer than two counts."""
    n = len(counts)
    if n < 2:
        raise ValueError("A coefficient of variation needs at least two counts.")
    cv = float(stats.variation(counts, ddof=1))
    low, high = cv * np.sqrt((n - 1) / stats.chi2.ppf([0.975, 0.025], n - 1))
    return dict(mean=float(np.mean(counts)), cv=cv, ci_low=float(low), ci_high=float(high), n=n)


def match_shares(found: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """A line a class, and one for all: share of (atom, other seed) whose best |cosine| exceeds MATCH; bootstrap by atom."""
    rows = []
    for name, part in [("all", found), *found.groupby("class")]:
        atom = part.seed.astype(str) + "." + part.atom.astype(str)
        low, high = cluster_bootstrap(part.best > MATCH, atom, seed=seed)
        share = dict(share=(part.best > MATCH).mean(), ci_low=low, ci_high=high)
        share |= dict(chance=(part.chance > MATCH).mean(), median_best=part.best.median())
        rows.append({"class": name, **share, "n_atoms": atom.nunique(), "n": len(part)})
    return pd.DataFrame(rows)


# How the classes differ in replacement (Tables 13 and 17): of a table of firings, and one of alive atoms

AXES = ("delta_kl", "flip_delete", "flip_atom", "firings_per_10k")
COSINE_EDGES = (0.0, 0.05, 0.2, 0.3)  # Table 13


def with_atoms(table: pd.DataFrame, alive: pd.DataFrame) -> pd.DataFrame:
    """The table with what `alive` says of each atom: class, atom_cosine, firings. Raises ValueError for one it lacks."""
    known = alive[[*ATOM_KEYS, "class", "cosine", "firings"]].rename(columns=dict(cosine="atom_cosine"))
    table = table.merge(known, how="left", on=ATOM_KEYS, validate="many_to_one")
    if table["class"].isna().any():
        raise ValueError(f"{int(table['class'].isna().sum())} of {len(table)} lines are of atoms that have no class.")
    return table


def axes_per_atom(firings: pd.DataFrame, alive: pd.DataFrame, scanned: int) -> pd.DataFrame:
    """A line an (atom, amplitude) with the four axes of Table 17: median KL(delete) - KL(atom); the share of firings
    whose top-1 token deletion changes, and the atom; firings per 10,000 of the `scanned` tokens. `firings` has the top
    tokens top1_native, top1_delete, top1_atom."""
    changed = {f"flip_{name}": firings[f"top1_{name}"] != firings.top1_native for name in ("delete", "atom")}
    told = firings.assign(delta_kl=firings.kl_delete - firings.kl_atom, **changed)
    table = told.groupby([*ATOM_KEYS, "amplitude"], as_index=False).agg(
        delta_kl=("delta_kl", "median"),
        flip_delete=("flip_delete", "mean"),
        flip_atom=("flip_atom", "mean"),
        n=("delta_kl", "size"),
    )
    table = with_atoms(table, alive)
    return table.assign(firings_per_10k=table.firings * 1e4 / scanned)


def delta_interval(a: Sequence[float], b: Sequence[float], seed: int = 0, resamples: int = 1000) -> Interval:
    """Bootstrap interval of Cliff's delta, each sample drawn anew on its own."""
    draws = stats.bootstrap(
        (np.asarray(a), np.asarray(b)),
        lambda a, b, axis: np.sign(a[..., :, None] - b[..., None, :]).mean((-1, -2)),
        n_resamples=resamples,
        batch=50,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Interval(float(draws.confidence_interval.low), float(draws.confidence_interval.high))


def class_axes(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Table 17: a line an axis for every cell, target and amplitude; Cliff's delta is positive where registers lie higher,
    and missing where a class has fewer than two atoms."""
    rows, keys = [], ["host", "layer", "head", "target", "amplitude"]
    for values, part in table.groupby(keys, sort=False):
        for axis in AXES:
            register, bundle = (part.loc[part["class"] == name, axis] for name in CLASSES)
            row = dict(zip(keys, values, strict=True), axis=axis, n_register=len(register), n_bundle=len(bundle))
            row |= dict(register_median=register.median(), bundle_median=bundle.median())
            row |= dict.fromkeys(["cliffs_delta", "ci_low", "ci_high", "p"], np.nan)
            if min(len(register), len(bundle)) > 1:
                row["ci_low"], row["ci_high"] = delta_interval(register, bundle, seed)
                row |= dict(cliffs_delta=cliffs_delta(register, bundle), p=mann_whitney(register, bundle).p)
            rows.append(row)
    return pd.DataFrame(rows)


def by_cosine(
    firings: pd.DataFrame, alive: pd.DataFrame, edges: Sequence[float] = COSINE_EDGES, seed: int = 0
) -> pd.DataFrame:
    """Table 13: a line a bin of the atom's median cosine, low <= cosine < high: firings that the atom wins over
    deletion, bootstrap by atom."""
    told = with_atoms(firings.assign(win=firings.kl_atom < firings.kl_delete), alive)
    names = [f"below {edges[0]:g}", *(f"{a:g} to {b:g}" for a, b in pairwise(edges)), f"{edges[-1]:g} and above"]
    told["cosine_bin"] = pd.cut(told.atom_cosine, [-np.inf, *edges, np.inf], right=False, labels=names)
    rows, keys = [], ["host", "layer", "head", "target", "amplitude", "cosine_bin"]
    for values, part in told.groupby(keys, observed=True):
        low, high = cluster_bootstrap(part.win, part.atom, seed=seed)
        rate = dict(win_rate=part.win.mean(), ci_low=low, ci_high=high)
        counts = dict(n_atoms=part.atom.nunique(), n_firings=len(part))
        rows.append(dict(zip(keys, values, strict=True)) | rate | counts)
    return pd.DataFrame(rows)


def class_tables(suite: Suite, alive: pd.DataFrame, firings: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """results population_axes.csv and population_by_cosine.csv, from the alive atoms and the firings of notebook 07."""
    parts = [
        axes_per_atom(part, alive, Scan(suite, name).scanned()) for name, part in firings.groupby("host", sort=False)
    ]
    axes, bins = class_axes(pd.concat(parts), suite.profile.seed), by_cosine(firings, alive, seed=suite.profile.seed)
    return suite.write("population_axes", axes), suite.write("population_by_cosine", bins)


def run(suite: Suite) -> tuple[pd.DataFrame, pd.DataFrame]:
    """results atoms.csv, a line an alive atom of every SAE: the profile's own in all cells, and the variants; and every
    firing of the exemplars (kept in build/ only)."""
    profile, tables, firings = suite.profile, [], []
    for name in profile.hosts:
        own, scan = profile.section("atoms", name), Scan(suite, name)
        cell, targets = suite.cell(name, own.place), profile.saes.targets
        groups = [(*place, target, "main", profile.seed) for place in scan.places for target in targets]
        groups += [(*cell, target, variant_name(v), v.seed) for v in host_variants(suite, name) for target in targets]
        files = [suite.sae_folder(name, *group[:4]) / WEIGHTS for group in groups]
        inputs = dict(data=profile.data, seed=profile.seed, saes=files, groups=groups)
        tables.append(suite.staged("atoms", name, groups, scan.alive, [__name__], inputs))
        firings.append(_exemplar_firings(suite, scan, own, cell, tables[-1], inputs))
    return suite.gather("atoms", tables), pd.concat(firings, ignore_index=True)


def _exemplar_firings(suite, scan: Scan, own, cell, atoms: pd.DataFrame, inputs: dict) -> pd.DataFrame:
    rows = atoms[(atoms.role == "main") & (atoms.place == own.place)]
    chosen = {
        target: choose_exemplars(part, own.exemplars, own.fewest_passages).atom.tolist()
        for target, part in rows.groupby("target")
    }

    def compute(target: str) -> pd.DataFrame:
        _, found = scan.firings(*cell, target, "main")
        where = dict(host=scan.host, layer=cell[0], head=cell[1], target=target)
        return found[found.atom.isin(chosen[target])].assign(**where)

    inputs = inputs | dict(chosen=chosen)
    return suite.staged("atom_firings", scan.host, list(chosen), compute, [__name__], inputs)


def tables(suite: Suite, atoms: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """results atom_partition.csv and atom_mixtures.csv (all SAEs), atom_thresholds.csv (the profile's own)."""
    seed, counts, orders, sweeps = suite.profile.seed, [], [], []
    for values, part in atoms.groupby(SAE_KEYS, sort=False):
        where = dict(zip(SAE_KEYS, values, strict=True))
        counts.append(where | partition(part, seed))
        orders.append(mixtures(part.cosine, seed).assign(**where))
        if where["role"] == "main":
            taus = suite.profile.section("atoms", where["host"]).taus
            sweeps.append(thresholds(part.cosine, taus).assign(**where))
    orders, sweeps = (pd.concat(x)[SAE_KEYS + [c for c in x[0] if c not in SAE_KEYS]] for x in (orders, sweeps))
    written = suite.write("atom_partition", pd.DataFrame(counts)), suite.write("atom_mixtures", orders)
    return *written, suite.write("atom_thresholds", sweeps)


def seeds(suite: Suite, atoms: pd.DataFrame, parts: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """results atom_seeds.csv (variation of the counts over seeds), atom_matches.csv (a line an alive atom and other
    seed) and atom_match_shares.csv; for hosts with variants of several seeds."""
    variation_rows, found = [], []
    for name in suite.profile.hosts:
        own = suite.profile.section("atoms", name)
        k = getattr(suite.profile.section("saes", name), own.training).k
        ours = parts[(parts.host == name) & (parts.role != "main") & (parts.k == k)]
        for target, part in ours.groupby("target") if ours.seed.nunique() > 1 else ():
            where = {c: part[c].iloc[0] for c in ("host", "layer", "head", "target", "k", "n_atoms")}
            for counted in ("alive", "registers", "bundles"):
                variation_rows.append(where | dict(counted=counted) | variation(part[counted]))
            trained = {r.seed: suite.sae(name, r.layer, where["head"], target, r.role) for r in part.itertuples()}
            classes = atoms[(atoms.host == name) & (atoms.target == target) & atoms.role.isin(part.role)]
            pairs = matches(trained, suite.profile.seed).merge(classes[["seed", "atom", "class"]], on=["seed", "atom"])
            found.append(pairs.assign(**where))
    shares = [match_shares(x, suite.profile.seed).assign(host=x.host.iloc[0], target=x.target.iloc[0]) for x in found]
    written = suite.write("atom_seeds", pd.DataFrame(variation_rows)), suite.write("atom_matches", pd.concat(found))
    return *written, suite.write("atom_match_shares", pd.concat(shares))


def exemplars(suite: Suite, atoms: pd.DataFrame, firings: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """results atom_exemplars.csv (with the tokens at which each fires most) and atom_contexts.csv."""
    contexts, tokens = [], []
    for name, part in firings.groupby("host", sort=False):
        tokenizer, windows = suite.host(name).tokenizer, firing_windows(suite, name)
        contexts.append(top_contexts(tokenizer, windows, part, suite.profile.section("atoms", name).contexts))
        for keys, own in part.groupby(ATOM_KEYS, sort=False):
            tokens.append(dict(zip(ATOM_KEYS, keys, strict=True), tokens=frequent_tokens(tokenizer, windows, own)))
    table = pd.DataFrame(tokens).merge(atoms[atoms.role == "main"], on=ATOM_KEYS)
    contexts = pd.concat(contexts).merge(table[[*ATOM_KEYS, "class"]], on=ATOM_KEYS)
    return suite.write("atom_exemplars", table), suite.write("atom_contexts", contexts)
