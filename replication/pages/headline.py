"""Page 05: the replacement test under each draw of firings, and for SAEs with and without the data's mean.

The paper pools some 270 firings of each of 18 features, puts in the atom at its activation, and its text
centres the states. The row nearest to that protocol is target state, centre mean, draw atoms, condition atom,
amplitude coefficient: `PAPER`. This repository's headline is by position, since "on which share of positions"
asks for that, and without the mean, since a write-trained atom that stands for "minus the mean" is no
stand-in for a write.
"""

from __future__ import annotations

from itertools import product

import pandas as pd

from replication import layout
from replication import statistics as stats
from replication.plots import CONDITION_NAMES
from replication.study.firings import (
    by_place,
    drawn_positions,
    firing_windows,
    firings_of,
    headline_saes,
    run_firings,
)
from replication.study.profile import PAPER_PLACES
from replication.study.stages import rows_with
from replication.study.study import Study
from writesae.evaluate.firings import atom_names, draw_in_rounds, firings_at

PAPER = dict(target="state", centre="mean", draw="atoms", condition="atom", amplitude="coefficient")
CONDITIONS = ("atom", "atom_and_mean", "reconstruction", "random", "native_rescaled")
MEASURED = dict(coefficient=CONDITIONS, projection=("atom", "random"))
PLACE = ["layer", "head", "window", "position", "passage", "seed"]
KEYS = ["host", "target", "centre", "draw", "amplitude"]
CELL = ["host", "layer", "head"]
KLS = ["kl_delete", "kl_atom", "kl_random"]


def measure(study: Study) -> pd.DataFrame:
    """Return one row per firing and amplitude, for every cell, target, centre, seed and draw; kept in
    build/."""
    return pd.concat([_of_host(study, name) for name in study.profile.hosts], ignore_index=True)


def _of_host(study: Study, name: str) -> pd.DataFrame:
    settings, windows = study.profile.section("replacement", name), firing_windows(study, name)
    places, seed, drawn = drawn_positions(study, windows, settings.places), study.profile.seed, []
    for cell_sae in headline_saes(study, name, windows):
        config = cell_sae.sae.config
        labels = dict(centre=config.centre, seed=config.seed)
        drawn.append((cell_sae, firings_at(cell_sae, places).assign(**labels, draw="positions")))
        if config.seed == seed:
            every = draw_in_rounds(firings_of(study, cell_sae, windows), settings.by_atom, seed)
            drawn.append((cell_sae, every.assign(**labels, draw="atoms")))
    options = dict(conditions=MEASURED, scopes=("write",), batch_rows=settings.batch_rows)
    return run_firings(study, name, "headline", windows, drawn, **options)


def summarise(study: Study, firings: pd.DataFrame) -> pd.DataFrame:
    """Write results headline.csv: each condition against deletion, per cell and over the paper's cells.

    win_rate: the share of firings at which the condition has a lower KL than deletion; a position at which no
    atom is active counts as lost. recovered: 1 - mean KL / mean KL(delete). Intervals cover places (clustered
    by passage, for the draw `atoms` by passage and atom) and, where seeds > 1, trainings. lowest, highest:
    over seeds; between_seeds: standard deviation. KLs in nats. paper: whether the row is PAPER.
    """
    rows = []
    for values, group in firings.groupby(KEYS, sort=False):
        parts = by_place(group, study.cells).groupby("cells", sort=False)
        for (cells, part), condition in product(parts, CONDITIONS):
            if part[f"kl_{condition}"].notna().all():
                row = dict(zip(KEYS, values, strict=True), cells=cells, condition=condition)
                rows.append(row | dict(paper=PAPER.items() <= row.items()) | _row(part, condition, study))
    return study.write("headline", pd.DataFrame(rows))


def paper_places(study: Study, firings: pd.DataFrame) -> pd.DataFrame:
    """Write results headline_places.csv: all trainings of the paper's SAEs, at the places drawn by position.

    One row per place and training, in the cells that are pooled; KLs in nats. The scorecard reads it.
    """
    where = PAPER | dict(draw="positions")
    part = rows_with(firings, **{name: where[name] for name in KEYS[1:]})
    part = part.merge(study.cells[[*CELL, "place"]], on=CELL)
    columns = [*CELL, "place", "seed", "window", "passage", "position", "atom", "coefficient", "cosine"]
    return study.write("headline_places", part[part.place.isin(PAPER_PLACES)][[*columns, *KLS]])


def _over_trainings(part: pd.DataFrame, values, study: Study) -> stats.Estimate:
    """Return the mean of `values` over places and trainings; for the draw `atoms`, over the atoms as well."""
    atoms = atom_names(part) if part.draw.iloc[0] == "atoms" else None
    options = dict(resamples=study.profile.replacement.bootstrap, seed=study.profile.seed)
    return stats.over_trainings(values, part.passage, atoms, part.seed, **options)


