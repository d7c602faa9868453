"""Everything that changes the result of a run, as frozen dataclasses: the published recipes and their variants.

A recipe is plain Python: one function per published result, variants by `dataclasses.replace`. It holds no task: a run
is recipe x shard set; the functions take a task's name for its published seeds alone. What changes only the speed
(GPUs, device batch size, precision, threads) is on the command line or in accel_configs/.
Source of every number: the published solution of Grand X-Ray Slam (2nd place division A, 3rd division B) and its logs.
"""

import ast
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from cxrdist.documents import Document
from cxrdist.errors import UserError
from cxrdist.task import LAYOUTS, TASKS, Task

FORMAT_VERSION = 2
DEFAULT_SEED = 22  # of the published recipes for every task without a published seed: division B's EVA-X
MAX_INITIAL_SHARE = 0.1  # of the EMA, at the end of a run
PUBLISHED_BATCH = 64  # images per optimizer step of both published runs
View = Literal["plain", "hflip", "center1.0", "center1.1", "bright0.95", "bright1.05"]
PUBLISHED_VIEWS: tuple[View, ...] = get_args(View)
Rule = Literal["none", "sqrt", "linear"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
ModelName = Annotated[str, Field(pattern=r"^([a-z]+:)?[A-Za-z0-9][\w.-]*$")]
Count = Annotated[int, Field(ge=1, le=10**6)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=10**6)]
MAX_LR = 10**6
Weight = Annotated[float, Field(ge=0, le=10**6)]
StepNumber = bool | Annotated[int, Field(ge=-(2**31), le=2**31)] | Annotated[float, Field(ge=-1e9, le=1e9)]
StepText = Annotated[str, Field(max_length=100)]
StepPair = Annotated[tuple[StepNumber, ...], Field(max_length=16)]
StepValue = StepNumber | StepText | StepPair | Annotated[tuple[StepPair, ...], Field(max_length=16)]
ModelSize = Annotated[int, Field(ge=0, le=2**16)] | Annotated[float, Field(ge=0, le=10**6)]


@dataclass(frozen=True, kw_only=True)
class Group(Document):
    """Parameters whose name matches `pattern` (re.search on the module's own names); the first matching row wins."""

    pattern: Annotated[str, Field(max_length=1000)]
    lr: Weight | None  # None: never updated
    weight_decay: Weight = 0.0

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"pattern {self.pattern[:80]!r} is no regular expression ({error})") from None


