"""Are freshly computed tables the committed ones, each metric within its own stated tolerance?

The tolerances are a list in YAML; an entry has
    file       the table, in both folders
    keys       the columns that name a row
    metric     the column to compare
    absolute | relative | equal: true    how far it may be off; `relative` is a fraction of the reference value
    reason     why it may be off that far
Rows are matched on their keys. A file, column or row that only one side has is a failure: nothing is skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from writesae.artifacts import ArtifactError, read_table


class Tolerance(BaseModel):
    """One entry of the list."""

    model_config = ConfigDict(extra="forbid")
    file: str
    keys: list[str] = Field(min_length=1)
    metric: str
    absolute: float | None = Field(None, ge=0)
    relative: float | None = Field(None, ge=0)
    equal: bool = False
    reason: str = Field(min_length=1)

    @model_validator(mode="after")
    def _one_kind(self):
        if (self.absolute is not None) + (self.relative is not None) + self.equal != 1:
            raise ValueError("give exactly one of absolute, relative, equal: true")
        return self

    def allows(self, reference: Any, fresh: Any) -> bool:
        """Whether a fresh value is near enough; a missing value only agrees with a missing value."""
        if pd.isna(reference) or pd.isna(fresh):
            return bool(pd.isna(reference) and pd.isna(fresh))
        if self.equal:
            return bool(reference == fresh)
        if np.isinf(reference) or np.isinf(fresh):
            return bool(reference == fresh)
        room = self.absolute if self.relative is None else self.relative * abs(reference)
        return bool(abs(fresh - reference) <= room)

    def __str__(self) -> str:
        if self.equal:
            return "equal"
        return f"absolute {self.absolute}" if self.relative is None else f"relative {self.relative}"


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


def _keyed(frame: pd.DataFrame, tolerance: Tolerance, side: str) -> tuple[dict, list[str]]:
    """({key: value}, problems) of one table."""
    lacking = [name for name in (*tolerance.keys, tolerance.metric) if name not in frame]
    if lacking:
        return {}, [f"{tolerance.file}: the {side} table has no column {', '.join(lacking)}"]
    if frame.empty:
        return {}, [f"{tolerance.file}: the {side} table has no rows"]
    if frame.duplicated(tolerance.keys).any():
        return {}, [f"{tolerance.file}: {', '.join(tolerance.keys)} do not name one row in the {side} table"]
    keys = frame[tolerance.keys].astype(object).where(frame[tolerance.keys].notna(), None)
    return dict(zip(keys.itertuples(index=False, name=None), frame[tolerance.metric], strict=True)), []


def _describe(tolerance: Tolerance, key: tuple) -> str:
    return f"{tolerance.file} [" + ", ".join(f"{n}={v}" for n, v in zip(tolerance.keys, key, strict=True)) + "]"


def compare(reference: pd.DataFrame, fresh: pd.DataFrame, tolerance: Tolerance) -> list[str]:
    """One sentence for each way in which `fresh` differs from `reference`; empty where it does not."""
    expected, problems = _keyed(reference, tolerance, "reference")
    actual, more = _keyed(fresh, tolerance, "fresh")
    if problems or more:
        return problems + more
    problems += [f"{_describe(tolerance, key)} is missing" for key in expected if key not in actual]
    problems += [f"{_describe(tolerance, key)} is not in the reference" for key in actual if key not in expected]
    for key in expected.keys() & actual.keys():
        try:
            fine = tolerance.allows(expected[key], actual[key])
        except TypeError:
            fine = False  # text where a number should be
        if not fine:
            problems.append(
                f"{_describe(tolerance, key)} {tolerance.metric} is {actual[key]}, in the reference {expected[key]} "
                f"(allowed: {tolerance})"
            )
    return problems


def check(reference: Path, fresh: Path, tolerance: Tolerance) -> list[str]:
    """`compare` for the tables in two folders; a missing or damaged file is a sentence too."""
    try:
        return compare(read_table(reference / tolerance.file), read_table(fresh / tolerance.file), tolerance)
    except ArtifactError as error:
        return [str(error)]
