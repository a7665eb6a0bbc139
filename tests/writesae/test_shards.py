"""Shards: training from disk gives the same SAE as from memory, and memory does not grow with the data."""

import json
import subprocess
import sys

import pytest
import torch

from writesae import files, harvesting
from writesae.files import ArtifactError
from writesae.harvesting import ShardedHistory, cell_folder, harvest, harvest_shards
from writesae.sae import train as train_module
from writesae.sae.train import TrainingSettings, evaluate, train
from writesae.text import cut_windows, each_window

CELLS = [(1, 1), (1, 3)]


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(300, (11, 40), generator=torch.Generator().manual_seed(2))


def stored(host, tokens, folder, **options) -> int:
    return harvest_shards(host, tokens, CELLS, folder, identity="test", **dict(shard_windows=3, batch=3) | options)


def settings_of(**changes) -> TrainingSettings:
    base = dict(n_atoms=20, k=3, tokens=16 * 2 * 40, batch_windows=2, lr=1e-2, final_lr=1e-3, warmup=5)
    return TrainingSettings(**base | dict(dead_after=3, resample_every=8, renormalise_every=7) | changes)


def assert_same_tensors(a, b):
    for name, x in a.items():
        assert torch.equal(x, b[name]), name


@pytest.mark.parametrize("target", ["state", "write"])
def test_training_from_disk_gives_the_sae_of_training_in_memory(host, tokens, tmp_path, target):
    assert stored(host, tokens, tmp_path) == 4
    for cell in CELLS:
        memory = harvest(host, tokens, CELLS, 3, progress=False)[cell].history(target)
        disk = ShardedHistory(tmp_path, cell, target)
        assert (disk.shape, disk.d_k, disk.d_v, disk.target) == (memory.shape, memory.d_k, memory.d_v, target)
        assert disk.numbers == sum(x.numel() for x in memory.tensors().values())
        for index in (7, [10, 0, 4, 10], slice(2, 9), torch.tensor([3, 2])):
            assert_same_tensors(memory[index].tensors(), disk[index].tensors())
        assert torch.equal(disk.mean(), memory.mean())
        assert torch.equal(disk.energy(memory.mean()), memory.energy(memory.mean()))

        (sae, record), (wanted, expected) = (train(x, settings_of(), progress=False) for x in (disk, memory))
        assert_same_tensors(wanted.state_dict(), sae.state_dict())
        assert record.loss == expected.loss
        config = sae.config
        assert (config.host, config.layer, config.head, config.write) == (host.name, *cell, "added")
        assert evaluate(sae, disk) == evaluate(wanted, memory)


