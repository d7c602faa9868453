"""What one image of a recipe costs: FLOPs and memory, counted on its own model with fake tensors.

Fake tensors have shapes and no values, so nothing is computed and every recipe field counts.
"""

import functools
import inspect
import math
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from cxrdist.errors import UserError
from cxrdist.models import architecture_of
from cxrdist.recipes import Recipe
from cxrdist.shards.convert import SIZE_PX

GB = 1e9
RUNTIME_BYTES = {"cuda": 0.8 * GB, "cpu": 0.6 * GB}  # CUDA context and libraries; an imported torch
TRANSIENT = 1.15  # gradients of activations and workspaces on top of what the graph keeps
DECODED_BATCHES = 3  # in flight
FORMULAS = {  # torch has them for its GPU kernels only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: inspect.unwrap(sdpa_flop),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: inspect.unwrap(sdpa_backward_flop),
}


@dataclass(frozen=True)
class Cost:
    """What one image of a recipe costs; counted, not measured."""

    forward_flops: float  # a multiplication and an addition are two
    step_flops: float  # forward and backward
    activation_bytes: float  # kept for the backward pass, with autocast unless fp32
    image_bytes: float  # decoded, uint8
    num_parameters: int
    num_trained: int


@functools.cache
def count_cost(recipe: Recipe, num_labels: int, precision: str = "bf16", size_px: int = SIZE_PX) -> Cost:
    """What an image of a shard set with sides of `size_px` costs on the recipe's model; in seconds, hardly memory."""
    architecture = architecture_of(recipe.model)
    with torch.device("meta"):
        model = architecture.build(recipe.image_size, num_labels, recipe.drop_rate, **dict(recipe.model_kwargs))
    num_images = 2
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        images = torch.empty(num_images, 3, recipe.image_size, recipe.image_size)
        counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32")
        with counter, autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(images)
            forward = counter.get_total_flops()
            logits.float().sum().backward()
        parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return Cost(
        forward_flops=forward / num_images,
        step_flops=counter.get_total_flops() / num_images,
        activation_bytes=sum(size for key, size in saved.items() if key not in parameters) / num_images,
        image_bytes=float(size_px * size_px),
        num_parameters=sum(counts.values()),
        num_trained=sum(counts[name] for name in architecture.trainable_names(model)),
    )


def memory_bytes(cost: Cost, device_batch_size: int, kind: str, num_devices: int) -> float:
    """Peak memory of one device: weights, activations of a device batch, decoded images, and the runtime itself."""
    gradients = 2 if num_devices > 1 else 1  # DDP copies them into buckets
    weights = 4 * (cost.num_parameters + cost.num_trained * (gradients + 3))  # + two Adam moments and the EMA; float32
    images = DECODED_BATCHES * device_batch_size * cost.image_bytes
    return weights + TRANSIENT * cost.activation_bytes * device_batch_size + images + RUNTIME_BYTES[kind]


def checkpoint_bytes(cost: Cost) -> tuple[float, float]:
    """(one epoch checkpoint: model and EMA; one step checkpoint: with both Adam moments), float32."""
    return 8.0 * cost.num_trained, 16.0 * cost.num_trained


def best_device_batch(cost: Cost, global_batch_size: int, kind: str, num_devices: int, free_bytes: float) -> int:
    """The largest device batch that fits and divides a device's share of the global batch; 0 when nothing fits."""
    share = math.ceil(global_batch_size / num_devices)
    sizes = (share // parts for parts in range(1, share + 1) if share % parts == 0)
    return next((size for size in sizes if memory_bytes(cost, size, kind, num_devices) <= free_bytes), 0)


def fitting_batch(
    recipe: Recipe, num_labels: int, precision: str, free_bytes: float, world_size: int, size_px: int = SIZE_PX
) -> int:
    """The largest device batch of a training that fits a GPU's free memory. Raises UserError when not even one does."""
    cost = count_cost(recipe, num_labels, precision, size_px)
    batch = best_device_batch(cost, recipe.global_batch_size, "cuda", world_size, free_bytes)
    if batch == 0:
        need = memory_bytes(cost, 1, "cuda", world_size)
        free = f"the GPU with the least free memory has {free_bytes / GB:.1f} GB"
        remedy = "end what else runs there, or try --grad-checkpointing --device-batch-size 1"
        raise UserError(f"{recipe.name} needs about {need / GB:.1f} GB for one image, and {free}: {remedy}")
    return batch
