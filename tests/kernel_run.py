"""Run the embedded hosts in a new process and save the outputs: `python kernel_run.py OUTPUTS [MODULE ...]`.

The modules (or attributes, as in transformers:Mamba2ForCausalLM) are imported before any module of this
project. With "--library", the forward of the library also runs, and its errors are printed.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("gated_deltanet", "mamba2", "rwkv7")
CELLS = [(1, 0), (4, 1)]


def outputs(library: bool) -> dict:
    """Return last hidden states, the factors of two cells and (with `library`) logits, per host."""
    import torch

    from writesae.harvesting import harvest
    from writesae.hosts.load import load_host

    tokens = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    found = {}
    for name in FOLDERS:
        host = load_host(ROOT / "models" / name, "cpu")
        found[f"{name} final"] = host.run(tokens).final
        for cell, factors in harvest(host, tokens, CELLS, batch=2, progress=False).items():
            found |= {f"{name} {cell} {factor}": x for factor, x in factors.tensors().items()}
        if library:
            try:
                with torch.no_grad():
                    found[f"{name} logits"] = host.model(input_ids=tokens).logits
            except RuntimeError as error:
                print(f"{name}: {error}")
    return found


def main(path: str, *names: str) -> None:
    for name in names:
        if name != "--library":
            module, _, attribute = name.partition(":")
            getattr(importlib.import_module(module), attribute or "__name__")
    made = outputs("--library" in names)
    from safetensors.torch import save_file

    save_file({name: x.contiguous() for name, x in made.items()}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
