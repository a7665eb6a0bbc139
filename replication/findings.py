"""What each page found, in sentences built from its tables, and the numbers of the README and of docs/.

A notebook opens with its sentence (`answers.conclude`), docs/results.md has all of them, and `python -m replication
readme` writes the same numbers into the README, so that one number is computed in one place.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from replication.layout import estimate, percent
from replication.scorecard.claims import papers_value
from replication.scorecard.criteria import read_criteria
from replication.scorecard.verdicts import VERDICTS
from replication.statistics import Estimate
from replication.study.paths import dry_run
from replication.study.study import Study

HOSTS = ("gated_deltanet", "mamba2", "rwkv7")
MAIN = HOSTS[0]
CELLS = {"three cells": (MAIN, "pooled")} | {place: (MAIN, place) for place in ("early", "middle", "late")}
CELLS |= {"σ1/σ2 nearest to the paper's 12": (MAIN, "regime"), "matters most for the loss": (MAIN, "weighty")}
CELLS |= {"Mamba-2, middle": ("mamba2", "middle"), "RWKV-7, middle": ("rwkv7", "middle")}


LACKING = (ValueError, LookupError, AttributeError)  # what a sentence raises if a table lacks its rows or columns


def has_words(study: Study) -> bool:
    """Return whether sentences speak of the tables of a study: of the profiles mini, not of a dry run."""
    return study.profile.name.startswith("mini") and not dry_run()


class Results:
    """The tables of one folder, e.g. results/mini, each read once."""

    def __init__(self, folder: Path):
        self.folder, self._read = Path(folder), cache(pd.read_csv)

    def rows(self, name: str, **values) -> pd.DataFrame:
        """Return the rows of the table NAME.csv that have these values. Raises ValueError if there are none."""
        table = self._read(self.folder / f"{name}.csv")
        for column, value in values.items():
            table = table[table[column] == value]
        if table.empty:
            raise ValueError(f"{name}.csv has no rows with {values}.")
        return table

    def row(self, name: str, **values) -> pd.Series:
        """Return the only row with these values. Raises ValueError if there is none or more than one."""
        rows = self.rows(name, **values)
        if len(rows) != 1:
            raise ValueError(f"{name}.csv has {len(rows)} rows with {values}, and one is wanted.")
        return rows.iloc[0]


def listed(parts) -> str:
    """Return "a, b and c"."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


WIN = ("win_rate", "win_rate_low", "win_rate_high")


def win_rate(results: Results, target: str, centre: str = "none", **values) -> pd.Series:
    """Return the row of headline.csv of one training, by default pooled over the main host's three cells."""
    where = dict(host=MAIN, cells="pooled", amplitude="coefficient", draw="positions", condition="atom") | values
    return results.row("headline", target=target, centre=centre, **where)


def of_hosts(results: Results, table: str, **values) -> list[pd.Series]:
    """Return the only row of each host that has these values."""
    return [results.row(table, host=host, **values) for host in HOSTS]


def r2(results: Results, predictor: str, eps: float, host: str = MAIN) -> float:
    return results.row("logit_shift_summary", host=host, predictor=predictor, eps=eps).r2_median


# One sentence or two per page, in the order of the notebooks


def hosts(results: Results) -> str:
    losses = [results.row("hosts", host=host).heldout_loss for host in HOSTS]
    memory = [results.rows("all_cells", host=host).half_life_median.median() for host in HOSTS]
    return (
        f"The three models read held-out text at {listed(f'{x:.2f}' for x in losses)} nats per token, and the "
        f"median half-life of a write is {listed(f'{x:.0f}' for x in memory)} tokens."
    )


def harvest(results: Results) -> str:
    row = results.rows("harvest", host=MAIN).iloc[0]
    times = row.numbers_per_state / row.numbers_per_token
    return (
        f"The states of a head are kept exactly with {row.numbers_per_token} numbers per token instead of "
        f"{row.numbers_per_state:,}: {times:.0f} times fewer."
    )


