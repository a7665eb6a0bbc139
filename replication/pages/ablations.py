"""Page 13_ablations: encoder, decoder, sparsity rule and rank of the SAE (Sec. 3.4, App. B, C, F.3).

Variants differ only in the parts that they name; training and measures are the same: FVU, L0, dead atoms,
registers and bundles, and replacement of the native write by the top singular pair of the firing's atom, or
by the whole atom if its rank is above 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from statsmodels.stats.proportion import confint_proportions_2indep
from tqdm import tqdm

from replication import layout
from replication import statistics as stats
from replication.classes import described_atoms, partition, scanned
from replication.study.firings import by_place, firing_windows, firings_of, run_firings
from replication.study.stages import rows_with
from replication.study.study import Study
from replication.study.training import ablation_hosts, ablation_role, ablation_variants
from writesae.evaluate.firings import CellSAE, draw_in_rounds
from writesae.evaluate.replacement import AMPLITUDES
from writesae.harvesting import harvest
from writesae.sae.train import by_group
from writesae.text import Windows

REFERENCE = "bilinear+rank1"  # the others are compared with this variant
FEWEST_ALIVE = 8  # minimum number of atoms for a partition into classes
KEYS = ["host", "place", "layer", "head", "target", "variant"]


def encode(study: Study, host: str, windows: Windows) -> dict[tuple, tuple[CellSAE, pd.DataFrame]]:
    """Return each variant's SAE on the windows, and its errors per window, by (place, target, variant)."""
    section, write, encoded = study.profile.section("ablations", host), study.profile.saes.write, {}
    groups = [(place, target, s.variant) for place, target, s in ablation_variants(section, study.profile.seed)]
    cells = {place: study.cell(host, place) for place, _, _ in groups}
    batch = study.profile.data.batch_windows
    factors = harvest(study.host(host), windows.tokens, list(dict.fromkeys(cells.values())), batch)
    for place, target, variant in tqdm(groups, desc="encoding"):
        cell, sae = cells[place], study.sae(host, *cells[place], target, ablation_role(variant))
        parts = zip(*by_group(sae, factors[cell].history(target, write)), strict=True)
        squared, energy, indices, coefficients = (torch.cat(x) for x in parts)
        writes = factors[cell].history("write", write)
        cell_sae = CellSAE(*cell, target, write, sae, indices, coefficients, writes)
        columns = dict(host=host, place=place, layer=cell[0], head=cell[1], target=target, variant=variant)
        columns |= dict(window=range(len(windows)), passage=windows.passage.numpy())
        columns |= dict(squared=squared.double().sum(1).numpy(), energy=energy.double().sum(1).numpy())
        columns |= dict(active=(coefficients > 0).sum((1, 2)).numpy(), dead=sae.n_atoms - len(cell_sae.alive))
        columns |= dict(n_atoms=sae.n_atoms, k=sae.k, tokens=squared.shape[1])
        encoded[place, target, variant] = cell_sae, pd.DataFrame(columns)
    return encoded


def _errors(group: tuple, errors: dict[tuple, pd.DataFrame]) -> pd.DataFrame:
    return errors[group]


def _classes(group: tuple, host: str, encoded: dict, firings: dict, seed: int, tokens: int) -> pd.DataFrame:
    """Return one row per alive atom of a variant, as in atoms.csv; none for an SAE with too few of them."""
    if firings[group].atom.nunique() < FEWEST_ALIVE:
        return pd.DataFrame({"host": []})
    sae, table = encoded[group].sae, described_atoms(host, encoded[group], firings[group], seed, tokens)
    return table.assign(place=group[0], variant=group[2], k=sae.k, seed=seed, n_atoms=sae.n_atoms)


