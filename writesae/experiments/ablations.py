"""What the results depend on: encoder, decoder, sparsity rule and rank of the SAE (the paper's Sec. 3.4, App. B, C, F.3).

Every variant is trained on the same windows with the same settings but for the parts that it names, and is then asked
the same questions on the same held-out windows: how much it explains (FVU), how many atoms are active a token (L0), how
many never are (dead), which of them are registers and bundles, and whether its atoms stand for writes. The native write is
replaced by the top singular pair of the firing's atom, and where an atom has a higher rank by the whole of it as well.

Selectivity (App. I.1) asks of the profile's own SAEs whether another direction would do as well as the atom:

| control    | what                                                                           |
|------------|--------------------------------------------------------------------------------|
| random     | a rank-1 matrix of Gaussian factors                                            |
| orthogonal | the same with key and value each orthogonal to those of the atom               |

put in the native write's place at the atom's coefficient or at the write's norm, or added to the state at the write's
norm with the write left in ("added"). There the paper's measure is taken too: 1 - |A and B| / K, for the K tokens A
whose logits the atom moves most and the K tokens B that the control moves most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from statsmodels.stats.proportion import confint_proportions_2indep
from tqdm import tqdm

from writesae import artifacts
from writesae.artifacts import rows_with
from writesae.edit import kl
from writesae.experiments import atoms, saes
from writesae.experiments.firings import Encoded, atom_names, draw_in_rounds
from writesae.experiments.replacement import (
    AMPLITUDES,
    STEPS,
    Subject,
    changes,
    firing_windows,
    firings_of,
    heldout_subjects,
    rank_one,
    run_firings,
    terms,
)
from writesae.harvest import history
from writesae.hosts import Host, Run
from writesae.profiles import Ablations
from writesae.statistics import Interval, cliffs_delta, cluster_bootstrap, paired_wilcoxon, wilson
from writesae.suite import Suite, open_suite
from writesae.train import TrainingSettings, by_group

REFERENCE = "bilinear+rank1"  # the variant that the others are compared with
NEED_NO_STATES = [("bilinear", "rank1", 1), ("tied", "rank1", 1)]
CHECK_WINDOWS = 8  # of the training windows, kept from training to see how it went
FEWEST_ALIVE = 8  # atoms, below which no partition is made of them
KEYS = ["host", "place", "layer", "head", "target", "variant"]
CONTROLS = ("random", "orthogonal")
PLACEMENTS = (*AMPLITUDES, "added")


# Training


def variants(own: Ablations, seed: int) -> list[tuple[str, str, TrainingSettings]]:
    """(place, target, settings) of every SAE, those that take longest first. Raises ValueError where two are the same."""
    found = [
        (place, target, TrainingSettings(**own.training.model_dump() | one.parts() | dict(seed=seed)))
        for one in own.variants
        for place in one.places
        for target in one.targets
    ]
    names = [(place, target, settings.variant) for place, target, settings in found]
    if len(set(names)) < len(names):
        raise ValueError("ablations.variants names a variant twice for one place and target.")
    return sorted(found, key=lambda one: (one[2].encoder, one[2].decoder, one[2].rank) in NEED_NO_STATES)


def role(variant: str) -> str:
    """Of a variant's SAEs in the names of files."""
    return f"ablation-{variant}"


def asked(suite: Suite) -> dict[str, Ablations]:
    """The hosts that the profile asks, with their settings. Raises ValueError where it asks none, or a cell that is not there."""
    sections = {name: suite.profile.section("ablations", name) for name in suite.profile.hosts}
    found = {name: own for name, own in sections.items() if own.firings}
    for name, own in found.items():
        lacking = {place for one in own.variants for place in one.places} - set(suite.profile.hosts[name].cells)
        if lacking:
            raise ValueError(f"ablations.variants asks for {', '.join(sorted(lacking))}, and {name} has no such cell.")
    if not found:
        raise ValueError("ablations.firings is 0 for every host of this profile: give it a number for one of them.")
    return found


def train_variants(suite: Suite) -> pd.DataFrame:
    """Train every variant; results ablation_saes.csv, a line an SAE. Its FVU is on the few windows kept from training."""
    tasks = [
        (name, suite.cell(name, place), target, settings)
        for name, own in asked(suite).items()
        for place, target, settings in variants(own, suite.profile.seed)
    ]
    work = [delayed(train_task)(suite.profile.name, *task, _expected(suite, *task)) for task in tasks]
    workers = Parallel(n_jobs=min(suite.workers, len(tasks)), return_as="generator_unordered")
    for _ in tqdm(workers(work), total=len(tasks), desc="SAE ablations"):
        pass
    return suite.write("ablation_saes", pd.concat([artifacts.read_table(_record(suite, *t)) for t in tasks]))


