"""From the recipe's rows to AdamW, and the optimizer step that every rank takes or skips together, on the device.

A NaN on one rank reaches every rank's weights in one step. Gradients are already averaged over the ranks when the step
is decided, so every rank sees the same norm and decides alike without a collective, and without the host waiting.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from cxrdist.errors import UserError
from cxrdist.models.architecture import Architecture, listed
from cxrdist.recipes import Group, Recipe

INITIAL_LOSS_SCALE = 2.0**16  # these three: torch.amp.GradScaler's defaults, which the published run used
LOSS_SCALE_FACTOR = 2.0
LOSS_SCALE_INTERVAL = 2000
# GradScaler has no bounds: its scale can reach infinity for good, or 0, at which a step passes that must be skipped
SMALLEST_LOSS_SCALE, LARGEST_LOSS_SCALE = 1.0, 2.0**24
Groups = list[tuple[Group, dict[str, nn.Parameter]]]
COUNTERS = ("num_applied", "num_skipped", "skipped_in_a_row", "grad_norm", "_good_steps")  # what resume needs of them


def groups_of(architecture: Architecture, model: nn.Module, recipe: Recipe) -> Groups:
    """`param_groups` by a recipe's rows, its `train`, and its `layer_decay`. UserError where the model cannot do it."""
    decay, scales = recipe.layer_decay, None
    if decay is not None:
        layers = architecture.layers_of(model, f"layer_decay={decay}")
        scales = {name: decay ** (max(layers.values()) - place) for name, place in layers.items()}
    trained = architecture.trained_names(model, recipe.train)
    return param_groups(model, recipe.groups, trained=trained, scales=scales, decay_vectors=recipe.decay_vectors)


def param_groups(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    trained: Collection[str] | None = None,
    scales: Mapping[str, float] | None = None,
    decay_vectors: bool = True,
) -> Groups:
    """Each row with the parameters that it is the first to match, by name; sets `requires_grad` to `lr is not None`.

    A row is split where its parameters differ: in whether they are `trained` at all, by name (None: all), in `scales`
    on its learning rate, by name, and, unless `decay_vectors`, in that those of one dimension have no weight decay.
    Raises UserError when a parameter matches no row (it would silently get a default) or none is trained.
    """
    found: dict[tuple[int, Group], dict[str, nn.Parameter]] = {(place, row): {} for place, row in enumerate(groups)}
    unmatched = []
    for name, parameter in model.named_parameters():
        place = next((place for place, row in enumerate(groups) if re.search(row.pattern, name)), None)
        if place is None:
            unmatched.append(name)
            continue
        row = groups[place]
        if trained is not None and name not in trained:
            row = replace(row, lr=None)
        if row.lr is not None and scales is not None:
            row = replace(row, lr=row.lr * scales[name])
        if not decay_vectors and parameter.ndim < 2:
            row = replace(row, weight_decay=0.0)
        parameter.requires_grad_(row.lr is not None)
        found.setdefault((place, row), {})[name] = parameter
    if unmatched:
        raise UserError(f"no row of the recipe's groups matches {listed(unmatched, 5)}; add one (lr None: no training)")
    if not any(row.lr is not None and members for (_, row), members in found.items()):
        raise UserError("the recipe's groups train no parameter of this model")
    return [(row, members) for (_, row), members in sorted(found.items(), key=lambda item: item[0][0])]


def rates_table(groups: Groups) -> str:
    """Learning rates and weight decays of what is trained, from the head down, a line each with counts."""
    rows: dict[tuple[float, float], list[nn.Parameter]] = {}
    for group, members in groups:
        if group.lr is not None and members:
            rows.setdefault((group.lr, group.weight_decay), []).extend(members.values())
    lines = [f"{'learning rate':>13} {'weight decay':>13} {'tensors':>8} {'values':>12}"]
    for (lr, decay), parameters in sorted(rows.items(), key=lambda item: (-item[0][0], -item[0][1])):
        values = sum(parameter.numel() for parameter in parameters)
        lines.append(f"{lr:>13.3g} {decay:>13.3g} {len(parameters):>8,} {values:>12,}")
    return "\n".join(lines)


def lr_factors(schedule: str, total_steps: int, warmup_steps: int) -> Tensor:
    """The factor on every learning rate for optimizer steps 0..total_steps (the last entry for what comes after).

    Linear warm-up from 1 / warmup_steps, then constant, or a cosine that would reach 0 one step after the last.
    Returns float64, on the CPU.
    """
    factors = [1.0] * (total_steps + 1)
    for step in range(total_steps + 1):
        if step < warmup_steps:
            factors[step] = (step + 1) / warmup_steps
        elif schedule == "cosine":
            progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
            factors[step] = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return torch.tensor(factors, dtype=torch.float64)


