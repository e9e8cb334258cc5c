"""Verbatim memorisation: how much of an answer must be given before the model tells the rest word for word?

Carlini et al.: Extracting Training Data from Large Language Models. USENIX Security 2021, arXiv 2012.07805; Tirumala et
al.: Memorization Without Overfitting, NeurIPS 2022, arXiv 2205.10770 (exact memorisation); the extraction strength as
in open-unlearning.

Of an answer of n tokens, let k be the least number of its first tokens after which greedy decoding gives the rest: one
forward pass tells it, for greedy decoding gives the rest exactly where every token of the rest is the likeliest one
after the true tokens before it. Extraction strength 1 - k / n; exact memorisation: the share of tokens that are the
likeliest ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engram.core.finding import MARGINS, Finding
from engram.core.probe import Measured, Probe, Subject, compared, labelled, oracles_of
from engram.data.table import IGNORED, Batch, Table, Target
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.stats.intervals import mean, proportion


@dataclass(kw_only=True, eq=False)
class Memorization(Probe):
    """Extraction strength and exact memorisation on the forget rows, and the share of rows whose rest comes back
    verbatim when a share of the answer is given (`prefixes`), beside the retrained models'.

    A class is an answer of one token: all three are then the accuracy. Rows of numbers give no finding. Cost: a forward
    pass over the forget rows per model.
    """

    prefixes: tuple[float, ...] = (0.0, 0.25, 0.5)
    oracles: int = 5
    margin: float = MARGINS["accuracy"]

    asks: ClassVar[frozenset[str]] = frozenset({"model", "forget"})

    @classmethod
    def tiny(cls) -> Memorization:
        """A setting for checks on a handful of rows."""
        return cls(oracles=6)

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        self.check(subject)
        run = run or Run()
        forget = labelled(subject.rows["forget"])
        if not len(forget) or forget.target == Target.NUMBERS:
            return []
        oracles = oracles_of(subject, self.oracles, run)
        known = {id(model): told(model, forget, run) for model in (subject.model, *oracles)}
        measures: dict[str, Callable[[Tensor], Measured]] = {
            "extraction strength": lambda found: _mean(found[:, 0]),
            "exact memorisation": lambda found: _mean(found[:, 1]),
            **{
                f"answers told verbatim after {share:.0%} of them": partial(_verbatim, share) for share in self.prefixes
            },
        }
        return [
            compared(
                f"{name} on forget rows",
                lambda model, measure=measure: measure(known[id(model)]),  # type: ignore[misc]
                subject.model,
                oracles,
                n=len(forget),
                margin=self.margin,
                unit="share",
            )
            for name, measure in measures.items()
        ]


def told(model: nn.Module, table: Table, run: Run | None = None) -> Tensor:
    """Extraction strength and exact memorisation of every row, [n, 2] in [0, 1]."""
    return predict(model, table, _told, run=run)


def _told(output: Any, batch: Batch) -> Tensor:
    assert batch.labels is not None
    if batch.labels.ndim == 1:
        right = (output.logits.argmax(1) == batch.labels).double()
        return torch.stack([right, right], 1)
    targets = batch.labels[:, 1:]
    asked = targets != IGNORED
    right = (output.logits[:, :-1].argmax(2) == targets) & asked
    count = asked.sum(1).clamp(min=1)
    given = (asked.cumsum(1) * (asked & ~right)).amax(1)  # up to the last token that is not the likeliest
    return torch.stack([1 - given / count, right.sum(1) / count], 1).double()


def _mean(values: Tensor) -> Measured:
    found = mean(values)
    return found.value, (found.low, found.high)


def _verbatim(share: float, found: Tensor) -> Measured:
    """Rows of which no more than this share must be given."""
    estimate = proportion(int((found[:, 0] >= 1 - share - 1e-9).sum()), len(found))
    return estimate.value, (estimate.low, estimate.high)
