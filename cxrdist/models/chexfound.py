"""CheXFound: a frozen DINOv2-style ViT (timm's `VisionTransformer`) under a trained GLoRI head.

The backbone really is frozen: no gradient, always in eval mode, run without a graph, stored nowhere with the head.
Differences to the official module are settled when weights are read: the class token's position row is added to the
class token, the mask token is dropped. Source: RPIDIAL/CheXFound; 304,630,016 parameters there, 304,627,968 here.

Shapes: B batch, N patches, D backbone width, F = 4 D, C classes, H heads.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from timm.layers.mlp import SwiGLUPacked
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import cxrdist.models.architecture as base
from cxrdist.errors import UserError
from cxrdist.models.architecture import Architecture, Recognised, Size, Tensors
from cxrdist.models.glori import GLoRI
from cxrdist.models.lean import LeanBlock, LeanNorm

NUM_BLOCKS_READ = 4  # the features are the patch tokens of the last four blocks
RELEASED_QUERIES = 40  # classes of the released head, kept by the published run
TEACHER_FILE, GLORI_FILE, RESULTS_FILE = "teacher_checkpoint.pth", "glori.pth", "results_eval_linear.json"
POS_EMBED_OFFSET = 0.1  # DINOv2's guard against rounding, part of the sampling positions
CLASSIFIER = re.compile(r"(?:glori\.)?classifiers_dict\.(?:(.+?)\.decoder\.(.+))?")
_NOT_OURS: Any = ("in_chans", "global_pool")  # timm adds them for every model
_CFG = base.timm_cfg(512, num_classes=RELEASED_QUERIES, first_conv="backbone.patch_embed.proj", classifier="glori")
default_cfgs = generate_default_cfgs({"chexfound_vitl16_glori": _CFG})


class CheXFound(nn.Module):
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
        super().__init__()
        swiglu_hidden = (int(embed_dim * 4 * 2 / 3) + 7) // 8 * 8  # DINOv2 rounds up to a multiple of 8
        self.num_classes = num_classes
        self.backbone = VisionTransformer(
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
        self.backbone.requires_grad_(False)
        self.backbone.eval()
        self.glori = GLoRI(
            in_dim=NUM_BLOCKS_READ * embed_dim,
            num_classes=num_classes,
            num_queries=num_classes if num_queries is None else num_queries,
            dim=decoder_dim,
            drop_rate=drop_rate,
        )

    def train(self, mode: bool = True) -> "CheXFound":
        """As `nn.Module.train`, for the head only: the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, N, F): patch tokens of the last four blocks, each through the final norm, side by side.

        float32, or under autocast its dtype.
        """
        tokens: Any = self.backbone.forward_intermediates(
            images, indices=NUM_BLOCKS_READ, norm=True, output_fmt="NLC", intermediates_only=True
        )
        return torch.cat(tokens, dim=-1)

    def head_logits(self, features: Tensor) -> Tensor:
        """(B, C) logits of what `features` returned."""
        logits: Tensor = self.glori(features)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """(B, C) logits of normalised images (B, 3, S, S)."""
        return self.head_logits(self.features(images))

    def attention(self, images: Tensor) -> Tensor:
        """(B, H, C, N) attention of each class's query over the patches (row-major), per head."""
        return self.glori.attention(self.features(images))


@register_model
def chexfound_vitl16_glori(pretrained: bool = False, **kwargs: Any) -> CheXFound:
    """The published structure, random init: ViT-L/16 at `img_size` (512), 40 queries, the first `num_classes` used.

    There are more queries only where there are more classes.
    """
    kwargs = {"num_queries": max(RELEASED_QUERIES, kwargs.get("num_classes", RELEASED_QUERIES))} | kwargs
    return build_model_with_cfg(CheXFound, "chexfound_vitl16_glori", pretrained, kwargs_filter=_NOT_OURS, **kwargs)


def resize_pos_embed(pos_embed_1ND: Tensor, grid: tuple[int, int]) -> Tensor:
    """DINOv2's rule for another input size: bicubic without antialias, by the factor (new + 0.1) / old.

    torch samples by that very factor; asking for the output size instead moves values by up to 0.39 (512 to 448 px).

    pos_embed_1ND: (1, n * n, D) float32 of a square grid, without a row for the class token. Returns (1, rows *
    columns, D), the same tensor where the grid (rows, columns of patches) is the same already.
    """
    side = round(pos_embed_1ND.shape[1] ** 0.5)
    if (side, side) == grid:
        return pos_embed_1ND
    old_1DHW = pos_embed_1ND.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = ((grid[0] + POS_EMBED_OFFSET) / side, (grid[1] + POS_EMBED_OFFSET) / side)
    new_1DHW = F.interpolate(old_1DHW, scale_factor=factors, mode="bicubic", antialias=False)
    assert new_1DHW.shape[-2:] == grid
    return new_1DHW.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)


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


def _hold(model: CheXFound, dtype: torch.dtype) -> None:
    for module in model.backbone.modules():
        if isinstance(module, LeanBlock) and module.held is None:
            module.hold(dtype)
    model.backbone.patch_embed.to(dtype)


def _idle(model: CheXFound) -> int:
    """Queries and outputs beyond the classes."""
    queries = model.glori.query_embed.weight
    return 2 * (len(queries) - model.num_classes) * queries.shape[1]


ARCHITECTURE = Architecture(
    name="chexfound",
    create=_create,
    sizes=("embed_dim", "depth", "num_heads", "init_values", "decoder_dim", "num_queries"),
    multiple_of=16,
    frozen="backbone.",
    hold=_hold,
    head="glori.",
    official=base.OfficialFiles(
        (TEACHER_FILE, GLORI_FILE),
        "the Google Drive folder linked from https://github.com/RPIDIAL/CheXFound (which has no licence file: ask its "
        "authors before you pass weights on)",
        beside={GLORI_FILE: RESULTS_FILE},
    ),
    recognise=recognise,
    fit=_fit,
    position="backbone.pos_embed",
    saliency=base.attention_maps,
    saliency_title="GLoRI attention",
    saliency_about="Where the finding's own query looks (mean over heads).",
    features=CheXFound.features,
    head_logits=CheXFound.head_logits,
    idle=_idle,
)
