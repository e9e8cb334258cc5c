"""A choice among the scalar weights of a model: those that may move, and all others, which keep their bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from engram.errors import EngramError

Masks = dict[str, Tensor]  # parameter name -> bool, shaped like the parameter


def top(scores: Mapping[str, Tensor], share: float) -> Masks:
    """The `share` of all scalars, over the tensors together, with the largest scores; among equals the first.

    The number is rounded. EngramError for a share outside [0, 1]. O(P log P).
    """
    if not 0 <= share <= 1:
        raise EngramError(f"the share of the weights is {share}; it has to lie between 0 and 1")
    joined = torch.cat([score.flatten() for score in scores.values()])
    chosen = torch.zeros_like(joined, dtype=torch.bool)
    chosen[joined.argsort(descending=True, stable=True)[: round(share * len(joined))]] = True
    parts = chosen.split([score.numel() for score in scores.values()])
    return {name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


class Selection:
    """The chosen scalars of a model's parameters; the rest is held at what it is in `model` now.

    Train through `view`: there the weights that are held have their old values, so that no gradient reaches them,
    whatever the optimiser does to the parameters (momentum, weight decay). Then `settle` puts them back to the bit.
    Parameters without a mask are left alone. Costs a copy of the weights that have a mask.
    """

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        self.masks = masks
        self.held = {name: p.detach().clone() for name, p in model.named_parameters() if name in masks}

    def view(self, model: nn.Module) -> Callable[..., Any]:
        """The model, to be called with its inputs, as it is with the held weights at their old values."""
        weights = self._weights(model)
        return lambda **inputs: functional_call(model, weights, (), inputs)

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        """Put the held weights of `model` back, in place."""
        for name, value in self._weights(model).items():
            model.get_parameter(name).copy_(value)

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        found = {name: p for name, p in model.named_parameters() if name in self.masks}
        return {name: torch.where(self.masks[name].to(p.device), p, self.held[name].to(p)) for name, p in found.items()}


def prune(network: nn.Module, share: float) -> Masks:
    """Set a share of the weights to zero in place, those of least size over all matrices and kernels together
    (parameters of two dimensions or more; biases and norms stay). The masks of those that are left."""
    masks = top({name: p.detach().abs() for name, p in network.named_parameters() if p.ndim > 1}, 1 - share)
    cut(network, masks)
    return masks


@torch.no_grad()
def cut(network: nn.Module, masks: Masks) -> None:
    """Set the weights outside their masks to zero, in place."""
    for name, mask in masks.items():
        network.get_parameter(name).mul_(mask)
