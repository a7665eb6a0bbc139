"""Compare the harvest with the plain forward of the same model: `python benchmarks/harvest_speed.py`.

Both run the same windows of random tokens in the same batches. The harvest keeps the factors of all heads of
one layer (for the last recurrent layer it runs nearly the whole model, for the middle one half of it), or of
one head of each layer. The forward is that of transformers, with logits; on a CPU it uses the reference
operators. "forward without head" does not compute logits, which is closer to the work of a harvest. RWKV-7 is
not in transformers: its forward is writesae.hosts.rwkv7_model, which has no part without the head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from common import Case, Comparison, main

from replication.study.paths import ROOT
from writesae.harvesting import harvest
from writesae.hosts.base import Host
from writesae.hosts.load import load_host

FOLDERS = ("gated_deltanet", "mamba2", "rwkv7")
load = lru_cache(load_host)


def windows(host: Host, count: int, length: int) -> torch.Tensor:
    """Return random tokens [count, length] of the host's vocabulary."""
    return torch.randint(host.vocabulary, (count, length), generator=torch.Generator().manual_seed(0))


def harvesting(folder: str, place: str, count: int, length: int, batch: int) -> Callable[[], None]:
    """Return the harvest of all heads of the last or the middle recurrent layer, or of one of each layer."""
    host = load(ROOT / "models" / folder)
    layers, tokens = host.recurrent_layers, windows(host, count, length)
    if place == "each":
        cells = [(layer, 0) for layer in layers]
    else:
        layer = layers[-1] if place == "last" else layers[len(layers) // 2]
        cells = [(layer, head) for head in range(host.heads)]
    return lambda: harvest(host, tokens, cells, batch, progress=False) and None


def forward(folder: str, head: bool, count: int, length: int, batch: int) -> Callable[[], None]:
    """Return the forward on the same windows, with or without the head, as a function."""
    host = load(ROOT / "models" / folder)
    model, tokens = host.model if head else host.model.base_model, windows(host, count, length)

    @torch.no_grad()
    def run() -> None:
        for rows in tokens.split(batch):
            model(input_ids=rows.to(host.device), use_cache=False)

    return run


def comparisons(quick: bool) -> list[Comparison]:
    size = dict(count=2, length=32, batch=2) if quick else dict(count=32, length=256, batch=16)
    amount, planned = size["count"] * size["length"], []
    for folder in FOLDERS:
        makes = {
            "harvest, last layer": partial(harvesting, folder, "last", **size),
            "harvest, middle layer": partial(harvesting, folder, "middle", **size),
            "harvest, one head of each layer": partial(harvesting, folder, "each", **size),
            "forward": partial(forward, folder, True, **size),
        }
        if folder != "rwkv7":
            makes["forward without head"] = partial(forward, folder, False, **size)
        cases = [Case(name, make, amount) for name, make in makes.items()]
        planned.append(Comparison(dict(unit="token", host=folder, **size), cases))
    return planned


if __name__ == "__main__":
    main("harvest_speed", comparisons)
