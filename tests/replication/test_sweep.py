"""Sweeps: one process, compared with several and with a restart after a kill; one row, with a plain run."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from conftest import SMALL
from joblib.externals.loky import get_reusable_executor

from replication.__main__ import main
from replication.commands import CommandError, sweep
from replication.commands.sweep import Grid, load_grid, run_sweep
from replication.statistics import wilson
from replication.study import paths
from replication.study import study as study_module
from replication.study.lock import LockError
from replication.study.profile import Profile, load_profile
from writesae.evaluate.firings import CellSAE, Places, draw_positions, firings_at
from writesae.evaluate.replacement import replace
from writesae.harvesting import harvest
from writesae.hosts import load
from writesae.hosts.load import load_host
from writesae.sae.train import train
from writesae.text import Windows

LENGTH = 48
SETTINGS = dict(n_atoms=16, k=4, tokens=30 * 2 * LENGTH, batch_windows=2, lr=3e-3, final_lr=3e-4)
GRID = dict(
    name="small",
    hosts="all",
    layers=[0, 3],
    heads=[3],
    variants=dict(
        state=dict(role="survey", target="state"), write=dict(role="main", target="write", settings=dict(k=3))
    ),
    seeds=[0, 1],
    firings=25,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Gated DeltaNet with random weights, and the tokenizer of the Gated DeltaNet in models/."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    load.adapter("gated_deltanet").build(SMALL["gated_deltanet"] | dict(vocab_size=4096)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(paths.ROOT / "models" / "gated_deltanet" / name, folder)
    return folder


@pytest.fixture(scope="module")
def profile(folder):
    smoke = load_profile("smoke").model_dump()
    host = dict(path=str(folder), cells=dict(middle=dict(layer=1, sigma_ratio=3.0)))
    data = dict(window=LENGTH, sae_windows=24, heldout_windows=24, firing_windows=8, survey_windows=8)
    data |= dict(first_position=8, batch_windows=4)
    saes = dict(main=SETTINGS, survey=SETTINGS | dict(tokens=20 * 2 * LENGTH))
    return Profile(
        **smoke
        | dict(hosts=dict(tiny=host), data=data, saes=smoke["saes"] | saes)
        | dict(replacement=smoke["replacement"] | dict(survey_windows=8))
    )


def random_windows(host, split, length, limit, text=None):
    generator = torch.Generator().manual_seed(len(split))
    return Windows(torch.randint(300, (limit, length), generator=generator), torch.arange(limit) // 2)


@pytest.fixture(autouse=True, scope="module")
def no_corpus():
    """Replace the corpus by random tokens, because the corpus is slow to read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_module, "split_windows", random_windows)
        yield


@pytest.fixture
def output(tmp_path, monkeypatch):
    """An empty output folder. Older worker processes, which use another folder, are stopped."""
    get_reusable_executor().shutdown(wait=True)
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def serial(profile, tmp_path_factory):
    """The table of the whole grid, computed in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WRITESAE_OUTPUT", str(tmp_path_factory.mktemp("serial")))
        return run_sweep(profile, Grid(**GRID), jobs=1)


def records(output: Path) -> list[Path]:
    return sorted((output / "build/smoke/sweeps/small/saes").glob("*.csv"))


def without_seconds(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns="seconds")


def test_every_line_is_that_of_a_plain_run(output, profile, folder, serial):
    assert len(serial) == 2 * 1 * 2 * 2  # layers * heads * variants * seeds
    assert not serial[["host", "layer", "head", "name", "seed"]].duplicated().any()
    row = serial.query("layer == 3 and head == 3 and name == 'write' and seed == 1").iloc[0]

    host = load_host(folder)
    windows = {split: random_windows(host, split, LENGTH, 24) for split in ("sae", "heldout")}
    found = {s: harvest(host, x.tokens, [(3, 3)], batch=24, progress=False)[3, 3] for s, x in windows.items()}
    settings = profile.saes.main.model_copy(update=dict(k=3, seed=1))
    sae, record = train(
        found["sae"].history("write"), settings, progress=False, validation=found["heldout"].history("write")
    )
    assert row.fvu == pytest.approx(record.validation_fvu, rel=1e-3)
    assert (row.k, row.alive, row.tokens) == (3, record.alive, 30 * 2 * LENGTH)

    writes = found["heldout"].at(slice(8)).history("write")
    cell_sae = CellSAE(3, 3, "write", "added", sae, *sae.encode_history(writes), writes)
    heldout = windows["heldout"][slice(0, 8)]
    drawn = firings_at(cell_sae, draw_positions(heldout.passage, 8, LENGTH - 2, 25, profile.seed))
    native = host.run(heldout.tokens)
    options = dict(scopes=("write",), amplitudes=("coefficient", "matched_norm", "projection"))
    kl = replace(host, native, cell_sae, drawn, Places.of(drawn), profile.seed, **options)
    for amplitude in options["amplitudes"]:
        part = kl[kl.amplitude == amplitude]
        for name in ("atom", "random", "mean_write"):
            wanted = (part[f"kl_{name}"] < part.kl_delete).mean()
            assert row[f"win_{name}_{amplitude}"] == pytest.approx(wanted, abs=1e-5), (name, amplitude)
        wins = int((part.kl_atom < part.kl_delete).sum())
        assert row[f"ci_high_atom_{amplitude}"] == pytest.approx(wilson(wins, 25)[1], abs=1e-5)
    assert row.firings == 25


KILLED = """
import os, signal, sys
from replication.__main__ import main
from replication.commands import CommandError, sweep
from replication.study.lock import LockError
from replication.study.profile import Profile
import test_sweep
test_sweep.study_module.split_windows = test_sweep.random_windows
profile, grid = Profile.model_validate_json(sys.argv[1]), sweep.Grid(**test_sweep.GRID)
real = sweep.stages.write_table

