"""The closed-form logit shift (the paper's Sec. 2, App. A): predicted and measured shifts of a token's logit.

Per prompt, eps native write norms of each atom are added to the state at t0, and logits are read `horizon`
tokens later. Only `paper_fitted` has a fit: one scalar over the paper's eps per (prompt, atom, token).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from writesae.edit import head_change, make_edit
from writesae.hosts.base import Host, check_places
from writesae.recurrence import torch_defaults
from writesae.shift import Gradients, cache_gamma, direct_path, logit_gradients, reads
from writesae.text import Windows

GROUP = 20  # prompts run together
PREDICTORS = ("paper", "paper_fitted", "transport", "exact", "through_layer", "through_norm")
PAPER_EPS = (0.1, 0.3, 1.0, 3.0)  # the sizes of the paper: only these enter the fit


def draw_positions(count: int, first: int, last: int, seed: int) -> Tensor:
    """Draw [count] positions with first <= t0 < last from the seed alone. ValueError where there are none."""
    if first >= last:
        problem = f"There is no position from {first} on and before {last}"
        raise ValueError(f"{problem}: take longer prompts, or a smaller horizon.")
    return torch.tensor(np.random.default_rng(seed).integers(first, last, count))


@torch_defaults()
def measure_shifts(
    host: Host,
    windows: Windows,
    t0: Tensor,
    cell: tuple[int, int],
    key: Tensor,
    value: Tensor,
    *,
    eps: Sequence[float],
    horizon: int,
    ranks: Sequence[int] = (1,),
    write: str = "added",
    batch_rows: int = 512,
) -> pd.DataFrame:
    """Return one row per (row, atom, eps, rank): the shift `measured` and by PREDICTORS but paper_fitted.

    windows [B, T] are run together; t0 [B]: where the atom is added (scope "cache"). key [n, d_k], value [n,
    d_v]: unit atoms. eps: in native write norms. ranks: of native logits, from 1. Raises ValueError for a
    t0 of another shape or outside the windows, and for a horizon or ranks out of range."""
    run, rows = host.run(windows.tokens), torch.arange(len(windows))
    if t0.shape != rows.shape:
        raise ValueError(f"Each of the {len(rows)} windows takes one t0; got {list(t0.shape)}.")
    if horizon < 1 or not all(1 <= rank <= host.vocabulary for rank in ranks):
        raise ValueError(f"The horizon is at least 1 and ranks 1 to {host.vocabulary}, not {horizon}, {list(ranks)}.")
    check_places(rows, torch.stack([t0, t0 + horizon]), run.tokens)
    factors = host.factors(run, *cell)
    native_norm = factors.key[rows, t0].norm(dim=-1) * factors.write(write)[rows, t0].norm(dim=-1)
    with torch.no_grad():
        native = host.logits(run.final[rows, t0 + horizon])
    tokens = native.topk(max(ranks)).indices[:, torch.tensor(ranks) - 1]  # [B, ranks]
    slopes = logit_gradients(host, run, *cell, rows, t0 + 1, horizon, tokens)
    unit = _predicted(host, factors, cell, rows, t0, horizon, key, value, tokens, slopes.head)
    amount = native_norm[:, None, None] * torch.tensor(eps, dtype=native_norm.dtype)  # [B, 1, eps]
    changes = _head_changes(factors, rows, t0, horizon, key, value, amount)
    shifts = _measured(host, run, cell, rows, t0, changes, tokens, native, slopes, batch_rows)
    axes = rows, torch.arange(len(key)), torch.arange(len(eps)), torch.arange(len(ranks))
    prompt, atom, which, rank = (x.flatten().numpy() for x in torch.meshgrid(*axes, indexing="ij"))
    frame = pd.DataFrame(dict(row=prompt, atom=atom, eps=np.array(eps)[which], rank=np.array(ranks)[rank]))
    shifts |= {name: prediction[:, :, None] * amount[..., None] for name, prediction in unit.items()}
    return frame.assign(**{name: shift.flatten().double().numpy() for name, shift in shifts.items()})


@torch.no_grad()
def _predicted(host, factors, cell, rows, t0, horizon, key, value, tokens, gradient) -> dict[str, Tensor]:
    """Return the predictions that are linear in the write, for unit atoms, [B, n, ranks]."""
    by_decay, by_transport = reads(factors, rows, t0, horizon, key)
    unit = dict(paper=[], transport=[], exact=[])  # of each rank [B, n]
    for rank, token in enumerate(tokens.unbind(1)):
        direct = direct_path(host, *cell, value, token)
        influence = cache_gamma(factors, rows, t0, gradient[:, rank])
        unit["paper"].append(by_decay * direct)
        unit["transport"].append(by_transport * direct)
        unit["exact"].append(torch.einsum("nk,rkv,nv->rn", key, influence, value))
    return {name: torch.stack(shifts, -1) for name, shifts in unit.items()}


@torch.no_grad()
def _head_changes(factors, rows, t0, horizon, key, value, amount) -> Tensor:
    """Return the head's change [B, n, eps, horizon, d_v], which is linear in eps."""
    n, count = len(key), amount.shape[-1]
    places = rows.repeat_interleave(n), t0.repeat_interleave(n)
    sides = key.repeat(len(rows), 1)[:, None], value.repeat(len(rows), 1)[:, None]
    change = head_change(factors, make_edit(*places, *sides, scope="cache"), horizon + 1)[0][:, 1:]
    change = change[:, None] * amount.expand(-1, n, -1).reshape(-1, count)[:, :, None, None]
    return change.unflatten(0, (len(rows), n))


@torch.no_grad()
def _measured(host, run, cell, rows, t0, changes, tokens, native, slopes: Gradients, batch_rows) -> dict:
    """Return the shifts [B, n, eps, ranks] of tokens [B, ranks], in edited runs and as predicted from slopes.

    The edited layer is run once for all of them.
    """
    repeat = changes.shape[1] * changes.shape[2]
    row, start = (x.repeat_interleave(repeat) for x in (rows, t0 + 1))
    change, shifts = changes.flatten(0, 2), dict(measured=[], through_layer=[], through_norm=[])
    for piece in torch.arange(len(change)).split(batch_rows):
        at, token = row[piece], tokens[row[piece]]
        output, _ = host.edited_layer(run, *cell, at, start[piece], change[piece])
        final, _ = host.layers_above(run, cell[0], at, start[piece], output)
        shifts["measured"].append((host.logits(final[:, -1]) - native[at]).gather(-1, token))
        shifts["through_layer"].append(slopes.through_layer(output, at).cpu())
        estimates = (slopes.last_hidden(output, at, [rank]) for rank in range(tokens.shape[1]))
        logits = torch.cat([host.logits(x).gather(-1, token[:, [i]]) for i, x in enumerate(estimates)], 1)
        shifts["through_norm"].append(logits - slopes.logits[at].gather(-1, token))
    return {name: torch.cat(parts).view(*changes.shape[:3], -1) for name, parts in shifts.items()}


def fit_paper_scalar(shifts: pd.DataFrame) -> pd.Series:
    """Return the paper's formula times one scalar per (host, prompt, atom, token).

    The fit is by least squares over the sizes of the paper, PAPER_EPS; at other sizes it is an extrapolation.
    """
    groups = [shifts[name] for name in ("host", "prompt", "atom", "rank")]
    fitted = shifts.paper.where(shifts.eps.isin(PAPER_EPS), 0.0)
    product = (fitted * shifts.measured).groupby(groups).transform("sum")
    square = (fitted**2).groupby(groups).transform("sum")
    return (product / square.clip(lower=np.finfo(float).tiny)) * shifts.paper
