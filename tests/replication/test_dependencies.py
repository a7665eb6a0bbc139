"""The import closure of a package made for this test, and what the notebooks declare to make."""

import ast
import json
import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from replication.commands import order
from replication.study import fingerprint, paths

MODULES = {
    "__init__.py": "",
    "base.py": "x = 1\n",
    "middle.py": "from writesae.base import x\n",
    "late.py": "def f():\n    from writesae import middle\n    return middle\n",
    "alone.py": "import json\n",
    "hosts/__init__.py": "",
    "hosts/one.py": "from . import shared\n",
    "hosts/two.py": "from ..alone import *\n",
    "hosts/shared.py": "",
    "plain.py": "import writesae.hosts.shared as s\n",
}


def _notebook(*cells, **said):
    code = [{"cell_type": "code", "source": cell, "metadata": {}, "outputs": []} for cell in cells]
    return json.dumps({"cells": code, "metadata": {"writesae": said}, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture
def root(tmp_path):
    for name, source in MODULES.items():
        path = tmp_path / "writesae" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def _files(module, root):
    paths = [fingerprint.module_file(name, root) for name in fingerprint.module_closure([module], root)]
    assert len(paths) == len(set(paths))
    return {path.relative_to(root / "writesae").as_posix() for path in paths}


def test_closure_follows_imports_of_every_form(root):
    assert _files("writesae.late", root) == {"__init__.py", "late.py", "middle.py", "base.py"}
    assert _files("writesae.alone", root) == {"alone.py"}
    assert _files("writesae.hosts.one", root) == {"hosts/__init__.py", "hosts/one.py", "hosts/shared.py"}
    assert _files("writesae.hosts.two", root) == {"hosts/two.py", "alone.py"}
    assert _files("writesae.plain", root) == {"plain.py", "hosts/shared.py"}


def test_closure_stops_at_what_is_hashed_by_its_content(root):
    (root / "writesae" / "hosts" / "load.py").write_text("import writesae.alone\n")
    (root / "writesae" / "page.py").write_text("from writesae.hosts.load import x\nimport writesae.base\n")
    assert _files("writesae.page", root) == {"page.py", "base.py"}


def test_closure_survives_a_circle(root):
    (root / "writesae" / "base.py").write_text("def f():\n    import writesae.middle\n")
    assert _files("writesae.base", root) == _files("writesae.middle", root)


@pytest.mark.parametrize("changed", ["base.py", "middle.py", "alone.py", "hosts/shared.py"])
def test_a_changed_module_changes_the_hash_of_exactly_its_dependents(root, changed):
    names = ["writesae." + name[:-3].replace("/", ".") for name in MODULES if "__init__" not in name]
    before = {name: fingerprint.code_hash([name], root) for name in names}
    (root / "writesae" / changed).write_text(MODULES[changed] + "y = 2\n")
    after = {name: fingerprint.code_hash([name], root) for name in names}
    dependents = {name for name in names if changed in _files(name, root)}
    assert {name for name in names if before[name] != after[name]} == dependents
    assert len(dependents) < len(names)


def test_comments_docstrings_and_layout_do_not_count(root):
    before = fingerprint.code_hash(["writesae.middle"], root)
    (root / "writesae" / "base.py").write_text('"""Said better."""\n\n# why\nx = (\n    1\n)\n')
    changed = fingerprint.code_hash(["writesae.middle"], root)
    (root / "writesae" / "base.py").write_text('"""Said best."""\nx = 1\n')
    assert changed == fingerprint.code_hash(["writesae.middle"], root)
    (root / "writesae" / "base.py").write_text("# why\nx = ( 1 )\n")
    assert before == fingerprint.code_hash(["writesae.middle"], root)


def test_each_version_of_a_module_is_parsed_once(root, monkeypatch):
    parsed, parse = [], ast.parse
    monkeypatch.setattr(fingerprint.ast, "parse", lambda source: parsed.append(source) or parse(source))
    first = fingerprint.code_hash(["writesae.late"], root)
    assert set(parsed) == {MODULES[name] for name in ("__init__.py", "base.py", "middle.py", "late.py")}
    parsed.clear()
    assert fingerprint.code_hash(["writesae.late"], root) == first
    assert not parsed
    (root / "writesae" / "base.py").write_text("x = 100\n")
    assert fingerprint.code_hash(["writesae.late"], root) != first
    assert set(parsed) == {"x = 100\n"}


def test_rules_hold_needs_files_and_outputs(root):
    (root / "models").mkdir()
    (root / "models" / "w.json").write_text("{}")
    (root / "notebooks" / "00_a.ipynb").write_text(_notebook("%matplotlib inline\nfrom writesae import middle"))
    said = {"needs": ["00_a"], "files": ["models/*.json"], "makes": ["results/{profile}/b.csv"]}
    (root / "notebooks" / "01_b.ipynb").write_text(_notebook("x = 1", "!ls", "%%bash\nls -l", **said))
    rules = order.make_rules(root).splitlines()
    stamps = "$(STAMPS)"
    assert f"{stamps}/00_a: notebooks/00_a.ipynb" in rules
    assert f"{stamps}/01_b: notebooks/01_b.ipynb models/w.json {stamps}/00_a" in rules
    assert f"{stamps}/01_b: $(if $(wildcard results/$(PROFILE)/b.csv),,always)" in rules


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "not a readable notebook"),
        (_notebook("", needs=["99_z"]), "needs the notebook 99_z"),
        (_notebook("", files=["models/*.json"]), "there is no such file"),
    ],
)
def test_a_notebook_that_cannot_be_read_is_one_sentence(root, content, sentence):
    (root / "notebooks" / "00_a.ipynb").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        order.make_rules(root)


