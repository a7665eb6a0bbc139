"""The description of a sparse autoencoder: parts, size, training data."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

FORMAT_VERSION = 1


class Parts(BaseModel):
    """Encoder, decoder, sparsity rule, centring. Raises ValidationError for what does not exist."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    encoder: Literal["bilinear", "dense", "tied"] = "bilinear"
    decoder: Literal["rank1", "flat"] = "rank1"
    activation: Literal["topk", "batch_topk", "jumprelu", "gated", "soft_gated"] = "topk"
    rank: PositiveInt = Field(1, description="outer products per atom; above 1 only for bilinear + rank1")
    centre: Literal["mean", "none", "bias"] = Field(
        "mean",
        description="mean: atoms explain X minus the mean of the data (the paper's text); none: X itself; "
        "bias: X minus a matrix that the decoder learns, while the encoder reads X (the author's code)",
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> Parts:
        pair = f"{self.encoder} + {self.decoder}"
        if pair == "tied + flat":
            raise ValueError(f"No SAE {pair}: a tied encoder uses the atoms of a rank1 decoder")
        if self.rank > 1 and pair != "bilinear + rank1":
            raise ValueError(f"No SAE {pair} of rank {self.rank}: above 1 only bilinear + rank1 has one")
        return self

    @property
    def variant(self) -> str:
        """The name in tables: encoder+decoder, and +activation, +centre unless they are the defaults."""
        decoder = self.decoder if self.rank == 1 else f"rank{self.rank}"
        others = [self.activation] * (self.activation != "topk") + [self.centre] * (self.centre != "mean")
        return "+".join([self.encoder, decoder, *others])


class Architecture(Parts):
    """The parts and the size of an SAE."""

    n_atoms: PositiveInt
    k: PositiveInt = Field(description="active atoms per token; on average for activations other than topk")

    @model_validator(mode="after")
    def _k_fits(self) -> Architecture:
        if self.k > self.n_atoms:
            raise ValueError(f"k = {self.k} exceeds n_atoms = {self.n_atoms}")
        return self


class SAEConfig(Architecture):
    """The content of config.json; fields about the training data and the seed are None if unknown."""

    host: str | None = None
    layer: int | None = None
    head: int | None = None
    target: Literal["state", "write"] | None = None
    write: Literal["added", "effective"] | None = None
    seed: int | None = None
    d_k: PositiveInt
    d_v: PositiveInt
    orientation: Literal["key_value"] = "key_value"
    format_version: int = FORMAT_VERSION


def first_problem(error: ValidationError) -> str:
    """Return the first problem as a clause: the field and its fault."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    return ": ".join(filter(None, [field, first["msg"].removeprefix("Value error, ")]))
