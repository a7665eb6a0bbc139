"""One write for a target token: its sign and size (the paper's App. I.5)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from replication.pages.cache_edits.site import Site, interval, share_interval
from replication.statistics import ci, r2, with_ends
from writesae.edit import head_change, make_edit
from writesae.evaluate.install import ONE_CELL, ranks
from writesae.shift import cache_gamma, logit_gradient

PREDICTORS = ("paper", "transport", "exact")
PAIR_STATISTICS = dict(
    pearson=lambda m, p: np.corrcoef(m, p)[0, 1], median_ratio=lambda m, p: np.median(m / p), r2_pooled=r2
)


def single_writes(site: Site, rows, t0, targets: torch.Tensor, magnitude: float, horizon: int) -> pd.DataFrame:
    """Return measured and predicted shifts of the target's logit, per (place, target, direction).

    rows, t0 [n]: places; targets [n, m]. One write of `magnitude` native write norms at t0, read `horizon`
    tokens later. Its direction is the native key with W_O^T W_U[T] (paper), or Gamma's top pair. Predictions,
    paper: prod alpha <key, q> <W_O value, W_U[T]>; transport: the same with the exact read; exact: sum_s
    <r_s, change of the head's output at s>, r being the gradient of the target's logit, which is x^T Gamma w
    (`writesae.shift`)."""
    token, m = targets.flatten(), targets.shape[1]
    place, rows, t0 = (x.repeat_interleave(m) for x in (torch.arange(len(t0)), rows, t0))
    cell, factors, tables = (site.layer, site.head), site.factors, []
    gradient, native = logit_gradient(site.host, site.run, *cell, rows, t0 + 1, horizon, token)
    with torch.no_grad():
        pull = (site.host.unembedding()[token] @ site.host.output_projection(*cell)).to(gradient)
        size = magnitude * site.native(rows, t0)[2]
        decay = sum(factors.log_decay[rows, t0 + step] for step in range(1, horizon + 1)).exp()
        for direction in ONE_CELL:
            if direction == "paper":
                key, value = (F.normalize(x, dim=-1) for x in (factors.key[rows, t0], pull))
            else:
                left, _, right = torch.linalg.svd(cache_gamma(factors, rows, t0, gradient), full_matrices=False)
                key, value = left[..., 0], right[..., 0, :]
            edit = make_edit(rows, t0, key[:, None], (size[:, None] * value)[:, None], "cache")
            change = head_change(factors, edit, horizon + 1)[0][:, 1:]
            final = site.host.branch(site.run, *cell, rows, t0 + 1, change)[0]
            read = (factors.query[rows, t0 + horizon] * decay * key).sum(-1)
            shift = (site.host.logits(final[:, -1]) - native).gather(-1, token[:, None])[:, 0]
            columns = dict(place=place, position=t0, token=token, native_rank=ranks(native, token), measured=shift)
            columns |= dict(paper=size * read * (value * pull).sum(-1), transport=(change[:, -1] * pull).sum(-1))
            columns["exact"] = (change * gradient).sum((1, 2))
            tables.append(pd.DataFrame({n: x.numpy() for n, x in columns.items()}).assign(direction=direction))
    return pd.concat(tables, ignore_index=True)


def summarise_single(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return how well each predictor fits the shifts, one row per (host, direction, predictor).

    Intervals: of sign_agreement and of `rose` (the share of increases), the wider of Wilson's and the bootstrap
    by passage; of all other columns, the bootstrap by passage."""
    rows = []
    for (host, direction), part in table.groupby(["host", "direction"], sort=False):
        measured, rose = part.measured.to_numpy(), part.measured > 0
        rise = share_interval(rose, part.passage, seed=seed)
        for name in PREDICTORS:
            predicted, agree = part[name].to_numpy(), np.sign(part.measured) == np.sign(part[name])
            row = dict(host=host, direction=direction, predictor=name, n=len(part))
            row |= dict(sign_agreement=agree.mean()) | ci(share_interval(agree, part.passage, seed=seed))
            for label, statistic in PAIR_STATISTICS.items():

                def of_rows(rows, statistic=statistic, predicted=predicted, measured=measured):
                    return statistic(measured[rows], predicted[rows])

                ends = interval(of_rows, part.passage, seed=seed)
                row |= with_ends(label, statistic(measured, predicted), ends)
            rows.append(row | with_ends("rose", rose.mean(), rise))
    return pd.DataFrame(rows)
