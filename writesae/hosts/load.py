"""Hosts: the recurrent language models under study. `load_host` finds the adapter by the model's class."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase
import importlib
import sys

from writesae.hosts import mamba2_release, rwkv7_tokenizer
from writesae.hosts.base import Host, Shape
from writesae.hosts.hub import fetch

TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
MODEL_FILES = (*TOKENIZER_FILES, "model*.safetensors")
PICKLED_FILES = (*TOKENIZER_FILES, "pytorch_model*.bin")
KERNEL_PACKAGES = ("fla", "mamba_ssm", "causal_conv1d")
FAMILIES = {  # where the adapter of each family is
    "gated_deltanet": "writesae.hosts.gated_deltanet:GatedDeltaNet",
    "mamba2": "writesae.hosts.mamba2:Mamba2",
    "rwkv7": "writesae.hosts.rwkv7:RWKV7",
    "delta_net": "writesae.hosts.fla:DeltaNet",
    "gla": "writesae.hosts.fla:GLA",
}


def adapter(family: str) -> type[Host]:
    """The adapter class of a family. Raises ValueError for a name that is not one."""
    if family not in FAMILIES:
        raise ValueError(f"There is no host family {family!r}: choose one of {', '.join(FAMILIES)}.")
    module, name = FAMILIES[family].split(":")
    return getattr(importlib.import_module(module), name)


def without_triton() -> None:
    """Without CUDA, hide kernel packages from transformers.

    transformers binds the kernels of every such package that it can import, and they fail at the first run where there
    is no GPU. The adapters call none of them. A package that was imported before stays: the library's own forward then
    fails on a CPU, and everything here runs.
    """
    if not torch.cuda.is_available():
        for name in KERNEL_PACKAGES:
            sys.modules.setdefault(name, None)


def load_host(
    name_or_path: str | Path,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    revision: str | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
) -> Host:
    """The adapter around a model and its tokenizer, from a folder or a hub id (at a `revision`).

    A folder is one of save_pretrained, or a Mamba-2 in its authors' own format. `tokenizer`: a tokenizer or its folder or
    hub id, where the model's does not hold one.

    Raises FileNotFoundError for a folder without config.json, weights or tokenizer; ValueError for a bare .pth file, where
    no family has the model's class, where weights are missing (the tied-embedding trap of multimodal checkpoints
    included), unexpected, misshapen, damaged or not finite, where the tokenizer is another model's, and for a device that
    is not there; for hub ids also what `writesae.hosts.hub.fetch` raises.
    """
    without_triton()
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There is no device {device!r} here: choose cpu, or cuda where there is a GPU.") from error
    if Path(name_or_path).suffix == ".pth":
        raise ValueError(
            f"{name_or_path} is one file of weights: save writesae.hosts.rwkv7_model.from_pth of it to a folder with "
            "save_pretrained, and put its tokenizer into the same folder."
        )
    folder = fetch(name_or_path, MODEL_FILES, revision)
    if not any(folder.glob("*.safetensors")):  # older models have pickles alone
        folder = fetch(name_or_path, PICKLED_FILES, revision)
    settings = _settings(folder, name_or_path)
    if mamba2_release.is_release(settings):
        family, model = "mamba2", mamba2_release.from_release(folder, dtype)
    else:
        family, model = _model(folder, name_or_path, dtype)
    bad = next((key for key, x in model.named_parameters() if not torch.isfinite(x).all()), None)
    if bad is not None:
        raise ValueError(f"The weights of {name_or_path} are not all finite, first in {bad}: it is damaged.")
    tokenizer = _tokenizer(folder, name_or_path, tokenizer)
    _check_tokenizer(tokenizer, model.config.vocab_size, name_or_path)
    return adapter(family)(model.to(chosen), tokenizer, host_name(Path(name_or_path)))


def read_shape(folder: Path) -> Shape:
    """Return the Shape of the host in a folder, from its config.json alone. Raises FileNotFoundError and ValueError as
    `load_host` does."""
    settings = _settings(folder, folder)
    if mamba2_release.is_release(settings):
        return adapter("mamba2").shape(mamba2_release.library_config(settings))
    family, _, text = _family(folder, folder)
    return adapter(family).shape(text)


def _settings(folder: Path, name: str | Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{name} holds no config.json: give a model folder, or train the embedded hosts with `make hosts`."
        )
    try:
        return dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: it is not a JSON object ({error}).") from error


def _family(folder: Path, name: str | Path) -> tuple[str, type[torch.nn.Module], PreTrainedConfig]:
    """The family, the class and the text model's config of a folder in the library's format."""
    import transformers

    classes = {family: adapter(family).model_classes for family in FAMILIES}  # this also registers RWKV-7's class
    known = "; ".join(f"{', '.join(names)} ({family})" for family, names in classes.items())
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{name} is no model that transformers knows, and no host family has that class: {known}."
        ) from error
    text = config.get_text_config()
    auto = transformers.AutoModelForCausalLM._model_mapping
    model_class = auto.get(type(text), None) or auto.get(type(config), None)
    class_name = getattr(model_class, "__name__", type(config).__name__)
    family = next((family for family in FAMILIES if class_name in classes[family]), None)
    if family is None:
        raise ValueError(f"{name} is a {class_name}, and no host family has that class: {known} are there.")
    text.tie_word_embeddings |= config.tie_word_embeddings  # multimodal configs may say it at the top alone
    return family, model_class, text


def _model(folder: Path, name: str | Path, dtype: torch.dtype) -> tuple[str, torch.nn.Module]:
    """The family and the model of a folder in the library's format, every weight of it from the file."""
    family, model_class, text = _family(folder, name)
    try:
        model, info = model_class.from_pretrained(
            folder, config=text, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"The weights of {name} are damaged, or a pickle with code in it: {error}") from error
    except OSError as error:
        raise FileNotFoundError(f"{name} holds no weights, or not all of them: {error}") from error
    _check_weights(model, info, name)
    return family, model


