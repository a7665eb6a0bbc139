"""Load a host: `load_host` reads a model and its tokenizer, and returns the adapter for the model's class."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from writesae.hosts import mamba2_release, rwkv7_tokenizer
from writesae.hosts.base import Host, Shape
from writesae.hosts.hub import fetch
from writesae.recurrence import torch_defaults

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
MODEL_FILES = (*TOKENIZER_FILES, "model*.safetensors")
PICKLED_FILES = (*TOKENIZER_FILES, "pytorch_model*.bin")
KERNEL_PACKAGES = ("fla", "mamba_ssm", "causal_conv1d")
FAMILIES = {  # module and class of each family's adapter
    "gated_deltanet": "writesae.hosts.gated_deltanet:GatedDeltaNet",
    "mamba2": "writesae.hosts.mamba2:Mamba2",
    "rwkv7": "writesae.hosts.rwkv7:RWKV7",
    "delta_net": "writesae.hosts.fla:DeltaNet",
    "gla": "writesae.hosts.fla:GLA",
}


def adapter(family: str) -> type[Host]:
    """Return the adapter class of a family. Raises ValueError for an unknown family."""
    if family not in FAMILIES:
        raise ValueError(f"There is no host family {family!r}: choose one of {', '.join(FAMILIES)}.")
    module, name = FAMILIES[family].split(":")
    return getattr(importlib.import_module(module), name)


def without_triton() -> None:
    """Hide kernel packages from transformers where there is no GPU, since their kernels fail there."""
    if not torch.cuda.is_available():
        for name in KERNEL_PACKAGES:
            sys.modules.setdefault(name, None)


@torch_defaults()
def load_host(
    name_or_path: str | Path,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    revision: str | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
) -> Host:
    """Return the adapter of a model from a local folder, or from a Hub id (at a `revision`).

    A folder is one that save_pretrained wrote, or a Mamba-2 release of its authors. device: by default cuda
    where there is a GPU, else cpu. tokenizer: a tokenizer, or its folder or Hub id, for models without one.

    Raises FileNotFoundError if config.json, weights or tokenizer are missing; ValueError for a class that no
    family has, for tensors that are missing, unexpected, of another shape, damaged or not finite, for the
    tokenizer of another model, an unknown device and a .pth file; for Hub ids also what `fetch` raises.
    """
    without_triton()
    device = _checked_device(device)
    if Path(name_or_path).suffix == ".pth":
        raise ValueError(
            f"{name_or_path} is one file of weights: read it with writesae.hosts.rwkv7_model.from_pth, save "
            "the model to a folder with save_pretrained, and put its tokenizer into the same folder."
        )
    folder = fetch(name_or_path, MODEL_FILES, revision)
    if not any(folder.glob("*.safetensors")):  # older models have pickles only
        folder = fetch(name_or_path, PICKLED_FILES, revision)
    family, model = _model(folder, name_or_path, dtype)
    damaged = next((key for key, x in model.named_parameters() if not torch.isfinite(x).all()), None)
    if damaged is not None:
        raise ValueError(f"The weights of {name_or_path} are damaged: {damaged} is not finite.")
    tokenizer = _tokenizer(folder, name_or_path, tokenizer)
    _check_tokenizer(tokenizer, model.config.vocab_size, name_or_path)
    return adapter(family)(model.to(device), tokenizer, host_name(Path(name_or_path)))


def _checked_device(device: str | None) -> str:
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There is no device {device!r} here: choose cpu, or cuda with a GPU.") from error
    return chosen


def read_shape(folder: Path) -> Shape:
    """Return the Shape of the host in a folder, from its config.json. Raises as `load_host` does."""
    family, _, config = _family(folder, folder)
    return adapter(family).shape(config)


def family_of(folder: Path) -> str:
    """Return the family of the host in a folder, from its config.json. Raises as `load_host` does."""
    return _family(folder, folder)[0]


def _settings(folder: Path, name: str | Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        advice = "give a model folder (`make hosts` trains the embedded hosts)"
        raise FileNotFoundError(f"{name} holds no config.json: {advice}.")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: it is not a JSON object ({error}).") from error


def _family(folder: Path, name: str | Path) -> tuple[str, type[torch.nn.Module] | None, PreTrainedConfig]:
    """Return the family, the class (None for a Mamba-2 release) and the text model's config of a folder."""
    import transformers

    settings = _settings(folder, name)
    if mamba2_release.is_release(settings):
        return "mamba2", None, mamba2_release.library_config(settings)
    classes = {family: adapter(family).model_classes for family in FAMILIES}  # importing registers classes
    choices = "; ".join(f"{', '.join(names)} ({family})" for family, names in classes.items())
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError) as error:
        problem = f"{name} is not a model that transformers knows, and no host family has that class"
        raise ValueError(f"{problem}: {choices}.") from error
    text = config.get_text_config()
    auto = transformers.AutoModelForCausalLM._model_mapping
    model_class = auto.get(type(text), None) or auto.get(type(config), None)
    class_name = getattr(model_class, "__name__", type(config).__name__)
    family = next((family for family in FAMILIES if class_name in classes[family]), None)
    if family is None:
        raise ValueError(f"{name} is a {class_name}, and no host family has that class: {choices}.")
    text.tie_word_embeddings |= config.tie_word_embeddings  # multimodal configs may say it at the top only
    return family, model_class, text


