"""Kernels of other packages: hidden where there is no CUDA, named where they run, asked for where they are missing.

Stand-ins take the packages' place: they can be imported, and every operator fails as Triton does without a GPU.
"""

import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import small
from kernel_run import FOLDERS, outputs
from safetensors.torch import load_file

from writesae import artifacts, suite
from writesae.hosts import kernels, load_host
from writesae.hosts.base import Host
from writesae.profiles import load_profile

ROOT = Path(__file__).resolve().parents[1]
OPERATORS = {
    "fla/ops/gated_delta_rule/__init__.py": ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    "fla/models/rwkv7/__init__.py": ("RWKV7ForCausalLM",),
    "mamba_ssm/ops/triton/ssd_combined.py": ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
    "mamba_ssm/ops/triton/selective_state_update.py": ("selective_state_update",),
    "causal_conv1d/__init__.py": ("causal_conv1d_fn", "causal_conv1d_update"),
}
NO_DRIVER = "0 active drivers ([]). There should only be one."
MODELS = ("transformers:Qwen3_5ForCausalLM", "transformers:Mamba2ForCausalLM")

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without CUDA")


@pytest.fixture(scope="module")
def standins(tmp_path_factory):
    """A folder for sys.path with the packages and, for importlib.metadata, their distributions."""
    folder = tmp_path_factory.mktemp("standins")
    for path, names in OPERATORS.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        for parent in list(Path(path).parents)[:-1]:
            (folder / parent / "__init__.py").touch()
        body = f"    raise RuntimeError({NO_DRIVER!r})\n\n\n"
        file.write_text("".join(f"def {name}(*args, **kwargs):\n{body}" for name in names))
    for package, distribution in kernels.PACKAGES.items():
        metadata = folder / f"{distribution.replace('-', '_')}-9.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 9.0\n")
        (metadata / "top_level.txt").write_text(package + "\n")
    return folder


@pytest.fixture(scope="module")
def wanted():
    """What the hosts give without the packages."""
    return outputs(library=True)


def run_beside(standins: Path, path: Path, *names: str) -> subprocess.CompletedProcess:
    """kernel_run in a process that finds the stand-ins."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (standins, ROOT))))
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, str(ROOT / "tests" / "kernel_run.py"), str(path), *names]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@needs_no_cuda
def test_packages_that_need_a_gpu_change_nothing_without_one(standins, wanted, tmp_path):
    """With transformers imported first, and the library's own forward run as well."""
    ran = run_beside(standins, tmp_path / "made", "transformers", "--library")
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.split("\n")[:-1] == [f"{name} torch torch" for name in FOLDERS]
    made = load_file(tmp_path / "made")
    assert made.keys() == wanted.keys()
    assert [name for name, x in made.items() if not torch.equal(x, wanted[name])] == []


@needs_no_cuda
def test_hosts_run_where_the_library_has_bound_the_packages_before(standins, wanted, tmp_path):
    """The classes of the models were imported first: the library's own forward fails then, and the hosts do not."""
    ran = run_beside(standins, tmp_path / "made", *MODELS, "--library")
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = [f"gated_deltanet torch fla\ngated_deltanet: {NO_DRIVER}", f"mamba2 torch mamba_ssm\nmamba2: {NO_DRIVER}"]
    assert ran.stdout == "\n".join([*said, "rwkv7 torch torch\n"]), "the stand-ins are in the library's way"
    made = load_file(tmp_path / "made")
    assert made.keys() == wanted.keys() - {"gated_deltanet logits", "mamba2 logits"}
    assert [name for name, x in made.items() if not torch.equal(x, wanted[name])] == []


# Which kernels run.


def test_the_kernel_path_is_torch_unless_a_module_is_another_packages(host, monkeypatch):
    assert (host.kernel, host.library_kernel) == ("torch", "torch")
    norm = torch.nn.LayerNorm(4)
    monkeypatch.setattr(type(norm), "__module__", "fla.modules.layernorm")
    if host.family == "rwkv7":  # its norms are torch's, which now pass for the package's
        assert (host.kernel, host.library_kernel) == ("fla", "fla")
    else:
        assert host.kernel == "torch"


