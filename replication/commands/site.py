"""Build the site into build/site: the documents of docs/, every notebook with its outputs, all figures with
links to their tables, the API, and the atom browser.

The sources are gathered in build/site-source, whose folders are those of the repository, so that links
between documents stay as they are. Neither the build nor the pages load anything from the network."""

from __future__ import annotations

import argparse
import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml

from replication.commands import CommandError, makers, order
from replication.commands.readme import address, page_title
from replication.study.paths import ROOT
from replication.study.stages import git_commit
from writesae.files import read_json

DOCUMENTS = {  # in the order of the navigation
    "docs/method.md": "Method",
    "docs/results.md": "Results",
    "docs/scorecard.md": "Scorecard",
    "docs/own-model.md": "Your own model",
    "docs/models.md": "Supported models",
    "docs/performance.md": "Performance",
    "docs/profiles.md": "Profiles and GPU",
    "docs/reproducibility.md": "Reproducibility",
    "docs/glossary.md": "Glossary",
    "docs/online.md": "The tour online",
}
CODE = re.compile(r"(^```.*?^```[^\n]*$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^\s$](?:[^$\n]*[^\s$])?)\$", re.DOTALL)
LINK = re.compile(r"(!?)\[((?:\[[^\]]*\]|[^\[\]])*)\]\(([^()\s]+)\)")
FIGURE = re.compile(r"^!\[[^\]]*\]\((?:[\w./]*/)?mini/(\w+)\.png\)$", re.MULTILINE)


# Markdown


def with_formulas(text: str) -> str:
    """Return Markdown with its formulas, outside code, as MathML."""
    from latex2mathml.converter import convert

    def formula(match: re.Match) -> str:
        block, inline = match.groups()
        if block is None:
            return convert(inline).replace("|", "&#124;")
        return f'\n\n<div class="formula">{convert(block.strip(), display="block")}</div>\n\n'

    parts = CODE.split(text)
    return "".join(part if i % 2 else FORMULA.sub(formula, part) for i, part in enumerate(parts))


def with_links(text: str, folder: Path) -> str:
    """Return Markdown whose links lead to pages of the site, where there are such; other links within the
    repository become plain text, as do badges. folder: of the document, from the repository's root."""

    def link(match: re.Match) -> str:
        image, label, target = match.groups()
        if target.startswith(("http:", "https:", "#")):
            return match[0] if not image else ""
        name, _, anchor = target.partition("#")
        path = (ROOT / folder / name).resolve()
        if not path.is_relative_to(ROOT) or not (image or on_site(path.relative_to(ROOT))):
            return label
        target = re.sub(r"\.ipynb$", ".md", name).replace("README.md", "index.md") + (f"#{anchor}" if anchor else "")
        return f"{image}[{label}]({target})"

    text = re.sub(r"^(\[!\[.*\n)+", "", text, flags=re.MULTILINE)  # the README's badges
    parts = CODE.split(text)
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(parts))


def on_site(path: Path) -> bool:
    """Return whether the site has a page or a file for a path of the repository."""
    name = path.as_posix()
    notebook = path.parent == Path("notebooks") and path.suffix == ".ipynb"
    data = path.parts[0] in ("results", "paper", "figures") and (ROOT / path).is_file()
    return notebook or data or name in (*DOCUMENTS, "README.md", "CHANGELOG.md", "CONTRIBUTING.md")


def notebook_page(path: Path, folder: Path) -> str:
    """Return a notebook as Markdown, with an anchor at each cell that draws a figure or makes a table.

    Its pictures are written into a folder."""
    parts, made = [], makers.cells(path.stem) if path.stem in order.notebooks() else {}
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        drawn = re.findall(r'titles\.save\(figure, "(\w+)"', cell.source)
        parts += [f'<a id="{name}"></a>' for name in (*drawn, *(table for table in made if made[table] == number))]
        if cell.cell_type == "markdown":
            parts.append(with_links(cell.source, Path("notebooks")))
            continue
        parts.append(f'<details markdown="1"><summary>Code</summary>\n\n```python\n{cell.source}\n```\n\n</details>')
        for place, output in enumerate(cell.get("outputs", [])):
            parts.append(shown(output, folder, f"{path.stem}-{number}-{place}.png"))
    return "\n\n".join(parts)


def shown(output: nbformat.NotebookNode, folder: Path, name: str) -> str:
    """Return one output of a cell as Markdown."""
    data = output.get("data", {})
    if "image/png" in data:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(base64.b64decode(data["image/png"]))
        return f"![a figure of this page]({folder.name}/{name})"
    if "text/markdown" in data:
        return data["text/markdown"]
    if "text/html" in data:
        html = re.sub(r"<style.*?</style>|<script.*?</script>", "", data["text/html"], flags=re.DOTALL)
        return '<div class="output">' + re.sub(r"\n\s*\n", "\n", html) + "</div>"
    text = output.get("text") or data.get("text/plain", "")
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


# Figures


