"""Page 16: who reads what was written, by the exact attention map of a recurrent head.

At token t, the size of the part of the head's read that the write of token s brings is |weight_ts|
||added_s|| (`writesae.evaluate.attribution`). A *share* is such a size divided by the sum of sizes over all s
at that t; parts may also point against one another (column opposed)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from replication import layout
from replication import statistics as stats
from replication.classes import alive_atoms
from replication.study.firings import encoded_saes, firing_windows, firings_of, passage_prompts
from replication.study.study import Study
from writesae.evaluate.attribution import logit_parts, overwriters, shares, survival, weights, without_erase
from writesae.evaluate.cells import state_reads
from writesae.hosts.base import Host
from writesae.text import Windows

CELL = ["host", "layer", "head"]
NEAR = 8  # tokens: the last eight, and what is farther
FEWEST = 20  # occurrences of a token id whose writes are averaged
SHARES = ("share_own", "share_last_8", "decay_error", "opposed", "half_distance")


# Every cell


def every_cell(study: Study) -> pd.DataFrame:
    """Write results attribution.csv, one row per passage and cell of every host. Return it.

    Over the tokens from position `horizon` on: share_own, share_last_8: of the token's own write, and of the
    last NEAR (its own included); half_distance: the distance in tokens within which half of the shares lie;
    error: largest difference between the map times the writes and the head's own read, relative to the
    largest read; decay_error: size of the error of the map without erasures, relative to the reads; opposed:
    the share of the parts, along the read, that points against it."""
    tables = []
    for name in study.profile.hosts:
        section = study.profile.section("attribution", name)
        windows, host = passage_prompts(study, name, section.passages, section.tokens), study.host(name)
        given = dict(host=host, windows=windows, horizon=section.horizon)
        tables.append(study.stage("attribution", name, host.recurrent_layers, of_layer, **given))
    return study.gather("attribution", tables)


def of_layer(layer: int, host: Host, windows: Windows, horizon: int) -> pd.DataFrame:
    """Return the rows of all heads of a layer."""
    run, tables = host.run(windows.tokens, upto=layer + 1), []
    for head in range(host.heads):
        factors = host.factors(run, layer, head)
        found = weights(factors)
        share = shares(found, factors)
        read = state_reads(run.records[layer], head).to(found)
        error = (found @ factors.added - read)[:, horizon:]
        decayed = ((weights(without_erase(factors)) - found) @ factors.added)[:, horizon:]
        along = (found * (read @ factors.added.mT))[:, horizon:]
        places = torch.arange(share.shape[1])
        columns = dict(
            share_own=share.diagonal(dim1=1, dim2=2)[:, horizon:].mean(1),
            share_last_8=(share * (places[:, None] - places < NEAR))[:, horizon:].sum(-1).mean(1),
            half_distance=_half_distance(share, horizon),
            error=error.abs().flatten(1).max(1).values / read[:, horizon:].abs().flatten(1).max(1).values,
            decay_error=decayed.flatten(1).norm(dim=1) / read[:, horizon:].flatten(1).norm(dim=1),
            opposed=-along.clamp(max=0).sum((1, 2)) / along.abs().sum((1, 2)),
        )
        table = pd.DataFrame({name: x.numpy() for name, x in columns.items()})
        tables.append(table.assign(host=host.name, layer=layer, head=head, passage=windows.passage.numpy()))
    return pd.concat(tables, ignore_index=True)


def _half_distance(shares: Tensor, horizon: int) -> Tensor:
    """Return the distance [B] within which half of the mean share lies, over reads from `horizon` on."""
    profile = torch.stack(
        [shares.diagonal(-d, 1, 2)[:, max(0, horizon - d) :].sum(1) for d in range(shares.shape[1])], 1
    )
    return (profile.cumsum(1) / profile.sum(1, keepdim=True) < 0.5).sum(1)


def summarise(table: pd.DataFrame, cells: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return one row per cell: means over passages (half_distance: median), with bootstraps by passage.

    cells: all_cells.csv, for the half-life. error: the largest of all passages.
    """

    def row(part: pd.DataFrame) -> dict:
        numbers = dict(n=len(part), error=part.error.max())
        for name in SHARES:
            statistic = np.median if name == "half_distance" else np.mean
            ends = stats.cluster_bootstrap(part[name], part.passage, statistic, resamples, seed)
            numbers |= stats.with_ends(name, statistic(part[name]), ends)
        return numbers

    return stats.per_group(table, CELL, row).merge(cells[[*CELL, "half_life_median"]], on=CELL)


def trend(summary: pd.DataFrame) -> pd.DataFrame:
    """Return per host: medians over cells, and Spearman's rho of the half-distance with the half-life."""

    def row(part: pd.DataFrame) -> dict:
        rho = stats.spearman(part.half_distance, part.half_life_median)
        numbers = {name: part[name].median() for name in SHARES} | dict(cells=len(part), error=part.error.max())
        return numbers | stats.with_ends("rho", rho.value, rho)

    return stats.per_group(summary, ["host"], row)


# The chosen cells


