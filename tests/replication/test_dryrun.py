"""Profiles of the paper's hosts, their dry runs, and one dry run of a small page through the real command."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from conftest import SMALL
from nbformat.v4 import new_code_cell, new_notebook

from replication import plots
from replication.__main__ import main
from replication.commands import dryrun
from replication.pages.hosts import choose_cells
from replication.study.paths import ROOT, Paths, dry_run
from replication.study.profile import CellRule, HostSection, lay_over, load_profile
from writesae.hosts import load

PROFILES = sorted(path.stem for path in (ROOT / "profiles").glob("[!.]*.yaml"))


@pytest.fixture
def dry(monkeypatch):
    monkeypatch.setenv("WRITESAE_DRY_RUN", "1")
    monkeypatch.delenv("WRITESAE_OUTPUT", raising=False)


def test_the_paper_profile_has_the_papers_numbers():
    paper = load_profile("paper")
    cells = paper.hosts["gated_deltanet"].cells
    assert [(cells[place].layer, cells[place].head) for place in ("early", "middle", "late")] == [
        (1, 4),
        (9, 4),
        (17, 4),
    ]
    data, main = paper.data, paper.saes.main
    assert (data.window, data.sae_windows + data.heldout_windows) == (1024, 5000)
    assert (main.n_atoms, main.k, main.lr, main.final_lr, main.warmup) == (2048, 32, 3e-4, 3e-5, 50)
    assert main.tokens == 20 * data.sae_windows * data.window
    assert (main.aux_weight, main.k_aux, main.dead_after, main.resample_every) == (1e-2, 256, 100, 250)
    assert paper.section("saes", "mamba2").main.tokens == 50 * data.sae_windows * data.window
    for name in ("paper", "single-gpu"):
        profile = load_profile(name)
        assert (profile.logit_shift.atoms, profile.logit_shift.prompts, profile.population.atoms) == (50, 500, 87)
        assert profile.section("replacement", "mamba2").firings == dict(middle=2500)
    assert sum(paper.replacement.firings.values()) == 4851


def test_a_cell_is_a_head_or_a_rule():
    one = "needs exactly one of head, sigma_ratio and cost"
    two = [dict(head=4, sigma_ratio=2.0), dict(sigma_ratio=2.0, cost="largest"), dict(head=4, cost="largest")]
    for wrong in ({}, *two):
        with pytest.raises(ValueError, match=f"the cell in layer 1 {one}"):
            CellRule(layer=1, **wrong)
    with pytest.raises(ValueError, match=f"the cell in any layer {one}"):
        CellRule()
    with pytest.raises(ValueError, match="head 4 needs the number of its layer"):
        CellRule(head=4)
    with pytest.raises(ValueError, match="Input should be 'largest'"):
        CellRule(cost="smallest")
    survey = pd.DataFrame(dict(layer=[1, 1, 1, 2], head=[0, 1, 2, 0], sigma1_over_sigma2=[2.0, 9.0, 30.0, 5.0]))
    rules = dict(early=dict(layer=1, head=2), late=dict(layer=1, sigma_ratio=12))
    chosen = choose_cells(survey, HostSection(path="x", cells=rules)).set_index("place")
    assert chosen["head"].to_dict() == dict(early=2, late=1)
    assert np.isnan(chosen.rule_sigma_ratio["early"])
    with pytest.raises(ValueError, match="head 7 does not exist: layer 1 has heads 0 to 2"):
        choose_cells(survey, HostSection(path="x", cells=dict(early=dict(layer=1, head=7))))


def test_laying_over_keeps_what_is_left_out_or_off():
    base = dict(a=1, off=0, places=dict(early=5, late=6), deep=dict(x=[1, 2], y=3), none=[])
    over = dict(a=2, off=9, places=4, deep=dict(x=[7], z=8), none=[1], new=1)
    assert lay_over(base, over) == dict(a=2, off=0, places=dict(early=4, late=4), deep=dict(x=[7], y=3), none=[])


@pytest.mark.parametrize("name", PROFILES)
def test_a_dry_run_fits_every_profile_and_is_tiny(name, monkeypatch):
    full = load_profile(name)
    monkeypatch.setenv("WRITESAE_DRY_RUN", "1")
    tiny = load_profile(name)
    assert tiny.device == "cpu" and tiny.workers == 1
    for host, section in tiny.hosts.items():
        settings = tiny.section("replacement", host)
        assert set(settings.firings) == set(full.section("replacement", host).firings)
        assert max(settings.firings.values()) < 10
        assert bool(settings.survey_firings) == bool(full.section("replacement", host).survey_firings)
        trained = tiny.section("saes", host).model_dump()
        assert max(trained[role]["tokens"] for role in ("main", "survey", "flat")) <= 400
        if not (ROOT / full.hosts[host].path).exists():
            assert Path(section.path).parent == Paths(name).root / "hosts" and section.revision is None
            assert full.hosts[host].path in yaml.safe_load(dryrun.SHAPES.read_text())


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("Qwen/Qwen3.5-0.8B", 752.4),
        ("Qwen/Qwen3.5-4B", 4205.8),
        ("Qwen/Qwen3.5-27B", 26896.0),
        ("state-spaces/mamba2-370m", 368.3),
        ("tiiuae/Falcon-H1-Tiny-90M-Base", 91.131072),
        ("ibm-granite/granite-4.0-h-tiny", 6939.037248),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 31577.937344),
        ("RWKV/RWKV7-1.5B-20260805", 1527.668736 - 0.264192),
        ("fla-hub/rwkv7-1.5B-world", 1527.4),
        ("fla-hub/delta_net-1.3B-100B", 1365.7),
        ("fla-hub/gla-1.3B-100B", 1365.5),
        ("Qwen/Qwen3.5-35B-A3B", 34660.6),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", 79674.4),
        ("allenai/Olmo-Hybrid-7B", 7430.9),
        ("moonshotai/Kimi-Linear-48B-A3B-Instruct", 49122.7),
    ],
)
def test_the_true_shapes_have_the_true_number_of_parameters(name, millions):
    shape = yaml.safe_load(dryrun.SHAPES.read_text())[name]
    with torch.device("meta"):
        model = load.adapter(shape["family"]).build(shape["architecture"])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_a_padded_tokenizer_makes_the_same_ids_and_has_as_many_as_the_model(tmp_path):
    from transformers import AutoTokenizer

    dryrun.padded_tokenizer(9000, tmp_path)
    padded, own = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(dryrun.TOKENIZER)
    text = "Return a <unused5000> array of 17 zeros.\n"
    assert padded(text)["input_ids"] == own(text)["input_ids"]
    assert 1 + max(padded.get_vocab().values()) == 9000
    assert padded.eos_token_id == own.eos_token_id


def _saved(folder):
    figure, axes = plt.subplots()
    axes.plot([0, 1])
    plots.save(figure, "figure", folder)
    plots.save(figure, "figure", folder)
    plt.close(figure)
    return plt.imread(folder / "figure.png")


def test_figures_of_a_dry_run_are_marked_across_and_no_others(tmp_path, monkeypatch):
    monkeypatch.delenv("WRITESAE_DRY_RUN", raising=False)
    plain = _saved(tmp_path)
    monkeypatch.setenv("WRITESAE_DRY_RUN", "1")
    marked = _saved(tmp_path)
    changed = (plain != marked).any(-1)
    assert changed[:, changed.shape[1] // 4 : -changed.shape[1] // 4].any() and changed.any(0).mean() > 0.6
    monkeypatch.delenv("WRITESAE_DRY_RUN")
    assert (_saved(tmp_path) == plain).all()


def test_a_dry_run_writes_below_build_alone(dry):
    paths = Paths("paper")
    for folder in (paths.results, paths.figures, paths.build):
        assert folder.is_relative_to(ROOT / "build" / "dryrun")


def test_unknown_shapes_are_one_sentence(dry, monkeypatch, tmp_path):
    (tmp_path / "hosts.yaml").write_text("{}")
    monkeypatch.setattr(dryrun, "SHAPES", tmp_path / "hosts.yaml")
    monkeypatch.setattr(dryrun, "ROOT", tmp_path)
    monkeypatch.setattr(
        dryrun, "profile_content", lambda path: yaml.safe_load((ROOT / "profiles" / path.name).read_text())
    )
    with pytest.raises(ValueError, match="The shapes of Qwen/Qwen3.5-0.8B are not known: add them to hosts.yaml"):
        dryrun.make_hosts("paper")


PAGE = """
import matplotlib.pyplot as plt
import pandas as pd
import torch

