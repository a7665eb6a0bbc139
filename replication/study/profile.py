"""Profiles: all numbers of the experiments, read from profiles/NAME.yaml (which explains each) and validated.

In a dry run (`python -m replication dryrun`) the tiny counts of profiles/dryrun/overrides.yaml replace those
of the profile, and hosts of the same shapes with random weights replace its hosts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, PositiveInt, ValidationError, field_validator, model_validator

from replication.study.paths import ROOT, dry_run, in_repository, output_root
from replication.study.yaml_files import checked, read_mapping
from writesae.sae.config import Parts, first_problem
from writesae.sae.train import TrainingSettings
from writesae.text import Corpus

Target = Literal["state", "write"]
Definition = Literal["added", "effective"]
Centre = Literal["mean", "none", "bias"]
Place = Literal["early", "middle", "late", "regime", "weighty"]
PAPER_PLACES: tuple[Place, ...] = ("early", "middle", "late")  # of the paper's three cells
Scope = Literal["write", "cache"]
Experiment = Literal[
    "logit_shift", "replacement", "objects", "population", "atoms", "install", "install_cells", "cache_edits"
]
Overridable = Literal[Experiment, "saes", "baselines", "multiverse", "ablations"]


class Section(BaseModel):
    model_config = dict(extra="forbid", frozen=True, allow_inf_nan=False)


class CellRule(Section):
    """A rule for one cell: a head of a layer, the nearest sigma1/sigma2 of states, or the largest cost.

    The last two choose within the layer, or among all cells of the host if there is no layer. cost: of no
    writes in the cell (`cost_of_no_writes`).
    """

    layer: int | None = None
    head: int | None = Field(None, ge=0)
    sigma_ratio: float | None = Field(None, gt=0)
    cost: Literal["largest"] | None = None

    @model_validator(mode="after")
    def _one_of_three(self) -> CellRule:
        if sum(rule is not None for rule in (self.head, self.sigma_ratio, self.cost)) != 1:
            raise ValueError(f"the cell in {self.where} needs exactly one of head, sigma_ratio and cost")
        if self.head is not None and self.layer is None:
            raise ValueError(f"head {self.head} needs the number of its layer")
        return self

    @property
    def where(self) -> str:
        """The cells among which the rule chooses, in words."""
        return "any layer" if self.layer is None else f"layer {self.layer}"

    @property
    def words(self) -> str:
        """The rule in words."""
        if self.head is not None:
            return f"head {self.head} of {self.where}"
        choice = "largest cost" if self.cost else f"sigma1/sigma2 nearest to {self.sigma_ratio:g}"
        return f"{choice}, {self.where}"


class HostSection(Section):
    path: str
    revision: str | None = None
    tokenizer: str | None = None  # a folder or hub id, for a model without a tokenizer
    dtype: Literal["float32", "bfloat16"] = "float32"
    cells: dict[Place, CellRule]
    overrides: dict[Overridable, dict] = {}

    @property
    def paper_places(self) -> list[Place]:
        """The places of the paper's cells; the others are for the headline, all writes and objects only."""
        return [place for place in self.cells if place in PAPER_PLACES]


class Data(Section):
    window: int = Field(ge=8)
    sae_windows: PositiveInt
    heldout_windows: PositiveInt
    firing_windows: PositiveInt
    survey_windows: PositiveInt
    first_position: int = Field(ge=1)
    batch_windows: PositiveInt
    cell_windows: PositiveInt = 32  # for half-lives and spectra of cells, in one run
    cost_windows: PositiveInt = 16  # held-out windows for the cost of no writes in a cell, in one run


class Saes(Section):
    write: Definition
    targets: list[Target]
    main: TrainingSettings
    trainings: dict[Centre, PositiveInt]  # per headline cell and target: SAEs, which differ in their seed
    survey: TrainingSettings
    flat: TrainingSettings


class PredictedKL(Section):
    firings: PositiveInt  # uniform over positions
    atoms: PositiveInt  # put in the place of the native write at every firing
    readings: list[int]  # numbers of backward passes per firing