@dataclass(frozen=True, kw_only=True)
class Step(Document):
    """One step of the training augmentation, done to an image with probability `p`.

    name: of a published step (crop, flip, rotate, clahe, brightness, holes, shift) or a class of kornia.augmentation;
    args: what its class is called with, sorted by name.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z]\w*$", max_length=100)]
    p: Annotated[float, Field(ge=0, le=1)] = 1.0
    args: Annotated[tuple[tuple[str, StepValue], ...], Field(max_length=100)] = ()


def step(name: str, p: float = 1.0, **args: StepValue) -> Step:
    """A step, as a recipe writes it."""
    return Step(name=name, p=p, args=tuple(sorted(args.items())))


# The published steps in their order (albumentations 2.0.8), with the arguments that took effect.
CROP = step("crop", scale=(0.85, 1.0), ratio=(0.9, 1.1))
FLIP = step("flip", 0.5)
HOLES = step("holes", 0.2, max_holes=2, sides=(0.1, 0.2))  # as run: the library ignored the arguments of the call
HOLES_AS_ASKED = step("holes", 0.2, max_holes=1, sides=(1.0, 20.0))
PUBLISHED_STEPS = (
    CROP,
    FLIP,
    step("rotate", 0.4, degrees=12.0),
    step("clahe", 0.3, clip_limit=(1.0, 4.0)),
    step("brightness", 0.3, brightness=0.2, contrast=0.2),
    HOLES,
    step("shift", 0.25, shift=0.03, scale=0.05),
)
AUGMENTS = {"published": PUBLISHED_STEPS, "crop_flip": (CROP, FLIP), "none": ()}


@dataclass(frozen=True, kw_only=True)
class Inference(Document):
    """What inference takes from a run unless it is told otherwise; it changes nothing that is learned.

    views: test-time views whose probabilities are averaged
    member_epochs: epochs (from 1) whose EMA weights score, and whose probabilities are averaged
    """

    views: Annotated[tuple[View, ...], Field(min_length=1)] = ("plain",)
    member_epochs: tuple[Count, ...] = (5, 6)

    def __post_init__(self) -> None:
        if len(set(self.member_epochs)) < len(self.member_epochs):
            raise UserError(f"member_epochs={self.member_epochs} is not valid: an epoch is there twice")


@dataclass(frozen=True, kw_only=True)
class Recipe(Document):
    """One training run, and what inference takes from it. Raises UserError on an invalid combination.

    name: of the run: its folder, and its tables of scores
    model: an Architecture's name
    image_size: px, after augmentation
    epochs: passes over the images that are trained on
    seed: of the order of images, the augmentation, dropout and what begins at random
    global_batch_size: images per optimizer step, over all GPUs and accumulation
    shuffle_window: shards among whose images the order is random at a time, for sets larger than the disk; none: all
    groups: pattern of parameter names, learning rate and weight decay; the first that matches counts
    ema_decay: of the average of the weights, per step; it is what inference takes
    ema_ramp: decay of step t is min(ema_decay, (1 + t) / (10 + t)): for short runs
    betas: of AdamW
    lr_schedule: of the learning rates after the warm-up: constant, or cosine to 0
    warmup_steps: over which the learning rates rise from 0
    clip_grad_norm: largest norm of a step's gradient; none: as it is
    loss: focal_bce (as published), bce, asl (asymmetric), or another name in training.losses.LOSSES
    focal_weight: of the focal part of focal_bce
    focal_alpha: of the focal part: a plain factor, not class-dependent
    focal_gamma: of the focal part: power of what a cell is wrong by
    bce_weight: of the BCE part of focal_bce
    pos_weight_beta: of the class weights, from effective numbers of images; 0 weights every class alike
    pos_weight_cap: largest class weight
    asl_gamma_neg: of asl: power of what a negative cell is wrong by
    asl_gamma_pos: of asl: power of what a positive cell is wrong by
    asl_clip: of asl: probability below which a negative cell costs nothing
    label_smoothing: share s of training targets t * (1 - s) + s / 2; validation takes them as they are
    augment: steps of the training augmentation, with their probabilities and arguments
    mix_group: images of a global batch among which MixUp and CutMix pair
    drop_rate: dropout inside the GLoRI decoder, or before a classifier of timm; EVA-X has none
    drop_path: share of images that skip a block in training (stochastic depth), where the model can
    train: all, head, or last:N layers and the head; the rest is never updated
    layer_decay: a layer's learning rate is its rows' times this, once for each layer after it; none: as the rows say
    decay_vectors: weight decay on biases, norms and other vectors, too
    sync_bn: BatchNorm by the statistics of each pass over all processes; else they stay as the weights brought them
    model_kwargs: size overrides for a small variant, sorted by name
    inference: test-time views, and the epochs whose weights are averaged
    """

    name: Name
    model: ModelName
    image_size: Annotated[int, Field(ge=1, le=4096)]
    epochs: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    global_batch_size: Count
    shuffle_window: Count | None = None
    groups: Annotated[tuple[Group, ...], Field(min_length=1, max_length=1000)]
    ema_decay: Share
    ema_ramp: bool = False
    betas: tuple[Share, Share] = (0.9, 0.999)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 0
    clip_grad_norm: Positive | None = None
    loss: str = "focal_bce"
    focal_weight: Weight = 0.7
    focal_alpha: Weight = 0.25
    focal_gamma: Weight = 2.0
    bce_weight: Weight = 0.3
    pos_weight_beta: Share = 0.9999
    pos_weight_cap: Positive = 10.0
    asl_gamma_neg: Weight = 4.0
    asl_gamma_pos: Weight = 1.0
    asl_clip: Share = 0.05
    label_smoothing: Share = 0.0
    augment: Annotated[tuple[Step, ...], Field(max_length=100)] = PUBLISHED_STEPS
    mix_group: Annotated[int, Field(ge=2, le=10**4)] = 8
    drop_rate: Share = 0.1
    drop_path: Share = 0.0
    train: Annotated[str, Field(pattern=r"^(all|head|last:[1-9]\d{0,3})$")] = "all"
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    decay_vectors: bool = True
    sync_bn: bool = False
    model_kwargs: Annotated[tuple[tuple[str, ModelSize], ...], Field(max_length=100)] = ()
    inference: Inference = field(default=Inference(), compare=False)

    def __post_init__(self) -> None:
        if not all(1 <= epoch <= self.epochs for epoch in self.inference.member_epochs):
            raise UserError(f"member_epochs={self.inference.member_epochs!r}: epochs run from 1 to {self.epochs}")


def eva_x(task: str) -> Recipe:
    """EVA-X-B at 448 px, everything fine-tuned with layer-wise learning rates.

    Command: `accelerate launch -m cxrdist.train --div b`
    Published: 2 x T4, fp16, B 57.7 min an epoch (31.3 images/s), A 62.2 (28.8).
    Train loss by epoch: B .1086 .0982 .0947 .0915 .0879 .0831; A .1092 .0988 .0952 .0919 .0883 .0838.
    `cls_token` and `pos_embed` are in no group of the published run: never updated. In float32 the weight decay of
    every row is too small to change a weight; the rows are kept as published.
    """
    layer_lrs = (("[0-3]", 1e-6), ("[45]", 5e-6), ("[67]", 1e-5), ("[89]", 3e-5), ("1[01]", 5e-5))
    return Recipe(
        name="eva_x",
        model="eva_x",
        image_size=448,
        epochs=6,
        seed={"a": 48, "b": 22}.get(task, DEFAULT_SEED),
        global_batch_size=PUBLISHED_BATCH,
        groups=(
            Group(pattern=r"^(cls_token|pos_embed)$", lr=None),
            Group(pattern=r"^(patch_embed|rope)\.", lr=1e-6, weight_decay=1e-6),
            *(Group(pattern=rf"^blocks\.{layers}\.", lr=lr, weight_decay=1e-4) for layers, lr in layer_lrs),
            Group(pattern=r"^fc_norm\.", lr=5e-5, weight_decay=1e-4),
            Group(pattern=r"^head\.", lr=8e-5, weight_decay=0.0),
        ),
        ema_decay=0.9997,
        inference=Inference(views=PUBLISHED_VIEWS),
    )


def chexfound(task: str) -> Recipe:
    """CheXFound ViT-L/16 at 512 px, frozen, with a trained GLoRI head.

    Command: `accelerate launch -m cxrdist.train --div b --model chexfound`
    Published: 2 x T4, fp16, 172-174 min an epoch (10.4 images/s).
    Train loss by epoch: B .1082 .0992 .0976 .0961 .0949 .0939; A .1096 .0999 .0982 .0966 .0954 .0944.
    """
    return Recipe(
        name="chexfound",
        model="chexfound",
        image_size=512,
        epochs=6,
        seed={"a": 42, "b": 32}.get(task, DEFAULT_SEED),
        global_batch_size=PUBLISHED_BATCH,
        groups=(Group(pattern=r"^backbone\.", lr=None), Group(pattern=r"^glori\.", lr=2e-4, weight_decay=1e-5)),
        ema_decay=0.99967,
    )


def eva_x_224(task: str) -> Recipe:
    """The third member that the published team tried and dropped: EVA-X-B at 224 px."""
    return dataclasses.replace(eva_x(task), name="eva_x_224", image_size=224)


def _demo(recipe: Recipe, **changes: Any) -> Recipe:
    changes |= {
        "global_batch_size": 16,
        "lr_schedule": "cosine",
        "clip_grad_norm": 1.0,
        "augment": AUGMENTS["crop_flip"],
    }
    return dataclasses.replace(recipe, ema_decay=0.98, ema_ramp=True, **changes)


def demo_eva_x(task: str) -> Recipe:
    """EVA-X-Ti cut to six blocks, from random weights, on the demo's phantoms: about a minute on two CPU cores.

    Command: `cxrdist demo`. Held-out macro AUROC 0.92 on phantoms.
    From random weights the published learning rates learn nothing; steps matter more than pixels or depth.
    """
    return _demo(
        eva_x(task),
        name="demo_eva_x",
        model="eva_x_tiny",
        image_size=112,
        epochs=30,
        groups=(Group(pattern=r"", lr=5e-4, weight_decay=0.02),),
        warmup_steps=40,
        model_kwargs=(("depth", 6),),
        inference=Inference(views=PUBLISHED_VIEWS, member_epochs=(29, 30)),
    )


def demo_chexfound(task: str) -> Recipe:
    """A four-block random frozen backbone with a trained GLoRI head, on the demo's phantoms: a minute on two CPU cores.

    Command: `cxrdist demo`. Held-out macro AUROC 0.86 on phantoms.
    LayerScale is 1: at its usual 1e-5 the random blocks pass the patch embedding on unchanged.
    """
    return _demo(
        chexfound(task),
        name="demo_chexfound",
        image_size=160,
        epochs=36,
        groups=(Group(pattern=r"^backbone\.", lr=None), Group(pattern=r"^glori\.", lr=1e-3, weight_decay=1e-5)),
        warmup_steps=20,
        model_kwargs=(("decoder_dim", 192), ("depth", 4), ("embed_dim", 192), ("init_values", 1.0), ("num_heads", 3)),
        inference=Inference(member_epochs=(35, 36)),
    )


def demo_convnet(task: str) -> Recipe:
    """A ConvNeXt of 3.7 million weights, from random ones, on the demo's phantoms.

    Command: `cxrdist demo --folds`. A member of another kind than the published pair.
    """
    return _demo(
        plain("timm:convnext_atto", task, 96, frozen="", layers=True),
        name="demo_convnet",
        epochs=24,
        groups=(Group(pattern=r"", lr=1e-3, weight_decay=0.02),),
        layer_decay=None,
        warmup_steps=40,
        inference=Inference(member_epochs=(23, 24)),
    )


def eva_x_small(task: str) -> Recipe:
    """EVA-X-S with the published recipe of EVA-X-B."""
    return dataclasses.replace(eva_x(task), name="eva_x_small", model="eva_x_small")


def eva_x_tiny(task: str) -> Recipe:
    """EVA-X-Ti with the published recipe of EVA-X-B."""
    return dataclasses.replace(eva_x(task), name="eva_x_tiny", model="eva_x_tiny")


def rad_dino(task: str) -> Recipe:
    """RAD-DINO ViT-B/14 at 518 px, frozen, with a trained GLoRI head: the recipe of CheXFound on another encoder.

    Command: `accelerate launch -m cxrdist.train --div b --model rad_dino`
    Not a published result.
    """
    return dataclasses.replace(chexfound(task), name="rad_dino", model="rad_dino", image_size=518)


FULL_SIZE = (eva_x, chexfound, eva_x_224, eva_x_small, eva_x_tiny, rad_dino)
RECIPES: dict[str, Callable[[str], Recipe]] = {
    function.__name__: function for function in (*FULL_SIZE, demo_eva_x, demo_chexfound, demo_convnet)
}
MIN_STEPS, MAX_EPOCHS, MAX_WARMUP = 1000, 100, 500  # of `fitted`


def plain(model: str, task: str, image_size: int, *, frozen: str, layers: bool) -> Recipe:
    """The recipe of `--model FAMILY:NAME`: common practice for fine-tuning, not a published result.

    frozen: prefix of its frozen encoder, whose head is then trained as CheXFound's; '': all of it is trained.
    layers: whether it says the order of its layers, which lower ones' learning rates follow.
    """
    base = chexfound(task) if frozen else eva_x(task)
    recipe = dataclasses.replace(
        base,
        name=model.replace(":", "_"),
        model=model,
        image_size=image_size,
        inference=Inference(views=PUBLISHED_VIEWS),
    )
    if frozen:
        groups = (Group(pattern=f"^{re.escape(frozen)}", lr=None), *base.groups[1:])
        recipe = dataclasses.replace(recipe, groups=groups)
    else:
        recipe = dataclasses.replace(
            recipe,
            groups=(Group(pattern="", lr=2e-4, weight_decay=0.05),),
            layer_decay=0.75 if layers else None,
            decay_vectors=False,
            lr_schedule="cosine",
            warmup_steps=MAX_WARMUP,
            clip_grad_norm=1.0,
            drop_rate=0.0,
        )
    return recipe


def recipe_for(model: str, task: str, num_images: int | None = None) -> Recipe:
    """The recipe that `--model` stands for, with the seed published for that task; UserError for an unknown name.

    num_images: of the set that is trained on; a full-size recipe is `fitted` to it, except for the published tasks.
    """
    if model not in RECIPES:
        raise UserError(f"--model {model!r} is unknown; one of {', '.join(RECIPES)}")
    recipe = RECIPES[model](task)
    published = task in LAYOUTS or RECIPES[model] not in FULL_SIZE
    return recipe if published or num_images is None else fitted(recipe, num_images)


def fitted(recipe: Recipe, num_images: int) -> Recipe:
    """A full-size recipe for a set of another size than the 107,000 images it was made for.

    At least 1,000 steps (and at most 100 epochs for them), a warm-up over a twentieth of the steps, and an EMA that
    ramps and spans a tenth of them: the published decay would leave 87 % of the random head after 474 steps.
    """
    steps = -(-num_images // recipe.global_batch_size)
    epochs = max(recipe.epochs, min(MAX_EPOCHS, -(-MIN_STEPS // steps)))
    total = steps * epochs
    return dataclasses.replace(
        recipe,
        epochs=epochs,
        warmup_steps=min(MAX_WARMUP, total // 20),
        ema_decay=min(recipe.ema_decay, max(0.0, 1.0 - 10.0 / total)),
        ema_ramp=True,
        inference=dataclasses.replace(recipe.inference, member_epochs=(epochs - 1, epochs)),
    )


def initial_share(recipe: Recipe, num_steps: int) -> float:
    """How much of the EMA is still the weights that the run began with, after that many optimizer steps, in [0, 1]."""
    if not recipe.ema_ramp:
        return recipe.ema_decay**num_steps
    return math.prod(min(recipe.ema_decay, (1 + step) / (10 + step)) for step in range(num_steps))


def ema_warning(recipe: Recipe, num_steps: int) -> str:
    """One line when the average would hardly be of what was learned; else ''."""
    if (share := initial_share(recipe, num_steps)) <= MAX_INITIAL_SHARE:
        return ""
    ema = f"the EMA (decay {recipe.ema_decay:g}) is still {share:.0%} of the first weights"
    return f"after {num_steps:,} steps {ema}: train longer, or --set ema_ramp=true with a smaller ema_decay"


def with_scaled_lrs(recipe: Recipe, ratio: float, rule: Rule) -> Recipe:
    """The recipe with its learning rates times `ratio` (of global batches) or its root; unchanged for "none"."""
    if rule == "none" or ratio == 1.0:
        return recipe
    factor = ratio if rule == "linear" else ratio**0.5
    groups = (dataclasses.replace(group, lr=group.lr and group.lr * factor) for group in recipe.groups)
    return dataclasses.replace(recipe, groups=tuple(groups))


def with_largest_lr(recipe: Recipe, lr: float) -> Recipe:
    """The recipe with `lr` as the largest learning rate of its rows and the others in proportion, as published.

    Raises UserError for a rate that is not above 0, or a recipe of which nothing is trained.
    """
    lrs = [group.lr for group in recipe.groups if group.lr]
    if not lrs:
        raise UserError(f"--lr {lr:g}: no row of recipe {recipe.name} has a learning rate above 0")
    if not 0 < lr <= MAX_LR:
        raise UserError(f"--lr {lr:g} is not possible: give a number above 0 and at most {MAX_LR:,}, e.g. --lr 1e-4")
    largest = max(lrs)
    if lr == largest:
        return recipe
    groups = (dataclasses.replace(group, lr=group.lr and lr * (group.lr / largest)) for group in recipe.groups)
    return dataclasses.replace(recipe, groups=tuple(groups))


def summary(recipe: Recipe) -> str:
    """The recipe in one line: model and size, epochs, global batch, learning rates, loss, EMA, augmentation by name."""
    lrs = sorted({group.lr for group in recipe.groups if group.lr})
    rates = "lr none" if not lrs else f"lr {lrs[0]:g}" + (f" to {lrs[-1]:g}" if len(lrs) > 1 else "")
    decay = "" if recipe.layer_decay is None else f", x {recipe.layer_decay:g} a layer down"
    whole = next((name for name, steps in AUGMENTS.items() if steps == recipe.augment), "")
    steps = whole or ", ".join(dict.fromkeys(each.name for each in recipe.augment))
    epochs = f"{recipe.epochs} epoch{'s' if recipe.epochs > 1 else ''}"
    return (
        f"recipe {recipe.name}: {recipe.model} at {recipe.image_size} px, {epochs}, "
        f"{recipe.global_batch_size} images a step; {rates} ({recipe.lr_schedule}{decay}); loss {recipe.loss}; "
        f"EMA {recipe.ema_decay:.6g}{' with a ramp' if recipe.ema_ramp else ''}; augmentation: {steps}"
    )


def to_json(recipe: Recipe) -> str:
    """The recipe as JSON text; floats survive the round trip exactly."""
    return json.dumps({"format_version": FORMAT_VERSION} | dataclasses.asdict(recipe), indent=1)


def from_json(content: bytes | str, source: object = "recipe") -> Recipe:
    """The recipe in JSON `content`, of format version 1, too; UserError names `source` and the field that is wrong."""
    return from_json_with_task(content, source)[0]


def was_composed(content: bytes) -> bool:
    """Whether a recipe's JSON is of a version that did the published augmentation in one warp instead of its steps."""
    return bool(json.loads(content).get("augment") == "published")