def train_saes(results: Results) -> str:
    main = results.rows("saes", host=MAIN)
    main = main[main.role.str.startswith("main")]
    ends = {target: 100 * part.fvu.agg(["min", "max"]) for target, part in main.groupby("target")}
    shares = [f"{ends[x]['min']:.0f} to {ends[x]['max']:.0f}%" for x in ("state", "write")]
    return (
        f"SAEs leave {shares[0]} of the variance of states and {shares[1]} of the variance of writes "
        "unexplained, in the chosen cells of the main host."
    )


def atoms(results: Results) -> str:
    row = results.row("atom_partition", host=MAIN, place="middle", target="state", role="main", k=16, seed=42)
    again = results.row("atom_match_shares", host=MAIN, target="state", **{"class": "all"})
    share = percent(again, "share", "ci_low", "ci_high", digits=1)
    return (
        f"Of {row.alive} state-trained atoms that fire in the middle cell, {row.registers} are registers, at a "
        f"median cosine of {row.register_cosine:.2f} to the write, and the others are at "
        f"{row.bundle_cosine:.2f}. Of the atoms of smaller SAEs {share} come back in another seed (the paper: "
        "under 1%); page 19 asks it of the main ones."
    )


def logit_shift(results: Results) -> str:
    layer, first, paper, fitted = (r2(results, x, 1.0) for x in ("through_layer", "exact", "paper", "paper_fitted"))
    return (
        f"With nothing fitted, the closed form through the edited layer has a median R2 of {layer:.3f} at the "
        f"size of a native write, and the first-order form {first:.2f}; the paper's formula has {paper:.2f}, "
        f"and {fitted:.2f} with its fitted scalar."
    )


def replacement(results: Results) -> str:
    write, state = (win_rate(results, target) for target in ("write", "state"))
    floors, scaled_floors = (
        listed(
            f"{win_rate(results, x, condition='random', amplitude=amplitude).win_rate:.0%}" for x in ("write", "state")
        )
        for amplitude in ("coefficient", "projection")
    )
    scaled = [win_rate(results, target, amplitude="projection") for target in ("write", "state")]
    ceilings = [f"{win_rate(results, x, condition='native_rescaled').win_rate:.0%}" for x in ("write", "state")]
    return (
        f"An atom of an SAE trained on writes beats deletion at {percent(write, *WIN)} of {write.n:,} places, "
        f"and one of an SAE trained on states at {percent(state, *WIN)}; random atoms of these SAEs do so at "
        f"{floors}, and the write itself, rescaled to the atom's norm, at {listed(ceilings)}. That is at the "
        "atom's own coefficient. Scaled to fit the write, the atoms beat deletion at "
        f"{listed(percent(row, *WIN) for row in scaled)}, and random atoms at {scaled_floors}."
    )


def objects(results: Results) -> str:
    rows = of_hosts(results, "objects_summary", target="state", centre="none", object="state", cells="pooled")
    shares = listed(f"{row.win_rate:.0%}" for row in rows)
    rhos = listed(f"{row.rho:.2f}" for row in rows)
    return (
        "If the atom of an SAE of states without the mean replaces the whole state instead of the write, it "
        f"beats deletion at {shares} of the places of the three hosts, and the rank correlation with its cosine "
        f"to the write is {rhos} (in the paper's Table 13 the win rate does not depend on the cosine). On the "
        f"main host it is {cosine(results, centre='mean')} if the SAE subtracts the mean, as in the paper's "
        f"text, and {cosine(results, 'regime')} in the cell whose σ1/σ2 is nearest to the paper's 12."
    )


def cosine(results: Results, cells: str = "pooled", centre: str = "none") -> str:
    """Return the rank correlation of wins with the cosine on the main host if the atom replaces the state."""
    where = dict(host=MAIN, target="state", centre=centre, object="state", cells=cells, offset_kept=False)
    return estimate(results.row("objects_summary", **where), "rho", digits=2, scale=1)


