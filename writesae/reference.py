"""Are freshly computed tables the committed ones, each metric within its own stated tolerance?

The tolerances are a list in YAML; an entry has
    file       the table, in both folders
    keys       the columns that name a row
    metric     the column to compare
    how far it may be off, one of
      equal: true
      absolute, relative    a number, and a fraction of the reference value; of both the larger counts
      overlap               the columns of the low and high end of its interval: the two intervals must have a point in common
    origin     with `relative`: the fraction is of the reference value's distance from here (1 for an R2, else 0)
    reason     why it may be off that far
Rows are matched on their keys. A file, column or row that only one side has is a failure: nothing is skipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from writesae.artifacts import ArtifactError, read_table


class Interval(NamedTuple):
    """A value between the ends of its interval."""

    value: Any
    low: Any
    high: Any

    def __str__(self) -> str:
        return f"{self.value} [{self.low}, {self.high}]"


class Tolerance(BaseModel):
    """One entry of the list."""

    model_config = ConfigDict(extra="forbid")
    file: str
    keys: list[str] = Field(min_length=1)
    metric: str
    absolute: float | None = Field(None, ge=0)
    relative: float | None = Field(None, ge=0)
    overlap: tuple[str, str] | None = None
    origin: float = 0
    equal: bool = False
    reason: str = Field(min_length=1)

    @model_validator(mode="after")
    def _one_kind(self):
        of_size = self.absolute is not None or self.relative is not None
        if of_size + (self.overlap is not None) + self.equal != 1:
            raise ValueError("give one of absolute and relative (or both), overlap, equal: true")
        if self.origin and self.relative is None:
            raise ValueError("origin says from where relative is a fraction: give relative as well")
        return self

    def room(self, reference: Any, fresh: Any) -> float:
        """How far two values may be apart. Two intervals meet where it is no further than both reach towards the other."""
        if self.equal:
            return 0
        if self.overlap:
            lower, upper = sorted((reference, fresh))
            return (lower.high - lower.value) + (upper.value - upper.low)
        return max(self.absolute or 0, (self.relative or 0) * abs(reference - self.origin))

    def allows(self, reference: Any, fresh: Any) -> bool:
        """Whether a fresh value is near enough; a missing value only agrees with a missing value."""
        before, after = _value(reference), _value(fresh)
        if pd.isna(before) or pd.isna(after):
            return bool(pd.isna(before) and pd.isna(after))
        if self.equal or np.isinf(before) or np.isinf(after):
            return bool(before == after)
        return bool(abs(after - before) <= self.room(reference, fresh))

    def used(self, reference: Any, fresh: Any) -> float:
        """How much of the tolerance the difference takes: 0 where equal, infinity where nothing was to differ."""
        before, after = _value(reference), _value(fresh)
        if pd.isna(before) and pd.isna(after) or before == after:
            return 0.0
        try:
            room = self.room(reference, fresh)
            share = float(abs(after - before) / room) if room else math.inf
        except TypeError:  # text where a number should be
            return math.inf
        return math.inf if math.isnan(share) else share

    def __str__(self) -> str:
        if self.equal:
            return "equal"
        if self.overlap:
            return "intervals that meet"
        sizes = [f"{name} {size}" for name in ("absolute", "relative") if (size := getattr(self, name)) is not None]
        return " or ".join(sizes) + (f" of the distance from {self.origin:g}" if self.origin else "")


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Interval) else x


def read_tolerances(path: Path) -> list[Tolerance]:
    """The list at `path`. Raises ValueError where it is empty or an entry is not as described above."""
    entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} holds no list of tolerances.")
    found = []
    for number, entry in enumerate(entries, start=1):
        try:
            found.append(Tolerance.model_validate(entry))
        except ValidationError as error:
            raise ValueError(f"{path}: entry {number}: {error.errors()[0]['msg']}.") from error
    return found


@dataclass(frozen=True)
class Pair:
    """A row's two values of a metric; `row` names the table and the row, `used` is how much of the tolerance they take."""

    row: str
    reference: Any
    fresh: Any
    allowed: bool
    used: float