def from_json_with_task(content: bytes | str, source: object) -> tuple[Recipe, Task | None]:
    """`from_json`, and the task that a recipe of version 1 held; None for a later one."""
    remedy = "it is damaged or of another version of cxrdist"
    try:
        data = json.loads(content)
        version = data.pop("format_version", 1)
        task = TASKS[data.pop("div")] if version == 1 else None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{source} is not a recipe: {remedy}") from None
    if isinstance(data.get("augment"), str):  # as every cxrdist wrote it that composed the steps into one warp
        steps, holes = AUGMENTS.get(data["augment"]), data.pop("holes", "as_run")
        if steps is None or holes not in ("as_run", "as_asked"):
            raise UserError(f"{source}: augment={data['augment']!r}, holes={holes!r} is not valid; {remedy}")
        steps = tuple(HOLES_AS_ASKED if each is HOLES and holes == "as_asked" else each for each in steps)
        data["augment"] = [dataclasses.asdict(each) for each in steps]
    if version == 1:
        data["inference"] = {name: data.pop(name) for name in ("views", "member_epochs") if name in data}
    elif version != FORMAT_VERSION:
        raise UserError(f"{source}: format version {version!r}, this cxrdist reads {FORMAT_VERSION}")
    try:
        return Recipe.from_json(json.dumps(data), source), task
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None