class GuardedAdamW:
    """Fused AdamW whose steps are skipped on the device when the gradient, or any rank's loss, is not finite.

    Skipping leaves weights, moments and the learning-rate schedule as they were; with a loss scale it halves the scale,
    which moves as `torch.amp.GradScaler`'s does, but stays within 1 and 2**24.
    Order of use: `backward` for each micro-batch, then `step` once; nothing here waits for the device.
    """

    def __init__(
        self,
        groups: Groups,
        *,
        betas: tuple[float, float],
        factors: Tensor,
        clip_grad_norm: float | None = None,
        loss_scale: float | None = None,
    ) -> None:
        """groups: from `param_groups`, parameters on their device. factors: from `lr_factors`.
        clip_grad_norm: largest L2 norm of the gradient. loss_scale: where the dynamic scale of fp16 starts.
        """
        trained = [(group, members) for group, members in groups if group.lr is not None and members]
        self.named = {name: parameter for _, members in trained for name, parameter in members.items()}
        self._parameters = list(self.named.values())
        self.device = self._parameters[0].device
        self.base_lrs = [float(group.lr or 0.0) for group, _ in trained]
        self.patterns = [group.pattern for group, _ in trained]
        # lr as a tensor: how far the schedule has come is known on the device only
        self._lrs = [torch.tensor(lr, dtype=torch.float32, device=self.device) for lr in self.base_lrs]
        rows = [
            {"params": list(members.values()), "lr": lr, "weight_decay": group.weight_decay}
            for (group, members), lr in zip(trained, self._lrs, strict=True)
        ]
        self.adamw = torch.optim.AdamW(rows, betas=betas, fused=True)
        self._clip, self._factors = clip_grad_norm, factors.to(self.device)
        self._moving = bool((factors != 1.0).any())
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        self.num_applied, self.num_skipped, self.skipped_in_a_row = zero.clone(), zero.clone(), zero.clone()
        self.longest_streak = zero.clone()  # of skipped steps, since whoever reads it last set it to 0
        self.grad_norm = zero.clone()  # of the last step, before clipping, without the loss scale
        self.loss_scale = None if loss_scale is None else _bounded(zero.float() + loss_scale)
        self._good_steps = zero.clone()  # since the scale last changed

    def backward(self, loss: Tensor, weight: float) -> None:
        """Add the gradient of `weight * loss`; a non-finite loss makes all of it NaN, for every rank to see."""
        # 0 * loss is 0 or NaN: a loss of infinity may have a finite gradient, which would pass unseen
        upstream = weight + 0.0 * loss.detach()
        loss.backward(upstream if self.loss_scale is None else upstream * self.loss_scale)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def step(self) -> Tensor:
        """Update the weights from the gradients, which are then dropped. Returns 1.0 (0-dim, float32) if skipped."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        skipped = (~torch.isfinite(norm)).float()
        if (divisor := self.loss_scale) is not None:
            norm = norm / divisor
        if self._clip is not None:
            excess = (norm / self._clip).clamp(min=1.0)
            divisor = excess if divisor is None else divisor * excess
        if self._moving:
            factor = self.lr_factor()
            for lr, base in zip(self._lrs, self.base_lrs, strict=True):
                lr.copy_(factor * base)
        # The two attributes are the fused kernel's own: it divides by one and does nothing where the other is 1.
        self.adamw.grad_scale, self.adamw.found_inf = divisor, skipped  # type: ignore[attr-defined]
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.grad_norm, bad = norm.double(), skipped.double()
        self.num_applied += 1.0 - bad
        self.num_skipped += bad
        self.skipped_in_a_row = (self.skipped_in_a_row + 1.0) * bad
        self.longest_streak = torch.maximum(self.longest_streak, self.skipped_in_a_row)
        if self.loss_scale is not None:
            good = (self._good_steps + 1.0) * (1.0 - bad)
            grow = good >= LOSS_SCALE_INTERVAL
            grown = torch.where(grow, self.loss_scale * LOSS_SCALE_FACTOR, self.loss_scale)
            self.loss_scale = _bounded(torch.where(bad.bool(), self.loss_scale / LOSS_SCALE_FACTOR, grown))
            self._good_steps = torch.where(grow, 0.0, good)
        return skipped

    def lr_factor(self) -> Tensor:
        """The schedule's factor for the next step (0-dim, on the device)."""
        # `take`, because indexing by a tensor of one number reads it back to the host
        return self._factors.take(self.num_applied.long().clamp(max=len(self._factors) - 1))

    def state_dict(self) -> dict[str, Tensor]:
        """Moments by parameter name, the counters, and the loss scale: flat, for safetensors."""
        moments = {name: self.adamw.state[parameter] for name, parameter in self.named.items()}
        state = {f"{kind}/{name}": value for name, kinds in moments.items() for kind, value in kinds.items()}
        state |= {f"counter/{name}": getattr(self, name) for name in COUNTERS}
        if self.loss_scale is not None:
            state["counter/loss_scale"] = self.loss_scale
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave. Raises KeyError for a parameter that is not in it."""
        for name, parameter in self.named.items():
            if f"step/{name}" in state:
                kinds = {kind: state[f"{kind}/{name}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
                self.adamw.state[parameter] = {kind: old.to(self.device, copy=True) for kind, old in kinds.items()}
            elif float(state["counter/num_applied"]) > 0:
                raise KeyError(f"no optimizer state for {name}")
        for name in COUNTERS:
            setattr(self, name, state[f"counter/{name}"].to(self.device, copy=True))
        if self.loss_scale is not None and "counter/loss_scale" in state:
            self.loss_scale = _bounded(state["counter/loss_scale"].to(self.device, copy=True))


def _bounded(loss_scale: Tensor) -> Tensor:
    return loss_scale.clamp(SMALLEST_LOSS_SCALE, LARGEST_LOSS_SCALE)
