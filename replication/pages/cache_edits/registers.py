"""Every register firing of a passage at once (the paper's Sec. 3.2, Fig. 2b)."""

from __future__ import annotations

import math

import pandas as pd
import torch
import torch.nn.functional as F

from replication.pages.cache_edits.site import Site, interval, unit
from replication.statistics import paired_wilcoxon, wilson, with_ends
from writesae.edit import Edit
from writesae.sae.model import SAE

ERASURES = ("delete", "atom", "random", "beside")


def erasure_edits(site: Site, firings: pd.DataFrame, sae: SAE, first: int, seed: int) -> dict[str, Edit]:
    """Return {condition: an edit of all firings of each window at once}, from position `first` on.

    delete: the native write is removed; atom: replaced by the firing's atom at its norm; random: replaced by
    a random rank-1 matrix at its norm; beside: that matrix is added and the native write stays."""
    places, generator = site.places(firings), torch.Generator().manual_seed(seed)
    rows, position = places.row, places.position
    key, value, norm = site.native(rows, position)
    atom = [x[places.atom].to(key) for x in sae.atoms()]
    random = [unit(len(rows), x.shape[-1], generator=generator).to(key) for x in (key, value)]
    out, atom, random = (key, -value), *((x, norm[:, None] * y) for x, y in (atom, random))
    windows, which = rows.unique(return_inverse=True)
    slot = torch.tensor(firings.groupby("window").cumcount().to_numpy()) + 1
    grid = torch.full((len(windows), int(slot.max()) + 1), -1)  # -1: a zero term at `first`, like slot 0
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
    """Return the increase of the loss in bits per token after `first`, per (window, condition).

    firings: all register firings of some windows, from position `first` on."""
    windows = firings.groupby("window", as_index=False).agg(passage=("passage", "first"), erased=("position", "size"))
    rows, tokens = site.places(firings).row.unique(), site.run.tokens

    def bits(hidden: torch.Tensor) -> torch.Tensor:
        logits = site.host.logits(hidden[:, :-1]).mT
        return F.cross_entropy(logits, tokens[rows, first + 1 :], reduction="none").mean(1) / math.log(2)

    native, tables = bits(site.run.final[rows, first:]), []
    for name, edit in erasure_edits(site, firings, sae, first, seed).items():
        rise = bits(site.edited(edit, tokens.shape[1] - first)) - native
        tables.append(windows.assign(condition=name, bits_native=native.numpy(), rise=rise.numpy()))
    return pd.concat(tables, ignore_index=True)


def summarise_registers(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return the mean increase and its excess over deletion in bits per token, per (host, target, condition).

    Bootstrap by passage. above_delete: the number of passages in which it exceeds deletion (Wilson)."""
    rows = []
    for (host, target), group in table.groupby(["host", "target"], sort=False):
        delete = group[group.condition == "delete"].set_index("passage").rise
        for name in ERASURES:
            part = group[group.condition == name].set_index("passage").loc[delete.index]
            more = int((part.rise > delete).sum())
            row = dict(host=host, target=target, condition=name, n=len(part), erased_a_passage=part.erased.mean())
            for label, values in (("rise", part.rise), ("excess", part.rise - delete)):
                row |= with_ends(label, values.mean(), interval(values, part.index, seed=seed))
            row["above_delete"], (row["above_low"], row["above_high"]) = more, wilson(more, len(part))
            rows.append(row | dict(wilcoxon_p=paired_wilcoxon(part.rise, delete)))
    return pd.DataFrame(rows)