def with_overrides(recipe: Recipe, overrides: list[str]) -> Recipe:
    """The recipe with `field=value` texts applied, each typed from its field; tuples are written with commas.

    `global_batch_size` also makes `ema_decay` decay^(new / old), unless that is set too: the EMA spans as many images.
    A decay made for 64 images a step would leave 83 % of the initial weights after 6 epochs at 1024.
    `augment` is edited as `with_augment` says.
    `epochs` also moves `member_epochs`, unless they are set too: what is averaged stays the end of the run.
    Raises UserError for an unknown field, a value of another type, or a field that is not one value.
    """
    edits = [text.removeprefix("augment=") for text in overrides if text.startswith("augment=")]
    overrides = [text for text in overrides if not text.startswith("augment=")]
    recipe = with_augment(recipe, edits)
    data: dict[str, Any] = dataclasses.asdict(recipe)
    homes = {name: data for name in data if name not in ("groups", "inference", "augment")}
    homes |= dict.fromkeys(data["inference"], data["inference"])
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: write it as FIELD=VALUE, e.g. --set ema_decay=0.9995")
        if name not in homes:
            close = difflib.get_close_matches(name, homes, n=1)
            meant = f"did you mean {close[0]}?" if close else "`cxrdist recipes NAME` lists them with what they are"
            meant = "learning rates: --lr X" if name in ("lr", "groups") else meant
            raise UserError(f"--set {name}: no such recipe field; {meant}")
        parts: Any = value
        if name == "model_kwargs":
            parts = sorted(part.split("=" if "=" in part else ":", 1) for part in value.split(",") if part)
        elif isinstance(homes[name][name], tuple | list):  # a list where it was overridden before
            parts = value.split(",")
        homes[name][name] = None if value.lower() == "none" else parts
    names = {text.partition("=")[0] for text in overrides}
    if "epochs" in names and "member_epochs" not in names and str(data["epochs"]).isdecimal():
        later = int(data["epochs"]) - recipe.epochs
        data["inference"]["member_epochs"] = sorted({max(1, n + later) for n in recipe.inference.member_epochs})
    changed = Recipe.from_json(json.dumps(data), " ".join(f"--set {text}" for text in overrides), strict=False)
    if "global_batch_size" in names and "ema_decay" not in names:
        scale = changed.global_batch_size / recipe.global_batch_size
        return dataclasses.replace(changed, ema_decay=recipe.ema_decay**scale)
    return changed


