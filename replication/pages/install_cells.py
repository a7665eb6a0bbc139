"""Notebook 12: installs by writes in one cell, in its layer, in all cells; their cost; how little is enough.

The protocol is that of `install` (the paper's App. I.6), with these differences. Directions are those of
`steering`; `refined`: where the target does not come next, Adam from there. WIDE conditions have all
distances. The others, and the targets out of context, have the smallest distance, where the writes are at the
last tokens; costs are measured there for targets of the class MIDDLE, and NARROW conditions have only these
targets. Delays are further distances, also for the class MIDDLE. Intervals of shares are
those of `share_of_trials`; those of means are a bootstrap over prompts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from replication import layout
from replication.statistics import Interval, cluster_bootstrap, per_group, share_of_trials, spearman, with_ends
from replication.study.firings import passage_prompts
from replication.study.study import Study
from writesae.edit import Edits, generate_under
from writesae.evaluate import steering
from writesae.evaluate.install import (
    Setting,
    draw_out_of_context,
    draw_targets,
    kl_elsewhere,
    log_p,
    native_continuations,
    native_losses,
    ranks,
    refined,
    setting,
)
from writesae.evaluate.steering import Cell, Goal, directions, end_logits
from writesae.hosts.base import Host
from writesae.recurrence import torch_defaults

MIDDLE = "middle"  # the class of native ranks that the paper installs
OUT_OF_CONTEXT = ("frequent", "rare", "semantic")  # the paper's other classes
SHARES = ("next_token", "included_edited", "included_native", "enough")
WHERE = dict(one="one cell", layer="one layer", all="all cells")
KEYS = ["host", "cells", "direction", "magnitude", "writes"]


class Condition(NamedTuple):
    """Writes in "one" cell, its "layer", "all" cells, or the "4" of largest gains; said: of all targets."""

    cells: str
    direction: str
    magnitude: float = 1.0
    refine: bool = False
    single: bool = False  # one write, not all
    said: bool = True  # else, of the targets whose costs are measured


WIDE = (Condition("all", "gamma"), Condition("all", "layerwise", refine=True))
NARROW = (
    Condition("one", "paper", 3.0),
    Condition("one", "gamma"),
    Condition("one", "gamma", 3.0, refine=True),
    Condition("layer", "gamma", refine=True),
    Condition("all", "paper"),
    Condition("all", "random"),
    Condition("all", "layerwise", refine=True, single=True),
)


def _frontier(settings) -> list[Condition]:
    """Return all cells at other sizes than 1, and fewer cells at all sizes."""
    others = [("all", name, size) for size in settings.sizes if size != 1 for name in ("layerwise", "random")]
    fewer = [(str(count), "layerwise", size) for count in settings.counts for size in settings.sizes]
    return [Condition(*x, refine=x[1] == "layerwise", said=False) for x in others + fewer]


# Trials


def run(study: Study) -> pd.DataFrame:
    """Write results install_cells.csv: one row per trial and condition.

    total_size: the root of the sum of squares of all writes, over that of the native writes of all cells.
    included_edited: among the new tokens. Where costs are measured also: times the target is said, and the
    loss of the continuation in the unedited model minus that of the unedited continuation (extra_loss, nats
    per token)."""
    return _gathered(study, "install_cells", lambda _, cells: cells.distances + cells.delays, _trials)


def _gathered(study: Study, table: str, groups: Callable, compute: Callable) -> pd.DataFrame:
    parts = []
    for name in study.profile.hosts:
        host, profile = study.host(name), study.profile
        install, cells = (profile.section(section, name) for section in ("install", "install_cells"))
        given = dict(host=host, prompts=passage_prompts(study, name, cells.prompts, cells.prompt_tokens))
        given |= dict(cell=study.cell(name, install.place), install=install, settings=cells)
        given |= dict(classes=text_classes(host, study.windows(name, "sae").tokens))
        given |= dict(write=profile.saes.write, seed=profile.seed)
        parts.append(study.stage(table, name, groups(host, cells), compute, **given))
    return study.gather(table, parts)


def text_classes(host: Host, tokens: Tensor) -> dict[str, Tensor]:
    """Return the tokens of OUT_OF_CONTEXT, bool [V]: the 5% most frequent, the rarest quarter, and whole
    words."""
    counts = torch.bincount(tokens.flatten(), minlength=host.vocabulary)
    seen = counts > 0
    often, rarely = np.quantile(counts[seen].numpy(), [0.95, 0.25])
    texts = [host.tokenizer.decode([token]) if seen[token] else "" for token in range(host.vocabulary)]
    word = torch.tensor([re.fullmatch(r" [a-z]{5,}", text) is not None for text in texts])
    return dict(zip(OUT_OF_CONTEXT, (counts >= often, seen & (counts <= rarely), word), strict=True))


class Native(NamedTuple):
    """Of unedited prompts: logits [prompts, V], continuations [prompts, new tokens], losses [prompts]."""

    logits: Tensor
    texts: Tensor
    losses: Tensor


@torch_defaults()
def _setting(distance: int, host, prompts, classes, install, settings, write, seed) -> tuple[Setting, Tensor]:
    """Return the trials at a distance, and the prompts' native logits. Without classes: of MIDDLE only."""
    run = host.run(prompts.tokens)
    logits = host.logits(run.final[:, -1])
    wanted = install.rank_classes if classes else {MIDDLE: install.rank_classes[MIDDLE]}
    drawn = [draw_targets(logits, wanted, install.targets_per_class, seed)]
    if classes:
        drawn += [draw_out_of_context(logits, run.tokens, classes, settings.beyond, settings.out_of_context, seed)]
    targets, labels = zip(*drawn, strict=True)
    targets, labels = torch.cat(targets, 1), np.concatenate(labels)
    return setting(host, run, targets, labels, distance, writes=install.writes, write=write), logits


