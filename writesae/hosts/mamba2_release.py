"""Mamba-2 as its authors release it (state-spaces/mamba2-*), read into transformers' Mamba2ForCausalLM.

A release is a config.json of the package mamba_ssm and a pytorch_model.bin (or model.safetensors). The names
of its tensors are the library's but for the embedding; what its config leaves out has the defaults of
mamba_ssm's modules/mamba2.py. It has no tokenizer: those models were trained with that of
EleutherAI/gpt-neox-20b.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from writesae.hosts.weights import read_weights

TOKENIZER = "EleutherAI/gpt-neox-20b"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# what a release may say and the library's class has: ssm_cfg's name -> (Mamba2Config's name, mamba_ssm's default)
FIELDS = {
    "d_state": ("state_size", 128),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "headdim": ("head_dim", 64),
    "ngroups": ("n_groups", 1),
    "chunk_size": ("chunk_size", 256),
    "dt_limit": ("time_step_limit", (0.0, float("inf"))),
    "bias": ("use_bias", False),
    "conv_bias": ("use_conv_bias", True),
}
# what the library's class does in one way alone
ONE_WAY = {"layer": "Mamba2", "rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False, "d_ssm": None}
ONE_WAY |= {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}
INITIAL = {"conv_init", "A_init_range", "dt_min", "dt_max", "dt_init_floor", "use_mem_eff_path"}  # not of the function


def is_release(settings: dict[str, Any]) -> bool:
    """Whether a config.json is one of mamba_ssm."""
    return "model_type" not in settings and {"d_model", "n_layer", "vocab_size", "ssm_cfg"} <= settings.keys()


def library_config(settings: dict[str, Any]):
    """Mamba2Config of a release's config.json. Raises ValueError for what the library's class does not do."""
    from transformers import Mamba2Config

    if not is_release(settings):
        raise ValueError("This is no config.json of mamba_ssm: those have d_model, n_layer, vocab_size and ssm_cfg.")
    ssm = settings["ssm_cfg"]
    said = {"layer": "Mamba1"} | {k: x for k, x in (settings | ssm).items() if k in ONE_WAY and x is not None}
    for name, value in said.items():
        if value != ONE_WAY[name]:
            raise ValueError(f"This Mamba release has {name} = {value}, and only {ONE_WAY[name]} can be read.")
    unknown = ssm.keys() - FIELDS.keys() - ONE_WAY.keys() - INITIAL
    if unknown:
        raise ValueError(f"This Mamba release has the unknown settings {', '.join(sorted(unknown))}.")
    fields = {ours: ssm.get(name, default) for name, (ours, default) in FIELDS.items()}
    fields["time_step_limit"] = tuple(map(float, fields["time_step_limit"]))
    multiple = settings.get("pad_vocab_size_multiple", 8)
    return Mamba2Config(
        **fields,
        hidden_size=settings["d_model"],
        num_heads=settings["d_model"] * fields["expand"] // fields["head_dim"],
        num_hidden_layers=settings["n_layer"],
        vocab_size=-(-settings["vocab_size"] // multiple) * multiple,
        residual_in_fp32=settings.get("residual_in_fp32", True),
        tie_word_embeddings=settings.get("tie_embeddings", True),
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )


def from_release(folder: str | Path, dtype: torch.dtype = torch.float32):
    """Mamba2ForCausalLM of a release's folder.

    Raises FileNotFoundError where config.json or the weights are missing, ValueError for a config that the
    library's class cannot follow, a damaged file, a pickle with code in it, and naming the first tensor that
    is missing, unexpected or of another size.
    """
    from transformers import Mamba2ForCausalLM

    folder = Path(folder)
    config = library_config(json.loads((folder / "config.json").read_text()))
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no weights: one of {', '.join(WEIGHTS)} belongs there.")
    found = {name.replace("backbone.embedding.", "backbone.embeddings."): x for name, x in read_weights(path).items()}
    with torch.device("meta"):
        model = Mamba2ForCausalLM(config)
    embedding, head = "backbone.embeddings.weight", "lm_head.weight"
    if config.tie_word_embeddings:
        if head in found and embedding in found and not torch.equal(found[head], found[embedding]):
            raise ValueError(f"{path} has a {head} of its own, and its config says that it is the embedding.")
        found[head] = found.get(embedding, found.get(head))
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    for name, shape in shapes.items():
        if found.get(name) is None:
            raise ValueError(f"{path} is not the Mamba-2 that its config describes: it lacks the tensor {name}.")
        if found[name].shape != shape:
            has = f"{name} has shape {list(found[name].shape)}, not {list(shape)}"
            raise ValueError(f"{path} is not the Mamba-2 that its config describes: {has}.")
    unused = sorted(found.keys() - shapes.keys())
    if unused:
        raise ValueError(f"{path} is not the Mamba-2 that its config describes: nothing takes its tensor {unused[0]}.")
    model.load_state_dict({name: x.to(dtype) for name, x in found.items()}, assign=True)
    model.tie_weights()
    return model.eval()
