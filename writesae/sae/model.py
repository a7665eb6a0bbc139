"""Sparse autoencoders of matrices: an encoder and a decoder put together, and their checkpoints.

Table 10 of the paper lists the variants; here each is an encoder and a decoder: FlatSAE is dense + flat, MatrixSAE
dense + rank1, BilinearSAE bilinear + rank1, BilinearSAE (tied) tied + rank1, BilinearSAE (flat decoder) bilinear + flat.
Data are centred and divided by one number first, x = (X - mean) / scale, so that the mean of ||x||_F^2 is 1:

    p_i = enc_key_i^T x enc_value_i + bias_i        c = ReLU(TopK_k(p))        xhat = sum_i c_i dec_key_i dec_value_i^T

Other rules than TopK are in writesae.sae.sparsity. With rank r > 1 (App. F.3) an atom is a sum of r outer products, and
so is the filter of a bilinear encoder.

What leaves this module is in raw units: a coefficient is c_i * scale, so that coefficient * unit atom adds to a state.
Table 10 has no encoder bias; ours starts at zero and is learnt.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from writesae.files import write_atomically
from writesae.history import History
from writesae.sae.parts import (
    DECODERS,
    ENCODERS,
    LowRankDecoder,
    LowRankEncoder,
    RankOneDecoder,
    TiedEncoder,
    _Factors,
    check_parts,
)
from writesae.sae.sparsity import ACTIVATIONS, Active

FORMAT_VERSION = 1
GROUP_ELEMENTS = 2**24  # numbers held at once when a whole history is encoded


class SAE(nn.Module):
    """A sparse autoencoder of [d_k, d_v] matrices; buffers mean [d_k, d_v] and scale (a scalar), fp32.

    rank: outer products in an atom and in a filter, for bilinear + rank1 (the decoder's name notwithstanding). k: active
    atoms of a token; with an activation other than topk, on average. slots: how many atoms an encoded token names.
    Raises ValueError on an unknown part, on parts that do not fit together, and on k outside 1..n_atoms or no sides.
    """

    def __init__(
        self,
        n_atoms: int,
        k: int,
        d_k: int,
        d_v: int,
        *,
        encoder: str = "bilinear",
        decoder: str = "rank1",
        activation: str = "topk",
        rank: int = 1,
    ) -> None:
        super().__init__()
        check_parts(encoder, decoder, activation, rank)
        if not 1 <= k <= n_atoms:
            raise ValueError(f"k must lie between 1 and n_atoms = {n_atoms}, not {k}.")
        if min(d_k, d_v) < 1:
            raise ValueError(f"An SAE's matrices have sides of 1 or more, not {d_k} x {d_v}.")
        self.k, self.n_atoms, self.d_k, self.d_v, self.rank = k, n_atoms, d_k, d_v, rank
        self.kind = dict(encoder=encoder, decoder=decoder, activation=activation, rank=rank)
        if rank > 1:
            self.encoder, self.decoder = (part(n_atoms, d_k, d_v, rank) for part in (LowRankEncoder, LowRankDecoder))
        elif encoder == "tied":
            self.decoder = RankOneDecoder(n_atoms, d_k, d_v)
            self.encoder = TiedEncoder(self.decoder)
        else:
            self.encoder = ENCODERS[encoder](n_atoms, d_k, d_v)
            self.decoder = DECODERS[decoder](n_atoms, d_k, d_v)
        self.activation = ACTIVATIONS[activation](n_atoms, k)
        self.register_buffer("mean", torch.zeros(d_k, d_v))
        self.register_buffer("scale", torch.ones(()))

    @property
    def factored(self) -> bool:
        """Whether encoding, decoding and training need no states."""
        return self.encoder.factored and isinstance(self.decoder, RankOneDecoder)

    def normalise(self) -> None:
        """The norm constraints of Table 10, on both parts."""
        self.encoder.normalise()
        self.decoder.normalise()

    def standardise(self, matrices: Tensor) -> Tensor:
        """x = (X - mean) / scale, [..., d_k, d_v]."""
        return (matrices - self.mean) / self.scale

    def overlaps(self, part: _Factors, history: History, bias: Tensor | float = 0.0, bf16: bool = False) -> Tensor:
        """<key_i value_i^T, x_t> + bias_i for the factors of either part, without states: [N, T, n], differentiable.
        bf16: as History.read takes it."""
        key = part.key / self.scale
        return history.read(key, part.value, bf16) + (bias - ((key @ self.mean) * part.value).sum(-1))

    def select(self, pre: Tensor, ordered: bool = True) -> Active:
        """The active atoms of pre-activations [..., n], in scaled units."""
        return self.activation(pre, self.encoder.bias, ordered)

    @torch.no_grad()
    def encode(self, matrices: Tensor) -> Active:
        """Matrices [..., d_k, d_v] -> indices and raw coefficients [..., slots]. Raises ValueError on another shape, a dtype
        that the SAE's does not cover, and values that are not finite."""
        if matrices.shape[-2:] != (self.d_k, self.d_v):
            raise ValueError(f"This SAE takes matrices [..., {self.d_k}, {self.d_v}], not {tuple(matrices.shape)}.")
        self._check_dtype(matrices)
        if not torch.isfinite(matrices).all():
            raise ValueError("The matrices hold values that are not finite.")
        return self._raw(self.encoder.dense(self.standardise(matrices)))

    @torch.no_grad()
    def encode_history(self, history: History) -> Active:
        """Every X_t of a history -> indices and raw coefficients [N, T, slots]; a bilinear encoder forms no state. Raises
        ValueError as `check_history` does."""
        self.check_history(history)
        parts = [self._encode_group(group) for group in history.groups(self.group_size(history))]
        return Active(*(torch.cat(x) for x in zip(*parts)))

    def check_history(self, history: History) -> None:
        """Raise ValueError, in one sentence, for a history of other matrices or another dtype than the SAE's."""
        if (history.d_k, history.d_v) != (self.d_k, self.d_v):
            raise ValueError(f"This SAE takes {self.d_k} x {self.d_v} matrices, not {history.d_k} x {history.d_v}.")
        self._check_dtype(history.key)

    def _check_dtype(self, x: Tensor) -> None:
        if torch.result_type(x, self.mean) != self.mean.dtype:
            raise ValueError(f"This SAE is in {self.mean.dtype} and the data in {x.dtype}: convert one of them (.to).")

    def _encode_group(self, history: History) -> Active:
        if self.encoder.factored:
            return self._raw(self.overlaps(self.encoder, history, self.encoder.bias))
        return self._raw(self.encoder.dense(self.standardise(history.steps())))

    def group_size(self, history: History) -> int:
        """How many windows to work on at once so that about GROUP_ELEMENTS numbers are held."""
        factored = self.encoder.factored and history.factored
        per_token = self.n_atoms if factored else self.n_atoms + self.d_k * self.d_v
        return max(1, GROUP_ELEMENTS // (per_token * history.shape[1]))

    def _raw(self, pre: Tensor) -> Active:
        indices, coefficients = self.select(pre)
        return Active(indices, coefficients * self.scale)

    @torch.no_grad()
    def decode(self, indices: Tensor, coefficients: Tensor) -> Tensor:
        """Indices and raw coefficients [..., slots] -> reconstructed X [..., d_k, d_v], the mean included. Raises ValueError
        for indices that are no atoms or not as many as coefficients."""
        if indices.shape != coefficients.shape:
            raise ValueError(f"Each atom takes a coefficient: {list(indices.shape)} and {list(coefficients.shape)}.")
        outside = indices[(indices < 0) | (indices >= self.n_atoms)]
        if len(outside):
            raise ValueError(f"This SAE has no atom {int(outside[0])}: it has 0 to {self.n_atoms - 1}.")
        return self.mean + self.decoder.dense(indices, coefficients)

    @torch.no_grad()
    def atoms(self) -> tuple[Tensor, Tensor]:
        """Unit key [n, d_k] and unit value [n, d_v] of every atom.

        For other decoders these are the top singular pair of each atom: the paper's baseline "flat SAE + SVD".
        """
        if isinstance(self.decoder, RankOneDecoder):
            return F.normalize(self.decoder.key, dim=-1), F.normalize(self.decoder.value, dim=-1)
        left, _, right = torch.linalg.svd(self.decoder.weight(), full_matrices=False)
        return left[:, :, 0], right[:, 0, :]


class SAEConfig(BaseModel):
    """What a checkpoint is of. `write`: which write the values stand for, added or effective (write minus erase)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str
    layer: int
    head: int
    target: Literal["state", "write"]
    write: Literal["added", "effective"]
    encoder: Literal["bilinear", "dense", "tied"]
    decoder: Literal["rank1", "flat"]
    activation: Literal["topk", "batch_topk", "jumprelu", "gated"] = "topk"
    rank: PositiveInt = 1
    n_atoms: PositiveInt
    k: PositiveInt
    d_k: PositiveInt
    d_v: PositiveInt
    seed: int
    orientation: Literal["key_value"] = "key_value"
    format_version: int = FORMAT_VERSION


def arguments(config: SAEConfig) -> dict[str, Any]:
    """The arguments of SAE for what `config` describes."""
    return config.model_dump(include={"n_atoms", "k", "d_k", "d_v", "encoder", "decoder", "activation", "rank"})


def check_config(config: SAEConfig, sae: SAE) -> None:
    """Raise ValueError when config and SAE disagree."""
    for name in ("n_atoms", "k", "d_k", "d_v"):
        if getattr(config, name) != getattr(sae, name):
            raise ValueError(f"The config says {name} = {getattr(config, name)}, the SAE has {getattr(sae, name)}.")
    for name, value in sae.kind.items():
        if getattr(config, name) != value:
            raise ValueError(f"The config says {name} = {getattr(config, name)}, the SAE has {value}.")


def save(sae: SAE, config: SAEConfig, stem: Path | str) -> None:
    """Write `stem`.safetensors and then `stem`.json (the config, and the sha256 of the former), each atomically.

    Raises ValueError when config and SAE disagree.
    """
    check_config(config, sae)
    weights, description = _paths(stem)
    tensors = {name: x.detach().cpu().contiguous() for name, x in sae.state_dict().items()}
    write_atomically(weights, lambda path: save_file(tensors, path))
    content = config.model_dump() | {"sha256": _sha256(weights)}
    write_atomically(description, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))


def load(stem: Path | str, expect: dict[str, Any] | None = None) -> tuple[SAE, SAEConfig]:
    """Read what `save` wrote at `stem`. `expect` names fields of SAEConfig and the values they must have.

    Raises FileNotFoundError for a missing file, and ValueError for another format version, a damaged file, values that
    are not finite, and a checkpoint of something else than `expect`.
    """
    weights, description = _paths(stem)
    for path in (description, weights):
        if not path.is_file():
            raise FileNotFoundError(f"There is no SAE at {stem}: {path.name} is missing.")
    try:
        content = json.loads(description.read_text())
        checksum = content.pop("sha256", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{description} is damaged: it is not a JSON object ({error}).") from error
    config = read_config(content, description)
    refuse_other(config, expect or {}, description)
    if _sha256(weights) != checksum:
        raise ValueError(f"{weights} is damaged or was cut short: its sha256 is not the one in {description.name}.")
    try:
        sae = SAE(**arguments(config))
    except ValueError as error:
        raise ValueError(f"{description} does not describe an SAE: {error}") from error
    try:
        sae.load_state_dict(load_file(weights))
    except RuntimeError as error:
        raise ValueError(f"{weights} does not hold the tensors that {description.name} describes: {error}") from error
    refuse_not_finite(sae, weights)
    return sae.requires_grad_(False), config


def read_config(content: dict[str, Any], path: Path) -> SAEConfig:
    """The config that stands in the file `path`. Raises ValueError for another format version or other fields."""
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}.")
    try:
        return SAEConfig(**content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} does not describe an SAE: {where}: {first['msg']}.") from error


def refuse_not_finite(sae: SAE, path: Path) -> None:
    """Raise ValueError where the SAE, which was read from `path`, holds values that are not finite."""
    bad = next((name for name, x in sae.state_dict().items() if not torch.isfinite(x).all()), None)
    if bad is not None:
        raise ValueError(f"{path} holds values that are not finite, first in {bad}: train that SAE again.")


def refuse_other(config: SAEConfig, expect: dict[str, Any], path: Path) -> None:
    """Raise ValueError where fields of the config are not the expected ones, or there is no such field."""
    unknown = expect.keys() - SAEConfig.model_fields.keys()
    if unknown:
        raise ValueError(f"A checkpoint has no field {', '.join(sorted(unknown))}.")
    wrong = [name for name, value in expect.items() if getattr(config, name) != value]
    if wrong:
        has = ", ".join(f"{name} {getattr(config, name)}" for name in wrong)
        wanted = ", ".join(f"{name} {expect[name]}" for name in wrong)
        raise ValueError(f"{path} is an SAE of {has}, but {wanted} was asked for.")


def _paths(stem: Path | str) -> tuple[Path, Path]:
    return Path(f"{stem}.safetensors"), Path(f"{stem}.json")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
