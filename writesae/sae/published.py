"""SAEs that the paper's author published: files best.pt, pickles of a dict with model_state_dict and config.

In their names, for a state X in [d_k, d_v] (which their training code does not centre):

    pre_i = sum_r V_enc_ir^T X W_enc_ir + b_enc_i     c = ReLU(TopK(pre))     Xhat = sum_ir c_i V_dec_ir W_dec_ir^T + bias

with V on the first axis, and factors [n, rank, d], or [n, d] in older files. Ours subtract a mean first, so mean = bias and
our encoder bias is b_enc_i + <encoder_i, bias>: the same function to rounding. Their decoder factors are made unit only
every 100 steps, so an atom's norm can be some per cent off one; it is kept as it is.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from writesae.sae.model import refuse_not_finite
from writesae.sae.pretrained import PretrainedSAE

ENCODERS = {"bilinear": ("V_enc", "W_enc", "b_enc"), "dense": ("encoder.weight", "encoder.bias")}
KINDS = {  # their sae_type: our encoder and decoder, and the names of their tensors
    "bilinear": ("bilinear", "rank1", (*ENCODERS["bilinear"], "V_dec", "W_dec", "bias")),
    "bilinear_tied": ("bilinear", "rank1", ("b_enc", "V_dec", "W_dec", "bias")),
    "bilinear_flat": ("bilinear", "flat", (*ENCODERS["bilinear"], "decoder.weight", "decoder.bias")),
    "rank1": ("dense", "rank1", (*ENCODERS["dense"], "V", "W", "bias")),
    "flat": ("dense", "flat", (*ENCODERS["dense"], "decoder.weight", "decoder.bias")),
}
IGNORED = {"steps_since_active"}


def read_published(path: Path | str, host: str, *, transposed: bool = False, **given: int) -> PretrainedSAE:
    """The SAE of a published file, an SAE of states. `host`: what results call the host it was trained on.

    given: layer, head, k, seed, d_k, d_v where the file's own config lacks them. transposed: the file's states were
    [d_v, d_k], as transformers keeps those of Mamba-2 (d_k, d_v in `given` and in the result are ours).

    Raises FileNotFoundError for a missing file, and ValueError, naming what is wrong, for a file that holds more than
    tensors and plain values (such a pickle is not executed), a damaged one, missing, extra or misshapen tensors, a config
    that lacks a field or contradicts the tensors or `given`, atoms of rank above 1 and other activations than TopK.
    """
    state, config = _read(Path(path))
    kind = _kind(path, state, config)
    encoder, decoder, names = KINDS[kind]
    _check_names(path, state, names, kind)
    d_1, d_2 = ("d_v", "d_k") if transposed else ("d_k", "d_v")
    theirs = {
        name: config.get(key) for name, key in (("layer", "layer"), ("head", "head"), ("k", "k"), ("seed", "seed"))
    }
    theirs |= {d_1: config.get("d_k"), d_2: config.get("d_v")}
    for name, factor in ((d_1, "V_enc"), (d_2, "W_enc"), (d_1, "V_dec"), (d_2, "W_dec"), (d_1, "V"), (d_2, "W")):
        if theirs[name] is None and factor in state and state[factor].ndim:
            theirs[name] = state[factor].shape[-1]
    fields = {name: _agreed(path, name, theirs[name], given.pop(name, None)) for name in theirs}
    if given:
        raise ValueError(f"{', '.join(given)} is nothing that a published file lacks: {', '.join(fields)} may be.")
    of_atoms = "encoder.weight" if encoder == "dense" else "b_enc"
    n = len(state[of_atoms]) if state[of_atoms].ndim else 0
    if not n:
        raise ValueError(f"{path} has no atoms: its {of_atoms} is of shape {list(state[of_atoms].shape)}.")
    if config.get("n_features") not in (None, n):
        raise ValueError(f"The config of {path} says n_features = {config['n_features']}, its tensors have {n}.")
    tensors = _tensors(path, state, kind, (n, fields[d_1], fields[d_2]), transposed)
    parts = dict(encoder=encoder, decoder=decoder, n_atoms=n)
    sae = PretrainedSAE(host=host, target="state", write="added", **fields, **parts)
    sae.load_state_dict(tensors | {"scale": torch.ones(())})
    refuse_not_finite(sae, path)
    return sae.requires_grad_(False).eval()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, and was not loaded, since a pickle can run code: save its "
            "model_state_dict and config alone, where you trust it."
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged or no file of torch.save: {error}") from error
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), dict) for name in ("model_state_dict", "config")
    ):
        holds = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} is no published SAE: those hold model_state_dict and config, this one {holds}.")
    odd = [name for name, x in content["model_state_dict"].items() if not isinstance(x, Tensor)]
    if odd:
        raise ValueError(f"{path} is no published SAE: its {odd[0]} is not a tensor.")
    return {k: x for k, x in content["model_state_dict"].items() if k not in IGNORED}, content["config"]


def _kind(path: Path | str, state: dict[str, Tensor], config: dict[str, Any]) -> str:
    """Their sae_type: the config's, else the one whose names fit best."""
    if config.get("use_batchtopk"):
        raise ValueError(f"{path} was trained with BatchTopK, and SAEs here take the top k of each token.")
    kind = config.get("sae_type")
    if kind is None:
        return min(KINDS, key=lambda name: len(set(KINDS[name][2]) ^ set(state)))
    if kind not in KINDS:
        raise ValueError(f"{path} is of the type {kind}, and only {', '.join(KINDS)} can be read.")
    return kind


