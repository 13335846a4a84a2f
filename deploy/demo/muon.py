"""Owns the Muon optimizer for the matrices of the model, all matrices of one shape in one batch of products.

Muon (Jordan et al., 2024) moves a matrix along its momentum with all singular values brought to about one, by
five Newton-Schulz steps. The scale of the step follows Moonlight (Liu et al., 2025): one learning rate then
suits both these matrices and the parameters that AdamW trains.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NUM_NEWTON_SCHULZ_STEPS = 5
RMS_SCALE = 0.2


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix near one: [batch, rows, columns] in and out."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if is_tall else matrices
    x = x.bfloat16() if x.is_cuda else x.float()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NUM_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay; for matrices only."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply one update; every parameter has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                by_shape[param.shape].append(param)
            for params in by_shape.values():
                self._step_one_shape(params, group["lr"], group["momentum"], group["weight_decay"])

    def _step_one_shape(self, params: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        grads = [param.grad for param in params]
        for param in params:
            if "momentum" not in self.state[param]:
                self.state[param]["momentum"] = torch.zeros_like(param)
        moments = [self.state[param]["momentum"] for param in params]
        torch._foreach_lerp_(moments, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, moments, momentum)
        updates = orthogonalise(torch.stack(ahead)) * (RMS_SCALE * max(params[0].shape) ** 0.5)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, list(updates.unbind()), alpha=-lr)
