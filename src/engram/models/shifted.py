"""A model with its logits moved on rows that are known: no weight changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engram.errors import EngramError
from engram.models.guards import Wrapper
from engram.models.predictor import supervised_loss
from engram.stats.seeds import generator


class ShiftedLogits(Wrapper):
    """Logits minus what is stored for a row, which is known by the exact contents of its inputs; others are unchanged.

    `inputs`: the names of the tensors that make a row; `rows`, `columns`: the size of what `put` stores. It holds what
    the rows did to the model, and a digest of each: a guard, not an erasure. Cost: O(B log rows) and rows * columns.
    """

    keys: Tensor
    shift: Tensor

    def __init__(self, inner: nn.Module, inputs: Sequence[str], rows: int, columns: int) -> None:
        super().__init__(inner)
        self.inputs = tuple(inputs)
        self.register_buffer("keys", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("shift", torch.zeros(rows, columns))

    def put(self, given: Mapping[str, Tensor], shift: Tensor) -> None:
        """What is taken off the logits of rows: their inputs [rows, …], and [rows, columns]."""
        keys = row_keys(given, self.inputs)
        if shift.shape != self.shift.shape or len(keys) != len(self.keys):
            raise EngramError(f"shifts for {list(self.shift.shape)} rows and columns, not {list(shift.shape)}")
        order = keys.argsort()
        self.keys.copy_(keys[order])
        self.shift.copy_(shift[order])

    def after(self, inputs: dict[str, Any], output: Any) -> Any:
        keys = row_keys(inputs, self.inputs)
        places = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        known = self.keys[places] == keys
        moved = copy.copy(output)
        moved.logits = output.logits - torch.where(known[:, None], self.shift[places], 0.0).to(output.logits)
        if inputs.get("labels") is not None:
            moved.loss = supervised_loss(moved.logits, inputs["labels"])
        return moved


def row_keys(inputs: Mapping[str, Any], names: Sequence[str]) -> Tensor:
    """A number of 64 bits for the contents of every row, [B] int64: sums of mixed bit patterns, wrapping around."""
    total = torch.zeros((), dtype=torch.int64)
    for name in names:
        bits = (inputs[name].flatten(1).double() + 0.0).view(torch.int64)  # -0.0 becomes 0.0
        odd = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator("row keys", name)) * 2 + 1
        mixed = (bits ^ (bits >> 32)) * odd.to(bits.device)
        total = total.to(bits.device) + (mixed ^ (mixed >> 29)).sum(1)
    return total