@dataclass
class Comparison:
    """Two tables by one tolerance: why they cannot be compared, rows that only one has, and the values of all others."""

    tolerance: Tolerance
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)

    @property
    def worst(self) -> Pair | None:
        """The pair that takes most of the tolerance, one that is not allowed before any that is."""
        return max(self.pairs, key=lambda pair: (not pair.allowed, pair.used), default=None)

    @property
    def moved(self) -> list[Pair]:
        return [pair for pair in self.pairs if not pair.allowed]

    def say(self, pair: Pair) -> str:
        """One sentence on a pair."""
        return (
            f"{pair.row} {self.tolerance.metric} is {pair.fresh}, in the reference {pair.reference} "
            f"(allowed: {self.tolerance})"
        )

    def sentences(self) -> list[str]:
        """All in which the tables differ by more than is allowed; empty where they do not."""
        rows = [f"{row} is missing" for row in self.missing] + [f"{row} is not in the reference" for row in self.extra]
        return self.problems + rows + [self.say(pair) for pair in self.moved]


def _keyed(frame: pd.DataFrame, tolerance: Tolerance, side: str) -> tuple[dict, list[str]]:
    """({key: value}, problems) of one table."""
    ends = tolerance.overlap or ()
    lacking = [name for name in (*tolerance.keys, tolerance.metric, *ends) if name not in frame]
    if lacking:
        return {}, [f"{tolerance.file}: the {side} table has no column {', '.join(lacking)}"]
    if frame.empty:
        return {}, [f"{tolerance.file}: the {side} table has no rows"]
    if frame.duplicated(tolerance.keys).any():
        return {}, [f"{tolerance.file}: {', '.join(tolerance.keys)} do not name one row in the {side} table"]
    keys = frame[tolerance.keys].astype(object).where(frame[tolerance.keys].notna(), None)
    values = frame[tolerance.metric]
    if ends:  # a value without an interval is one of no width
        values = map(Interval, values, *(frame[name].fillna(values) for name in ends))
    return dict(zip(keys.itertuples(index=False, name=None), values, strict=True)), []


def _describe(tolerance: Tolerance, key: tuple) -> str:
    return f"{tolerance.file} [" + ", ".join(f"{n}={v}" for n, v in zip(tolerance.keys, key, strict=True)) + "]"


def measure(reference: pd.DataFrame, fresh: pd.DataFrame, tolerance: Tolerance) -> Comparison:
    """Every row of two tables by one tolerance."""
    expected, problems = _keyed(reference, tolerance, "reference")
    actual, more = _keyed(fresh, tolerance, "fresh")
    if problems or more:
        return Comparison(tolerance, problems + more)
    found = Comparison(tolerance)
    found.missing += [_describe(tolerance, key) for key in expected if key not in actual]
    found.extra += [_describe(tolerance, key) for key in actual if key not in expected]
    for key in (key for key in expected if key in actual):
        values = expected[key], actual[key]
        try:
            allowed = tolerance.allows(*values)
        except TypeError:
            allowed = False  # text where a number should be
        found.pairs.append(Pair(_describe(tolerance, key), *values, allowed, tolerance.used(*values)))
    return found


def compare(reference: pd.DataFrame, fresh: pd.DataFrame, tolerance: Tolerance) -> list[str]:
    """One sentence for each way in which `fresh` differs from `reference`; empty where it does not."""
    return measure(reference, fresh, tolerance).sentences()


def check(reference: Path, fresh: Path, tolerance: Tolerance) -> list[str]:
    """`compare` for the tables in two folders; a missing or damaged file is a sentence too."""
    try:
        return compare(read_table(reference / tolerance.file), read_table(fresh / tolerance.file), tolerance)
    except ArtifactError as error:
        return [str(error)]