def all_writes(results: Results) -> str:
    table = results.rows("all_writes", host=MAIN, role="pooled", layer=4).set_index(["condition", "target", "centre"])
    nothing = results.rows("all_writes", host=MAIN, layer=4, condition="none").iloc[0]
    elsewhere = results.row("cells", host=MAIN, place="middle").cost
    kinds = ("atom", "write", "none"), ("reconstruction", "write", "none"), ("read", "state", "none")
    costs = [estimate(row, "change", digits=1, scale=1000) for row in (nothing, *map(table.loc.__getitem__, kinds))]
    return (
        f"Without the writes of the middle cell the loss rises by {costs[0]} millinats per token (on other "
        f"windows, page 00: {1000 * elsewhere:.1f}). It rises by {costs[1]} if the write-trained SAE's top atom "
        f"replaces every write, by {costs[2]} if its whole reconstruction does, and by {costs[3]} if every "
        "state is read through the state-trained SAE (no mean)."
    )


def baselines(results: Results) -> str:
    where = dict(host=MAIN, cells="pooled", amplitude="projection")
    atom = results.row("baselines_summary", **where, method="best_atom", target="write", centre="none")
    names = dict(nearest_write="the nearest of as many raw writes", kmeans="the nearest of as many k-means centres")
    parts = []
    for method, words in names.items():
        row = results.row("baselines_summary", **where, method=method, size=512)
        parts.append(f"{words} {percent(row, 'recovered')}")
    return (
        "Scaled to fit the write, the nearest atom of the write-trained SAE recovers "
        f"{percent(atom, 'recovered')} of the KL of deletion, {listed(parts)}."
    )


def population(results: Results) -> str:
    where = dict(host=MAIN, amplitude="coefficient", **{"class": "all"})
    state, write = (results.row("population_summary", target=x, **where) for x in ("state", "write"))
    columns = ("mean_win_rate", "ci_low", "ci_high")
    return (
        f"Averaged over {state.n_atoms} atoms of the middle cell (equally per atom, mean subtracted), the "
        f"state-trained atom beats deletion at {percent(state, *columns)} of its firings (the paper: "
        f"{papers_value('P1'):.0%}), and the write-trained one at {percent(write, *columns)}."
    )


def other_hosts(results: Results) -> str:
    def rates(target):
        rows = (win_rate(results, target, host=host, cells="middle") for host in HOSTS[1:])
        return listed(percent(row, *WIN) for row in rows)

    r2s = listed(f"{r2(results, 'through_layer', 1.0, host):.3f}" for host in HOSTS[1:])
    return (
        f"On Mamba-2 and RWKV-7 the write-trained atom beats deletion at {rates('write')} of places and the "
        f"state-trained one at {rates('state')}; the closed form holds there too (R2 {r2s} at a native write's "
        "size)."
    )


def cache_edits(results: Results) -> str:
    where = dict(host=MAIN, role="boundary", dose=5)
    change, kept = (
        estimate(results.row("newlines_summary", mode=mode, **where), "change", scale=1) for mode in ("offset", "kept")
    )
    rose = results.row("single_write_summary", host=MAIN, direction="paper", predictor="paper")
    return (
        f"Amplifying the ten atoms of line ends five times changes newlines by {change} per 400 tokens if one "
        f"cell is read so, and by {kept} if it is added to the states of every head of a layer (the paper edits "
        f"32 heads). One write along the paper's direction raises its target's logit in {rose.rose:.0%} of the "
        f"trials, and the formula's sign, plus or minus, is right in {rose.sign_agreement:.0%} (page 04 asks it "
        f"of SAE atoms). The paper's {papers_value('I1'):.0%} can be read as either."
    )


def install(results: Results) -> str:
    where = dict(host=MAIN, target_class="all", magnitude=3.0)
    gamma, paper = (results.row("install_summary", direction=x, **where) for x in ("gamma", "paper"))
    return (
        "Three writes at three times the native norm change the share of targets among the new tokens from "
        f"{gamma.included_native:.1%} to {paper.included_edited:.1%} along the paper's direction and to "
        f"{gamma.included_edited:.1%} along the best direction of one cell. Writes of the native size in every "
        "cell make a target of native rank 101 to 1,000 the next token in "
        f"{in_every_cell(results, 'layerwise')} of {counts_in_every_cell(results)} trials on the three hosts if "
        f"they are 3 tokens before it, and in {in_every_cell(results, 'layerwise', 40)} if they are 40 tokens "
        "before it (directions taken layer by layer). With a few gradient steps these shares are "
        f"{in_every_cell(results, 'refined')} at 3 tokens, and {in_every_cell(results, 'refined', 40)} at 40."
    )


