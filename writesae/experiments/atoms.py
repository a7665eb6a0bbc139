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

import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from joblib import Parallel, delayed
from scipy import stats
from scipy.special import logsumexp
from tqdm import tqdm

from writesae import artifacts
from writesae.experiments import saes
from writesae.experiments.population import alive_atoms
from writesae.experiments.replacement import STEPS, Subject, firing_windows, firings_of, make_subject
from writesae.harvest import Windows, harvest
from writesae.sae import SAE
from writesae.statistics import (
    Interval,
    Mixture,
    cliffs_delta,
    cluster_bootstrap,
    gaussian_mixture_bic,
    mann_whitney,
    wilson,
)
from writesae.suite import Suite, open_suite
from writesae.train import TrainingSettings

CLASSES = ("register", "bundle")
MATCH = 0.9  # an atom is found again in another seed where its best |cosine| exceeds this
SAE_KEYS = ["host", "place", "layer", "head", "target", "role", "k", "seed", "n_atoms"]
ATOM_KEYS = ["host", "layer", "head", "target", "atom"]


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


def best_match(atoms: tuple, others: tuple) -> torch.Tensor:
    """[n]: the largest |cosine| of each atom (key [n, d_k], value [n, d_v], of unit norm) with any of the others."""
    return ((atoms[0] @ others[0].T) * (atoms[1] @ others[1].T)).abs().amax(1)


def matches(seeds: dict[int, SAE], seed: int = 0) -> pd.DataFrame:
    """A line for every atom of each SAE and every other SAE: `best`, its best |cosine| there, and `chance`, the best
    where the other's values are dealt out to its keys anew."""
    tables = []
    for own, other in permutations(seeds, 2):
        mine, (key, value) = seeds[own].atoms(), seeds[other].atoms()
        dealt = value[torch.randperm(len(value), generator=torch.Generator().manual_seed(seed))]
        found = dict(best=best_match(mine, (key, value)).numpy(), chance=best_match(mine, (key, dealt)).numpy())
        tables.append(pd.DataFrame(dict(seed=own, other_seed=other, atom=range(len(mine[0])), **found)))
    return pd.concat(tables, ignore_index=True)


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


# Exemplars (Table 1, Fig. 11)


def choose_exemplars(alive: pd.DataFrame, counts: dict[str, int], fewest_passages: int) -> pd.DataFrame:
    """The most-firing atoms of each class, as many as counts[class], among those that fire in enough passages."""
    able = alive[alive.passages >= fewest_passages]
    return pd.concat([able[able["class"] == name].nlargest(count, "firings") for name, count in counts.items()])


def marked(tokenizer, tokens: Sequence[int], position: int, before: int = 14, after: int = 6) -> str:
    """The text around a position, its token between ⟦ and ⟧, line breaks as ⏎."""
    parts = tokens[max(0, position - before) : position], [tokens[position]], tokens[position + 1 :][:after]
    left, token, right = (_text(tokenizer, part) for part in parts)
    return f"{left}⟦{token}⟧{right}"


def _text(tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False).replace("\n", "⏎")


def top_contexts(tokenizer, windows: Windows, firings: pd.DataFrame, count: int) -> pd.DataFrame:
    """The `count` firings of each atom with the largest coefficients, one a passage, with their text."""
    largest = firings.sort_values("coefficient", ascending=False, kind="stable")
    top = largest.drop_duplicates([*ATOM_KEYS, "passage"]).groupby(ATOM_KEYS).head(count)
    top = top.assign(rank=top.groupby(ATOM_KEYS).cumcount() + 1).sort_values([*ATOM_KEYS, "rank"])
    text = [marked(tokenizer, windows.tokens[row.window].tolist(), row.position) for row in top.itertuples()]
    return top.assign(text=text).reset_index(drop=True)


