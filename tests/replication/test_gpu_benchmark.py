"""The GPU benchmark at toy size on the CPU: the cases agree, and only the precision makes a difference."""

import sys
from pathlib import Path

import pytest
import torch
from elsewhere import Elsewhere, moved
from helpers import assert_close

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import common
import gpu

from replication.study import stages
from writesae.hosts import load


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The table of the real command, called with `--shape tiny --device cpu`."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("out")
        patch.setenv("WRITESAE_OUTPUT", str(folder))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr(common, "SHORTEST", 0.001)
        assert gpu.main(["--shape", "tiny", "--device", "cpu"]) == 0
        assert not (folder / "results").exists(), "a tiny run is no result"
        return stages.read_table(folder / "build" / "bench" / "gpu.csv").set_index("case")


def test_without_a_card_a_sentence_says_so_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.startswith("There is no CUDA device here: nothing was measured")
    assert not list(tmp_path.iterdir())


def test_every_part_is_measured_in_every_precision(table):
    parts = {
        "peak": 3,
        "forward": 3,
        "harvest": 3,
        "batched replacement": 2,
        "plain replacement": 2,
        "edits of all cells": 2,
        "plain edits of all cells": 2,
        "closed form": 2,
        "forward per atom": 2,
        "attribution map": 2,
        "plain attribution map": 2,
        "training step": 3,
    }
    assert table.groupby("part").size().to_dict() == parts
    assert (table.gflop > 0).all() and (table.of_peak > 0).all() and (table.rate > 0).all()
    assert table.of_peak[table.part == "peak"].tolist() == pytest.approx([1, 1, 1])
    assert table["device"].notna().all()


def test_fp32_is_what_the_others_differ_from(table):
    """Compares TF32 and bf16 with fp32. On a CPU, TF32 equals fp32 and bf16 differs."""
    for part in ("forward", "harvest", "training step"):
        assert (table.difference[[f"{part} fp32", f"{part} tf32"]] == 0).all()
        assert table.difference[f"{part} bf16"] > 0
    assert table.agrees["training step fp32"] == "True"
    assert table.difference["training step bf16"] < 1e-2
    for part, limit in {"replacement": 1e-2, "edits of all cells": 1e-4, "attribution map": 1e-5}.items():
        assert table.difference[f"plain {part} fp32"] < limit, "the plain way gives the same"
    assert table.difference["forward per atom fp32"] < 0.1, "the closed form is to first order"


@pytest.mark.parametrize("part", ["replacement", "many_cells", "closed_form"])
def test_both_ways_run_on_a_host_elsewhere(gated_deltanet, part):
    module, size = getattr(gpu, part), gpu.SHAPES["tiny"][part]
    for way in gpu.PAIRS[part][1]:
        wanted = module.ready(gated_deltanet, way, **size)()
        with Elsewhere():
            found = module.ready(moved(gated_deltanet), way, **size)()
        assert_close(found, wanted, way, 1e-9)


def test_the_true_shape_has_the_papers_numbers():
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    with torch.device("meta"):
        made = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**gpu.SHAPES["qwen3.5-0.8b"]["host"]))
    host = load.adapter("gated_deltanet")(made, None, "meta")
    assert (host.layers, len(host.recurrent_layers), host.heads, host.d_k, host.d_v) == (24, 18, 16, 128, 128)
    assert sum(p.numel() for p in made.parameters()) == pytest.approx(752.4e6, rel=1e-3)
