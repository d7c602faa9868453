"""The exponential moving average of what is trained: the weights that are validated and that inference takes."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """An average of the trained parameters and the persistent buffers; what is frozen is not copied.

    For CheXFound that is 9 million values instead of 313 million.
    """

    def __init__(self, model: nn.Module, decay: float, ramp: bool = False, frozen: Collection[str] = ()) -> None:
        """Starts as a copy of `model`, already on its device and prepared for DDP.

        Args:
            decay: in [0, 1). ramp: the decay of update t (from 0) is min(decay, (1 + t) / (10 + t)).
            frozen: names of buffers and parameters never to track, as those of a frozen backbone.
        """
        self.decay, self.ramp = decay, ramp
        self._live = {
            name: tensor
            for name, tensor in model.state_dict(keep_vars=True).items()
            if name not in frozen and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
        }
        self._average = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        floating = [name for name, tensor in self._live.items() if tensor.is_floating_point()]
        self._counters = self._live.keys() - set(floating)
        # the parameters themselves, not views of their memory: preparing a model for DDP gives them other memory
        self._live_list = [self._live[name] for name in floating]
        self._average_list = [self._average[name] for name in floating]
        device = self._live_list[0].device if self._live_list else torch.device("cpu")
        self.num_updates = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """average = decay * average + (1 - decay) * model, rounded as published; integer buffers are copied.

        The shorter lerp drifts from the published averages by 1.3e-6 in 20 updates. `skip` (0-dim): 1.0 leaves the
        average as it is. It and the factors stay on the device: nothing here waits for the GPU.
        """
        keep = torch.full_like(self.num_updates, self.decay)
        if self.ramp:
            keep = torch.minimum(keep, (1.0 + self.num_updates) / (10.0 + self.num_updates))
        take = 1.0 if skip is None else 1.0 - skip.double()
        weight = (1.0 - keep) * take
        torch._foreach_mul_(self._average_list, (1.0 - weight).float())
        torch._foreach_addcmul_(self._average_list, self._live_list, [weight.float()] * len(self._live_list))
        for name in self._counters:
            average, live = self._average[name], self._live[name]
            average.copy_(live if skip is None else torch.where(skip.bool(), average, live))
        self.num_updates += take

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged tensors by their names in the model (not copies)."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor], num_updates: float) -> None:
        """Restore what `state_dict` and `num_updates` gave. Raises KeyError unless the names are the same."""
        if tensors.keys() != self._average.keys():
            raise KeyError(f"EMA names differ: {sorted(tensors.keys() ^ self._average.keys())[:5]}")
        for name, tensor in tensors.items():
            self._average[name].copy_(tensor)
        self.num_updates.fill_(num_updates)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the averaged values; afterwards its own again, bit for bit."""
        kept = [tensor.detach().clone() for tensor in self._live.values()]
        try:
            for name, tensor in self._live.items():
                tensor.detach().copy_(self._average[name])
            yield
        finally:
            for tensor, value in zip(self._live.values(), kept, strict=True):
                tensor.detach().copy_(value)
