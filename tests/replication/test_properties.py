"""Properties that hold for any input, on inputs that hypothesis makes up: recurrences, histories, edits, stored files.

The search follows from the code of each test alone (`derandomize`), so that a run is the same everywhere.
"""

import os
import string
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from replication.study import stages
from writesae import files
from writesae import history as history_module
from writesae.edit import Edit, edited_hidden, head_change, make_edit
from writesae.files import ArtifactError
from writesae.history import History
from writesae.recurrence import (
    Factors,
    diagonal_delta_chunks,
    gated_delta_chunks,
    states_before,
    step_states,
)

FIXTURES = [HealthCheck.function_scoped_fixture]  # each example has a folder of its own
settings.register_profile(
    "writesae", derandomize=True, database=None, deadline=None, max_examples=25, suppress_health_check=FIXTURES
)
settings.load_profile("writesae")

SIDES = st.tuples(st.integers(1, 7), st.integers(1, 7)).filter(lambda sides: sides[0] != sides[1])
LENGTHS = st.integers(1, 40)
SEEDS = st.integers(0, 2**31 - 1)
DECAYS = st.sampled_from(["none", "slow", "middle", "fast", "mixed"])


def log_decays(kind: str, shape: tuple, generator: torch.Generator) -> torch.Tensor:
    """Decays of 1, near 1, between, near 0, or some of each in one window."""
    reach = dict(none=0.0, slow=1e-6, middle=1.0, fast=300.0)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind != "mixed":
        return -reach[kind] * uniform
    which = torch.randint(4, shape, generator=generator)
    return -torch.tensor(list(reach.values()), dtype=torch.float64)[which] * uniform


@st.composite
def gated_delta(draw) -> Factors:
    """The factors of a gated delta rule with d_k != d_v; unit keys, gates between 0 and 1, fp64."""
    (d_k, d_v), length, windows = draw(SIDES), draw(LENGTHS), draw(st.integers(1, 3))
    kind, generator = draw(DECAYS), torch.Generator().manual_seed(draw(SEEDS))
    query, key = (torch.randn(windows, length, d_k, generator=generator, dtype=torch.float64) for _ in range(2))
    value = torch.randn(windows, length, d_v, generator=generator, dtype=torch.float64)
    key, gate = F.normalize(key, dim=-1), torch.rand(windows, length, 1, generator=generator, dtype=torch.float64)
    log_decay = log_decays(kind, (windows, length, 1), generator)
    factors = Factors(query, key, gate * value, log_decay, erase=log_decay.exp() * gate * key, probe=key)
    states = step_states(factors)
    before = F.pad(states, (0, 0, 0, 0, 1, 0))[:, :-1]
    factors.effective = factors.added - gate * log_decay.exp() * (before.mT @ key[..., None])[..., 0]
    return factors


@st.composite
def vector_decays(draw) -> Factors:
    """Decays of their own for every channel, and an erase with another key than the write's, fp64."""
    (d_k, d_v), length, windows = draw(SIDES), draw(LENGTHS), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    query, key, erase, probe = (torch.randn(windows, length, d_k, generator=generator).double() / 3 for _ in range(4))
    added = torch.randn(windows, length, d_v, generator=generator).double()
    log_decay = (
        -draw(st.sampled_from([0.0, 1e-6, 0.6])) * torch.rand(windows, length, d_k, generator=generator).double()
    )
    return Factors(
        query, key, added, log_decay, None, erase / (1 + erase.norm(dim=-1, keepdim=True)), F.normalize(probe, dim=-1)
    )


FACTORS = st.one_of(gated_delta(), vector_decays())