def _part(trial: Setting, rows: np.ndarray) -> Setting:
    """Return some trials. rows: their numbers, or bool."""
    which = torch.from_numpy(rows)
    return Setting(trial.goal.part(which), trial.native_rank[which], trial.label[rows])


def _trials(distance: int, host, prompts, cell, classes, install, settings, write, seed) -> pd.DataFrame:
    trial, logits = _setting(distance, host, prompts, classes, install, settings, write, seed)
    texts = native_continuations(host, trial.goal.run, install.new_tokens)
    native = Native(logits, texts, native_losses(host, trial.goal.run, torch.arange(len(texts)), texts).mean(1))
    middle, ranked = trial.label == MIDDLE, ~np.isin(trial.label, OUT_OF_CONTEXT)
    if distance == min(settings.distances):
        cells = _cells(host, cell, _part(trial, ranked).goal, settings)
        plan = [(WIDE, np.full_like(middle, True)), (NARROW, middle), (_frontier(settings), ranked)]
    else:
        cells, plan = dict(all=host.cells), [(WIDE, middle if distance in settings.delays else ranked)]
    frames = []
    for condition, which in [(condition, which) for conditions, which in plan for condition in conditions]:
        for rows in torch.from_numpy(np.flatnonzero(which)).split(settings.batch_rows):
            costs = torch.from_numpy(middle)[rows] & (distance == min(settings.distances)) & (condition.cells in WHERE)
            given = condition, cells[condition.cells], costs, native, settings.refinement
            frames.append(_measure(host, _part(trial, rows.numpy()), *given))
    return pd.concat(frames, ignore_index=True).assign(
        host=host.name, distance=distance, delayed=distance in settings.delays
    )


def _cells(host: Host, cell: Cell, goal: Goal, settings) -> dict[str, list[Cell]]:
    """Return the cells of each condition; the best have the largest gain to first order over all trials."""
    gain = _gains_of(host, goal)
    best = sorted(host.cells, key=gain.get, reverse=True)
    fewer = {str(count): best[:count] for count in settings.counts}
    return dict(one=[cell], layer=[x for x in host.cells if x[0] == cell[0]], all=host.cells) | fewer


def _gains_of(host: Host, goal: Goal) -> dict[Cell, float]:
    """Return the mean gain of the logit by each cell's best native-sized writes, to first order."""
    pairs = steering.gamma_pairs(host, goal, host.cells)
    return {cell: float((pairs[cell][2] * goal.sizes(host, cell)).sum(1).mean()) for cell in host.cells}


