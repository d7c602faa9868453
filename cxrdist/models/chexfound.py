"""CheXFound: a frozen DINOv2-style ViT (timm's `VisionTransformer`) under a trained GLoRI head.

Differences to the official module are settled when weights are read: the class token's position row is added to the
class token, the mask token is dropped. Source: RPIDIAL/CheXFound; 304,630,016 parameters there, 304,627,968 here.

Shapes: B batch, C classes.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from timm.layers.mlp import SwiGLUPacked
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import cxrdist.models.architecture as base
from cxrdist.errors import UserError
from cxrdist.models.architecture import Architecture, Recognised, Size, Tensors
from cxrdist.models.frozen import FAMILY, FrozenEncoder, hold, resize_pos_embed
from cxrdist.models.lean import LeanBlock, LeanNorm

RELEASED_QUERIES = 40  # classes of the released head, kept by the published run
TEACHER_FILE, GLORI_FILE, RESULTS_FILE = "teacher_checkpoint.pth", "glori.pth", "results_eval_linear.json"
CLASSIFIER = re.compile(r"(?:glori\.)?classifiers_dict\.(?:(.+?)\.decoder\.(.+))?")
_NOT_OURS: Any = ("in_chans", "global_pool")  # timm adds them for every model
_CFG = base.timm_cfg(512, num_classes=RELEASED_QUERIES, first_conv="backbone.patch_embed.proj", classifier="glori")
default_cfgs = generate_default_cfgs({"chexfound_vitl16_glori": _CFG})


class CheXFound(FrozenEncoder):
    """(B, 3, S, S) float32 images to (B, C) logits; random init. Defaults are the published sizes.

    `num_queries`: `num_classes`, where not given; the published structure has 40. `drop_rate` is the head's.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 512,
        num_classes: int = RELEASED_QUERIES,
        drop_rate: float = 0.1,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        init_values: float = 1e-5,
        decoder_dim: int = 768,
        num_queries: int | None = None,
    ) -> None:
        swiglu_hidden = (int(embed_dim * 4 * 2 / 3) + 7) // 8 * 8  # DINOv2 rounds up to a multiple of 8
        backbone = VisionTransformer(
            img_size=img_size,
            patch_size=16,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            init_values=init_values,
            mlp_layer=SwiGLUPacked,  # type: ignore[arg-type]  # a partial, as timm's own models pass it
            mlp_ratio=(2 * swiglu_hidden + 0.5) / embed_dim,  # timm truncates: half a unit keeps it from one too few
            act_layer=nn.SiLU,
            norm_layer=LeanNorm,
            block_fn=LeanBlock,
            reg_tokens=4,
            no_embed_class=True,
            num_classes=0,
        )
        super().__init__(backbone, num_classes, drop_rate, decoder_dim, num_queries)


@register_model
def chexfound_vitl16_glori(pretrained: bool = False, **kwargs: Any) -> CheXFound:
    """The published structure, random init: ViT-L/16 at `img_size` (512), 40 queries, the first `num_classes` used.

    There are more queries only where there are more classes.
    """
    kwargs = {"num_queries": max(RELEASED_QUERIES, kwargs.get("num_classes", RELEASED_QUERIES))} | kwargs
    return build_model_with_cfg(CheXFound, "chexfound_vitl16_glori", pretrained, kwargs_filter=_NOT_OURS, **kwargs)


def recognise(path: Path, state: Tensors) -> Recognised | None:
    """CheXFound's tensors in our names, from the layouts chexfound_teacher, glori, published_chexfound and cxrdist."""
    has_heads = any(map(CLASSIFIER.match, state))
    official = "backbone.register_tokens" in state
    if not (has_heads or official or any(re.match(r"glori\.|backbone\.reg_token$", name) for name in state)):
        return None
    tensors, notes = _our_names(state) if official else (dict(state), [])
    tensors = {name: tensor for name, tensor in tensors.items() if not CLASSIFIER.match(name)}
    layout = "chexfound_teacher" if official else "cxrdist"
    if has_heads:
        layout = "published_chexfound" if official else "glori"
        head, name = _choose_classifier(path, state)
        tensors |= head
        notes.append(f"classifier {name}")
    return Recognised(layout, tensors, notes)


