"""Memory, spectrum and rank of the writes of a host's cells."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd
import torch

from writesae.hosts.base import Host, Run
from writesae.recurrence import step_states

EVERY = 8  # tokens from one singular value decomposition to the next
RANK_TOLERANCE = 1e-5  # relative to the largest singular value


def numerical_rank(matrices: torch.Tensor) -> int:
    """Return the largest numerical rank of matrices [M, d_k, d_v]."""
    values = torch.linalg.svdvals(matrices)
    return int((values > RANK_TOLERANCE * values[:, :1]).sum(1).max())


@torch.no_grad()
def survey_cells(host: Host, run: Run, first_position: int, layers: Iterable[int] | None = None) -> pd.DataFrame:
    """Return one row per cell (of these layers) over a native run.

    Columns: the median half-life in tokens (ln 2 / -log alpha); the median over positions of sigma1/sigma2 of
    its states; the ranks of its added and effective writes, from differences of states in fp64.
    """
    rows, layers = [], host.recurrent_layers if layers is None else tuple(layers)
    for layer, head in (cell for cell in host.cells if cell[0] in layers):
        f = host.factors(run, layer, head)
        half_life = (math.log(2) / f.log_decay.float().abs()).median()
        few = f.at(slice(4)).map(torch.Tensor.double)
        states = step_states(few)[:, first_position - 1 :: EVERY]
        sigma = torch.linalg.svdvals(states.flatten(0, 1))
        ratio = (sigma[:, 0] / sigma[:, 1]).median()
        rows.append((host.name, layer, head, float(half_life), float(ratio), *write_ranks(few), run.tokens.numel()))
    measures = ["half_life_median", "sigma1_over_sigma2", "added_write_rank", "effective_write_rank", "n_tokens"]
    return pd.DataFrame(rows, columns=["host", "layer", "head", *measures])


def write_ranks(factors) -> tuple[int, int]:
    """Return the ranks of S_t - A_t S_{t-1} (added) and S_t - diag(decay_t) S_{t-1} (effective)."""
    one = factors.at(slice(0, 1))
    states = step_states(one)[0]
    before, after, now = states[:-1:EVERY], states[1::EVERY], one.at(0, slice(1, None, EVERY))
    decayed = now.log_decay.exp()[:, :, None] * before
    erased = 0 if now.erase is None else now.erase[:, :, None] * (now.probe[:, None] @ before)
    return numerical_rank(after - (decayed - erased)), numerical_rank(after - decayed)
