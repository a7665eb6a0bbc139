"""Print the rules for Make of the pages, or with `--order` their names in order.

A page is a notebook whose name is two digits, an underscore and a word, and whose metadata has `writesae`;
Make passes over all other files in notebooks/. Make runs this file before the environment exists, with Python
3.9 or later and the standard library only. The fields of `writesae` are
    needs   the notebooks that must run before it, e.g. ["05_replacement"]
    files   globs of data that it reads from the repository, e.g. ["models/*/config.json"]
    makes   files that it writes, e.g. ["results/{profile}/hosts.csv"]; it runs again if one is missing
"""

from __future__ import annotations

import graphlib
import json
import re
import sys
from pathlib import Path

PAGE = re.compile(r"\d\d_\w+")
ROOT = Path(__file__).resolve().parents[2]
STAMPS = "$(STAMPS)"


def read_metadata(path: Path) -> dict[str, list[str]] | None:
    """Return the field `writesae` of a notebook's metadata, None if there is none.

    Raises ValueError for a file that is not a notebook."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["metadata"].get("writesae")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"notebooks/{path.name} is not a readable notebook.") from error


def for_make(path: str) -> str:
    """Return a path as Make reads it in a rule, with what means something to Make escaped."""
    return re.sub(r"([\s#:*?\[\]])", r"\\\1", path).replace("$", "$$")


class Notebook:
    """A page: its name and what its metadata says."""

    def __init__(self, name: str, metadata: dict[str, list[str]], root: Path):
        self.name, self.root = name, root
        self.needs, self.files, self.makes = (list(metadata.get(x, [])) for x in ("needs", "files", "makes"))

    def prerequisites(self) -> list[str]:
        """Return the paths of the notebook and its data. Raises ValueError for a glob that finds nothing."""
        paths = [f"notebooks/{self.name}.ipynb"]
        for pattern in self.files:
            found = (path.relative_to(self.root) for path in self.root.glob(pattern) if path.is_file())
            matches = sorted(path.as_posix() for path in found if not any(part[0] == "." for part in path.parts))
            if not matches:
                raise ValueError(f"notebooks/{self.name}.ipynb needs {pattern}, and there is no such file.")
            paths += map(for_make, matches)
        return paths

    def rules(self) -> str:
        """Return the rules for the notebook's stamp: its prerequisites, and reruns for missing outputs."""
        stamp, before = f"{STAMPS}/{self.name}", [f"{STAMPS}/{name}" for name in self.needs]
        lines = [f"{stamp}: {' '.join([*self.prerequisites(), *before])}"]
        outputs = [path.replace("{profile}", "$(PROFILE)") for path in self.makes]
        return "\n".join(lines + [f"{stamp}: $(if $(wildcard {path}),,always)" for path in outputs]) + "\n"


def notebooks(root: Path = ROOT) -> dict[str, Notebook]:
    """Return the pages by name.

    Raises ValueError if one is damaged or needs an unknown page, and if two make the same file."""
    paths = sorted(path for path in (root / "notebooks").glob("*.ipynb") if PAGE.fullmatch(path.stem))
    metadata = {path.stem: read_metadata(path) for path in paths}
    pages = {name: Notebook(name, said, root) for name, said in metadata.items() if said is not None}
    makers: dict[str, str] = {}
    for page in pages.values():
        for path in page.makes:
            if (other := makers.setdefault(path, page.name)) != page.name:
                both = f"notebooks/{other}.ipynb and notebooks/{page.name}.ipynb"
                raise ValueError(f"{both} both make {path}: let one make another file, as its metadata says.")
        for name in page.needs:
            if name not in pages:
                raise ValueError(f"notebooks/{page.name}.ipynb needs the notebook {name}, which does not exist.")
    return pages


def passed_over(root: Path = ROOT) -> list[str]:
    """Return a sentence for each notebook that has the metadata of a page, and no name of one."""
    sentences = []
    for path in sorted((root / "notebooks").glob("[!.]*.ipynb")):
        try:
            if not PAGE.fullmatch(path.stem) and read_metadata(path) is not None:
                remedy = "pages have names such as 13_mine.ipynb"
                sentences.append(f"notebooks/{path.name} is passed over: {remedy}.")
        except ValueError:  # no notebook, so no page either
            continue
    return sentences


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
        print("".join(f"{sentence}\n" for sentence in passed_over()), end="", file=sys.stderr)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