def test_batches_mix_the_shards_by_a_seeded_shuffle(gated_deltanet, tokens, tmp_path):
    stored(gated_deltanet, tokens, tmp_path)
    disk, settings = ShardedHistory(tmp_path, CELLS[0], "write"), settings_of(batch_windows=5)
    drawn = train_module.batch_of(settings, len(disk), 0)
    assert len({window // disk.per_shard for window in drawn.tolist()}) > 1
    assert not torch.equal(drawn, train_module.batch_of(settings_of(batch_windows=5, seed=1), len(disk), 0))


def test_the_first_windows_are_a_history_of_their_own(gated_deltanet, tokens, tmp_path):
    stored(gated_deltanet, tokens, tmp_path)
    few = ShardedHistory(tmp_path, CELLS[0], "state", limit=5)
    memory = harvest(gated_deltanet, tokens[:5], CELLS, 3, progress=False)[CELLS[0]].history("state")
    assert few.shape == memory.shape
    assert torch.equal(few.mean(), memory.mean())
    assert few.fingerprint() != ShardedHistory(tmp_path, CELLS[0], "state").fingerprint()


def test_a_killed_training_goes_on_from_the_shards(gated_deltanet, tokens, tmp_path, monkeypatch):
    stored(gated_deltanet, tokens, tmp_path)
    disk, checkpoint = ShardedHistory(tmp_path, CELLS[0], "state"), tmp_path / "run.safetensors"
    wanted, _ = train(disk, settings_of(), progress=False)
    real = train_module.learning_rate

    def killed(settings, step, steps):
        if step == 11:
            raise KeyboardInterrupt
        return real(settings, step, steps)

    monkeypatch.setattr(train_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(train_module, "learning_rate", killed)
    with pytest.raises(KeyboardInterrupt):
        train(disk, settings_of(), progress=False, checkpoint=checkpoint)
    monkeypatch.setattr(train_module, "learning_rate", real)
    again, _ = train(disk, settings_of(), progress=False, checkpoint=checkpoint)
    assert_same_tensors(wanted.state_dict(), again.state_dict())
    with pytest.raises(ValueError, match="other settings or other data"):
        train(ShardedHistory(tmp_path, CELLS[1], "state"), settings_of(), progress=False, checkpoint=checkpoint)


@pytest.fixture
def runs(gated_deltanet, monkeypatch):
    """The number of windows in each run of the model."""
    made, real = [], type(gated_deltanet).each_record

    def counted(self, rows, layers):
        made.append(len(rows))
        return real(self, rows, layers)

    monkeypatch.setattr(type(gated_deltanet), "each_record", counted)
    return made


def test_a_killed_harvest_goes_on_at_the_shard(gated_deltanet, tokens, tmp_path, runs, monkeypatch):
    real = files.save_tensors

    def killed(path, tensors, metadata):
        if path.stem == "00002" and path.parent.name == "L1-H3":
            raise KeyboardInterrupt
        real(path, tensors, metadata)

    monkeypatch.setattr(files, "save_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        stored(gated_deltanet, iter(tokens), tmp_path)
    with pytest.raises(ArtifactError, match=r"shards.json is missing: no harvest of this cell was completed"):
        ShardedHistory(tmp_path, CELLS[0], "state")
    monkeypatch.setattr(files, "save_tensors", real)
    assert runs == [3, 3, 3]
    stored(gated_deltanet, iter(tokens), tmp_path)
    assert runs[3:] == [3, 2], "the third shard again, and the fourth"
    stored(gated_deltanet, iter(tokens), tmp_path)
    assert len(runs) == 5, "all is there"
    whole = harvest(gated_deltanet, tokens, CELLS, 3, progress=False)[CELLS[1]].history("state")
    assert_same_tensors(whole.tensors(), ShardedHistory(tmp_path, CELLS[1], "state")[:].tensors())


def test_other_tokens_are_another_harvest(gated_deltanet, tokens, tmp_path, runs):
    stored(gated_deltanet, tokens, tmp_path)
    changed = tokens[:8].clone()
    changed[4, 0] += 1
    runs.clear()
    assert stored(gated_deltanet, changed, tmp_path) == 3
    assert runs == [3, 2], "the second shard, and the third, which is shorter now"
    assert len(ShardedHistory(tmp_path, CELLS[0], "write")) == 8
    assert len(list(cell_folder(tmp_path, CELLS[0]).glob("*.safetensors"))) == 3


def test_what_is_damaged_is_refused(gated_deltanet, tokens, tmp_path):
    stored(gated_deltanet, tokens, tmp_path)
    place = cell_folder(tmp_path, CELLS[0])
    with pytest.raises(ValueError, match="There is no training target 'key'"):
        ShardedHistory(tmp_path, CELLS[0], "key")
    with pytest.raises(ValueError, match="holds no whole: choose write = added"):
        ShardedHistory(tmp_path, CELLS[0], "write", write="whole")
    with pytest.raises(ValueError, match="12 windows are asked for and .* has 11"):
        ShardedHistory(tmp_path, CELLS[0], "state", limit=12)
    with pytest.raises(ValueError, match="^0 windows are asked for"):
        ShardedHistory(tmp_path, CELLS[0], "state", limit=0)
    other = cell_folder(tmp_path, CELLS[1])
    for suffix in (".safetensors", ".safetensors.json"):
        (place / f"00001{suffix}").write_bytes((other / f"00001{suffix}").read_bytes())
    with pytest.raises(ArtifactError, match="00001.safetensors is of another harvest"):
        ShardedHistory(tmp_path, CELLS[0], "state")
    (other / "00003.safetensors").write_bytes(b"short")
    with pytest.raises(ArtifactError, match="00003.safetensors is damaged"):
        ShardedHistory(tmp_path, CELLS[1], "state")
    manifest = place / "shards.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | dict(format_version=99)))
    with pytest.raises(ArtifactError, match="format version 99"):
        ShardedHistory(tmp_path, CELLS[0], "state")


def test_streams_that_cannot_be_harvested_are_refused(gated_deltanet, tokens, tmp_path):
    with pytest.raises(ValueError, match="holds no window"):
        stored(gated_deltanet, iter(()), tmp_path)
    with pytest.raises(ValueError, match="the first has 40 tokens, another 39"):
        stored(gated_deltanet, [[1] * 40] * 4 + [[1] * 39], tmp_path)
    with pytest.raises(ValueError, match="Layer 2 of small is not recurrent"):
        harvest_shards(gated_deltanet, tokens, [(2, 0)], tmp_path, identity="test")


def test_what_is_refused_leaves_a_finished_harvest(gated_deltanet, tokens, tmp_path):
    stored(gated_deltanet, tokens, tmp_path)
    for windows in (iter(()), [[999] * 40] * 3):
        with pytest.raises(ValueError, match="holds no window|has no token 999"):
            stored(gated_deltanet, windows, tmp_path)
    assert len(ShardedHistory(tmp_path, CELLS[0], "write")) == 11


class Characters:
    eos_token_id = 0

    def __call__(self, text, **options):
        return dict(input_ids=[ord(c) for c in text])


def test_a_stream_of_texts_is_cut_as_a_list_is():
    texts = ["abcdefgh", "", "xy", "0123456789ab"]
    cut = cut_windows(Characters(), texts, 4)
    assert [(number, window) for number, window in each_window(Characters(), iter(texts), 4)] == list(
        zip(cut.passage.tolist(), cut.tokens.tolist())
    )
    assert cut.passage.tolist() == [0, 0, 3, 3, 3]
    assert cut.tokens[1].tolist() == [ord(c) for c in "defg"]
    assert len(cut_windows(Characters(), texts, 4, limit=3)) == 3


PEAK = """
import resource, sys, tempfile
import torch
from writesae.recurrence import Factors
from writesae.harvesting import ShardedHistory, harvest_shards
from writesae.sae.train import TrainingSettings, train

class Host:
    name, scalar_decay, device = "random", True, "cpu"
    def check_cell(self, layer, head): pass
    def check_windows(self, tokens): return tokens
    def each_record(self, rows, layers): yield rows
    def cell_factors(self, rows, head):
        key, added, effective = (torch.randn(*rows.shape, 64) for _ in range(3))
        return Factors(query=key, key=key, added=added, effective=effective, log_decay=-torch.rand(*rows.shape, 1))

shards = int(sys.argv[1])
with tempfile.TemporaryDirectory() as folder:
    windows = (torch.full((256,), i) for i in range(64 * shards))  # 12 MiB a shard
    harvest_shards(Host(), windows, [(0, 0), (0, 1)], folder, identity="", shard_windows=64)
    settings = TrainingSettings(n_atoms=32, k=4, tokens=64 * shards * 256, batch_windows=8)
    train(ShardedHistory(folder, (0, 0), "state"), settings, progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_peak_memory_does_not_grow_with_the_corpus(tmp_path):
    peak = {
        count: float(subprocess.run([sys.executable, "-c", PEAK, str(count)], capture_output=True, check=True).stdout)
        for count in (2, 8)
    }
    assert peak[8] - peak[2] < 60, f"{peak} MiB, where the shards of a cell grew by 72 MiB, those of both by 144"


def test_the_default_shard_is_a_round_number_of_batches():
    assert harvesting.SHARD_WINDOWS % 16 == 0, "so that a shard's batches are those of one long harvest"


def test_a_shard_that_is_lost_or_damaged_after_the_opening_is_one_sentence(gated_deltanet, tokens, tmp_path):
    stored(gated_deltanet, tokens, tmp_path)
    disk = ShardedHistory(tmp_path, CELLS[0], "state")
    path = sorted(disk.place.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-7])
    for read in (lambda: disk[0], lambda: disk.factors_at(torch.tensor([0]), torch.tensor([3]))):
        with pytest.raises(
            ValueError, match=r"The harvest in .* cannot be read \(SafetensorError: .*\): harvest it again"
        ):
            read()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="The harvest in .* cannot be read"):
        disk[0]


def test_the_same_tokens_in_windows_of_another_length_are_harvested_again(gated_deltanet, tokens, tmp_path):
    for length in (30, 15):
        stored(gated_deltanet, tokens[:2, :30].reshape(-1, length), tmp_path, shard_windows=9)
        assert ShardedHistory(tmp_path, CELLS[0], "state").length == length
