"""What the paper's author published: SAEs and the rows of the substitution test.

SAEs are files best.pt, pickles of a dict with model_state_dict and config. In their names, for an uncentred
state X in [d_k, d_v] and factors [n, rank, d], or [n, d] in older files, with p_i = sum_r V_enc_ir^T X
W_enc_ir,

    c = ReLU(TopK(p + b_enc))        Xhat = sum_ir c_i V_dec_ir W_dec_ir^T + bias

That is centre = "bias" here. Other rules than the top k of a token:

| in the file       | c_i                                                                | activation here |
|-------------------|--------------------------------------------------------------------|-----------------|
| use_batchtopk     | ReLU of the k * batch largest p + b_enc of a batch                 | batch_topk      |
| bilinear_jumprelu | p_i + b_enc_i where that is above exp(log_threshold_i)             | jumprelu        |
| bilinear_gated    | sigmoid((p_i + b_gate_i) / 0.1) ReLU(exp(r_mag_i) p_i + b_mag_i)   | soft_gated      |

A BatchTopK file has no threshold, and which atoms of a token are active depends on the rest of its batch.
With a threshold fitted on held-out states they depend on the token alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import ValidationError
from torch import Tensor

from writesae.files import local_path, read_json, read_pickle
from writesae.history import History
from writesae.sae.config import SAEConfig, first_problem
from writesae.sae.model import SAE, refuse_not_finite
from writesae.sae.sparsity import PACE

BILINEAR, DENSE = ("V_enc", "W_enc", "b_enc"), ("encoder.weight", "encoder.bias")
KINDS = {  # their sae_type: our encoder and decoder, and the names of their tensors
    "bilinear": ("bilinear", "rank1", (*BILINEAR, "V_dec", "W_dec", "bias")),
    "bilinear_tied": ("bilinear", "rank1", ("b_enc", "V_dec", "W_dec", "bias")),
    "bilinear_flat": ("bilinear", "flat", (*BILINEAR, "decoder.weight", "decoder.bias")),
    "rank1": ("dense", "rank1", (*DENSE, "V", "W", "bias")),
    "flat": ("dense", "flat", (*DENSE, "decoder.weight", "decoder.bias")),
    "bilinear_jumprelu": ("bilinear", "rank1", (*BILINEAR, "log_threshold", "V_dec", "W_dec", "bias")),
    "bilinear_gated": (
        "bilinear",
        "rank1",
        ("V_enc", "W_enc", "b_gate", "b_mag", "r_mag", "V_dec", "W_dec", "bias"),
    ),
}
RULES = {"bilinear_jumprelu": "jumprelu", "bilinear_gated": "soft_gated"}  # of the kinds that have no top k
COLUMNS = dict(
    feature_id="atom",
    firing_position="position",
    kl_atom="kl_atom",
    kl_ablate="kl_delete",
    kl_random="kl_random",
)
IGNORED = {"steps_since_active"}


def load_authors_sae(
    path: Path | str, host: str, *, transposed: bool = False, heldout: History | None = None, **given: int
) -> SAE:
    """Return the SAE of states in a file of the paper's author; `host` is the name of its model.

    given: layer, head, k, seed, d_k, d_v if the file's config lacks them. transposed: the file's states are
    [d_v, d_k], as those of Mamba-2 in transformers; d_k and d_v in `given` and in the result are ours.
    heldout: the cell's states on text of neither the training nor a test, which BatchTopK needs: the
    threshold becomes the one above which k atoms per token are active there on average.

    Raises FileNotFoundError for a missing file, and ValueError for a damaged one, one with more than tensors
    and plain values (its pickle is not executed), missing, extra or misshapen tensors, a config that lacks a
    field or contradicts the tensors or `given`, rank above 1, and BatchTopK without `heldout`.
    """
    path = local_path(path)
    state, config = read_authors_file(path)
    kind = _kind(path, state, config)
    encoder, decoder, names = KINDS[kind]
    rule = RULES.get(kind, "batch_topk" if config.get("use_batchtopk") else "topk")
    if rule == "batch_topk" and heldout is None:
        raise ValueError(
            f"{path} was trained with BatchTopK and has no threshold: pass heldout=, states to fit one on."
        )
    d_1, d_2 = ("d_v", "d_k") if transposed else ("d_k", "d_v")
    theirs = {name: config.get(name) for name in ("layer", "head", "k", "seed")}
    for name, in_config, letter in ((d_1, "d_k", "V"), (d_2, "d_v", "W")):
        of_factors = (x.shape[-1] for tensor, x in state.items() if tensor[0] == letter and x.ndim)
        theirs[name] = next(of_factors, None) if config.get(in_config) is None else config[in_config]
    fields = {name: _agreed(path, name, theirs[name], given.pop(name, None)) for name in theirs}
    if given:
        raise ValueError(f"{', '.join(given)} is not needed: a file of the author may lack {', '.join(fields)}.")
    per_atom = next(name for name in names if name in ("encoder.weight", "b_enc", "b_gate"))
    n, *_ = *state[per_atom].shape, 0
    if not n:
        raise ValueError(f"{path} has no atoms: its {per_atom} is of shape {list(state[per_atom].shape)}.")
    if config.get("n_features") not in (None, n):
        raise ValueError(f"The config of {path} says n_features = {config['n_features']}, its tensors have {n}.")
    tensors = _tensors(path, state, kind, (n, fields[d_1], fields[d_2]), transposed)
    fields |= dict(host=host, target="state", write="added", centre="bias", n_atoms=n)
    fields |= dict(encoder=encoder, decoder=decoder, activation=rule)
    try:
        ours = SAEConfig(**fields)
    except ValidationError as error:
        raise ValueError(f"{path} is no SAE: {first_problem(error)}.") from error
    sae = SAE(ours, ours.d_k, ours.d_v)
    sae.load_state_dict(tensors | dict(sae.named_buffers()))
    if rule == "batch_topk":
        sae.activation.threshold.copy_(fit_threshold(sae, heldout))
    refuse_not_finite(sae, path)
    return sae.requires_grad_(False)


@torch.no_grad()
def fit_threshold(sae: SAE, states: History) -> Tensor:
    """Return the pre-activation above which `sae.k` atoms per token are active on average, at least 0."""
    sae.check_history(states)
    count, largest = sae.k * states.shape[0] * states.shape[1], torch.zeros(0)
    for group in states.groups(sae.group_size(states)):
        values = torch.cat([largest, sae.pre_activations(group).flatten()])
        largest = values.topk(min(count, len(values))).values
    return largest[-1].clamp_min(0)


def read_authors_firings(path: Path | str) -> pd.DataFrame:
    """Return the rows of a JSON of the author's substitution test in the columns of our replacement test.

    Columns: layer, head, atom, position, kl_atom, kl_delete, kl_random (nats), target ("state") and
    amplitude: "matched_norm", since the author puts atoms in at the Frobenius norm of the native write. The
    file says neither the passage of a position nor whether the writing token reads the edit.

    Raises FileNotFoundError for a missing file, and ValueError for one of another content.
    """
    content = read_json(local_path(path))
    rows, config = content.get("records"), content.get("config")
    if not rows or not isinstance(config, dict) or not {"layer", "head"} <= config.keys():
        raise ValueError(f"{path} is no substitution test: it has config (layer, head) and at least one of records.")
    if missing := [name for name in COLUMNS if not all(name in row for row in rows)]:
        raise ValueError(f"{path} is no substitution test: a record lacks {', '.join(missing)}.")
    table = pd.DataFrame(rows)[list(COLUMNS)].rename(columns=COLUMNS)
    where = dict(layer=config["layer"], head=config["head"], target="state", amplitude="matched_norm")
    return table.assign(**where)


def read_authors_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the config of a file of the author. Raises as `load_authors_sae`."""
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no published SAE, but a {type(content).__name__}.")
    state, config = content.get("model_state_dict"), content.get("config")
    if not isinstance(state, dict) or not isinstance(config, dict):
        keys = ", ".join(map(str, content))
        raise ValueError(f"{path} is no published SAE: those hold model_state_dict and config, this one {keys}.")
    if other := [name for name, x in state.items() if not isinstance(x, Tensor)]:
        raise ValueError(f"{path} is no published SAE: its {other[0]} is not a tensor.")
    return {name: x for name, x in state.items() if name not in IGNORED}, config


