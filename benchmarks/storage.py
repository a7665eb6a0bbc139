"""The numbers stored per token and cell, against the states (nothing is timed): `python benchmarks/storage.py`.

The numbers are counted in what `harvest` returns, of the embedded hosts and of a Gated DeltaNet with random
weights at the paper's 128 x 128. `kept`: state or write is what training on that target needs, both is all
that a harvest holds.
"""

from __future__ import annotations

import time

import pandas as pd
import torch
from common import save, start

from replication.study.paths import ROOT
from writesae.harvesting import harvest
from writesae.hosts import load
from writesae.hosts.base import Host
from writesae.hosts.load import load_host

FOLDERS = ("gated_deltanet", "mamba2", "rwkv7")
WIDE = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    linear_num_key_heads=1,
    linear_num_value_heads=1,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    layer_types=["linear_attention"],
)


def wide_host() -> Host:
    """Return a Gated DeltaNet of the paper's head size, 128 x 128, with random weights."""
    return load.adapter("gated_deltanet")(load.adapter("gated_deltanet").build(WIDE), None, "gated_deltanet_128")


def stored(host: Host) -> list[dict]:
    """Return the numbers and bytes per token of the host's first cell, one line for each target."""
    cell, tokens = host.cells[0], torch.arange(1, 33)[None]
    found = harvest(host, tokens, [cell], batch=1, progress=False)[cell]
    kept = dict(state=found.history("state").tensors(), write=found.history("write").tensors(), both=found.tensors())
    lines = []
    for name, tensors in kept.items():
        numbers = sum(x[0, 0].numel() for x in tensors.values())
        size = sum(x.nbytes for x in tensors.values()) // tokens.numel()
        states = host.d_k * host.d_v
        line = dict(host=host.name, d_k=host.d_k, d_v=host.d_v, kept=name, numbers=numbers, bytes=size)
        lines.append(line | dict(state_numbers=states, state_bytes=4 * states, ratio=states / numbers))
    return lines


def main() -> None:
    quick, began = start().quick, time.monotonic()
    hosts = [wide_host(), *(load_host(ROOT / "models" / name) for name in FOLDERS)]
    table = pd.DataFrame([line for host in hosts for line in stored(host)])
    print(table.to_string(index=False))
    save("storage", table, quick, time.monotonic() - began)


if __name__ == "__main__":
    main()