def _row(part: pd.DataFrame, condition: str, study: Study) -> dict:
    won = stats.beats(part, condition).astype(float)
    rate = _over_trainings(part, won, study)
    row = dict(n=rate.n, seeds=rate.trainings, n_passages=part.passage.nunique())
    row |= stats.with_ends("win_rate", rate.value, rate.interval())
    lost = _over_trainings(part, part[[f"kl_{condition}", "kl_delete"]], study)
    row |= dict(recovered=1 - lost.value)
    row |= dict(zip(("recovered_high", "recovered_low"), (1 - end for end in lost.interval())))
    means = won.groupby(part.seed).mean()
    row |= dict(lowest=means.min(), highest=means.max(), between_seeds=rate.between_seeds)
    row |= dict(kl_median=part[f"kl_{condition}"].median(), kl_delete_median=part.kl_delete.median())
    row |= dict(kl_mean=part[f"kl_{condition}"].mean(), kl_delete_mean=part.kl_delete.mean())
    return row | dict(cosine_below_zero=(part.cosine < 0).mean(), silent=(part.coefficient == 0).mean())


def contrasts(study: Study, firings: pd.DataFrame) -> pd.DataFrame:
    """Write results headline_contrasts.csv: win rate of write- minus state-trained atoms, paired.

    Pairs have the same place and seed; draw `positions`. Columns as in `summarise`.
    """
    keys, rows = ["host", "centre", "amplitude"], []
    for values, group in firings[firings.draw == "positions"].groupby(keys, sort=False):
        for cells, part in by_place(group, study.cells).groupby("cells", sort=False):
            won = part.assign(win=stats.beats(part).astype(float)).pivot(index=PLACE, columns="target", values="win")
            pairs = won.reset_index()
            options = dict(resamples=study.profile.replacement.bootstrap, seed=study.profile.seed)
            apart = pairs["write"] - pairs["state"]
            found = stats.over_trainings(apart, pairs.passage, trainings=pairs.seed, **options)
            row = dict(zip(keys, values, strict=True), cells=cells, n=found.n, seeds=found.trainings)
            rows.append(row | stats.with_ends("difference", found.value, found.interval()))
    return study.write("headline_contrasts", pd.DataFrame(rows))


# For readers


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return win rates (%) for a reader: a row per target and centre, a column per draw."""
    wide = layout.across(table, ["target", "centre"], "draw", layout.estimates(table, "win_rate", digits=1))
    names = dict(positions="by position (%)", atoms="equal per atom, one seed (%)")
    seeds = table[table.draw == "positions"]
    columns = {"places": seeds.n, "seeds": seeds.seeds}
    columns |= {"cosine below 0 (%)": layout.numbers(seeds.cosine_below_zero, ".0f", 100)}
    return wide.rename(columns=names)[[*names.values()]].join(layout.shown(seeds, ["target", "centre"], columns))


def shown_contrasts(apart: pd.DataFrame) -> pd.DataFrame:
    """Return write- minus state-trained win rates (percentage points) per host, cells and centre."""
    return layout.across(apart, ["host", "cells"], "centre", layout.estimates(apart, "difference", digits=1))


def shown_conditions(part: pd.DataFrame) -> pd.DataFrame:
    """Return the win rate (%) and the recovered share of the KL (%) of each condition, target and centre."""
    by, wide = ["target", "condition"], {}
    for name, heading in dict(win_rate="beats deletion (%)", recovered="KL recovered (%)").items():
        wide[heading] = layout.across(part, by, "centre", layout.numbers(part[name], ".0f", 100))
    return pd.concat(wide, axis=1).sort_index(level=0, sort_remaining=False)


def shown_sizes(table: pd.DataFrame, paper: dict[str, float]) -> pd.DataFrame:
    """Return median KLs in millinats for a reader, for SAEs without the mean.

    paper: place -> the paper's median KL of deletion in nats (Table 2), beside those of the main host."""
    chosen = dict(draw="positions", amplitude="coefficient", centre="none", target="state")
    rows = rows_with(table[table.cells.isin(paper)], **chosen)
    wide = layout.across(rows, ["host", "cells"], "condition", layout.numbers(rows.kl_median, ".3f", 1000))
    first = rows.drop_duplicates(["host", "cells"])
    papers = first.cells.map(paper).where(first.host == first.host.iloc[0])
    columns = {CONDITION_NAMES["delete"]: layout.numbers(first.kl_delete_median, ".3f", 1000)}
    columns |= {"nothing, in the paper": layout.numbers(papers, ",.0f", 1000)}
    sizes = wide[[CONDITION_NAMES[name] for name in ("atom", "random", "native_rescaled")]]
    return sizes.join(layout.shown(first, ["host", "cells"], columns))
