"""Which packages the GPU profiles install, and when: a stand-in for pip that notes what it is asked for."""

import sys

import pytest

from writesae import gpu_extras

KERNELS = ["fla-core", "flash-linear-attention", "causal-conv1d", "mamba-ssm"]
PIP = """
import pathlib, sys
log = pathlib.Path(__file__).with_name("asked")
log.open("a").write(" ".join(sys.argv[1:]) + "\\n")
sys.exit(int(any(name in sys.argv for name in {refused})))
"""


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Call with the names that pip is to fail on; returns a function that lists what it was asked for."""

    def refuse(*names):
        (tmp_path / "pip.py").write_text(PIP.format(refused=names))
        monkeypatch.setattr(gpu_extras, "PIP", (sys.executable, str(tmp_path / "pip.py"), "install"))
        asked = tmp_path / "asked"
        return lambda: [line.split() for line in asked.read_text().splitlines()] if asked.exists() else []

    return refuse


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


def test_without_cuda_nothing_is_installed_and_a_line_says_so(pip, tmp_path, monkeypatch, capsys):
    asked = pip()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for found, says in ((None, "there is no CUDA device here"), ("/usr/bin/nvidia-smi", "sees no CUDA device")):
        monkeypatch.setattr("shutil.which", lambda name, found=found: found)
        assert gpu_extras.main(["--done", str(tmp_path / "done")]) == 0
        out = capsys.readouterr().out
        assert says in out and "everything runs on torch without them" in out and len(out.splitlines()) == 1
    assert not asked() and not (tmp_path / "done").exists(), "the next run looks again"


def test_each_package_is_installed_by_itself_under_the_constraints(pip, cuda, tmp_path, capsys):
    asked = pip()
    index = ["--extra-index-url", "https://example.org/whl"]
    assert gpu_extras.main(["--done", str(tmp_path / "done"), *index]) == 0
    lock = str(gpu_extras.ROOT / "requirements.lock")
    build, *each = asked()
    assert build == ["install", *index, "-c", lock, *gpu_extras.BUILD]
    assert [line[-1] for line in each] == gpu_extras.packages() and set(KERNELS) <= {line[-1] for line in each}
    assert all(line[:-1] == ["install", *index, "-c", lock, "--no-build-isolation"] for line in each)
    assert "not installed" not in capsys.readouterr().out and (tmp_path / "done").exists()


def test_one_that_does_not_build_keeps_no_other_back(pip, cuda, tmp_path, capsys):
    asked = pip("fla-core", "mamba-ssm")
    assert gpu_extras.main(["--done", str(tmp_path / "done")]) == 0
    assert [line[-1] for line in asked()[1:]] == gpu_extras.packages(), "all are tried"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("GPU packages installed: flash-linear-attention, causal-conv1d")
    assert "not installed: fla-core, mamba-ssm (see above), only speed depends on it." in last
    assert (tmp_path / "done").exists(), "and not tried again at every run"


def test_a_requirement_is_named_without_its_version(pip):
    pip("b>=2")
    assert gpu_extras.install(["a==1.0", "b>=2", "c"], []) == (["a", "c"], ["b"])
