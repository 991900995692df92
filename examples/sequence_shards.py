"""One sequence over several processes, for train_bytes.py under torchrun.

Every process has the whole text and the same parameters, runs the model on its stretch of each
window and sums gradients over all. Attention is the only layer that looks beyond the stretch.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Shards:
    """This process's place among `size`; alone, without a group, unless torchrun started it."""

    def __init__(self, device: torch.device) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = device
        self.group: dist.ProcessGroup | None = None
        if self.size > 1:
            if device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
                dist.init_process_group("nccl", device_id=self.device)
            else:
                dist.init_process_group("gloo")
            self.group = dist.group.WORLD

    def lengths(self, length: int) -> list[int]:
        """Positions of each process, as even as whole positions allow."""
        cuts = [length * i // self.size for i in range(self.size + 1)]
        return [b - a for a, b in zip(cuts, cuts[1:], strict=False)]

    def span(self, length: int) -> tuple[int, int]:
        """This process's positions: begin, end."""
        return length * self.rank // self.size, length * (self.rank + 1) // self.size

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, the same on each; in place."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def sum_gradients(self, model: nn.Module) -> None:
        if self.group is None:
            return
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = self.sum(torch.cat([grad.flatten() for grad in grads]))
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def close(self) -> None:
        if self.group is not None:
            dist.destroy_process_group()