def _check_weights(model: torch.nn.Module, info: dict, name: str | Path) -> None:
    """Raise ValueError unless the checkpoint has the model's weights, all of them and no others."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    missing = sorted(key for key in info["missing_keys"] if not (tied and key == "lm_head.weight"))
    sizes = sorted(info["mismatched_keys"])
    unexpected = sorted(info["unexpected_keys"])
    if sizes:
        key, has, wanted = sizes[0]
        says = f"has {len(sizes)} weights of another size than its config says, first {key}: {list(has)}, not {list(wanted)}"
    elif missing:
        says = f"lacks {len(missing)} weights, first {missing[0]}"
    elif unexpected:
        says = f"has {len(unexpected)} weights that its class does not take, first {unexpected[0]}"
    else:
        return
    raise ValueError(f"{name} {says}: it is damaged or of another model.")


def _tokenizer(folder: Path, name: str | Path, given: str | Path | PreTrainedTokenizerBase | None):
    import transformers

    if given is not None and not isinstance(given, (str, Path)):
        return given
    place = folder if given is None else fetch(given, TOKENIZER_FILES)
    world = next(place.glob(rwkv7_tokenizer.VOCABULARY), None)
    if world is not None and not (place / "tokenizer.json").is_file():
        return rwkv7_tokenizer.WorldTokenizer(world)
    if not any(path.match(p) for path in place.iterdir() for p in ("tokenizer*", "vocab*", "*.model")):
        raise FileNotFoundError(
            f"{given or name} holds no tokenizer: put its files there, or pass tokenizer= (the models that Mamba-2's authors "
            f"released take {mamba2_release.TOKENIZER!r})."
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(place)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"The tokenizer of {given or name} cannot be read; pass another, tokenizer=: {error}"
        ) from error


def _check_tokenizer(tokenizer, vocabulary: int, name: str | Path) -> None:
    """Raise ValueError for one that makes ids which the model does not have, or not half of those that it has: models
    pad their vocabulary, but not to the double."""
    count = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if not vocabulary / 2 <= count <= vocabulary:
        raise ValueError(
            f"The tokenizer has {count} ids, and {name} a vocabulary of {vocabulary}: it is another model's."
        )


def host_name(folder: Path) -> str:
    """The name that results carry: the one in the folder's training.json, or the folder's own."""
    record = folder / "training.json"
    return json.loads(record.read_text()).get("name", folder.name) if record.is_file() else folder.name
