"""The criteria of the claims: paper/criteria.yaml, written before any run, read and checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from replication.scorecard.claims import CLAIMS
from replication.scorecard.measures import MEASURES, Answer
from replication.study.paths import ROOT


class Criterion(BaseModel):
    """How a claim is judged.

    The claim is that what `measure` measures, with these arguments, is above or below the point of
    indifference, or ("equal") that it does not differ from it. A claim about one architecture names its
    `family`; a claim about one size of it names the `model`, which is the path in hosts.csv. Only such hosts
    are asked.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

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
        """Return whether the claim is about the host of this row of hosts.csv."""
        return self.family in ("", host.family) and self.model in ("", host.path)

    def answer(self, tables: Callable[[str], pd.DataFrame], host: str) -> Answer | None:
        """Return our number for the claim, or None where the host has no rows, or too few atoms, for it."""
        return MEASURES[self.measure](tables, host, **self.arguments)

    def status(self, answer: Answer) -> str:
        """Return the verdict: the interval is above, below, or across the point of indifference."""
        above, below = answer.low > self.indifference, answer.high < self.indifference
        if self.claimed == "equal":
            return "opposite" if above or below else "same direction"
        if not (above or below):
            return "no effect"
        return "same direction" if above == (self.claimed == "above") else "opposite"


@cache
def read_criteria(path: Path = ROOT / "paper" / "criteria.yaml", claims: Path = CLAIMS) -> dict[str, Criterion]:
    """Return the criterion of every claim by its id, in the order of claims.csv.

    Raises ValueError, in one sentence, for a claim without a criterion, a criterion without a claim, and a
    criterion with a field, measure or argument that is missing or unknown.
    """
    content, criteria = yaml.safe_load(Path(path).read_text(encoding="utf-8")), {}
    for name in pd.read_csv(claims).id:
        if name not in content:
            raise ValueError(f"{path}: claim {name} has no criterion.")
        try:
            criteria[name] = Criterion.model_validate(content[name])
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (name, *first["loc"])))
            raise ValueError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}.") from None
    if unknown := [name for name in content if name not in criteria]:
        raise ValueError(f"{path}: claims.csv has no claim {unknown[0]}.")
    return criteria
