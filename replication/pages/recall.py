"""Page 17: dictionaries of writes whose meaning is known, against the side of the state and the load.

Hosts are those of models/recall (`python -m replication train-recall`), one per family and side d_k = d_v.
The *load* is the number of pairs per context. SAEs train on contexts of CORPUS, of a load of a quarter of the
side, and are tested on others; definitions are in `writesae.evaluate.recall`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from replication import layout
from replication import statistics as stats
from replication.plots import CENTRE_NAMES, HOST
from replication.study import paths
from replication.study.profile import Recall
from replication.study.study import Study
from writesae.evaluate.firings import encode_cell
from writesae.evaluate.recall import (
    Task,
    Trials,
    associations,
    replaced,
    rewritten,
    true_dictionary,
    true_writes,
)
from writesae.hosts.base import Host
from writesae.hosts.load import adapter, load_host
from writesae.sae.model import SAE
from writesae.sae.train import evaluate, train

FAMILIES = ("gated_deltanet", "mamba2", "rwkv7")
FOLDER = paths.ROOT / "models" / "recall"
EVERY = Task(keys=256, values=64)  # what the hosts have learnt
CORPUS = Task(keys=256, values=64, shown=64, choices=2)  # 128 associations, for the SAEs
LOADS = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # pairs per context in units of the side
LOAD = 1 / 4  # at which SAEs are trained and compared between sides
SIDE = 32  # of the comparisons of variants and of loads
QUERIES = 16  # per context, at most
MOST_TOKENS = 2**14  # of the contexts of a load together
TOKENS = 256  # per training step
LEARNT = 0.5  # share of right answers from which a host counts at a load
WORKS = 0.9  # share of right answers that an atom which works keeps
FOUND = 0.9  # cosine of an atom to a true write


@dataclass(frozen=True)
class Variant:
    """An SAE: its target ("truth": the true dictionary), its offset, active atoms and atoms."""

    target: str
    centre: str
    k: int
    n_atoms: int


MAIN = Variant("write", "none", 1, 256)
TRUTH = Variant("truth", "none", 1, 128)
OTHERS = (
    Variant("write", "none", 1, 128),
    Variant("write", "mean", 1, 256),
    Variant("write", "none", 4, 256),
    Variant("state", "none", 4, 256),
)
KEYS = ["family", "side", "pairs"]
VARIANT = ["target", "centre", "k", "n_atoms"]


def every_host(study: Study) -> pd.DataFrame:
    """Return the rows of `of_host` for all hosts; kept in build/."""
    settings = study.profile.recall
    names = [f"{family}-{side}" for side in settings.sides for family in FAMILIES]
    weights = {name: FOLDER / name / "model.safetensors" for name in names}
    code = [adapter(family).mix for family in FAMILIES]
    given = dict(weights=weights, settings=settings, seed=study.profile.seed, code=code)
    return study.stage("recall", study.main, names, of_host, **given)


def of_host(name: str, weights: dict[str, Path], settings: Recall, seed: int, code: list) -> pd.DataFrame:
    """Return three kinds of rows (column `of`) of one host.

    "host": one per held-out context and load, of EVERY: answers, the share of right answers, and `rewritten`.
    "association": those of `associations`, per SAE (VARIANT, sae_seed), with its fvu. "write": those of
    `replaced`, per SAE and load. code: the families' code, for the fingerprint of the stage."""
    family, side = name.rsplit("-", 1)
    host, side = load_host(weights[name].parent), int(side)
    tables = []
    for pairs in sorted({max(1, int(load * side)) for load in LOADS}):
        trials = _trials(host, EVERY, pairs, settings, seed)
        answers = trials.right.double().mean(1).numpy()
        tables.append(rewritten(trials, EVERY, seed).assign(of="host", pairs=pairs, answers=answers))
    tables += list(_of_saes(host, side, settings, seed))
    tables = [table.astype(dict.fromkeys(table.select_dtypes("bool"), int)) for table in tables]
    return pd.concat(tables, ignore_index=True).assign(family=family, side=side)