def run(study: Study) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Write results ablation_windows (errors per window), ablation_atoms (alive ones), ablation_firings."""
    windowed, atoms, tested = [], [], []
    for name, section in ablation_hosts(study).items():
        seed, windows = study.profile.seed, firing_windows(study, name)[slice(0, section.windows)]
        pairs, tokens = encode(study, name, windows), scanned(windows, study.profile.data.first_position)
        encoded, errors = ({group: pair[i] for group, pair in pairs.items()} for i in (0, 1))
        firings = {group: firings_of(study, cell_sae, windows) for group, cell_sae in encoded.items()}
        given, drawn = dict(host=name, encoded=encoded, firings=firings, seed=seed, tokens=tokens), []
        for group, cell_sae in encoded.items():
            some = draw_in_rounds(firings[group], min(section.firings, len(firings[group])), seed)
            drawn.append((cell_sae, some.assign(place=group[0], variant=group[2])))
        options = dict(conditions=("delete", "atom", "random", "reconstruction", "whole_atom"), scopes=("write",))
        options["batch_rows"] = study.profile.section("replacement", name).batch_rows
        windowed.append(study.stage("ablation_windows", name, encoded, _errors, errors=errors))
        atoms.append(study.stage("ablation_atoms", name, encoded, _classes, **given))
        tested.append(run_firings(study, name, "ablation_firings", windows, drawn, **options))
    tables = dict(ablation_windows=windowed, ablation_atoms=atoms, ablation_firings=tested)
    return tuple(study.gather(name, parts) for name, parts in tables.items())


def fvu(windows: pd.DataFrame) -> Callable[[np.ndarray], float]:
    """Return the fraction of variance unexplained (FVU) as a function of row numbers."""
    squared, energy = windows.squared.to_numpy(), windows.energy.to_numpy()
    return lambda rows: squared[rows].sum() / energy[rows].sum()


def summarise(windows: pd.DataFrame, classes: pd.DataFrame, firings: pd.DataFrame, resamples: int, seed: int):
    """Return FVU, L0, dead atoms, classes and win rates over deletion, one row per (place, target, variant).

    Intervals: Wilson's (ci, and of dead atoms), bootstrap by passage (fvu) and by atom (boot). Classes and
    win rates are missing if there are too few atoms or no firings."""
    rows = []
    for values, part in windows.groupby(KEYS, sort=False):
        where, first = dict(zip(KEYS, values, strict=True)), part.iloc[0]
        fvu_of, tokens = fvu(part), int(part.tokens.sum())
        interval = stats.cluster_bootstrap(fvu_of, part.passage, resamples=resamples, seed=seed)
        row = where | dict(n_atoms=first.n_atoms, k=first.k) | stats.with_ends("fvu", fvu_of(slice(None)), interval)
        row |= dict(n_tokens=tokens, n_passages=part.passage.nunique(), l0=part.active.sum() / tokens)
        low, high = stats.wilson(int(first.dead), int(first.n_atoms))
        row |= dict(dead=first.dead, dead_fraction=first.dead / first.n_atoms, dead_low=low, dead_high=high)
        alive = rows_with(classes, **where)
        if len(alive):
            row |= partition(alive, seed)
        for amplitude, fired in rows_with(firings, **where).groupby("amplitude", sort=False):
            row |= {f"{name}_{amplitude}": x for name, x in wins(fired, resamples, seed).items()}
            row |= dict(n_firings=len(fired), n_firing_atoms=fired.atom.nunique())
        rows.append(row)
    return pd.DataFrame(rows)


def wins(firings: pd.DataFrame, resamples: int, seed: int) -> dict:
    """Return how often the atom, a random atom and (for a rank above 1) the whole atom beat deletion."""
    row = stats.rate_row(stats.beats(firings), resamples, seed, boot=firings.atom)
    row["win_random"] = stats.beats(firings, "random").mean()
    if "kl_whole_atom" in firings and firings.kl_whole_atom.notna().all():
        whole = stats.beats(firings, "whole_atom")
        row["whole_win_rate"] = whole.mean()
        row["whole_low"], row["whole_high"] = stats.wilson(int(whole.sum()), len(firings))
    return row


def contrasts(windows: pd.DataFrame, firings: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return one row per quantity: every variant against REFERENCE at the same place and target.

    | quantity           | value                                  | interval                                 |
    |--------------------|----------------------------------------|------------------------------------------|
    | fvu_ratio          | FVU of the variant / of the reference  | bootstrap by passage, paired             |
    | dead_fraction      | difference of the shares of dead atoms | Newcombe                                 |
    | win_rate_AMPLITUDE | difference of the win rates            | wider of those by passage and by atom    |
    """
    rows, keys = [], ["host", "place", "layer", "head", "target"]
    for values, group in windows.groupby(keys, sort=False):
        where = dict(zip(keys, values, strict=True))
        base = group[group.variant == REFERENCE]
        if base.empty:
            continue
        reference, base_fvu = rows_with(firings, **where, variant=REFERENCE), fvu(base)
        for variant, part in group[group.variant != REFERENCE].groupby("variant", sort=False):
            line, part_fvu = where | dict(variant=variant, reference=REFERENCE), fvu(part)

            def ratio(rows, fvu_of=part_fvu, base_fvu=base_fvu):
                return fvu_of(rows) / base_fvu(rows)

            interval = stats.ci(stats.cluster_bootstrap(ratio, base.passage, resamples=resamples, seed=seed))
            row = dict(quantity="fvu_ratio", value=ratio(slice(None))) | interval
            rows.append(line | row | dict(n=int(part.tokens.sum())))
            rows.append(line | _dead_contrast(part.iloc[0], base.iloc[0]))
            fired = rows_with(firings, **where, variant=variant)
            for amplitude in AMPLITUDES:
                pair = [x[x.amplitude == amplitude] for x in (fired, reference)]
                if all(map(len, pair)):
                    rows.append(line | _win_contrast(*pair, amplitude, resamples, seed))
    return pd.DataFrame(rows)