def _measure(host, trial: Setting, condition, cells, costs, native: Native, steps) -> pd.DataFrame:
    """Return the rows of one condition, and of its refinement."""
    goal = replace(trial.goal, writes=1) if condition.single else trial.goal
    edits = directions(host, goal, cells, condition.direction, condition.magnitude)
    with torch.no_grad():
        outcomes = {condition.direction: (edits, end_logits(host, goal, edits))}
    if condition.refine:
        outcomes["refined"] = refined(host, goal, *outcomes[condition.direction], steps)
    before, tables = native.logits[goal.rows], []
    squares = sum(goal.sizes(host, cell).square().sum(1) for cell in host.cells)
    size = condition.magnitude * (sum(goal.sizes(host, cell).square().sum(1) for cell in cells) / squares).sqrt()
    for name, (edits, edited) in outcomes.items():
        columns = dict(cells=condition.cells, magnitude=condition.magnitude, writes=goal.writes, total_size=size)
        columns |= dict(native_rank=trial.native_rank, edited_rank=ranks(edited, goal.tokens))
        columns |= dict(kl_elsewhere=kl_elsewhere(before, edited, goal.tokens))
        columns["first_step_lift"] = log_p(edited, goal.tokens) - log_p(before, goal.tokens)
        columns |= _continued(host, goal, edits, edited, costs, costs | condition.said, native)
        tables.append(trial.table(name, **columns).drop(columns="position"))
    return pd.concat(tables)


@torch_defaults()
def _continued(host: Host, goal: Goal, edits: Edits, edited: Tensor, costs: Tensor, wanted: Tensor, native) -> dict:
    """Return what wanted continuations say; those that begin with the target are generated only for costs."""
    target, before = goal.tokens[:, None], native.texts[goal.rows]
    tokens = target.expand_as(before).clone()
    rows = torch.nonzero(costs | wanted & (edited.argmax(-1) != goal.tokens))[:, 0]
    if len(rows):
        tokens[rows], _ = generate_under(host, goal.run, steering.part(edits, rows), tokens.shape[1])
    included_native, included, times, extra = torch.full((4, len(target)), torch.nan)
    included_native[wanted], included[wanted] = ((x == target).any(1)[wanted].float() for x in (before, tokens))
    if costs.any():
        times[costs], read = (tokens == target).sum(1)[costs].float(), goal.rows[costs]
        extra[costs] = native_losses(host, goal.run, read, tokens[costs]).mean(1) - native.losses[read]
    columns = dict(included_native=included_native, included_edited=included)
    return columns | dict(times_said=times, extra_loss=extra)


# Summaries


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per (host, cells, direction, magnitude, writes, target class or all, distance or all).

    Of n trials: next_token, and the mean lift and KL elsewhere (nats); of n_said: included_edited; of
    n_costs: the mean number of times that the target is said, and extra_loss. Class all: those by rank.
    Distance all: those that are no delays, for conditions that have several distances."""
    table = table.assign(next_token=table.edited_rank == 1)
    measured = dict(n=["next_token", "first_step_lift", "kl_elsewhere"], n_said=["included_edited", "included_native"])
    measured |= dict(n_costs=["times_said", "extra_loss"])

    def row(part: pd.DataFrame) -> dict:
        numbers = dict(total_size=part.total_size.median())
        for count, names in measured.items():
            rows = part.dropna(subset=names)
            numbers[count] = len(rows)
            if len(rows):
                low, high = cluster_bootstrap(rows[names].to_numpy(float), rows.prompt, resamples=1000)
                for name, *ends in zip(names, low, high, strict=True):
                    interval = share_of_trials(rows[name], rows) if name in SHARES else Interval(*ends)
                    numbers |= with_ends(name, rows[name].mean(), interval)
        return numbers

    several = table.groupby(KEYS).distance.transform("nunique") > 1
    pooled = table[several & ~table.delayed].assign(distance="all")
    every = pd.concat([pooled, table.astype(dict(distance=str))])
    of_ranks = every[~every.target_class.isin(OUT_OF_CONTEXT)].assign(target_class="all")
    return per_group(pd.concat([of_ranks, every]), [*KEYS, "target_class", "distance"], row)


def frontier(summary: pd.DataFrame, nearest: int, counts: dict[str, int]) -> pd.DataFrame:
    """Return the frontier's rows with n_cells. nearest: the smallest distance; counts: of cells by host."""
    part = summary[(summary.distance == str(nearest)) & (summary.writes == summary.writes.max())]
    part = part[(part.direction == "refined") & (part.cells.str.isdigit() | (part.cells == "all"))]
    part = part[~part.target_class.isin(OUT_OF_CONTEXT)]
    n_cells = part.cells.mask(part.cells == "all", part.host.map(counts)).astype(int)
    return part.assign(n_cells=n_cells).sort_values(["n_cells", "magnitude"])


