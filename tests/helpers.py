"""Assertions shared by the tests."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from replication.study.fingerprint import fingerprint
from replication.study.profile import Data
from replication.study.study import Study
from replication.study.training import SaeSpec, train_one
from writesae.edit import make_edit
from writesae.history import Origin
from writesae.recurrence import Factors, step_states
from writesae.text import Windows


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str, tolerance: float) -> None:
    """Fail unless ||actual - expected|| <= tolerance * ||expected||. The message names the tensor."""
    actual, expected = torch.as_tensor(actual).detach().double(), torch.as_tensor(expected).detach().double()
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    size = expected.norm().item()
    miss = (actual - expected).norm().item() / (size if size > 0 else 1.0)
    assert miss <= tolerance, f"{name}: relative error {miss:.2e} exceeds {tolerance:.0e} (expected norm {size:.3g})"


def stepped(parts: dict, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs [B, H, T, d_v] and states [B, H, T, d_k, d_v], computed by the step loop.

    parts: factors [B, H, T, d]. state: the initial state [B, H, d_k, d_v]."""
    lead = parts["query"].shape[:2]
    factors = Factors(**{name: x.flatten(0, 1) for name, x in parts.items()})
    states = step_states(factors, None if state is None else state.flatten(0, 1))
    outputs = (states.mT @ factors.query[..., None])[..., 0]
    return outputs.unflatten(0, lead), states.unflatten(0, lead)


def assert_gradients_close(recur: Callable, parts: dict, tolerance: float) -> None:
    """Fail unless recur(parts, state) -> (outputs, last state) has the gradients of the step loop.

    The gradients are compared for every factor in `parts` and for the initial state."""
    shape = *parts["key"].shape[:2], parts["key"].shape[-1], parts["added"].shape[-1]
    state = torch.randn(shape, dtype=torch.float64).requires_grad_()
    leaves = [x.requires_grad_() for x in parts.values()] + [state]
    outputs, end = recur(parts, state)
    wanted, states = stepped(parts, state)
    direction, of_end = torch.randn_like(wanted), torch.randn_like(end)
    ours = torch.autograd.grad((outputs * direction).sum() + (end * of_end).sum(), leaves)
    theirs = torch.autograd.grad((wanted * direction).sum() + (states[:, :, -1] * of_end).sum(), leaves)
    for name, mine, other in zip([*parts, "state"], ours, theirs, strict=True):
        assert_close(mine, other, f"gradient of {name}", tolerance)


class Malicious:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class FakeHub:
    """A fake of the Hugging Face Hub: answers huggingface_hub's HTTP requests without a network.

    repositories: id -> file name -> bytes; the only revision is main. answers: responses that take precedence (part of
    a URL path -> keyword arguments of a response, or an exception). requests: (method, path) of each request so far.
    created, commits: the bodies of the requests that write.
    """

    SHA = "a" * 40

    def __init__(self, monkeypatch, cache, repositories, answers=None):
        from huggingface_hub import constants
        from huggingface_hub.utils import _http

        self.root, self.repositories, self.answers = Path(cache).parent, repositories, answers or {}
        self.requests, self.created, self.commits = [], [], []
        self.httpx = getattr(_http, "httpx2", None) or _http.httpx
        transport, hooks = self.httpx.MockTransport(self.answer), {"request": [_http.hf_request_event_hook]}
        client = self.httpx.Client(transport=transport, event_hooks=hooks, follow_redirects=True)
        monkeypatch.setattr(_http, "_GLOBAL_CLIENT", client)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def answer(self, request):
        path = request.url.path
        self.requests.append((request.method, path))
        for part, given in self.answers.items():
            if part in path:
                if isinstance(given, Exception):
                    raise given
                return self.httpx.Response(request=request, **given)
        return self.httpx.Response(request=request, **self.respond(request, path))

    def respond(self, request, path):
        if path == "/api/repos/create":
            self.created.append(json.loads(request.content))
            return dict(status_code=200, json=dict(url="https://huggingface.co/someone/sae", name="someone/sae"))
        if path == "/api/validate-yaml":
            return dict(status_code=200, json=dict(warnings=[], errors=[]))
        if "/preupload/" in path:
            asked = json.loads(request.content)["files"]
            files = [dict(path=x["path"], uploadMode="regular", shouldIgnore=False) for x in asked]
            return dict(status_code=200, json=dict(files=files))
        if "/commit/" in path:
            self.commits.append(request.content)
            return dict(
                status_code=200, json=dict(commitUrl="https://huggingface.co/someone/sae/commit/b", commitOid="b")
            )
        name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        if name not in self.repositories:
            return dict(status_code=404, headers={"X-Error-Code": "RepoNotFound"})
        rest, files = path.split(name, 1)[1].strip("/").split("/"), self.repositories[name]
        if len(rest) > 1 and rest[1] not in ("main", self.SHA):
            return dict(status_code=404, headers={"X-Error-Code": "RevisionNotFound"})
        if rest[0] == "tree":
            return dict(status_code=200, json=[dict(type="file", path=f, size=len(b), oid=f) for f, b in files.items()])
        if rest[0] == "resolve":
            content = files[rest[2]]
            headers = {"ETag": f'"{rest[2]}"', "X-Repo-Commit": self.SHA, "Content-Length": str(len(content))}
            return dict(status_code=200, headers=headers, content=b"" if request.method == "HEAD" else content)
        siblings = [dict(rfilename=f) for f in files]
        return dict(status_code=200, json=dict(id=name, sha=self.SHA, siblings=siblings, tags=[], private=False))