def _kind(path: Path | str, state: dict[str, Tensor], config: dict[str, Any]) -> str:
    """Return their sae_type: that of the config, else the one whose tensor names fit best."""
    kind = config.get("sae_type") or min(KINDS, key=lambda name: len(set(KINDS[name][2]) ^ set(state)))
    if kind not in KINDS:
        raise ValueError(f"{path} is of the type {kind}, and only {', '.join(KINDS)} can be read.")
    names = KINDS[kind][2]
    missing, extra = sorted(set(names) - set(state)), sorted(set(state) - set(names))
    if missing or extra:
        parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(extra)} besides"] * bool(extra)
        raise ValueError(f"{path} {' and '.join(parts)}: an SAE of the type {kind} has {', '.join(names)}.")
    return kind


def _agreed(path: Path | str, name: str, theirs: int | None, given: int | None) -> int:
    """Return the value of a field from the file or the caller."""
    if theirs is None and given is None:
        raise ValueError(f"The config of {path} does not say {name}: pass {name}=.")
    if theirs is not None and given is not None and theirs != given:
        raise ValueError(f"{path} is of {name} {theirs}, but {name} {given} was given.")
    value = given if theirs is None else theirs
    if not isinstance(value, int):
        raise ValueError(f"The {name} of {path} is {value!r}, and must be a whole number.")
    return value


