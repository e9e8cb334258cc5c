"""The whole model: an encoder and a head, under one call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from engram.models.config import Configured
from engram.models.output import Output


class Predictor(Configured, nn.Module):
    """Keyword tensors in, an `Output` with logits [B, W] (or values [B, k]) and pooler_output [B, d] out.

    encoder: anything that answers with `.pooler_output`; head: [B, d] -> [B, W].
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def features(self, **inputs: Any) -> Tensor:
        """What the head sees: [B, d]."""
        return self.encoder(**inputs).pooler_output.flatten(1)

    def forward(self, *, labels: Tensor | None = None, task: Tensor | None = None, **inputs: Any) -> Output:
        """`labels` adds the loss. `task` [B] belongs to the common call; one head has no use for it."""
        features = self.features(**inputs)
        logits = self.head(features)
        loss = None if labels is None else supervised_loss(logits, labels)
        return Output(loss=loss, logits=logits, pooler_output=features)


def supervised_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss by the kind of the labels, a scalar.

    int64 [B]: cross-entropy of logits [B, W], over the rows whose label is not -1 (0 if there are none); a
    label has to be a live class, else the loss is infinite. Floating point [B, k]: mean squared error over
    all entries.
    """
    if labels.is_floating_point():
        return F.mse_loss(logits, labels.reshape(logits.shape).to(logits.dtype))
    total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return total / (labels != -1).sum().clamp(min=1)