def test_notebooks_come_after_those_that_they_need(root):
    needs = {"00_a": [], "08_b": ["10_d"], "09_c": [], "10_d": ["00_a"], "12_e": ["08_b", "09_c"]}
    for name, needed in needs.items():
        (root / "notebooks" / f"{name}.ipynb").write_text(_notebook("", needs=needed))
    assert order.order(root) == ["00_a", "09_c", "10_d", "08_b", "12_e"]
    (root / "notebooks" / "10_d.ipynb").write_text(_notebook("", needs=["12_e"]))
    with pytest.raises(ValueError, match="08_b, 10_d, 12_e need one another in a circle"):
        order.order(root)


def test_a_module_that_is_missing_or_broken_is_one_sentence(root):
    with pytest.raises(ValueError, match="no module writesae.nothing"):
        fingerprint.module_closure(["writesae.nothing"], root)
    (root / "writesae" / "base.py").write_text("x = = 1\n")
    with pytest.raises(ValueError, match=r"base.py is not valid Python: line 1"):
        fingerprint.module_closure(["writesae.late"], root)


def test_every_committed_table_is_made_again_where_it_is_missing():
    made = {name for notebook in order.notebooks().values() for name in notebook.makes}
    tables = {f"results/{{profile}}/{path.name}" for path in (paths.ROOT / "results/mini").glob("[!.]*.csv")}
    tables = {
        name for name in tables if not re.search("/(sweep-|every_cell|ablation_starts|ablation_ladder|repeats)", name)
    }  # `make sweep`, `make repeats` and the pages that use their tables make these
    assert tables and tables <= made, f"no notebook says that it makes {', '.join(sorted(tables - made))}"


def test_the_file_needs_only_python_3_9():
    ast.parse(Path(order.__file__).read_text(), feature_version=(3, 9))


def test_every_version_of_the_lock_runs_on_the_oldest_python_that_is_promised():
    """Debian 12 has Python 3.11.2: pip does not install a pin that wants 3.11.5 there."""
    promised = SpecifierSet(re.search('requires-python = "(.+)"', (paths.ROOT / "pyproject.toml").read_text())[1])
    oldest = next(f"3.{minor}.0" for minor in range(20) if promised.contains(f"3.{minor}.0"))
    wanted = {}
    for line in (paths.ROOT / "requirements.lock").read_text().splitlines():
        name, _, version = line.partition("==")
        try:
            installed = metadata(name) if version else {}
        except PackageNotFoundError:  # of an extra that is not installed here
            continue
        if installed.get("Version", "").split("+")[0] == version:
            wanted[line] = installed.get("Requires-Python") or ""
    assert len(wanted) > 50
    assert [line for line, pythons in wanted.items() if not SpecifierSet(pythons).contains(oldest)] == []