def _model(folder: Path, name: str | Path, dtype: torch.dtype) -> tuple[str, torch.nn.Module]:
    family, model_class, text = _family(folder, name)
    if model_class is None:
        return family, mamba2_release.from_release(folder, dtype)
    options = dict(config=text, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    try:
        model, info = model_class.from_pretrained(folder, **options)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"The weights of {name} are damaged or a pickle with code in it: {error}") from error
    except OSError as error:
        raise FileNotFoundError(f"{name} holds no weights, or only a part of them: {error}") from error
    _check_weights(model, info, name)
    return family, model


def _check_weights(model: torch.nn.Module, info: dict, name: str | Path) -> None:
    """Raise ValueError unless the checkpoint had exactly the model's weights."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    misshapen = {f"{key}: {[*shape]}, not {[*wanted]}" for key, shape, wanted in info["mismatched_keys"]}
    problems = {
        "has {} weights of another size than its config says": misshapen,
        "lacks {} weights": set(info["missing_keys"]) - ({"lm_head.weight"} if tied else set()),
        "has {} weights that its class does not take": info["unexpected_keys"],
    }
    for problem, keys in problems.items():
        if keys:
            problem = f"{problem.format(len(keys))}, first {min(keys)}"
            raise ValueError(f"{name} {problem}: it is damaged or of another model.")


def _tokenizer(folder: Path, name: str | Path, given: str | Path | PreTrainedTokenizerBase | None):
    import transformers

    if given is not None and not isinstance(given, (str, Path)):
        return given
    place = folder if given is None else fetch(given, TOKENIZER_FILES)
    world = next(place.glob(rwkv7_tokenizer.VOCABULARY), None)
    if world is not None and not (place / "tokenizer.json").is_file():
        return rwkv7_tokenizer.WorldTokenizer(world)
    patterns = "tokenizer*", "vocab*", "*.model"
    if not any(path.match(pattern) for path in place.iterdir() for pattern in patterns):
        raise FileNotFoundError(
            f"{given or name} holds no tokenizer: put its files there, or pass tokenizer= (the Mamba-2 "
            f"releases of its authors take {mamba2_release.TOKENIZER!r})."
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(place)
    except (ValueError, OSError) as error:
        raise ValueError(f"The tokenizer of {given or name} is damaged (pass tokenizer=): {error}") from error


def _check_tokenizer(tokenizer, vocabulary: int, name: str | Path) -> None:
    """Raise ValueError unless the tokenizer has half to all of the model's ids (the others are padding)."""
    count = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if not vocabulary / 2 <= count <= vocabulary:
        problem = f"The tokenizer has {count} ids, and {name} a vocabulary of {vocabulary}"
        raise ValueError(f"{problem}: it is another model's.")


def host_name(folder: Path) -> str:
    """Return the name in the folder's training.json, or else the folder's name."""
    record = folder / "training.json"
    return json.loads(record.read_text(encoding="utf-8")).get("name", folder.name) if record.is_file() else folder.name
