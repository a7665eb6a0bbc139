"""Stored files are complete or absent, checked when read, and recomputed exactly when an input changed."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import assert_close

from replication.study import fingerprint, paths, stages
from replication.study.paths import Paths
from replication.study.profile import load_profile
from replication.study.study import Study
from writesae import files
from writesae.files import ArtifactError

PROVENANCE = {"profile": "mini", "config": "0f", "host": "toy", "seed": 1, "seconds": 0.5, "fingerprint": "f1"}
FRAME = pd.DataFrame({"token": [" the", "null", "a\nb"], "n": [1, 2, 3], "rate": [1 / 3, np.nan, 1e-9]})


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))
    return tmp_path


def test_paths_follow_the_variable_and_not_the_current_folder(output, monkeypatch):
    assert Paths("mini").results == output / "results" / "mini"
    assert Paths("mini").build == output / "build" / "mini"
    monkeypatch.chdir(output)
    monkeypatch.setenv("WRITESAE_OUTPUT", "build/test")
    assert Paths("mini").figures == paths.ROOT / "build" / "test" / "figures" / "mini"
    monkeypatch.delenv("WRITESAE_OUTPUT")
    assert Paths("paper").build == paths.ROOT / "build" / "paper"


def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(output):
    path = output / "x.txt"
    path.write_text("old")

    def fail(partial):
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, fail)
    assert [p.name for p in output.iterdir()] == ["x.txt"]
    assert path.read_text() == "old"


def test_table_keeps_text_and_six_digits(output):
    stages.write_table(FRAME, output / "t.csv", PROVENANCE)
    back = stages.read_table(output / "t.csv")
    assert back.token.tolist() == FRAME.token.tolist()
    assert back.n.tolist() == [1, 2, 3]
    assert back.rate[0] == 0.333333
    assert np.isnan(back.rate[1])
    assert (output / "t.csv").read_bytes().count(b"\r") == 0


def test_text_that_looks_like_numbers_or_ends_a_line_comes_back_as_text(output):
    stages.write_table(pd.DataFrame({"token": ["1", "007", "x\r"]}), output / "t.csv", PROVENANCE)
    assert stages.read_table(output / "t.csv").token.tolist() == ["1", "007", "x\\r"]


def test_sidecar_says_where_a_table_comes_from(output):
    stages.write_table(FRAME, output / "t.csv", PROVENANCE)
    record = json.loads((output / "t.csv.json").read_text())
    assert {"commit", "versions", "device", "kernel", "created", "sha256", "format_version", *PROVENANCE} <= set(record)
    assert record["versions"]["torch"] == torch.__version__
    if not torch.cuda.is_available():
        assert record["device"] == f"cpu ({torch.backends.cpu.get_cpu_capability()})"


def _remove(path):
    path.unlink()


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def _remove_sidecar(path):
    files.sidecar(path).unlink()


def _damage_sidecar(path):
    files.sidecar(path).write_text('{"format_version"')


def _age_sidecar(path):
    record = json.loads(files.sidecar(path).read_text())
    files.sidecar(path).write_text(json.dumps({**record, "format_version": 0}))


DAMAGE = {
    _remove: "missing",
    _truncate: "damaged",
    _remove_sidecar: "vouches",
    _damage_sidecar: "json is damaged",
    _age_sidecar: "format version 0",
}


@pytest.mark.parametrize(("harm", "sentence"), DAMAGE.items())
@pytest.mark.parametrize("kind", ["table", "tensors"])
def test_damage_is_one_clear_sentence(output, kind, harm, sentence):
    if kind == "table":
        path, read = output / "t.csv", stages.read_table
        stages.write_table(FRAME, path, PROVENANCE)
    else:
        path, read = output / "t.safetensors", files.load_tensors
        files.save_tensors(path, {"a": torch.ones(2)}, {"fingerprint": "f1"})
    assert files.up_to_date(path, "f1")
    harm(path)
    with pytest.raises(ArtifactError, match=sentence):
        read(path)
    assert not files.up_to_date(path, "f1")


def test_tensors_come_back_with_their_metadata(output):
    whole = torch.arange(24, dtype=torch.float64).reshape(4, 6)
    tensors = {"left": whole[:2], "turned": whole.T, "half": whole.half()}
    files.save_tensors(output / "x.safetensors", tensors, {"host": "toy", "cell": [1, 4]})
    back, metadata = files.load_tensors(output / "x.safetensors")
    assert metadata == {"host": "toy", "cell": [1, 4]}
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert_close(back[name], tensor, name, 0)


def test_metadata_that_is_not_plain_writes_nothing(output):
    with pytest.raises(TypeError, match="plain values"):
        files.save_tensors(output / "x.safetensors", {"a": torch.ones(1)}, {"model": object()})
    assert not (output / "x.safetensors").exists()


def test_up_to_date_wants_the_fingerprint_of_every_file(output):
    stages.write_table(FRAME, output / "a.csv", PROVENANCE)
    stages.write_table(FRAME, output / "b.csv", {**PROVENANCE, "fingerprint": "f2"})
    assert files.up_to_date(output / "a.csv", "f1")
    assert not files.up_to_date(output / "a.csv", "f2")
    assert not files.up_to_date([output / "a.csv", output / "b.csv"], "f1")


def test_sidecars_without_a_seal_and_of_earlier_versions_are_read(output):
    stages.write_table(FRAME, output / "a.csv", PROVENANCE)
    record = json.loads(files.sidecar(output / "a.csv").read_text())
    del record["seal"]
    files.sidecar(output / "a.csv").write_text(json.dumps(record | {"workspace": "0a"}))
    assert len(stages.read_table(output / "a.csv")) == 3
    assert files.up_to_date(output / "a.csv", "f1")


computed = []


def _counted(group):
    computed.append(group)
    return _group(group)


def test_a_stage_does_not_take_the_committed_results_for_its_own(output, monkeypatch):
    study = Study(load_profile("smoke"))
    monkeypatch.setattr(study, "host_fingerprint", lambda name: {"host": name})
    computed.clear()

    def staged():
        return study.stage("t", "toy", [1], _counted)

    staged(), staged()
    assert computed == [1]
    parts = sorted(study.paths.build.rglob("t-toy.csv*"))
    assert [part.name for part in parts] == ["t-toy.csv", "t-toy.csv.json"]
    study.paths.results.mkdir(parents=True)
    for part in parts:  # the same rows and fingerprint in results/, under every possible name
        (study.paths.results / part.name.replace("t-toy", "t")).write_bytes(part.read_bytes())
        part.rename(study.paths.results / part.name)
    staged()
    assert computed == [1, 1]


def test_fingerprint_counts_values_files_and_code(output):
    data = output / "data"
    data.write_text("1")
    first = fingerprint.fingerprint(modules=["replication.commands.order"], k=16, data=data, cells=range(3))
    assert first == fingerprint.fingerprint(
        modules=["replication.commands.order"], cells=[0, 1, 2], data=data, k=np.int64(16)
    )
    assert first != fingerprint.fingerprint(modules=["replication.commands.order"], k=17, data=data, cells=range(3))
    assert first != fingerprint.fingerprint(modules=["replication.commands.verify"], k=16, data=data, cells=range(3))
    data.write_text("2")
    assert first != fingerprint.fingerprint(modules=["replication.commands.order"], k=16, data=data, cells=range(3))


def test_fingerprint_refuses_what_it_cannot_compare(output):
    with pytest.raises(TypeError, match="not of object"):
        fingerprint.fingerprint(x=object())
    with pytest.raises(ArtifactError, match="missing"):
        fingerprint.fingerprint(x=output / "nothing")


def _group(number):
    values = np.random.default_rng(number).random(2)
    return pd.DataFrame({"group": number, "text": ["nan", "x"], "value": values})


def test_an_interrupted_stage_goes_on_and_gives_the_same_rows(output):
    computed = []

    def compute(number, stop=None):
        if number == stop:
            raise KeyboardInterrupt
        computed.append(number)
        return _group(number)

    with pytest.raises(KeyboardInterrupt):
        stages.resumable("s", "ab" * 32, [5, 6, 7], lambda g: compute(g, stop=7), output)
    resumed = stages.resumable("s", "ab" * 32, [5, 6, 7], compute, output)
    assert computed == [5, 6, 7]
    whole = stages.resumable("whole", "ab" * 32, [5, 6, 7], _group, output)
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    direct = pd.concat(map(_group, [5, 6, 7]), ignore_index=True)
    pd.testing.assert_frame_equal(resumed, direct, check_dtype=False, check_exact=True)


def test_workers_compute_at_once_and_keep_the_order(output):
    both = threading.Barrier(2, timeout=30)

    def compute(number):
        both.wait()  # passes only if two groups run at once
        time.sleep(0.1 * (number == 1))  # the first group finishes last
        return _group(number)

    found = stages.resumable("s", "ab" * 32, [1, 2, 3, 4], compute, output, workers=2)
    pd.testing.assert_frame_equal(found, stages.resumable("one", "ab" * 32, [1, 2, 3, 4], _group, output))


def test_groups_of_other_inputs_or_other_groups_are_not_taken(output):
    stages.resumable("s", "ab" * 32, [1, 2], _group, output)
    assert stages.resumable("s", "ab" * 32, [1, 3], _group, output).group.tolist() == [1, 1, 3, 3]
    stages.resumable("s-other", "ab" * 32, [1], _group, output)
    stages.resumable("s", "cd" * 32, [1], _group, output)
    assert sorted(p.name for p in output.glob("s*")) == ["s-" + "cd" * 8, "s-other-" + "ab" * 8]


def test_a_stage_without_groups_is_refused(output):
    with pytest.raises(ValueError, match="no groups"):
        stages.resumable("s", "ab" * 32, [], _group, output)


def test_staged_table_computes_once_and_leaves_no_groups(output):
    provenance = {k: v for k, v in PROVENANCE.items() if k not in ("seconds", "fingerprint")}
    calls = []

    def compute(number):
        calls.append(number)
        return _group(number)

    def stage(expected):
        return stages.staged_table(output / "r.csv", expected, [1, 2], compute, Paths("mini").partial, provenance)

    first = stage("ab" * 32)
    pd.testing.assert_frame_equal(first, stage("ab" * 32), check_exact=True)
    assert calls == [1, 2]
    assert not list(Paths("mini").partial.glob("*"))
    stage("cd" * 32)
    assert calls == [1, 2, 1, 2]


KILLED = """
    import os, signal
    import numpy as np, pandas as pd
    from replication.study import paths, stages

    def compute(number):
        if number == 2 and os.environ.get("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        return pd.DataFrame({"value": np.random.default_rng(number).random(3)})

    folder = paths.Paths("mini").partial
    provenance = dict(profile="mini", config="0", host="toy", seed=0)
    path = paths.Paths("mini").results / "killed.csv"
    stages.staged_table(path, "ef" * 32, [0, 1, 2, 3], compute, folder, provenance)
"""


def test_kill_9_and_again_gives_the_same_file(output):
    def run(place, **more):
        environment = {**os.environ, "WRITESAE_OUTPUT": str(place), "PYTHONPATH": str(paths.ROOT), **more}
        return subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED)], env=environment, stderr=subprocess.PIPE)

    table = "results/mini/killed.csv"
    assert run(output / "a", KILL="1").returncode == -signal.SIGKILL
    assert not (output / "a" / table).exists()
    assert len(list((output / "a").rglob("group-*.csv"))) == 2
    assert run(output / "a").returncode == 0
    assert run(output / "b").returncode == 0
    assert (output / "a" / table).read_bytes() == (output / "b" / table).read_bytes()
    assert not list((output / "a").rglob("group-*"))


def test_threads_that_write_one_file_at_once_do_not_take_each_others_away(tmp_path):
    """The workers of a stage are threads, and two of them can find the same windows missing."""
    path, both, failed = tmp_path / "x.txt", threading.Barrier(2, timeout=10), []

    def write(partial):
        partial.write_text("whole")
        both.wait()

    def run():
        try:
            files.write_atomically(path, write)
        except ArtifactError as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and path.read_text() == "whole"
    assert [x.name for x in tmp_path.iterdir()] == ["x.txt"]