def _expected(suite: Suite, host: str, cell: tuple[int, int], target: str, settings: TrainingSettings) -> str:
    inputs = dict(data=suite.profile.data, write=suite.profile.saes.write, target=target, cell=cell, settings=settings)
    windows = suite.profile.section("ablations", host).training_windows
    return artifacts.fingerprint(modules=[__name__], host=suite.host_fingerprint(host), windows=windows, **inputs)


def _record(suite: Suite, host: str, cell: tuple[int, int], target: str, settings: TrainingSettings):
    return suite.sae_stem(host, *cell, target, role(settings.variant)).with_suffix(".csv")


def train_task(profile: str, host: str, cell: tuple, target: str, settings: TrainingSettings, expected: str) -> None:
    suite = open_suite(profile)
    torch.set_num_threads(1)
    train_variant(suite, host, cell, target, settings, expected)


def train_variant(suite: Suite, host: str, cell, target: str, settings: TrainingSettings, expected: str) -> None:
    """Train a variant from the cell's harvest and write its line; nothing where that was done."""
    record, began = _record(suite, host, cell, target, settings), time.monotonic()
    if artifacts.up_to_date(record, expected):
        return
    factors = artifacts.load_tensors(saes.harvest_path(suite, host, *cell))[0]
    count = suite.profile.section("ablations", host).training_windows
    training, checking = ({n: x[part] for n, x in factors.items()} for part in _split(count, len(factors["key"])))
    line = saes.train_one(
        suite, host, role(settings.variant), cell, target, settings, training, checking, expected
    ) | dict(activation=settings.activation, rank=settings.rank)
    made = dict(seconds=time.monotonic() - began, fingerprint=expected)
    artifacts.write_table(pd.DataFrame([line]), record, suite.provenance(host, **made))


def _split(count: int, there: int) -> tuple[slice, slice]:
    if count > there:
        raise ValueError(f"ablations.training_windows is {count}, and data.sae_windows only {there}: lower the former.")
    return slice(0, count - CHECK_WINDOWS), slice(count - CHECK_WINDOWS, count)


# What every variant is asked


class Bench(atoms.Scan):
    """The variants of a host on the held-out windows; each is encoded once."""

    def __init__(self, suite: Suite, host: str):
        super().__init__(suite, host)
        self.own = suite.profile.section("ablations", host)
        self.groups = [(place, target, s.variant) for place, target, s in variants(self.own, suite.profile.seed)]
        self.windows = self.windows[slice(0, self.own.windows)]
        self.places = {suite.cell(host, place): place for place in dict.fromkeys(group[0] for group in self.groups)}
        self.encoded, self.errors = {}, {}

    def encode(self, group: tuple) -> None:
        """Fill `encoded` (the Subject) and `errors` (a line a window) of (place, target, variant)."""
        place, target, variant = group
        cell, write = self.suite.cell(self.host, place), self.suite.profile.saes.write
        sae, factors = self.suite.sae(self.host, *cell, target, role(variant)), self.factors[cell]
        found = zip(*by_group(sae, history(factors, target, write)), strict=True)
        squared, energy, indices, coefficients = (torch.cat(x) for x in found)
        encoded, writes = Encoded(indices, coefficients), history(factors, "write", write)
        alive = encoded.alive()
        self.encoded[group] = Subject(*cell, target, write, sae, encoded, writes, writes.mean(), alive)
        sums = {name: x.double().sum(1).numpy() for name, x in dict(squared=squared, energy=energy).items()}
        active = (coefficients > 0).sum((1, 2)).numpy()
        dead = dict(dead=sae.n_atoms - len(alive), n_atoms=sae.n_atoms, k=sae.k)
        where = dict(host=self.host, place=place, layer=cell[0], head=cell[1], target=target, variant=variant)
        frame = dict(window=range(len(active)), passage=self.windows.passage.numpy(), **sums, active=active)
        self.errors[group] = pd.DataFrame(where | frame | dead | dict(tokens=squared.shape[1]))

    def firings(self, layer: int, head: int, target: str, variant: str) -> tuple[Subject, pd.DataFrame]:
        """As for other SAEs, from what was encoded."""
        subject = self.encoded[self.places[layer, head], target, variant]
        return subject, firings_of(self.suite, subject, self.windows)

    def classes(self, group: tuple) -> pd.DataFrame:
        """A line an alive atom, as in atoms.csv; none for an SAE with too few of them."""
        place, target, variant = group
        cell = self.suite.cell(self.host, place)
        if self.firings(*cell, target, variant)[1].atom.nunique() < FEWEST_ALIVE:
            return pd.DataFrame({"host": []})
        return self.alive((*cell, target, variant, self.suite.profile.seed)).rename(columns=dict(role="variant"))

    def drawn(self) -> list[tuple[Subject, pd.DataFrame]]:
        """The firings of every variant, at most as many as the profile asks for."""
        pairs = []
        for place, target, variant in self.groups:
            subject, firings = self.firings(*self.suite.cell(self.host, place), target, variant)
            some = draw_in_rounds(firings, min(self.own.firings, len(firings)), self.suite.profile.seed)
            pairs.append((subject, some.assign(place=place, variant=variant)))
        return pairs