def frequent_tokens(tokenizer, windows: Windows, firings: pd.DataFrame, count: int = 3) -> str:
    """The tokens at which an atom fires most often, with their shares of its firings."""
    tokens = windows.tokens[torch.tensor(firings.window.to_numpy()), torch.tensor(firings.position.to_numpy())]
    shares = pd.Series(tokens.numpy()).value_counts(normalize=True).head(count)
    return ", ".join(f"{_text(tokenizer, [token])!r} {share:.0%}" for token, share in shares.items())


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


# Training the variants, as writesae.experiments.saes trains the rest


def variants(training: TrainingSettings, ks: Iterable[int], seeds: Iterable[int], seed: int) -> list[TrainingSettings]:
    """Each k at `seed`, and each of the seeds at the settings' own k; the slowest to train first. No k and no seeds: none.

    Raises ValueError for a k above n_atoms."""
    pairs = {(k, seed) for k in ks} | {(training.k, other) for other in seeds}
    return [TrainingSettings(**training.model_dump() | dict(k=k, seed=s)) for k, s in sorted(pairs, reverse=True)]


def variant_name(settings: TrainingSettings) -> str:
    """The name of a variant in file names and tables."""
    return f"k{settings.k}-seed{settings.seed}"


def host_variants(suite: Suite, host: str) -> list[TrainingSettings]:
    own = suite.profile.section("atoms", host)
    return variants(getattr(suite.profile.section("saes", host), own.training), own.ks, own.seeds, suite.profile.seed)


def seed_variants(suite: Suite, host: str) -> list[TrainingSettings]:
    """Those of the settings' own k, one a seed."""
    own = suite.profile.section("atoms", host)
    k = getattr(suite.profile.section("saes", host), own.training).k
    return [variant for variant in host_variants(suite, host) if variant.k == k]


def train_variants(suite: Suite) -> pd.DataFrame:
    """Every variant of every host, on every target; results variants.csv, a line an SAE as in saes.csv."""
    tasks = []
    for name in suite.profile.hosts:
        cell = suite.cell(name, suite.profile.section("atoms", name).place)
        tasks += [(name, cell, settings) for settings in host_variants(suite, name)]
    work = [delayed(train_task)(suite.profile.name, *task, _expected(suite, *task)) for task in tasks]
    workers = Parallel(n_jobs=min(suite.workers, len(tasks)), return_as="generator_unordered")
    for _ in tqdm(workers(work), total=len(tasks), desc="SAE variants"):
        pass
    return suite.write("variants", pd.concat([artifacts.read_table(_record(suite, *t)) for t in tasks]))


def _expected(suite: Suite, host: str, cell: tuple[int, int], settings: TrainingSettings) -> str:
    own = suite.profile.saes
    inputs = dict(data=suite.profile.data, write=own.write, targets=own.targets, cell=cell, settings=settings)
    return artifacts.fingerprint(modules=[__name__], host=suite.host_fingerprint(host), **inputs)


def _record(suite: Suite, host: str, cell: tuple[int, int], settings: TrainingSettings):
    return suite.paths.build / "saes" / f"{host}-{variant_name(settings)}-L{cell[0]}-H{cell[1]}.csv"


def train_task(profile_name: str, host: str, cell: tuple[int, int], settings: TrainingSettings, expected: str) -> None:
    suite = open_suite(profile_name)
    torch.set_num_threads(1)
    train_variant(suite, host, cell, settings, expected)


def train_variant(suite: Suite, host: str, cell: tuple[int, int], settings: TrainingSettings, expected: str) -> None:
    """Train a variant on every target from the cell's harvest, and write their lines; nothing where that was done."""
    record = _record(suite, host, cell, settings)
    if artifacts.up_to_date(record, expected):
        return
    began, data, targets = time.monotonic(), suite.profile.data, suite.profile.saes.targets
    checking = suite.windows(host, "heldout")[slice(0, saes.VALIDATION_WINDOWS)].tokens
    validation = harvest(suite.host(host), checking, [cell], data.batch_windows, progress=False)[cell]
    training = artifacts.load_tensors(saes.harvest_path(suite, host, *cell))[0]
    lines = [
        saes.train_one(suite, host, variant_name(settings), cell, target, settings, training, validation, expected)
        for target in targets
    ]
    made = dict(seconds=time.monotonic() - began, fingerprint=expected)
    artifacts.write_table(pd.DataFrame(lines), record, suite.provenance(host, **made))


