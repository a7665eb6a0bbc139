"""The criteria of the claims: paper/criteria.yaml, which was written before any run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from replication.scorecard.claims import CLAIMS
from replication.scorecard.measures import MEASURES, Answer
from replication.study.paths import ROOT
from writesae.sae.config import first_problem


class Criterion(BaseModel):
    """How a claim is judged: `measure`, with `arguments`, should be above, below or equal to `indifference`.

    A claim about one architecture has its `family`; a claim about one size has its `model`, a path in
    hosts.csv. The claim is not tested on other hosts.
    """

    model_config = dict(extra="forbid", frozen=True, allow_inf_nan=False)

    criterion: str = Field(min_length=1)
    notebook: str
    indifference: float
    claimed: Literal["above", "below", "equal"]
    measure: str
    arguments: dict[str, Any] = {}
    family: str = ""
    model: str = ""

    @model_validator(mode="after")
    def _can_be_measured(self) -> Criterion:
        if self.measure not in MEASURES:
            raise ValueError(f"there is no measure {self.measure!r}: choose one of {', '.join(MEASURES)}")
        try:
            inspect.signature(MEASURES[self.measure]).bind("tables", "host", **self.arguments)
        except TypeError as error:
            raise ValueError(f"measure {self.measure}: {error}") from None
        return self

    def asks(self, host: pd.Series) -> bool:
        """Return whether the claim is about this host, a row of hosts.csv."""
        return self.family in ("", host.family) and self.model in ("", host.path)

    def answer(self, tables: Callable[[str], pd.DataFrame], host: str) -> Answer | None:
        """Return our number for the claim, or None if the host has no rows, or too few atoms."""
        return MEASURES[self.measure](tables, host, **self.arguments)

    def status(self, answer: Answer) -> str:
        """Return the verdict: is the interval above, below or across the point of indifference?"""
        above, below = answer.low > self.indifference, answer.high < self.indifference
        if self.claimed == "equal":
            return "opposite" if above or below else "same direction"
        if not (above or below):
            return "no effect"
        return "same direction" if above == (self.claimed == "above") else "opposite"


@cache
def read_criteria(path: Path = ROOT / "paper/criteria.yaml", claims: Path = CLAIMS) -> dict[str, Criterion]:
    """Return the criteria of all claims by id, in the order of claims.csv.

    Raises ValueError for a claim without criterion, a criterion without claim, and a missing or unknown
    field, measure or argument.
    """
    content, ids = yaml.safe_load(Path(path).read_text(encoding="utf-8")), pd.read_csv(claims).id
    try:
        criteria = TypeAdapter(dict[str, Criterion]).validate_python(content)
    except ValidationError as error:
        raise ValueError(f"{path}: {first_problem(error)}.") from None
    if missing := [name for name in ids if name not in criteria]:
        raise ValueError(f"{path}: claim {missing[0]} has no criterion.")
    if unknown := [name for name in criteria if name not in set(ids)]:
        raise ValueError(f"{path}: claims.csv has no claim {unknown[0]}.")
    return {name: criteria[name] for name in ids}
