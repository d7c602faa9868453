"""Members of an ensemble: what `--member` says, loaded and known by the content of their weights."""

import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import nn

from cxrdist.augment.views import distinct_views
from cxrdist.data.folds import read_split
from cxrdist.errors import UserError
from cxrdist.inference.passes import Member
from cxrdist.models import FAMILIES, architecture_of, recipe_for
from cxrdist.models.weights.fit import load_init
from cxrdist.models.weights.layouts import WeightFile, architecture_of_file, read_weights
from cxrdist.models.weights.safetensors import tensors_sha256
from cxrdist.recipes import PUBLISHED_VIEWS, RECIPES, Recipe
from cxrdist.runs import checkpoint
from cxrdist.runs.documents import Facts
from cxrdist.runs.member import Weights, build_model, load_member, read_recipe, read_task
from cxrdist.scoring.tables import Checkpoint, TableMeta, may_be_seen, shares
from cxrdist.task import Task

Kind = Literal["", "ema", "raw"]
RECIPE = "recipe.json"
KINDS: dict[str, Kind] = {"ema.safetensors": "ema", "model.safetensors": "raw"}  # of an epoch checkpoint's files
VIEW_SETS: dict[str, tuple[str, ...]] = {"tta": PUBLISHED_VIEWS, "plain": ("plain",)}
MEMBER = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)=(?P<source>.+?)(@(?P<epochs>\d+(,\d+)*)|"
    rf"#(?P<recipe>(({'|'.join(FAMILIES)}):)?[A-Za-z0-9][\w.-]*))?"
    r"(:(?P<views>[^:/\\*]+))?(\*(?P<weight>[^*]+))?"
)


