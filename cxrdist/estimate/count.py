"""What one image of a recipe costs: FLOPs, memory and its traffic, counted on its own model with fake tensors.

Every recipe field counts. The tensors are the CPU's, since a backward pass on a GPU's needs a driver; autocast differs
between the two in layer norms only.
"""

import contextlib
import functools
import math
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cxrdist.distributed.precision import DTYPES, autocast
from cxrdist.errors import UserError
from cxrdist.estimate.counter import WEIGHT_CAST, Counter, GpuNorms
from cxrdist.models import architecture_of
from cxrdist.recipes import Recipe
from cxrdist.shards.convert import SIZE_PX

GB = 1e9
RUNTIME_BYTES = {"cuda": 0.8 * GB, "cpu": 0.6 * GB}  # CUDA context and libraries; an imported torch
WORKSPACE_BYTES = 0.08 * GB  # of the matrix library, in torch's own allocator
DECODED_BATCHES = 3  # in flight
SPARE = 1.1  # of the default batch: the estimate's own error, and what the allocator cannot use
MAX_DEVICE_BATCH_SIZE = 32  # of the default: a GPU is busy with it
NUM_IMAGES = (
    16  # counted at once, as a GPU has them: what happens once a batch, as adding to gradients, weighs as there
)
UPDATE_BYTES = 4 * 13  # traffic of a trained value a step: 7 times by AdamW, 5 by the EMA, 1 by the norm; float32


@dataclass(frozen=True)
class Cost:
    """What one image of a recipe costs in a precision, with or without gradient checkpointing; counted, not measured.

    Traffic: what operations other than matrix multiplications read and write, as one kernel each.
    """

    forward_flops: float  # a multiplication and an addition are two
    step_flops: float  # forward and backward
    forward_traffic: float  # bytes
    step_traffic: float
    activation_bytes: float  # alive at the peak of forward and backward
    cast_bytes: float  # weights that autocast holds in the compute precision at a time; once, not for each image
    cast_traffic: float  # of casting weights, once a pass
    image_bytes: float  # decoded, uint8
    weight_bytes: float  # as they are held, a frozen backbone's in the compute precision
    num_parameters: int
    num_trained: int

    @property
    def update_traffic(self) -> float:
        """Bytes that a step reads and writes whatever its batch: casts of weights, optimizer and EMA."""
        return self.cast_traffic + UPDATE_BYTES * self.num_trained


@functools.cache
def count_cost(
    recipe: Recipe,
    num_labels: int,
    precision: str = "bf16",
    size_px: int = SIZE_PX,
    grad_checkpointing: bool = False,
) -> Cost:
    """What an image of a shard set with sides of `size_px` costs on the recipe's model; in seconds, hardly memory.

    grad_checkpointing: without effect on a model that has none.
    """
    architecture = architecture_of(recipe.model)
    device = torch.device("cpu")
    with torch.device("meta"):
        model = architecture.build_for(recipe, num_labels)
        architecture.hold_frozen(model, DTYPES[precision])
    chosen = architecture.trained_names(model, recipe.train)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in chosen)
    if grad_checkpointing:
        with contextlib.suppress(UserError):
            architecture.set_grad_checkpointing(model)
    with FakeTensorMode(allow_non_fake_inputs=True), GpuNorms():
        model.to_empty(device=device).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:  # they exist already, and are counted apart
            parameter.grad = torch.empty_like(parameter)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        with Counter([*model.parameters(), *model.buffers(), *gradients]) as counter:
            images = torch.empty(NUM_IMAGES, 3, recipe.image_size, recipe.image_size)
            with autocast(precision, device):
                logits = model(images)
            forward_flops, forward_traffic = counter.flops, counter.memory_traffic - counter.traffic[WEIGHT_CAST]
            logits.float().sum().backward()
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return Cost(
        forward_flops=forward_flops / NUM_IMAGES,
        step_flops=counter.flops / NUM_IMAGES,
        forward_traffic=forward_traffic / NUM_IMAGES,
        step_traffic=(counter.memory_traffic - counter.traffic[WEIGHT_CAST]) / NUM_IMAGES,
        activation_bytes=counter.peaks[False] / NUM_IMAGES,
        cast_bytes=float(counter.peaks[True]),
        cast_traffic=float(counter.traffic[WEIGHT_CAST]),
        image_bytes=float(size_px * size_px),
        weight_bytes=float(sum(parameter.nbytes for parameter in model.parameters())),
        num_parameters=sum(counts.values()),
        num_trained=sum(counts[name] for name in architecture.trainable_names(model) if name in chosen),
    )


def allocated_bytes(cost: Cost, device_batch_size: int, num_devices: int) -> float:
    """Peak of what torch allocates on one device for weights, optimizer, EMA, gradients and a device batch.

    Within 10 % of the allocator's own peak for both models, every precision, with and without gradient checkpointing.
    """
    state = cost.weight_bytes + 12 * cost.num_trained  # two Adam moments and the EMA; float32
    gradients = 4 * cost.num_trained
    activations = cost.cast_bytes + cost.activation_bytes * device_batch_size
    images = DECODED_BATCHES * device_batch_size * cost.image_bytes
    # DDP keeps gradients in its buckets for good; alone they take the place of activations, as the backward pass goes
    passes = gradients + activations if num_devices > 1 else max(gradients, activations)
    return state + passes + images + WORKSPACE_BYTES


def memory_bytes(cost: Cost, device_batch_size: int, kind: str, num_devices: int) -> float:
    """Peak memory of one device: what torch allocates there, and the runtime itself."""
    return allocated_bytes(cost, device_batch_size, num_devices) + RUNTIME_BYTES[kind]


def checkpoint_bytes(cost: Cost) -> tuple[float, float]:
    """(one epoch checkpoint: model and EMA; one step checkpoint: with both Adam moments), float32."""
    return 8.0 * cost.num_trained, 16.0 * cost.num_trained


def best_device_batch(cost: Cost, global_batch_size: int, kind: str, num_devices: int, free_bytes: float) -> int:
    """The largest device batch of at most 32 images that fits with a tenth to spare, for equal parts of a device's
    share; 0: none fits.
    """
    share = math.ceil(global_batch_size / num_devices)
    fewest = math.ceil(share / MAX_DEVICE_BATCH_SIZE)
    sizes = (math.ceil(share / parts) for parts in range(fewest, share + 1))
    fits = (size for size in sizes if SPARE * memory_bytes(cost, size, kind, num_devices) <= free_bytes)
    return next(fits, 0)


def fitting_batch(
    recipe: Recipe,
    num_labels: int,
    precision: str,
    free_bytes: float,
    world_size: int,
    *,
    grad_checkpointing: bool = False,
) -> int:
    """The largest device batch of a training that fits a GPU's free memory. Raises UserError when not even one does."""
    cost = count_cost(recipe, num_labels, precision, grad_checkpointing=grad_checkpointing)
    batch = best_device_batch(cost, recipe.global_batch_size, "cuda", world_size, free_bytes)
    if batch == 0:
        need = memory_bytes(cost, 1, "cuda", world_size)
        free = f"the GPU with the least free memory has {free_bytes / GB:.1f} GB"
        remedy = "end what else runs there, or try --grad-checkpointing --device-batch-size 1"
        raise UserError(f"{recipe.name} needs about {need / GB:.1f} GB for one image, and {free}: {remedy}")
    return batch
