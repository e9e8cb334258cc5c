"""What language models and classifiers have in common: the log-probability of an answer."""

from __future__ import annotations

from torch import Tensor

from engram.engine.losses import per_row


def sequence_logp(logits: Tensor, labels: Tensor, reduce: str = "sum") -> Tensor:
    """log p(answer | question) of every row, [B].

    Token labels [B, T] with logits [B, T, V]: the `sum` over the answer's tokens, or their `mean`; class labels [B]
    with logits [B, C]: log p of the class, which is both.
    """
    return -per_row(logits, labels, reduce=reduce)