# The stages of notebook 03


class Scan:
    """A host's cells over the held-out windows; they are harvested once, and only where something asks for them."""

    def __init__(self, suite: Suite, host: str):
        self.suite, self.host, self.windows = suite, host, firing_windows(suite, host)
        self.places = {suite.cell(host, place): place for place in suite.profile.hosts[host].cells}

    @cached_property
    def factors(self) -> dict:
        batch = self.suite.profile.data.batch_windows
        return harvest(self.suite.host(self.host), self.windows.tokens, list(self.places), batch)

    def scanned(self) -> int:
        """How many tokens firings are looked for in."""
        windows, tokens = self.windows.tokens.shape
        return windows * (tokens - STEPS - self.suite.profile.data.first_position)

    def firings(self, layer: int, head: int, target: str, role: str) -> tuple[Subject, pd.DataFrame]:
        """A cell with its SAE of that role, and all of its firings."""
        factors, write = self.factors[layer, head], self.suite.profile.saes.write
        subject = make_subject(
            (layer, head), target, write, self.suite.sae(self.host, layer, head, target, role), factors
        )
        return subject, firings_of(self.suite, subject, self.windows)

    def alive(self, group: tuple) -> pd.DataFrame:
        """A line an alive atom of one SAE: class, median cosines, `elsewhere`: that at as many firings of other atoms."""
        *found_at, role, seed = group
        subject, firings = self.firings(*found_at, role)
        table = alive_atoms(self.suite, self.host, subject, firings)
        shuffled = np.random.default_rng(self.suite.profile.seed).permutation(firings.atom.to_numpy())
        elsewhere = alive_atoms(self.suite, self.host, subject, firings.assign(atom=shuffled))
        table["elsewhere"] = table.atom.map(elsewhere.set_index("atom").cosine)
        table = table.merge(sides(subject, firings), on="atom")
        made = dict(role=role, k=subject.sae.k, seed=seed, n_atoms=subject.sae.n_atoms)
        return table.assign(rate=table.firings / self.scanned(), place=self.places[subject.layer, subject.head], **made)


def sides(subject: Subject, firings: pd.DataFrame) -> pd.DataFrame:
    """A line an atom: medians over its firings of |cosine| of its key to the write's key, and of its value."""
    window, position, atom = (torch.tensor(firings[name].to_numpy()) for name in ("window", "position", "atom"))
    found = {}
    for name, own in zip(("key", "value"), subject.sae.atoms(), strict=True):
        native = F.normalize(getattr(subject.writes, name)[window, position], dim=-1)
        found[f"cosine_{name}"] = (own[atom] * native).sum(-1).abs().numpy()
    return firings[["atom"]].assign(**found).groupby("atom", as_index=False).median()


def run(suite: Suite) -> tuple[pd.DataFrame, pd.DataFrame]:
    """results atoms.csv, a line an alive atom of every SAE: the profile's own in all cells, and the variants; and every
    firing of the exemplars (kept in build/ only)."""
    profile, tables, firings = suite.profile, [], []
    for name in profile.hosts:
        own, scan = profile.section("atoms", name), Scan(suite, name)
        cell, targets = suite.cell(name, own.place), profile.saes.targets
        groups = [(*place, target, "main", profile.seed) for place in scan.places for target in targets]
        groups += [(*cell, target, variant_name(v), v.seed) for v in host_variants(suite, name) for target in targets]
        files = [Path(f"{suite.sae_stem(name, *group[:4])}.safetensors") for group in groups]
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