@dataclass
class SmallProfile:
    """The part of a profile that stages read. `sections` has the settings by experiment, for every host."""

    name: str
    seed: int
    hosts: dict
    data: Data
    saes: object
    sections: dict
    device: str = "cpu"
    workers: int = 1

    def section(self, name, host):
        return self.sections[name]


class SmallStudy(Study):
    """A study with one small host and windows of the given tokens, two windows per passage."""

    def __init__(self, profile, host, tokens: torch.Tensor):
        super().__init__(profile)
        self.small, self.split = host, Windows(tokens, torch.arange(len(tokens)) // 2)

    def host(self, name):
        return self.small

    def host_fingerprint(self, name):
        return {"name": name}

    def windows(self, host, split):
        return self.split

    def windows_hash(self, host, split):
        return fingerprint(tokens=self.split.tokens)


def train_sae(study: Study, role: str, cell: tuple[int, int], target: str, settings, factors: Factors) -> None:
    """Train an SAE of the small host on the factors of a cell, and validate it on the same factors."""
    spec = SaeSpec("small", *cell, target, role, study.profile.saes.write, settings, len(factors.key))
    data = factors.history(target, spec.write, Origin("small", *cell, spec.write))
    train_one(study, spec, data, data, role.ljust(8, "0"))


EDITED_CELLS = [(3, 1), (1, 2), (3, 3), (1, 0)]  # in the hybrids, layer 2 is an attention layer
EDIT_PLACES = [  # [R, 2] of each cell
    [[40, 43], [20, 21], [70, 70]],
    [[41, 41], [20, 22], [71, 69]],
    [[45, 40], [23, 24], [75, 72]],
    [[42, 80], [25, 20], [70, 89]],  # terms after the last of 8 tokens do not count yet
]


def several_edits(host, positions, scope="write", size=3.0):
    """Two terms in each of four cells; positions[i] [R, 2] are those of the i-th cell, rows 0 to R - 1."""
    generator, edits = torch.Generator().manual_seed(4), {}
    for cell, places in zip(EDITED_CELLS, positions, strict=True):
        left, right = (torch.randn(len(places), 2, d, generator=generator).double() for d in (host.d_k, host.d_v))
        edits[cell] = make_edit(torch.arange(len(places)), torch.tensor(places), left, size * right, scope)
    return edits


def stepped_logits(host, tokens, edits, row, start, steps):
    """Logits [steps, V] of one edited window from `start` on; the states of edited cells are looped from there."""
    window = tokens[row : row + 1, : start + steps]
    hidden, positions = host.embed(window), torch.arange(window.shape[1])[None]
    for layer in range(host.layers):
        record = host.mix(layer, hidden, None, positions)
        for head in [head for edited, head in edits if edited == layer]:
            factors, edit = host.cell_factors(record, head), edits[layer, head]
            native = step_states(factors)
            state = native[:, start - 1]
            for t in range(start, start + steps):
                state = before = step_states(factors.at(slice(None), slice(t, t + 1)), state)[:, 0]
                for term in torch.nonzero(edit.positions[row] == t):
                    state = state + edit.left[row, term].T @ edit.right[row, term]
                read = state if edit.reads_write[row] else before
                record.outputs[:, t, head] += (read - native[:, t])[0].T @ factors.query[0, t]
        hidden = host.finish(layer, record, None)
    return host.unembed(hidden)[0, start:]


def code_of(notebook: Path) -> str:
    """The code cells of a notebook as one program, without IPython's own lines."""
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    lines = "\n".join("".join(cell["source"]) for cell in cells).splitlines()
    return "\n".join(re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in lines)


def imported_names(tree: ast.AST) -> dict[str, str]:
    """{local name: full name} of all imports."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names
