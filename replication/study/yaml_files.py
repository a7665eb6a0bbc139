"""What profiles, grids and recipes say when their YAML does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import yaml
from pydantic import ValidationError

from writesae.sae.config import first_problem


@contextmanager
def checked(label: str) -> Iterator[None]:
    """Turn errors of reading or validating a YAML mapping into a ValueError, one sentence about `label`."""
    try:
        yield
    except ValidationError as error:
        raise ValueError(f"{label}: {first_problem(error)}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{label} is not text in UTF-8 (byte {error.start}): save it in that encoding.") from None
    except (TypeError, yaml.YAMLError):
        raise ValueError(f"{label} is not a YAML mapping of fields to values.") from None