def _our_names(state: Tensors) -> tuple[Tensors, list[str]]:
    dropped = [name for name in state if re.match(r"backbone\.mask_token$|(dino|ibot)_head\.", name)]
    tensors: Tensors = {}
    for name, tensor in state.items():
        if name not in dropped:
            # blocks.<chunk>.<index over all chunks>: the chunk only says how the official code sharded it
            name = re.sub(r"^backbone\.blocks\.\d+\.(\d+)\.", r"backbone.blocks.\1.", name)
            name = re.sub(r"^(backbone\..*\.mlp\.)w12\.", r"\1fc1.", name)
            name = re.sub(r"^(backbone\..*\.mlp\.)w3\.", r"\1fc2.", name)
            tensors[name.replace("backbone.register_tokens", "backbone.reg_token")] = tensor
    if {"backbone.cls_token", "backbone.pos_embed"} <= tensors.keys():
        # timm's module has no position row for the class token: added to the token itself, once
        position = tensors["backbone.pos_embed"]
        tensors["backbone.cls_token"] = tensors["backbone.cls_token"] + position[:, :1]
        tensors["backbone.pos_embed"] = position[:, 1:]
    return tensors, base.left_out(dropped)


def _choose_classifier(path: Path, state: Tensors) -> tuple[Tensors, str]:
    """The best classifier's tensors as `glori.*`, and its name."""
    classifiers: dict[str, Tensors] = {}
    for name, tensor in state.items():
        if (match := CLASSIFIER.fullmatch(name)) and match[1]:
            classifiers.setdefault(match[1], {})[f"glori.{match[2]}"] = tensor
    results = path.with_name(RESULTS_FILE)
    best = next(iter(classifiers)) if len(classifiers) == 1 else _best_classifier(path, results)
    if best not in classifiers:
        known = f"which {results} names best, only {base.listed(classifiers)}"
        raise UserError(f"{path}: has no classifier {best}, {known}; get both files from the same place")
    return classifiers[best], best


def _best_classifier(path: Path, results: Path) -> str:
    """The name in the last record of the official log; a record is a prefix line, a JSON line and an empty one."""
    if not results.is_file():
        raise UserError(f"{path}: holds several classifiers; put {RESULTS_FILE} beside it, which names the best one")
    lines = results.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        return [str(json.loads(line)["best_classifier"]["name"]) for line in lines if line.startswith("{")][-1]
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{results}: has no record, or one without best_classifier; get it again") from None


def _fit(model: CheXFound, tensors: Tensors, source: str) -> list[str]:
    """Adapt a released head to the model's classes, and the position embedding to its input size.

    Fewer classes, as published: all queries and outputs stay, the first are used, the bias starts at zero. More classes
    than the head has queries: the head is left out.
    """
    notes, classes = [], model.num_classes
    bias = tensors.get("glori.duplicate_pooling_bias")
    if bias is not None and classes < len(bias) == model.glori.query_embed.num_embeddings:
        tensors["glori.duplicate_pooling_bias"] = torch.zeros(classes)
        notes = [f"head of {len(bias)} classes: all queries kept, the first {classes} used, fresh zero bias"]
    elif bias is not None and RELEASED_QUERIES == len(bias) < classes:
        for name in [name for name in tensors if name.startswith("glori.")]:
            del tensors[name]
        notes = [f"head of {len(bias)} classes left out: too few for {classes}"]
    grid = model.backbone.patch_embed.grid_size
    return notes + base.fit_position(tensors, "backbone.pos_embed", grid, resize_pos_embed, source)


def _create(image_size: Size, num_classes: int, drop_rate: float, **sizes: Any) -> Any:
    if sizes:  # only the published sizes carry queries beyond the classes
        sizes.setdefault("num_queries", num_classes)
    return chexfound_vitl16_glori(img_size=image_size, num_classes=num_classes, drop_rate=drop_rate, **sizes)


ARCHITECTURE = Architecture(
    name="chexfound",
    create=_create,
    sizes=("embed_dim", "depth", "num_heads", "init_values", "decoder_dim", "num_queries"),
    multiple_of=16,
    hold=hold,
    official=base.OfficialFiles(
        (TEACHER_FILE, GLORI_FILE),
        "the Google Drive folder linked from https://github.com/RPIDIAL/CheXFound (no licence file)",
        "https://github.com/RPIDIAL/CheXFound has no licence file: ask its authors before you pass weights on",
        beside={GLORI_FILE: RESULTS_FILE},
    ),
    recognise=recognise,
    fit=_fit,
    **FAMILY,
)
