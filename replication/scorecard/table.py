"""The scorecard: each claim of paper/claims.csv and our numbers, by its criterion in paper/criteria.yaml.

Our result is in the *same direction* as the claim, in the *opposite* direction, or shows *no effect* (its
interval contains the point of indifference). Claims that no host can answer are *not run*. A result on an
embedded host never replicates a number of another model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pandas as pd

from replication.scorecard.claims import CLAIMS
from replication.scorecard.criteria import read_criteria

DIRECTION = {"same direction": 1, "opposite": -1, "no effect": 0}
STATUSES = (*DIRECTION, "not run")
COLUMNS = ["id", "experiment", "paper_value", "host", "value", "ci_low", "ci_high", "n"]
COLUMNS += ["status", "direction", "criterion", "notebook", "note"]


def scorecard(read_table: Callable[[str], pd.DataFrame], hosts: list[str]) -> pd.DataFrame:
    """Return one row per claim and host that it is about, and one per claim that is about none of the hosts.

    read_table(name) returns a result table; it is called once per table that a measure needs. Raises
    ValueError for a host that is not in hosts.csv, KeyError if a table has several rows for a claim.
    """
    tables = cache(read_table)
    listed, rows = tables("hosts").set_index("host"), []
    if unknown := [host for host in hosts if host not in listed.index]:
        raise ValueError(f"hosts.csv has no host {unknown[0]!r}: choose one of {', '.join(listed.index)}.")
    criteria = read_criteria()
    for claim in pd.read_csv(CLAIMS).itertuples():
        row = dict(id=claim.id, experiment=claim.experiment, paper_value=claim.value, note=claim.metric)
        criterion = criteria[claim.id]
        asked = [host for host in hosts if criterion.asks(listed.loc[host])]
        if not asked:
            rows.append(row | dict(host=claim.host, status="not run", criterion="", notebook=""))
        row |= dict(criterion=criterion.criterion, notebook=criterion.notebook)
        for host in asked:
            answer, status = criterion.answer(tables, host), "not run"
            line = row | dict(host=host)
            if answer is not None:
                line |= dict(value=answer.value, ci_low=answer.low, ci_high=answer.high, n=int(answer.n))
                status = criterion.status(answer)
            rows.append(line | dict(status=status))
    table = pd.DataFrame(rows)
    return table.assign(direction=table.status.map(DIRECTION))[COLUMNS]
