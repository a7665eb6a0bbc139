"""The scorecard: each claim of paper/claims.csv against our numbers, by a criterion that stands here before any run.

A result on an embedded host never replicates a number of another model. It can go in the *same direction* as the
paper's claim, the *opposite* one, or have *no effect* (an interval that does not exclude the point of indifference).
Claims that nothing here has run yet are listed as *not run*.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from replication.scorecard.criteria import RULES
from replication.scorecard.measures import Answer, Rule
from replication.study.paths import ROOT

STATUSES = ("same direction", "opposite", "no effect", "not run")
DIRECTION = {"same direction": 1, "opposite": -1, "no effect": 0}
COLUMNS = [
    "id",
    "experiment",
    "paper_value",
    "host",
    "value",
    "ci_low",
    "ci_high",
    "n",
    "status",
    "direction",
    "criterion",
    "notebook",
    "note",
]


def status(answer: Answer, rule: Rule) -> str:
    """One of STATUSES for an answer whose interval lies above, below, or across the point of indifference."""
    above, below = answer.low > rule.indifference, answer.high < rule.indifference
    if rule.claimed == "equal":
        return "opposite" if above or below else "same direction"
    if not (above or below):
        return "no effect"
    return "same direction" if above == (rule.claimed == "above") else "opposite"


TABLES = (
    "replacement",
    "replacement_summary",
    "population",
    "population_summary",
    "logit_shift",
    "logit_shift_summary",
    "logit_shift_ranks",
    "install",
    "hosts",
    "cells",
    "all_cells",
    "alive_atoms",
    "atoms",
    "atom_partition",
    "atom_mixtures",
    "atom_match_shares",
    "population_axes",
    "population_by_cosine",
    "cache_erase_summary",
    "single_write_summary",
    "newlines_summary",
    "register_erase_summary",
    "heads_summary",
    "ablations",
    "ablation_contrasts",
    "selectivity_overlap",
)


def scorecard(read_table: Callable[[str], pd.DataFrame], hosts: list[str], claims: Path | None = None) -> pd.DataFrame:
    """One line a (claim, host); claims without a rule here once, as not run. read_table(name) gives a result table.

    Raises ValueError for a host that hosts.csv does not have, KeyError where a table has no row or several for a claim.
    """
    tables = {name: read_table(name) for name in TABLES}
    known, rows = tables["hosts"].set_index("host"), []
    if unknown := [host for host in hosts if host not in known.index]:
        raise ValueError(f"hosts.csv has no host {unknown[0]!r}: choose one of {', '.join(known.index)}.")
    for claim in pd.read_csv(claims or ROOT / "paper" / "claims.csv").itertuples():
        base = dict(id=claim.id, experiment=claim.experiment, paper_value=claim.value, note=claim.metric)
        rule = RULES.get(claim.id)
        asked = [host for host in hosts if rule and rule.asks(known.loc[host])]
        if not asked:
            rows.append(base | dict(host=claim.host, status="not run", criterion="", notebook=""))
            continue
        for host in asked:
            answer = rule.measure(tables, host)
            if answer is None:
                said = dict(status="not run", criterion=rule.criterion, notebook=rule.notebook)
                rows.append(base | dict(host=host) | said)
                continue
            numbers = dict(value=answer.value, ci_low=answer.low, ci_high=answer.high, n=int(answer.n))
            said = dict(status=status(answer, rule), criterion=rule.criterion, notebook=rule.notebook)
            rows.append(base | dict(host=host) | numbers | said)
    table = pd.DataFrame(rows)
    return table.assign(direction=table.status.map(DIRECTION))[COLUMNS]
