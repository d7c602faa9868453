"""What one training step moves through memory, operator by operator, on tensors that have shapes and no values.

Nothing is computed, so a full-size step counts in seconds on any machine. Autocast casts what it casts on a GPU.
An operator counts as one kernel that reads each of its inputs and writes each of its results once; a view, or memory
that is only reserved, counts as none. Fused attention and AdamW are one operator each.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cxrdist.distributed.precision import DTYPES, autocast
from cxrdist.models import architecture_of
from cxrdist.recipes import Recipe
from cxrdist.training.ema import Ema
from cxrdist.training.losses import make_criterion
from cxrdist.training.optim import INITIAL_LOSS_SCALE, GuardedAdamW, lr_factors, param_groups

MATMUL, CAST, OTHER = "matmul and attention", "casts", "other"
MATMULS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "linear", "_scaled_dot_product")
ONLY_WRITTEN = ("copy_", "fill_", "zero_")  # what their first argument held is not read


@dataclass
class Traffic:
    """Kernels and bytes read and written, by kind; and the bytes of what is no matmul by operator."""

    kernels: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)
    by_operator: Counter[str] = field(default_factory=Counter)

    @property
    def no_matmul_bytes(self) -> int:
        """What a GPU's memory, not its arithmetic, decides the time of."""
        return self.num_bytes[CAST] + self.num_bytes[OTHER]


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds every operator inside to `traffic`."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traffic = traffic

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._opname
        result = func(*args, **(kwargs or {}))
        if func.namespace != "aten" or name.startswith("empty"):
            return result
        written, read = _written_and_read(func, args, kwargs or {})
        known = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        written += [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in known]
        if not written:  # a view
            return result
        is_cast = name in ("_to_copy", "copy_") and written[0].dtype not in {tensor.dtype for tensor in read}
        kind = MATMUL if name.startswith(MATMULS) else CAST if is_cast else OTHER
        num_bytes = sum(map(_size, (*read, *written)))
        self.traffic.kernels[kind] += 1
        self.traffic.num_bytes[kind] += num_bytes
        if kind != MATMUL:
            self.traffic.by_operator[name] += num_bytes
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _written_and_read(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors among an operator's arguments that it writes, and those that it reads; in place is both."""
    written: list[Tensor] = []
    read: list[Tensor] = []
    for place, spec in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(spec.name)
        in_place = spec.alias_info is not None and spec.alias_info.is_write
        written += _tensors(value) if in_place else []
        read += [] if spec.is_out or (in_place and func._opname in ONLY_WRITTEN) else _tensors(value)
    return written, read


def _size(tensor: Tensor) -> int:
    """Bytes in memory; what is expanded is read once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * math.prod(size for size, stride in sizes if stride or not size)


class GpuNorms(TorchFunctionMode):
    """Inside, LayerNorm under autocast works in float32, as on a GPU; a CPU's autocast leaves it as it comes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return func(*args, **(kwargs or {}))


def count_step(recipe: Recipe, num_labels: int, batch_size: int, precision: str) -> Traffic:
    """Forward, loss, backward, optimizer and EMA of one step of `batch_size` images, after the first one.

    The augmentation is left out: it is the same in every precision and for every model.
    """
    architecture, device = architecture_of(recipe.model), torch.device("cpu")
    with torch.device("meta"):
        model = architecture.build(recipe.image_size, num_labels, recipe.drop_rate, **dict(recipe.model_kwargs))
        architecture.hold_frozen(model, DTYPES[precision])
    targets = (np.arange(batch_size * num_labels).reshape(batch_size, num_labels) % 2).astype(np.float32)
    criterion = make_criterion(recipe, targets, device)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model.to_empty(device=device).train()
        ema = Ema(model, recipe.ema_decay, recipe.ema_ramp, frozenset(architecture.frozen_names(model)))
        images = torch.empty(batch_size, 3, recipe.image_size, recipe.image_size)
        wanted = mode.from_tensor(torch.from_numpy(targets))
    optimizer = GuardedAdamW(
        param_groups(model, recipe.groups),
        betas=recipe.betas,
        factors=lr_factors(recipe.lr_schedule, 2, recipe.warmup_steps),
        clip_grad_norm=recipe.clip_grad_norm,
        loss_scale=INITIAL_LOSS_SCALE if precision == "fp16" else None,
    )
    with mode, GpuNorms():
        for _ in range(2):  # the first one makes the optimizer's moments, too
            with Counting(traffic := Traffic()):
                with autocast(precision, device):
                    logits = model(images)
                optimizer.backward(criterion(logits, wanted)["total"], 1.0)
                ema.update(optimizer.step())
    return traffic