class ShiftCells(Section):
    """Predicted shifts in the cells of a host; the atoms are native writes at other positions."""

    every: PositiveInt  # every n-th recurrent cell
    eps: list[float]
    prompts: PositiveInt
    atoms: PositiveInt


class LogitShift(Section):
    place: Place
    target: Target
    atoms: PositiveInt
    eps: list[float]  # in native write norms; only those of the paper enter its fit
    prompts: PositiveInt
    prompt_tokens: PositiveInt
    horizon: PositiveInt
    ranks: list[PositiveInt]  # of the tokens whose logits are read; 1 is the native top token
    predicted_kl: PredictedKL
    cells: ShiftCells


class Replacement(Section):
    firings: dict[Place, PositiveInt]
    places: PositiveInt  # per cell, uniform over positions, for the SAEs of all trainings
    by_atom: PositiveInt  # firings per cell, equally many per atom, for one SAE per centre
    scopes: list[Scope]
    atoms: PositiveInt | None = None
    survey_firings: int = Field(ge=0)
    survey_windows: PositiveInt
    survey_every: PositiveInt = 1  # survey every n-th recurrent layer
    batch_rows: PositiveInt
    bootstrap: PositiveInt


class Objects(Section):
    firings: PositiveInt  # per cell, at the same positions for all SAEs of a host


class Baselines(Section):
    places: PositiveInt  # per cell
    nearest: list[PositiveInt]  # sizes of codebooks of raw writes, in multiples of the SAE's number of atoms
    fitted: PositiveInt  # training writes for k-means and for PCA of whole writes
    components: list[PositiveInt]  # of the PCA of whole writes
    side_components: list[PositiveInt]  # of the PCA of each side


class AllWrites(Section):
    windows: PositiveInt  # held-out windows for the SAEs of the headline
    survey_windows: PositiveInt  # the same for those of the survey


class Attribution(Section):
    passages: PositiveInt  # held-out passages on which the map of every cell is measured
    tokens: PositiveInt  # of each passage
    horizon: PositiveInt  # a write is followed for so many tokens; reads are measured from this position on


class ResidualFeatures(Section):
    training: TrainingSettings  # of the SAE of the residual stream
    windows: PositiveInt  # of the SAE split, on which it is trained
    test_windows: PositiveInt  # held-out windows with the places
    places: PositiveInt  # per cell, uniform over positions
    horizon: int = Field(ge=2)  # tokens from the write on, its own included


class Recall(Section):
    """The SAEs of the recall hosts (page 17)."""

    sides: list[PositiveInt]  # of the hosts' states
    contexts: PositiveInt  # held out, per load
    pairs: PositiveInt  # in all training contexts together
    seeds: list[int]
    training: TrainingSettings  # but for k, n_atoms, centre and batch_windows, which the page sets


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


class Recurrence(Section):
    atoms: PositiveInt  # per dictionary and training, whose firings are detected from the text


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
    initial: Literal["data", "random"] = "data"
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
                raise ValueError(f"rank_classes.{name} needs 1 <= first <= last rank, not {first} to {last}")
        if (farthest := max(self.distances, default=0)) > self.prompt_tokens:
            raise ValueError(f"a distance of {farthest} exceeds the {self.prompt_tokens} tokens of a prompt")
        return self


class InstallCells(Section):
    prompts: PositiveInt  # the classes and counts of `install` hold here too
    prompt_tokens: PositiveInt
    distances: list[PositiveInt]
    delays: list[PositiveInt]  # further distances
    out_of_context: PositiveInt  # targets per prompt of each class out of context
    beyond: PositiveInt  # native rank beyond which a token is out of context
    refinement: PositiveInt  # steps of Adam, for targets that do not come next
    sizes: list[float]  # in native write norms; 1 is among them
    counts: list[PositiveInt]  # numbers of cells, beside all
    ceiling_sizes: list[float]
    batch_rows: PositiveInt