def _trials(host: Host, task: Task, pairs: int, settings: Recall, seed: int) -> Trials:
    queries, generator = min(pairs, QUERIES), torch.Generator().manual_seed(1000 * seed + pairs)
    count = min(settings.contexts, MOST_TOKENS // (2 * pairs + 2 * queries))
    return Trials(host, task.draw(count, pairs, queries, generator), seed)


def _of_saes(host: Host, side: int, settings: Recall, seed: int) -> Iterator[pd.DataFrame]:
    """Yield the tables of the SAEs of a host."""
    main = int(LOAD * side)
    loads = [int(load * side) for load in LOADS] if side == SIDE else [main]
    trials = {pairs: _trials(host, CORPUS, pairs, settings, seed) for pairs in loads}
    writes = true_writes(host, CORPUS)
    for variant, number, sae, fvu in _saes(host, side, settings, seed, writes):
        target = "write" if variant is TRUTH else variant.target
        labels = asdict(variant) | dict(sae_seed=number, fvu=fvu)
        for pairs in loads if variant in (MAIN, TRUTH) else [main]:
            cell_sae = encode_cell(host.cells[0], target, "added", sae, trials[pairs].factors)
            yield replaced(trials[pairs], cell_sae, seed).assign(of="write", pairs=pairs, **labels)
            if pairs == main:
                table = associations(cell_sae, trials[pairs].contexts, CORPUS, writes)
                yield table.assign(of="association", pairs=pairs, **labels)


def _saes(host: Host, side: int, settings: Recall, seed: int, writes) -> Iterator[tuple[Variant, int, SAE, float]]:
    """Yield the SAEs of a host: variant, seed, SAE, and the FVU on other contexts."""
    yield TRUTH, 0, true_dictionary(*writes), np.nan
    pairs, generator = int(LOAD * side), torch.Generator().manual_seed(seed)
    contexts = CORPUS.draw(settings.pairs // pairs + settings.contexts, pairs, 1, generator)
    run = host.run(contexts.tokens[:, : 2 * pairs])
    factors = host.factors(run, *host.cells[0])
    size = max(1, TOKENS // (2 * pairs))
    for variant in (MAIN, *OTHERS) if side == SIDE else (MAIN,):
        history = factors.history(variant.target, "added")
        heldout, training = history[: settings.contexts], history[settings.contexts :]
        for number in settings.seeds:
            shape = dict(centre=variant.centre, k=variant.k, n_atoms=variant.n_atoms)
            chosen = settings.training.model_copy(update=shape | dict(batch_windows=size, seed=number))
            sae, _ = train(training, chosen, progress=False)
            yield variant, number, sae, evaluate(sae, heldout)[0]


# Summaries


def hosts(table: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return one row per host and load: n contexts; the shares below, with bootstraps by context.

    answers: right answers. Of the drawn queries that are answered right (n_right): says_new, the value of a
    counterfactual write is said; kept_delete, the answer is still right without the write; others: of the
    other right answers, the share that is still right after either edit."""
    rows = table[table.of == "host"]
    both = rows[["others_counterfactual", "others_delete"]].mean(axis=1)

    def row(part: pd.DataFrame) -> dict:
        right = part[part.right.astype(bool)]
        numbers = dict(n=len(part), n_right=len(right))
        chosen = dict(answers=part, says_new=right, kept_delete=right, others=right.dropna(subset="others"))
        for name, those in chosen.items():
            numbers |= share(those[name].astype(float), those.context, resamples=resamples, seed=seed)
        return numbers

    return stats.per_group(rows.assign(others=both), KEYS, row)


def share(values: pd.Series, places: pd.Series, weights=1.0, trainings=None, **options) -> dict:
    """Return a (weighted) share as NAME, NAME_low, NAME_high (NAME: that of the values); nan without values.

    The interval covers other places and trainings; for no or only events it is that of a zero count."""
    if not len(values):
        return stats.with_ends(values.name, np.nan, stats.Interval(np.nan, np.nan))
    weighted = np.stack([values * weights, np.broadcast_to(weights, len(values))], 1)
    estimate = stats.over_trainings(weighted, places, trainings=trainings, **options)
    if estimate.value in (0, 1):
        estimate = stats.rarely(estimate._replace(value=0), 0, places.nunique())._replace(value=estimate.value)
    low, high = estimate.interval()
    return stats.with_ends(values.name, estimate.value, stats.Interval(max(0.0, low), min(1.0, high)))


def saes(table: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return one row per host, load and SAE variant, with 95% intervals that cover retraining.

    answers: of the drawn queries, the share that is answered right natively. own, pure, found (cosine of at
    least FOUND): shares of associations (pure: of pairs), where SAEs are compared only. Of the n queries
    answered right natively: kept_CONDITION; win: the atom loses less than deletion."""
    rows = table[table.of == "write"].assign(win=lambda x: (x.loss_atom < x.loss_delete).astype(float))
    meanings = table[table.of == "association"]
    conditions = [f"kept_{name}" for name in ("atom", "matched", "reconstruction", "random", "delete")]
    options = dict(resamples=resamples, seed=seed)

    def row(part: pd.DataFrame) -> dict:
        right = part[part.right.astype(bool)]
        numbers = dict(trainings=part.sae_seed.nunique(), n=right.context.nunique(), fvu=part.fvu.mean())
        numbers["answers"] = part.right.astype(float).mean()
        for name in [*conditions, "win"]:
            numbers |= share(right[name].astype(float), right.context, trainings=right.sae_seed, **options)
        return numbers

    def meaning(part: pd.DataFrame) -> dict:
        found = (part.cosine >= FOUND).astype(float).rename("found")
        same = dict(trainings=part.sae_seed, **options)
        numbers = share(part.own.astype(float), part.association, **same)
        numbers |= share(part.pure.astype(float), part.association, weights=part.n.to_numpy(float), **same)
        return numbers | share(found, part.association, **same)

    keys = KEYS + VARIANT
    summary = stats.per_group(rows, keys, row).merge(stats.per_group(meanings, keys, meaning), on=keys, how="left")
    return summary.astype(dict(k=int, n_atoms=int))


# For the notebook


def of_variant(summary: pd.DataFrame, variant: Variant = MAIN) -> pd.DataFrame:
    """Return the rows of a variant, of the hosts that have learnt the task at that load."""
    chosen = (summary[VARIANT] == pd.Series(asdict(variant))).all(axis=1)
    return summary[chosen & (summary.answers >= LEARNT)]


def against_side(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the rows at the load LOAD."""
    return summary[summary.pairs == (LOAD * summary.side).astype(int)]


def readable_hosts(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the hosts at the loads of a quarter, one and two pairs per row of the state."""
    some = summary[(summary.pairs / summary.side).isin([LOAD, 1, 2])]
    names = dict(answers="right (%)", says_new="counterfactual said (%)", kept_delete="right without the write (%)")
    names |= dict(others="other pairs still right (%)")
    columns = {"contexts": some.n} | {heading: layout.estimates(some, name) for name, heading in names.items()}
    return layout.shown(some.rename(columns=dict(family="host")), ["host", "side", "pairs"], columns)


def readable(summary: pd.DataFrame) -> pd.DataFrame:
    """Return rows of `saes`: what the SAE is, what associations it has found, and what its atoms keep."""
    words = [
        "the true writes"
        if x.target == "truth"
        else f"SAE of {x.target}s, {CENTRE_NAMES[x.centre]}, k = {int(x.k)}, {int(x.n_atoms)} atoms"
        for x in summary.itertuples()
    ]
    names = dict(own="own atom (%)", pure="purity (%)", found="direction found (%)", kept_atom="atom keeps (%)")
    names |= dict(kept_matched="at the write's norm (%)", kept_reconstruction="all active atoms (%)")
    columns = {heading: layout.estimates(summary, name) for name, heading in names.items()}
    rows = summary.assign(dictionary=words, host=summary.family.map(HOST) + " " + summary.side.astype(str))
    return layout.shown(rows, ["host", "dictionary"], columns)


def span(table: pd.DataFrame, name: str) -> str:
    """Return the smallest and the largest of some shares, in percent; in words if there are none."""
    if not table[name].notna().any():
        return "an unknown share"
    low, high = 100 * table[name].min(), 100 * table[name].max()
    return f"{low:.0f}%" if round(low) == round(high) else f"{low:.0f}% to {high:.0f}%"


def answer(summary: pd.DataFrame) -> str:
    """Return the answer to the page's question, as Markdown: at what side atoms still keep answers."""
    main, ceiling = (against_side(of_variant(summary, x)).sort_values("side") for x in (MAIN, TRUTH))
    largest, smallest = (main[main.side == side] for side in (main.side.max(), main.side.min()))
    works = largest.kept_atom_low > WORKS
    verdicts = [("Yes on", largest[works]), ("not on", largest[largest.kept_atom_high < WORKS])]
    verdicts.append(("not settled on", largest.drop(verdicts[0][1].index).drop(verdicts[1][1].index)))
    words = "; ".join(f"{word} {', '.join(x.family.map(HOST))}" for word, x in verdicts if len(x))
    of_families = "; ".join(
        f"{HOST[family]} " + ", ".join(f"{100 * x.kept_atom:.0f}% ({x.side})" for x in part.itertuples())
        for family, part in main.groupby("family")
    )
    left_out = against_side(summary[(summary.target == "truth") & (summary.answers < LEARNT)])
    names = ", ".join(f"{HOST[x.family]} {x.side} ({100 * x.answers:.0f}%)" for x in left_out.itertuples())
    return (
        f"**Do rank-1 atoms still work where d_k and d_v are larger? {words}** (yes: at side {main.side.max()} the whole "
        f"interval of the answers kept is above {WORKS:.0%}), on hosts in which one association is one write. "
        f"The atom of an SAE with one active atom, in the place of the write, keeps this share of "
        f"the right answers (the side in brackets): {of_families}; up to {main.n.max()} queries and {main.trainings.min()} "
        f"trainings each. At side {main.side.max()}, {span(largest, 'own')} of the associations have an atom of their own "
        f"(at {main.side.min()}: {span(smallest, 'own')}), and the purity is {span(largest, 'pure')} "
        f"({span(smallest, 'pure')}). Another atom keeps {span(main, 'kept_random')}, nothing "
        f"{span(main, 'kept_delete')}, and an atom of the true dictionary {span(ceiling, 'kept_atom')}."
        + (f" Left out, because they answer less than half of the queries right: {names}." if names else "")
    )