@dataclass(frozen=True)
class MemberSpec:
    """What `--member` asks for: epochs and views are None where the recipe decides; recipe is of a weight file only.

    raw: the weights of the last step, not their EMA.
    """

    name: str
    source: Path  # run folder, or a weight file
    epochs: tuple[int, ...] | None = None
    views: tuple[str, ...] | None = None
    weight: float | None = None
    recipe: str | None = None
    raw: bool = False


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint came from; run (folder) and facts (the data it was trained on) are None for a bare file.

    weights, task, from_random: as in a score table's `Checkpoint`. note: to be told with the plan.
    """

    label: str
    weights: Kind = ""
    task: str = ""
    run: Path | None = None
    facts: Facts | None = None
    from_random: bool = False
    note: str = ""


@dataclass
class Ensemble:
    """Members as asked for, and the models by checkpoint hash; a frozen backbone is one module in all that share it."""

    members: list[Member] = field(default_factory=list)
    models: dict[str, nn.Module] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)  # by checkpoint hash
    recipes: dict[str, Recipe] = field(default_factory=dict)  # by checkpoint hash
    notes: list[str] = field(default_factory=list)  # to be told with the plan


def parse_member(text: str) -> MemberSpec:
    """`NAME=RUN[@EPOCHS][:VIEWS][:raw][*WEIGHT]`, or `NAME=FILE[#RECIPE]...`; UserError for another form.

    VIEWS is tta, plain or view names with commas.
    """
    form = f"--member {text}: write NAME=RUN@5,6[:tta|:plain][:raw][*WEIGHT], or NAME=FILE[#RECIPE] for a weight file"
    if "=" not in text:
        raise UserError(f"--member {text}: give it a name, e.g. --member eva_x={text}")
    text, raw = re.subn(r":raw(?=[:*]|$)", "", text, count=1)
    if (found := MEMBER.fullmatch(text)) is None:
        raise UserError(f"{form}; a name has letters, digits, '.', '_', '-'")
    epochs = tuple(int(epoch) for epoch in (found["epochs"] or "").split(",") if epoch)
    views = VIEW_SETS.get(found["views"]) or tuple(view for view in (found["views"] or "").split(",") if view)
    unknown = [view for view in views if view not in PUBLISHED_VIEWS]
    try:
        weight = None if found["weight"] is None else float(found["weight"])
    except ValueError:
        weight = math.nan
    checks = {
        f"weight {found['weight']!r} is not a number of 0 or more": weight is None or 0 <= weight < math.inf,
        f"view {''.join(unknown[:1])!r} is unknown: tta, plain or of {', '.join(PUBLISHED_VIEWS)}": not unknown,
        "an epoch is named twice": len(set(epochs)) == len(epochs),
        f"recipe {found['recipe']!r} is unknown: one of {', '.join(RECIPES)}, timm:NAME": is_recipe(found["recipe"]),
    }
    if problems := [problem for problem, absent in checks.items() if not absent]:
        raise UserError(f"{form}; {problems[0]}")
    return MemberSpec(
        name=found["name"],
        source=Path(found["source"]),
        epochs=epochs or None,
        views=views or None,
        weight=weight,
        recipe=found["recipe"],
        raw=bool(raw),
    )


def parse_members(texts: Sequence[str], task: str) -> list[MemberSpec]:
    """Each `--member`; without any the published ensemble: the two runs of the task of that name."""
    published = [MemberSpec(name, Path("runs") / f"{name}_{task}") for name in ("eva_x", "chexfound")]
    return [parse_member(text) for text in texts] or published


def task_of_models(specs: Sequence[MemberSpec], given: Task | None, flag: str = "--task") -> Task:
    """The task that the members were trained for: `given` with `flag`, or what their runs say.

    UserError where a member is not there, they say different tasks, or nothing says it: a weight file does not.
    """
    for spec in specs:
        if not any(Path(part).exists() for part in str(spec.source).split(",")):
            what = "is neither a run folder nor a weight file"
            raise UserError(f"--member {spec.name}: {spec.source} {what}; check the path")
    found = [(f"the task of {flag}", given)] if given is not None else []
    found += [(str(spec.source), task) for spec in specs if (task := task_of_spec(spec)) is not None]
    if not found:
        raise UserError(f"--member {specs[0].name}: a weight file does not say its task; name it: {flag} TASK")
    first, task = found[0]
    for source, other in found[1:]:
        if differences := task.differences(other):
            problem = f"{first} and {source} are of different tasks ({'; '.join(differences)})"
            raise UserError(f"{problem}; use the models of each task by themselves, each with its own --out")
    return task


def load_ensemble(specs: Sequence[MemberSpec], task: Task, backbone: Path | None = None) -> Ensemble:
    """Load every checkpoint once, on the CPU. backbone: where to look first for a run's frozen backbone.

    UserError for another task, or two weights of one member.
    """
    ensemble = Ensemble()
    checkpoints: dict[str, list[Checkpoint]] = {}
    weights: dict[str, float] = {}
    backbones: dict[tuple[str, str, int], nn.Module] = {}
    for spec in specs:
        for origin, recipe, model in load_checkpoints(spec, task, backbone):
            item = checkpoint_of(origin.label, recipe, model, spec.views or recipe.inference.views)
            trained_on = "" if origin.facts is None else origin.facts.shards
            item = replace(item, weights=origin.weights, task=origin.task, trained_on=trained_on)
            item = replace(item, from_random=origin.from_random)
            ensemble.notes += [note for note in (origin.note, raw_note(spec, item)) if note]
            if item.backbone_sha256 is not None:
                first = backbones.setdefault((item.model, item.backbone_sha256, item.image_size), model)
                architecture_of(item.model).share_frozen(model, first)
            ensemble.models.setdefault(item.sha256, model.eval())
            ensemble.origins[item.sha256], ensemble.recipes[item.sha256] = origin, recipe
            checkpoints.setdefault(spec.name, []).append(item)
        weight = 1.0 if spec.weight is None else spec.weight
        if weights.setdefault(spec.name, weight) != weight:
            raise UserError(f"--member {spec.name} has two weights ({weights[spec.name]}, {weight}); give one")
    shares(list(weights.values()))
    ensemble.members = [Member(name, tuple(items), weights[name]) for name, items in checkpoints.items()]
    return ensemble


def load_checkpoints(
    spec: MemberSpec, task: Task, backbone: Path | None = None
) -> Iterator[tuple[Origin, Recipe, nn.Module]]:
    """(origin, recipe, model) of every checkpoint that one `--member` names."""
    if spec.source.is_dir():
        if spec.recipe is not None:
            raise UserError(
                f"--member {spec.name}: {spec.source} is a run, which has its recipe: leave out #{spec.recipe}"
            )
        for epoch in spec.epochs or read_recipe(spec.source).inference.member_epochs:
            yield load_epoch(spec, spec.source, epoch, "model" if spec.raw else "ema", task, backbone)
    elif (place := place_in_run(spec)) is not None:
        yield load_epoch(spec, *place, task, backbone)
    else:
        yield load_file(spec, task)


def load_epoch(
    spec: MemberSpec, run: Path, epoch: int, weights: Weights, task: Task, backbone: Path | None
) -> tuple[Origin, Recipe, nn.Module]:
    """A run's checkpoint of an epoch; UserError where it is of another task, or has not the weights asked for."""
    loaded, label = load_member(run, epoch, weights, backbone), f"{run}@{epoch}"
    refuse_other_task(label, loaded.task, task)
    kind: Kind = "raw" if (loaded.meta.weights if loaded.meta.averaged else weights) == "model" else "ema"
    refuse_ema(spec, kind)
    note = "" if spec.source == run else note_of(spec, run)
    origin = Origin(label, kind, task.name, run, loaded.meta.data, loaded.from_random, note)
    return origin, loaded.recipe, loaded.model


