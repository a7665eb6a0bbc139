"""Kernels of other packages (Triton, CUDA): which of them a model runs on, and models without any where there is no GPU.

transformers binds each recurrence, when the model's module is imported, to the kernel of a package that it can import,
whether there is a GPU or not. The adapters call none of these: their recurrences are those of writesae.recurrence, in
torch. A kernel runs where the library's own forward is called, and where the model is built of a package's modules.
"""

from __future__ import annotations

import inspect
import sys

import torch

PACKAGES = {"fla": "flash-linear-attention", "mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}
TORCH = "torch"


def without_triton() -> None:
    """Without CUDA, hide the kernels' packages from transformers, which would bind them and fail at the first run.

    What was imported before stays: where transformers has bound a kernel already, the library's own forward fails on
    a CPU, and everything here runs.
    """
    if not torch.cuda.is_available():
        for name in PACKAGES:
            sys.modules.setdefault(name, None)


def of_modules(model: torch.nn.Module) -> str:
    """The package that the model's modules are of, "torch" where they are torch's and transformers' own."""
    found = {type(module).__module__.partition(".")[0] for module in model.modules()}
    return next((name for name in PACKAGES if name in found), TORCH)


def bound(operator) -> str:
    """The package whose kernel a function of transformers calls, which it keeps in its closure; else "torch"."""
    while inspect.isfunction(operator):
        kernel = inspect.getclosurevars(operator).nonlocals.get("implementation")
        if kernel is not None:
            package = (getattr(kernel, "__module__", None) or "").partition(".")[0]
            return package if package in PACKAGES else TORCH
        operator = getattr(operator, "__wrapped__", None)
    return TORCH


def advice(cuda: bool, wanted: str, used: str, model: str) -> str | None:
    """A sentence for a model on CUDA whose library's forward is not on the kernels `wanted`; None where all is well."""
    if not cuda or used == wanted:
        return None
    return (
        f"CUDA is here and the kernels of {wanted} are not: {model}'s own forward takes the slower torch path; "
        f"`pip install {PACKAGES[wanted]}` speeds it up. Only speed depends on it."
    )
