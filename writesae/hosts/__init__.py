"""Hosts: the recurrent language models under study. `load_host` finds the adapter by the model's class."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from writesae.hosts.base import Host, Past, Record, Run
from writesae.hosts.families import FAMILIES, module

__all__ = ["Host", "Past", "Record", "Run", "load_host", "without_triton"]

KERNEL_PACKAGES = ("fla", "mamba_ssm", "causal_conv1d")


def without_triton() -> None:
    """Without CUDA, hide the Triton packages from transformers, which would bind their kernels and fail at the first run."""
    if not torch.cuda.is_available():
        for name in KERNEL_PACKAGES:
            sys.modules.setdefault(name, None)


def load_host(name_or_path: str | Path, device: str | None = None, dtype: torch.dtype = torch.float32) -> Host:
    """The adapter around a model and its tokenizer, from a folder or a hub id.

    Raises FileNotFoundError for a folder without config.json, ValueError for a bare .pth file, where no family has the
    model's class, and where weights are missing (the tied-embedding trap of multimodal checkpoints included).
    """
    without_triton()
    import transformers

    folder = Path(name_or_path)
    if folder.suffix == ".pth":
        raise ValueError(
            f"{folder} is one file of weights: save writesae.hosts.rwkv7_model.from_pth of it to a folder with "
            "save_pretrained, and put its tokenizer into the same folder."
        )
    if folder.exists() and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no config.json: give a model folder, or train the embedded hosts with `make hosts`."
        )
    classes = {family: module(family).MODEL_CLASSES for family in FAMILIES}  # first: this registers RWKV-7's
    config = transformers.AutoConfig.from_pretrained(name_or_path)
    text = config.get_text_config()
    text.tie_word_embeddings = config.tie_word_embeddings
    auto = transformers.AutoModelForCausalLM._model_mapping
    model_class = auto.get(type(text), None) or auto.get(type(config), None)
    class_name = getattr(model_class, "__name__", type(config).__name__)
    for family in FAMILIES:
        if class_name in classes[family]:
            break
    else:
        raise ValueError(
            f"{name_or_path} is a {class_name}, and no host family has that class: {', '.join(FAMILIES)} are there."
        )
    model, info = model_class.from_pretrained(name_or_path, config=text, dtype=dtype, output_loading_info=True)
    missing = [key for key in info["missing_keys"] if not (text.tie_word_embeddings and key == "lm_head.weight")]
    if missing:
        raise ValueError(
            f"{name_or_path} lacks {len(missing)} weights, first {sorted(missing)[0]}: it is damaged or of another model."
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(name_or_path)
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return module(family).ADAPTER(model.to(chosen), tokenizer, host_name(folder))


def host_name(folder: Path) -> str:
    """The name that results carry: the one in the folder's training.json, or the folder's own."""
    record = folder / "training.json"
    return json.loads(record.read_text()).get("name", folder.name) if record.is_file() else folder.name
