"""WriteSAE: sparse autoencoders of the state of recurrent language models.

    import writesae as ws

    host = ws.load_host("models/gated_deltanet")
    windows = ws.cut_windows(host.tokenizer, texts, length=256)
    cell = ws.harvest(host, windows, layer=4, head=3)
    sae, record = ws.train(cell.history("write"), ws.TrainingSettings(n_atoms=512, k=16, tokens=500_000))
    firings = ws.find_firings(sae, cell, windows)
    tests = ws.replace_writes(host, windows, sae, firings)

Names are imported on first use, so that `import writesae` takes no time.
"""

from importlib import import_module

_MODULES = {
    "load_host": "hosts.load",
    "cut_windows": "text",
    "harvest": "harvesting",
    "train": "sae.train",
    "TrainingSettings": "sae.train",
    "SAE": "sae.model",
    "find_firings": "evaluate.firings",
    "replace_writes": "evaluate.replacement",
    "Edit": "edit",
    "run_edited": "edit",
    "predict_shift": "shift",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
