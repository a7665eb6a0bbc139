"""Why the paper's 92.4% is not reached here: the win rate under each difference from the paper.

Everything is read from tables of other pages, for the main host. The lines are not cumulative after A (by
position, without the mean): each that begins with A changes one thing of A. The lines about single choices of
the multiverse are differences over all of its combinations, with SAEs of both targets and all controls, and
have an interval. Beside it is the mean over the combinations with SAEs of states and deletion, without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from replication import layout
from replication.statistics import Interval, wider
from replication.study.stages import rows_with

Tables = Callable[[str], pd.DataFrame]
PAPER = dict(target="state", centre="mean", draw="atoms", cells="pooled", condition="atom", amplitude="coefficient")
HERE = PAPER | dict(centre="none", draw="positions")


class Cause(NamedTuple):
    """A difference: what it is, the table and the rows that measure it; `difference`: they hold a change."""

    cause: str
    table: str
    where: dict
    difference: bool = False


def causes() -> list[Cause]:
    """Return the differences that are measured, in the order of the table."""
    lines = [
        Cause("the paper's protocol on this host", "headline", PAPER),
        Cause("places by position, not equally per atom", "headline", PAPER | dict(draw="positions")),
        Cause("A: by position, and without the data's mean", "headline", HERE),
        Cause("A, with the atom scaled to fit the write", "headline", HERE | dict(amplitude="projection")),
        Cause(
            "A, in the cell whose sigma1/sigma2 is nearest to the paper's 12", "headline", HERE | dict(cells="regime")
        ),
        Cause("A, in the cell that matters most for the loss", "headline", HERE | dict(cells="weighty")),
        Cause("A, with SAEs trained on writes", "headline", HERE | dict(target="write")),
    ]
    replaced = {
        "the state is replaced, not the write": dict(object="state", offset_kept=False),
        "the state is replaced, its mean kept": dict(object="state", offset_kept=True),
        "an atom's part of the reconstruction is replaced": dict(object="reconstruction"),
    }
    for cause, where in replaced.items():
        where = dict(target="state", centre="mean", cells="pooled") | where
        lines.append(Cause(f"by position, mean subtracted: {cause}", "objects_summary", where))
    choices = {
        "few atoms, those that fire most (the paper: 18 selected ones)": ("pooling", "most_firing"),
        "the write as the whole change of the state": ("write", "effective"),
        "the KL from the edited run": ("kl_direction", "patched_native"),
        "only later tokens read the edit": ("reading", "cache, next"),
        "the KL as a mean over the next tokens": ("reading", "write, mean"),
    }
    for cause, (choice, level) in choices.items():
        lines.append(Cause(cause, "multiverse_effects", dict(choice=choice, level=level), True))
    return lines


def measured(tables: Tables, host: str) -> pd.DataFrame:
    """Return one row per cause that this host's tables hold.

    value, low, high: the win rate, or its difference. states_and_deletion: the same difference in the mean
    over the combinations with SAEs of states and deletion as the control."""
    rows = []
    for cause in causes():
        found = rows_with(tables(cause.table), host=host, **cause.where)
        if found.empty:
            continue
        row = found.iloc[0]
        if cause.difference:
            by_atom, by_passage = Interval(row.ci_low, row.ci_high), Interval(row.passage_low, row.passage_high)
            value, (low, high) = row.difference, wider(by_atom, by_passage)
        else:
            value, low, high = row.win_rate, row.win_rate_low, row.win_rate_high
        line = dict(cause=cause.cause, quantity="difference" if cause.difference else "win rate", value=value)
        line |= dict(low=low, high=high, n=row.get("n"), seeds=row.get("seeds"), table=cause.table)
        if cause.difference:
            line["states_and_deletion"] = _of_states_and_deletion(tables, host, **cause.where)
        rows.append(line)
    return pd.DataFrame(rows).assign(host=host)


def _of_states_and_deletion(tables: Tables, host: str, choice: str, level: str) -> float:
    """Return the mean change of the win rate from a choice's first level to another, all else the same."""
    effects = rows_with(tables("multiverse_effects"), host=host)
    first = effects[effects.choice == choice].level.iloc[0]
    others = sorted(set(effects.choice) - {choice, "target", "control"})
    universes = rows_with(tables("multiverse"), host=host, target="state", control="delete")
    wide = universes.pivot(index=others, columns=choice, values="win_rate")
    return float((wide[level] - wide[first]).mean())


def shown(table: pd.DataFrame, paper: float) -> pd.DataFrame:
    """Return the table for a reader, in percent, below the paper's value."""
    signs = ["+" if x.quantity == "difference" and x.value > 0 else "" for x in table.itertuples()]
    texts = layout.estimates(table, "value", "low", "high", digits=1)
    columns = {"quantity": ["win rate", *table.quantity]}
    columns |= {"percent": [f"{100 * paper:.1f}", *(sign + text for sign, text in zip(signs, texts, strict=True))]}
    columns |= {name: ["", *layout.numbers(table[name], ",.0f")] for name in ("n", "seeds")}
    columns |= {"SAEs of states, deletion": ["", *layout.numbers(table.states_and_deletion, ".1f", 100)]}
    rows = pd.DataFrame({"difference from the paper": ["the paper, on its host", *table.cause]})
    return layout.shown(rows, ["difference from the paper"], columns | {"table": ["", *table.table]})
