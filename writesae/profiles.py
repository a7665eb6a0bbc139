"""Profiles: every number that an experiment uses, validated, in profiles/NAME.yaml; the YAML says what each is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from writesae.artifacts import ROOT
from writesae.documents import Corpus
from writesae.sae import check_parts
from writesae.train import TrainingSettings

Target = Literal["state", "write"]
Definition = Literal["added", "effective"]
Place = Literal["early", "middle", "late"]
Scope = Literal["write", "cache"]
Overridable = Literal[
    "saes", "replacement", "logit_shift", "population", "atoms", "install", "cache_edits", "multiverse", "ablations"
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CellRule(Section):
    layer: int
    sigma_ratio: float = Field(gt=0)


class HostSection(Section):
    path: str
    revision: str | None = None
    tokenizer: str | None = None  # a folder or hub id, where the model's own holds none
    cells: dict[Place, CellRule]
    overrides: dict[Overridable, dict] = {}


class Data(Section):
    window: int = Field(ge=8)
    sae_windows: PositiveInt
    heldout_windows: PositiveInt
    firing_windows: PositiveInt
    survey_windows: PositiveInt
    first_position: int = Field(ge=1)
    batch_windows: PositiveInt


class Saes(Section):
    write: Definition
    targets: list[Target]
    main: TrainingSettings
    survey: TrainingSettings
    flat: TrainingSettings


class LogitShift(Section):
    place: Place
    target: Target
    atoms: PositiveInt
    eps: list[float]
    prompts: PositiveInt
    prompt_tokens: PositiveInt
    horizon: PositiveInt
    ranks: list[PositiveInt]  # of the tokens whose logits are read, 1 the native top one


class Replacement(Section):
    firings: dict[Place, PositiveInt]
    scopes: list[Scope]
    atoms: PositiveInt | None = None
    survey_firings: int = Field(ge=0)
    survey_windows: PositiveInt
    batch_rows: PositiveInt
    bootstrap: PositiveInt


class Population(Section):
    place: Place
    atoms: PositiveInt
    fewest_firings: PositiveInt
    most_firings: PositiveInt


class Atoms(Section):
    place: Place
    training: Literal["main", "survey"]
    ks: list[PositiveInt]
    seeds: list[int]
    taus: list[float]
    exemplars: dict[Literal["register", "bundle"], PositiveInt]
    fewest_passages: PositiveInt
    contexts: PositiveInt


class Erase(Section):
    atoms: PositiveInt
    positions: PositiveInt
    doses: list[float]


class SingleWrite(Section):
    prompts: PositiveInt
    positions: PositiveInt
    prompt_tokens: PositiveInt
    horizon: PositiveInt
    magnitude: float


class Newlines(Section):
    atoms: PositiveInt
    doses: list[float]
    prompts: PositiveInt
    prompt_tokens: PositiveInt
    new_tokens: PositiveInt
    temperature: float = Field(ge=0)


class Readers(Section):
    exemplars: PositiveInt
    fewest_passages: PositiveInt
    contexts: PositiveInt
    steps: PositiveInt
    random_writes: PositiveInt


class CacheEdits(Section):
    place: Place
    target: Target
    selection_windows: PositiveInt
    windows: PositiveInt
    erase: Erase
    single: SingleWrite
    newlines: Newlines
    readers: Readers
    passages: PositiveInt


class Multiverse(Section):
    windows: PositiveInt
    firings: PositiveInt
    atoms: PositiveInt
    horizon: PositiveInt
    batch_rows: PositiveInt
    head_firings: int = Field(ge=0)
    bootstrap: PositiveInt
    permutations: PositiveInt


class Variant(Section):
    encoder: str = "bilinear"
    decoder: str = "rank1"
    activation: str = "topk"
    rank: PositiveInt = 1
    targets: list[Target] = ["state"]
    places: list[Place] = ["middle"]

    @model_validator(mode="after")
    def _exists(self) -> Variant:
        check_parts(**self.parts())
        return self

    def parts(self) -> dict:
        """What it changes in the settings of the training."""
        return dict(encoder=self.encoder, decoder=self.decoder, activation=self.activation, rank=self.rank)


class Selectivity(Section):
    windows: PositiveInt
    firings: PositiveInt
    tops: list[PositiveInt]


class Ablations(Section):
    firings: int = Field(ge=0)
    training: TrainingSettings
    training_windows: int = Field(gt=8)
    variants: list[Variant]
    windows: PositiveInt
    selectivity: Selectivity
    bootstrap: PositiveInt


class Install(Section):
    place: Place
    prompts: PositiveInt
    prompt_tokens: PositiveInt
    distances: list[PositiveInt]
    rank_classes: dict[str, tuple[int, int]]
    targets_per_class: PositiveInt
    magnitudes: list[float]
    writes: PositiveInt
    new_tokens: PositiveInt
    doses: list[float]
    bisections: int = Field(ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Install:
        for name, (first, last) in self.rank_classes.items():
            if not 1 <= first <= last:
                raise ValueError(
                    f"rank_classes.{name} goes from its first rank, 1 or more, to its last, not {first} to {last}"
                )
        if max(self.distances, default=0) > self.prompt_tokens:
            raise ValueError(
                f"distances are {max(self.distances)} at most, and a prompt has {self.prompt_tokens} tokens"
            )
        return self


class Profile(Section):
    name: str
    seed: NonNegativeInt
    corpus: Corpus | None = None  # the docstrings of the installed packages
    hosts: dict[str, HostSection]
    data: Data
    saes: Saes
    logit_shift: LogitShift
    replacement: Replacement
    population: Population
    atoms: Atoms
    install: Install
    cache_edits: CacheEdits
    multiverse: Multiverse
    ablations: Ablations

    @model_validator(mode="after")
    def _overrides_fit(self) -> Profile:
        for host in self.hosts:
            for name in self.hosts[host].overrides:
                try:
                    self.section(name, host)
                except ValidationError as error:
                    raise ValueError(f"{host}, overrides, {name}.{_first(error)}") from None
        return self

    def section(self, name: str, host: str) -> Section:
        """The settings of an experiment for a host: the profile's, with what the host's own `overrides` put in place."""
        own = getattr(self, name)
        return type(own)(**own.model_dump() | self.hosts[host].overrides.get(name, {}))


def load_profile(name: str, folder: Path | None = None) -> Profile:
    """profiles/NAME.yaml. Raises ValueError, in one sentence, for an unknown name or a field that is wrong."""
    folder = folder or ROOT / "profiles"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ValueError(
            f"There is no profile {name!r}: choose one of {known}, or write {path.name} in {folder.name}/."
        )
    try:
        return Profile(name=name, **yaml.safe_load(path.read_text()))
    except ValidationError as error:
        raise ValueError(f"Profile {name}: {_first(error)}.") from None
    except (TypeError, UnicodeDecodeError, yaml.YAMLError):
        raise ValueError(f"Profile {name} is not a YAML mapping of fields to values.") from None


def _first(error: ValidationError) -> str:
    """Where a file first goes wrong, and how."""
    first = error.errors()[0]
    return ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")]))