def in_chunks(factors: Factors, chunk: int, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and last state by the chunked recurrence of the factors' kind."""
    if factors.effective is None:
        parts = factors.query, factors.key, factors.added, factors.log_decay, factors.erase, factors.probe
        return diagonal_delta_chunks(*parts, state=state, chunk=chunk)[:2]
    gate = (factors.erase * factors.probe).sum(-1) / factors.log_decay.exp()[..., 0].clamp_min(1e-300)
    value = factors.added / gate[..., None]
    outputs, _, end = gated_delta_chunks(
        factors.query, factors.key, value, gate, factors.log_decay[..., 0], state=state, chunk=chunk
    )
    return outputs, end


def outputs_of(factors: Factors, states: torch.Tensor) -> torch.Tensor:
    return (states.mT @ factors.query[..., None])[..., 0]


# Recurrences


@given(FACTORS, st.integers(1, 20))
def test_the_chunked_recurrence_is_the_step_loop(factors, chunk):
    states = step_states(factors)
    outputs, end = in_chunks(factors, chunk)
    assert_close(outputs, outputs_of(factors, states), "outputs", 1e-9)
    assert_close(end, states[:, -1], "last state", 1e-9)


@given(FACTORS, st.integers(1, 20), st.data())
def test_a_prefix_and_a_suffix_are_the_whole(factors, chunk, data):
    length = factors.key.shape[1]
    cut = data.draw(st.integers(0, length))
    whole = step_states(factors)
    state, parts = None, []
    for piece in (slice(0, cut), slice(cut, length)):
        if piece.start < piece.stop:
            outputs, state = in_chunks(factors.at(slice(None), piece), chunk, state)
            parts.append(outputs)
    assert_close(torch.cat(parts, 1), outputs_of(factors, whole), "outputs", 1e-9)
    assert_close(state, whole[:, -1], "last state", 1e-9)


@given(FACTORS, st.floats(-3, 3), SEEDS)
def test_states_are_linear_in_the_writes(factors, size, seed):
    other = Factors(**vars(factors))
    other.added = torch.randn(factors.added.shape, generator=torch.Generator().manual_seed(seed)).double()
    both = Factors(**vars(factors))
    both.added = factors.added + size * other.added
    wanted = step_states(factors) + size * step_states(other)
    assert_close(step_states(both), wanted, "states of the sum", 1e-12)


@given(gated_delta(), st.data())
def test_states_are_rebuilt_before_any_position(factors, data):
    windows, length = factors.key.shape[:2]
    starts = torch.tensor(data.draw(st.lists(st.integers(0, length), min_size=windows, max_size=windows)))
    states = F.pad(step_states(factors), (0, 0, 0, 0, 1, 0))
    rebuilt = states_before(factors.key[:, :, None], factors.effective[:, :, None], factors.log_decay, starts)[:, 0]
    assert_close(rebuilt, states[torch.arange(windows), starts], "states", 1e-9)


# Histories


@st.composite
def histories(draw, kind: str) -> History:
    factors = draw(vector_decays() if kind == "vector" else gated_delta())
    if kind == "write":
        return History(factors.key, factors.added)
    if kind == "vector":
        return factors.history("state")
    return History(factors.key, factors.effective, factors.log_decay[..., 0])


@pytest.fixture
def short_chunks(monkeypatch):
    """So that windows of some tokens have several chunks, and few windows several groups."""
    for name, length in (("CHUNK", 8), ("STATE_CHUNK", 8), ("GROUP", 2), ("VECTOR_GROUP", 2)):
        monkeypatch.setattr(history_module, name, length)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("kind", ["state", "write", "vector"])
@given(data=st.data(), seed=SEEDS)
def test_what_a_history_answers_is_what_its_states_say(kind, data, seed):
    history = data.draw(histories(kind))
    generator = torch.Generator().manual_seed(seed)
    states, windows = torch.stack(list(history.walk()), 1), len(history)
    left, right = (torch.randn(4, d, generator=generator).double() for d in (history.d_k, history.d_v))
    matrix = torch.randn(history.d_k, history.d_v, generator=generator).double()
    assert_close(history.read(left, right), torch.einsum("nk,btkv,nv->btn", left, states, right), "read", 1e-9)
    assert_close(history.inner(matrix), (states * matrix).sum((-1, -2)), "inner products", 1e-9)
    assert_close(history.energy(matrix), (states - matrix).square().sum((-1, -2)), "energies", 1e-9)
    assert_close(history.mean(), states.mean((0, 1)), "mean", 1e-9)
    window = torch.randint(windows, (5,), generator=generator)
    position = torch.randint(history.shape[1], (5,), generator=generator)
    assert_close(history.matrices(window, position), states[window, position], "matrices", 1e-9)


# Edits


@st.composite
def edits(draw, factors: Factors, terms: int = 2) -> Edit:
    windows, length, d_k = factors.key.shape
    rows = torch.tensor(draw(st.lists(st.integers(0, windows - 1), min_size=1, max_size=3)))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    left = torch.randn(len(rows), terms, d_k, generator=generator).double()
    right = torch.randn(len(rows), terms, factors.added.shape[-1], generator=generator).double()
    positions = torch.randint(length, (len(rows), terms), generator=generator)
    reads_write = torch.randint(2, (len(rows),), generator=generator).bool()
    return Edit(rows, positions, left, right, reads_write)


def all_steps(factors: Factors, edit: Edit) -> int:
    """From the edit's latest start to the end of the window."""
    return factors.key.shape[1] - int(edit.starts.max())


@given(FACTORS, st.data())
def test_an_edit_is_a_step_loop_with_the_state_changed(factors, data):
    edit = data.draw(edits(factors))
    steps = all_steps(factors, edit)
    change, moved = head_change(factors, edit, steps)
    for row, window in enumerate(edit.rows.tolist()):
        one, start = factors.at(slice(window, window + 1)), int(edit.starts[row])
        native, state = step_states(one)[0], None
        for t in range(start, start + steps):
            before = native[t - 1] if state is None else state
            state = step_states(one.at(slice(None), slice(t, t + 1)), None if t == 0 else before[None])[0, 0]
            terms = [j for j in range(2) if edit.positions[row, j] == t]
            entering = sum((torch.outer(edit.left[row, j], edit.right[row, j]) for j in terms), torch.zeros_like(state))
            read = state + edit.reads_write[row] * entering
            state = state + entering
            wanted = (read - native[t]).T @ one.query[0, t]
            miss = (change[row, t - start] - wanted).norm()
            assert miss <= 1e-9 * (1 + wanted.norm()), f"change of the head at {t}, off by {miss:.1e}"
        assert (moved[row].T @ edit.right[row] - (state - native[start + steps - 1])).norm() < 1e-9 * (1 + state.norm())


@given(FACTORS, st.floats(-3, 3), st.data())
def test_edits_add_up(factors, size, data):
    one = data.draw(edits(factors))
    other = Edit(one.rows, one.positions, one.left, one.right.flip(0) - 1, one.reads_write)
    both = Edit(one.rows, one.positions, one.left, one.right + size * other.right, one.reads_write)
    steps = all_steps(factors, one)
    (a, _), (b, _), (sum_, _) = (head_change(factors, edit, steps) for edit in (one, other, both))
    assert (sum_ - a - size * b).norm() <= 1e-10 * (1 + a.norm() + b.norm())


@given(FACTORS, st.data())
def test_an_edit_and_its_inverse_are_the_native_run(factors, data):
    """Undone one token later: what is left of the edit by then, taken out."""
    assume(factors.key.shape[1] > 1)
    edit = data.draw(edits(factors, terms=1))
    position = edit.positions[:, 0].clamp(max=factors.key.shape[1] - 2)
    moved = factors.at(edit.rows, position + 1).transition(edit.left)
    undone = Edit(
        edit.rows,
        torch.stack([position, position + 1], 1),
        torch.cat([edit.left, -moved], 1),
        edit.right.expand(-1, 2, -1),
        torch.ones_like(edit.reads_write),
    )
    change, left_over = head_change(factors, undone, factors.key.shape[1] - int(position.max()))
    size = edit.left.norm() * edit.right.norm()
    assert change[:, 1:].norm() <= 1e-12 * size and (left_over.mT @ undone.right).norm() <= 1e-12 * size
    assert change[:, 0].norm() > 0


@settings(max_examples=4)
@given(data=st.data())
def test_an_edit_leaves_what_came_before_it(host, run, data):
    """On real layers: with a later term beside an earlier one, the run up to the later term is that of the earlier alone."""
    layer, head = data.draw(st.sampled_from(host.cells))
    first = data.draw(st.integers(0, run.tokens.shape[1] - 8))
    later = first + data.draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(data.draw(SEEDS))
    left = torch.randn(1, 2, host.d_k, generator=generator).double()
    right = torch.randn(1, 2, host.d_v, generator=generator).double()
    row = torch.tensor([data.draw(st.integers(0, len(run.tokens) - 1))])
    both = Edit(row, torch.tensor([[first, later]]), left, right, torch.tensor([True]))
    alone = make_edit(row, torch.tensor([first]), left[:, :1], right[:, :1])
    with_later = edited_hidden(host, run, layer, head, both, 8)
    without = edited_hidden(host, run, layer, head, alone, 8)
    assert_close(with_later[:, : later - first], without[:, : later - first], "before the later term", 1e-12)
    assert (with_later[:, later - first] - without[:, later - first]).norm() > 0
    native = run.final[row, first : first + 8]
    none = edited_hidden(host, run, layer, head, make_edit(row, torch.tensor([first]), left, 0 * right), 8)
    assert_close(none, native, "an edit of nothing", 1e-12)


# Stored files

NAMES = st.lists(st.text(string.ascii_letters, min_size=1, max_size=5), min_size=1, max_size=4, unique=True)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), min_size=1, max_size=6)
CELLS = [
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=True, allow_infinity=True, width=64),
    TEXT,
    st.one_of(st.none(), TEXT),
    st.booleans(),
]
PROVENANCE = dict(profile="mini", config="0f", host="toy", seed=1, seconds=0.5)


