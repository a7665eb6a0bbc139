"""The kernels of runs: this interpreter and this checkout, without the user's settings."""

from __future__ import annotations

import os
from pathlib import Path

from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

from replication.study.paths import ROOT

# These change what a page does.
DROPPED = ("PYTHONSTARTUP", "PYTHONOPTIMIZE", "PYTHONWARNINGS", "MPLBACKEND", "MATPLOTLIBRC")
DROPPED += ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")  # change products on a GPU
FOLDERS = ("HF_HOME", "HF_HUB_CACHE")  # a kernel has another current folder


class ThisPython(AsyncKernelManager):
    """Starts ipykernel with the interpreter of this process, whatever kernels Jupyter finds.

    Its own warnings (each says that it listens on this machine without encryption) do not reach the terminal."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict(["--log-level=ERROR"]))


def neutralise(environment: dict[str, str], folder: Path) -> None:
    """Change an environment so that its kernels import this checkout's code, read and write UTF-8, and have
    neither start-up files nor a configuration. folder: an empty one, for IPython's and Jupyter's files."""
    for name in DROPPED:
        environment.pop(name, None)
    path = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= dict(PYTHONPATH=os.pathsep.join(path), PYTHONUTF8="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    environment |= dict(IPYTHONDIR=str(folder), JUPYTER_RUNTIME_DIR=str(folder))
    environment |= {name: os.path.abspath(environment[name]) for name in FOLDERS if environment.get(name)}
