"""Where a profile's files are: results, figures and intermediate files."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


ROOT = Path(__file__).resolve().parents[2]


def dry_run() -> bool:
    """Whether this process is part of a dry run (`python -m replication dryrun`), whose numbers mean nothing."""
    return bool(os.environ.get("WRITESAE_DRY_RUN"))


def output_root() -> Path:
    """Where results go: the folder named by WRITESAE_OUTPUT (relative to the repository), else the repository, and for a
    dry run its build/dryrun."""
    return ROOT / (os.environ.get("WRITESAE_OUTPUT") or ("build/dryrun" if dry_run() else ""))


@dataclasses.dataclass(frozen=True)
class Paths:
    """The folders of one profile, found from the package and not from the current folder."""

    profile: str

    @property
    def root(self) -> Path:
        return output_root()

    @property
    def results(self) -> Path:
        return self.root / "results" / self.profile

    @property
    def figures(self) -> Path:
        return self.root / "figures" / self.profile

    @property
    def build(self) -> Path:
        return self.root / "build" / self.profile

    @property
    def partial(self) -> Path:
        return self.build / "partial"