def _dead_contrast(a: pd.Series, b: pd.Series) -> dict:
    counts = int(a.dead), int(a.n_atoms), int(b.dead), int(b.n_atoms)
    interval = stats.ci(stats.Interval(*confint_proportions_2indep(*counts, method="newcomb")))
    value = a.dead / a.n_atoms - b.dead / b.n_atoms
    return dict(quantity="dead_fraction", value=value) | interval | dict(n=counts[1] + counts[3])


def _win_contrast(a: pd.DataFrame, b: pd.DataFrame, amplitude: str, resamples: int, seed: int) -> dict:
    wins = [stats.beats(x, "whole_atom" if x.kl_whole_atom.notna().all() else "atom") for x in (a, b)]
    by = (stats.difference_bootstrap(*wins, (a[name], b[name]), resamples, seed) for name in ("passage", "atom"))
    row = dict(quantity=f"win_rate_{amplitude}", value=wins[0].mean() - wins[1].mean())
    return row | stats.ci(stats.wider(*by)) | dict(n=len(a) + len(b))


def starts(saes: pd.DataFrame) -> pd.DataFrame:
    """Return how often atoms beat deletion by position, and FVU, if they start at writes and at random.

    saes: the table of the sweep `start`, whose names are TARGET_data and TARGET_random. win_* and fvu_* are
    means over cells and seeds; difference: random less data, with Hartung and Knapp's interval over seeds.
    n: places per SAE, summed over cells."""

    def row(part: pd.DataFrame) -> dict:
        part = part.assign(start=part.name.str.rpartition("_")[2])
        wins, errors = (part.pivot_table(x, "seed", "start") for x in ("win_atom_coefficient", "fvu"))
        apart = wins.random - wins.data
        numbers = {f"win_{name}": wins[name].mean() for name in wins}
        numbers |= {f"fvu_{name}": errors[name].mean() for name in errors}
        numbers |= dict(seeds=len(apart), n=int(part.drop_duplicates(["layer", "head"]).firings.sum()))
        return numbers | stats.with_ends("difference", apart.mean(), stats.student(apart))

    return stats.per_group(saes, ["host", "target"], row)


def ladder(saes: pd.DataFrame, of: Sequence[str] = ("layer", "head")) -> pd.DataFrame:
    """Return win rates by position and FVUs of both targets for each size of SAE and training.

    saes: the table of the sweep `ladder`, one row per SAE; of: the columns that name a cell, or a set of cells. Rates
    are means over seeds and cells. The variance of a mean is that between seeds, divided by their number, plus the
    binomial variance of the places, as if the seeds shared all of it and the places were independent; Student's t
    has Satterthwaite's degrees of freedom. With one seed the interval is that of the places. difference: write less
    state, paired by seed, with the binomial variances of both. Names that end in _projection: with the atom scaled
    to fit the write, else at its own coefficient. n: places per seed."""

    def row(part: pd.DataFrame) -> dict:
        places = part.groupby(["layer", "head"]).firings.min()
        n, m = int(places.sum()), part.seed.nunique()
        numbers = dict(n=n, seeds=m)
        for amplitude, ending in dict(coefficient="", projection="_projection").items():
            rate = part[f"win_atom_{amplitude}"]
            wins = part.pivot_table(rate.name, "seed", "target")
            binomial = (rate * (1 - rate) / part.firings).groupby(part.target).sum()
            sampling = binomial / m / len(places) ** 2
            sampling["difference"] = sampling.sum()
            for name, values in wins.assign(difference=wins.write - wins.state).items():
                own, shared = values.var() / m if m > 1 else 0.0, sampling[name]
                freedom = stats.satterthwaite(shared, n - len(places), own, max(1, m - 1))
                found = stats.Estimate(values.mean(), (own + shared) ** 0.5, float(freedom), n, m, values.std())
                numbers |= stats.with_ends(f"{name}{ending}", found.value, found.interval())
        for name, column in dict(fvu="fvu", training_fvu="final_training_fvu").items():
            means = part.groupby("target")[column].mean()
            numbers |= {f"{name}_{target}": mean for target, mean in means.items()}
        return numbers

    return stats.per_group(saes, ["host", *of, "n_atoms", "k", "tokens"], row)


