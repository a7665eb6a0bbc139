"""Models, tokenizers and files as others make them: what load_host reads, and what it says about the rest."""

import ast
import json
import shutil

import httpx
import pytest
import torch
from conftest import SMALL
from helpers import FakeHub
from mamba2_releases import words
from safetensors import SafetensorError

from replication.study.paths import ROOT
from writesae import files
from writesae.hosts.hub import fetch, model_files
from writesae.hosts.load import adapter, load_host, read_shape
from writesae.sae.config import Architecture
from writesae.sae.model import SAE

TOKENS = torch.arange(40)[None]


def save(family: str, folder, **options):
    torch.manual_seed(0)
    model = adapter(family).build(SMALL[family])
    model.save_pretrained(folder, **options)
    words().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a small model per family."""
    folder = tmp_path_factory.mktemp("models")
    for family in SMALL:
        save(family, folder / family)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return lambda family: shutil.copytree(saved / family, tmp_path / family)


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# The boundary around libraries


@pytest.mark.parametrize("error", [Exception, SafetensorError, ImportError, KeyError, RuntimeError, TimeoutError])
def test_whatever_a_library_raises_is_one_sentence_with_its_cause(error):
    raised = error("its own\n words.")
    with pytest.raises(ValueError, match="The thing") as caught, files.reading("The thing", "give another"):
        raise raised
    assert type(caught.value) is ValueError and caught.value.__cause__ is raised
    assert str(caught.value).startswith(f"The thing cannot be read ({error.__name__}: ")
    assert str(caught.value).endswith("): give another.") and "\n" not in str(caught.value)


def test_the_boundary_keeps_the_kind_of_an_error_that_callers_ask_for():
    for kind, error in {
        FileNotFoundError: FileNotFoundError(2, "gone"),
        PermissionError: PermissionError(13, "not yours"),
        ConnectionError: ConnectionRefusedError("nobody there"),
    }.items():
        with (
            pytest.raises(kind, match=r"^The thing cannot be used \(.*\)\.$"),
            files.reading("The thing", "x", done="used"),
        ):
            raise error
    with pytest.raises(KeyboardInterrupt), files.reading("The thing"):
        raise KeyboardInterrupt


FOREIGN = {"from_pretrained", "load_file", "safe_open", "load_dataset", "snapshot_download", "try_to_load_from_cache"}
FOREIGN |= {"from_file", "create_repo", "upload_folder"}
INSIDE = {"RWKV7ForCausalLM.from_pretrained", "ShardedHistory._files"}  # which are called within the boundary


def foreign_calls(tree):
    """Yield (line, name, whether it is inside `with reading(...)`) of the calls into libraries that read files."""

    def visit(node, within, place):
        place = [*place, node.name] if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else place
        if isinstance(node, ast.With):
            opened = [item.context_expr.func for item in node.items if isinstance(item.context_expr, ast.Call)]
            names = {getattr(function, "attr", getattr(function, "id", "")).strip("_") for function in opened}
            within = within or "reading" in names
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            torch_load = ast.unparse(node.func) == "torch.load"
            if (name in FOREIGN or torch_load) and ".".join(place) not in INSIDE:
                yield node.lineno, name, within
        for child in ast.iter_child_nodes(node):
            yield from visit(child, within, place)

    return visit(tree, False, [])


def test_every_call_that_reads_with_a_library_is_inside_the_boundary():
    calls = []
    for path in (path for package in ("writesae", "replication") for path in (ROOT / package).rglob("*.py")):
        calls += [(path.name, *call) for call in foreign_calls(ast.parse(path.read_text(encoding="utf-8")))]
    assert len(calls) >= 15
    assert [call for call in calls if not call[-1]] == []


# Tokenizers


@pytest.mark.parametrize("family", list(SMALL))
def test_a_tokenizer_of_a_newer_release_is_one_sentence(copy, family):
    folder = copy(family)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["type"] = "NewBPE"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"tokenizer of .* cannot be read \(Exception: .*\): pass another \(tokenizer=\)"
    ):
        load_host(folder)
    assert load_host(folder, "cpu", tokenizer=words()).layers  # its weights are fine


@pytest.mark.parametrize("content", ["", "{}", "[]", "\x00\x01", '{"version": "1.0", "model": {}}'])
def test_a_broken_tokenizer_is_one_sentence(copy, content):
    folder = copy("mamba2")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="The tokenizer of .* cannot be read"):
        load_host(folder)


def test_a_tokenizer_that_needs_another_package_says_so(copy, monkeypatch):
    from transformers import AutoTokenizer

    def missing(*_, **__):
        raise ImportError("this tokenizer needs the package protobuf")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", missing)
    with pytest.raises(ValueError, match=r"cannot be read \(ImportError: this tokenizer needs the package protobuf\)"):
        load_host(copy("gla"))


# Configs


@pytest.mark.parametrize(
    "fields",
    [
        dict(quantization_config=dict(quant_method="bitsandbytes", load_in_8bit=True)),
        dict(quantization_config=dict(quant_method="awq", bits=4)),
        dict(quantization_config=dict(quant_method="compressed-tensors", format="float-quantized")),
        dict(quantization_config=dict(quant_method="mxfp4")),
        dict(compression_config=dict(quant_method="compressed-tensors")),
        dict(quantization=dict(group_size=64, bits=4)),
        dict(text_config=dict(quantization_config=dict(quant_method="fp8"))),
    ],
)
@pytest.mark.parametrize("family", ["gated_deltanet", "rwkv7"])
def test_quantised_models_are_refused_before_anything_is_read(copy, family, fields):
    folder = copy(family)
    change(folder / "config.json", **fields)
    method = str(fields).partition("quant_method': '")[2].partition("'")[0] or "unknown method"
    for read in (load_host, read_shape):
        with pytest.raises(
            ValueError, match=rf"is quantised \({method}\), and hosts are read from plain weights: give"
        ):
            read(folder)


def test_no_quantisation_is_none(copy):
    folder = copy("mamba2")
    change(folder / "config.json", quantization_config=None, tie_word_embeddings=True)
    assert load_host(folder, "cpu").layers == 5


def test_another_activation_is_refused(copy):
    folder = copy("gated_deltanet")
    change(folder / "config.json", hidden_act="gelu")
    with pytest.raises(ValueError, match="A Gated DeltaNet host has the activation silu, and this one gelu"):
        load_host(folder)


def test_the_message_of_a_familys_own_check_is_not_changed(copy):
    folder = copy("rwkv7")
    change(folder / "config.json", hidden_act="relu")
    with pytest.raises(ValueError, match="^An RWKV-7 host has no attention layers, the activation sqrelu"):
        load_host(folder)


def test_a_config_that_the_library_refuses_is_not_said_to_be_unknown(copy):
    folder = copy("mamba2")
    change(folder / "config.json", num_heads=7)
    with pytest.raises(ValueError, match=r"The config.json of .* cannot be read \(.*num_heads") as caught:
        load_host(folder)
    assert "does not know" not in str(caught.value)


def test_a_folder_whose_name_names_a_model_is_not_taken_for_it(tmp_path):
    """Without model_type, transformers searches the folder's name for one."""
    (tmp_path / "my-mamba2").mkdir()
    (tmp_path / "my-mamba2" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a None, which transformers does not know"):
        load_host(tmp_path / "my-mamba2")


RANKS = [f"{name}_low_rank_dim" for name in ("decay", "a", "v", "gate")]


@pytest.mark.parametrize("options", [{}, dict(max_shard_size="60KB")], ids=["one file", "shards"])
def test_ranks_that_a_config_leaves_out_are_those_of_the_tensors(tmp_path, options):
    model = save("rwkv7", tmp_path, **options)
    expected = load_host(tmp_path, "cpu").model.state_dict()
    wanted = [getattr(model.config, name) for name in RANKS]
    for left_out in (RANKS, RANKS[1:2]):
        change(tmp_path / "config.json", **dict.fromkeys(RANKS) | dict(zip(RANKS, wanted)) | dict.fromkeys(left_out))
        host = load_host(tmp_path, "cpu")
        assert [getattr(host.model.config, name) for name in RANKS] == wanted
        assert all(torch.equal(x, expected[name]) for name, x in host.model.state_dict().items())


def test_other_fields_of_rwkv7_may_be_null(copy):
    folder = copy("rwkv7")
    expected = load_host(folder, "cpu").run(TOKENS).final
    change(folder / "config.json", num_heads=None, attn=None, hidden_ratio=None, tie_word_embeddings=None)
    change(folder / "config.json", tie_word_embeddings=True)
    assert torch.equal(load_host(folder, "cpu").run(TOKENS).final, expected)


def test_a_null_for_tied_embeddings_is_no(tmp_path):
    torch.manual_seed(0)
    adapter("gla").build(SMALL["gla"] | dict(tie_word_embeddings=False)).save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    change(tmp_path / "config.json", tie_word_embeddings=None)
    assert not load_host(tmp_path, "cpu").model.config.tie_word_embeddings


# The files of a model


@pytest.mark.parametrize("family", list(SMALL))
@pytest.mark.parametrize("form", ["shards", "pickle", "pickled shards"])
def test_weights_in_shards_and_pickles_are_those_of_one_file(saved, copy, family, form):
    expected, folder = load_host(saved / family, "cpu"), copy(family)
    (folder / "model.safetensors").unlink()
    if form == "shards":
        expected.model.save_pretrained(folder, max_shard_size="50KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    else:
        state = {name: x.clone() for name, x in expected.model.state_dict().items()}
        if expected.model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        names = sorted(state)
        parts = [names] if form == "pickle" else [names[::2], names[1::2]]
        where = {}
        for number, part in enumerate(parts, 1):
            file = "pytorch_model.bin" if form == "pickle" else f"pytorch_model-{number:05d}-of-00002.bin"
            torch.save({name: state[name] for name in part}, folder / file)
            where |= dict.fromkeys(part, file)
        if form != "pickle":
            index = dict(metadata=dict(total_size=1), weight_map=where)
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert torch.equal(load_host(folder, "cpu").run(TOKENS).final, expected.run(TOKENS).final)


def test_a_missing_shard_is_named(tmp_path):
    save("delta_net", tmp_path, max_shard_size="50KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=rf"The weights of .* cannot be read \(.*{lost.name}"):
        load_host(tmp_path)


def test_the_files_of_a_model_are_those_that_are_read(tmp_path):
    read = ["config.json", "tokenizer.json", "rwkv_vocab_v20230424.txt", "spiece.model", "chat_template.jinja"]
    read += ["model-00001-of-00002.safetensors", "pytorch_model.bin", "tokenizer.model.v3", "training.json"]
    for name in [*read, "training.csv", "optimizer.pt", "README.md", "flax_model.msgpack"]:
        (tmp_path / name).touch()
    assert [path.name for path in model_files(tmp_path)] == sorted(read)


# ~, the home folder


def test_a_tilde_is_the_home_folder_everywhere(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(saved / "mamba2", tmp_path / "models" / "m")
    assert load_host("~/models/m", "cpu", tokenizer="~/models/m").name == "m"
    assert fetch("~/models/m", ["*"]) == tmp_path / "models" / "m"
    sae = SAE(Architecture(n_atoms=4, k=1), 3, 2)
    sae.save("~/saes/one")
    assert (tmp_path / "saes" / "one" / "config.json").is_file()
    assert torch.equal(SAE.load("~/saes/one").decoder.key, sae.decoder.key)
    with pytest.raises(FileNotFoundError, match="There is no folder ~nobody-here/x"):
        load_host("~nobody-here/x")


# The Hub


@pytest.mark.parametrize(
    "error",
    [httpx.ReadError("cut off"), ValueError("not JSON"), OSError(28, "No space left on device"), KeyError("sha")],
)
def test_other_errors_of_a_download_say_what_the_library_said(monkeypatch, tmp_path, error):
    FakeHub(monkeypatch, tmp_path / "cache", {"someone/model": {"config.json": b"{}"}}, {"/resolve/": error})
    with pytest.raises((ValueError, OSError), match=f"someone/model .*{type(error).__name__}") as caught:
        load_host("someone/model")
    assert type(caught.value).__module__ == "builtins" and caught.value.__cause__ is not None


def test_an_upload_that_fails_is_one_sentence(monkeypatch, tmp_path):
    hub = FakeHub(monkeypatch, tmp_path / "cache", {}, {"/api/repos/create": dict(status_code=401)})
    with pytest.raises(ValueError, match=r"The SAE in someone/sae on the Hub cannot be written .*: log in"):
        SAE(Architecture(n_atoms=4, k=1), 3, 2).push_to_hub("someone/sae", token="hf_none")
    assert not hub.commits
