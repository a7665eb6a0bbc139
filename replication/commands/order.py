"""What Make must know about the notebooks: their order, what they read, and what they write.

It needs only the standard library and Python 3.9 or later, because the Makefile runs this file before the
environment exists. `python3 -I replication/commands/order.py` prints rules for Make, and with `--order` the
names in order.

A notebook says it in its own metadata, under `writesae`:
    needs   names of the notebooks that must have run before, e.g. ["05_replacement"]
    files   globs of data that it reads from the repository, e.g. ["models/*/config.json"]
    makes   files that it writes, e.g. ["results/{profile}/hosts.csv"]; it runs again if one is missing

Every notebook also depends on its profile and on all source files. A run takes seconds if its stages are up
to date."""

from __future__ import annotations

import graphlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAMPS = "build/$(PROFILE)/stamps"


class Notebook:
    """One notebook: its name, and what its metadata say."""

    def __init__(self, path: Path, root: Path = ROOT):
        """Raises ValueError for a file that is not a notebook."""
        try:
            metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("writesae", {})
        except (ValueError, KeyError) as error:
            raise ValueError(f"notebooks/{path.name} is not a readable notebook.") from error
        self.name, self.root = path.stem, root
        self.needs, self.files, self.makes = (list(metadata.get(x, [])) for x in ("needs", "files", "makes"))

    def prerequisites(self) -> list[str]:
        """Return the notebook itself and the data that it reads, relative to the repository.

        Raises ValueError for a glob that finds nothing.
        """
        paths = [f"notebooks/{self.name}.ipynb"]
        for pattern in self.files:
            matches = sorted(p.relative_to(self.root).as_posix() for p in self.root.glob(pattern) if p.is_file())
            if not matches:
                raise ValueError(f"notebooks/{self.name}.ipynb needs {pattern}, and there is no such file.")
            paths += matches
        return paths

    def rules(self) -> str:
        """Return rules for Make: what the notebook's stamp depends on, and that a missing output makes it run
        again."""
        stamp, before = f"{STAMPS}/{self.name}", [f"{STAMPS}/{name}" for name in self.needs]
        lines = [f"{stamp}: {' '.join([*self.prerequisites(), *before])}"]
        outputs = [path.replace("{profile}", "$(PROFILE)") for path in self.makes]
        return "\n".join(lines + [f"{stamp}: $(if $(wildcard {path}),,always)" for path in outputs]) + "\n"


def notebooks(root: Path = ROOT) -> dict[str, Notebook]:
    """Return the notebooks by name, in order. Raises ValueError for one that is damaged or needs an unknown
    one."""
    pages = {path.stem: Notebook(path, root) for path in sorted((root / "notebooks").glob("*.ipynb"))}
    for page in pages.values():
        for name in page.needs:
            if name not in pages:
                raise ValueError(f"notebooks/{page.name}.ipynb needs the notebook {name}, which does not exist.")
    return pages


def make_rules(root: Path = ROOT) -> str:
    """Return all rules for Make. Raises ValueError as `notebooks` does."""
    return "\n".join(notebook.rules() for notebook in notebooks(root).values())


def order(root: Path = ROOT) -> list[str]:
    """Return the names of the notebooks, each after those that it needs.

    Raises ValueError as `notebooks` does, and if notebooks need one another in a circle.
    """
    needs = {name: notebook.needs for name, notebook in notebooks(root).items()}
    try:
        return list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        circle = ", ".join(sorted(set(error.args[1])))
        raise ValueError(f"The notebooks {circle} need one another in a circle.") from None


def main() -> int:
    """Print the rules, or with --order the notebooks in order. Return 2, with one sentence, after an
    error."""
    try:
        print(" ".join(order()) if "--order" in sys.argv else make_rules(), end="")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
