"""Folders of a profile: results, figures and intermediate files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from writesae.files import local_path

ROOT = Path(__file__).resolve().parents[2]


def in_repository(path: str | Path) -> Path:
    """Return a path of a profile or variable: ~ is the home folder; others start from the repository."""
    return ROOT / local_path(path)


def typed(path: str | Path) -> Path:
    """Return a path that a user typed: from the current folder if it exists there, else `in_repository`."""
    here = Path(os.path.abspath(local_path(path)))
    return here if here.exists() else in_repository(path)


def shortened(path: Path) -> str:
    """Return a path as it is written into a sidecar: from the repository if it is inside."""
    return (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()


def dry_run() -> bool:
    """Return whether this is a dry run (`python -m replication dryrun`), whose numbers mean nothing."""
    return bool(os.environ.get("WRITESAE_DRY_RUN"))


def output_root() -> Path:
    """Return where results go: WRITESAE_OUTPUT (relative to the repository), else the repository.

    A dry run without WRITESAE_OUTPUT writes to build/dryrun.
    """
    return in_repository(os.environ.get("WRITESAE_OUTPUT") or ("build/dryrun" if dry_run() else ""))


def check_checkout() -> None:
    """Raise ValueError if the current folder is in another checkout than the code that runs."""
    code, here = Path(__file__).resolve().parents[2], Path.cwd()
    around = (folder for folder in (here, *here.parents) if (folder / "replication/study/paths.py").is_file())
    if (other := next(around, code)) != code:
        raise ValueError(
            f"The current folder is in the checkout {other}, and Python imports the code of {code}: set "
            f"PYTHONPATH={other}, or use the environment that `make env` makes there."
        )


@dataclass(frozen=True)
class Paths:
    """The folders of one profile, independent of the current folder."""

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