def in_every_cell(results: Results, direction: str, distance: int = 3) -> str:
    """Return the shares of targets that writes in all cells, so many tokens before, make the next token.

    The targets have native rank 101 to 1,000: at 40 tokens no others are tried."""
    shares = [f"{row.next_token:.0%}" for row in trials_in_every_cell(results, direction, distance)]
    return shares[0] if len(set(shares)) == 1 else listed(shares)


def counts_in_every_cell(results: Results) -> str:
    """Return the numbers of these trials on the hosts."""
    return listed(f"{row.n:.0f}" for row in trials_in_every_cell(results, "layerwise", 40))


def trials_in_every_cell(results: Results, direction: str, distance: int) -> list[pd.Series]:
    """Return each host's row of these trials."""
    where = dict(cells="all", direction=direction, magnitude=1, writes=3, target_class="middle")
    return of_hosts(results, "install_cells_summary", distance=f"{distance}", **where)


def ablations(results: Results) -> str:
    where = dict(host=MAIN, place="middle", quantity="fvu_ratio", target="state")
    flat, rank2 = (results.row("ablation_contrasts", variant=x, **where) for x in ("dense+flat", "bilinear+rank2"))
    rules = results.rows("ablation_contrasts", **where)
    apart = (rules[rules.variant.str.endswith(("batch_topk", "jumprelu", "gated"))].value - 1).abs().max()
    start = results.row("ablation_starts", host=MAIN, target="write")
    return (
        f"On states of the middle cell, a flat SAE has {flat.value:.2f} and rank 2 has {rank2.value:.2f} of the "
        f"rank-1 SAE's error, and other sparsity rules are within {apart:.1%} of TopK. Write-trained atoms of "
        f"the headline's SAEs beat deletion at {start.win_random:.0%} of places if they start at random, and at "
        f"{start.win_data:.0%} if at writes."
    )


def ends_of_ladder(results: Results) -> tuple[pd.Series, pd.Series]:
    """Return the rows of the smallest and of the largest SAE over the headline's cells."""
    rows = results.rows("ablation_ladder_headline", cells="pooled")
    return rows.iloc[0], rows.iloc[-1]


def errors_of_ladder(results: Results) -> str:
    """Return how the held-out FVU falls from the smallest to the largest SAE of `ends_of_ladder`."""
    small, large = ends_of_ladder(results)
    return listed(f"from {small[f'fvu_{x}']:.2f} to {large[f'fvu_{x}']:.2f} ({x}s)" for x in ("state", "write"))


def ladder_ahead(results: Results, amplitude: str = "") -> str:
    """Return how far writes are ahead, from the least to the most of all sizes of ablation_ladder.

    amplitude: "_projection" for atoms scaled to fit the write, else at their own coefficient."""
    apart = 100 * results.rows("ablation_ladder")[f"difference{amplitude}"]
    return f"{apart.min():.0f} to {apart.max():.0f} points"


def every_cell(results: Results) -> str:
    rows = of_hosts(results, "every_cell", amplitude="coefficient")
    rhos, scaled = (
        listed(f"{with_memory(results, host, amplitude).rho_half_life_median:.2f}" for host in HOSTS)
        for amplitude in ("coefficient", "projection")
    )
    ahead = estimate(results.row("every_cell_hosts", host="mean"), "difference")
    return (
        f"At its own coefficient, the write-trained atom is ahead in {cells_ahead(rows)} cells of the three "
        f"hosts. The state-trained atom's win rate and the cell's half-life have a rank correlation of {rhos} "
        f"({scaled} with atoms scaled to fit the write). On {len(more_hosts(results))} Gated DeltaNet models "
        f"from different seeds writes are ahead by {ahead} points in the mean over cells. In the headline (no "
        f"mean), atoms of states win at {rates_of_models(results, 'state')} on these models, and atoms of "
        f"writes at {rates_of_models(results, 'write')}, {headline_over_hosts(results)} points apart in the "
        "mean."
    )


