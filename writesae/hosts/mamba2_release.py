"""Mamba-2 as its authors release it (state-spaces/mamba2-*), read into transformers' Mamba2ForCausalLM.

A release has a config.json of the package mamba_ssm, whose defaults are those of its modules/mamba2.py. Its
tensors have the names of transformers, except for the embedding. It has no tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from writesae.files import local_path, read_json, read_weights, reading
from writesae.hosts.hub import weight_files

TOKENIZER = "EleutherAI/gpt-neox-20b"  # the one that the models were trained with
# fields of ssm_cfg that may vary: their names in Mamba2Config, and mamba_ssm's defaults
NAMES = dict(d_state="state_size", d_conv="conv_kernel", expand="expand", headdim="head_dim", ngroups="n_groups")
NAMES |= dict(chunk_size="chunk_size", dt_limit="time_step_limit", bias="use_bias", conv_bias="use_conv_bias")
DEFAULTS = dict(d_state=128, d_conv=4, expand=2, headdim=64, ngroups=1, chunk_size=256)
DEFAULTS |= dict(dt_limit=(0.0, float("inf")), bias=False, conv_bias=True)
# fields with only one value that transformers' class implements
FIXED = dict(layer="Mamba2", rmsnorm=True, rms_norm=True, norm_before_gate=False, D_has_hdim=False)
FIXED |= dict(d_ssm=None, d_intermediate=0, attn_layer_idx=[])
# fields for initial values and speed, which do not change a trained model
IGNORED = {"conv_init", "A_init_range", "dt_min", "dt_max", "dt_init_floor", "use_mem_eff_path"}


def is_release(settings: dict[str, Any]) -> bool:
    """Return whether the content of a config.json is a config of mamba_ssm."""
    return "model_type" not in settings and {"d_model", "n_layer", "vocab_size", "ssm_cfg"} <= settings.keys()


def library_config(settings: dict[str, Any]):
    """Return the Mamba2Config of a release's config.json. Raises ValueError where transformers has none."""
    from transformers import Mamba2Config

    if not is_release(settings):
        raise ValueError("This is no config.json of mamba_ssm, which has d_model, n_layer and ssm_cfg.")
    settings = {name: value for name, value in settings.items() if value is not None}  # null is the default
    ssm = {name: value for name, value in settings.get("ssm_cfg", {}).items() if value is not None}
    fixed = {"layer": "Mamba1"} | {k: x for k, x in (settings | ssm).items() if k in FIXED}
    for name, value in fixed.items():
        if value != FIXED[name]:
            raise ValueError(f"This Mamba release has {name} = {value}, and only {FIXED[name]} can be read.")
    unknown = ssm.keys() - NAMES.keys() - FIXED.keys() - IGNORED
    if unknown:
        raise ValueError(f"This Mamba release has the unknown settings {', '.join(sorted(unknown))}.")
    fields = {NAMES[name]: ssm.get(name, default) for name, default in DEFAULTS.items()}
    multiple = settings.get("pad_vocab_size_multiple", 8)
    with reading("The config.json of this Mamba release"):
        fields["time_step_limit"] = tuple(map(float, fields["time_step_limit"]))
        return Mamba2Config(
            **fields,
            hidden_size=settings["d_model"],
            num_heads=settings["d_model"] * fields["expand"] // fields["head_dim"],
            num_hidden_layers=settings["n_layer"],
            vocab_size=-(-settings["vocab_size"] // multiple) * multiple,
            residual_in_fp32=settings.get("residual_in_fp32", True),
            tie_word_embeddings=settings.get("tie_embeddings", True),
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
        )


def from_release(folder: str | Path, dtype: torch.dtype = torch.float32):
    """Return the Mamba2ForCausalLM of a release's folder.

    Raises FileNotFoundError if config.json or the weights are missing; ValueError for a config that
    transformers does not implement, a damaged file, a pickle with code, and tensors that do not fit it.
    """
    from transformers import Mamba2ForCausalLM

    folder = local_path(folder)
    config = library_config(read_json(folder / "config.json"))
    weights = {}
    for path in weight_files(folder):
        weights |= read_weights(path)
    weights = {name.replace("backbone.embedding.", "backbone.embeddings."): x for name, x in weights.items()}
    embedding, head = "backbone.embeddings.weight", "lm_head.weight"
    if config.tie_word_embeddings:
        if {head, embedding} <= weights.keys() and not torch.equal(weights[head], weights[embedding]):
            raise ValueError(f"{folder} has a {head} of its own, and its config says that it is the embedding.")
        weights[head] = weights.get(embedding, weights.get(head))
    with torch.device("meta"):
        model = Mamba2ForCausalLM(config)
    problem = _difference(weights, {name: x.shape for name, x in model.state_dict().items()})
    if problem:
        raise ValueError(f"{folder} is not the Mamba-2 that its config describes: {problem}.")
    model.load_state_dict({name: x.to(dtype) for name, x in weights.items()}, assign=True)
    model.tie_weights()
    return model.eval()


def _difference(weights: dict[str, Tensor], shapes: dict[str, torch.Size]) -> str | None:
    """Return the first difference between the weights and the model's parameters, or None."""
    for name, shape in shapes.items():
        if weights.get(name) is None:
            return f"it lacks the tensor {name}"
        if weights[name].shape != shape:
            return f"{name} has shape {[*weights[name].shape]}, not {[*shape]}"
    return next((f"nothing takes its tensor {name}" for name in sorted(weights.keys() - shapes.keys())), None)