def load_file(spec: MemberSpec, task: Task) -> tuple[Origin, Recipe, nn.Module]:
    """The weights of a file, or of several that complete each other.

    The recipe is the one that `spec` names, else the one that lies beside the file, else the published one of its
    architecture. UserError where they are of another task, or have not the weights asked for.
    """
    files, home, recipe = files_of(spec), home_of(spec), None
    origin = Origin(str(spec.source))
    if home is not None:
        recipe, own = read_recipe(home), task_of_spec(spec)
        if own is not None:
            refuse_other_task(str(spec.source), own, task)
        kind, name = KINDS.get(files[0].name, ""), "" if own is None else own.name
        origin = replace(origin, weights=kind, task=name, note=note_of(spec, home))
    elif ":" in (spec.recipe or ""):
        recipe = recipe_for(spec.recipe or "", task.name)
    weights = read_weights(*files, architecture=None if recipe is None else architecture_of(recipe.model))
    recipe = recipe or recipe_of_file(spec, weights, task)
    kind = origin.weights or weights.kind
    if spec.raw and weights.ema is not None and weights.ema is not weights.tensors:
        kind = "raw"
    refuse_ema(spec, kind)
    model = build_model(recipe, task, to_load=True)
    chosen: Weights = "model" if spec.raw else "ema"
    load_init(architecture_of(recipe.model), model, spec.source, weights=chosen, complete=True)
    return replace(origin, weights=kind), recipe, model


def files_of(spec: MemberSpec) -> list[Path]:
    """The weight files of a member that is no run; UserError where they are not there, or epochs of them are named."""
    files = [Path(part) for part in str(spec.source).split(",")]
    if not all(path.is_file() for path in files):
        raise UserError(
            f"--member {spec.name}: {spec.source} is neither a run folder nor a weight file; check the path"
        )
    if spec.epochs is not None:
        raise UserError(f"--member {spec.name}: {spec.source} is one weight file; @epochs belongs to a run folder")
    return files


def home_of(spec: MemberSpec) -> Path | None:
    """The folder with the recipe and the task of a member: its run, or that of its file; None where none is known.

    A file has none where the member names a recipe. Else it is the file's own folder, or that of the run that it is an
    epoch's of, if there is a recipe.
    """
    if spec.source.is_dir():
        return spec.source
    if spec.recipe is not None:
        return None
    folder = Path(str(spec.source).partition(",")[0]).parent
    above = Path(os.path.normpath(folder / ".." / ".."))
    is_epoch = checkpoint.epoch_of(Path(os.path.abspath(folder))) is not None
    places = [folder, above] if is_epoch else [folder]
    return next((each for each in places if (each / RECIPE).is_file()), None)


def place_in_run(spec: MemberSpec) -> tuple[Path, int, Weights] | None:
    """(run, epoch, which weights) of a member whose file is one of an epoch checkpoint where it was written."""
    files, home = files_of(spec), home_of(spec)
    kind, epoch = KINDS.get(files[0].name), checkpoint.epoch_of(Path(os.path.abspath(files[0].parent)))
    if home is None or home == files[0].parent or len(files) > 1 or kind is None or epoch is None:
        return None
    return home, epoch, "model" if kind == "raw" else "ema"


def task_of_spec(spec: MemberSpec) -> Task | None:
    """The task that a run, or what lies beside a weight file, says; None for a file without it."""
    home = home_of(spec)
    said = home is not None and (spec.source.is_dir() or (home / "task.json").is_file())
    return read_task(home) if home is not None and said else None


def note_of(spec: MemberSpec, home: Path) -> str:
    return f"{spec.name}: {spec.source} is read with the recipe in {home / RECIPE}"


def refuse_other_task(label: str, own: Task, task: Task) -> None:
    if found := task.differences(own):
        problem = f"was trained for another task than the shards' ({'; '.join(found)})"
        raise UserError(f"{label} {problem}; use a run of that task, or --external to score them all the same")