def least(frontier: pd.DataFrame, wanted: float = 0.95) -> pd.DataFrame:
    """Return, per host and class, what installs a share of the targets: smallest total size, fewest cells.

    next_token, n_cells and magnitude are those of the smallest total size; fewest_cells: at any size. Where
    nothing on the grid is enough, these are those of the largest share, and fewest_cells is missing."""

    def row(part: pd.DataFrame) -> dict:
        enough = part[part.next_token >= wanted]
        best = part.loc[part.next_token.idxmax() if enough.empty else enough.total_size.idxmin()]
        columns = ["next_token", "next_token_low", "next_token_high", "total_size", "n_cells", "magnitude"]
        return dict(best[["n", *columns]]) | dict(fewest_cells=enough.n_cells.min())

    return per_group(frontier, ["host", "target_class"], row)


def named(summary: pd.DataFrame, nearest: int, target_class: str = MIDDLE) -> pd.DataFrame:
    """Return the conditions at the smallest distance, with their names: where, direction, how large."""
    part = summary[(summary.distance == str(nearest)) & (summary.target_class == target_class)]
    part = part[part.cells.isin(WHERE)].copy()
    single = part.writes.lt(part.writes.max()).map({True: ", one write", False: ""})
    sizes = [f", {x:g}x" for x in part.magnitude]
    return part.assign(condition=part.cells.map(WHERE) + ", " + part.direction + sizes + single)


def shown(part: pd.DataFrame, *by: str, names: Mapping[str, str]) -> pd.DataFrame:
    """Return columns of the summary with intervals for a notebook. names: headings; by: keys of rows."""
    columns = {"n": part.n}
    for name, heading in names.items():
        columns[heading] = layout.estimates(part, name) if name in SHARES else layout.plain(part, name)
    return layout.shown(part, ["host", *by], columns)


RATES = dict(next_token="next token (%)", included_edited="among the new tokens (%)")
COSTS = dict(kl_elsewhere="KL of the other tokens (nats)", times_said="times said")
COSTS |= dict(extra_loss="extra loss of the text (nats per token)")


