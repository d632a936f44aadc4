"""What pretraining and finetuning share: optimiser, one step, the guard against a loss that runs away, determinism."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.utils.deterministic
from torch import nn

from fffsweep.pipeline.memory import reset_peaks


class AdamSettings(Protocol):
    """Fields of a recipe that `make_optimizer` reads."""

    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float


class DivergedError(RuntimeError):
    """The loss is not finite, or far above where it was: no result is worth keeping."""


class Optimizer(Protocol):
    """What training asks of an optimiser."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups; `lr` of each is set before a step."""
        ...

    def step(self) -> Any:
        """Change the weights by their gradients."""
        ...

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Go on from a checkpoint."""
        ...


def make_optimizer(model: nn.Module, recipe: AdamSettings, kind: str = "adamw") -> Optimizer:
    """AdamW, or with kind `muon` Muon for the matrices of hidden layers and AdamW for the rest; biases and norms are not decayed."""
    embeddings = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith(("b_in", "bias")):
            kept.append(parameter)
        elif kind == "muon" and id(parameter) not in embeddings:
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    adamw = _adamw(groups, recipe)
    return MuonWithAdamW(matrices, adamw, recipe) if matrices else adamw


def _adamw(groups: list[dict[str, Any]], recipe: AdamSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        fused=True,
    )


class MuonWithAdamW:
    """torch's Muon for `matrices`, `adamw` for what it holds, under one learning rate: Muon's steps are scaled to AdamW's size.

    Muon takes matrices alone. A tree layer's weights [trees, nodes, hidden] are to it the one matrix [trees x nodes, hidden] that a
    dense layer of as many neurons has, so that all layouts are trained alike; a step moves rows that no token visited, too.
    Source: Jordan et al. 2024, "Muon"; the scale is Moonlight's, Liu et al. 2025, arXiv 2502.16982, section 2.2.
    """

    def __init__(self, matrices: list[nn.Parameter], adamw: torch.optim.AdamW, recipe: AdamSettings) -> None:
        # the views share their memory with the weights, so that steps on them are steps on the weights
        self._pairs = [(each, nn.Parameter(each.detach().flatten(0, -2))) for each in matrices]
        self._muon = torch.optim.Muon(
            [view for _, view in self._pairs],
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = adamw

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of both."""
        return [*self._muon.param_groups, *self._adamw.param_groups]

    def step(self) -> None:
        """One step of both."""
        for weight, view in self._pairs:
            assert weight.data_ptr() == view.data_ptr(), "the weights were moved after the optimiser was made"
            view.grad = None if weight.grad is None else weight.grad.flatten(0, -2)
        self._muon.step()
        self._adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for weight, view in self._pairs:
            weight.grad = view.grad = None
        self._adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._muon.load_state_dict(state_dict["muon"])
        self._adamw.load_state_dict(state_dict["adamw"])


def apply_gradients(model: nn.Module, optimizer: Optimizer, learning_rate: float, clip: float | None) -> float:
    """One step of the optimiser, gradients set to None afterwards. Norm of the gradient before it was clipped."""
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_finite(step: int, name: str, value: float) -> None:
    """Raises DivergedError if `value` is NaN or infinite."""
    if not math.isfinite(value):
        raise DivergedError(f"step {step}: the {name} is {value}; nothing is published; lower learning_rate or clip, or take float32")


class LossGuard:
    """Stops a run whose loss or penalty is NaN or infinite, or whose smoothed loss rises `limit` nats above its lowest.

    Smoothing is an exponential mean over about twenty steps.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.smooth = self.lowest = math.inf

    def check(self, step: int, loss: float, penalty: float = 0.0) -> None:
        """Raises DivergedError. The penalty must be finite and no more: it may rise while the model learns."""
        check_finite(step, "loss", loss)
        check_finite(step, "penalty", penalty)
        self.smooth = loss if math.isinf(self.smooth) else 0.95 * self.smooth + 0.05 * loss
        self.lowest = min(self.lowest, self.smooth)
        if self.smooth > self.lowest + self.limit:
            raise DivergedError(
                f"step {step}: the loss rose to {self.smooth:.2f} from {self.lowest:.2f}, more than spike_limit={self.limit:g}; "
                "nothing is published; lower learning_rate or clip"
            )

    def state(self) -> dict[str, float]:
        """What `restore` takes."""
        return {"smooth": self.smooth, "lowest": self.lowest}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.smooth, self.lowest = state["smooth"], state["lowest"]


def prepare_cublas() -> None:
    """Give cuBLAS the workspaces that its repeatable products need. torch looks once, at its first product on a GPU: call this before."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextlib.contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """One run's surroundings: torch seeded, deterministic algorithms alone, peaks of memory counted from here; as it was afterwards."""
    filling: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    prepare_cublas()
    reset_peaks()
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False  # every buffer is written before it is read; filling costs time
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        filling.fill_uninitialized_memory = before[1]


def rng_state(device: str) -> dict[str, Any]:
    """State of torch's random numbers, which dropout draws from."""
    return {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if device == "cuda" else {})


def restore_rng(state: dict[str, Any], device: str) -> None:
    """Go on with random numbers where `rng_state` was taken; on another kind of device, with those that the seed gives there."""
    torch.set_rng_state(state["cpu"])
    if device == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def autocast(precision: str, device: str) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 products under `bf16`, nothing otherwise."""
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no report of the weights that a new head does not find, while loading and saving."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
