"""Memory, spectrum, rank of the writes and importance of a host's cells."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd
import torch
import torch.nn.functional as F

from writesae.edit import edited_hidden, kl, make_edit
from writesae.hosts.base import Host, Run
from writesae.hosts.layers import wide
from writesae.hosts.past import Record
from writesae.recurrence import step_states, torch_defaults

EVERY = 8  # tokens from one singular value decomposition to the next
RANK_TOLERANCE = 1e-5  # relative to the largest singular value


def numerical_rank(matrices: torch.Tensor) -> int:
    """Return the largest numerical rank of matrices [M, d_k, d_v]."""
    values = torch.linalg.svdvals(matrices)
    return int((values > RANK_TOLERANCE * values[:, :1]).sum(1).max())


@torch_defaults()
def survey_cells(
    host: Host, run: Run, first_position: int, cells: Iterable[tuple[int, int]] | None = None
) -> pd.DataFrame:
    """Return one row per cell (by default of all) over a native run.

    Columns: the median half-life in tokens (ln 2 / -log alpha); the median of sigma1/sigma2 of the states
    before every 8th token from first_position on, in the first 4 windows; the ranks of its added and effective
    writes, from differences of states in fp64. Raises ValueError for a cell that the host does not have, and
    for a first_position without a state before it in the windows.
    """
    length = run.tokens.shape[1]
    if not 1 <= first_position <= length:
        raise ValueError(f"first_position is from 1 to {length}, the windows' length, not {first_position}.")
    rows = []
    for layer, head in host.cells if cells is None else cells:
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


@torch_defaults()
def cost_of_no_writes(host: Host, run: Run, cells: Iterable[tuple[int, int]]) -> pd.DataFrame:
    """Return what each cell is worth: the loss of a run in which nothing is written in it, minus native.

    One row per cell and window; `cost` is in nats, per predicted token of the window. A state starts at zero
    and stays zero without writes, so the head's output loses exactly S_t^T q_t at every position. The layers
    above run again from their own changed inputs. Raises ValueError for a cell that the host does not have.
    """
    windows = len(run.tokens)
    rows, starts = torch.arange(windows), torch.zeros(windows, dtype=torch.int64)
    native, tables = _losses(host, run.final, run.tokens), []
    for layer, head in cells:
        host.check_cell(layer, head)
        change = -state_reads(run.records[layer], head)
        final, _ = host.branch(run, layer, head, rows, starts, change)
        cost = (_losses(host, final, run.tokens) - native).numpy()
        columns = dict(host=host.name, layer=layer, head=head, window=range(windows), cost=cost)
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


@torch_defaults()
def cost_of_deletions(
    host: Host, run: Run, cells: Iterable[tuple[int, int]], rows: torch.Tensor, positions: torch.Tensor
) -> pd.DataFrame:
    """Return what single writes are worth: KL(native, edited) in nats at t + 1 without the added write at t.

    One row per cell and place: the places are positions[i] of window rows[i], the same in every cell.
    Columns: host, layer, head, window, position, kl. Raises ValueError for unknown places and cells.
    """
    windows, length = run.tokens.shape
    if not ((rows >= 0) & (rows < windows) & (positions >= 0) & (positions < length - 1)).all():
        raise ValueError(f"Places are in {windows} windows and have a token after them: positions 0 to {length - 2}.")
    native, tables = host.logits(run.final[rows, positions + 1]), []
    for layer, head in cells:
        factors = host.factors(run, layer, head)
        write = factors.at(rows, positions)
        edit = make_edit(rows, positions, write.key[:, None], -write.added[:, None])
        final = edited_hidden(host, run, layer, head, edit, 2)
        columns = dict(host=host.name, layer=layer, head=head, window=rows.numpy(), position=positions.numpy())
        tables.append(pd.DataFrame(columns | dict(kl=kl(native, host.logits(final[:, -1])).numpy())))
    return pd.concat(tables, ignore_index=True)


def state_reads(record: Record, head: int) -> torch.Tensor:
    """Return S_t^T q_t [B, T, d_v] of a head: its recorded output without Mamba-2's skip D x.

    The outputs of the other families are S_t^T q_t alone; the bonus of RWKV-7 is beside them.
    """
    outputs = record.outputs[:, :, head]
    return outputs - record.factors["skip"][:, :, head] if "skip" in record.factors else outputs


def _losses(host: Host, final: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token loss in nats of each window, fp64 [B]: one window's logits at a time."""
    losses = []
    for hidden, now in zip(final.to(host.final_device), tokens, strict=True):
        logits = wide(host.unembed(hidden[:-1]))
        losses.append(F.cross_entropy(logits, now[1:].to(logits.device), reduction="none").double().mean())
    return torch.stack(losses).cpu()
