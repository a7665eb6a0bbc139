"""Weights of a model folder, read without executing anything."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from writesae.files import read_pickle


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or of a state dict that torch.save wrote.

    Raises ValueError for a damaged file, and for a pickle that holds more than tensors; such a pickle is not executed.
    """
    try:
        state = load_file(path) if path.suffix == ".safetensors" else read_pickle(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or was cut short: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{path} holds no state dict, but a {type(state).__name__} of other things.")
    return state