def shown_least(least: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `least` for a reader."""
    columns = {"n": least.n, "total size": layout.numbers(least.total_size, ".3f"), "cells": least.n_cells}
    columns |= {"size of each": layout.numbers(least.magnitude)}
    columns |= {"next token (%)": layout.estimates(least, "next_token")}
    columns |= {"fewest cells, any size": layout.numbers(least.fewest_cells, ".0f")}
    return layout.shown(least, ["host", "target_class"], columns)


def shown_kept(memory: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `summarise_kept` for a reader."""
    columns = {"cells": memory.n_cells, "kept (%)": layout.numbers(memory.kept, ".0f", 100)}
    columns |= {"from memory (%)": layout.numbers(memory.from_memory, ".0f", 100)}
    columns |= {"cells with memory (%)": layout.numbers(memory.cells_with_memory, ".0f", 100)}
    columns |= {"rho": layout.plain(memory, "rho")}
    return layout.shown(memory, ["host", "distance"], columns)


# Delays, against half-lives


def gains(study: Study) -> pd.DataFrame:
    """Write results install_gains.csv: the gain of each cell's best writes to first order, by distance.

    gain: mean over n targets of the class MIDDLE, nats of logit; native-sized writes."""
    return _gathered(study, "install_gains", lambda _, cells: [min(cells.distances), *cells.delays], _gains)


def _gains(distance: int, host, prompts, cell, classes, install, settings, write, seed) -> pd.DataFrame:
    trial, _ = _setting(distance, host, prompts, {}, install, settings, write, seed)
    rows = [(*cell, gain) for cell, gain in _gains_of(host, trial.goal).items()]
    table = pd.DataFrame(rows, columns=["layer", "head", "gain"])
    return table.assign(host=host.name, distance=distance, n=len(trial.goal.rows))


def kept_gains(gains: pd.DataFrame, memory: pd.DataFrame) -> pd.DataFrame:
    """Add to the gains half_life, and kept: each gain over that of its cell at the smallest distance.

    memory: all_cells.csv."""
    cell = ["host", "layer", "head"]
    nearest = gains[gains.distance == gains.distance.min()].set_index(cell).gain.rename("nearest")
    table = gains.merge(memory[[*cell, "half_life_median"]], on=cell).join(nearest, on=cell)
    return table.rename(columns=dict(half_life_median="half_life")).assign(kept=table.gain / table.nearest)


def summarise_kept(kept: pd.DataFrame) -> pd.DataFrame:
    """Return, per (host, delay), the total gain kept, and rho, Spearman's of `kept` and half-life over cells.

    from_memory: the share of the total of cells whose half-life is at least the delay."""

    def row(part: pd.DataFrame) -> dict:
        remembers, rho = part.half_life >= part.distance, spearman(part.kept, part.half_life)
        numbers = dict(n_cells=len(part), kept=part.gain.sum() / part.nearest.sum())
        numbers |= dict(from_memory=part.gain[remembers].sum() / part.gain.sum(), cells_with_memory=remembers.mean())
        return numbers | with_ends("rho", rho.value, rho)

    return per_group(kept[kept.distance > kept.distance.min()], ["host", "distance"], row)


# Why one cell cannot


def ceilings(study: Study) -> pd.DataFrame:
    """Write results install_ceiling.csv: one row per trial and cell.

    ceiling: the largest gain of the target's logit by any writes of any size in the cell, with the path above
    the layer's mixer linearised. gain: the largest that was measured, over ceiling_sizes along gamma, and
    refined from the second. needed: the distance of the target's logit from the top one."""
    return _gathered(study, "install_ceiling", lambda host, _: host.recurrent_layers, _ceiling)


def _ceiling(layer: int, host, prompts, cell, classes, install, settings, write, seed) -> pd.DataFrame:
    trial, logits = _setting(install.writes, host, prompts, {}, install, settings, write, seed)
    goal, cells = trial.goal, [cell for cell in host.cells if cell[0] == layer]
    count, native = len(goal.rows), logits[goal.rows]
    bound, own = steering.ceilings(host, goal, cells), native.gather(-1, goal.tokens[:, None])[:, 0]
    # One row per cell and trial; in each row all cells but one have writes of zero
    trials, which = torch.arange(count).repeat(len(cells)), torch.arange(len(cells)).repeat_interleave(count)
    apart, edits = goal.part(trials), steering.part(directions(host, goal, cells, "gamma"), trials)
    for number, c in enumerate(cells):
        edits[c] = replace(edits[c], right=edits[c].right * (which == number)[:, None, None])
    tried = [steering.scaled(edits, torch.full((len(which),), float(size))) for size in settings.ceiling_sizes]
    tried += [steering.refine(host, apart, x, settings.refinement) for x in tried[1:2]]
    with torch.no_grad():
        gains = [end_logits(host, apart, x).gather(-1, apart.tokens[:, None])[:, 0] for x in tried]
    columns = dict(layer=layer, head=[head for _, head in cells for _ in range(count)], prompt=apart.rows)
    columns |= dict(target=apart.tokens, gain=torch.stack(gains).max(0).values - own[trials])
    columns |= dict(ceiling=torch.cat([bound[c] for c in cells]), needed=(native.max(-1).values - own)[trials])
    return pd.DataFrame(columns).assign(host=host.name)


def summarise_ceilings(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per host: means over trials of what is needed, and of the best cell's gain and ceiling.

    Also over cells, exceeded: the share whose gain exceeds the ceiling; enough: the trials with a cell whose
    gain is as large as what is needed."""

    def row(part: pd.DataFrame) -> dict:
        best = part.groupby(["prompt", "target"], as_index=False).agg(dict(gain="max", ceiling="max", needed="first"))
        best["enough"] = best.gain >= best.needed
        names = ["needed", "ceiling", "gain", "enough"]
        numbers = dict(n=len(best), n_cells=len(part) // len(best), exceeded=(part.gain > part.ceiling).mean())
        for name, *ends in zip(names, *cluster_bootstrap(best[names].to_numpy(float), best.prompt), strict=True):
            interval = share_of_trials(best.enough, best) if name == "enough" else Interval(*ends)
            numbers |= with_ends(name, best[name].mean(), interval)
        return numbers

    return per_group(table, ["host"], row)
