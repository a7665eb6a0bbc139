"""Print the rules for Make of the notebooks, or with `--order` their names in order.

Make runs this file before the environment exists, with Python 3.9 or later and the standard library only. In
the metadata of a notebook, `writesae` has the fields
    needs   the notebooks that must run before it, e.g. ["05_replacement"]
    files   globs of data that it reads from the repository, e.g. ["models/*/config.json"]
    makes   files that it writes, e.g. ["results/{profile}/hosts.csv"]; it runs again if one is missing
"""

from __future__ import annotations

import graphlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAMPS = "$(STAMPS)"


class Notebook:
    """The name and metadata of a notebook. Raises ValueError for a file that is not a notebook."""

    def __init__(self, path: Path, root: Path):
        try:
            metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("writesae", {})
        except (ValueError, KeyError) as error:
            raise ValueError(f"notebooks/{path.name} is not a readable notebook.") from error
        self.name, self.root = path.stem, root
        self.needs, self.files, self.makes = (list(metadata.get(x, [])) for x in ("needs", "files", "makes"))

    def prerequisites(self) -> list[str]:
        """Return the paths of the notebook and its data. Raises ValueError for a glob that finds nothing."""
        paths = [f"notebooks/{self.name}.ipynb"]
        for pattern in self.files:
            matches = sorted(p.relative_to(self.root).as_posix() for p in self.root.glob(pattern) if p.is_file())
            if not matches:
                raise ValueError(f"notebooks/{self.name}.ipynb needs {pattern}, and there is no such file.")
            paths += matches
        return paths

    def rules(self) -> str:
        """Return the rules for the notebook's stamp: its prerequisites, and reruns for missing outputs."""
        stamp, before = f"{STAMPS}/{self.name}", [f"{STAMPS}/{name}" for name in self.needs]
        lines = [f"{stamp}: {' '.join([*self.prerequisites(), *before])}"]
        outputs = [path.replace("{profile}", "$(PROFILE)") for path in self.makes]
        return "\n".join(lines + [f"{stamp}: $(if $(wildcard {path}),,always)" for path in outputs]) + "\n"


def notebooks(root: Path = ROOT) -> dict[str, Notebook]:
    """Return the notebooks by name. Raises ValueError if one is damaged or needs an unknown notebook."""
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

    Raises ValueError as `notebooks` does, and if notebooks need one another in a circle."""
    needs = {name: notebook.needs for name, notebook in notebooks(root).items()}
    try:
        return list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        circle = ", ".join(sorted(set(error.args[1])))
        raise ValueError(f"The notebooks {circle} need one another in a circle.") from None


def main() -> int:
    """Print the rules or names. Return 2, with one sentence on stderr, after an error."""
    try:
        print(" ".join(order()) if "--order" in sys.argv else make_rules(), end="")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
