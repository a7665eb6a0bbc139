"""Sparse autoencoders of matrices: encoding, decoding, and folders on disk or on the Hugging Face Hub.

With x = (X - mean) / scale, of mean ||x||_F^2 = 1, and the parts bilinear + rank1 + topk,

    p_i = enc_key_i^T x enc_value_i + bias_i   c = ReLU(TopK_k(p))   xhat = sum_i c_i dec_key_i dec_value_i^T

The paper's Table 10 has no encoder bias; ours is learnt from zero. `centre` says what the atoms are added to:
"mean": the data's mean; "none": nothing (mean = 0 above); "bias": a matrix B that the decoder learns, xhat =
B + sum_i ..., with mean = 0. Returned coefficients are in raw units, c_i * scale."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from writesae.files import file_hash, local_path, read_json, read_weights, reading, write_atomically
from writesae.history import History, States
from writesae.hosts.hub import fetch
from writesae.recurrence import torch_defaults
from writesae.sae.config import FORMAT_VERSION, Architecture, SAEConfig, first_problem
from writesae.sae.parts import RankOneDecoder, make_parts
from writesae.sae.sparsity import ACTIVATIONS, Active

GROUP_ELEMENTS = 2**24  # numbers held at once when a whole history is encoded
CONFIG, WEIGHTS = "config.json", "model.safetensors"
CARD = """---
library_name: writesae
tags: [sparse-autoencoder]
---
# A sparse autoencoder of the {target}s of {host}, layer {layer}, head {head}

