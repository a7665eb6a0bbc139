"""Page 15_multiverse: replacement under every choice that the paper leaves open (Sec. 2, 3.2, App. F.1, J).

A universe is one level of each choice; the first level is the default of this repository.

| choice       | levels                                                                                |
|--------------|---------------------------------------------------------------------------------------|
| target       | what the SAE is trained on: state, write                                              |
| centre       | whether the SAE subtracts the data's mean: mean, none                                 |
| write        | the native write: added (beta k v^T), effective (S_t - alpha_t S_{t-1})               |
| pooling      | rounds: one firing of every alive atom, then a second; most_firing: as in Fig. 14;    |
|              | positions: places uniform over positions, the same for all SAEs                       |
| amplitude    | of the atom and of every control: coefficient, or matched_norm (the native write's)   |
| reading      | who reads (edit.SCOPES); KL at the next position, the write's, or mean over next H   |
| kl_direction | KL(native, patched), KL(patched, native)                                              |
| control      | delete, another alive atom, a fresh rank-1 matrix, the mean write, another write      |

There is no universe for the KL at the writing position if only later tokens read the edit: it is exactly 0.
Only Gated DeltaNet has both writes: on Mamba-2 they are the same, and on RWKV-7 one is not of rank 1."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import statsmodels.api as sm
import torch
import torch.nn.functional as F

from replication import layout
from replication.plots import level_name
from replication.statistics import cluster_bootstrap, wilson
from replication.study.firings import run_firings
from replication.study.stages import rows_with
from replication.study.study import Study
from replication.study.training import main_role, other_role, other_specs, train_all, write_definitions
from writesae.edit import SCOPES, head_change, make_edit
from writesae.evaluate.firings import (
    CellSAE,
    Places,
    all_firings,
    atom_names,
    draw_in_rounds,
    draw_positions,
    encode_cell,
    firings_at,
)
from writesae.evaluate.replacement import AMPLITUDES, rank_one, replacements
from writesae.harvesting import harvest
from writesae.hosts.base import Host, Run

HORIZONS = ("next", "writing", "mean")
DIRECTIONS = ("native_patched", "patched_native")
CONTROLS = ("delete", "random", "fresh", "mean_write", "resampled")
CHOICES = dict(
    target=("state", "write"),
    centre=("mean", "none"),
    write=("added", "effective"),
    pooling=("rounds", "most_firing", "positions"),
    amplitude=AMPLITUDES,
    reading=tuple(f"{s}, {h}" for s, h in product(SCOPES, HORIZONS) if (s, h) != ("cache", "writing")),
    kl_direction=DIRECTIONS,
    control=CONTROLS,
)
DRAWN = ("target", "centre", "write", "pooling")  # the choices that decide which firings there are
DEFAULT = {choice: levels[0] for choice, levels in CHOICES.items()}
PAPER = DEFAULT | dict(pooling="most_firing", kl_direction="patched_native")  # Sec. 2 and 3.2
MOST = 300  # maximum number of firings per atom when the most-firing atoms are pooled, as in the paper
PUT_IN = ("atom", *CONTROLS[1:])
ROWS = len(SCOPES) * (1 + len(AMPLITUDES) * len(PUT_IN))  # edited runs of one firing
FIRING = ["layer", "head", "atom", "passage", "window", "position"]


def both_ways(native: torch.Tensor, patched: torch.Tensor) -> torch.Tensor:
    """Return KL(native, patched) and KL(patched, native) in nats [2, ...], in fp64, of logits [..., V]."""
    p, q = F.log_softmax(native.double(), -1), F.log_softmax(patched.double(), -1)
    gap = p - q
    return torch.stack([(p.exp() * gap).sum(-1), -(q.exp() * gap).sum(-1)])


def fresh(seed: int, places: Places, d_k: int, d_v: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random unit rank-1 terms [n, 1, d_k], [n, 1, d_v], drawn from the seed and the firing."""
    drawn = places.draw(seed, lambda generator: torch.randn(d_k + d_v, generator=generator, dtype=torch.float64))
    return rank_one(*drawn.float().split([d_k, d_v], -1))


@torch.no_grad()
def measure(host: Host, run: Run, cell_sae: CellSAE, firings, places: Places, seed, horizon, batch_rows=512):
    """Return KLs in nats per (firing, read scope, amplitude), in columns CONDITION.HORIZON.DIRECTION.

    places: where the firings are in the run, with `horizon` further tokens after each."""
    pieces = places.pieces(ROWS, batch_rows)
    tables = [_measure(host, run, cell_sae, firings.iloc[x], some, seed, horizon) for x, some in pieces]
    where = dict(host=host.name, layer=cell_sae.layer, head=cell_sae.head, target=cell_sae.target, write=cell_sae.write)
    return pd.concat(tables, ignore_index=True).assign(**where)