from replication import plots
from replication.__main__ import main
from replication.pages.hosts import window_losses
from replication.study.study import open_study

study = open_study(profile)
losses = window_losses(study.host("rwkv7"), torch.randint(5000, (4, study.profile.data.window)))
study.write("losses", pd.DataFrame(dict(loss=losses)))
figure, axes = plt.subplots()
axes.plot(losses)
plots.save(figure, "fig_toy", study.paths.figures)
print(study.host("rwkv7").vocabulary, bool((losses > 5).all()))
"""


HOLD = "import time; held = bytearray(400_000_000); print(flush=True); time.sleep(60)"


def test_memory_of_processes_that_have_ended_counts():
    with dryrun.peak_memory(every=0.01) as peak:
        child = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE)
        child.stdout.readline()  # the child has its memory now
        deadline = time.monotonic() + 20
        while peak() < (before := psutil.Process().memory_info().rss / 1e9) + 0.4 and time.monotonic() < deadline:
            time.sleep(0.01)
        child.kill()
        child.wait()
        assert before + 0.4 <= peak() < before + 0.6
    with dryrun.peak_memory(every=0.01) as peak:
        time.sleep(0.2)
    assert 0 < peak() < before + 0.2  # counts this period only


def test_a_dry_run_ends_with_its_command(monkeypatch):
    seen = []
    monkeypatch.setattr(dryrun, "run", lambda profile, names: seen.append(dry_run()) or [])
    monkeypatch.delenv("WRITESAE_DRY_RUN", raising=False)
    assert main(["dryrun", "--profile", "smoke"]) == 0
    assert seen == [True] and not dry_run()


def test_a_page_through_the_real_command(tmp_path):
    for name in ("writesae", "replication", "models/gated_deltanet"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shape = dict(family="rwkv7", architecture=SMALL["rwkv7"] | dict(vocab_size=5000))
    profile = yaml.safe_load((ROOT / "profiles" / "paper.yaml").read_text())
    profile["hosts"] = dict(rwkv7=dict(path="someone/small", cells=dict(middle=dict(layer=2, head=1))))
    folder = tmp_path / "profiles" / "dryrun"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "profiles" / "dryrun" / "overrides.yaml", folder)
    (folder / "hosts.yaml").write_text(json.dumps({"someone/small": shape}))
    (tmp_path / "profiles" / "small.yaml").write_text(yaml.safe_dump(profile))
    parameters = new_code_cell("profile = 'mini'", metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    (tmp_path / "notebooks").mkdir()
    page = tmp_path / "notebooks" / "00_toy.ipynb"
    cells = [parameters, new_code_cell(PAGE)]
    page.write_text(nbformat.writes(new_notebook(cells=cells, metadata=kernel | {"writesae": {}})))
    before = page.read_bytes()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WRITESAE")} | dict(PYTHONPATH=str(tmp_path))
    command = [sys.executable, "-m", "replication", "dryrun", "--profile", "small"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = re.search(r"DRY RUN 00_toy: \d+ s, peak memory ([\d.]+) GB", done.stdout)
    assert float(told[1]) > 0.4  # the notebook's kernel has loaded torch and a model
    assert page.read_bytes() == before
    written = tmp_path / "build" / "dryrun"
    executed = nbformat.read(written / "build" / "small" / "notebooks" / "00_toy.ipynb", as_version=4)
    assert "5000 True" in "".join(x.get("text", "") for x in executed.cells[-1].outputs if x.get("name") == "stdout")
    assert (written / "results" / "small" / "losses.csv").is_file()
    assert (written / "figures" / "small" / "fig_toy.png").is_file()
    assert not (tmp_path / "results").exists() and not (tmp_path / "figures").exists()
    again = subprocess.run([*command[:-1], "nobody"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (
        1,
        "dryrun failed: There is no profile 'nobody': choose one of small, or write nobody.yaml in profiles/.\n",
    )
