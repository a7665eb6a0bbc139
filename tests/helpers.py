"""Assertions shared by the tests."""

from __future__ import annotations

import torch


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str, tolerance: float) -> None:
    """Fail unless ||actual - expected|| <= tolerance * ||expected|| (Frobenius); the message names the tensor."""
    actual, expected = torch.as_tensor(actual).detach().double(), torch.as_tensor(expected).detach().double()
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    size = expected.norm().item()
    miss = (actual - expected).norm().item() / (size if size > 0 else 1.0)
    assert miss <= tolerance, f"{name}: relative error {miss:.2e} exceeds {tolerance:.0e} (expected norm {size:.3g})"