def refuse_ema(spec: MemberSpec, kind: str) -> None:
    """UserError where raw weights are asked for and there are others."""
    if spec.raw and kind != "raw":
        what = "EMA weights" if kind == "ema" else "weights of which the file does not say whether they are raw ones"
        raise UserError(
            f"--member {spec.name}: {spec.source} holds {what}; leave out :raw, or name a run or file with raw ones"
        )


def recipe_of_file(spec: MemberSpec, weights: WeightFile, task: Task) -> Recipe:
    """The recipe that the weight file's member names, or the published one of its architecture. UserError: neither."""
    model_name = architecture_of_file(weights)
    recipes = {name: recipe for name in RECIPES if (recipe := recipe_for(name, task.name)).model == model_name}
    if not recipes or spec.recipe not in (None, *recipes):
        known = ", ".join(recipes) or "not known"
        what = f"--member {spec.name}: {spec.source} holds weights of {model_name}"
        raise UserError(f"{what}, and recipes of that are {known}; name one as FILE#RECIPE")
    return recipes[spec.recipe or next(iter(recipes))]  # the first one is the published one


def is_recipe(name: str | None) -> bool:
    """Whether a member may name this recipe; that timm has such a model is seen where it is made."""
    return name is None or ":" in name or name in RECIPES


def raw_note(spec: MemberSpec, item: Checkpoint) -> str:
    """The warning for a weight file with the raw weights of an epoch, whose EMA is in a file of its own; else ''."""
    if item.weights != "raw" or spec.raw or spec.source.is_dir():
        return ""
    number = re.findall(r"\d+", spec.source.stem)[-1:]
    files = sorted(spec.source.parent.glob(f"*[eE][mM][aA]*{spec.source.suffix}"))
    twins = [path.name for path in files if re.findall(r"\d+", path.stem)[-1:] == number and path != spec.source]
    beside = f"{twins[0]} beside it looks like its EMA" if twins else "its EMA is in another file"
    both = "" if spec.source.name in KINDS else ", or both as FILE,FILE"
    return f"warning: {spec.name}: {spec.source} holds raw weights; {beside}: name that{both}"


def checkpoint_of(source: str, recipe: Recipe, model: nn.Module, views: Sequence[str]) -> Checkpoint:
    """The identity of a model's weights, by content, and the views that it is scored with."""
    state, frozen = model.state_dict(), architecture_of(recipe.model).frozen_names(model)
    backbone = tensors_sha256(state, frozen) if frozen else None
    trained = tensors_sha256(state, [name for name in state if name not in set(frozen)])
    return Checkpoint(
        source=source,
        model=recipe.model,
        sha256=hashlib.sha256(f"{trained} {backbone} {recipe.image_size}".encode()).hexdigest(),
        backbone_sha256=backbone,
        image_size=recipe.image_size,
        views=distinct_views(views),
        num_views=len(views),
    )


def common_split(ensemble: Ensemble, task: Task) -> dict[str, int]:
    """The fold of each patient, on which the runs of all members must agree."""
    runs = dict.fromkeys(origin.run for origin in ensemble.origins.values())
    splits = {run: read_split(run / "split.csv", task) for run in runs if run is not None}
    if len(splits) < len(runs):
        raise UserError("--fold needs members from run folders: a weight file does not say who was held out")
    (first, wanted), *others = splits.items()
    if other := [run for run, split in others if split != wanted]:
        raise UserError(f"{other[0]} and {first} differ in split.csv; --fold needs one split for all members")
    return wanted


def held_out(ensemble: Ensemble, member: Member, fold: int | None, shards: str) -> bool:
    """True when every run of the member kept `fold` of these very shards (by fingerprint) out of training."""
    facts = [ensemble.origins[item.sha256].facts for item in member.checkpoints]
    return fold is not None and all(f is not None and (f.validate_fold, f.shards) == (fold, shards) for f in facts)


def seen_notes(ensemble: Ensemble, fold: int | None, split: str, shards: str) -> list[str]:
    """A warning for each member that may have been trained on what it scores."""
    found = []
    for member in ensemble.members:
        kept_out = held_out(ensemble, member, fold, shards)
        meta = TableMeta(split=split, shards=shards, checkpoints=member.checkpoints, out_of_fold=kept_out)
        if may_be_seen(meta):
            told = "the scores say how well it remembers them, not how good it is on others"
            found.append(f"warning: {member.name} may have been trained on these images: {told}")
    return found
