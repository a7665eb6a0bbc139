"""Harvest: the factors of chosen cells over many windows, in one pass of the model; never a state.

Per token and cell: key, value of the write, log decay. For d_k = d_v = 128 that is 257 numbers where the paper's
extraction keeps states of 16,384.
"""

from __future__ import annotations

import torch
from tqdm import tqdm

from writesae.history import History, Origin, VectorHistory
from writesae.hosts.base import Host
from writesae.recurrence import taken_by_erase

Cell = tuple[int, int]


@torch.no_grad()
def harvest(host: Host, tokens: torch.Tensor, cells: list[Cell], batch: int, progress: bool = True) -> dict[Cell, dict]:
    """Factors of the cells over tokens [N, T]: per cell key [N, T, d_k], added, effective [N, T, d_v], log_decay [N, T];
    where decays are vectors, key, log_decay, erase [N, T, d_k], added and taken [N, T, d_v] (VectorHistory).

    Only the layers up to the last cell are run. Raises ValueError for no cell or one that the host does not have, a batch
    below 1 and tokens that Host.run refuses, and, through History, where a value is not finite.
    """
    if not cells:
        raise ValueError(f"A harvest needs at least one cell: {host.name} has them in layers {host.recurrent_layers}.")
    if batch < 1:
        raise ValueError(f"A batch takes at least one window, not {batch}.")
    host.check_tokens(tokens)
    for layer, head in cells:
        host.check_cell(layer, head)
    upto = max(layer for layer, _ in cells) + 1
    parts: dict[Cell, list[dict]] = {cell: [] for cell in cells}
    for rows in tqdm(tokens.split(batch), desc="harvest", disable=not progress):
        run = host.run(rows, upto=upto)
        for cell in cells:
            f = host.cell_factors(run.records[cell[0]], cell[1])
            part = dict(key=f.key, added=f.added)
            if host.scalar_decay:
                part |= dict(effective=f.effective, log_decay=f.log_decay[..., 0])
            else:
                part |= dict(log_decay=f.log_decay, erase=f.erase, taken=taken_by_erase(f))
            parts[cell].append({name: x.float().cpu() for name, x in part.items()})
    return {
        cell: {name: torch.cat([part.pop(name) for part in found]) for name in list(found[0])}
        for cell, found in parts.items()
    }


def history(factors: dict, target: str, write: str = "added", origin: Origin | None = None) -> History:
    """A cell's harvest as what an SAE trains on: target "state" (the state itself) or "write" (the native write).

    Raises ValueError for another target, and for a write that was not harvested (where decays are vectors, the effective).
    """
    if target == "state" and "taken" in factors:
        names = ("key", "added", "log_decay", "erase", "taken")
        return VectorHistory(*(factors[name] for name in names), origin=origin)
    if target == "state":
        return History(factors["key"], factors["effective"], factors["log_decay"], origin=origin)
    if target == "write":
        if write not in ("added", "effective") or write not in factors:
            known = [name for name in ("added", "effective") if name in factors]
            raise ValueError(f"This harvest has no rank-1 write {write!r}: choose {' or '.join(known)}.")
        return History(factors["key"], factors[write], None, origin=origin)
    raise ValueError(f"There is no training target {target!r}: choose state or write.")
