"""Load a host: `load_host` reads a model and its tokenizer, and returns the adapter for the model's class."""

from __future__ import annotations

import difflib
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from writesae.files import holds_code, local_path, read_json, reading
from writesae.hosts import hub, mamba2_release, rwkv7_tokenizer
from writesae.hosts.base import Host, Shape
from writesae.recurrence import torch_defaults

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

KERNEL_PACKAGES = ("fla", "mamba_ssm", "causal_conv1d")
QUANTISED = ("quantization_config", "compression_config", "quantization")  # fields of config.json
FAMILIES = {  # module and class of each family's adapter
    "gated_deltanet": "writesae.hosts.gated_deltanet:GatedDeltaNet",
    "kda": "writesae.hosts.gated_deltanet:KimiDelta",
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
    device_map: str | dict | None = None,
) -> Host:
    """Return the adapter of a model from a local folder, or from a Hub id (at a `revision`).

    A folder is one that save_pretrained wrote, or a release of the authors of Mamba-2 or RWKV-7. device: by
    default cuda if there is a GPU. tokenizer: a tokenizer, or its folder or Hub id, for models without one.
    device_map: spreads a model over several GPUs, in place of a device: "auto", or as accelerate takes it.

    Raises FileNotFoundError if config.json, weights or tokenizer are missing; ValueError for a class that no
    family has, for tensors that are missing, unexpected, of another shape, damaged or not finite, for the
    tokenizer of another model, an unknown device, a device map that leaves weights on no device and a .pth
    file; ImportError for a device map without accelerate; for Hub ids also what `fetch` raises.
    """
    without_triton()
    placement = _placement(device, device_map)
    if Path(name_or_path).suffix == ".pth":
        raise ValueError(
            f"{name_or_path} is one file of weights: read it with writesae.hosts.rwkv7_model.from_pth, save "
            "the model to a folder with save_pretrained, and put its tokenizer into the same folder."
        )
    folder = hub.fetch(name_or_path, hub.MODEL_FILES, revision)
    if not any(folder.glob(hub.WEIGHT_FILES[0])):  # older models have pickles only
        folder = hub.fetch(name_or_path, hub.PICKLED_FILES, revision)
    family, model = _model(folder, name_or_path, dtype, device_map)
    damaged = next((key for key, x in model.named_parameters() if not torch.isfinite(x).all()), None)
    if damaged is not None:
        raise ValueError(f"The weights of {name_or_path} are damaged: {damaged} is not finite.")
    tokenizer = _tokenizer(folder, name_or_path, tokenizer)
    _check_tokenizer(tokenizer, model.config.vocab_size, name_or_path)
    return adapter(family)(model.to(**placement), tokenizer, host_name(local_path(name_or_path)))


def _placement(device: str | None, device_map: str | dict | None) -> dict[str, str]:
    """Return where `Module.to` moves the model: nowhere under a device map."""
    if device_map is None:
        return dict(device=_checked_device(device))
    if device is not None:
        raise ValueError(f"A model is on the device {device!r} or on those of a device map: give one of the two.")
    if not find_spec("accelerate"):
        raise ImportError("A device map needs accelerate: pip install 'writesae[devices]'.")
    return {}


def _checked_device(device: str | None) -> str:
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with reading(f"The device {chosen!r}", "choose cpu, or cuda where there is a GPU", done="used"):
        torch.empty(0, device=chosen)
    return chosen


def read_shape(folder: Path) -> Shape:
    """Return the Shape of the host in a folder, from its config.json. Raises as `load_host` does."""
    family, _, config = _family(folder, folder)
    return adapter(family).shape(config)


def family_of(folder: Path) -> str:
    """Return the family of the host in a folder, from its config.json. Raises as `load_host` does."""
    return _family(folder, folder)[0]


def _settings(folder: Path, name: str | Path) -> dict:
    """Return the content of config.json. Raises ValueError for a quantised model."""
    path = folder / "config.json"
    if not path.is_file():
        advice = "give a model folder (`make hosts` trains the embedded hosts)"
        raise FileNotFoundError(f"{name} holds no config.json: {advice}.")
    settings = read_json(path)
    for part in (settings, settings.get("text_config") or {}):
        for quantised in filter(None, map(part.get, QUANTISED)):
            raise ValueError(
                f"{name} is quantised ({quantised.get('quant_method', 'unknown method')}), and hosts are "
                "read from plain weights: give the model that it was made from."
            )
    return settings


