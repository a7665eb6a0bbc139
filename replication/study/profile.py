"""Profiles: every number that an experiment uses, validated, in profiles/NAME.yaml; the YAML says what each is. A profile
that `extends` another has its fields, but for those that it gives itself.

In a dry run (`python -m replication dryrun`) the tiny counts of profiles/dryrun/overrides.yaml replace the profile's own,
and hosts of the same shapes with random weights replace its hosts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from replication.study.paths import ROOT, dry_run, output_root
from writesae.sae.config import Parts
from writesae.sae.train import TrainingSettings
from writesae.text import Corpus

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
    """A cell: the head itself, or the ratio sigma1/sigma2 of its states that the head is chosen by."""

    layer: int
    head: int | None = Field(None, ge=0)
    sigma_ratio: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_of_two(self) -> CellRule:
        if (self.head is None) == (self.sigma_ratio is None):
            raise ValueError(f"the cell in layer {self.layer} needs a head or a sigma_ratio, and not both")
        return self


class HostSection(Section):
    path: str
    revision: str | None = None
    tokenizer: str | None = None  # a folder or hub id, where the model's own holds none
    dtype: Literal["float32", "bfloat16"] = "float32"
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
    cell_windows: PositiveInt = 32  # over which the cells are described, in one run


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
    survey_every: PositiveInt = 1  # how many recurrent layers on the next one is surveyed; 1: all are
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


class Variant(Parts):
    targets: list[Target] = ["state"]
    places: list[Place] = ["middle"]


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
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is some
    workers: PositiveInt | None = None  # what is worked on at once, each with its share of memory; None: one a core
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

    @field_validator("corpus")
    @classmethod
    def _relative_to_the_repository(cls, corpus: Corpus | None) -> Corpus | None:
        return corpus and corpus.model_copy(update=dict(root=ROOT))

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
        content = profile_content(path)
        if dry_run():
            content = dry(content, yaml.safe_load((ROOT / "profiles" / "dryrun" / "overrides.yaml").read_text()))
        return Profile(name=name, **content)
    except ValidationError as error:
        raise ValueError(f"Profile {name}: {_first(error)}.") from None
    except (TypeError, UnicodeDecodeError, yaml.YAMLError):
        raise ValueError(f"Profile {name} is not a YAML mapping of fields to values.") from None


def profile_content(path: Path) -> dict:
    """The fields of a profile's file, over those of the profile beside it that it `extends`, if it extends one.

    Raises ValueError where that one is not there.
    """
    own = {**yaml.safe_load(path.read_text())}
    if "extends" not in own:
        return own
    below = path.with_name(f"{own.pop('extends')}.yaml")
    if not below.is_file():
        raise ValueError(
            f"Profile {path.stem} extends {below.stem!r}, which is not there: write {below.name} beside it."
        )
    return {**yaml.safe_load(below.read_text())} | own


def _first(error: ValidationError) -> str:
    """Where a file first goes wrong, and how."""
    first = error.errors()[0]
    return ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")]))


def lay_over(base: Any, over: Any) -> Any:
    """`base` with the values of `over` wherever both have one. A plain value laid over a mapping replaces each of its
    values; what `base` leaves out or switches off (0, null, an empty list) stays so."""
    if isinstance(base, dict):
        below = over if isinstance(over, dict) else dict.fromkeys(base, over)
        return {name: lay_over(value, below[name]) if name in below else value for name, value in base.items()}
    return over if base else base


def dry(content: dict, over: dict) -> dict:
    """The content of a profile for a dry run: tiny counts everywhere, one thing at a time on the CPU, and for every host
    that would be downloaded the folder that `python -m replication dryrun` makes."""
    content = lay_over(content, over) | dict(device="cpu", workers=1, corpus=None)
    content["data"] = content["data"] | dict(cell_windows=over["data"]["cell_windows"])
    hosts = {}
    for name, host in content["hosts"].items():
        host = host | dict(overrides=lay_over(host.get("overrides", {}), over), dtype="float32")
        if not (ROOT / host["path"]).exists():
            host |= dict(path=str(output_root() / "hosts" / Path(host["path"]).name), revision=None, tokenizer=None)
        hosts[name] = host
    return content | dict(hosts=hosts)
