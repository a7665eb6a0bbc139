"""The SAEs in models/saes describe their cells: text that none was trained on is reconstructed."""

from pathlib import Path

import pytest
import torch

import writesae as ws
from writesae.sae.train import evaluate

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "models" / "saes").glob("*/config.json"))


@pytest.fixture(scope="module")
def host():
    return ws.load_host(ROOT / "models" / "gated_deltanet")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_committed_sae_reconstructs_its_own_cell_and_no_other(host, folder):
    sae = ws.SAE.load(folder)
    config = sae.config
    size = f"-{config.n_atoms}" if config.n_atoms != 512 else ""
    assert folder.name == f"{config.host}-L{config.layer}-H{config.head}-{config.target}{size}"
    text = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")]
    windows = ws.cut_windows(host.tokenizer, text, length=128, limit=6)
    other = config.layer, (config.head + 1) % host.heads
    cells = ws.harvest(host, windows, [(config.layer, config.head), other], progress=False)
    own, wrong = (evaluate(sae, cell.history(config.target))[0] for cell in cells.values())
    assert own < 0.9 < wrong
    assert sae.mean.dtype == torch.float32, "stored in 16 bits, used in 32"
    row = next(x for x in (ROOT / "models/saes/README.md").read_text().splitlines() if f"`{folder.name}`" in x)
    assert f"| {config.n_atoms:,} | {config.k} |" in row
