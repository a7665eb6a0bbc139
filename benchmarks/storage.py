"""Count the numbers stored per token and cell, compared with states: `python benchmarks/storage.py`.

The numbers are counted in the result of `harvest`, for the embedded hosts and for a Gated DeltaNet with
random weights and the paper's head size 128 x 128. `kept`: "state" or "write" is what training on that target
needs; "both" is the whole result of a harvest. Nothing is timed.
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
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    linear_num_key_heads=1,
    linear_num_value_heads=1,
)


def wide_host(side: int = 128, recurrent: int = 1, attention: int = 0) -> Host:
    """Return a Gated DeltaNet with random weights and one head of states [side, side] per recurrent layer.

    By default, it has one layer and states of the paper's size. Attention layers are the last ones."""
    kinds = ["linear_attention"] * recurrent + ["full_attention"] * attention
    sizes = dict(linear_key_head_dim=side, linear_value_head_dim=side, num_hidden_layers=len(kinds))
    adapter = load.adapter("gated_deltanet")
    return adapter(adapter.build(WIDE | sizes | dict(layer_types=kinds)), None, f"gated_deltanet_{side}")


def stored(host: Host) -> list[dict]:
    """Return the numbers and bytes per token of the host's first cell, one row per value of `kept`."""
    cell, tokens = host.cells[0], torch.arange(1, 33)[None]
    factors = harvest(host, tokens, [cell], batch=1, progress=False)[cell]
    kept = {target: factors.history(target).tensors() for target in ("state", "write")} | dict(both=factors.tensors())
    rows, state_numbers = [], host.d_k * host.d_v
    for name, tensors in kept.items():
        numbers = sum(x[0, 0].numel() for x in tensors.values())
        size = sum(x.nbytes for x in tensors.values()) // tokens.numel()
        row = dict(host=host.name, d_k=host.d_k, d_v=host.d_v, kept=name, numbers=numbers, bytes=size)
        row |= dict(state_numbers=state_numbers, state_bytes=4 * state_numbers, ratio=state_numbers / numbers)
        rows.append(row)
    return rows


def main() -> None:
    quick, began = start().quick, time.monotonic()
    hosts = [wide_host(), *(load_host(ROOT / "models" / name) for name in FOLDERS)]
    table = pd.DataFrame([row for host in hosts for row in stored(host)])
    print(table.to_string(index=False))
    save("storage", table, quick, time.monotonic() - began)


if __name__ == "__main__":
    main()
