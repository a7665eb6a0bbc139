"""Notebook 04: predicted and measured logit shifts (the paper's Sec. 2, App. A)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from replication import layout
from replication.statistics import Estimate, ci, cluster_bootstrap, deviation, r2
from replication.study.firings import encoded_saes, firings_of
from replication.study.study import Study
from writesae.evaluate.firings import draw_atoms
from writesae.evaluate.shifts import (
    GROUP,
    PAPER_EPS,
    PREDICTORS,
    draw_positions,
    fit_paper_scalar,
    measure_shifts,
)

ATOM_WINDOWS = 64  # held-out windows on which an atom must fire to be drawn


def score(shifts: pd.DataFrame) -> pd.DataFrame:
    """Return R2 over prompts, one row per (atom, eps, predictor)."""
    groups = shifts.groupby(["atom", "eps"])
    return pd.DataFrame(
        dict(atom=atom, eps=eps, predictor=name, n=len(group), r2=r2(group.measured, group[name]))
        for (atom, eps), group in groups
        for name in PREDICTORS
    )


def summarise(scores: pd.DataFrame, shifts: pd.DataFrame) -> pd.DataFrame:
    """Return quartiles of R2 over atoms, pooled R2 and the share of correct signs per (predictor, eps).

    The interval of the median is a bootstrap over atoms."""
    prompts, atoms = shifts.prompt.nunique(), shifts.atom.nunique()
    rows = []
    for (name, eps), group in scores.groupby(["predictor", "eps"], sort=False):
        part, ends = shifts[shifts.eps == eps], cluster_bootstrap(group.r2, group.atom, np.median)
        row = dict(predictor=name, fitted_parameters=prompts * atoms if name == "paper_fitted" else 0, eps=eps)
        row |= dict(n_fits=len(group), n_prompts=prompts, r2_median=group.r2.median())
        row |= dict(r2_p25=group.r2.quantile(0.25), r2_p75=group.r2.quantile(0.75)) | ci(ends)
        agree = np.sign(part.measured) == np.sign(part[name])
        rows.append(row | dict(r2_pooled=r2(part.measured, part[name]), sign_agreement=float(agree.mean())))
    return pd.DataFrame(rows)


def by_rank(points: pd.DataFrame) -> pd.DataFrame:
    """Return the median R2 over (atom, eps) per (host, predictor, native rank of the token), as in App. A.

    Only the eps of the paper count."""
    rows = []
    for (host, rank), part in points[points.eps.isin(PAPER_EPS)].groupby(["host", "rank"]):
        for name in PREDICTORS:
            found = median_r2(part, name)
            row = dict(host=host, predictor=name, rank=rank, n=found.n, n_prompts=part.prompt.nunique())
            rows.append(row | dict(r2_median=found.value) | ci(found.interval()))
    return pd.DataFrame(rows)


def median_r2(points: pd.DataFrame, predictor: str, resamples: int = 500, seed: int = 0) -> Estimate:
    """Return the median over (atom, eps) of R2 over prompts, when prompts and atoms are drawn again.

    The variances of the two draws are added, minus that of prompts drawn for each atom by itself (Cameron,
    Gelbach and Miller 2011).
    """
    grid = points.pivot(index=["atom", "eps"], columns="prompt", values=["measured", predictor])
    measured, predicted = grid["measured"].to_numpy(), grid[predictor].to_numpy()
    atoms = grid.index.get_level_values("atom").to_numpy()

    def scores(weights: np.ndarray) -> np.ndarray:
        """Return R2 [draws, fits] with weights [draws, prompts]."""
        total = weights.sum(1, keepdims=True)
        spread = weights @ (measured**2).T - (weights @ measured.T) ** 2 / total
        return 1 - weights @ ((measured - predicted) ** 2).T / spread

    generator, count = np.random.default_rng(seed), measured.shape[1]
    value = scores(np.ones((1, count)))[0]
    drawn = scores(generator.multinomial(count, np.full(count, 1 / count), resamples))
    labels, codes = np.unique(atoms, return_inverse=True)
    shuffled = generator.permuted(np.tile(np.arange(resamples), (len(labels), 1)), axis=1)
    apart = drawn[shuffled[codes].T, range(len(value))]
    picks = generator.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), resamples)
    of_atoms = np.array([np.median(np.repeat(value, row[codes])) for row in picks])
    prompts, alone, others = (deviation(x) ** 2 for x in (np.median(drawn, 1), np.median(apart, 1), of_atoms))
    error = np.sqrt(max(prompts + others - alone, prompts, others))
    return Estimate(float(np.median(value)), float(error), len(labels) - 1, len(value))


def run(study: Study) -> pd.DataFrame:
    """Return every host's shifts per (prompt, atom, eps, rank), kept in build/ only (tens of MB)."""
    points = pd.concat([measure(study, name) for name in study.profile.hosts], ignore_index=True)
    return points.assign(paper_fitted=fit_paper_scalar(points))