def write(table, path, provenance):
    real(table, path, provenance)
    if len(test_sweep.records(test_sweep.Path(os.environ["WRITESAE_OUTPUT"]))) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

sweep.stages.write_table = write
sweep.run_sweep(profile, grid, jobs=1)
"""


def test_a_killed_sweep_goes_on_in_several_processes_to_the_same_table(output, profile, serial):
    path = os.pathsep.join([str(paths.ROOT), str(paths.ROOT / "tests"), str(paths.ROOT / "tests" / "replication")])
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=path)
    command = [sys.executable, "-c", KILLED, profile.model_dump_json()]
    killed = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    stored = {path: path.stat().st_mtime_ns for path in records(output)}
    assert len(stored) == 3
    table = run_sweep(profile, Grid(**GRID), jobs=2)
    pd.testing.assert_frame_equal(without_seconds(table), without_seconds(serial), check_exact=True)
    assert {path: path.stat().st_mtime_ns for path in stored} == stored


def test_what_is_up_to_date_is_not_run_again(output, profile):
    here = dict(layers=[0], heads=[0], seeds=[0])
    grid = Grid(**GRID | here)
    first, stored = run_sweep(profile, grid, jobs=1), records(output)
    stamps = {path: path.stat().st_mtime_ns for path in stored}
    again = run_sweep(profile, grid, jobs=1)
    pd.testing.assert_frame_equal(again, first)
    assert {path: path.stat().st_mtime_ns for path in records(output)} == stamps

    stored[1].write_text("damaged")
    pd.testing.assert_frame_equal(without_seconds(run_sweep(profile, grid, jobs=1)), without_seconds(first))
    changed = {path for path in stored if path.stat().st_mtime_ns != stamps[path]}
    assert changed == {stored[1]}

    more = Grid(**GRID | here | dict(firings=4, draw="atoms"))
    assert (run_sweep(profile, more, jobs=1).firings == 4).all()
    assert all(path.stat().st_mtime_ns != stamps[path] for path in stored)
    assert not (output / "build/smoke/sweeps/small/harvest").exists()


def test_saes_stay_only_where_they_are_asked_for(output, profile):
    here = dict(layers=[0], heads=[0], seeds=[1])
    run_sweep(profile, Grid(**GRID | here | dict(keep=False)), jobs=1)
    assert not list((output / "build/smoke/saes").glob("*"))
    run_sweep(profile, Grid(**GRID | here | dict(name="kept")), jobs=1)
    study = study_module.Study(profile)
    assert study.sae("tiny", 0, 0, "write", "sweep-kept-write-s1").k == 3


def test_long_inputs_are_trained_on_from_disk(output, profile, serial, monkeypatch):
    monkeypatch.setattr(sweep, "IN_MEMORY", 0)
    table = run_sweep(profile, Grid(**GRID | dict(layers=[0])), jobs=1)
    wanted = serial[serial.layer == 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(without_seconds(table), without_seconds(wanted), check_exact=True)


def test_a_point_that_fails_stops_no_other(output, profile):
    wild = dict(role="survey", target="state", settings=dict(lr=1e30))
    grid = Grid(**GRID | dict(layers=[0], heads=[0], seeds=[0], variants=GRID["variants"] | dict(wild=wild)))
    with pytest.raises(CommandError, match=r"1 SAEs failed, the others are done. tiny-L0-H0-wild-s0: The loss is"):
        run_sweep(profile, grid, jobs=2)
    assert [path.stem for path in records(output)] == ["tiny-L0-H0-state-s0", "tiny-L0-H0-write-s0"]
    assert not (output / "results/smoke/sweep-small.csv").exists()


def test_a_worker_that_dies_is_one_sentence(output, profile, monkeypatch):
    monkeypatch.setattr(sweep, "harvest_layer", _die)
    with pytest.raises(CommandError, match=r"^The workers of a sweep ended \(.*\); what is done is kept\.$"):
        run_sweep(profile, Grid(**GRID), jobs=2)


def _die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_sweep_waits_for_no_other_writer(output, profile, monkeypatch):
    def refused(paths):
        raise LockError("Another run with this profile is at work.")

    monkeypatch.setattr(sweep, "writing", refused)
    with pytest.raises(LockError):
        run_sweep(profile, Grid(**GRID), jobs=1)
    assert not records(output)


WRONG = [
    (dict(hosts=["other"]), "no host 'other': choose one of tiny"),
    (dict(layers=[2]), "Layer 2 of .* is not recurrent: choose one of 0, 1, 3, 4"),
    (dict(heads=[4]), "has no head 4"),
    (dict(variants=dict(a=dict(role="main", target="state", settings=dict(k=99)))), "variants.a: .*k = 99 exceeds"),
    (dict(variants=dict(a=dict(role="main", target="state", settings=dict(k=0)))), "variants.a: k: .*greater than 0"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_grid_that_does_not_fit_is_one_sentence(output, profile, change, message):
    with pytest.raises(ValueError, match=message):
        run_sweep(profile, Grid(**GRID | change), jobs=1)
    assert not records(output)


def test_a_repeated_value_counts_once(profile, output):
    twice = {name: 2 * GRID[name] for name in ("layers", "heads", "seeds")}
    assert sweep.Sweep(profile, Grid(**GRID | twice)).points() == sweep.Sweep(profile, Grid(**GRID)).points()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "Grid bad.yaml is not a YAML mapping"),
        ("{", "Grid bad.yaml is not a YAML mapping"),
        (dict(seeds=[]), "Grid bad.yaml: seeds: "),
        (dict(variants={"a/b": dict(role="main", target="state")}), "Grid bad.yaml: variants.a/b.*match pattern"),
        (dict(hotels="all"), "Grid bad.yaml: hotels: Extra inputs"),
    ],
)
def test_a_file_that_is_no_grid_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    content = {name: value for name, value in GRID.items() if name != "name"}
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(content | text))
    with pytest.raises(ValueError, match=message):
        load_grid(path)


def test_a_missing_grid_is_one_sentence(output, capsys):
    assert main(["sweep", "--profile", "smoke", "--grid", "profiles/sweeps/none.yaml"]) == 1
    assert capsys.readouterr().err.strip() == (
        "sweep failed: There is no grid profiles/sweeps/none.yaml: profiles/sweeps/ has cells, ladder, "
        "ladder_cells, paper, seeds, start."
    )


def test_the_grids_of_the_repository_fit_its_profiles():
    profile, grids = load_profile("smoke"), paths.ROOT / "profiles" / "sweeps"
    cells = sweep.Sweep(profile, load_grid(grids / "cells.yaml")).points()
    assert len(cells) == 2 * 2 * (6 * 4 + 8 * 8 + 8 * 4)  # targets * starts * (layers * heads of each host)
    paper = sweep.Sweep(profile, load_grid(grids / "paper.yaml")).points()
    assert len(paper) == 5 * 3 * 3 * 4  # variants * seeds * layers * heads
    assert {point.layer for point in paper} == {1, 4, 6}
