"""One run on several processes: what they tell each other. Alone where nobody has initialised torch.distributed.

Every worker computes a part of each step and holds all weights; gradients are summed, so that all take the same step. What depends on
clocks and flags is the greatest of what the workers have: the slowest one's time, and a stop if one of them is asked to stop.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn


def count() -> int:
    """Processes that share the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this one; 0 writes, reports and publishes."""
    return dist.get_rank() if count() > 1 else 0


def seed_step(seed: int, step: int) -> None:
    """Let a worker's random numbers in one step, such as dropout's, follow from seed, step and rank.

    So no two workers drop the same places, and a run that was stopped goes on to the same bits though checkpoints hold worker 0's state
    alone. A run in one process keeps its one stream.
    """
    if count() > 1:
        torch.manual_seed(int(np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)[0]))


def sum_gradients(model: nn.Module, *figures: float) -> list[float]:
    """Add up the gradients of all workers in each of them; the sums of their figures, such as the loss. Without gradients it adds zeros."""
    if count() == 1:
        return list(figures)
    parameters = [each for each in model.parameters() if each.requires_grad]
    parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    flat = torch.cat([*(part.flatten() for part in parts), parts[0].new_tensor(figures)])
    dist.all_reduce(flat)
    *sums, totals = flat.split([*(part.numel() for part in parts), len(figures)])
    for parameter, each in zip(parameters, sums, strict=True):
        parameter.grad = each.view_as(parameter)
    return [float(each) for each in totals]


def agree(values: Sequence[float], device: str) -> list[float]:
    """The greatest of all workers' values, in each of them."""
    if count() == 1:
        return list(values)
    told = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return [float(each) for each in told]
