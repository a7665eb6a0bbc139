"""Harvest: the factors of chosen cells over many windows, in one pass of the model, without states."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from writesae.history import Origin
from writesae.hosts.base import Host
from writesae.recurrence import Factors, torch_defaults
from writesae.text import Windows

Cell = tuple[int, int]  # layer, head


@torch_defaults()
def harvest(
    host: Host,
    windows: Windows | Tensor,
    cells: list[Cell] | None = None,
    batch: int = 16,
    progress: bool = True,
    *,
    layer: int | None = None,
    head: int | None = None,
) -> Factors | dict[Cell, Factors]:
    """Return the factors of one cell, or of several by cell, over windows or their tokens [N, T].

    batch: windows per run. The factors are in fp32 on the CPU: key, added and log_decay; effective for scalar
    decays and KDA; erase and taken for vector decays. Raises ValueError for no cell, a cell that the host does
    not have, a batch below 1, and tokens that `Host.run` refuses.
    """
    if (layer is None) != (head is None) or (layer is None) == (cells is None):
        raise ValueError("A harvest is of one cell (layer and head) or of a list of cells.")
    chosen = list(cells) if layer is None else [(layer, head)]
    if not chosen:
        raise ValueError(f"A harvest needs at least one cell: {host.name} has them in layers {host.recurrent_layers}.")
    if batch < 1:
        raise ValueError(f"A batch takes at least one window, not {batch}.")
    tokens = windows if isinstance(windows, Tensor) else windows.tokens
    host.check_tokens(tokens)
    for cell in chosen:
        host.check_cell(*cell)
    parts: dict[Cell, list[Factors]] = {cell: [] for cell in chosen}
    for rows in tqdm(tokens.split(batch), desc="harvest", disable=not progress):
        run = host.run(rows, upto=max(cell[0] for cell in chosen) + 1)
        for cell in chosen:
            factors = host.cell_factors(run.records[cell[0]], cell[1])
            if host.scalar_decay:
                factors = replace(factors, query=None, erase=None, probe=None)
            else:
                effective = None if factors.effective is factors.added else factors.effective
                taken = factors.taken_by_erase()
                factors = replace(factors, query=None, effective=effective, probe=None, taken=taken)
            parts[cell].append(factors.map(lambda x: x.float().cpu()))
    whole = {cell: _joined(parts.pop(cell), Origin(host.name, *cell, "added")) for cell in chosen}
    return whole if layer is None else whole[layer, head]


def _joined(parts: list[Factors], origin: Origin) -> Factors:
    """Return the factors of all batches joined. It empties `parts`, so only one field is in memory twice."""
    tensors = [part.tensors() for part in parts]
    parts.clear()
    whole = {name: torch.cat([x.pop(name) for x in tensors]) for name in list(tensors[0])}
    return Factors(query=None, **whole, origin=origin)