def with_memory(results: Results, host: str = MAIN, amplitude: str = "coefficient") -> pd.Series:
    """Return the rank correlations of the state-trained atom's win rate with properties of the cell."""
    return results.row("every_cell_trend", host=host, target="state", amplitude=amplitude)


def more_hosts(results: Results) -> pd.DataFrame:
    """Return the hosts of every_cell_hosts, without the row of their mean."""
    return results.rows("every_cell_hosts").query("host != 'mean'")


def rates_of_models(results: Results, target: str) -> str:
    """Return the win rates in the headline (no mean) on each of the same hosts."""
    rows = results.rows("every_cell_headline", centre="none").query("host != 'mean'")
    return listed(f"{rate:.0%}" for rate in rows[target])


def headline_over_hosts(results: Results, centre: str = "none") -> str:
    """Return how many points writes are ahead in the headline, in the mean over the same hosts."""
    return estimate(results.row("every_cell_headline", host="mean", centre=centre), "difference")


def cells_ahead(rows: Iterable[pd.Series]) -> str:
    """Return in how many cells of each host the write-trained atom wins more often, from rows of every_cell."""
    return listed(f"{row.write_ahead:.0f} of {row.n_cells:.0f}" for row in rows)


def multiverse(results: Results) -> str:
    states, writes = (results.rows("multiverse", control="delete", target=target) for target in ("state", "write"))
    ahead, behind = ([surely(table, side) for table in (states, writes)] for side in ("ahead", "behind"))
    target = listed(f"{results.rows('multiverse_effects', host=h, choice='target').share.iloc[0]:.0%}" for h in HOSTS)
    return (
        f"Where the control is deletion, the state-trained atom is surely ahead in {ahead[0]} of {len(states)} "
        f"combinations of open choices and surely behind in {behind[0]}, the write-trained one in {ahead[1]} "
        f"and {behind[1]} of {len(writes)}, over the three hosts. Over all {len(results.rows('multiverse')):,} "
        f"combinations, the target of the SAE explains {target} of the variance."
    )


def surely(universes: pd.DataFrame, side: str) -> int:
    """Return the number of universes in which the atom is surely ahead or behind.

    Both intervals of its win rate, by atom and by passage, are then above or below one half."""
    low, high = (universes[[f"boot_{end}", f"passage_{end}"]] for end in ("low", "high"))
    return int((low.min(axis=1) > 0.5 if side == "ahead" else high.max(axis=1) < 0.5).sum())


def scorecard(results: Results) -> str:
    kept = results.rows("scorecard", counts=True)
    verdicts = listed(f"{(kept.status == name).sum()} {name}" for name in VERDICTS)
    repeated = results.rows("repeats_verdicts")
    return (
        f"{len(kept)} verdicts count, over three hosts: {verdicts}. Of {len(repeated)} that were repeated in up "
        f"to {repeated.runs.max() - 1} more runs, {repeated.turned.sum()} change in at least one."
    )


def attribution(results: Results) -> str:
    error = results.rows("attribution_summary").error
    erased = results.row("attribution_fates", host=MAIN).all_erased
    return (
        "The exact attention map of a recurrent head gives the head's output with an error below "
        f"{np.ceil(1e6 * error.max()):.0f} millionths of the largest read, in all {len(error)} cells. A map "
        f"from decays alone has an error of {decay_errors(results)} times the size of the read, in the median "
        "cell of the Gated DeltaNet and of RWKV-7. In the middle cell of the former, erasures take "
        f"{erased:.0%} of what the decay leaves of a write."
    )


