"""The closed-form logit shift (the paper's Sec. 2, App. A): predicted and measured shifts of a token's logit.

Per prompt a position t0 is drawn; eps native write norms of each atom are added to the state at t0, and the logits of
the native top-1 token and of some further ranks are read `horizon` tokens later. Four predictors, three of which fit
nothing; `paper_fitted` has one scalar for every (prompt, atom, token), fitted over the eps, as the paper's App. A says.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from writesae.edit import head_change, make_edit
from writesae.experiments.firings import draw_atoms
from writesae.experiments.replacement import firings_of, heldout_subjects
from writesae.harvest import Windows
from writesae.hosts import Host
from writesae.logit_shift import cache_gamma, direct_path, logit_gradient, reads
from writesae.profiles import LogitShift
from writesae.statistics import cluster_bootstrap, r2
from writesae.suite import Suite

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


def score(shifts: pd.DataFrame) -> pd.DataFrame:
    """R2 of every predictor for each (atom, eps) over its prompts: one line an (atom, eps, predictor)."""
    rows = []
    for (atom, eps), group in shifts.groupby(["atom", "eps"]):
        for name in PREDICTORS:
            rows.append(dict(atom=atom, eps=eps, predictor=name, n=len(group), r2=r2(group.measured, group[name])))
    return pd.DataFrame(rows)


def summarise(scores: pd.DataFrame, shifts: pd.DataFrame) -> pd.DataFrame:
    """One line a (predictor, eps): quartiles of R2 over atoms, the bootstrap interval of its median, the pooled R2."""
    prompts, atoms = shifts.prompt.nunique(), shifts.atom.nunique()
    rows = []
    for (name, eps), group in scores.groupby(["predictor", "eps"], sort=False):
        these = shifts[shifts.eps == eps]
        low, high = cluster_bootstrap(group.r2.to_numpy(), group.atom.to_numpy(), statistic=np.median, seed=0)
        rows.append(
            dict(
                predictor=name,
                fitted_parameters=prompts * atoms if name == "paper_fitted" else 0,
                eps=eps,
                n_fits=len(group),
                n_prompts=prompts,
                r2_median=group.r2.median(),
                r2_p25=group.r2.quantile(0.25),
                r2_p75=group.r2.quantile(0.75),
                ci_low=low,
                ci_high=high,
                r2_pooled=r2(these.measured, these[name]),
                sign_agreement=float((np.sign(these.measured) == np.sign(these[name])).mean()),
            )
        )
    return pd.DataFrame(rows)


def by_rank(points: pd.DataFrame) -> pd.DataFrame:
    """One line a (host, predictor, native rank of the token): the median over (atom, eps) of R2 over prompts, with its
    bootstrap interval by atom, as the paper's App. A gives for the tokens after the first."""
    rows = []
    for (host, rank), part in points.groupby(["host", "rank"]):
        for name, group in score(part).groupby("predictor", sort=False):
            low, high = cluster_bootstrap(group.r2.to_numpy(), group.atom.to_numpy(), statistic=np.median, seed=0)
            row = dict(host=host, predictor=name, rank=rank, n=len(group), n_prompts=part.prompt.nunique())
            rows.append(row | dict(r2_median=group.r2.median(), ci_low=low, ci_high=high))
    return pd.DataFrame(rows)


# The stage of notebook 04.


def run(suite: Suite) -> pd.DataFrame:
    """Every (prompt, atom, eps, rank) of each host's cell, with the fitted predictor (tens of MB: kept in build/ only)."""
    tables, profile = [], suite.profile
    for name in suite.profile.hosts:
        settings = profile.section("logit_shift", name)
        host, cell = suite.host(name), suite.cell(name, settings.place)
        windows = suite.windows(name, "heldout")
        if len(windows) < settings.prompts:
            raise ValueError(f"{settings.prompts} prompts are asked for and there are {len(windows)} held-out windows.")
        some = windows[slice(0, ATOM_WINDOWS)]
        subjects = {s.target: s for s in heldout_subjects(suite, name, [cell], "main", some)}
        subject = subjects[settings.target]
        atoms = draw_atoms(firings_of(suite, subject, some), settings.atoms, 1, profile.seed)
        windows = windows[slice(0, settings.prompts)].beginnings(settings.prompt_tokens)
        key, value = (x[torch.from_numpy(atoms)] for x in subject.sae.atoms())
        last = windows.tokens.shape[1] - settings.horizon
        t0 = draw_positions(settings.prompts, profile.data.first_position, last, profile.seed)

        def compute(
            start,
            size=GROUP,
            host=host,
            cell=cell,
            windows=windows,
            t0=t0,
            key=key,
            value=value,
            atoms=atoms,
            name=name,
            settings=settings,
        ):
            picked = slice(start, start + size)
            part = measure_shifts(host, windows[picked], t0[picked], cell, key, value, settings, profile.saes.write)
            part.insert(0, "prompt", part.pop("row") + start)
            return part.assign(host=name, layer=cell[0], head=cell[1], atom=atoms[part.atom.to_numpy()])

        inputs = dict(
            settings=settings, data=profile.data, saes=suite.sae_files(name), cell=cell, write=profile.saes.write
        )
        groups = list(range(0, settings.prompts, GROUP))
        tables.append(suite.staged("logit_shift_points", name, groups, compute, [__name__], inputs))
    points = pd.concat(tables, ignore_index=True)
    return points.assign(paper_fitted=fit_paper_scalar(points))


def tables(suite: Suite, points: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """results logit_shift.csv and logit_shift_summary.csv, of the top-1 token, and logit_shift_ranks.csv."""
    scores, summaries = [], []
    for (name, layer, head), part in points[points["rank"] == 1].groupby(["host", "layer", "head"]):
        scored = score(part)
        scores.append(scored.assign(host=name, layer=layer, head=head))
        summaries.append(summarise(scored, part).assign(host=name))
    return (
        suite.write("logit_shift", pd.concat(scores, ignore_index=True)),
        suite.write("logit_shift_summary", pd.concat(summaries, ignore_index=True)),
        suite.write("logit_shift_ranks", by_rank(points)),
    )