class Profile(Section):
    name: str
    seed: int = Field(ge=0)
    corpus: Corpus | None = None  # None: the docstrings of the installed packages
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if available
    workers: PositiveInt | None = None  # tasks at once, each with memory of its own; None: one per core
    hosts: dict[str, HostSection]
    data: Data
    saes: Saes
    logit_shift: LogitShift
    replacement: Replacement
    objects: Objects
    baselines: Baselines
    all_writes: AllWrites
    attribution: Attribution
    residual_features: ResidualFeatures
    recall: Recall
    population: Population
    atoms: Atoms
    recurrence: Recurrence
    install: Install
    install_cells: InstallCells
    cache_edits: CacheEdits
    multiverse: Multiverse
    ablations: Ablations

    @field_validator("corpus")
    @classmethod
    def _relative_to_the_repository(cls, corpus: Corpus | None) -> Corpus | None:
        return corpus and corpus.model_copy(update=dict(root=ROOT))

    @model_validator(mode="after")
    def _overrides_fit(self) -> Profile:
        for host, section in self.hosts.items():
            for name in section.overrides:
                try:
                    self.section(name, host)
                except ValidationError as error:
                    raise ValueError(f"{host}, overrides, {name}.{first_problem(error)}") from None
        return self

    def section(self, name: str, host: str) -> Section:
        """Return the settings of an experiment for a host, with the `overrides` of the host."""
        section = getattr(self, name)
        return type(section)(**section.model_dump() | self.hosts[host].overrides.get(name, {}))


def load_profile(name: str, folder: Path = ROOT / "profiles") -> Profile:
    """Return the profile in profiles/NAME.yaml. Raises ValueError for an unknown name or a wrong field."""
    name = str(name)  # papermill turns a name of digits into a number
    path = folder / f"{name}.yaml"
    if Path(name).name != name or not path.is_file():
        names = ", ".join(sorted(p.stem for p in folder.glob("[!.]*.yaml")))
        raise ValueError(
            f"There is no profile {name!r}: choose one of {names}, or write {path.name} in {folder.name}/."
        )
    content = profile_content(path)
    with checked(f"Profile {name}"):
        if dry_run():
            content = dry(content, read_mapping(ROOT / "profiles/dryrun/overrides.yaml", "overrides.yaml"))
        return Profile(name=name, **content)


def profile_content(path: Path, above: tuple[Path, ...] = ()) -> dict:
    """Return the fields of a profile's file, on top of those of the profile that it `extends`, if any.

    above: the files that extend this one. Raises ValueError if there is no such profile in the same folder, if
    a profile extends itself, and as `read_mapping`."""
    content = read_mapping(path, f"Profile {path.stem}")
    if "extends" not in content:
        return content
    base = path.with_name(f"{content.pop('extends')}.yaml")
    if not base.is_file():
        raise ValueError(f"Profile {path.stem} extends {base.stem!r}: write {base.name} in the same folder.")
    if base in (path, *above):
        raise ValueError(f"Profile {base.stem} extends itself: remove one `extends`.")
    return profile_content(base, (path, *above)) | content


def lay_over(base: Any, over: Any) -> Any:
    """Return `base` with the values of `over` wherever both have one.

    A plain value over a mapping replaces each of its values. What `base` leaves out or switches off (0, null,
    an empty list) stays so.
    """
    if isinstance(base, dict):
        below = over if isinstance(over, dict) else dict.fromkeys(base, over)
        return {key: lay_over(value, below[key]) if key in below else value for key, value in base.items()}
    return over if base else base


def dry(content: dict, over: dict) -> dict:
    """Return the content of a profile for a dry run: tiny counts, one task at a time, on the CPU.

    A host that would be downloaded is replaced by the folder that `python -m replication dryrun` makes.
    """
    content = lay_over(content, over) | dict(device="cpu", workers=1, corpus=None)
    content["data"] = content["data"] | dict(cell_windows=over["data"]["cell_windows"])
    hosts = {}
    for name, host in content["hosts"].items():
        host = host | dict(overrides=lay_over(host.get("overrides", {}), over), dtype="float32")
        if not in_repository(host["path"]).exists():
            path = str(output_root() / "hosts" / host["path"].replace("/", "--"))
            host |= dict(path=path, revision=None, tokenizer=None)
        hosts[name] = host
    return content | dict(hosts=hosts)
