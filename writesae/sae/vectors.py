"""Sparse autoencoders of vectors in SAELens' format: a folder with cfg.json and sae_weights.safetensors.

    p = (x - b_dec) W_enc + b_enc        c = rule(p)        xhat = c W_dec + b_dec

The rule is topk, jumprelu, or ReLU ("standard"). They are read to say which features a write raises
(`writesae.evaluate.features`), and written so that other tools can use the value sides of our atoms.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from writesae.files import local_path, read_json, read_weights, write_atomically
from writesae.hosts.hub import fetch
from writesae.recurrence import torch_defaults
from writesae.sae.model import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
RULES = ("topk", "jumprelu", "standard")
SAELENS = "6.0.0"  # the version whose format this is


@dataclass
class VectorSAE:
    """An SAE of vectors: encoder [D, n], encoder_bias [n], decoder [n, D], decoder_bias [D].

    rule: "topk" with k active features, "jumprelu" with threshold [n], or "standard". centred: whether
    decoder_bias is subtracted before encoding. metadata: SAELens' (model_name, hook_name, ...).
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    rule: str = "topk"
    k: int | None = None
    threshold: Tensor | None = None
    centred: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)

    def pre(self, x: Tensor) -> Tensor:
        """Return the pre-activations [..., n] of vectors [..., D], on the SAE's device and in its dtype."""
        x = x.to(self.encoder)
        return (x - self.decoder_bias if self.centred else x) @ self.encoder + self.encoder_bias

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Return the coefficients of all features, [..., n]."""
        pre = self.pre(x)
        if self.rule == "jumprelu":
            return pre * (pre > self.threshold)
        if self.rule == "standard":
            return pre.relu()
        top = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())

    def decode(self, coefficients: Tensor) -> Tensor:
        """Return the reconstruction [..., D] of coefficients [..., n]."""
        return coefficients @ self.decoder + self.decoder_bias

    def save(self, folder: Path | str) -> None:
        """Write the folder that SAELens' `SAE.load_from_disk` reads."""
        tensors = dict(W_enc=self.encoder, b_enc=self.encoder_bias, W_dec=self.decoder, b_dec=self.decoder_bias)
        if self.rule == "jumprelu":
            tensors["threshold"] = self.threshold
        tensors = {name: x.detach().cpu().float().contiguous() for name, x in tensors.items()}
        config = dict(architecture=self.rule, d_in=self.encoder.shape[0], d_sae=self.encoder.shape[1])
        config |= dict(dtype="float32", device="cpu", apply_b_dec_to_input=self.centred)
        config |= dict(normalize_activations="none", reshape_activations="none")
        config |= dict(k=self.k, rescale_acts_by_decoder_norm=False) if self.rule == "topk" else {}
        config["metadata"] = dict(sae_lens_version=SAELENS) | self.metadata
        folder, text = local_path(folder), json.dumps(config, indent=2) + "\n"
        write_atomically(folder / WEIGHTS, lambda path: save_file(tensors, path))
        write_atomically(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, name: Path | str, revision: str | None = None) -> VectorSAE:
        """Return the SAE of a folder that SAELens wrote (`SAE.save_model`), or of a Hub id.

        Raises FileNotFoundError for missing files, and ValueError for another architecture, normalised or
        reshaped inputs, and tensors that are missing or do not fit.
        """
        folder = fetch(name, [CONFIG, WEIGHTS], revision)
        config, tensors = read_json(folder / CONFIG), read_weights(folder / WEIGHTS)
        rule = config.get("architecture", "standard")
        if rule not in RULES:
            raise ValueError(f"{name} is an SAE of the architecture {rule}: those of {', '.join(RULES)} can be read.")
        for option in ("normalize_activations", "reshape_activations"):
            if config.get(option, "none") != "none":
                raise ValueError(f"{name} has {option} = {config[option]}: fold it into the weights in SAELens first.")
        sizes = ["d_in", "d_sae"] + ["k"] * (rule == "topk")
        if lacking := [size for size in sizes if not isinstance(config.get(size), int)]:
            raise ValueError(f"{name} has no number {lacking[0]} in its {CONFIG}, as SAEs of {rule} have.")
        d, n = config["d_in"], config["d_sae"]
        shapes = dict(W_enc=(d, n), b_enc=(n,), W_dec=(n, d), b_dec=(d,))
        shapes |= dict(threshold=(n,)) if rule == "jumprelu" else {}
        wrong = [key for key, shape in shapes.items() if key not in tensors or tuple(tensors[key].shape) != shape]
        if wrong:
            raise ValueError(f"{name} has no {wrong[0]} of {list(shapes[wrong[0]])}, which its {CONFIG} asks for.")
        weights = {key: tensors[key].float() for key in shapes}
        if config.get("rescale_acts_by_decoder_norm"):  # as SAELens' fold_W_dec_norm
            norm = weights["W_dec"].norm(dim=-1)
            weights |= dict(W_enc=weights["W_enc"] * norm, b_enc=weights["b_enc"] * norm)
            weights["W_dec"] = weights["W_dec"] / norm[:, None]
        parts = (weights[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec"))
        options = dict(k=config.get("k"), threshold=weights.get("threshold"))
        centred = config.get("apply_b_dec_to_input", True)
        return cls(*parts, rule, **options, centred=centred, metadata=config.get("metadata", {}))

    @classmethod
    @torch_defaults()
    def of_rows(cls, sae: SAE, **metadata: Any) -> VectorSAE:
        """Return an SAE of 1 x D matrices as one of vectors. Raises ValueError for another shape or rule.

        To train an SAE of vectors x [N, T, D], train one of History(torch.ones(N, T, 1), x).
        """
        if sae.d_k != 1 or sae.config.activation != "topk" or not sae.factored:
            raise ValueError(f"This SAE is {sae.config.variant} of {sae.d_k} x {sae.d_v} matrices, not topk of rows.")
        encoder, decoder = ((part.key * part.value).detach() for part in (sae.encoder, sae.decoder))
        bias, rest = sae.encoder.bias.detach() * sae.scale, sae.offset[0]
        return cls(encoder.T, bias, decoder, rest, k=sae.k, centred=sae.bias is None, metadata=metadata)


@torch_defaults()
def output_side(sae: SAE, projection: Tensor | None = None, **metadata: Any) -> VectorSAE:
    """Return the value sides of the atoms as an SAE of the head's output, [d_v], or of the residual stream.

    Reading an atom changes the head's output along its value and, up to the norm and gate behind the heads,
    the residual stream along W_O value: projection is `Host.output_projection`, [D, d_v]. Encoder and decoder
    are these unit directions, with the SAE's k. The key sides, which say when an atom is read, do
    not fit into an SAE of vectors. metadata: SAELens', such as model_name and hook_name.
    """
    values = sae.atoms()[1]
    directions = F.normalize(values if projection is None else values @ projection.T, dim=-1)
    zeros = torch.zeros(len(directions)), torch.zeros(directions.shape[1])
    config = sae.config
    known = dict(layer=config.layer, hook_head_index=config.head, model_name=config.host, training="writesae")
    return VectorSAE(directions.T, zeros[0], directions, zeros[1], k=sae.k, metadata=known | metadata)
