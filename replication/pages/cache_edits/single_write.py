"""One write for a target token: its sign and size (the paper's App. I.5)."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from replication.pages.cache_edits.site import Site, interval
from replication.statistics import r2, wider, wilson
from writesae.edit import head_change, make_edit
from writesae.evaluate.install import DIRECTIONS, ranks
from writesae.shift import cache_gamma, logit_gradient

PREDICTORS = ("paper", "transport", "exact")


def single_sides(site: Site, rows, t0, direction: str, pull, gradient) -> tuple[torch.Tensor, torch.Tensor]:
    """Return unit keys [n, d_k] and values [n, d_v]: native key and W_O^T W_U[T] (paper), or Gamma's top
    pair."""
    if direction == "paper":
        return F.normalize(site.factors.key[rows, t0], dim=-1), F.normalize(pull, dim=-1)
    left, _, right = torch.linalg.svd(cache_gamma(site.factors, rows, t0, gradient), full_matrices=False)
    return left[..., 0], right[..., 0, :]


def single_writes(site: Site, rows, t0, targets: torch.Tensor, magnitude: float, horizon: int) -> pd.DataFrame:
    """Return one row per (place, target, direction): the shift of the target's logit `horizon` tokens after
    t0, and predictions.

    rows, t0 [n]: places; targets [n, m]. One write of `magnitude` native write norms, which later tokens
    read. paper: prod alpha <key, q> <W_O value, W_U[T]>; transport: the same with the exact read; exact:
    sum_s <r_s, change of the head's output at s> with r the gradient of the target's logit, which is x^T
    Gamma w (`writesae.shift`).
    """
    token, m = targets.flatten(), targets.shape[1]
    place, rows, t0 = (x.repeat_interleave(m) for x in (torch.arange(len(t0)), rows, t0))
    cell, factors, tables = (site.layer, site.head), site.factors, []
    gradient, native = logit_gradient(site.host, site.run, *cell, rows, t0 + 1, horizon, token)
    with torch.no_grad():
        pull = (site.host.unembedding()[token] @ site.host.output_projection(*cell)).to(gradient)
        size = magnitude * site.native(rows, t0)[2]
        decay = sum(factors.log_decay[rows, t0 + step] for step in range(1, horizon + 1)).exp()
        for direction in DIRECTIONS:
            key, value = single_sides(site, rows, t0, direction, pull, gradient)
            edit = make_edit(rows, t0, key[:, None], (size[:, None] * value)[:, None], "cache")
            change = head_change(factors, edit, horizon + 1)[0][:, 1:]
            final = site.host.branch(site.run, *cell, rows, t0 + 1, change)[0]
            read = (factors.query[rows, t0 + horizon] * decay * key).sum(-1)
            shift = (site.host.logits(final[:, -1]) - native).gather(-1, token[:, None])[:, 0]
            found = dict(place=place, position=t0, token=token, native_rank=ranks(native, token), measured=shift)
            found |= dict(paper=size * read * (value * pull).sum(-1), transport=(change[:, -1] * pull).sum(-1))
            found["exact"] = (change * gradient).sum((1, 2))
            tables.append(pd.DataFrame({n: x.numpy() for n, x in found.items()}).assign(direction=direction))
    return pd.concat(tables, ignore_index=True)


def summarise_single(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return one row per (host, direction, predictor).

    Columns: sign agreement (the wider of Wilson's interval and the bootstrap by passage); Pearson's r, median
    of measured / predicted and pooled R2, with bootstrap intervals by passage; the share of trials whose
    logit increases.
    """
    rows = []
    for (host, direction), part in table.groupby(["host", "direction"], sort=False):
        rose = part.measured > 0
        for name in PREDICTORS:
            agree = np.sign(part.measured) == np.sign(part[name])
            low, high = wider(wilson(int(agree.sum()), len(agree)), interval(agree, part.passage, seed=seed))
            row = dict(host=host, direction=direction, predictor=name, n=len(part), sign_agreement=agree.mean())
            row |= dict(ci_low=low, ci_high=high)
            measured, predicted = part.measured.to_numpy(), part[name].to_numpy()
            for label, statistic in PAIR_STATISTICS.items():
                row[label] = statistic(measured, predicted)
                at = partial(_of_rows, statistic, measured, predicted)
                row[f"{label}_low"], row[f"{label}_high"] = interval(at, part.passage, seed=seed)
            row["rose"], (row["rose_low"], row["rose_high"]) = rose.mean(), wilson(int(rose.sum()), len(rose))
            rows.append(row)
    return pd.DataFrame(rows)


PAIR_STATISTICS = dict(
    pearson=lambda m, p: np.corrcoef(m, p)[0, 1], median_ratio=lambda m, p: np.median(m / p), r2_pooled=r2
)


def _of_rows(statistic, measured: np.ndarray, predicted: np.ndarray, rows: np.ndarray) -> float:
    return statistic(measured[rows], predicted[rows])
