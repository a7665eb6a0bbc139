"""What a profile has still to write, against real files; and what is said where a disk or a GPU is too small for it."""

import pandas as pd
import pytest
import torch
from conftest import SMALL, small
from helpers import SmallSuite
from safetensors.torch import save_file

from replication.commands import disk
from replication.study import study
from replication.study.paths import Paths
from replication.study.profile import CellRule, HostSection, load_profile
from writesae.harvesting import harvest
from writesae.hosts import hub
from writesae.sae.model import SAE
from writesae.sae.train import TrainingSettings

GB = 10**9
HOSTS = {
    "gated_deltanet": "Qwen/Qwen3.5-0.8B",
    "mamba2": "state-spaces/mamba2-370m",
    "rwkv7": "fla-hub/rwkv7-1.5B-world",
}


@pytest.fixture
def large():
    """The smoke profile's settings at the paper's hosts and windows."""
    profile = load_profile("smoke")
    middle = {"middle": CellRule(layer=9, sigma_ratio=6.8)}
    hosts = {name: HostSection(path=path, cells=middle) for name, path in HOSTS.items()}
    data = profile.data.model_copy(update=dict(window=1024, sae_windows=5000))
    return profile.model_copy(update=dict(hosts=hosts, data=data))


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path / "out"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_harvest_is_as_large_as_its_file(host, tmp_path):
    tokens = torch.randint(0, 300, (3, 40))
    factors = harvest(host, tokens, [(1, 0)], batch=3, progress=False)[(1, 0)]
    save_file({name: x.contiguous() for name, x in factors.tensors().items()}, tmp_path / "file")
    shape = hub.Shape(5, 4, host.d_k, host.d_v, vector_decay=host.family in disk.VECTOR_DECAYS)
    size = (tmp_path / "file").stat().st_size
    assert size == pytest.approx(disk.harvest_bytes(shape, tokens.numel()), abs=2000)


@pytest.mark.parametrize("parts", [{}, dict(rank=2), dict(encoder="dense", decoder="flat"), dict(encoder="tied")])
def test_an_sae_is_as_large_as_its_file(parts, tmp_path):
    settings = TrainingSettings(n_atoms=64, k=4, tokens=100, batch_windows=1, **parts)
    save_file(SAE(settings, 12, 20).state_dict(), tmp_path / "file")
    estimate = disk.sae_bytes(hub.Shape(1, 1, 12, 20), settings)
    assert (tmp_path / "file").stat().st_size == pytest.approx(estimate, abs=1500)


@pytest.mark.parametrize("family", list(SMALL))
def test_a_folder_tells_its_shape(family, tmp_path):
    host = small(family)
    host.model.config.save_pretrained(tmp_path)
    shape = disk.shape_of(tmp_path)
    assert shape[1:3] == (host.heads, host.d_k) and shape.vector_decay == (family in ("rwkv7", "gla"))
    assert shape.layers == host.layers
    if family != "rwkv7":  # whose values are as wide as its keys in every published model
        assert shape.d_v == host.d_v


def test_what_is_not_known_counts_as_the_papers_main_host():
    assert disk.shape_of("someone/model") == hub.KNOWN["Qwen/Qwen3.5-0.8B"].shape
    assert disk.shape_of(HOSTS["mamba2"]) == (48, 32, 128, 64, False)


def test_weights_harvests_and_saes_are_counted_and_what_is_there_is_not(large, empty):
    paths = Paths("big")

    def sizes():
        return {need.what: need.size for need in disk.still_needed(large, paths)}

    before = sizes()
    assert before["the weights of Qwen/Qwen3.5-0.8B"] == 1.8e9
    assert before["harvests of gated_deltanet"] == 4 * 5_120_000 * (128 + 2 * 128 + 1)
    assert before["harvests of rwkv7"] == 4 * 5_120_000 * 5 * 64
    shape, saes = hub.KNOWN[HOSTS["mamba2"]].shape, large.saes
    assert before["main SAEs of mamba2"] == 2 * disk.sae_bytes(shape, saes.main), "of one cell, on two targets"
    assert before["survey SAEs of mamba2"] == 48 * 32 * 2 * disk.sae_bytes(shape, saes.survey)
    thinned = large.replacement.model_copy(update=dict(survey_every=5))
    fewer = disk.still_needed(large.model_copy(update=dict(replacement=thinned)), paths)
    count = {need.what: need.size for need in fewer}["survey SAEs of mamba2"] / disk.sae_bytes(shape, saes.survey)
    assert count == 10 * 32 * 2, "layers 0, 5, ... 45"
    (paths.build / "harvest").mkdir(parents=True)
    (paths.build / "harvest" / "rwkv7-L9-H4.safetensors").touch()
    (empty / "cache" / "models--Qwen--Qwen3.5-0.8B" / "snapshots" / "a").mkdir(parents=True)
    (empty / "cache" / "models--Qwen--Qwen3.5-0.8B" / "snapshots" / "a" / "config.json").touch()
    (empty / "cache" / "models--Qwen--Qwen3.5-0.8B" / "refs").mkdir()
    (empty / "cache" / "models--Qwen--Qwen3.5-0.8B" / "refs" / "main").write_text("a")
    after = sizes()
    assert after["harvests of rwkv7"] == 0 and "the weights of Qwen/Qwen3.5-0.8B" not in after
    assert after["harvests of mamba2"] == before["harvests of mamba2"]


def test_a_disk_that_is_too_small_is_refused_before_the_run(large):
    paths = Paths("big")
    total = sum(need.size for need in disk.still_needed(large, paths))
    assert total > 20 * GB
    says = (
        rf"has still to write about {total / GB:.1f} GB .*harvests of \w+ .*and 5\.0 GB are free there: make room, or"
    )
    with pytest.raises(OSError, match=says):
        disk.check(large, paths, free=lambda folder: 5 * GB)
    disk.check(large, paths, free=lambda folder: total + 1)


def test_a_suite_opens_only_where_its_run_has_room(monkeypatch):
    assert study.open_suite("smoke").profile.name == "smoke"
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), dict(free=10**6)))
    with pytest.raises(OSError, match="Profile smoke has still to write"):
        study.open_suite("smoke")


# A GPU that is too small.


def test_a_stage_that_runs_out_of_memory_says_which_setting_to_lower(gated_deltanet, tokens, monkeypatch):
    made = SmallSuite(load_profile("smoke"), gated_deltanet, tokens)

    def too_much(tokens, upto=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(gated_deltanet, "run", too_much)

    def compute(group):
        return pd.DataFrame(harvest(gated_deltanet, tokens, [(1, 0)], batch=2, progress=False))

    with pytest.raises(MemoryError, match=r"GPU's memory is too small: in the profile, lower data\.batch_windows") as e:
        made.staged("table", "gated_deltanet", [0, 1], compute, ["writesae.edit"], {})
    assert isinstance(e.value.__cause__, torch.OutOfMemoryError)
