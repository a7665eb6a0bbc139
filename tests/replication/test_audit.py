"""The command audit: an SAE in the author's format, tested on an embedded host beside the author's rows."""

import json

import pandas as pd
import pytest
import torch

from replication import __main__ as command
from replication.commands import CommandError, audit
from replication.study.paths import ROOT
from writesae.sae.config import SAEConfig
from writesae.sae.model import SAE
from writesae.text import Windows

N = 64


def authors_file(folder, **config):
    """A best.pt of random atoms for the embedded Gated DeltaNet, whose cells are 64 x 64."""
    g = torch.Generator().manual_seed(4)
    tensors = {name: torch.randn(N, 1, 64, generator=g) / 8 for name in ("V_enc", "W_enc", "V_dec", "W_dec")}
    tensors |= dict(b_enc=torch.zeros(N), bias=torch.zeros(64, 64))
    config = dict(sae_type="bilinear", layer=4, head=3, k=4, d_k=64, d_v=64, seed=42) | config
    folder.mkdir()
    torch.save(dict(model_state_dict=tensors, config=config), folder / "best.pt")


def test_a_file_of_the_author_is_tested_beside_its_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path / "out"))
    monkeypatch.chdir(ROOT)
    tokens = torch.randint(0, 4096, (16, 64), generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(audit, "split_windows", lambda *_: Windows(tokens, torch.arange(16)))
    authors_file(tmp_path / "pack", use_batchtopk=True)
    record = dict(feature_id=3, firing_position=20, kl_atom=0.001, kl_ablate=0.002, kl_random=0.004)
    records = [record, record | dict(kl_atom=0.003), record | dict(feature_id=9)]
    (tmp_path / "rows.json").write_text(json.dumps(dict(config=dict(layer=4, head=3), records=records)))
    given = ["--sae", str(tmp_path / "pack"), "--host", "gated_deltanet", "--profile", "smoke", "--count", "12"]
    assert command.main(["audit", *given, "--records", str(tmp_path / "rows.json")]) == 0
    said = capsys.readouterr().out
    assert "fitted on 4 held-out windows" in said and "atom beats deletion" in said
    (folder,) = (tmp_path / "out/results/audits").iterdir()
    rows, summary = (pd.read_csv(folder / f"{name}.csv") for name in ("replacement", "replacement_summary"))
    assert len(rows) == 4 * 12 and rows.groupby("amplitude").size().tolist() == [24, 24]
    theirs = summary[summary.source == "author"].iloc[0]
    assert (theirs.n, theirs.n_atoms, theirs.read) == (3, 2, "not said")
    assert theirs.win_rate == pytest.approx(2 / 3) and theirs.kl_atom == 0.001
    ours = summary[(summary.amplitude == "matched_norm") & (summary["read"] == "cache")].iloc[0]
    part = rows[(rows.amplitude == "matched_norm") & (rows["read"] == "cache")]
    assert ours.n == 12 and ours.win_rate == pytest.approx((part.kl_atom < part.kl_delete).mean(), abs=1e-5)
    assert ours.strict_chain <= ours.win_rate


def test_an_sae_is_found_in_a_folder_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def fetched(name, patterns):
        asked.extend([name, patterns[0]])
        return tmp_path

    monkeypatch.setattr(audit, "fetch", fetched)
    authors_file(tmp_path / "L9_H4")
    assert audit.located("someone/packs/L9_H4") == tmp_path / "L9_H4/best.pt"
    assert asked == ["someone/packs", "L9_H4/best.pt"]
    with pytest.raises(CommandError, match="holds neither best.pt nor config.json and model.safetensors"):
        audit.located("someone/packs")
    SAE(SAEConfig(n_atoms=8, k=2, d_k=5, d_v=7), 5, 7).save(tmp_path / "ours")
    assert audit.located(str(tmp_path / "ours")) == tmp_path / "ours"
    host = type("Host", (), dict(d_k=64, d_v=64, name="host"))
    with pytest.raises(CommandError, match="5 x 7 matrices, and host has 64 x 64"):
        audit.load(tmp_path / "ours", host, None, False, {})