def _family(folder: Path, name: str | Path) -> tuple[str, type[torch.nn.Module] | None, PreTrainedConfig]:
    """Return the family, the class (None for a Mamba-2 release) and the text model's config of a folder."""
    import transformers

    settings = _settings(folder, name)
    if mamba2_release.is_release(settings):
        return "mamba2", None, mamba2_release.library_config(settings)
    classes = {family: adapter(family).model_classes for family in FAMILIES}  # importing registers classes
    if (kind := settings.get("model_type")) not in transformers.CONFIG_MAPPING:
        raise ValueError(f"{name} is a {kind}, which transformers does not know, and {_no_family(kind, classes)}")
    with reading(f"The config.json of {name}"):
        config = transformers.AutoConfig.from_pretrained(folder)
        text = config.get_text_config()
    auto = transformers.AutoModelForCausalLM._model_mapping
    model_class = auto.get(type(text), None) or auto.get(type(config), None)
    class_name = getattr(model_class, "__name__", type(config).__name__)
    family = next((family for family in FAMILIES if class_name in classes[family]), None)
    if family is None:
        raise ValueError(f"{name} is a {class_name}, and {_no_family(class_name, classes)}")
    # multimodal configs may say it at the top only
    text.tie_word_embeddings = bool(text.tie_word_embeddings or config.tie_word_embeddings)
    adapter(family).shape(text)  # refuses what the family does not implement
    return family, model_class, text


def _no_family(class_name: str | None, classes: dict[str, tuple[str, ...]]) -> str:
    """Return the end of a message: which classes there are, and which have names like the refused one's."""
    choices = "; ".join(f"{', '.join(names)} ({family})" for family, names in classes.items())
    known = {_plain(name): name for names in classes.values() for name in names}
    near = difflib.get_close_matches(_plain(str(class_name)), known, cutoff=0.7)
    nearest = f" Its name is near {', '.join(map(known.get, near))}." if near else ""
    return f"no host family has that class: {choices}.{nearest}"


def _plain(name: str) -> str:
    """Return the name of a class, or a model_type, in small letters, without underscores and ForCausalLM."""
    return name.lower().replace("_", "").removesuffix("forcausallm")


def _model(
    folder: Path, name: str | Path, dtype: torch.dtype, device_map: str | dict | None = None
) -> tuple[str, torch.nn.Module]:
    family, model_class, text = _family(folder, name)
    hub.weight_files(folder)  # there are some
    if model_class is None:
        if device_map is not None:
            raise ValueError(f"{name} is a release of Mamba-2's authors, which is read onto one device: give that.")
        return family, mamba2_release.from_release(folder, dtype)
    options = dict(config=text, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    if device_map is not None:
        options["device_map"] = device_map
    with reading(f"The weights of {name}", "they may be damaged, cut short or incomplete", holds_code(name)):
        model, info = model_class.from_pretrained(folder, **options)
    _check_weights(model, info, name)
    if device_map is not None:
        _check_spread(model, name)
        _unhook_rotary(model)
    return family, model


def shares_weights(model: torch.nn.Module) -> bool:
    """Return whether layers of the model have weights in common."""
    weights = [id(x) for layer in model.base_model.layers for x in layer.parameters()]
    return len(set(weights)) < len(weights)


def _check_spread(model: torch.nn.Module, name: str | Path) -> None:
    """Raise ValueError unless all weights are on a device, and each layer has its own."""
    if any(x.is_meta for x in model.parameters()):
        raise ValueError(
            f"The device map leaves weights of {name} in memory or on a disk, and adapters read weights "
            "where they are: give more GPUs, or load in bfloat16."
        )
    if shares_weights(model):
        raise ValueError(f"Layers of {name} share weights, which are on one device: load it without a device map.")


def _unhook_rotary(model: torch.nn.Module) -> None:
    """Let modules without weights (rotary embeddings) answer on the device of their input.

    accelerate's hooks move the inputs of each module to one device.
    """
    from accelerate.hooks import remove_hook_from_module

    for module in model.modules():
        if not any(True for _ in module.parameters()):
            remove_hook_from_module(module)


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
    place = folder if given is None else hub.fetch(given, hub.TOKENIZER_FILES)
    world = next(place.glob(rwkv7_tokenizer.VOCABULARY), None)
    if world is not None and not (place / "tokenizer.json").is_file():
        return rwkv7_tokenizer.WorldTokenizer(world)
    if not any(
        path.name.startswith(("tokenizer", "vocab")) or path.suffix == ".model" for path in hub.model_files(place)
    ):
        raise FileNotFoundError(
            f"{given or name} holds no tokenizer: put its files there, or pass tokenizer= (the Mamba-2 "
            f"releases of its authors take {mamba2_release.TOKENIZER!r})."
        )
    advice = "pass another (tokenizer=); where it is of a newer release of tokenizers, install that"
    with reading(f"The tokenizer of {given or name}", advice):
        return transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)


def _check_tokenizer(tokenizer, vocabulary: int, name: str | Path) -> None:
    """Raise ValueError unless the tokenizer has half to all of the model's ids (the others are padding)."""
    count = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if not vocabulary / 2 <= count <= vocabulary:
        problem = f"The tokenizer has {count} ids, and {name} a vocabulary of {vocabulary}"
        raise ValueError(f"{problem}: it is another model's, so pass the right one with tokenizer=.")


def host_name(folder: Path) -> str:
    """Return the name in the folder's training.json, or else the folder's name."""
    record = folder / "training.json"
    return read_json(record).get("name", folder.name) if record.is_file() else folder.name