def measure(study: Study, name: str) -> pd.DataFrame:
    """Return the shifts in a host's cell, measured in groups of prompts."""
    profile, settings = study.profile, study.profile.section("logit_shift", name)
    cell, windows = study.cell(name, settings.place), study.windows(name, "heldout")
    if len(windows) < settings.prompts:
        raise ValueError(f"{settings.prompts} prompts are asked for and there are {len(windows)} held-out windows.")
    some = windows[slice(0, ATOM_WINDOWS)]
    saes = encoded_saes(study, name, [cell], "main", some)
    cell_sae = next(x for x in saes if x.target == settings.target)
    atoms = draw_atoms(firings_of(study, cell_sae, some), settings.atoms, 1, profile.seed)
    windows = windows[slice(0, settings.prompts)].beginnings(settings.prompt_tokens)
    sides = [x[torch.from_numpy(atoms)] for x in cell_sae.sae.atoms()]
    last = windows.tokens.shape[1] - settings.horizon
    t0 = draw_positions(settings.prompts, profile.data.first_position, last, profile.seed)
    options = dict(eps=settings.eps, horizon=settings.horizon, ranks=settings.ranks, write=profile.saes.write)
    given = dict(windows=windows, t0=t0, cell=cell, sides=sides, atoms=atoms, options=options)
    groups = range(0, settings.prompts, GROUP)
    return study.stage("logit_shift_points", name, groups, _shifts, host=study.host(name), **given)


def _shifts(start: int, host, windows, t0, cell, sides, atoms, options) -> pd.DataFrame:
    """Return the shifts of GROUP prompts from `start` on."""
    group = slice(start, start + GROUP)
    part = measure_shifts(host, windows[group], t0[group], cell, *sides, **options)
    part.insert(0, "prompt", part.pop("row") + start)
    return part.assign(host=host.name, layer=cell[0], head=cell[1], atom=atoms[part.atom.to_numpy()])


def tables(study: Study, points: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Write and return results logit_shift and logit_shift_summary (top-1 token), and logit_shift_ranks."""
    scores, summaries = [], []
    for (name, layer, head), part in points[points["rank"] == 1].groupby(["host", "layer", "head"]):
        scores.append(score(part).assign(host=name, layer=layer, head=head))
        summaries.append(summarise(scores[-1], part).assign(host=name))
    results = dict(logit_shift=pd.concat(scores), logit_shift_summary=pd.concat(summaries))
    results["logit_shift_ranks"] = by_rank(points)
    return tuple(study.write(name, table.reset_index(drop=True)) for name, table in results.items())


def shown(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the median R2 with its interval for a reader: predictors down, sizes across."""
    ordered = summary.sort_values("predictor", key=lambda names: names.map(PREDICTORS.index), kind="stable")
    texts = layout.plain(ordered, "r2_median", "ci_low", "ci_high", digits=3)
    return layout.across(ordered, ["predictor"], "eps", texts)


def shown_hosts(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the median R2 of every host for a reader: hosts and predictors down, sizes across."""
    return layout.across(summary, ["host", "predictor"], "eps", layout.numbers(summary.r2_median, ".3f"))


def shown_ranks(ranks: pd.DataFrame) -> pd.DataFrame:
    """Return the median R2 for a reader: predictors down, ranks of the token across."""
    texts = layout.plain(ranks, "r2_median", "ci_low", "ci_high", digits=3)
    rows = ranks.rename(columns=dict(rank="rank of the token"))
    return layout.across(rows, ["predictor"], "rank of the token", texts)