def run(suite: Suite) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """results ablation_windows.csv (the errors of every variant, a line a window), ablation_atoms.csv (an alive atom) and
    ablation_firings.csv (a firing and amplitude), over all hosts that are asked."""
    names, parts = ("ablation_windows", "ablation_atoms", "ablation_firings"), []
    for name in asked(suite):
        bench = Bench(suite, name)
        for group in tqdm(bench.groups, desc="encoding"):
            bench.encode(group)
        files = [_weights(suite, name, *group) for group in bench.groups]
        inputs = dict(data=suite.profile.data, seed=suite.profile.seed, settings=bench.own, saes=files)
        windows = suite.staged(names[0], name, bench.groups, bench.errors.get, [__name__], inputs)
        classes = suite.staged(names[1], name, bench.groups, bench.classes, [__name__], inputs)
        options = dict(conditions=("delete", "atom", "random", "reconstruction", "whole_atom"), scopes=("write",))
        options["batch_rows"] = suite.profile.section("replacement", name).batch_rows
        firings = run_firings(
            suite, name, names[2], bench.windows, bench.drawn(), inputs, modules=(__name__,), **options
        )
        parts.append((windows, classes, firings))
    return tuple(suite.gather(name, list(part)) for name, part in zip(names, zip(*parts), strict=True))


def _weights(suite: Suite, host: str, place: str, target: str, variant: str) -> Path:
    stem = suite.sae_stem(host, *suite.cell(host, place), target, role(variant))
    return stem.with_name(stem.name + ".safetensors")


# Tables


def resampled(statistic: Callable[[np.ndarray], float], clusters, resamples: int, seed: int) -> Interval:
    """The bootstrap interval by cluster of a statistic of row numbers, for what is no function of one column."""
    rows = np.arange(len(clusters))
    return cluster_bootstrap(rows, clusters, lambda drawn: statistic(drawn.astype(int)), resamples, seed)


def difference(a: pd.Series, b: pd.Series, clusters: tuple, resamples: int, seed: int) -> Interval:
    """The bootstrap interval of mean(a) - mean(b), whole clusters of each drawn on their own."""
    generator, means = np.random.default_rng(seed), []
    for values, labels in zip((a, b), clusters, strict=True):
        _, codes = np.unique(labels, return_inverse=True)
        count = codes.max() + 1
        draws = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
        means.append((draws @ np.bincount(codes, weights=values)) / (draws @ np.bincount(codes)))
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    return Interval(float(low), float(high))


def fvu(windows: pd.DataFrame) -> Callable[[np.ndarray], float]:
    """The fraction of variance unexplained, of row numbers of a table of windows."""
    squared, energy = windows.squared.to_numpy(), windows.energy.to_numpy()
    return lambda rows: squared[rows].sum() / energy[rows].sum()