def with_augment(recipe: Recipe, edits: list[str]) -> Recipe:
    """The recipe with its augmentation changed, edit by edit.

    `published`, `crop_flip` or `none` takes all steps of that name; `+NAME:arg=value,p=0.2` adds a step at the end,
    `-NAME` removes it, `NAME:arg=value` changes its numbers.

    Raises UserError for an edit that is not written so, or names a step that the recipe does not have.
    """
    steps = list(recipe.augment)
    for edit in edits:
        flag = f"--augment {edit}"
        if edit in AUGMENTS:
            steps = list(AUGMENTS[edit])
            continue
        sign = edit[:1] if edit[:1] in "+-" else ""
        name, _, text = edit.removeprefix(sign).partition(":")
        places = [place for place, each in enumerate(steps) if each.name == name]
        if sign != "+" and not places:
            there = ", ".join(dict.fromkeys(each.name for each in steps)) or "none"
            hint = "" if sign else f"; to add one: +{edit}" if name else ""
            raise UserError(f"{flag}: the recipe has no step {name!r}; it has {there}{hint}")
        if sign == "-":
            if text:
                raise UserError(f"{flag}: to remove a step write -{name}")
            steps = [each for each in steps if each.name != name]
            continue
        args = _step_arguments(text, flag)
        before = Step(name=name) if sign else steps[places[0]]
        merged = dict(before.args) | {key: value for key, value in args.items() if key != "p"}
        data = {"name": name, "p": args.get("p", before.p), "args": sorted(merged.items())}
        changed = Step.from_json(json.dumps(data), flag, strict=False)
        if sign:
            steps.append(changed)
        else:
            steps[places[0]] = changed
    return dataclasses.replace(recipe, augment=tuple(steps))


def _step_arguments(text: str, flag: str) -> dict[str, StepValue]:
    """The values of `name=value,name=(value, value)`; one that is no Python number, list or truth value is a text."""
    found: dict[str, StepValue] = {}
    for part in re.split(r",(?![^(\[]*[)\]])", text) if text else ():
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise UserError(
                f"{flag}: write numbers as NAME=VALUE after a colon, e.g. +RandomGaussianNoise:std=0.03,p=0.2"
            )
        try:
            found[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found[name.strip()] = value.strip()
    return found


def differences(old: Recipe, new: Recipe) -> list[str]:
    """`field: old -> new` for every field of what is learned in which two recipes differ; empty when equal."""
    pairs = [(f.name, getattr(old, f.name), getattr(new, f.name)) for f in dataclasses.fields(Recipe) if f.compare]
    return [f"{name}: {before!r} -> {after!r}" for name, before, after in pairs if before != after]
