"""Forward passes of both models against the code people use today: CheXFound with plain attention, timm's own EVA-X.

Same weights, same images, eval mode, no gradient; each pair's outputs are compared first. On a CPU the speeds are
images per core-second (steady while others use the machine), on a GPU images per second.
"""

import argparse
import contextlib
import copy
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional as F

from cxrdist.bench.timing import Row, interleaved, rows_of
from cxrdist.errors import UserError
from cxrdist.models import architecture_of
from cxrdist.models.chexfound import RELEASED_QUERIES, CheXFound
from cxrdist.models.glori import NUM_HEADS, DecoderLayer, GLoRI
from cxrdist.task import TASKS

IMAGE_SIZES = {"chexfound": 512, "eva_x": 448}
NUM_BLOCKS = {"chexfound": 24, "eva_x": 12}
NUM_LABELS = TASKS["b"].num_labels
LARGEST_DIFFERENCE = {"fp32": 1e-4, "bf16": 0.1}  # of logits; both orders of summation are right


def add_arguments(parser: argparse.ArgumentParser) -> None:
    every = tuple(IMAGE_SIZES)
    what = f"of {', '.join(every)} (default: all)"
    parser.add_argument("--models", nargs="+", choices=every, default=list(every), metavar="NAME", help=what)
    parser.add_argument("--depth", type=int, metavar="N", help="only the first N blocks (the width stays; default all)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images a forward pass (default 1)")
    parser.add_argument(
        "--image-size", type=int, metavar="PX", help="model size (default: 512 for chexfound, 448 for eva_x)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed turns of each variant (default 5)")
    kinds = ("fp32", "bf16")
    both = "of the passes (default: both)"
    parser.add_argument("--precisions", nargs="+", choices=kinds, default=list(kinds), help=both)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, metavar="NAME", help="cpu or cuda")


def run(args: argparse.Namespace) -> list[Row]:
    """One row per model, precision and variant; `x baseline` is the speed against today's code."""
    if min(args.batch_size, args.rounds, args.depth or 1) < 1:
        raise UserError("--batch-size, --rounds and --depth must be at least 1")
    device = torch.device(args.device)
    return [row for name in args.models for row in _compare(name, args, device)]


def _compare(name: str, args: argparse.Namespace, device: torch.device) -> list[Row]:
    depth = min(args.depth or NUM_BLOCKS[name], NUM_BLOCKS[name])
    size = args.image_size or IMAGE_SIZES[name]
    torch.manual_seed(0)
    queries = {"num_queries": RELEASED_QUERIES} if name == "chexfound" else {}
    ours: Any = architecture_of(name).build(size, NUM_LABELS, depth=depth, **queries).eval().to(device)
    theirs: nn.Module
    if name == "chexfound":
        # random LayerScale of 1e-5 would hide any difference between the two attentions
        for key, parameter in ours.backbone.named_parameters():
            if key.endswith(".gamma"):
                parameter.data.fill_(0.6)
        theirs, label = _as_official(ours).to(device), "plain attention, as in the official code"
    else:
        theirs, label = _timms_own(ours, size, depth).to(device), "timm's own Eva"
    images = torch.randn(args.batch_size, 3, size, size, device=device)
    rows = []
    for precision in args.precisions:
        variants = {label: _forward(theirs, images, precision), "ours": _forward(ours, images, precision)}
        difference = (variants[label]() - variants["ours"]()).abs().max().item()
        if difference > LARGEST_DIFFERENCE[precision]:
            raise RuntimeError(f"{name}: ours and {label} differ by {difference} in {precision}")
        clock = time.process_time if device.type == "cpu" else time.perf_counter
        speeds = interleaved(
            {variant: _counted(forward, device) for variant, forward in variants.items()},
            rounds=args.rounds,
            clock=clock,
            warm_up=False,
        )
        note = f"{depth} of {NUM_BLOCKS[name]} blocks, batch {args.batch_size}, logits within {difference:.1g}"
        rows += rows_of(f"{name} {size}px {precision}", speeds, baseline=label, notes={"ours": note})
    return rows


class _OfficialHead(nn.Module):
    """The head as the official code runs it: all 40 queries, `nn.MultiheadAttention` on (N, B, D) with its maps."""

    def __init__(self, glori: GLoRI) -> None:
        super().__init__()
        self.glori, self.layer = glori, cast(DecoderLayer, glori.layers[0])
        own = self.layer.multihead_attn
        self.attention = nn.MultiheadAttention(own.out_proj.out_features, NUM_HEADS)
        self.attention.load_state_dict(own.state_dict())

    def forward(self, features: Tensor) -> Tensor:
        glori, layer = self.glori, self.layer
        tokens = F.relu(glori.embed_standart(features)).transpose(0, 1)
        queries = layer.start(glori.query_embed.weight[:, None].expand(-1, len(features), -1))
        gathered, _ = self.attention(queries, tokens, tokens, average_attn_weights=False)
        states = layer.norm2(queries + gathered)
        states = layer.norm3(states + layer.linear2(F.relu(layer.linear1(states))))
        logits = torch.einsum("qbd,qd->bq", states, glori.duplicate_pooling[:, :, 0])[:, : glori.num_classes]
        return logits + glori.duplicate_pooling_bias


def _as_official(model: CheXFound) -> CheXFound:
    """A copy with the official head, whose backbone multiplies q by k, takes the softmax and multiplies by v."""
    official = copy.deepcopy(model)
    for block in official.backbone.blocks:
        block.attn.fused_attn = False  # type: ignore[union-attr,assignment]  # timm's switch, same formula
    official.glori = cast(GLoRI, _OfficialHead(official.glori).eval())
    return official


def _timms_own(model: nn.Module, size: int, depth: int) -> Eva:
    own = Eva(
        img_size=size,
        patch_size=16,
        num_classes=NUM_LABELS,
        embed_dim=768,
        depth=depth,
        num_heads=12,
        qkv_fused=False,
        mlp_ratio=4 * 2 / 3,
        swiglu_mlp=True,
        scale_mlp=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(14, 14),
    )
    own.load_state_dict(model.state_dict())
    return own.eval()


def _forward(model: nn.Module, images: Tensor, precision: str) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        autocast: Any = contextlib.nullcontext()
        if precision == "bf16":
            autocast = torch.autocast(images.device.type, torch.bfloat16)
        with torch.inference_mode(), autocast:
            logits: Tensor = model(images)
        return logits.float()

    return forward


def _counted(forward: Callable[[], Tensor], device: torch.device) -> Callable[[], int]:
    def work() -> int:
        num_images = len(forward())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return num_images

    return work