{n_atoms} atoms of {d_k} x {d_v} (key x value), {k} active per token, {encoder} encoder, {decoder} decoder;
`config.json` has the rest. The method is that of [WriteSAE](https://arxiv.org/abs/2605.12770). Load it with

```python
from writesae.sae.model import SAE
sae = SAE.load("this repository's id")
indices, coefficients = sae.encode(matrices)  # matrices: [..., {d_k}, {d_v}]
```
"""


class SAE(nn.Module):
    """A sparse autoencoder of [d_k, d_v] matrices; buffers mean [d_k, d_v] and scale (a scalar), fp32.

    The parameter bias [d_k, d_v], in units of the scale, is None unless centre is "bias". `config` describes
    the SAE and, if known, its training data. A new SAE is in evaluation mode."""

    @torch_defaults()
    def __init__(self, architecture: Architecture, d_k: int, d_v: int) -> None:
        super().__init__()
        fields = architecture.model_dump(include=set(SAEConfig.model_fields))
        self.config = SAEConfig(**fields | dict(d_k=d_k, d_v=d_v))
        self.n_atoms, self.k, self.rank = architecture.n_atoms, architecture.k, architecture.rank
        self.d_k, self.d_v = d_k, d_v
        self.encoder, self.decoder = make_parts(architecture, self.n_atoms, d_k, d_v)
        self.activation = ACTIVATIONS[architecture.activation](self.n_atoms, self.k)
        self.register_buffer("mean", torch.zeros(d_k, d_v))
        self.register_buffer("scale", torch.ones(()))
        learnt = architecture.centre == "bias"
        self.register_parameter("bias", nn.Parameter(torch.zeros(d_k, d_v)) if learnt else None)
        self.eval()

    @property
    def factored(self) -> bool:
        """Whether encoding, decoding and training need no states."""
        return self.encoder.factored and isinstance(self.decoder, RankOneDecoder)

    @property
    def offset(self) -> Tensor:
        """What decoding adds to the sum of the active atoms, [d_k, d_v], in raw units."""
        return self.mean if self.bias is None else self.bias.detach() * self.scale

    def normalise(self) -> None:
        """Apply the norm constraints of Table 10."""
        self.encoder.normalise()
        self.decoder.normalise()

    def standardise(self, matrices: Tensor) -> Tensor:
        """Return x = (X - mean) / scale, [..., d_k, d_v]."""
        return (matrices - self.mean) / self.scale

    def overlaps(
        self, part: Any, history: History | States, bias: Tensor | float = 0.0, bf16: bool = False, at=None
    ) -> Tensor:
        """Return <key_i value_i^T, x_t> + bias_i, [N, T, n], for the encoder or decoder, without states.

        at [N, T, k]: of States, only the atoms that it names for each token, [N, T, k]."""
        key = part.key / self.scale
        found = history.read(key, part.value, bf16) if at is None else history.read_at(at, key, part.value)
        offset = bias - ((key @ self.mean) * part.value).sum(-1)
        return found + (offset if at is None else offset[at])

    def select(self, pre: Tensor, ordered: bool = True) -> Active:
        """Return the active atoms for pre-activations [..., n], in scaled units."""
        return self.activation(pre, self.encoder.bias, ordered)

    @torch.no_grad()
    def encode(self, matrices: Tensor) -> Active:
        """Return indices and raw coefficients [..., slots] of matrices [..., d_k, d_v]; TopK has k slots.

        Raises ValueError for another shape, a wider dtype than the SAE's, and values that are not finite.
        """
        if matrices.shape[-2:] != (self.d_k, self.d_v):
            raise ValueError(f"This SAE takes matrices [..., {self.d_k}, {self.d_v}], not {tuple(matrices.shape)}.")
        self._check_dtype(torch.result_type(matrices, self.mean))
        if not torch.isfinite(matrices).all():
            raise ValueError("The matrices hold values that are not finite.")
        return self._raw(self.encoder.dense(self.standardise(matrices)))

    @torch_defaults()
    def encode_history(self, history: History) -> Active:
        """Return indices and raw coefficients [N, T, slots] of every X_t. Raises as `check_history`."""
        self.check_history(history)
        parts = []
        for group in history.groups(self.group_size(history)):
            parts.append(self._raw(self.pre_activations(group)))
        return Active(*(torch.cat(x) for x in zip(*parts)))

    def pre_activations(self, history: History) -> Tensor:
        """Return the pre-activations of all atoms at every X_t, [N, T, n], in scaled units."""
        if self.encoder.factored:
            return self.overlaps(self.encoder, history, self.encoder.bias)
        return self.encoder.dense(self.standardise(history.steps()))

    def check_history(self, history: History) -> None:
        """Raise ValueError for a history of another shape or dtype than the SAE's."""
        if (history.d_k, history.d_v) != (self.d_k, self.d_v):
            raise ValueError(f"This SAE takes {self.d_k} x {self.d_v} matrices, not {history.d_k} x {history.d_v}.")
        self._check_dtype(history.key.dtype)

    def _check_dtype(self, dtype: torch.dtype) -> None:
        if dtype != self.mean.dtype:
            raise ValueError(f"This SAE is in {self.mean.dtype} and the data in {dtype}: convert one of them (.to).")

    def group_size(self, history: History) -> int:
        """Return the number of windows to encode at once, for about GROUP_ELEMENTS numbers in memory."""
        factored = self.encoder.factored and history.factored
        per_token = self.n_atoms + (0 if factored else self.d_k * self.d_v)
        return max(1, GROUP_ELEMENTS // (per_token * history.shape[1]))

    def _raw(self, pre: Tensor) -> Active:
        """Return the active atoms in raw units, largest first."""
        indices, coefficients = self.select(pre)
        return Active(indices, coefficients * self.scale)

    @torch.no_grad()
    def decode(self, indices: Tensor, coefficients: Tensor) -> Tensor:
        """Return the reconstruction [..., d_k, d_v], offset included, of active atoms [..., slots].

        Raises ValueError for different shapes, and for indices without an atom."""
        if indices.shape != coefficients.shape:
            raise ValueError(f"The shapes differ: {[*indices.shape]} indices, {[*coefficients.shape]} coefficients.")
        outside = indices[(indices < 0) | (indices >= self.n_atoms)]
        if len(outside):
            raise ValueError(f"This SAE has no atom {int(outside[0])}: it has 0 to {self.n_atoms - 1}.")
        return self.offset + self.decoder.dense(indices, coefficients)

    @torch.no_grad()
    def atoms(self) -> tuple[Tensor, Tensor]:
        """Return the unit key [n, d_k] and value [n, d_v] of every atom, or its top singular pair."""
        if isinstance(self.decoder, RankOneDecoder):
            return F.normalize(self.decoder.key, dim=-1), F.normalize(self.decoder.value, dim=-1)
        left, _, right = torch.linalg.svd(self.decoder.weight(), full_matrices=False)
        return left[:, :, 0], right[:, 0, :]

    def save(self, folder: Path | str) -> None:
        """Write model.safetensors and config.json (SAEConfig and the sha256), each atomically."""
        folder = local_path(folder)
        weights = folder / WEIGHTS
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        write_atomically(weights, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        text = json.dumps(self.config.model_dump() | {"sha256": file_hash(weights)}, indent=2) + "\n"
        write_atomically(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))

    def push_to_hub(self, name: str, token: str | None = None, private: bool | None = None) -> None:
        """Upload the SAE and a README to the Hub's repository `name`, which is created if needed.

        Raises ValueError, PermissionError or ConnectionError with what the Hub said."""
        with TemporaryDirectory() as folder:
            self.save(folder)
            fields = {field: "unknown" if x is None else x for field, x in self.config.model_dump().items()}
            (Path(folder) / "README.md").write_text(CARD.format(**fields), encoding="utf-8")
            advice = "log in (`hf auth login`) with a token that may write there"
            with reading(f"The SAE in {name} on the Hub", advice, done="written"):
                api = HfApi(token=token)
                api.create_repo(name, private=private, exist_ok=True)
                api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a sparse autoencoder")

    @classmethod
    def load(
        cls, name: Path | str, expect: dict[str, Any] | None = None, revision: str | None = None, **options: Any
    ) -> SAE:
        """Return the SAE of a folder or of a Hub id at `revision`, in evaluation mode and without gradients.

        expect: required values of SAEConfig's fields. options: of huggingface_hub.snapshot_download. The
        older format, NAME.json and NAME.safetensors, is read as well. Raises FileNotFoundError for missing
        files; ValueError for another format version, damaged files, tensors that do not fit the config,
        values that are not finite, and other values than expected; and as `writesae.hosts.hub.fetch`."""
        description, weights = _locate(name, revision, options)
        config, checksum = _read_config(description)
        _refuse_other(config, expect or {}, description)
        if checksum not in (None, file_hash(weights)):
            raise ValueError(f"{weights} is damaged or was cut short: its sha256 is not the one in {description.name}.")
        sae = cls(config, config.d_k, config.d_v)
        tensors = read_weights(weights)
        try:
            sae.load_state_dict(tensors)
        except RuntimeError as error:
            message = f"{weights} does not hold the tensors that {description.name} describes: {error}"
            raise ValueError(message) from error
        refuse_not_finite(sae, weights)
        return sae.requires_grad_(False)


def _locate(name: Path | str, revision: str | None, options: dict[str, Any]) -> tuple[Path, Path]:
    pair = local_path(f"{name}.json"), local_path(f"{name}.safetensors")
    if not local_path(name).is_dir() and all(path.is_file() for path in pair):
        return pair
    folder = fetch(name, [CONFIG, WEIGHTS], revision, **options)
    for path in (folder / CONFIG, folder / WEIGHTS):
        if not path.is_file():
            raise FileNotFoundError(f"{name} holds no {path.name}: an SAE is a {CONFIG} and a {WEIGHTS}.")
    return folder / CONFIG, folder / WEIGHTS


def _read_config(path: Path) -> tuple[SAEConfig, str | None]:
    """Return the config in a file, and the checksum of the weights or None."""
    content = read_json(path)
    checksum, version = content.pop("sha256", None), content.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}.")
    try:
        return SAEConfig(**content), checksum
    except ValidationError as error:
        raise ValueError(f"{path} does not describe an SAE: {first_problem(error)}.") from error


def _refuse_other(config: SAEConfig, expect: dict[str, Any], path: Path) -> None:
    unknown = expect.keys() - SAEConfig.model_fields.keys()
    if unknown:
        raise ValueError(f"A checkpoint has no field {', '.join(sorted(unknown))}.")
    wrong = [name for name, value in expect.items() if getattr(config, name) != value]
    if wrong:
        actual, wanted = (", ".join(f"{x} {values[x]}" for x in wrong) for values in (dict(config), expect))
        raise ValueError(f"{path} is an SAE of {actual}, but {wanted} was asked for.")


def refuse_not_finite(sae: SAE, path: Path) -> None:
    """Raise ValueError where the SAE, read from `path`, has values that are not finite."""
    for name, x in sae.state_dict().items():
        if not torch.isfinite(x).all():
            raise ValueError(f"{path} holds values that are not finite, first in {name}: train that SAE again.")