def decay_errors(results: Results) -> str:
    """Return the error of a map from decays alone on the two hosts that erase."""
    return listed(f"{results.row('attribution_trend', host=host).decay_error:.2f}" for host in (MAIN, "rwkv7"))


def recall(results: Results) -> str:
    rows = largest_recall(results)
    kept = listed(percent(row, "kept_atom") for row in rows)
    side, smaller = rows[0].side, results.rows("recall_summary", target="state").side.iloc[0]
    states, writes = (
        listed(
            f"{row.kept_atom:.0%}" for row in results.rows("recall_summary", target=x, k=4, side=smaller).itertuples()
        )
        for x in ("state", "write")
    )
    return (
        f"Where one association is one write, the atom of an SAE of writes with one active atom keeps {kept} of "
        f"the right answers if states are {side} x {side} (Gated DeltaNet, Mamba-2, RWKV-7). At {smaller} x "
        f"{smaller}, with four active atoms, atoms of SAEs of states keep {states}, and of writes {writes}."
    )


def largest_recall(results: Results) -> list[pd.Series]:
    """Return the rows of recall_summary for the largest side, per family: SAEs of writes, k = 1, no mean."""
    rows = results.rows("recall_summary", target="write", centre="none", k=1, n_atoms=256)
    rows = rows[(rows.side == rows.side.max()) & (rows.pairs == rows.side // 4)].set_index("family")
    return [rows.loc[host] for host in HOSTS]


def residual_features(results: Results) -> str:
    where = dict(cells="middle", object="write")
    through, first = (
        estimate(results.row("residual_features_summary", predictor=x, **where), "r2", digits=3, scale=1)
        for x in ("through_layer", "exact")
    )
    return (
        "If one write of the middle cell is removed, the features of a residual-stream SAE change. The form "
        f"through the layer predicts these changes with an R2 of {through}, the first-order form with {first}."
    )


def recurrence(results: Results) -> str:
    def values(dictionary: str) -> tuple[str, str]:
        row = results.row("recurrence_summary", host=MAIN, dictionary=dictionary, target="write", centre="none")
        return percent(row, "recurs"), f"{row.auc_all:.2f}"

    (atoms, auc), (centroids, _), (_, of_raw) = (values(name) for name in ("sae", "kmeans", "raw"))
    return (
        f"On the main host {atoms} of the atoms of an SAE of writes come back in another training, of the "
        f"k-means centroids {centroids}; and of SAEs of states with the mean subtracted, as in the paper, "
        f"{listed(atoms_again(results, x) for x in HOSTS)} on the three hosts. The text says where an atom "
        f"fires with an AUC of {auc}, and where a raw write is nearest with {of_raw}."
    )


MAIN_SAES = dict(host=MAIN, dictionary="sae", target="state", centre="mean")  # rows of recurrence_summary


def atoms_again(results: Results, host: str = MAIN) -> str:
    """Return the share of atoms of the main SAEs of states (with the mean) that come back in a retraining."""
    row = results.row("recurrence_summary", **MAIN_SAES | dict(host=host))
    return percent(row[["recurs", "recurs_low", "recurs_high"]].clip(0, 1), "recurs", digits=1)


def verdict_on_main_saes(results: Results) -> str:
    """Return the verdict on claim A5 for the SAEs of `atoms_again`; the scorecard has smaller SAEs."""
    row = results.row("recurrence_summary", **MAIN_SAES)
    error = (row.recurs_high - row.recurs) / stats.t.ppf(0.975, row.trainings - 1)
    return read_criteria().borders("A5").verdict(Estimate(row.recurs, error, row.trainings - 1, row.n))


def your_own_model(results: Results) -> str:
    table = results.rows("own_model").set_index("question")
    atom, random = table.loc["atom beats deletion"], table.loc["random beats deletion"]
    return (
        f"On one cell and {atom.n:.0f} firings, the atom beats deletion at "
        f"{percent(atom, 'value', 'ci_low', 'ci_high')} and a random atom at "
        f"{percent(random, 'value', 'ci_low', 'ci_high')} of the firings, at the norm of the native write."
    )