@pytest.mark.parametrize(("family", "package"), [("gated_deltanet", "fla"), ("mamba2", "mamba_ssm")])
def test_a_bound_kernel_is_seen_in_the_librarys_function(family, package, monkeypatch, standins):
    """Bound as transformers does it, by its own decorator."""
    from transformers.integrations import use_kernel_func_from_hub_with_fallback

    host = small(family)
    module = sys.modules[type(host.model).__module__]
    names = dict(fla="chunk_gated_delta_rule", mamba_ssm="mamba_chunk_scan_combined")
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(standins))
    operator = getattr(module, host.operator)
    bound = use_kernel_func_from_hub_with_fallback(names[package], package)(operator.__wrapped__)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    assert (kernels.bound(operator), kernels.bound(bound), kernels.bound(len)) == ("torch", package, "torch")
    monkeypatch.setattr(module, host.operator, bound)
    assert (host.kernel, host.library_kernel) == ("torch", package)


# CUDA without the packages.


def test_only_a_gpu_without_the_kernels_is_worth_a_word():
    assert kernels.advice(False, "fla", "torch", "Qwen3_5ForCausalLM") is None
    assert kernels.advice(True, "fla", "fla", "Qwen3_5ForCausalLM") is None
    says = kernels.advice(True, "fla", "torch", "Qwen3_5ForCausalLM")
    assert "Qwen3_5ForCausalLM's own forward takes the slower torch path" in says
    assert "pip install flash-linear-attention" in says
    assert "pip install mamba-ssm" in kernels.advice(True, "mamba_ssm", "torch", "Mamba2ForCausalLM")


@pytest.mark.parametrize("name", FOLDERS)
def test_loading_onto_a_gpu_without_the_kernels_warns_once(name, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_host(ROOT / "models" / name, "cpu")
    # no device is needed to be told that a model is on one
    monkeypatch.setattr(Host, "device", types.SimpleNamespace(type="cuda"))
    with pytest.warns(UserWarning, match="takes the slower torch path") as caught:
        load_host(ROOT / "models" / name, "cpu")
    assert len([w for w in caught if "torch path" in str(w.message)]) == 1
    assert caught[0].filename == __file__


# Sidecars.


class TwoHosts(suite.Suite):
    """Two hosts of which one runs on a kernel."""

    def __init__(self):
        profile = load_profile("smoke")
        hosts = {name: profile.hosts[name] for name in ("gated_deltanet", "rwkv7")}
        super().__init__(profile.model_copy(update=dict(hosts=hosts)))
        self.loaded = []

    def host(self, name):
        self.loaded.append(name)
        return types.SimpleNamespace(kernel="fla" if name == "rwkv7" else "torch")

    def host_fingerprint(self, name):
        return {"name": name}


def test_every_table_says_on_which_kernels_its_hosts_ran(tmp_path, monkeypatch):
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))
    made = TwoHosts()

    def kernel(folder, name):
        return json.loads((folder / f"{name}.csv.json").read_text())["kernel"]

    def part(name):
        frame = pd.DataFrame(dict(host=[name], x=[1]))
        return made.staged("table", name, [0], lambda group: frame, ["writesae.edit"], {})

    made.write("before", pd.DataFrame(dict(x=[1])))
    assert kernel(made.paths.results, "before") == "torch"
    first, second = part("gated_deltanet"), part("rwkv7")
    assert [kernel(made.paths.build / "tables", f"table-{name}") for name in made.profile.hosts] == ["torch", "fla"]
    made.loaded.clear()
    part("rwkv7")
    assert not made.loaded, "a stage that is up to date loads no model"
    made.gather("table", [first, second])
    made.gather("table", [second])
    assert kernel(made.paths.results, "table") == "fla"
    made.gather("table", [first, second])
    made.write("summary", pd.DataFrame(dict(x=[1])))
    assert [kernel(made.paths.results, name) for name in ("table", "summary")] == ["fla, torch"] * 2
    artifacts.write_table(first, tmp_path / "plain.csv", dict(profile="", config="", host="", seed=0, seconds=0))
    assert kernel(tmp_path, "plain") == "torch"
