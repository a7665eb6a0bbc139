"""Kernels of other packages: hidden without CUDA, compared with our code where CUDA is available.

Without CUDA, stand-ins replace the packages. They can be imported, and each of their operators raises
Triton's error for a missing GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from kernel_run import outputs
from safetensors.torch import load_file

from writesae.hosts.load import load_host

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = {
    "fla/ops/gated_delta_rule/__init__.py": ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    "fla/models/rwkv7/__init__.py": ("RWKV7ForCausalLM",),
    "mamba_ssm/ops/triton/ssd_combined.py": ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
    "mamba_ssm/ops/triton/selective_state_update.py": ("selective_state_update",),
    "causal_conv1d/__init__.py": ("causal_conv1d_fn", "causal_conv1d_update"),
}
PACKAGES = {"fla": "flash-linear-attention", "mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}
NO_DRIVER = "0 active drivers ([]). There should only be one."
MODELS = ("transformers:Qwen3_5ForCausalLM", "transformers:Mamba2ForCausalLM")

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without CUDA")


@pytest.fixture(scope="module")
def standins(tmp_path_factory):
    """A folder for sys.path with the stand-in packages and their metadata for importlib.metadata."""
    folder = tmp_path_factory.mktemp("standins")
    for path, names in OPERATORS.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        for parent in list(Path(path).parents)[:-1]:
            (folder / parent / "__init__.py").touch()
        body = f"    raise RuntimeError({NO_DRIVER!r})\n\n\n"
        file.write_text("".join(f"def {name}(*args, **kwargs):\n{body}" for name in names))
    for package, distribution in PACKAGES.items():
        metadata = folder / f"{distribution.replace('-', '_')}-9.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 9.0\n")
        (metadata / "top_level.txt").write_text(package + "\n")
    return folder


@pytest.fixture(scope="module")
def wanted():
    """Outputs of the hosts without the packages."""
    return outputs(library=True)


def run_beside(standins: Path, path: Path, *names: str) -> subprocess.CompletedProcess:
    """Run kernel_run in a process that finds the stand-ins."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (standins, ROOT))))
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, str(ROOT / "tests" / "kernel_run.py"), str(path), *names]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@needs_no_cuda
def test_packages_that_need_a_gpu_change_nothing_without_one(standins, wanted, tmp_path):
    """transformers is imported first, and the library's own forward is run too."""
    ran = run_beside(standins, tmp_path / "made", "transformers", "--library")
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.split("\n")[:-1] == []
    made = load_file(tmp_path / "made")
    assert made.keys() == wanted.keys()
    assert [name for name, x in made.items() if not torch.equal(x, wanted[name])] == []


@needs_no_cuda
def test_hosts_run_where_the_library_has_bound_the_packages_before(standins, wanted, tmp_path):
    """The model classes are imported first. The library's own forward then fails, and the hosts still run."""
    ran = run_beside(standins, tmp_path / "made", *MODELS, "--library")
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = f"gated_deltanet: {NO_DRIVER}\nmamba2: {NO_DRIVER}\n"
    assert ran.stdout == said, "the stand-ins are in the library's way"
    made = load_file(tmp_path / "made")
    assert made.keys() == wanted.keys() - {"gated_deltanet logits", "mamba2 logits"}
    assert [name for name, x in made.items() if not torch.equal(x, wanted[name])] == []


# CUDA with the packages.


@pytest.mark.skipif(not torch.cuda.is_available(), reason="about a machine with CUDA")
@pytest.mark.parametrize(("name", "package"), [("gated_deltanet", "fla"), ("mamba2", "mamba_ssm")])
def test_the_librarys_own_forward_on_its_kernels_agrees_with_ours(name, package):
    pytest.importorskip(package)
    host = load_host(ROOT / "models" / name, "cuda")
    tokens = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = host.model(input_ids=tokens.cuda()).logits
    assert_close(host.logits(host.run(tokens).final), theirs.float().cpu(), "logits", 1e-2)
