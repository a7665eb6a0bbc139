"""A tiny notebook, run as in Make: the published outputs, and the state after a failure."""

import os
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from replication.__main__ import main
from replication.commands import CommandError, run
from replication.study.paths import Paths

PRINTS = "import sys\nprint(profile)\nprint('progress', file=sys.stderr)\nprint('done')"


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    monkeypatch.delenv("WRITESAE_OUTPUT", raising=False)
    monkeypatch.setattr("replication.study.paths.ROOT", tmp_path)
    (tmp_path / "profiles").mkdir()
    for profile in ("mini", "paper"):
        (tmp_path / "profiles" / f"{profile}.yaml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(run, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(run, "check_disk", lambda profile: None)
    return tmp_path / "notebooks"


def _notebook(folder, *sources):
    parameters = new_code_cell("profile = 'mini'", metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    content = new_notebook(
        cells=[new_markdown_cell("# Title"), parameters, *map(new_code_cell, sources)], metadata=kernel
    )
    path = folder / "00_toy.ipynb"
    path.write_text(nbformat.writes(content) + "\n")
    os.utime(path, (1_000_000_000,) * 2)
    return path


def test_outputs_are_published_and_nothing_else_changes(notebooks, capfd):
    path = _notebook(notebooks, PRINTS, "1 + 1")
    path.chmod(0o664)
    source = nbformat.read(path, as_version=4)
    umask = os.umask(0o077)
    run.run("00_toy", "mini")
    os.umask(umask)
    first = path.read_bytes()
    published = nbformat.reads(first.decode(), as_version=4)
    assert [cell.get("execution_count") for cell in published.cells] == [None, 1, 2, 3]
    assert [(o.name, o.text) for o in published.cells[2].outputs] == [("stdout", "mini\ndone\n")]
    assert published.cells[3].outputs[0].data["text/plain"] == "2"
    assert published.cells[3].outputs[0].execution_count == 3
    for cell in published.cells[1:]:
        cell.update(execution_count=None, outputs=[])
    assert published == source
    assert path.stat().st_mtime == 1_000_000_000 and path.stat().st_mode & 0o777 == 0o664
    assert "WARNING" not in capfd.readouterr().err
    run.run("00_toy", "mini")
    assert path.read_bytes() == first


@pytest.mark.parametrize(("profile", "variable"), [("paper", None), ("mini", "elsewhere")])
def test_other_profiles_and_test_runs_do_not_publish(notebooks, monkeypatch, profile, variable):
    if variable:
        monkeypatch.setenv("WRITESAE_OUTPUT", variable)
    path = _notebook(notebooks, "print(profile)")
    before = path.read_bytes()
    executed = run.run("00_toy", profile)
    assert path.read_bytes() == before
    assert executed == Paths(profile).build / "notebooks" / "00_toy.ipynb"
    assert nbformat.read(executed, as_version=4).cells[-1].outputs[0].text == f"{profile}\n"


def test_a_failure_is_one_sentence_and_leaves_the_notebook(notebooks, monkeypatch, capsys):
    path = _notebook(notebooks, "print('before')", "raise ValueError('Layer 3 is not recurrent.')")
    before = path.read_bytes()
    assert main(["run", "00_toy"]) == 1
    assert path.read_bytes() == before
    assert "00_toy failed: ValueError: Layer 3 is not recurrent." in capsys.readouterr().err.splitlines()


def test_a_gpu_that_is_too_small_is_answered_with_the_settings_to_lower(notebooks):
    _notebook(notebooks, "import torch", "raise torch.OutOfMemoryError('CUDA out of memory.')")
    with pytest.raises(
        CommandError, match=r"^The GPU's memory is too small: in the profile, lower data\.batch_windows"
    ):
        run.run("00_toy", "mini")


def test_an_edit_during_the_run_is_kept(notebooks):
    path = _notebook(notebooks)
    with pytest.raises(CommandError, match="was edited while it ran"):
        run.publish(path, b"as it was", path)


def test_unknown_names_are_one_sentence(notebooks):
    with pytest.raises(CommandError, match="no notebook 99_x"):
        run.run("99_x", "mini")
    _notebook(notebooks)
    with pytest.raises(CommandError, match="no profile huge"):
        run.run("00_toy", "huge")


def test_other_cells_are_refused_and_widgets_dropped_but_for_their_page():
    source = new_notebook(cells=[new_code_cell("x")])
    bar = new_output("display_data", data={run.WIDGET: {}, "text/plain": "0%"})
    ran = new_notebook(cells=[new_code_cell("x", id=source.cells[0].id, outputs=[bar], execution_count=7)])
    assert run.with_outputs(source, ran).cells[0].outputs == []
    page = {"text/html": "<p>page</p>", "text/plain": "a page"}
    ran.cells[0].outputs = [bar, new_output("display_data", data={run.WIDGET: {}, **page})]
    assert [output.data for output in run.with_outputs(source, ran).cells[0].outputs] == [page]
    with pytest.raises(ValueError, match="does not have the cells"):
        run.with_outputs(source, new_notebook(cells=[new_code_cell("y")]))


def test_a_disk_that_is_too_small_is_told_before_anything_runs(notebooks, monkeypatch, capsys):
    def refuse(profile):
        raise CommandError(f"Profile {profile} has still to write.")

    monkeypatch.setattr(run, "check_disk", refuse)
    _notebook(notebooks, "print('ran')")
    assert main(["run", "00_toy", "--profile", "paper"]) == 1
    assert capsys.readouterr().err == "00_toy failed: Profile paper has still to write.\n"
    assert not Paths("paper").build.exists()


def test_a_page_says_how_far_make_all_is(tmp_path, monkeypatch):
    monkeypatch.setenv("WRITESAE_RUN", f"77-{int(time.time()) - 600}")
    monkeypatch.setenv("WRITESAE_PAGES", "00_a 01_b 02_c 03_d")
    for name, age in (("00_a", 300), ("01_b", 5000)):  # the second is of an earlier run
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert run.progress("02_c", tmp_path) == ": 2 of 4 pages, 10 minutes so far, about 10 left"
    assert run.progress("90_x", tmp_path) == ""
    monkeypatch.setenv("WRITESAE_PAGES", "02_c")
    assert run.progress("02_c", tmp_path) == ": 1 of 1 pages, 10 minutes so far"