def _measure(host, run, cell_sae, firings, places, seed, horizon) -> pd.DataFrame:
    factors = host.factors(run, cell_sae.layer, cell_sae.head)
    change, labels = _changes(factors, cell_sae, places, seed, horizon + 1)
    repeat = change.shape[1] * change.shape[2]
    rows, position = (x.repeat_interleave(repeat) for x in (places.row, places.position))
    hidden, _ = host.branch(run, cell_sae.layer, cell_sae.head, rows, position, change.flatten(0, 2))
    hidden = hidden.unflatten(0, change.shape[:3])
    steps = []  # of [2 directions, n, scopes, conditions]
    for step in range(horizon + 1):
        native = host.logits(run.final[places.row, places.position + step])[:, None, None]
        untouched = (change[..., : step + 1, :] == 0).flatten(-2).all(-1)  # then the run is the native one
        steps.append(both_ways(native, host.logits(hidden[..., step, :])).masked_fill(untouched, 0.0))
    steps = torch.stack(steps)
    divergences = dict(writing=steps[0], next=steps[1], mean=steps[1:].mean(0))
    tables = []
    for (s, scope), amplitude in product(enumerate(SCOPES), AMPLITUDES):
        columns = {
            f"{name}.{reading}.{direction}": divergences[reading][d, :, s, c].numpy()
            for c, (label, name) in enumerate(labels)
            for reading, (d, direction) in product(HORIZONS, enumerate(DIRECTIONS))
            if label in ("", amplitude)
        }
        tables.append(firings.assign(read=scope, amplitude=amplitude, **columns))
    return pd.concat(tables, ignore_index=True)


def _changes(factors, cell_sae, places, seed, steps) -> tuple[torch.Tensor, list]:
    """Return the head's changes [n, scopes, conditions, steps, d_v] and the conditions' (amplitude, name).

    A change is linear in its edit: each is computed once, at unit norm, and then scaled."""
    native = factors.at(places.row, places.position)
    key, write = native.key, native.write(cell_sae.write)
    put_in = replacements(cell_sae, places, factors, seed) | dict(native=(key[:, None], write[:, None]))
    put_in["fresh"] = fresh(seed, places, key.shape[-1], write.shape[-1])
    unit = {
        name: head_change(factors, make_edit(places.row, places.position, *put_in[name]), steps)[0]
        for name in (*PUT_IN, "native")
    }
    norms = dict(coefficient=places.coefficient.to(write), matched_norm=key.norm(dim=-1) * write.norm(dim=-1))
    labels = list(product(AMPLITUDES, PUT_IN))
    parts = [norms[amplitude][:, None, None] * unit[name] - unit["native"] for amplitude, name in labels]
    by_scope = torch.stack([torch.stack([-unit["native"], *parts], 1)] * len(SCOPES), 1)
    by_scope[:, SCOPES.index("cache"), :, 0] = 0
    return by_scope, [("", "delete"), *labels]


def most_firing(firings: pd.DataFrame, atoms: int, count: int, seed: int) -> pd.DataFrame:
    """Return `count` firings of the `atoms` most-firing atoms, at most MOST of each. ValueError for fewer."""
    most = firings.atom.value_counts().index[:atoms]
    shuffled = firings[firings.atom.isin(most)].sample(frac=1.0, random_state=seed)
    return draw_in_rounds(shuffled.groupby("atom").head(MOST), count, seed)


def draws(study: Study, name: str, settings) -> list[tuple[CellSAE, pd.DataFrame]]:
    """Return (SAE, firings) of every cell, target and write, drawn before any outcome is measured.

    settings.firings are shared equally among the host's early, middle and late cells."""
    profile, windows = study.profile, study.windows(name, "heldout")[slice(0, settings.windows)]
    places = {study.cell(name, place): place for place in profile.hosts[name].paper_places}
    factors = harvest(study.host(name), windows.tokens, list(places), profile.data.batch_windows, progress=False)
    count, drawn = settings.firings // len(places), []
    first, last = profile.data.first_position, windows.tokens.shape[1] - settings.horizon
    positions = draw_positions(windows.passage, first, last, count, profile.seed)
    for cell, target, centre in product(places, profile.saes.targets, CHOICES["centre"]):
        for write in write_definitions(factors[cell]):
            cell_sae = encode_cell(cell, target, write, _sae(study, name, cell, target, centre, write), factors[cell])
            every = all_firings(cell_sae, windows.passage, first, last)
            pools = dict(rounds=draw_in_rounds(every, count, profile.seed))
            pools["most_firing"] = most_firing(every, settings.atoms, count, profile.seed)
            pools["positions"] = firings_at(cell_sae, positions)
            labels = dict(place=places[cell], centre=centre)
            drawn += [(cell_sae, pool.assign(**labels, pooling=x)) for x, pool in pools.items()]
    return drawn


