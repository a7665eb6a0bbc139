"""The disk space that a profile needs against real files; errors for a disk or GPU that is too small."""

import json
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from helpers import FakeHub, SmallStudy
from safetensors.torch import save_file

from replication import __main__ as command
from replication.commands import CommandError, check_disk, disk
from replication.study.paths import ROOT, Paths
from replication.study.profile import CellRule, HostSection, load_profile
from writesae.harvesting import harvest
from writesae.hosts.base import Shape
from writesae.hosts.hub import fetch
from writesae.sae.model import SAE
from writesae.sae.train import TrainingSettings

GB = 10**9
HOSTS = {
    "gated_deltanet": "Qwen/Qwen3.5-0.8B",
    "mamba2": "state-spaces/mamba2-370m",
    "rwkv7": "fla-hub/rwkv7-1.5B-world",
}
SHAPES = {
    "gated_deltanet": Shape(18, 16, 128, 128),
    "mamba2": Shape(48, 32, 128, 64),
    "rwkv7": Shape(24, 32, 64, 64, vector_decay=True),
}
CONFIGS = {  # contents of the config files; fields that do not affect a shape are omitted
    "gated_deltanet": dict(
        model_type="qwen3_5",
        text_config=dict(model_type="qwen3_5_text", num_hidden_layers=24, hidden_size=1024)
        | dict(linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128, linear_value_head_dim=128),
    ),
    "mamba2": dict(d_model=1024, n_layer=48, vocab_size=50277, ssm_cfg=dict(layer="Mamba2"), rms_norm=True),
    "rwkv7": dict(model_type="rwkv7", hidden_size=2048, head_dim=64, num_hidden_layers=24),
}


@pytest.fixture
def large():
    """The smoke profile's settings with the paper's hosts and windows."""
    profile = load_profile("smoke")
    middle = {"middle": CellRule(layer=9, sigma_ratio=6.8)}
    hosts = {name: HostSection(path=path, cells=middle) for name, path in HOSTS.items()}
    data = profile.data.model_copy(update=dict(window=1024, sae_windows=5000))
    return profile.model_copy(update=dict(hosts=hosts, data=data))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A simulated Hub with the paper's hosts, whose weights have at most a few thousand bytes."""
    files = {
        HOSTS[name]: {"config.json": json.dumps(config).encode(), "README.md": b"not asked for"}
        for name, config in CONFIGS.items()
    }
    files[HOSTS["gated_deltanet"]] |= {"model.safetensors": bytes(1000), "pytorch_model.bin": bytes(5000)}
    files[HOSTS["mamba2"]] |= {"pytorch_model.bin": bytes(2000)}
    files[HOSTS["rwkv7"]] |= {"model-1-of-2.safetensors": bytes(300), "model-2-of-2.safetensors": bytes(30)}
    return FakeHub(monkeypatch, tmp_path / "cache", files)


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path / "out"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_harvest_is_as_large_as_its_file(host, tmp_path):
    tokens = torch.randint(0, 300, (3, 40))
    factors = harvest(host, tokens, [(1, 0)], batch=3, progress=False)[(1, 0)]
    save_file({name: x.contiguous() for name, x in factors.tensors().items()}, tmp_path / "file")
    shape = host.shape(host.model.config)
    size = (tmp_path / "file").stat().st_size
    assert size == pytest.approx(disk.harvest_bytes(shape, tokens.numel()), abs=2000)


@pytest.mark.parametrize("parts", [{}, dict(rank=2), dict(encoder="dense", decoder="flat"), dict(encoder="tied")])
def test_an_sae_is_as_large_as_its_file(parts, tmp_path):
    settings = TrainingSettings(n_atoms=64, k=4, tokens=100, batch_windows=1, **parts)
    save_file(SAE(settings, 12, 20).state_dict(), tmp_path / "file")
    estimate = disk.sae_bytes(12, 20, settings)
    assert (tmp_path / "file").stat().st_size == pytest.approx(estimate, abs=1500)


def sizes(profile, paths):
    return {need.what: need.size for need in disk.still_needed(profile, paths)[0]}


