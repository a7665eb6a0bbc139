"""What profiles, grids and recipes say when their YAML does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from writesae.sae.config import first_problem


def read_mapping(path: Path, label: str) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises ValueError, a sentence about `label`, for other content."""
    try:
        return {**yaml.safe_load(path.read_text(encoding="utf-8"))}
    except UnicodeDecodeError as error:
        raise ValueError(f"{label} is not text in UTF-8 (byte {error.start}): save it as UTF-8.") from None
    except (TypeError, ValueError, yaml.YAMLError):  # ValueError: a date that there is not
        raise ValueError(f"{label} is not a YAML mapping of fields to values.") from None


@contextmanager
def checked(label: str) -> Iterator[None]:
    """Turn errors of validating a mapping into a ValueError, one sentence about `label`."""
    try:
        yield
    except ValidationError as error:
        raise ValueError(f"{label}: {first_problem(error)}.") from None
    except TypeError:  # a field whose name is no text
        raise ValueError(f"{label} is not a YAML mapping of fields to values.") from None