def summarise(windows: pd.DataFrame, classes: pd.DataFrame, firings: pd.DataFrame, resamples: int, seed: int):
    """A line a variant, place and target: FVU with its interval by passage; L0; atoms that are never active (dead), with
    Wilson's interval of their share; the classes of the rest; and for each amplitude how often the atom beats deletion, with
    Wilson's interval (ci) and the bootstrap by atom (boot). What cannot be told (no class, no firing) is missing."""
    rows = []
    for values, part in windows.groupby(KEYS, sort=False):
        where, first = dict(zip(KEYS, values, strict=True)), part.iloc[0]
        of, count = fvu(part), int(part.tokens.sum())
        low, high = resampled(of, part.passage, resamples, seed)
        row = where | dict(n_atoms=first.n_atoms, k=first.k, fvu=of(np.arange(len(part))), fvu_low=low, fvu_high=high)
        row |= dict(n_tokens=count, n_passages=part.passage.nunique(), l0=part.active.sum() / count)
        low, high = wilson(int(first.dead), int(first.n_atoms))
        row |= dict(dead=first.dead, dead_fraction=first.dead / first.n_atoms, dead_low=low, dead_high=high)
        own = rows_with(classes, **where)
        if len(own):
            row |= atoms.partition(own, seed)
        for amplitude, tried in rows_with(firings, **where).groupby("amplitude", sort=False):
            row |= {f"{name}_{amplitude}": x for name, x in wins(tried, resamples, seed).items()}
            row |= dict(n_firings=len(tried), n_firing_atoms=tried.atom.nunique())
        rows.append(row)
    return pd.DataFrame(rows)


def wins(firings: pd.DataFrame, resamples: int, seed: int) -> dict:
    """Share of firings at which the atom beats deletion, and where there is one the whole atom of a higher rank."""
    win = firings.kl_atom < firings.kl_delete
    low, high = wilson(int(win.sum()), len(win))
    boot = cluster_bootstrap(win, firings.atom, resamples=resamples, seed=seed)
    found = dict(win_rate=win.mean(), ci_low=low, ci_high=high, boot_low=boot.low, boot_high=boot.high)
    found |= dict(win_random=(firings.kl_random < firings.kl_delete).mean())
    if "kl_whole_atom" in firings and firings.kl_whole_atom.notna().all():
        whole = int((firings.kl_whole_atom < firings.kl_delete).sum())
        found["whole_win_rate"] = whole / len(win)
        found["whole_low"], found["whole_high"] = wilson(whole, len(win))
    return found