def middle_cells(study: Study) -> pd.DataFrame:
    """Return one row per write of a firing in the middle cell of every host; kept in build/.

    Writes of the held-out windows, of the tokens from first_position on, except for the last `horizon` of a
    window. token: id. atom, class: of the write-trained SAE's firing there. far: the write's mean share in
    reads NEAR to `horizon` tokens later. reach: the share of those among all reads of the write, within
    `horizon` tokens. left: what is left of its key when the last of these reads, decay: what the decay alone
    would leave. erased: the share of its key that one token erased, after `wait` tokens; same_token: whether
    that token had the same id, by_chance: the share of the later tokens with it."""
    tables = []
    for name in study.profile.hosts:
        windows, cell = firing_windows(study, name), study.cell(name, "middle")
        (cell_sae,) = [x for x in encoded_saes(study, name, [cell], "main", windows) if x.target == "write"]
        firings = firings_of(study, cell_sae, windows)
        classes = alive_atoms(name, cell_sae, firings, study.profile.seed).set_index("atom")["class"]
        firings = firings.assign(**{"class": firings.atom.map(classes)})
        size = study.profile.data.batch_windows
        given = dict(host=study.host(name), windows=windows, cell=cell, firings=firings, size=size)
        given |= dict(horizon=study.profile.section("attribution", name).horizon)
        tables.append(study.stage("attribution_writes", name, range(0, len(windows), size), of_windows, **given))
    return pd.concat(tables, ignore_index=True)


def of_windows(
    start: int, host: Host, windows: Windows, cell, firings: pd.DataFrame, size: int, horizon: int
) -> pd.DataFrame:
    """Return the rows of the writes of `size` windows."""
    part = windows[slice(start, start + size)]
    factors = host.factors(host.run(part.tokens, upto=cell[0] + 1), *cell)
    found = weights(factors)
    length = found.shape[1]
    chosen = firings[firings.window.between(start, start + size - 1) & (firings.position < length - horizon)]
    row, s = torch.tensor((chosen.window - start).to_numpy()), torch.tensor(chosen.position.to_numpy())
    later = s[:, None] + torch.arange(horizon)
    read, share = (x[row[:, None], later, s[:, None]] for x in (found.abs(), shares(found, factors)))
    columns = dict(
        token=part.tokens[row, s],
        far=share[:, NEAR:].mean(1),
        reach=read[:, NEAR:].sum(1) / read.sum(1),
        left=survival(factors)[row, s + horizon - 1, s] / factors.key[row, s].norm(dim=-1),
        decay=survival(without_erase(factors))[row, s + horizon - 1, s] / factors.key[row, s].norm(dim=-1),
    )
    if factors.erase is not None:
        which, erased = overwriters(factors)
        columns |= dict(erased=erased[row, s], wait=which[row, s] - s)
        columns["same_token"] = (part.tokens[row, which[row, s]] == columns["token"]).double()
        same = part.tokens[row] == columns["token"][:, None]
        after = torch.arange(length) > s[:, None]
        columns["by_chance"] = (same & after).sum(1) / after.sum(1)
    table = chosen.assign(**{name: x.numpy() for name, x in columns.items()})
    return table.assign(host=host.name, layer=cell[0], head=cell[1]).reset_index(drop=True)


def remembered(writes: pd.DataFrame, study: Study, count: int = 6) -> pd.DataFrame:
    """Write results attribution_tokens.csv: per host, the tokens whose writes are read most and least, later.

    Token ids with at least FEWEST writes. ratio: the mean of `far` over the writes of the id divided by that
    over all writes; interval: bootstrap by passage. rank: from the most remembered."""
    tables = []
    for name, part in writes.groupby("host", sort=False):
        often = part[part.groupby("token").token.transform("size") >= FEWEST]
        ratios = (often.groupby("token").far.mean() / part.far.mean()).sort_values(ascending=False)
        for rank in sorted({*range(count), *range(len(ratios) - count, len(ratios))} & set(range(len(ratios)))):
            rows = part[part.token == ratios.index[rank]]
            ends = stats.cluster_bootstrap(rows.far / part.far.mean(), rows.passage, seed=study.profile.seed)
            text = repr(study.host(name).tokenizer.decode([int(ratios.index[rank])]))
            row = dict(host=name, rank=rank + 1, of=len(ratios), token=int(ratios.index[rank]))
            row |= dict(text=text, n=len(rows))
            tables.append(row | stats.with_ends("ratio", ratios.iloc[rank], ends))
    columns = ["host", "rank", "of", "token", "text", "n", "ratio", "ratio_low", "ratio_high"]
    return study.write("attribution_tokens", pd.DataFrame(tables, columns=columns))