@st.composite
def tables(draw) -> pd.DataFrame:
    rows = draw(st.integers(1, 4))
    columns = {}
    for name in draw(NAMES):
        values = draw(st.lists(draw(st.sampled_from(CELLS)), min_size=rows, max_size=rows))
        columns[name] = pd.Series(
            values, dtype=object if any(isinstance(v, str) or v is None for v in values) else None
        )
    return pd.DataFrame(columns)


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))
    monkeypatch.setattr(stages, "git_commit", lambda: "0")  # two processes a table
    return tmp_path


def assert_same(back: pd.DataFrame, frame: pd.DataFrame, digits: int | None = None) -> None:
    assert list(back) == list(frame) and len(back) == len(frame)
    for name in frame:
        for got, wanted in zip(back[name], frame[name], strict=True):
            if pd.isna(wanted):
                assert pd.isna(got), name
            elif isinstance(wanted, float) and digits:
                assert float(got) == float(f"{wanted:.{digits}g}"), name
            else:
                assert got == wanted, name


@given(frame=tables())
def test_a_table_comes_back_as_it_was(output, frame):
    stages.write_table(frame, output / "t.csv", PROVENANCE)
    assert_same(stages.read_table(output / "t.csv"), frame, digits=6)


@given(frame=tables())
def test_the_groups_of_a_stage_come_back_to_the_last_bit(output, frame):
    name = f"s{len(list(output.iterdir()))}"
    assert_same(stages.resumable(name, "ab" * 32, [0], lambda _: frame, output), frame)


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 3), max_size=3),
    content=st.binary(min_size=216, max_size=216),
    metadata=st.dictionaries(TEXT, st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT)),
)
def test_tensors_and_their_metadata_come_back_bit_for_bit(output, dtype, shape, content, metadata):
    size = torch.empty(shape, dtype=dtype).nbytes
    raw = bytearray(content[:size]).translate(bytes(i & 1 for i in range(256)) if dtype is torch.bool else None)
    tensor = torch.frombuffer(raw, dtype=dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
    files.save_tensors(output / "x.safetensors", dict(x=tensor), metadata)
    back, said = files.load_tensors(output / "x.safetensors")
    assert back["x"].dtype == dtype and list(back["x"].shape) == shape and said == metadata
    assert torch.equal(back["x"].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("stored", ["t.csv", "t.csv.json", "x.safetensors", "x.safetensors.json"])
def test_any_changed_byte_is_found(output, stored):
    """Or changes nothing, where it is a blank or a name of the sidecar's."""
    frame = pd.DataFrame(dict(a=["007", "1"], c=["3", "4"], rate=[0.5, np.nan]))
    stages.write_table(frame, output / "t.csv", PROVENANCE)
    files.save_tensors(output / "x.safetensors", dict(x=torch.arange(3.0)), dict(cell=[1, 4]))
    whole = (output / stored).read_bytes()
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 2  # makes an a of a c, a 4 of a 6
        (output / stored).write_bytes(content)
        try:
            if stored.startswith("t"):
                assert_same(stages.read_table(output / "t.csv"), frame)
            else:
                back, said = files.load_tensors(output / "x.safetensors")
                assert torch.equal(back["x"], torch.arange(3.0)) and said == dict(cell=[1, 4])
        except ArtifactError:
            continue
        assert stored.endswith(".json"), "a changed byte of the data itself was not found"


class Killed(BaseException):
    """The process ends here."""


@given(first=tables(), second=tables(), step=st.integers(0, 3), after=st.booleans())
def test_an_interrupted_write_leaves_the_old_or_the_new(output, first, second, step, after):
    """Killed at the first or second file that a write moves into place, before or after: what can be read is whole."""
    path, moved, real = output / "t.csv", [], os.replace
    stages.write_table(first, path, PROVENANCE | dict(fingerprint="first"))

    def replace(source, target):
        if len(moved) == step and not after:
            raise Killed
        real(source, target)
        moved.append(Path(target).name)
        if len(moved) == step + 1 and after:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        try:
            stages.write_table(second, path, PROVENANCE | dict(fingerprint="second"))
        except Killed:
            assert step < 2
    if files.up_to_date(path, "second"):
        assert_same(stages.read_table(path), second, digits=6)
    elif files.up_to_date(path, "first"):
        assert_same(stages.read_table(path), first, digits=6)
    else:
        assert moved == ["t.csv.json"] and not first.equals(second), (
            "between the two files alone is there nothing to read"
        )
        with pytest.raises(ArtifactError):
            stages.read_table(path)
    assert not list(output.rglob(".partial-*"))
    stages.write_table(second, path, PROVENANCE | dict(fingerprint="second"))
    assert_same(stages.read_table(path), second, digits=6)