def sources(name: str, pages: dict[str, order.Notebook]) -> str:
    """Return a line with the page of a figure, the tables that were there when it was drawn, and their commit."""
    page = next(page for page in pages.values() if f"figures/{{profile}}/{name}.png" in page.makes)
    cells = nbformat.read(ROOT / "notebooks" / f"{page.name}.ipynb", as_version=4).cells
    drawn = next(number for number, cell in enumerate(cells) if f'titles.save(figure, "{name}"' in cell.source)
    made = {table: number for table, number in makers.cells(page.name).items() if number <= drawn}
    made = sorted(made, key=made.get, reverse=True)  # the nearest first
    tables = [path for path in (f"results/mini/{table}.csv" for table in made) if (ROOT / path).is_file()]
    rows = ", ".join(f"[{Path(path).name}](../{path})" for path in tables)
    commits = {read_json(ROOT / f"{path}.json")["commit"][:10] for path in tables}
    where = f"[the cell that draws it](../notebooks/{page.name}.md#{name})"
    if repository := address():
        commits = {f"[{name}]({repository}/commit/{name})" for name in commits}
    return f"<small>{where} · rows: {rows} · commit {', '.join(sorted(commits))}</small>"


def figures_page() -> str:
    """Return the index of figures, with a line of sources below each."""
    text = (ROOT / "figures" / "README.md").read_text(encoding="utf-8")
    pages = order.notebooks()
    drawn = {Path(path).stem for page in pages.values() for path in page.makes}

    def figure(match: re.Match) -> str:
        return f"{match[0]}\n\n{sources(match[1], pages)}" if match[1] in drawn else match[0]

    return FIGURE.sub(figure, with_links(text, Path("figures")))


# The site


def gather(folder: Path) -> list:
    """Write the sources of the site into a folder, and return the navigation."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("figures/mini", "figures/bench", "results/mini", "results/bench", "paper", "docs/images"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.pdf.json", ".*"))
    shutil.copy(ROOT / "docs" / "site.css", folder)
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", *DOCUMENTS):
        text = (ROOT / name).read_text(encoding="utf-8")
        target = folder / name.replace("README.md", "index.md")
        target.write_text(with_formulas(with_links(text, Path(name).parent)), encoding="utf-8")
    (folder / "figures" / "index.md").write_text(with_formulas(figures_page()), encoding="utf-8")
    (folder / "notebooks").mkdir()
    names = ["tour", *sorted(order.notebooks())]
    for name in names:
        text = notebook_page(ROOT / "notebooks" / f"{name}.ipynb", folder / "notebooks" / "images")
        (folder / "notebooks" / f"{name}.md").write_text(with_formulas(text), encoding="utf-8")
    shown_first = [{"Start": "index.md"}, {"Tour": "notebooks/tour.md"}]
    method, results, scorecard, *others = [{title: name} for name, title in DOCUMENTS.items()]
    pages = [{page_title(name): f"notebooks/{name}.md"} for name in names[1:]]
    browse = [{"Figures": "figures/index.md"}, {"Atoms": browser_page(folder)}]
    others += [{"Changelog": "CHANGELOG.md"}, {"Contributing": "CONTRIBUTING.md"}]
    return [
        *shown_first,
        method,
        results,
        scorecard,
        {"Pages": pages},
        *browse,
        {"Guide": others},
        {"API": api(folder)},
    ]


def browser_page(folder: Path) -> str:
    """Write the page of the atom browser."""
    text = "# The atom browser\n\nAll atoms of all cells: search, sort, and look at one. "
    if (folder / "figures" / "mini" / "atoms.html").is_file():
        text += "[On a page of its own](figures/mini/atoms.html).\n\n"
        text += '<iframe class="browser" title="The atom browser" src="../figures/mini/atoms.html"></iframe>\n'
    else:
        text += "This copy of the site was built without it: `make browser`, then `make site`.\n\n"
        text += "![The atom browser](figures/mini/atoms_browser.png)\n"
    (folder / "atoms.md").write_text(text, encoding="utf-8")
    return "atoms.md"


def api(folder: Path) -> list:
    """Write a page per module of `writesae`, and return their navigation."""
    (folder / "api").mkdir()
    paths = sorted((ROOT / "writesae").rglob("*.py"))
    modules = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in paths]
    pages = []
    for module in (name.removesuffix(".__init__") for name in modules):
        if not (ROOT / Path(*module.split("."))).is_dir() or module == "writesae":
            (folder / "api" / f"{module}.md").write_text(f"# {module}\n\n::: {module}\n", encoding="utf-8")
            pages.append({module: f"api/{module}.md"})
    return pages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "site", help="default: build/site")


def main(options: argparse.Namespace) -> int:
    source = options.folder.with_name(f"{options.folder.name}-source").resolve()
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    config |= dict(docs_dir=str(source), site_dir=str(options.folder.resolve()), nav=gather(source))
    config["copyright"] = f"Built from commit {git_commit()}; the numbers are those of the profile mini"
    config["plugins"][1]["mkdocstrings"]["handlers"]["python"]["paths"] = [str(ROOT)]
    file = source.with_suffix(".json")  # JSON is YAML
    file.write_text(json.dumps(config), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", file])
    if done.returncode:
        raise CommandError(
            "mkdocs could not build it: see above, and install `pip install -e '.[site]'` if it is missing"
        )
    print(
        f"The site is in {options.folder}: open index.html, or serve it with `python -m http.server -d {options.folder}`."
    )
    return 0