def ladder_of_headline(saes: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Return `ladder` over the headline's cells ("pooled") and in each, for sizes and seeds that were trained in all.

    saes: the tables of the sweeps `ladder` and `ladder_cells`; cells: cells.csv."""
    placed = by_place(saes, cells)
    trained = placed.groupby(["n_atoms", "k", "tokens", "target", "seed"]).cells.transform("nunique")
    return ladder(placed[trained == trained.max()], ["cells"])


def tables(study: Study, windows, classes, firings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write and return results ablations.csv and ablation_contrasts.csv."""
    resamples, seed = study.profile.ablations.bootstrap, study.profile.seed
    keys = [name for name in KEYS if name != "place"]
    trained = study.table("ablation_saes").rename(columns=dict(seconds="training_seconds"))
    trained = trained[[*keys, "activation", "rank", "seed", "training_seconds"]]
    table = summarise(windows, classes, firings, resamples, seed).merge(trained, on=keys, validate="one_to_one")
    contrasted = contrasts(windows, firings, resamples, seed)
    return study.write("ablations", table), study.write("ablation_contrasts", contrasted)


# For readers

BY = ["variant", "target"]
QUANTITIES = dict(fvu_ratio="error, ratio", dead_fraction="dead atoms, difference")
QUANTITIES |= dict(win_rate_coefficient="win rate, difference", win_rate_matched_norm="the same at the native norm")


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return the errors of the variants for a reader."""
    columns = {"atoms": table.n_atoms, "FVU": layout.plain(table, "fvu", digits=3)}
    columns |= {"active per token": layout.numbers(table.l0, ".1f"), "dead": table.dead}
    columns |= {"tokens": layout.numbers(table.n_tokens, ",.0f")}
    columns |= {"training (seconds)": layout.numbers(table.training_seconds, ".0f")}
    return layout.shown(table, BY, columns)


def shown_starts(table: pd.DataFrame) -> pd.DataFrame:
    """Return what the start of the atoms changes, for a reader."""
    columns = {"places": layout.numbers(table.n, ",.0f"), "seeds": table.seeds}
    for name, words in dict(data="start at writes", random="at random").items():
        columns[f"{words}: wins (%)"] = layout.numbers(table[f"win_{name}"], ".0f", 100)
        columns[f"{words}: FVU"] = layout.numbers(table[f"fvu_{name}"])
    columns["wins, difference (points)"] = layout.estimates(table, "difference")
    return layout.shown(table, ["target"], columns)


def shown_ladder(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `ladder` or `ladder_of_headline` for a reader."""
    names = [f"{x.n_atoms:,}, {x.k}, {x.tokens / 1e6:.1f} million" for x in table.itertuples()]
    columns = {"seeds": table.seeds} | layout.of_targets(table)
    columns["difference (points)"] = layout.estimates(table, "difference")
    columns["the same, scaled to fit"] = layout.estimates(table, "difference_projection")
    columns["FVU, states and writes"] = [f"{x.fvu_state:.2f}, {x.fvu_write:.2f}" for x in table.itertuples()]
    by = [*table.columns.intersection(["cells"]), "atoms, active, tokens"]
    return layout.shown(table.assign(**{by[-1]: names}), by, columns)


def shown_classes(table: pd.DataFrame) -> pd.DataFrame:
    """Return the classes of atoms of the variants for a reader."""
    columns = {"that fire": table.alive, "registers": table.registers, "bundles": table.bundles}
    columns |= {"cosine elsewhere": layout.numbers(table.elsewhere_cosine)}
    for name in ("register", "bundle"):
        ends = f"{name}_low", f"{name}_high"
        columns[f"cosine of {name}s"] = layout.plain(table, f"{name}_cosine", *ends)
    return layout.shown(table, BY, columns)


def shown_replacement(table: pd.DataFrame) -> pd.DataFrame:
    """Return how often atoms, and whole atoms of a higher rank, beat deletion (%), for a reader."""
    columns = {"firings": table.n_firings, "atoms": table.n_firing_atoms}
    for name, words in dict(coefficient="own coefficient", matched_norm="native norm").items():
        ends = f"boot_low_{name}", f"boot_high_{name}"
        columns[f"{words} (%)"] = layout.estimates(table, f"win_rate_{name}", *ends)
        columns[f"whole, {words} (%)"] = layout.numbers(table[f"whole_win_rate_{name}"], ".0f", 100)
    return layout.shown(table, BY, columns)


def shown_contrasts(contrasts: pd.DataFrame) -> pd.DataFrame:
    """Return the contrasts with the bilinear rank-1 TopK SAE for a reader, quantities across."""
    rows = contrasts.assign(quantity=contrasts.quantity.map(QUANTITIES))
    texts = layout.plain(rows, "value", "ci_low", "ci_high", digits=3)
    return layout.across(rows, ["place", "target", "variant"], "quantity", texts)[[*QUANTITIES.values()]]
