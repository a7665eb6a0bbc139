"""Install the packages of the extra `gpu`, each by itself: `python -m writesae.gpu_extras [--done FILE] [pip's options]`.

Make runs it for the profiles that want a GPU. Where torch sees no CUDA device nothing is installed: transformers binds
the packages' kernels wherever it can import them, and they fail without a GPU. A package that cannot be had, or does not
build, keeps none of the others back and does not end the run. FILE is touched once all have been tried.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from writesae.artifacts import ROOT

PIP = (sys.executable, "-m", "pip", "install")
CONSTRAINTS = "requirements.lock"
BUILD = ("setuptools", "wheel", "packaging", "ninja")  # what those that are compiled name as their build requirements


def packages(root: Path = ROOT) -> list[str]:
    """The requirements of the extra `gpu` of pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]


def why_not() -> str | None:
    """Why there is no CUDA device for the torch of this environment, or None."""
    import torch

    if torch.cuda.is_available():
        return None
    if shutil.which("nvidia-smi"):
        return f"nvidia-smi is here, but torch {torch.__version__} sees no CUDA device (a build or driver that does not fit)"
    return "there is no CUDA device here"


def install(names: Iterable[str], options: list[str], root: Path = ROOT) -> tuple[list[str], list[str]]:
    """(installed, not installed) of the requirements `names`, tried one after the other with pip's `options`.

    Those that are compiled are built against the torch of this environment (no build isolation).
    """

    def pip(*arguments: str) -> bool:
        return subprocess.run([*PIP, *options, "-c", str(root / CONSTRAINTS), *arguments]).returncode == 0

    pip(*BUILD)
    done: dict[bool, list[str]] = {True: [], False: []}
    for name in names:
        done[pip("--no-build-isolation", name)].append(re.split(r"[^\w.-]", name)[0])
    return done[True], done[False]


def main(arguments: list[str] | None = None) -> int:
    """0, whatever could be installed: only speed depends on it."""
    parser = argparse.ArgumentParser(description="Install the extra gpu where there is CUDA.", allow_abbrev=False)
    parser.add_argument("--done", type=Path, help="a file to touch once all have been tried")
    given, options = parser.parse_known_args(arguments)
    reason = why_not()
    if reason:
        print(f"GPU packages: not installed, since {reason}; everything runs on torch without them.")
        return 0
    names = packages()
    print(f"GPU packages: {', '.join(names)}; those that are compiled take minutes each.", flush=True)
    installed, failed = install(names, options)
    missing = f"; not installed: {', '.join(failed)} (see above), only speed depends on it" if failed else ""
    print(f"GPU packages installed: {', '.join(installed) or 'none'}{missing}.")
    if given.done:
        given.done.touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