def _sae(study: Study, name: str, cell, target: str, centre: str, write: str):
    """Return the SAE of a cell with the profile's seed."""
    if target == "state" or write == study.profile.saes.write:
        return study.sae(name, *cell, target, main_role(study, centre, study.profile.seed))
    return study.sae(name, *cell, target, other_role(centre), write)


def firings_of_host(study: Study, name: str, settings) -> pd.DataFrame:
    """Return a host's firings under every condition (`measure`), with place and pooling; kept in build/."""
    windows = study.windows(name, "heldout")[slice(0, settings.windows)]
    options = dict(horizon=settings.horizon, batch_rows=settings.batch_rows)
    drawn = draws(study, name, settings)
    return run_firings(study, name, "multiverse_firings", windows, drawn, measure, **options)


def run(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write results multiverse (one row per universe) and multiverse_effects (one per level of a choice).

    The firings stay in build/, for they are as large as all other tables together."""
    lines, effect = [], []
    for name in study.profile.hosts:
        settings = study.profile.section("multiverse", name)
        if others := other_specs(study, name):
            train_all(study, others)
        won = gains(firings_of_host(study, name, settings))
        lines.append(universes(won, settings.bootstrap, study.profile.seed))
        effect.append(effects(won, lines[-1], settings.bootstrap, study.profile.seed))
    tables = dict(multiverse=lines, multiverse_effects=effect)
    return tuple(study.write(name, pd.concat(parts, ignore_index=True)) for name, parts in tables.items())


def gains(firings: pd.DataFrame) -> pd.DataFrame:
    """Return one row per (firing, universe) with `gain`: the control's KL minus the atom's, in nats."""
    kept, parts = ["host", "place", *FIRING, *DRAWN, "amplitude"], []
    for reading, direction, control in product(CHOICES["reading"], DIRECTIONS, CONTROLS):
        scope, horizon = reading.split(", ")
        part = firings[firings.read == scope]
        gain = part[f"{control}.{horizon}.{direction}"] - part[f"atom.{horizon}.{direction}"]
        parts.append(part[kept].assign(reading=reading, kl_direction=direction, control=control, gain=gain))
    return pd.concat(parts, ignore_index=True)


def universes(won: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return one row per universe, pooled over the host's cells.

    win_rate: the share of firings with a positive gain, with Wilson's interval (ci) and the bootstraps by
    atom (boot) and by passage."""
    tables, rest = [], [choice for choice in CHOICES if choice not in DRAWN]
    for values, part in won.groupby(["host", *DRAWN], sort=False):
        wide = part.pivot(index=FIRING, columns=rest, values="gain")
        firing, win = wide.index.to_frame(index=False), (wide > 0).to_numpy(dtype=float)
        wins, n = win.sum(0).astype(int).tolist(), len(win)
        low, high = np.array([wilson(count, n) for count in wins]).T
        where, atoms = dict(zip(["host", *DRAWN], values, strict=True)), atom_names(firing)
        table = wide.columns.to_frame(index=False)
        table = table.assign(**where, n=n, win_rate=win.mean(0), ci_low=low, ci_high=high)
        for kind, clusters in dict(boot=atoms, passage=firing.passage).items():
            ends = cluster_bootstrap(win, clusters, resamples=resamples, seed=seed)
            table[f"{kind}_low"], table[f"{kind}_high"] = ends
        table["median_gain"] = wide.median().to_numpy()
        tables.append(table.assign(n_atoms=atoms.nunique(), n_passages=firing.passage.nunique()))
    whole = pd.concat(tables, ignore_index=True)
    return whole[["host", *CHOICES, *(name for name in whole if name not in ("host", *CHOICES))]]


def effects(won: pd.DataFrame, lines: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return one row per (host, choice, level), for the choices that have several levels on the host.

    mean_win_rate: over the universes with that level; bootstrap by atom. difference: from the first level, by
    one least-squares fit of wins on all choices, with errors clustered by atom (ci) and by passage. share: of
    the variance of win rates over universes, the part that the choice explains alone. decides: the share of
    settings of the other choices in which this choice alone moves the win rate across one half."""
    rows = []
    for host, part in won.groupby("host", sort=False):
        of_host, win = lines[lines.host == host], (part.gain > 0).to_numpy(dtype=float)
        levels = {c: [x for x in possible if (of_host[c] == x).any()] for c, possible in CHOICES.items()}
        levels = {choice: several for choice, several in levels.items() if len(several) > 1}
        # one SAE of states for both writes
        sae = part.target + part.centre + part.write.where(part.target == "write", "")
        atoms, passages = (np.unique(x, return_inverse=True)[1] for x in (atom_names(part) + sae, part.passage))
        fitted = _fit(win, part, levels, (atoms, passages))
        for choice, several in levels.items():
            means = of_host.groupby(choice).win_rate
            share = means.mean().var(ddof=0) / of_host.win_rate.var(ddof=0)
            others = [other for other in CHOICES if other != choice]
            above = of_host.pivot(index=others, columns=choice, values="win_rate") > 0.5
            decides = (above.any(axis=1) & ~above.all(axis=1)).mean()
            for level in several:
                picked = (part[choice] == level).to_numpy()
                low, high = cluster_bootstrap(win[picked], atoms[picked], resamples=resamples, seed=seed)
                row = dict(host=host, choice=choice, level=level, universes=int(means.size()[level]))
                row |= dict(mean_win_rate=means.mean()[level], mean_low=low, mean_high=high)
                row |= dict(lowest=means.min()[level], highest=means.max()[level])
                rows.append(row | fitted[choice, level] | dict(share=share, decides=decides))
    return pd.DataFrame(rows)


def _fit(win: np.ndarray, part: pd.DataFrame, levels: dict, clusterings) -> dict:
    """Return (choice, level) -> difference from the choice's first level, with one interval per clustering.

    The interval is nan for a clustering with a single cluster."""
    names = [(choice, level) for choice, several in levels.items() for level in several[1:]]
    design = sm.add_constant(np.stack([(part[c] == x).to_numpy(dtype=float) for c, x in names], 1))
    model, ends = sm.OLS(win, design), []
    for groups in clusterings:
        several = groups.min() < groups.max()
        result = model.fit(cov_type="cluster", cov_kwds=dict(groups=groups)) if several else model.fit()
        ends.append(result.conf_int()[1:] if several else np.full((len(names), 2), np.nan))
    columns = ["difference", "ci_low", "ci_high", "passage_low", "passage_high"]
    first = {(choice, several[0]): dict.fromkeys(columns, 0.0) for choice, several in levels.items()}
    values = np.c_[result.params[1:], *ends]
    return first | {name: dict(zip(columns, row, strict=True)) for name, row in zip(names, values, strict=True)}


# For readers


def shown_universes(universes: pd.DataFrame, some: dict[str, dict]) -> pd.DataFrame:
    """Return some universes of every host for a reader. some: name -> level of each choice."""
    rows = pd.concat([rows_with(universes, **levels).assign(universe=name) for name, levels in some.items()])
    columns = {"firings": rows.n, "atoms": rows.n_atoms}
    columns |= {"win rate (%)": layout.estimates(rows, "win_rate", "boot_low", "boot_high")}
    columns |= {"median gain (millinats)": layout.numbers(rows.median_gain, ".3f", 1000)}
    return layout.shown(rows, ["universe", "host"], columns)


def shown_effects(effects: pd.DataFrame) -> pd.DataFrame:
    """Return the effect of every level of every choice for a reader, in percent and points."""
    names = [level_name(*pair) for pair in zip(effects.choice, effects.level, strict=True)]
    columns = {"universes": layout.numbers(effects.universes, ",.0f")}
    columns |= {"mean win rate (%)": layout.estimates(effects, "mean_win_rate", "mean_low", "mean_high")}
    columns |= {"difference (points)": layout.estimates(effects, "difference", "ci_low", "ci_high", digits=1)}
    columns |= {"share (%)": layout.numbers(effects["share"], ".0f", 100)}
    columns |= {"decides (%)": layout.numbers(effects.decides, ".0f", 100)}
    return layout.shown(effects.assign(level=names), ["host", "level"], columns)