def fates(writes: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return per host what becomes of writes, with bootstrap intervals by passage.

    left, decay, erased, wait: medians (erased, wait: of the token that erased most). all_erased: 1 -
    mean(left) / mean(decay), what all tokens erased of what the decay left. same_token: the share of writes
    whose strongest eraser has the same id; by_chance: if it were a random later token. The last five are
    missing where nothing is erased."""

    def row(part: pd.DataFrame) -> dict:
        numbers = dict(n=len(part), left=part.left.median(), decay=part.decay.median())
        if part.erased.isna().all():
            return numbers
        kept = stats.ratio_bootstrap(part.left, part.decay, part.passage, resamples, seed)
        ends = stats.Interval(1 - kept.high, 1 - kept.low)
        numbers |= stats.with_ends("all_erased", 1 - part.left.mean() / part.decay.mean(), ends)
        numbers |= dict(erased=part.erased.median(), wait=part.wait.median(), by_chance=part.by_chance.mean())
        ends = stats.cluster_bootstrap(part.same_token, part.passage, resamples=resamples, seed=seed)
        return numbers | stats.with_ends("same_token", part.same_token.mean(), ends)

    return stats.per_group(writes, ["host"], row)


def by_class(writes: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return the reach of the writes of each class of atoms, the mean over atoms; bootstrap by atom.

    within: standard deviation over the atoms of the class, of their means.
    """
    atoms = writes.groupby(["host", "class", "atom"], as_index=False).agg(reach=("reach", "mean"), n=("reach", "size"))

    def row(part: pd.DataFrame) -> dict:
        ends = stats.cluster_bootstrap(part.reach, part.atom, resamples=resamples, seed=seed)
        numbers = dict(n_atoms=len(part), n=int(part.n.sum()), within=part.reach.std())
        return numbers | stats.with_ends("reach", part.reach.mean(), ends)

    return stats.per_group(atoms, ["host", "class"], row, sort=True)


# A few passages


def example(study: Study, host_name: str, tokens: int) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """Return one passage's tokens as text, the maps of the middle cell with and without erasures, [T, T]
    each, in shares that keep the sign, and what each write adds to the logit of the next token, [T]."""
    windows, host = passage_prompts(study, host_name, 1, tokens), study.host(host_name)
    run, cell = host.run(windows.tokens), study.cell(host_name, "middle")
    factors, maps = host.factors(run, *cell), []
    for these in (factors, without_erase(factors)):
        parts = (weights(these) * these.added.norm(dim=-1)[:, None])[0]
        maps.append(parts / parts.abs().sum(-1, keepdim=True))
    top = host.logits(run.final[:, -1]).argmax(-1)
    text = [host.tokenizer.decode([i]) for i in windows.tokens[0].tolist()]
    return text, *maps, logit_parts(host, run, *cell, top)[0]


# For readers


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return `trend` for a reader: medians over the cells of a host."""
    columns = {"cells": table.cells, "own write (%)": layout.numbers(table.share_own, ".0f", 100)}
    columns |= {"last 8 writes (%)": layout.numbers(table.share_last_8, ".0f", 100)}
    columns |= {"half within (tokens)": layout.numbers(table.half_distance, ".1f")}
    columns |= {"rank correlation with half-life": layout.plain(table, "rho")}
    return layout.shown(table, ["host"], columns | {"error without erasures": layout.numbers(table.decay_error)})


def readable_fates(table: pd.DataFrame) -> pd.DataFrame:
    """Return `fates` for a reader."""
    columns = {"writes": layout.numbers(table.n, ",.0f"), "left (%)": layout.numbers(table.left, ".1f", 100)}
    columns |= {"left by the decay (%)": layout.numbers(table.decay, ".1f", 100)}
    columns |= {"erased of that (%)": layout.estimates(table, "all_erased")}
    columns |= {"erased by one token (%)": layout.numbers(table.erased, ".1f", 100)}
    columns |= {"same token id (%)": layout.estimates(table, "same_token", digits=1)}
    return layout.shown(table, ["host"], columns | {"by chance (%)": layout.numbers(table.by_chance, ".1f", 100)})


def readable_classes(classes: pd.DataFrame) -> pd.DataFrame:
    """Return `by_class` for a reader."""
    columns = {"atoms": classes.n_atoms, "writes": layout.numbers(classes.n, ",.0f")}
    columns |= {"reach (%)": layout.estimates(classes, "reach", digits=1)}
    columns |= {"sd within the class (points)": layout.numbers(classes.within, ".1f", 100)}
    return layout.shown(classes, ["host", "class"], columns)


def readable_tokens(table: pd.DataFrame) -> pd.DataFrame:
    """Return the most and the least remembered tokens of every host, each with the ratio of its share."""
    ratios = layout.plain(table, "ratio")
    texts = [f"{text} {ratio}" for text, ratio in zip(table.text, ratios, strict=True)]
    ranks = table["rank"].astype(str) + " of " + table.of.astype(str)
    return layout.across(table.assign(rank=ranks), ["rank"], "host", texts)


def largest_parts(study: Study, host_name: str, tokens: int, count: int = 6) -> pd.DataFrame:
    """Return the writes of the example that change the logit most: token, how many tokens ago, and nats."""
    text, _, _, parts = example(study, host_name, tokens)
    chosen = parts.abs().topk(count).indices
    columns = {"token": [repr(text[i]) for i in chosen], "tokens ago": tokens - 1 - chosen.numpy()}
    columns |= {"part of the logit (millinats)": layout.numbers(parts[chosen].numpy(), ".1f", 1000)}
    return pd.DataFrame(columns).set_index("token")
