"""Every register firing of a passage at once (the paper's Sec. 3.2, Fig. 2b)."""

from __future__ import annotations

import math

import pandas as pd
import torch
import torch.nn.functional as F

from replication.pages.cache_edits.site import Site, interval, places, unit
from replication.statistics import paired_wilcoxon, wilson
from writesae.edit import Edit
from writesae.sae.model import SAE

ERASURES = ("delete", "atom", "random", "beside")


def erasure_edits(site: Site, firings: pd.DataFrame, sae: SAE, first: int, seed: int) -> dict[str, Edit]:
    """{condition: an edit with a row a window}, all firings of the window at once; all rows start at position `first`.

    delete: the native write out; atom: the firing's atom in its place, in its norm; random: a random rank-1 matrix in its
    place, in its norm; beside: that matrix added while the native write stays. firings: with their row, from `first` on.
    """
    (rows, position), generator = places(firings), torch.Generator().manual_seed(seed)
    key, value, norm = site.native(rows, position)
    atom = [x[torch.tensor(firings.atom.to_numpy())].to(key) for x in sae.atoms()]
    random = [unit(len(rows), x.shape[-1], generator=generator).to(key) for x in (key, value)]
    out, atom, random = (key, -value), *((x, norm[:, None] * y) for x, y in (atom, random))
    windows, which = rows.unique(return_inverse=True)
    slot = torch.tensor(firings.groupby("row").cumcount().to_numpy()) + 1
    grid = torch.full((len(windows), int(slot.max()) + 1), -1)  # -1 is a term of nothing at `first`, as all of slot 0
    grid[which, slot] = torch.arange(len(rows))
    spread, reads = torch.cat([position, torch.tensor([first])])[grid], torch.ones(len(windows), dtype=torch.bool)
    edits = {}
    for name, terms in zip(ERASURES, ([out], [out, atom], [out, random], [random]), strict=True):
        sides = ([torch.cat([x, 0 * x[:1]])[grid] for x in side] for side in zip(*terms, strict=True))
        left, right = (torch.cat(side, 1) for side in sides)
        edits[name] = Edit(windows, spread.repeat(1, len(terms)), left, right, reads)
    return edits


@torch.no_grad()
def erase_registers(site: Site, firings: pd.DataFrame, sae: SAE, first: int, seed: int) -> pd.DataFrame:
    """A line a (window, condition): the rise of the loss in bits per token over all tokens that are predicted from position
    `first` on. firings: all register firings of some windows, from `first` on, with their row."""
    told = firings.groupby("row", as_index=False).agg(
        window=("window", "first"), passage=("passage", "first"), erased=("position", "size")
    )
    rows, tokens = torch.tensor(told.row.to_numpy()), site.run.tokens

    def bits(hidden: torch.Tensor) -> torch.Tensor:
        logits = site.host.logits(hidden[:, :-1]).mT
        return F.cross_entropy(logits, tokens[rows, first + 1 :], reduction="none").mean(1) / math.log(2)

    native, tables = bits(site.run.final[rows, first:]), []
    for name, edit in erasure_edits(site, firings, sae, first, seed).items():
        rise = bits(site.edited(edit, tokens.shape[1] - first)) - native
        tables.append(told.assign(condition=name, bits_native=native.numpy(), rise=rise.numpy()))
    return pd.concat(tables, ignore_index=True).drop(columns="row")


def summarise_registers(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """A line a (host, target, condition): mean rise in bits per token and its excess over deletion, with bootstrap
    intervals over passages, and in how many passages it exceeds deletion (Wilson)."""
    rows = []
    for (host, target), group in table.groupby(["host", "target"], sort=False):
        delete = group[group.condition == "delete"].set_index("passage").rise
        for name in ERASURES:
            part = group[group.condition == name].set_index("passage").loc[delete.index]
            more = int((part.rise > delete).sum())
            row = dict(host=host, target=target, condition=name, n=len(part), erased_a_passage=part.erased.mean())
            for label, found in (("rise", part.rise), ("excess", part.rise - delete)):
                low, high = interval(found, part.index, seed=seed)
                row |= {label: found.mean(), f"{label}_low": low, f"{label}_high": high}
            row["above_delete"], (row["above_low"], row["above_high"]) = more, wilson(more, len(part))
            rows.append(row | dict(wilcoxon_p=paired_wilcoxon(part.rise, delete).p))
    return pd.DataFrame(rows)
