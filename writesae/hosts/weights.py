"""Weights of a model folder, read without executing anything."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or of a state dict that torch.save wrote.

    Raises ValueError for a damaged file, and for a pickle that holds more than tensors; the pickle is not
    executed.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and was not loaded, since a pickle can run code: where you trust "
            "it, save its state dict alone."
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged or was cut short: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise ValueError(f"{path} holds no state dict, but a {type(found).__name__} of other things.")
    return found
