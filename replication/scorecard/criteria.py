"""The criteria of the claims: paper/criteria.yaml, which was written before the run that is judged by it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from replication.scorecard.claims import CLAIMS
from replication.scorecard.measures import MEASURES
from replication.scorecard.verdicts import Borders, Claimed
from replication.statistics import Estimate
from replication.study.paths import ROOT
from replication.study.profile import Section
from replication.study.yaml_files import checked, read_mapping

GROUPS = ("headline", "supporting", "bookkeeping", "cannot_fail", "extension")
RATIO, R2 = (np.log, np.exp), (lambda x: -np.log1p(-x), lambda x: -np.expm1(-x))
PLAIN = (np.asarray, np.asarray)


class Criterion(Section):
    """How a claim is judged: `measure`, with `arguments`, should be above, below or equal to `indifference`.

    A claim about one architecture has its `family`; a claim about one size has its `model`, a path in
    hosts.csv. The claim is not asked of other hosts. On hosts of a family in `same_as` (or "any") another
    claim has the same value and counts in its place. `was` and `because`: the criterion before, and why not.
    """

    claim: str = Field(min_length=1)
    group: Literal["headline", "supporting", "bookkeeping", "cannot_fail", "extension"]
    criterion: str = Field(min_length=1)
    notebook: str
    effect: str
    indifference: float
    claimed: Claimed
    measure: str
    arguments: dict[str, Any] = {}
    trained: bool = True
    family: str = ""
    model: str = ""
    same_as: dict[str, str] = {}
    was: str = ""
    because: str = ""

    @model_validator(mode="after")
    def _can_be_measured(self) -> Criterion:
        if self.measure not in MEASURES:
            raise ValueError(f"there is no measure {self.measure!r}: choose one of {', '.join(MEASURES)}")
        try:
            inspect.signature(MEASURES[self.measure]).bind("tables", "host", **self.arguments)
        except TypeError as error:
            raise ValueError(f"measure {self.measure}: {error}") from None
        if bool(self.was) != bool(self.because):
            raise ValueError("a criterion has both `was` and `because`, or neither")
        return self

    def asks(self, host: pd.Series) -> bool:
        """Return whether the claim is about this host, a row of hosts.csv."""
        return self.family in ("", host.family) and self.model in ("", host.path)

    def counted_as(self, family: str) -> str:
        """Return the claim that counts in this one's place on hosts of a family, or ""."""
        return self.same_as.get(family, self.same_as.get("any", ""))

    def answer(self, tables: Callable[[str], pd.DataFrame], host: str) -> Estimate | None:
        """Return our number for the claim, or None if the host has no rows, or too few atoms.

        It is on the scale of `Criteria.scale`.
        """
        return MEASURES[self.measure](tables, host, **self.arguments)


class Criteria(Section):
    """The file: smallest effects and factors by kind, the variance of another training, and the claims.

    `experiments`: the experiment of each claim, from claims.csv.
    """

    smallest_effects: dict[str, float]
    smallest_factors: dict[str, float]
    another_training: dict[str, float]
    claims: dict[str, Criterion]
    experiments: dict[str, str] = {}

    @model_validator(mode="after")
    def _have_a_smallest_effect(self) -> Criteria:
        kinds = self.smallest_effects | self.smallest_factors
        for name, criterion in self.claims.items():
            if criterion.effect not in kinds:
                names = ", ".join(kinds)
                raise ValueError(f"claims.{name}: no smallest effect {criterion.effect!r}: use {names}")
        return self

    def scale(self, name: str) -> tuple[Callable, Callable]:
        """Return the function to the scale on which a claim is judged, and its inverse.

        Ratios are judged by their logarithm, R2 by minus the logarithm of the share that is not explained: a
        value of -300 has no symmetric interval.
        """
        effect = self.claims[name].effect
        return RATIO if effect in self.smallest_factors else R2 if effect == "r2" else PLAIN

    def borders(self, name: str) -> Borders:
        """Return the borders of a claim on its scale: its indifference minus and plus the smallest effect."""
        criterion, judged = self.claims[name], self.scale(name)[0]
        if factor := self.smallest_factors.get(criterion.effect):
            ends = criterion.indifference / factor, criterion.indifference * factor
        else:
            smallest = self.smallest_effects[criterion.effect]
            ends = criterion.indifference - smallest, criterion.indifference + smallest
        return Borders(criterion.claimed, *(float(judged(end)) for end in ends))

    def covering_training(self, name: str, estimate: Estimate) -> Estimate:
        """Return an estimate of one training with the variance that another training adds."""
        if not self.claims[name].trained:
            return estimate._replace(trainings=0, shared=estimate.error)
        if estimate.trainings > 1:
            return estimate
        between = estimate.error * np.sqrt(self.another_training[self.experiments[name]])
        return estimate._replace(error=float(np.hypot(estimate.error, between)), between_seeds=float(between))


@cache
def read_criteria(path: Path = ROOT / "paper/criteria.yaml", claims: Path = CLAIMS) -> Criteria:
    """Return the criteria, with the claims in the order of claims.csv.

    Raises ValueError for a claim without criterion, a criterion without claim, and a missing or unknown
    field, measure, argument, kind of effect, or experiment of another training.
    """
    content, listed = read_mapping(path, str(path)), pd.read_csv(claims)
    with checked(str(path)):
        criteria = Criteria(**content)
    if missing := [name for name in listed.id if name not in criteria.claims]:
        raise ValueError(f"{path}: claim {missing[0]} has no criterion.")
    if unknown := [name for name in criteria.claims if name not in set(listed.id)]:
        raise ValueError(f"{path}: claims.csv has no claim {unknown[0]}.")
    claimed, experiments = criteria.claims, dict(zip(listed.id, listed.experiment, strict=True))
    trained = {experiments[name] for name, criterion in claimed.items() if criterion.trained}
    if unknown := sorted(trained - set(criteria.another_training)):
        raise ValueError(f"{path}: another_training lacks the experiment {unknown[0]}.")
    ordered = {name: claimed[name] for name in listed.id}
    return criteria.model_copy(update=dict(claims=ordered, experiments=experiments))


def changed() -> pd.DataFrame:
    """Return the criteria that were changed: what they were, what they are, and why."""
    rows = {name: x for name, x in read_criteria().claims.items() if x.was}
    columns = {name: [getattr(x, name) for x in rows.values()] for name in ("was", "criterion", "because")}
    return pd.DataFrame(columns, index=pd.Index(rows, name="id")).rename(columns=dict(criterion="now"))
