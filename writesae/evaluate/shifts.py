"""The closed-form logit shift (the paper's Sec. 2, App. A): predicted and measured shifts of a token's logit.

Per prompt a position t0 is drawn; eps native write norms of each atom are added to the state at t0, and the logits of
the native top-1 token and of some further ranks are read `horizon` tokens later. Four predictors, three of which fit
nothing; `paper_fitted` has one scalar for every (prompt, atom, token), fitted over the eps, as the paper's App. A says.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from replication.study.profile import LogitShift
from writesae.edit import head_change, make_edit
from writesae.hosts.base import Host
from writesae.shift import cache_gamma, direct_path, logit_gradient, reads
from writesae.text import Windows

GROUP = 20  # prompts run together
ATOM_WINDOWS = 64  # held-out windows on which an atom must fire to be drawn
PREDICTORS = ("paper", "paper_fitted", "transport", "exact")


def draw_positions(count: int, first: int, last: int, seed: int) -> torch.Tensor:
    """[count] positions, first <= t0 < last, that follow from the seed alone. Raises ValueError where there are none."""
    if first >= last:
        raise ValueError(
            f"There is no position from {first} on and before {last}: raise prompt_tokens, or lower the horizon."
        )
    return torch.tensor(np.random.default_rng(seed).integers(first, last, count))


def measure_shifts(
    host: Host,
    windows: Windows,
    t0: torch.Tensor,
    cell: tuple[int, int],
    key: torch.Tensor,
    value: torch.Tensor,
    settings: LogitShift,
    write: str,
    batch_rows: int = 512,
) -> pd.DataFrame:
    """One line a (prompt, atom, eps, native rank of the token): the measured shift and what paper, transport and exact
    predict for it.

    key [n, d_k], value [n, d_v]: unit atoms. windows [B, T] are run together; t0: [B].
    """
    run, rows, steps = host.run(windows.tokens), torch.arange(len(windows)), settings.horizon
    factors = host.factors(run, *cell)
    native_norm = factors.key[rows, t0].norm(dim=-1) * factors.write(write)[rows, t0].norm(dim=-1)
    with torch.no_grad():
        native = host.logits(run.final[rows, t0 + steps])
        ranked = native.topk(max(settings.ranks)).indices[:, torch.tensor(settings.ranks) - 1]  # [B, ranks]
        by_decay, by_transport = reads(factors, rows, t0, steps, key)
    unit = dict(paper=[], transport=[], exact=[])  # of each rank [B, n]
    for token in ranked.unbind(1):
        direct = direct_path(host, *cell, value, token)
        gradient, _ = logit_gradient(host, run, *cell, rows, t0 + 1, steps, token)
        influence = cache_gamma(factors, rows, t0, gradient)
        unit["paper"].append(by_decay * direct)
        unit["transport"].append(by_transport * direct)
        unit["exact"].append(torch.einsum("nk,rkv,nv->rn", key, influence, value))
    eps = torch.tensor(settings.eps, dtype=native_norm.dtype)
    amount = native_norm[:, None, None] * eps  # [B, 1, eps]
    measured = _measured(host, run, factors, cell, rows, t0, steps, key, value, amount, ranked, native, batch_rows)
    axes = rows, torch.arange(len(key)), torch.arange(len(eps)), torch.arange(len(settings.ranks))
    prompt, atom, which, rank = (x.flatten().numpy() for x in torch.meshgrid(*axes, indexing="ij"))
    frame = pd.DataFrame(
        dict(row=prompt, atom=atom, eps=np.array(settings.eps)[which], rank=np.array(settings.ranks)[rank])
    )
    frame["measured"] = measured.flatten().double().numpy()
    for name, predictions in unit.items():
        prediction = torch.stack(predictions, -1)[:, :, None] * amount[..., None]
        frame[name] = prediction.flatten().double().numpy()
    return frame


@torch.no_grad()
def _measured(
    host, run, factors, cell, rows, t0, steps, key, value, amount, tokens, native, batch_rows
) -> torch.Tensor:
    """Shifts [B, n, eps, ranks] of tokens [B, ranks] from real edited runs. The change of the head is worked out once an atom and
    scaled by eps: exact, because the cell's own recurrence is linear in the edit."""
    n, count = len(key), amount.shape[-1]
    at = rows.repeat_interleave(n), t0.repeat_interleave(n)
    edit = make_edit(*at, key.repeat(len(rows), 1)[:, None], value.repeat(len(rows), 1)[:, None], scope="cache")
    change = head_change(factors, edit, steps + 1)[0][:, 1:]
    change = (change[:, None] * amount.expand(-1, n, -1).reshape(-1, count)[:, :, None, None]).flatten(0, 1)
    branch_rows, starts = (x.repeat_interleave(count) for x in (at[0], at[1] + 1))
    shifts = []
    for piece in torch.arange(len(change)).split(batch_rows):
        final, _ = host.branch(run, *cell, branch_rows[piece], starts[piece], change[piece])
        shift = host.logits(final[:, -1]) - native[branch_rows[piece]]
        shifts.append(shift.gather(-1, tokens[branch_rows[piece]]))
    return torch.cat(shifts).view(len(rows), n, count, -1)


def fit_paper_scalar(shifts: pd.DataFrame) -> pd.Series:
    """The paper's formula times one scalar for each (host, prompt, atom, token), by least squares over its eps."""
    groups = [shifts[name] for name in ("host", "prompt", "atom", "rank")]
    product = (shifts.paper * shifts.measured).groupby(groups).transform("sum")
    square = (shifts.paper**2).groupby(groups).transform("sum")
    return (product / square.clip(lower=np.finfo(float).tiny)) * shifts.paper