def _tensors(
    path: Path | str, state: dict[str, Tensor], kind: str, shape: tuple[int, int, int], transposed: bool
) -> dict[str, Tensor]:
    """Return our tensors, except the scale, from theirs; shape: of their matrices."""
    n, d_1, d_2 = shape
    encoder, decoder, _ = KINDS[kind]

    def part(name: str, *wanted: int) -> Tensor:
        x = state[name]
        if name[0] in "VW" and x.ndim == 3:
            if x.shape[1] != 1:
                raise ValueError(f"{path} has atoms of rank {x.shape[1]}, and only rank 1 can be read.")
            x = x[:, 0]
        if tuple(x.shape) != wanted:
            raise ValueError(f"{path} has a {name} of {list(state[name].shape)} instead of {list(wanted)}.")
        return x.float()

    def factors(v: str, w: str) -> dict[str, Tensor]:
        pair = part(v, n, d_1), part(w, n, d_2)
        return dict(zip(("value", "key") if transposed else ("key", "value"), pair))

    def matrices(flat: Tensor) -> Tensor:
        x = flat.unflatten(-1, (d_1, d_2))
        return x.mT if transposed else x

    if decoder == "flat":
        atoms = {"matrix": matrices(part("decoder.weight", d_1 * d_2, n).T)}
        offset = matrices(part("decoder.bias", d_1 * d_2))
    else:
        atoms = factors(*(("V", "W") if kind == "rank1" else ("V_dec", "W_dec")))
        offset = matrices(part("bias", d_1, d_2).flatten())
    if encoder == "dense":
        filters = {"matrix": matrices(part("encoder.weight", n, d_1 * d_2))}
        bias = part("encoder.bias", n)
    else:
        filters = atoms if kind == "bilinear_tied" else factors("V_enc", "W_enc")
        bias = part("b_gate" if kind == "bilinear_gated" else "b_enc", n)
    tensors = {f"encoder.{name}": x for name, x in (filters | {"bias": bias}).items()}
    tensors |= {f"decoder.{name}": x for name, x in atoms.items()} | {"bias": offset}
    if kind == "bilinear_jumprelu":
        tensors["activation.level"] = part("log_threshold", n) / PACE
    elif kind == "bilinear_gated":
        tensors |= {"activation.log_scale": part("r_mag", n), "activation.offset": part("b_mag", n)}
    return {name: x.contiguous() for name, x in tensors.items()}
