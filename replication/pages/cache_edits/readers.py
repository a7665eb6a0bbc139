"""Which later heads read an atom (the paper's App. E, I.2)."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import torch

from replication.pages.cache_edits.site import Site, interval, unit
from replication.statistics import Interval, per_group, with_ends
from writesae.edit import head_change, make_edit
from writesae.hosts.past import Record

ATOM = ["host", "atom", "class"]
READER = ["reader_layer", "reader_head"]


@torch.no_grad()
def later_heads(site: Site, rows, starts, change: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return {later layer: heads' outputs [n, steps, heads, d]} under a change [n, steps, d_v] of a cell."""
    host, outputs = copy.copy(site.host), {}

    def mix(layer: int, *rest) -> Record:
        record = site.host.mix(layer, *rest)
        outputs[layer] = record.outputs.cpu()
        return record

    host.mix = mix
    host.branch(site.run, site.layer, site.head, rows, starts, change)
    return outputs


@torch.no_grad()
def readers(site: Site, atom: tuple, firings: pd.DataFrame, steps: int, draws: int, seed: int) -> pd.DataFrame:
    """Return how much each later head's output changes over `steps` tokens, per (firing, layer, head).

    signal: with the atom (key [d_k], value [d_v]) added at the native write's norm; baseline: the root mean
    square over `draws` random rank-1 writes of that norm."""
    places, generator, n = site.places(firings), torch.Generator().manual_seed(seed), len(firings)
    left, right = (
        torch.cat([side.expand(n, 1, -1), unit(n, draws, len(side), generator=generator).to(side)], 1).flatten(0, 1)
        for side in atom
    )
    rows, position = (x.repeat_interleave(1 + draws) for x in (places.row, places.position))
    right = right * site.native(rows, position)[2][:, None]
    change, _ = head_change(site.factors, make_edit(rows, position, left[:, None], right[:, None]), steps)
    index, tables = (rows[:, None], position[:, None] + torch.arange(steps)), []
    for layer, outputs in later_heads(site, rows, position, change).items():
        moved = (outputs - site.run.records[layer].outputs[index].cpu()).double().square()
        moved = moved.sum((1, 3)).unflatten(0, (n, -1))
        signal, baseline = (x.sqrt().numpy() for x in (moved[:, 0], moved[:, 1:].mean(1)))  # [n, heads]
        for head in range(signal.shape[1]):
            columns = dict(reader_layer=layer, reader_head=head, signal=signal[:, head], baseline=baseline[:, head])
            tables.append(firings.assign(**columns))
    return pd.concat(tables, ignore_index=True)


def _with_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Add log_ratio, log(signal / baseline), and log_enrichment, its excess over all readers together."""
    squares = table[["signal", "baseline"]] ** 2
    together = squares.groupby([table[x] for x in ("host", "atom", "window", "position")]).transform("sum") ** 0.5
    ratio, whole = np.log(table.signal / table.baseline), np.log(together.signal / together.baseline)
    return table.assign(log_ratio=ratio, log_enrichment=ratio - whole)


def _medians(part: pd.DataFrame, seed: int) -> dict:
    row = dict(n=len(part))
    for name in ("ratio", "enrichment"):
        ends = interval(part[f"log_{name}"], part.passage, np.median, seed)
        row |= with_ends(name, np.exp(part[f"log_{name}"].median()), Interval(*np.exp(ends)))
    return row


def summarise_readers(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return ratio (signal / baseline) and enrichment per (host, atom, reader); bootstrap by passage."""
    return per_group(_with_ratios(table), ATOM + READER, lambda part: _medians(part, seed))


def top_readers(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return the reader with the highest ratio per (host, atom), as in Table 1.

    It is chosen in one half of the contexts and measured in the other, so that the choice does not bias the
    ratio. An atom with one context has none."""
    rows, measured = [], [f"{name}{end}" for name in ("ratio", "enrichment") for end in ("", "_low", "_high")]
    for values, part in _with_ratios(table).groupby(ATOM, sort=False):
        second = (part.groupby(READER).cumcount() % 2).astype(bool)
        chosen = part[~second].groupby(READER).log_ratio.median().idxmax()
        rest = part[second & (part[READER] == list(chosen)).all(axis=1)]
        if len(rest):
            rows.append(dict(zip(ATOM + READER, (*values, *chosen), strict=True)) | _medians(rest, seed))
    return pd.DataFrame(rows, columns=[*ATOM, *READER, "n", *measured])
