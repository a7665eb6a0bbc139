"""One table of invalid inputs to the public interface.

Each raises one sentence that says what is wrong, and leaves no partial file.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL
from helpers import Malicious, SmallStudy
from pydantic import ValidationError

from replication import statistics
from replication.commands import run as run_notebook
from replication.commands import sweep
from replication.commands.train_host import read_recipe
from replication.pages import install as install_module
from replication.scorecard.table import scorecard
from replication.study import fingerprint, stages
from replication.study.profile import Install, load_profile
from replication.study.study import open_study, split_windows
from writesae import edit, files, shift
from writesae.evaluate import attribution, install, recall, steering
from writesae.evaluate.firings import find_firings
from writesae.evaluate.replacement import replace_writes
from writesae.evaluate.shifts import measure_shifts
from writesae.files import ArtifactError
from writesae.harvesting import harvest, harvest_shards
from writesae.history import History
from writesae.hosts import load
from writesae.hosts.load import load_host
from writesae.hosts.rwkv7_model import from_pth
from writesae.recurrence import Factors
from writesae.sae.config import Architecture, SAEConfig
from writesae.sae.model import SAE
from writesae.sae.published import load_authors_sae
from writesae.sae.train import TrainingSettings, evaluate, train
from writesae.text import Windows, cut_windows

ROOT = Path(__file__).resolve().parents[2]
LAYER, HEAD = CELL = (1, 2)
CONFIG = dict(host="toy", layer=3, head=1, target="state", write="added", encoder="bilinear", decoder="rank1")
CONFIG |= dict(n_atoms=12, k=3, d_k=5, d_v=7, seed=0)
PROVENANCE = dict(profile="mini", config="0f", host="toy", seed=1, seconds=0.5)
ROW, PLACE = torch.tensor([1]), torch.tensor([40])


# The calls of the table. Each takes `x`, the objects of the fixture `things` and a folder.


def profile(x, old: str = "", new: str = "", content: str | bytes | None = None):
    """Load profiles/mini.yaml with `old` replaced by `new`, or a profile with the given content."""
    text = (ROOT / "profiles" / "mini.yaml").read_text()
    assert old in text
    content = text.replace(old, new, 1) if content is None else content
    (x.path / "bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_profile("bad", x.path)


def recipe(x, content: str):
    (x.path / "recipe.yaml").write_text(content)
    return read_recipe(x.path / "recipe.yaml")


def broken_host(x):
    torch.manual_seed(0)
    model = load.adapter("mamba2").build(SMALL["mamba2"])
    model.backbone.layers[3].mixer.dt_bias.data[2] = torch.nan
    model.save_pretrained(x.path)
    return load_host(x.path)


def released(x, content):
    torch.save(content, x.path / "RWKV-x070.pth")
    return from_pth(x.path / "RWKV-x070.pth")


def pickled_release(x):
    try:
        released(x, dict(weight=Malicious(x.path / "ran")))
    finally:
        assert not (x.path / "ran").exists()


def a_file(x, content: bytes = b"weights", name: str = "file"):
    (x.path / name).write_bytes(content)
    return x.path / name


def new_sae(d_k=5, d_v=7, **architecture) -> SAE:
    return SAE(Architecture(**dict(n_atoms=12, k=3) | architecture), d_k, d_v)


def saved(x, *harmed: str):
    """The folder of a saved SAE without the files named in `harmed`."""
    SAE(SAEConfig(**CONFIG), 5, 7).save(x.path / "sae")
    for name in harmed:
        (x.path / "sae" / name).unlink()
    return x.path / "sae"


def load_with_nan(x):
    sae = SAE(SAEConfig(**CONFIG), 5, 7)
    sae.decoder.value.data[4, 2] = torch.nan
    sae.save(x.path / "sae")
    return SAE.load(x.path / "sae")


def load_other_text(x):
    (saved(x) / "config.json").write_bytes(b"\xff\xfe{}")
    return SAE.load(x.path / "sae")


def load_changed(x, **fields):
    config = saved(x) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return SAE.load(x.path / "sae")


def published(x, config: dict | None = None, **tensors):
    shapes = dict(V_enc=(11, 1, 5), W_enc=(11, 1, 7), b_enc=(11,), V_dec=(11, 1, 5), W_dec=(11, 1, 7), bias=(5, 7))
    state = {name: torch.ones(shape) for name, shape in shapes.items()} | tensors
    said = dict(sae_type="bilinear", layer=9, head=4, k=3, seed=42, d_k=5, d_v=7) | (config or {})
    torch.save(dict(model_state_dict=state, config=said), x.path / "best.pt")
    return load_authors_sae(x.path / "best.pt", "host")


def table(x, **changes):
    """A stored table with an altered sidecar."""
    path = x.path / "t.csv"
    stages.write_table(pd.DataFrame(dict(token=["007"], n=[1])), path, PROVENANCE)
    record = json.loads(files.sidecar(path).read_text())
    files.sidecar(path).write_text(json.dumps(record | changes))
    return path


def tokens_with(x, token) -> torch.Tensor:
    return torch.where(torch.arange(x.tokens.shape[1]) == 7, token, x.tokens)


class Words:
    """A tokenizer whose tokens are the numbers in the text."""

    eos_token_id = 0

    def __call__(self, text, **_):
        return dict(input_ids=[int(word) for word in text.split()])


def words_without_end() -> Words:
    tokenizer = Words()
    tokenizer.eos_token_id = None
    return tokenizer


def edited(x, rows=ROW, position=PLACE, left=(1, 1, 12), right=(1, 1, 20), steps=3, dtype=torch.float64, fill=1.0):
    """A run of the small host (12 x 20, fp64, 3 windows of 90 tokens) with the given edit."""
    left, right = (torch.full(side, fill, dtype=dtype) for side in (left, right))
    return edit.edited_hidden(x.host, x.run, *CELL, edit.make_edit(rows, position, left, right), steps)


def generated(x, count: int):
    made = edit.make_edit(ROW, PLACE, torch.ones(1, 1, 12).double(), torch.ones(1, 1, 20).double())
    return edit.generate_under(x.host, x.run, {CELL: made}, count)


def under(x, edits, **cell):
    """A run under edits of the cells given, each of one term at position 40 of a window."""
    sides = torch.ones(1, 1, 12), torch.ones(1, 1, 20)
    edits = {cell: edit.make_edit(torch.tensor([row]), PLACE, *sides) for cell, row in edits.items()}
    return edit.run_edited(x.host, x.tokens, edits, steps=2, **cell)


def gradient(x, token, rows=ROW, starts=PLACE, steps=3):
    return shift.logit_gradient(x.host, x.run, *CELL, rows, starts, steps, torch.tensor(token))


INSTALL = Install(
    place="middle",
    prompts=3,
    prompt_tokens=90,
    distances=[5],
    rank_classes=dict(top=(2, 10)),
    targets_per_class=2,
    magnitudes=[3.0],
    writes=3,
    new_tokens=4,
    doses=[1],
    bisections=1,
)


def installed(x, targets, distance=5, labels=("top",), writes=3):
    targets = torch.as_tensor(targets)
    return install.setting(x.host, x.run, targets, np.array(labels), distance, writes=writes)


def goal(x, start=40, writes=2, tokens=(5, 6)):
    return steering.Goal(x.run, torch.tensor([0, 2]), torch.tensor(tokens), start, writes)


def shifts(x, t0=(4, 5, 6), **options):
    """Measured logit shifts of one atom in the three windows."""
    sides, windows = (torch.ones(1, 12).double(), torch.ones(1, 20).double()), Windows(x.tokens, torch.arange(3))
    return measure_shifts(x.host, windows, torch.tensor(t0), CELL, *sides, **dict(eps=(1.0,), horizon=2) | options)


def predicted(x, made):
    return shift.predict_shift(x.host, x.tokens, made, 5, layer=LAYER, head=HEAD, steps=2)


def replaced_tokens(x):
    """Replace at a firing in tokens that are not `Windows`."""
    firings = pd.DataFrame(dict(window=[0], position=[30], atom=[1], coefficient=[1.0]))
    return replace_writes(x.host, x.tokens, new_sae(12, 20), firings, layer=1, head=2)


def replaced_without(x, *columns):
    firings = pd.DataFrame(dict(window=[0], position=[4], atom=[1], coefficient=[0.5])).drop(columns=[*columns])
    return replace_writes(x.host, Windows(x.tokens, torch.arange(3)), new_sae(12, 20), firings, layer=1, head=2)


def steered(x, name="gamma", cells=(CELL,), steps=1):
    goal = installed(x, [[5]] * 3).goal
    return steering.refine(x.host, goal, steering.directions(x.host, goal, cells, name), steps)


def suite_with(x, cells: dict, **changes):
    """The smoke profile with one host, three windows of 90 tokens and the given install settings."""
    smoke = load_profile("smoke")
    changed = smoke.model_copy(update=dict(install=INSTALL.model_copy(update=changes)))
    study = SmallStudy(changed, x.host, x.tokens)
    study.__dict__["cells"] = pd.DataFrame(cells)
    return study


MIDDLE = dict(host=["gated_deltanet"], place=["middle"], layer=[LAYER], head=[HEAD])


def install_stage(x, **changes):
    return install_module._stage(suite_with(x, MIDDLE, **changes), "gated_deltanet", "install")


def random_history(windows=4, d_k=5, d_v=7, dtype=torch.float32, target="state") -> History:
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(windows, 10, d, generator=generator).to(dtype) for d in (d_k, d_v))
    return History(key, value, -torch.ones(windows, 10, dtype=dtype) if target == "state" else None)


def settings(**changes) -> TrainingSettings:
    return TrainingSettings(**dict(n_atoms=6, k=2, tokens=40, batch_windows=2) | changes)


def trained(checkpoint=None, **validation):
    other = random_history(**validation) if validation else None
    return train(random_history(), settings(), progress=False, validation=other, checkpoint=checkpoint)


def scored(x, hosts):
    return scorecard(lambda name: pd.DataFrame(dict(host=["tiny"], family=["mamba2"])), hosts)


def score_without_results(x):
    return scorecard(lambda name: stages.read_table(x.path / f"{name}.csv"), ["tiny"])


class Case(NamedTuple):
    name: str
    call: object
    error: type[Exception]
    says: str


NO_MAPPING = "Profile bad is not a YAML mapping of fields to values"
CASES = [
    # Profiles, recipes
    Case(
        "profile of that name",
        lambda x: load_profile("minni"),
        ValueError,
        "no profile 'minni': choose one of full, full-hosts, host-seeds, mini",
    ),
    Case("profile: a list", lambda x: profile(x, content="- 1"), ValueError, NO_MAPPING),
    Case("profile: no YAML", lambda x: profile(x, content="{"), ValueError, NO_MAPPING),
    Case("profile: empty", lambda x: profile(x, content=""), ValueError, NO_MAPPING),
    Case(
        "profile: no text",
        lambda x: profile(x, content=b"\xff\xfe"),
        ValueError,
        r"Profile bad is not text in UTF-8 \(byte 0\): save it",
    ),
    Case(
        "profile: a rate that is NaN",
        lambda x: profile(x, "lr: 0.003", "lr: .nan"),
        ValueError,
        r"Profile bad: mamba2, overrides, saes\.main\.lr: Input should be a finite number",
    ),
    Case(
        "profile: an infinite dose",
        lambda x: profile(x, "doses: [0.5, 1,", "doses: [.inf, 1,"),
        ValueError,
        r"Profile bad: install\.doses\.0: Input should be a finite number",
    ),
    Case(
        "profile: a negative seed",
        lambda x: profile(x, "seed: 42", "seed: -1"),
        ValueError,
        "Profile bad: seed: Input should be greater than or equal to 0",
    ),
    Case(
        "profile: more active atoms than atoms",
        lambda x: profile(x, "    n_atoms: 512\n    k: 16", "    n_atoms: 512\n    k: 513"),
        ValueError,
        r"Profile bad: saes\.main: .*k = 513 exceeds n_atoms = 512",
    ),
    Case(
        "profile: a class of ranks that ends before it begins",
        lambda x: profile(x, "near: [11, 100]", "near: [100, 11]"),
        ValueError,
        r"Profile bad: install: .*rank_classes\.near needs 1 <= .* not 100 to 11",
    ),
    Case(
        "profile: an edit before the prompt",
        lambda x: profile(x, "distances: [3, 4, 6, 9, 13]", "distances: [3, 99]"),
        ValueError,
        "Profile bad: install: .*a distance of 99 exceeds the 64 tokens of a prompt",
    ),
    Case(
        "profile: a host's own settings",
        lambda x: profile(x, "install: {prompts: 10,", "install: {prompts: ten,"),
        ValueError,
        r"Profile bad: .*mamba2, overrides, install\.prompts: Input should be a valid integer",
    ),
    Case(
        "grid that is not there", lambda x: sweep.load_grid(x.path / "g.yaml"), ValueError, "no grid .*g.yaml: .* has"
    ),
    Case(
        "study of no profile",
        lambda x: open_study("huge"),
        ValueError,
        "no profile 'huge': choose one of full, full-hosts, host-seeds, mini",
    ),
    Case(
        "recipe that is not there", lambda x: read_recipe(x.path / "recipe.yaml"), ValueError, "recipe.yaml is missing"
    ),
    Case("recipe: a list", lambda x: recipe(x, "- 1"), ValueError, "recipe.yaml is not a YAML mapping"),
    Case(
        "recipe: an unknown field", lambda x: recipe(x, "speed: 3"), ValueError, "recipe.yaml: family: Field required"
    ),
    # Hosts
    Case(
        "host: a file", lambda x: load_host(a_file(x)), FileNotFoundError, r"file holds no config\.json: give a model"
    ),
    Case(
        "host: no folder, no hub id",
        lambda x: load_host("a/b/c"),
        FileNotFoundError,
        "no folder a/b/c, and it is no hub",
    ),
    Case(
        "host: a device",
        lambda x: load_host(x.path, "abacus"),
        ValueError,
        "device 'abacus' cannot be used .*: choose cpu",
    ),
    Case(
        "host: weights that are NaN",
        broken_host,
        ValueError,
        r"damaged: backbone\.layers\.3\.mixer\.dt_bias is not finite",
    ),
    Case(
        "RWKV-7 release: a pickle with code",
        pickled_release,
        ValueError,
        "holds more than tensors and plain values, and was",
    ),
    Case(
        "RWKV-7 release: damaged",
        lambda x: from_pth(a_file(x, b"")),
        ValueError,
        "file cannot be read .*may be damaged",
    ),
    Case("RWKV-7 release: no dict", lambda x: released(x, torch.ones(2)), ValueError, "no state dict, but a Tensor"),
    Case(
        "host family",
        lambda x: load.adapter("lstm").build({}),
        ValueError,
        "no host family 'lstm': choose one of gated",
    ),
    # SAEs
    Case("SAE: k of 0", lambda x: new_sae(k=0), ValidationError, "(?s)k.*greater than 0"),
    Case("SAE: k above n_atoms", lambda x: new_sae(k=13), ValidationError, "k = 13 exceeds n_atoms = 12"),
    Case("SAE: no sides", lambda x: new_sae(d_k=0), ValidationError, "(?s)d_k.*greater than 0"),
    Case(
        "SAE: rank of a flat one",
        lambda x: new_sae(decoder="flat", rank=2),
        ValidationError,
        "only bilinear . rank1",
    ),
    Case(
        "SAE: matrices turned", lambda x: x.sae.encode(torch.ones(7, 5)), ValueError, r"\[\.\.\., 5, 7\], not \(7, 5\)"
    ),
    Case(
        "SAE: matrices in fp64",
        lambda x: x.sae.encode(torch.ones(5, 7).double()),
        ValueError,
        r"This SAE is in torch\.float32 and the data in torch\.float64: convert",
    ),
    Case("SAE: matrices with NaN", lambda x: x.sae.encode(torch.full((5, 7), torch.nan)), ValueError, "not finite"),
    Case(
        "SAE: a history in fp64",
        lambda x: x.sae.encode_history(random_history(dtype=torch.float64)),
        ValueError,
        r"This SAE is in torch\.float32 and the data in torch\.float64",
    ),
    Case(
        "SAE: an atom that is not there",
        lambda x: x.sae.decode(torch.tensor([3, 12]), torch.ones(2)),
        ValueError,
        "has no atom 12: it has 0 to 11",
    ),
    Case(
        "SAE: fewer coefficients than atoms",
        lambda x: x.sae.decode(torch.tensor([3, 1]), torch.ones(1)),
        ValueError,
        r"The shapes differ: \[2\] indices, \[1\] coefficients",
    ),
    Case(
        "SAE: evaluated on other sides",
        lambda x: evaluate(x.sae, random_history(d_k=6)),
        ValueError,
        "5 x 7 .*not 6 x 7",
    ),
    Case("config: no active atom", lambda x: SAEConfig(**CONFIG | dict(k=0)), ValidationError, "(?s)k.*greater than 0"),
    Case("config: unknown field", lambda x: SAEConfig(**CONFIG, width=1), ValidationError, "(?s)width.*not permitted"),
    Case("settings: k", lambda x: settings(k=7), ValidationError, "k = 7 exceeds n_atoms = 6"),
    Case("settings: a rate that is NaN", lambda x: settings(lr=np.nan), ValidationError, "(?s)lr.*finite number"),
    Case("settings: no tokens", lambda x: settings(tokens=0), ValidationError, "(?s)tokens.*greater than 0"),
    # Checkpoints
    Case(
        "checkpoint: none",
        lambda x: SAE.load(x.path / "sae"),
        FileNotFoundError,
        "There is no folder .*sae, and it is no hub id either",
    ),
    Case(
        "checkpoint: no weights",
        lambda x: SAE.load(saved(x, "model.safetensors")),
        FileNotFoundError,
        r"holds no model\.safetensors",
    ),
    Case(
        "checkpoint: NaN", load_with_nan, ValueError, r"safetensors holds values .* not finite, first in decoder\.value"
    ),
    Case("checkpoint: no text", load_other_text, ValueError, r"config\.json cannot be read .*or is no JSON object"),
    Case(
        "checkpoint: k in words",
        lambda x: load_changed(x, k="three"),
        ValueError,
        r"config\.json does not .*: k: Input",
    ),
    Case(
        "checkpoint: an empty folder",
        lambda x: SAE.load(x.path),
        FileNotFoundError,
        "holds no config.json",
    ),
    Case(
        "published: a folder",
        lambda x: load_authors_sae(x.path, "host"),
        ValueError,
        "IsADirectoryError.*or not from torch.save",
    ),
    Case(
        "published: NaN",
        lambda x: published(x, bias=torch.full((5, 7), torch.nan)),
        ValueError,
        "best.pt holds .* not fin",
    ),
    Case(
        "published: layer in words",
        lambda x: published(x, dict(layer="nine")),
        ValueError,
        "layer of .* is 'nine', and must be",
    ),
    Case(
        "published: k", lambda x: published(x, dict(k=12)), ValueError, "best.pt is no SAE: k = 12 exceeds n_atoms = 11"
    ),
    Case(
        "published: no atoms",
        lambda x: published(x, b_enc=torch.ones(())),
        ValueError,
        r"no atoms: its b_enc is of .*\[\]",
    ),
    # Stored tables and tensors
    Case(
        "table: none",
        lambda x: stages.read_table(x.path / "t.csv"),
        ArtifactError,
        "t.csv is missing: run the stage",
    ),
    Case("table: a folder", lambda x: stages.read_table(x.path), ArtifactError, "is missing: run the stage"),
    Case("tensors: a table", lambda x: files.load_tensors(table(x)), ArtifactError, "t.csv holds no tensors"),
    Case(
        "table: another version",
        lambda x: stages.read_table(table(x, format_version=9)),
        ArtifactError,
        "format version 9, and this code reads 1",
    ),
    Case(
        "table: no columns",
        lambda x: stages.write_table(pd.DataFrame(), x.path / "t.csv", PROVENANCE),
        ValueError,
        "The table for t.csv has no columns",
    ),
    Case(
        "fingerprint: a module", lambda x: fingerprint.fingerprint(["writesae.no"]), ValueError, "no module writesae.no"
    ),
    # Windows, harvest
    Case(
        "run: token too large",
        lambda x: x.host.run(tokens_with(x, 300)),
        ValueError,
        "no token 300: its ids are 0 to 299",
    ),
    Case("run: negative token", lambda x: x.host.run(tokens_with(x, -1)), ValueError, "small has no token -1"),
    Case(
        "run: float tokens",
        lambda x: x.host.run(x.tokens.float()),
        ValueError,
        r"in torch\.int64, not in torch\.float32",
    ),
    Case(
        "run: one window bare", lambda x: x.host.run(x.tokens[0]), ValueError, r"\[windows, time\], not of shape \[90\]"
    ),
    Case(
        "run: windows of nothing",
        lambda x: x.host.run(x.tokens[:, :0]),
        ValueError,
        r"no tokens: their shape is \[3, 0\]",
    ),
    Case(
        "run: beyond the last layer",
        lambda x: x.host.run(x.tokens, upto=7),
        ValueError,
        "has 6 layers: upto is 0 to 6, not 7",
    ),
    Case(
        "run: a layer that was not run",
        lambda x: x.host.factors(x.host.run(x.tokens, upto=1), 4, 0),
        ValueError,
        "ends below layer 1, before layer 4: run it further",
    ),
    Case(
        "harvest: no cells",
        lambda x: harvest(x.host, x.tokens, [], 2),
        ValueError,
        "at least one cell: small .*0, 1, 3, 4",
    ),
    Case("harvest: batch", lambda x: harvest(x.host, x.tokens, [CELL], 0), ValueError, "at least one window, not 0"),
    Case(
        "harvest: no windows",
        lambda x: harvest(x.host, x.tokens[:0], [CELL], 2),
        ValueError,
        r"their shape is \[0, 90\]",
    ),
    Case(
        "harvest: a token",
        lambda x: harvest(x.host, tokens_with(x, 300), [CELL], 2),
        ValueError,
        "small has no token 300",
    ),
    Case(
        "harvest: no state there",
        lambda x: harvest(x.host, x.tokens, [(2, 0)], 2),
        ValueError,
        "Layer 2 .* not recurrent",
    ),
    Case(
        "harvest: no such head",
        lambda x: harvest(x.host, x.tokens, [(1, 4)], 2),
        ValueError,
        "no head 4: choose one of 0 to 3",
    ),
    Case(
        "history: target",
        lambda x: x.factors.history("key"),
        ValueError,
        "no training target 'key': choose state or write",
    ),
    Case(
        "history: write",
        lambda x: x.factors.history("write", "whole"),
        ValueError,
        "'whole': choose added or effective",
    ),
    Case(
        "history: a write that RWKV-7 has not",
        lambda x: x.vector.history("write", "effective"),
        ValueError,
        "no rank-1 write 'effective': choose added",
    ),
    Case(
        "history: whole numbers",
        lambda x: History(torch.ones(1, 2, 5).long(), torch.ones(1, 2, 7).long()),
        ValueError,
        r"one floating-point type; got key in torch\.int64",
    ),
    Case(
        "history: two dtypes",
        lambda x: History(torch.ones(1, 2, 5), torch.ones(1, 2, 7).double()),
        ValueError,
        r"got key in torch\.float32, value in torch\.float64",
    ),
    Case(
        "history: NaN",
        lambda x: History(torch.full((1, 2, 5), torch.nan), torch.ones(1, 2, 7)),
        ValueError,
        "10 values that are not finite, the first at window 0, position 0: in key",
    ),
    Case(
        "windows: no text", lambda x: cut_windows(Words(), [], 5), ValueError, "0 passages give 0 windows of 5 tokens"
    ),
    Case("windows: empty text", lambda x: cut_windows(Words(), [""], 5), ValueError, "1 passages give 0 windows"),
    Case(
        "windows: too long",
        lambda x: cut_windows(Words(), ["1 2"], 5),
        ValueError,
        "1 passages are shorter than a window",
    ),
    Case(
        "windows: too many",
        lambda x: cut_windows(Words(), ["1 2"], 3, 2),
        ValueError,
        "give 1 windows .* where 2 are asked",
    ),
    Case("windows: of no token", lambda x: cut_windows(Words(), ["1 2"], 0), ValueError, "at least one token, not 0"),
    Case(
        "windows: none asked for", lambda x: cut_windows(Words(), ["1 2"], 2, 0), ValueError, "must be asked for, not 0"
    ),
    Case(
        "windows: one text",
        lambda x: cut_windows(Words(), "1 2", 1),
        ValueError,
        "this is one text: put it into a list",
    ),
    Case("windows: no end", lambda x: cut_windows(words_without_end(), ["1"], 1), ValueError, "no end-of-text token"),
    Case(
        "windows: a split",
        lambda x: split_windows(x.host, "test", 9, 1),
        ValueError,
        "no split 'test': choose one of host",
    ),
    Case(
        "prompts longer than the windows",
        lambda x: Windows(x.tokens, torch.arange(3)).beginnings(91),
        ValueError,
        "Prompts of 91 tokens are asked for, and windows have 90",
    ),
    # Edits, logit shifts
    Case(
        "edit: scope",
        lambda x: edit.make_edit(ROW, PLACE, *2 * [torch.ones(1, 1, 5)], "x"),
        ValueError,
        "no read scope 'x'",
    ),
    Case(
        "edit: d_k",
        lambda x: edited(x, left=(1, 1, 20)),
        ValueError,
        "are 12 x 20 .key x value., and the edit is 20 x 20",
    ),
    Case("edit: d_v of 1", lambda x: edited(x, right=(1, 1, 1)), ValueError, "are 12 x 20 .*, and the edit is 12 x 1"),
    Case("edit: no terms' axis", lambda x: edited(x, left=(1, 12)), ValueError, r"left \[R, r, d_k\].*got .*\[1, 12\]"),
    Case(
        "edit: sides of one term each", lambda x: edited(x, right=(1, 2, 20)), ValueError, r"\[1, 1, 12\], \[1, 2, 20\]"
    ),
    Case(
        "edit: two rows, one place", lambda x: edited(x, rows=torch.tensor([0, 1])), ValueError, r"got \[2\], \[1, 1\]"
    ),
    Case("edit: NaN", lambda x: edited(x, fill=torch.nan), ValueError, "not finite, first in its row 0"),
    Case("edit: fp32", lambda x: edited(x, dtype=torch.float32), ValueError, r"must be in torch\.float64, as the run"),
    Case("edit: no such window", lambda x: edited(x, rows=torch.tensor([3])), ValueError, "no window 3: it has 0 to 2"),
    Case("edit: negative window", lambda x: edited(x, rows=torch.tensor([-1])), ValueError, "no window -1"),
    Case("edit: negative position", lambda x: edited(x, position=torch.tensor([-4])), ValueError, "no position -4"),
    Case(
        "edit: position too late",
        lambda x: edited(x, position=torch.tensor([90])),
        ValueError,
        "no position 90: .* 0 to 89",
    ),
    Case("edit: tokens too many", lambda x: edited(x, steps=51), ValueError, "no position 90"),
    Case("edit: no tokens", lambda x: edited(x, steps=0), ValueError, "at least one token, not 0"),
    Case("edit: a position in a float", lambda x: edited(x, position=PLACE / 1.0), ValueError, "take int.. of it"),
    Case("edits: no cell", lambda x: under(x, {}), ValueError, "no edit: give .* with at least one cell"),
    Case(
        "edits: other rows",
        lambda x: under(x, {(1, 2): 0, (0, 3): 1}),
        ValueError,
        r"have the same rows: those of \(1, 2\) and \(0, 3\) differ",
    ),
    Case("edits: no such head", lambda x: under(x, {(1, 2): 0, (0, 4): 0}), ValueError, "small has no head 4"),
    Case("edits: of an attention layer", lambda x: under(x, {(2, 1): 0}), ValueError, "Layer 2 .* is not recurrent"),
    Case("edits: and a layer", lambda x: under(x, {(1, 2): 0}, layer=1), ValueError, "edits of several, .*, neither"),
    Case(
        "edit: without its head",
        lambda x: edit.run_edited(x.host, x.tokens, edit.Edit.at(0, 4, [1.0] * 12, [1.0] * 20), layer=1, steps=2),
        ValueError,
        "An edit of one cell takes layer and head",
    ),
    Case("generate: no tokens", lambda x: generated(x, 0), ValueError, "nothing to generate: 0 tokens for 1 rows"),
    Case("logit: no such token", lambda x: gradient(x, [300]), ValueError, "small has no token 300"),
    Case(
        "logit: fewer tokens than rows",
        lambda x: gradient(x, [3], torch.tensor([0, 1]), torch.tensor([4, 5])),
        ValueError,
        "Each row takes the logit of one token: 2 rows",
    ),
    Case("logit: negative start", lambda x: gradient(x, [3], starts=torch.tensor([-2])), ValueError, "no position -2"),
    Case("logit: too far", lambda x: gradient(x, [3], steps=60), ValueError, "leaves its window of 90 tokens"),
    Case(
        "read: too far",
        lambda x: shift.reads(x.cell, ROW, PLACE, 50, torch.ones(1, 12).double()),
        ValueError,
        "no position 90",
    ),
    Case(
        "direct path: negative token",
        lambda x: shift.direct_path(x.host, *CELL, torch.ones(1, 20), torch.tensor([-1])),
        ValueError,
        "small has no token -1",
    ),
    Case(
        "write that a host has not",
        lambda x: x.vector.write("effective"),
        ValueError,
        "no rank-1 write 'effective': choose added",
    ),
    # What is not what a function takes
    Case("run: texts", lambda x: x.host.run(["a text"]), ValueError, "takes Windows or their tokens, not a list"),
    Case("harvest: layer, head", lambda x: harvest(x.host, x.tokens, 1, 2), ValueError, "one cell .layer= and head=."),
    Case("shards: no cells", lambda x: harvest_shards(x.host, x.tokens, [], x.path, ""), ValueError, "at least one"),
    Case("train: factors", lambda x: train(x.factors, settings()), ValueError, r'cell\.history\("write"\)'),
    Case("firings: tokens", lambda x: find_firings(x.sae, x.factors, x.tokens), ValueError, "one cell .* and Windows"),
    Case("predict: several", lambda x: predicted(x, {CELL: 1}), ValueError, r"takes one Edit, and .* has a dict"),
    Case("replace: no atom", lambda x: replaced_without(x, "atom"), ValueError, "lack atom: pass rows of find_firings"),
    Case("replace: tokens", lambda x: replaced_tokens(x), ValueError, "takes windows of cut_windows, not their tokens"),
    Case("states: of a harvest", lambda x: list(x.factors.walk()), ValueError, "A harvest has no queries"),
    Case("Gamma: of a harvest", lambda x: attribution.weights(x.factors), ValueError, "A harvest has no queries"),
    Case("readers: of a harvest", lambda x: attribution.overwriters(x.factors), ValueError, "A harvest has no queries"),
    Case("recall: more keys than there are", lambda x: recall.Task(4, 9, shown=5), ValueError, "shows no more than"),
    # Measured shifts
    Case("shifts: past the end", lambda x: shifts(x, (4, 5, 88)), ValueError, "no position 90: it has 0 to 89"),
    Case("shifts: one place", lambda x: shifts(x, (4,)), ValueError, r"3 windows takes one t0; got \[1\]"),
    Case("shifts: no horizon", lambda x: shifts(x, horizon=0), ValueError, "is at least 1 and ranks 1 to 300, not 0"),
    Case(
        "shifts: rank 0",
        lambda x: shifts(x, ranks=(0, 1)),
        ValueError,
        r"is at least 1 and ranks 1 to 300, not 2, \[0, 1\]",
    ),
    # Install
    Case("goal: past the end", lambda x: goal(x, 89), ValueError, "no position 90: it has 0 to 89"),
    Case("goal: a negative start", lambda x: goal(x, -3), ValueError, "no position -3"),
    Case("goal: tokens", lambda x: goal(x, tokens=(5,)), ValueError, "a token per row; got 1 for 2 rows"),
    Case("install: no writes", lambda x: installed(x, [[5]] * 3, writes=0), ValueError, "at least one write, not 0"),
    Case(
        "install: labels",
        lambda x: installed(x, [[5]] * 3, labels=("top", "near")),
        ValueError,
        r"here \[3, 2\] with their labels; got \[3, 1\]",
    ),
    Case(
        "install: nothing to generate",
        lambda x: install.native_continuations(x.host, x.run, 0),
        ValueError,
        "nothing to generate: 0 tokens",
    ),
    Case("pairs: no cell", lambda x: steering.gamma_pairs(x.host, goal(x), []), ValueError, "need at least one cell"),
    Case("ceilings: of attention", lambda x: steering.ceilings(x.host, goal(x), [(2, 1)]), ValueError, "not recurrent"),
    Case(
        "install: a target of two tokens",
        lambda x: installed(x, [[[5, 6]]] * 3),
        ValueError,
        r"single tokens, \[prompts, targets\], here \[3, 1\] with their labels; got \[3, 1, 2\]",
    ),
    Case(
        "install: targets of one prompt",
        lambda x: installed(x, [[5]]),
        ValueError,
        r"here \[3, 1\] with their labels; got \[1, 1\]",
    ),
    Case("install: no such token", lambda x: installed(x, [[5], [6], [300]]), ValueError, "small has no token 300"),
    Case(
        "install: before the prompt",
        lambda x: installed(x, [[5]] * 3, 91),
        ValueError,
        "90 tokens has no place 91 tokens",
    ),
    Case(
        "install: writes", lambda x: installed(x, [[5]] * 3, 2), ValueError, "3 writes do not fit in the last 2 tokens"
    ),
    Case(
        "steering: no such direction", lambda x: steered(x, "up"), ValueError, "no direction 'up': choose one of paper"
    ),
    Case("steering: no cell", lambda x: steered(x, cells=[]), ValueError, "need at least one cell"),
    Case("steering: no such cell", lambda x: steered(x, cells=[(1, 4)]), ValueError, "small has no head 4"),
    Case("steering: no steps", lambda x: steered(x, steps=0), ValueError, "takes at least one step, not 0"),
    Case(
        "install: a class beyond the vocabulary",
        lambda x: install.draw_targets(torch.randn(3, 300), dict(far=(301, 999)), 2, 0),
        ValueError,
        "2 targets are asked for, and the class far has 0 of the 300 tokens",
    ),
    Case(
        "install: prompts", lambda x: install_stage(x, prompts=4), ValueError, "4 prompts .* windows are of 2 passages"
    ),
    Case(
        "install: prompt length",
        lambda x: install_stage(x, prompts=2, prompt_tokens=91),
        ValueError,
        "Prompts of 91 tokens",
    ),
    Case(
        "cell of no such place",
        lambda x: suite_with(x, MIDDLE).cell("gated_deltanet", "late"),
        ValueError,
        "has no late cell of gated_deltanet",
    ),
    Case(
        "host of no such name",
        lambda x: suite_with(x, MIDDLE).host_path("gpt"),
        ValueError,
        "no host 'gpt': choose one of",
    ),
    # Training
    Case(
        "train: too few windows",
        lambda x: train(random_history(1), settings(), progress=False),
        ValueError,
        "takes 2 windows",
    ),
    Case("train: validation of other sides", lambda x: trained(d_v=8), ValueError, "takes 5 x 7 matrices, not 5 x 8"),
    Case(
        "train: validation in fp64", lambda x: trained(dtype=torch.float64), ValueError, "and the data in torch.float64"
    ),
    Case(
        "train: validation on writes",
        lambda x: trained(target="write"),
        ValueError,
        "training data are states, the validation data writes",
    ),
    Case(
        "train: a checkpoint of text",
        lambda x: trained(a_file(x)),
        ValueError,
        "file cannot be read .*remove it to start again",
    ),
    Case("train: a folder as checkpoint", lambda x: trained(x.path), ValueError, "is a folder"),
    # Statistics
    Case("wilson: more than all", lambda x: statistics.wilson(3, 2), ValueError, "0 <= successes <= n .*not 3 of 2"),
    Case(
        "bootstrap: no values",
        lambda x: statistics.cluster_bootstrap([], []),
        ValueError,
        "needs data: the values are empty",
    ),
    Case(
        "bootstrap: NaN",
        lambda x: statistics.cluster_bootstrap([1, np.nan], [0, 1]),
        ValueError,
        "1 of 2 values are not fin",
    ),
    Case("r2: one pair", lambda x: statistics.r2([1], [2]), ValueError, "at least two pairs"),
    # Scorecard, notebooks
    Case("scorecard: no results", score_without_results, ArtifactError, "hosts.csv is missing: run the stage"),
    Case("scorecard: a host", lambda x: scored(x, ["tiny", "gpt"]), ValueError, "no host 'gpt': choose one of tiny"),
    Case(
        "notebook",
        lambda x: run_notebook.run("99_x", "mini"),
        run_notebook.CommandError,
        "no notebook 99_x: choose one of 00_",
    ),
    Case(
        "notebook: profile",
        lambda x: run_notebook.run("00_hosts", "huge"),
        run_notebook.CommandError,
        "no profile huge: .*mini",
    ),
]


@pytest.fixture(scope="module")
def things(gated_deltanet):
    """Shared objects that the cases do not change."""
    host, tokens = gated_deltanet, torch.randint(0, 300, (3, 90), generator=torch.Generator().manual_seed(1))
    run = host.run(tokens)
    cell = host.factors(run, *CELL)
    factors = harvest(host, tokens, [CELL], 3, progress=False)[CELL]
    torch.manual_seed(0)
    return dict(host=host, tokens=tokens, run=run, factors=factors, cell=cell, sae=new_sae()) | dict(
        vector=Factors(cell.query, cell.key, cell.added, cell.log_decay.expand_as(cell.key))
    )


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_bad_input_is_one_sentence(case, things, tmp_path, monkeypatch):
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))
    with pytest.raises(case.error, match=case.says) as caught:
        case.call(SimpleNamespace(**things, path=tmp_path))
    said = str(caught.value)
    assert type(caught.value) is case.error
    assert len(said) < 600 and ("\n" not in said or case.error is ValidationError), "one sentence"
    assert not list(tmp_path.rglob(".partial-*")), "nothing half written"


def test_cases_are_many_and_have_names_of_their_own():
    assert len({case.name for case in CASES}) == len(CASES) >= 40