def contrasts(windows: pd.DataFrame, firings: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Every variant against REFERENCE at the same place and target, a line a quantity:

    | quantity                        | value                                  | interval                               |
    |---------------------------------|----------------------------------------|----------------------------------------|
    | fvu_ratio                       | FVU of the variant / of the reference  | bootstrap by passage, paired           |
    | dead_fraction                   | difference of the shares of dead atoms | Newcombe                               |
    | win_rate_coefficient, _matched_norm | difference of the win rates        | wider of the bootstraps by passage and by atom |
    """
    rows, keys = [], ["host", "place", "layer", "head", "target"]
    for values, group in windows.groupby(keys, sort=False):
        where = dict(zip(keys, values, strict=True))
        base = group[group.variant == REFERENCE].reset_index(drop=True)
        if base.empty:
            continue
        for variant, part in group[group.variant != REFERENCE].groupby("variant", sort=False):
            line = where | dict(variant=variant, reference=REFERENCE)
            part = part.reset_index(drop=True)
            a, b, every = fvu(part), fvu(base), np.arange(len(base))
            low, high = resampled(lambda x, a=a, b=b: a(x) / b(x), base.passage, resamples, seed)
            ratio = dict(quantity="fvu_ratio", value=a(every) / b(every), ci_low=low, ci_high=high)
            rows.append(line | ratio | dict(n=int(part.tokens.sum())))
            rows.append(line | _dead_contrast(part.iloc[0], base.iloc[0]))
            tried = [rows_with(firings, **where, variant=name) for name in (variant, REFERENCE)]
            for amplitude in AMPLITUDES:
                pair = [x[x.amplitude == amplitude] for x in tried]
                if all(len(x) for x in pair):
                    rows.append(line | _win_contrast(*pair, amplitude, resamples, seed))
    return pd.DataFrame(rows)


def _dead_contrast(a: pd.Series, b: pd.Series) -> dict:
    counts = int(a.dead), int(a.n_atoms), int(b.dead), int(b.n_atoms)
    low, high = confint_proportions_2indep(*counts, method="newcomb")
    value = a.dead / a.n_atoms - b.dead / b.n_atoms
    return dict(quantity="dead_fraction", value=value, ci_low=low, ci_high=high, n=counts[1] + counts[3])


def _win_contrast(a: pd.DataFrame, b: pd.DataFrame, amplitude: str, resamples: int, seed: int) -> dict:
    wins = [x.kl_atom < x.kl_delete for x in (a, b)]
    by = [difference(*wins, (a[name], b[name]), resamples, seed) for name in ("passage", "atom")]
    interval = dict(ci_low=min(x.low for x in by), ci_high=max(x.high for x in by))
    value = wins[0].mean() - wins[1].mean()
    return dict(quantity=f"win_rate_{amplitude}", value=value, **interval, n=len(a) + len(b))


def tables(suite: Suite, windows, classes, firings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """results ablations.csv and ablation_contrasts.csv."""
    resamples, seed = suite.profile.ablations.bootstrap, suite.profile.seed
    table = summarise(windows, classes, firings, resamples, seed)
    trained = suite.table("ablation_saes").rename(columns=dict(seconds="training_seconds"))
    told = trained[[*(name for name in KEYS if name != "place"), "activation", "rank", "seed", "training_seconds"]]
    table = table.merge(told, on=[name for name in KEYS if name != "place"], validate="one_to_one")
    return suite.write("ablations", table), suite.write(
        "ablation_contrasts", contrasts(windows, firings, resamples, seed)
    )


# Selectivity


def directions(firings: pd.DataFrame, d: int, seed: int) -> torch.Tensor:
    """Two Gaussian vectors [n, 2, d] for each firing, that follow from (seed, window, position)."""
    found = []
    for window, position in zip(firings.window, firings.position, strict=True):
        generator = torch.Generator().manual_seed(((seed + 1) * 1_000_003 + window) * 4_099 + position)
        found.append(torch.randn(2, d, generator=generator))
    return torch.stack(found)


def across(x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """What of x [n, d] is orthogonal to the unit vectors [n, d]."""
    return x - (x * unit).sum(-1, keepdim=True) * unit


def overlap(a: torch.Tensor, b: torch.Tensor, top: int) -> torch.Tensor:
    """[n]: the share of the `top` largest |a| of [n, V] that are among those of |b|."""
    first, second = (x.abs().topk(top, dim=-1).indices for x in (a, b))
    return (first[:, :, None] == second[:, None]).any(-1).double().mean(-1)


@torch.no_grad()
def compare(
    host: Host, run: Run, subject: Subject, firings: pd.DataFrame, seed: int, tops: list[int], batch_rows: int = 512
) -> pd.DataFrame:
    """Atom and controls at the firings, whose column `row` says their window within `run`: a line a firing and placement,
    with kl_delete, kl_atom, kl_random, kl_orthogonal, and where added overlap_CONTROL_K for each K of `tops`."""
    at_once = max(1, batch_rows // (1 + len(PLACEMENTS) * (1 + len(CONTROLS))))
    parts = [firings.iloc[i : i + at_once] for i in range(0, len(firings), at_once)]
    found = pd.concat([_compare(host, run, subject, part, seed, tops) for part in parts], ignore_index=True)
    return found.assign(host=host.name, layer=subject.layer, head=subject.head, target=subject.target)


def _compare(host: Host, run: Run, subject: Subject, firings: pd.DataFrame, seed: int, tops: list[int]):
    factors = host.factors(run, subject.layer, subject.head)
    row, position, atom = (torch.tensor(firings[name].to_numpy()) for name in ("row", "position", "atom"))
    key, write = factors.key[row, position], factors.write(subject.write)[row, position]
    own_key, own_value = (x[atom] for x in subject.sae.atoms())
    random_key, random_value = (directions(firings, host.d_k + host.d_v, seed)[:, 0].to(key)).split(
        [host.d_k, host.d_v], -1
    )
    put_in = dict(
        atom=rank_one(own_key, own_value),
        random=rank_one(random_key, random_value),
        orthogonal=rank_one(across(random_key, own_key), across(random_value, own_value)),
    )
    norm = key.norm(dim=-1) * write.norm(dim=-1)
    scales = dict.fromkeys(PLACEMENTS, norm) | dict(coefficient=torch.tensor(firings.coefficient.to_numpy()).to(norm))
    nothing = key[:, None], torch.zeros_like(write)[:, None]
    native = key[:, None], -write[:, None]
    scope, found = "write", []
    found.append(changes(factors, row, position, native, *(x[:, None] for x in nothing), scope))
    for placement in PLACEMENTS:
        taken = nothing if placement == "added" else native
        there = terms(put_in, put_in, dict.fromkeys(put_in, scales[placement]))
        found.append(changes(factors, row, position, taken, *there, scope))
    change = torch.cat(found, 1)
    rows, starts = (x.repeat_interleave(change.shape[1]) for x in (row, position))
    hidden, _ = host.branch(run, subject.layer, subject.head, rows, starts, change.flatten(0, 1))
    patched = host.logits(hidden[:, -1]).unflatten(0, (len(row), -1))
    before = host.logits(run.final[row, position + STEPS - 1])
    divergence = kl(before[:, None], patched)
    tables = []
    for number, placement in enumerate(PLACEMENTS):
        first = 1 + number * len(put_in)
        columns = dict(zip(put_in, range(first, first + len(put_in)), strict=True))
        table = firings.drop(columns="row").assign(placement=placement, kl_delete=divergence[:, 0].numpy())
        table = table.assign(**{f"kl_{name}": divergence[:, c].numpy() for name, c in columns.items()})
        if placement == "added":
            shift = {name: patched[:, c] - before for name, c in columns.items()}
            for name in CONTROLS:
                for top in tops:
                    table[f"overlap_{name}_{top}"] = overlap(shift["atom"], shift[name], top).numpy()
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def selectivity(suite: Suite) -> pd.DataFrame:
    """results selectivity.csv: a line a firing and placement, in every cell of the hosts that are asked."""
    parts = []
    for name, own in asked(suite).items():
        windows = firing_windows(suite, name)[slice(0, own.selectivity.windows)]
        cells = [suite.cell(name, place) for place in suite.profile.hosts[name].cells]
        drawn = []
        for subject in heldout_subjects(suite, name, cells, "main", windows):
            firings = firings_of(suite, subject, windows)
            drawn.append((subject, draw_in_rounds(firings, own.selectivity.firings, suite.profile.seed)))
        inputs = dict(settings=own.selectivity, data=suite.profile.data, saes=suite.sae_files(name), cells=cells)
        options = dict(tops=own.selectivity.tops, batch_rows=suite.profile.section("replacement", name).batch_rows)
        parts.append(
            run_firings(suite, name, "selectivity", windows, drawn, inputs, compare, modules=(__name__,), **options)
        )
    return suite.gather("selectivity", parts)


def selectivity_tables(suite: Suite, firings: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """results selectivity_summary.csv (the atom against each control) and selectivity_overlap.csv (1 - overlap by K)."""
    resamples, seed = suite.profile.ablations.bootstrap, suite.profile.seed
    named = firings.merge(suite.cells[["host", "layer", "head", "place"]], on=["host", "layer", "head"])
    told, overlaps = [], []
    for (host, target, placement), group in named.groupby(["host", "target", "placement"], sort=False):
        for cells, part in [("pooled", group), *group.groupby("place", sort=False)]:
            where = dict(host=host, target=target, cells=cells)
            for control in CONTROLS:
                line = where | dict(placement=placement, control=control)
                told.append(line | against(part, control, resamples, seed))
                if placement == "added":
                    overlaps += [where | dict(control=control) | x for x in _overlaps(part, control, resamples, seed)]
    return suite.write("selectivity_summary", pd.DataFrame(told)), suite.write(
        "selectivity_overlap", pd.DataFrame(overlaps)
    )


def against(part: pd.DataFrame, control: str, resamples: int, seed: int) -> dict:
    """How often the atom's KL to the native run is below the control's: Wilson's interval, the bootstrap by atom, a paired
    Wilcoxon test of the two, and Cliff's delta, positive where the control's KL is the larger."""
    other = part[f"kl_{control}"]
    closer = part.kl_atom < other
    low, high = wilson(int(closer.sum()), len(closer))
    boot = cluster_bootstrap(closer, atom_names(part), resamples=resamples, seed=seed)
    return dict(
        n=len(part),
        n_atoms=atom_names(part).nunique(),
        atom_closer=closer.mean(),
        ci_low=low,
        ci_high=high,
        boot_low=boot.low,
        boot_high=boot.high,
        kl_atom=part.kl_atom.median(),
        kl_control=other.median(),
        kl_delete=part.kl_delete.median(),
        wilcoxon_p=paired_wilcoxon(part.kl_atom, other).p,
        cliffs_delta=cliffs_delta(other, part.kl_atom),
    )


def _overlaps(part: pd.DataFrame, control: str, resamples: int, seed: int) -> list[dict]:
    rows, prefix = [], f"overlap_{control}_"
    for column in [name for name in part if name.startswith(prefix)]:
        selective = 1 - part[column]
        by = [cluster_bootstrap(selective, c, resamples=resamples, seed=seed) for c in (atom_names(part), part.passage)]
        interval = dict(ci_low=min(x.low for x in by), ci_high=max(x.high for x in by))
        rows.append(dict(top=int(column[len(prefix) :]), selectivity=selective.mean(), **interval, n=len(part)))
    return rows