def _check_names(path: Path | str, state: dict[str, Tensor], names: tuple[str, ...], kind: str) -> None:
    missing, extra = sorted(set(names) - set(state)), sorted(set(state) - set(names))
    if missing or extra:
        parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(extra)} besides"] * bool(extra)
        raise ValueError(f"{path} {' and '.join(parts)}: an SAE of the type {kind} has {', '.join(names)}.")


def _agreed(path: Path | str, name: str, theirs: int | None, given: int | None) -> int:
    if theirs is None and given is None:
        raise ValueError(f"The config of {path} does not say {name}: pass {name}=.")
    if theirs is not None and given is not None and theirs != given:
        raise ValueError(f"{path} is of {name} {theirs}, but {name} {given} was given.")
    value = given if theirs is None else theirs
    if not isinstance(value, int):
        raise ValueError(f"The {name} of {path} is {value!r}, where a whole number belongs.")
    return value


def _tensors(
    path: Path | str, state: dict[str, Tensor], kind: str, shape: tuple[int, int, int], transposed: bool
) -> dict[str, Tensor]:
    """Our tensors, all but the scale, from theirs. shape: (n, first axis, second axis) of their matrices."""
    n, d_1, d_2 = shape
    encoder, decoder, _ = KINDS[kind]

    def part(name: str, *wanted: int) -> Tensor:
        x = state[name]
        if name[0] in "VW" and x.ndim == 3:
            if x.shape[1] != 1:
                raise ValueError(f"{path} has atoms of rank {x.shape[1]}, and those here are of rank 1.")
            x = x[:, 0]
        if tuple(x.shape) != wanted:
            raise ValueError(f"{path} has a {name} of {list(state[name].shape)}, where {list(wanted)} belongs.")
        return x.float()

    def factors(v: str, w: str) -> dict[str, Tensor]:
        key, value = part(v, n, d_1), part(w, n, d_2)
        return {"key": value, "value": key} if transposed else {"key": key, "value": value}

    def matrices(flat: Tensor) -> dict[str, Tensor]:
        x = flat.unflatten(-1, (d_1, d_2))
        return {"matrix": x.mT if transposed else x}

    if encoder == "dense":
        read, bias = matrices(part("encoder.weight", n, d_1 * d_2)), part("encoder.bias", n)
    else:
        read, bias = factors(*(("V_dec", "W_dec") if kind == "bilinear_tied" else ("V_enc", "W_enc"))), part("b_enc", n)
    if decoder == "flat":
        made, mean = matrices(part("decoder.weight", d_1 * d_2, n).T), part("decoder.bias", d_1 * d_2)
        mean = matrices(mean)["matrix"]
    else:
        made = factors(*(("V", "W") if kind == "rank1" else ("V_dec", "W_dec")))
        mean = part("bias", d_1, d_2)
        mean = mean.mT if transposed else mean
    if encoder == "dense":
        bias = bias + read["matrix"].flatten(1) @ mean.flatten()
    else:
        bias = bias + ((read["key"] @ mean) * read["value"]).sum(-1)
    named = {f"encoder.{k}": x for k, x in (read | {"bias": bias}).items()}
    named |= {f"decoder.{k}": x for k, x in made.items()} | {"mean": mean}
    return {name: x.contiguous() for name, x in named.items()}
