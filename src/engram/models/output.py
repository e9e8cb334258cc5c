"""What every model answers with; the names are those of transformers' outputs, so either can be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Output:
    """One batch's answer; what a model does not give is None.

    loss          scalar, when labels were given
    logits        [B, W] classes (dead columns are -inf), [B, k] values, or [B, T, V] tokens
    pooler_output [B, d] features
    novelty       [B], larger = less like what was learnt
    extra         anything else, by name
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    pooler_output: Tensor | None = None
    novelty: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)
