"""SAEs as folders that can be passed on: config.json and model.safetensors, on disk or on the Hugging Face Hub.

    PretrainedSAE.of(sae, config).save_pretrained("folder")        # or .push_to_hub("owner/name")
    sae = PretrainedSAE.from_pretrained("folder or owner/name", expect=dict(layer=9, head=4))

The layout and the methods are those of huggingface_hub's PyTorchModelHubMixin; config.json holds the fields of SAEConfig.
Stages keep their SAEs by stem (`writesae.sae.save`), with a checksum.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from writesae.files import write_atomically
from writesae.hosts.hub import fetch
from writesae.sae.model import SAE, SAEConfig, arguments, check_config, read_config, refuse_not_finite, refuse_other

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CARD = """---
{{ card_data }}
---

# A sparse autoencoder of the {{ config.target }}s of {{ config.host }}, layer {{ config.layer }}, head {{ config.head }}

{{ config.n_atoms }} atoms of {{ config.d_k }} x {{ config.d_v }} (key x value), {{ config.k }} active a token, \
{{ config.encoder }} encoder, {{ config.decoder }} decoder; `config.json` has the rest. Load it with

```python
from writesae.pretrained import PretrainedSAE
sae = PretrainedSAE.from_pretrained("this repository's id")
indices, coefficients = sae.encode(matrices)  # [..., {{ config.d_k }}, {{ config.d_v }}] -> [..., {{ config.k }}]
```
"""


class PretrainedSAE(
    SAE,
    PyTorchModelHubMixin,
    library_name="writesae",
    paper_url="https://arxiv.org/abs/2605.12770",
    tags=["sparse-autoencoder"],
    model_card_template=CARD,
):
    """An SAE that knows what it is of: `config` is its SAEConfig, whose fields are the arguments."""

    def __init__(self, **fields: Any) -> None:
        config = SAEConfig(**fields)
        super().__init__(**arguments(config))
        self.config = config

    @classmethod
    def of(cls, sae: SAE, config: SAEConfig) -> PretrainedSAE:
        """A copy of `sae`, fp32, without gradients. Raises ValueError when config and SAE disagree."""
        check_config(config, sae)
        made = cls(**config.model_dump())
        made.load_state_dict(sae.state_dict())
        return made.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, expect: dict[str, Any] | None = None, revision: str | None = None, **options: Any
    ) -> PretrainedSAE:
        """The SAE of a folder or a hub id. `expect` names fields of SAEConfig and the values they must have.

        options: as huggingface_hub's snapshot_download takes them (token, cache_dir, force_download, local_files_only).

        Raises FileNotFoundError for a missing file, ValueError for a damaged one, for another format version and for
        an SAE of something else than `expect`, and what `writesae.hosts.hub.fetch` raises.
        """
        folder = fetch(name, [CONFIG, WEIGHTS], revision, **options)
        for path in (folder / CONFIG, folder / WEIGHTS):
            if not path.is_file():
                raise FileNotFoundError(f"{name} holds no {path.name}: an SAE is a {CONFIG} and a {WEIGHTS}.")
        try:
            content = dict(json.loads((folder / CONFIG).read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / CONFIG} is damaged: it is not a JSON object ({error}).") from error
        refuse_other(read_config(content, folder / CONFIG), expect or {}, folder / CONFIG)
        return super().from_pretrained(folder)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **fields: Any) -> PretrainedSAE:
        """The mixin's reading, but strict: it lets missing and extra tensors pass."""
        weights, made = (
            Path(model_id) / WEIGHTS,
            cls(**{k: v for k, v in fields.items() if k in SAEConfig.model_fields}),
        )
        try:
            made.load_state_dict(load_file(weights))
        except SafetensorError as error:
            raise ValueError(f"{weights} is damaged or was cut short: {error}") from error
        except RuntimeError as error:
            raise ValueError(f"{weights} does not hold the tensors that {CONFIG} describes: {error}") from error
        refuse_not_finite(made, weights)
        return made.requires_grad_(False).eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        description = json.dumps(self.config.model_dump(), indent=2) + "\n"
        write_atomically(save_directory / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        write_atomically(save_directory / CONFIG, lambda path: path.write_text(description))

    def generate_model_card(self, *args: Any, **fields: Any):
        """The README of a saved folder."""
        return super().generate_model_card(*args, config=self.config, **fields)
