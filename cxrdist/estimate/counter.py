"""What a piece of a model does on a GPU, operator by operator, on tensors that have shapes and no values.

Nothing is computed, so a full-size step counts in seconds on any machine. An operator counts as one kernel that reads
each of its inputs and writes each of its results once; a view, or memory that is only reserved, counts as none. Fused
attention and AdamW are one operator each.
"""

import collections
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

MATMUL, CAST, WEIGHT_CAST, OTHER = "matmul and attention", "casts", "casts of weights", "other"
ONLY_WRITTEN = ("copy_", "fill_", "zero_")  # what their first argument held is not read
_SDPA = "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"
FORMULAS: dict[Any, Any] = flop_registry | {  # torch has these for its GPU kernels only
    getattr(torch.ops.aten, _SDPA[1] + end): flop_registry[getattr(torch.ops.aten, _SDPA[0] + end)]
    for end in ("", "_backward")
}


def _convolution_backward(grad: Tensor, images: Tensor, weight: Tensor, *more: Any, out_val: Any) -> int:
    """A forward pass for each of the two gradients that are asked for; torch's forgets that channels have groups."""
    transposed, mask = more[4], more[-1]
    places = (images if transposed else grad).shape[2:]
    flops: int = 2 * len(images) * math.prod(places) * weight.numel() * sum(mask[:2])
    return flops


FORMULAS[torch.ops.aten.convolution_backward] = _convolution_backward


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators inside: FLOPs, and by kind kernels, bytes read and written, and bytes alive and their peak.

    weights: what exists before and is cast once a pass, whatever the batch.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.kernels: collections.Counter[str] = collections.Counter()
        self.traffic: collections.Counter[str] = collections.Counter()
        self.by_operator: collections.Counter[str] = collections.Counter()  # traffic that is no matmul
        self.peaks: collections.Counter[bool] = collections.Counter()  # of casts of weights, and of all else
        self._alive: collections.Counter[bool] = collections.Counter()
        self._weights = {_storage(weight) for weight in weights}
        self._known = set(self._weights)

    @property
    def memory_traffic(self) -> int:
        """Bytes that a GPU's memory, not its arithmetic, decides the time of: all but matmul."""
        return self.traffic.total() - self.traffic[MATMUL]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func._opname
        out = func(*args, **kwargs)
        given, made = {_storage(tensor) for tensor in _tensors((args, kwargs))}, [*_tensors(out)]
        written, read = _written_and_read(func, args, kwargs)
        written += [tensor for tensor in made if _storage(tensor) not in given]
        kind = OTHER
        if (formula := FORMULAS.get(func.overloadpacket)) is not None:
            kind = MATMUL
            self.flops += formula(*args, **kwargs, out_val=out)
        elif name in ("_to_copy", "copy_") and written and written[0].dtype not in {tensor.dtype for tensor in read}:
            kind = WEIGHT_CAST if given <= self._weights else CAST
        if written and func.namespace == "aten" and not name.startswith("empty"):  # else a view, or reserved
            num_bytes = sum(map(_size, (*read, *written)))
            self.kernels[kind] += 1
            self.traffic[kind] += num_bytes
            if kind != MATMUL:
                self.by_operator[name] += num_bytes
        for tensor in made:
            if (key := _storage(tensor)) not in self._known:
                self._known.add(key)
                storage, is_cast = tensor.untyped_storage(), kind == WEIGHT_CAST
                self._grow(storage.nbytes(), is_cast)
                weakref.finalize(storage, self._free, key, storage.nbytes(), is_cast)
        return out

    def _grow(self, size: int, is_cast: bool) -> None:
        self._alive[is_cast] += size
        self.peaks[is_cast] = max(self.peaks[is_cast], self._alive[is_cast])

    def _free(self, key: int, size: int, is_cast: bool) -> None:
        self._known.discard(key)
        self._grow(-size, is_cast)


class GpuNorms(TorchFunctionMode):
    """Inside, LayerNorm under autocast works in float32, as on a GPU; a CPU's autocast leaves it as it comes."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


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
