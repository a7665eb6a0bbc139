"""Code that depends on the machine it runs on, found in the syntax tree of every module and notebook."""

import ast

import nbformat
import pytest

from replication.commands import order
from replication.study.paths import ROOT

FOLDERS = ("writesae", "replication", "benchmarks", "notebooks")


def code():
    """The source of every module, and of every page without its magics, by path."""
    modules = {
        path: path.read_text(encoding="utf-8") for folder in FOLDERS for path in (ROOT / folder).rglob("[!.]*.py")
    }
    for name in order.notebooks():
        path = ROOT / "notebooks" / f"{name}.ipynb"
        cells = nbformat.read(path, as_version=4).cells
        modules[path] = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    return {path.relative_to(ROOT).as_posix(): ast.parse(source) for path, source in modules.items()}


CODE = code()


def called(node):
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def text_in_the_locale(node):
    """Whether a call reads or writes text without saying that it is UTF-8."""
    if not isinstance(node, ast.Call):
        return False
    name, given = called(node), {keyword.arg: keyword.value for keyword in node.keywords}
    if name in ("run", "Popen", "check_output"):
        return "text" in given and "encoding" not in given
    if name in ("read_text", "write_text"):
        return "encoding" not in given
    if name == "open" and not (isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "tarfile"):
        mode = given.get("mode", node.args[1] if len(node.args) > 1 else None)
        return "encoding" not in given and "b" not in getattr(mode, "value", "")
    return name in ("fdopen", "NamedTemporaryFile") and "encoding" not in given


def a_docstring_as_data(node):
    """Whether a node reads a docstring, which `python -OO` takes away."""
    names = {getattr(node, "id", None), getattr(node, "attr", None)}
    return isinstance(node, (ast.Name, ast.Attribute)) and bool(names & {"__doc__", "getdoc"})


def an_assertion(node):
    """Whether a node is a check that `python -O` takes away."""
    return isinstance(node, ast.Assert)


def a_call_of_linux(node):
    """Whether a node asks for cores as only Linux answers; joblib.cpu_count answers everywhere."""
    return getattr(node, "attr", None) in ("sched_getaffinity", "sched_setaffinity")


def a_filter_of_archives(node):
    """Whether a call gives a filter, which Python knows from 3.11.4 on; Debian 12 has 3.11.2."""
    return isinstance(node, ast.Call) and called(node) == "extractall" and "filter" in {x.arg for x in node.keywords}


FAULTS = [text_in_the_locale, a_docstring_as_data, an_assertion, a_call_of_linux, a_filter_of_archives]


@pytest.mark.parametrize("fault", FAULTS)
def test_no_module_depends_on_locale_flags_or_system(fault):
    places = [f"{name}:{node.lineno}" for name, tree in CODE.items() for node in ast.walk(tree) if fault(node)]
    assert not places, f"{fault.__name__.replace('_', ' ')}: {', '.join(places)}"


@pytest.mark.parametrize(
    ("fault", "source", "right"),
    [
        (text_in_the_locale, "path.read_text()", "path.read_text(encoding='utf-8')"),
        (text_in_the_locale, "path.write_text(x)", "path.write_text(x, encoding='utf-8')"),
        (text_in_the_locale, "open(path)", "open(path, 'rb')"),
        (text_in_the_locale, "path.open('w')", "tarfile.open(fileobj=x)"),
        (text_in_the_locale, "subprocess.run(x, text=True)", "subprocess.run(x, encoding='utf-8')"),
        (a_docstring_as_data, "ArgumentParser(description=__doc__)", "'__doc__'"),
        (a_docstring_as_data, "f.__doc__", "inspect.getsource(f)"),
        (an_assertion, "assert x", "check(x)"),
        (a_call_of_linux, "os.sched_getaffinity(0)", "joblib.cpu_count()"),
        (a_filter_of_archives, "archive.extractall(folder, filter='data')", "archive.extractall(folder)"),
    ],
)
def test_each_fault_is_seen(fault, source, right):
    wrong, fine = (any(map(fault, ast.walk(ast.parse(text)))) for text in (source, right))
    assert wrong and not fine
