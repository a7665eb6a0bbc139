"""The scorecard: each claim of paper/claims.csv and our numbers, by its criterion in paper/criteria.yaml.

A claim is supported, contradicted, equivalent (no effect of interest) or unsettled (`verdicts`). Claims
that no host can answer are not asked; claims that cannot fail have a value and no verdict; extensions (what
another method does where the paper has a claim) have a verdict and are not counted. A result on an
embedded host never replicates a number of another model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache

import pandas as pd

from replication import layout
from replication.scorecard.claims import CLAIMS
from replication.scorecard.criteria import GROUPS, Criteria, read_criteria
from replication.scorecard.verdicts import NOT_ASKED, VERDICTS, holm
from replication.statistics import Estimate

COLUMNS = ["id", "group", "claim", "experiment", "paper_value", "host", "value", "ci_low", "ci_high", "n"]
COLUMNS += ["trainings", "between_seeds", "status", "repeat_probability", "p", "holm", "counts", "same_as"]
COLUMNS += ["standard_error", "shared_error", "df", "criterion", "notebook", "note"]


def scorecard(
    read_table: Callable[[str], pd.DataFrame], hosts: list[str], measures: Collection[str] = ()
) -> pd.DataFrame:
    """Return one row per claim and host that it is about, and one per claim that is about none of the hosts.

    read_table(name) returns a result table; it is called once per table that a measure needs. measures: only
    the claims with these measures; by default all. Columns: value with its 95% interval; trainings (0: no SAE
    has a part in it; 1: the interval is widened by what another training adds); between_seeds, the standard
    deviation between trainings; status; repeat_probability, that of the same status in a repeat with other
    seeds; p and holm, the level of the status and its adjustment within the host over the claims that count;
    counts; same_as, the claim that counts in this one's place; standard_error, shared_error (its part that
    other trainings at the same places share) and df, on the scale of `Criteria.scale`. Raises ValueError for
    a host that is not in hosts.csv, KeyError if a table has several rows for a claim.
    """
    tables, criteria, rows = cache(read_table), read_criteria(), []
    listed = tables("hosts").set_index("host")
    if unknown := [host for host in hosts if host not in listed.index]:
        raise ValueError(f"hosts.csv has no host {unknown[0]!r}: choose one of {', '.join(listed.index)}.")
    for claim in pd.read_csv(CLAIMS).itertuples():
        criterion = criteria.claims[claim.id]
        if measures and criterion.measure not in measures:
            continue
        row = dict(id=claim.id, group=criterion.group, claim=criterion.claim, experiment=claim.experiment)
        row |= dict(paper_value=claim.value, note=claim.metric, status=NOT_ASKED, counts=False)
        asked = [host for host in hosts if criterion.asks(listed.loc[host])]
        if not asked:
            rows.append(row | dict(host=claim.host, criterion="", notebook=""))
        row |= dict(criterion=criterion.criterion, notebook=criterion.notebook)
        for host in asked:
            line = row | dict(host=host, same_as=criterion.counted_as(listed.family[host]))
            answer = criterion.answer(tables, host)
            rows.append(line if answer is None else line | _judged(criteria, line, answer))
    table = pd.DataFrame(rows).reindex(columns=[x for x in COLUMNS if x != "holm"])
    return table.assign(holm=holm(table))[COLUMNS].astype(dict(n="Int64", trainings="Int64"))


def _judged(criteria: Criteria, line: dict, answer: Estimate) -> dict:
    """Return the columns of an answered claim."""
    name = line["id"]
    estimate = criteria.covering_training(name, answer)
    shown = criteria.scale(name)[1]
    value, low, high = (float(shown(x)) for x in (estimate.value, *estimate.interval()))
    columns = dict(value=value, ci_low=low, ci_high=high, n=estimate.n, trainings=estimate.trainings)
    columns |= dict(between_seeds=estimate.between_seeds, df=estimate.df)
    columns |= dict(standard_error=estimate.error, shared_error=estimate.shared)
    if line["group"] == "cannot_fail":
        return columns
    borders = criteria.borders(name)
    counts = not line["same_as"] and line["group"] != "extension"
    columns |= dict(status=borders.verdict(estimate), p=borders.p(estimate), counts=counts)
    return columns | dict(repeat_probability=borders.repeat_probability(estimate))


# For readers


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """Return how many claims that count have each verdict, per host and group."""
    kept = table[table.counts.astype(bool)]
    wide = pd.crosstab([kept.host, kept.group], kept.status)
    order = pd.MultiIndex.from_product([kept.host.unique(), GROUPS], names=["host", "group"])
    return wide.reindex(index=order.intersection(wide.index), columns=list(VERDICTS), fill_value=0)


def shown_counts(counts: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `counts` for a reader."""
    rows = counts.reset_index()
    return layout.shown(rows, ["host", "group"], {name: rows[name] for name in VERDICTS})


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return answered rows for a reader: claim, the paper's number and ours, and the verdict."""
    rows = table[table.value.notna()]
    again = layout.numbers(rows.repeat_probability, ".0f", 100)
    verdicts = rows.status.where(rows.group != "cannot_fail", "cannot fail")
    columns = {"claim": rows.claim, "paper": layout.numbers(rows.paper_value, "g")}
    columns |= {"here": [layout.interval(x.value, x.ci_low, x.ci_high, ".3g") for x in rows.itertuples()]}
    columns |= {"n": layout.numbers(rows.n, ",.0f")}
    columns |= {"trainings": rows.trainings.map(lambda count: {0: "no SAE", 1: "one"}.get(count, f"{count:.0f}"))}
    texts = [f"{verdict} ({share}%)" if share else verdict for verdict, share in zip(verdicts, again, strict=True)]
    return layout.shown(rows, ["id", "host"], columns | {"verdict (in a repeat)": texts})


def shown_never_asked(table: pd.DataFrame) -> pd.DataFrame:
    """Return the claims that no host is asked, per experiment."""
    never = table[~table.id.isin(table.id[table.value.notna()])]
    rows = never.groupby("experiment").id.agg(", ".join).reset_index()
    return layout.shown(rows, ["experiment"], {"claims": rows.id})