def test_weights_harvests_and_saes_are_counted_and_what_is_there_is_not(large, hub):
    paths = Paths("big")
    before = sizes(large, paths)
    assert before["the weights of Qwen/Qwen3.5-0.8B"] == 1000, "safetensors, and not the pickle beside them"
    assert before["the weights of state-spaces/mamba2-370m"] == 2000
    assert before["the weights of fla-hub/rwkv7-1.5B-world"] == 330
    assert before["harvests of gated_deltanet"] == 4 * 5_120_000 * (128 + 2 * 128 + 1)
    assert before["harvests of rwkv7"] == 4 * 5_120_000 * 5 * 64
    shape, saes = SHAPES["mamba2"], large.saes
    assert before["main SAEs of mamba2"] == 2 * 5 * disk.sae_bytes(shape.d_k, shape.d_v, saes.main), (
        "of one cell, on two targets, 5 trainings"
    )
    assert before["survey SAEs of mamba2"] == 48 * 32 * 2 * disk.sae_bytes(shape.d_k, shape.d_v, saes.survey)
    large_head = SHAPES["gated_deltanet"]
    every, layers = disk.sae_bytes(large_head.d_k, large_head.d_v, saes.survey), 18
    assert before["survey SAEs of gated_deltanet"] == layers * 16 * 2 * every, "of the recurrent layers"
    thinned = large.replacement.model_copy(update=dict(survey_every=5))
    fewer = sizes(large.model_copy(update=dict(replacement=thinned)), paths)["survey SAEs of mamba2"]
    assert fewer / disk.sae_bytes(shape.d_k, shape.d_v, saes.survey) == 10 * 32 * 2, "layers 0, 5, ... 45"
    (paths.build / "harvest").mkdir(parents=True)
    (paths.build / "harvest" / "rwkv7-L9-H4.safetensors").touch()
    fetch(HOSTS["gated_deltanet"], ["*.json", "model*.safetensors"])
    fetch(HOSTS["mamba2"], ["*.json", "pytorch_model*.bin"])
    after = sizes(large, paths)
    assert after["harvests of rwkv7"] == after["the weights of state-spaces/mamba2-370m"] == 0
    assert after["harvests of mamba2"] == before["harvests of mamba2"]


def test_without_the_hub_what_can_be_counted_is_counted_and_the_rest_is_named(large, hub):
    fetch(HOSTS["mamba2"], ["config.json"])
    hub.answers["/"] = hub.httpx.ConnectError("no network")
    needs, notes = disk.still_needed(large, Paths("big"))
    counted = {need.what for need in needs}
    assert {"harvests of mamba2", "main SAEs of mamba2"} <= counted
    assert not any("rwkv7" in what or "weights" in what for what in counted)
    subjects = ["gated_deltanet", "the weights of state-spaces/mamba2-370m", "rwkv7"]
    assert len(notes) == len(subjects)
    for note, subject in zip(notes, subjects, strict=True):
        assert note.startswith(f"The disk space of {subject} is not counted: ") and note.count("\n") == 0


def test_a_disk_that_is_too_small_is_refused(large, hub, monkeypatch):
    paths = Paths("big")
    total = sum(sizes(large, paths).values())
    assert total > 20 * GB
    says = (
        rf"has still to write about {total / GB:.1f} GB .*harvests of \w+ .*and 5\.0 GB are free there: make room, or"
    )
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=5 * GB))
    with pytest.raises(OSError, match=says):
        disk.check(large, paths)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=total + 1))
    assert disk.check(large, paths) == []


def test_the_command_asks_the_disks_of_the_profile(monkeypatch, capsys):
    assert command.main(["disk", "--profile", "smoke"]) == 0
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10**6))
    assert command.main(["disk", "--profile", "smoke"]) == 1
    assert capsys.readouterr().err.startswith("disk failed: Profile smoke has still to write")


def test_a_run_asks_in_another_process(tmp_path, monkeypatch, capsys):
    """One profile needs more space than any disk has; the other names a model that is unavailable."""
    for name in ("writesae", "replication"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "models" / "mamba2").mkdir(parents=True)
    shutil.copy(ROOT / "models" / "mamba2" / "config.json", tmp_path / "models" / "mamba2")
    (tmp_path / "profiles").mkdir()
    smoke = load_profile("smoke").model_dump(exclude={"name"})
    for name, path, windows in (("huge", "models/mamba2", 10**12), ("far", "someone/model", 1)):
        data = smoke["data"] | dict(sae_windows=windows)
        host = dict(path=path, cells=dict(middle=dict(layer=1, sigma_ratio=3.0)))
        (tmp_path / "profiles" / f"{name}.yaml").write_text(json.dumps(smoke | dict(hosts=dict(host=host), data=data)))
    monkeypatch.setattr("replication.commands.ROOT", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(CommandError, match=r"^Profile huge has still to write about [\d.]+ GB"):
        check_disk("huge")
    check_disk("far")
    assert capsys.readouterr().err.startswith("The disk space of host is not counted: someone/model is no folder here")


# A GPU that is too small.


def _harvested(group, host, tokens):
    return pd.DataFrame(harvest(host, tokens, [(1, 0)], batch=2, progress=False))


def test_a_stage_that_runs_out_of_memory_says_which_setting_to_lower(gated_deltanet, tokens, monkeypatch):
    made = SmallStudy(load_profile("smoke"), gated_deltanet, tokens)

    def too_much(tokens, layers):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(gated_deltanet, "each_record", too_much)

    with pytest.raises(MemoryError, match=r"GPU's memory is too small: in the profile, lower data\.batch_windows") as e:
        made.stage("table", "gated_deltanet", [0, 1], _harvested, host=gated_deltanet, tokens=tokens)
    assert isinstance(e.value.__cause__, torch.OutOfMemoryError)
