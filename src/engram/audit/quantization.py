"""Does coarser arithmetic bring the forgotten back?

Zhang et al.: Catastrophic Failure of LLM Unlearning via Quantization. ICLR 2025, arXiv 2410.16454: unlearning that
moves the weights little is undone by rounding them, for old and new weights round to the same numbers.

Every weight matrix W is rounded to nearest with 2^(bits-1) - 1 steps a side, one scale per output channel (the largest
magnitude of its weights); biases, norms and embeddings stay. The measure is the probability of the right answer, per
token, on forget and retain rows, before and after rounding.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engram.core.finding import MARGINS, Finding
from engram.core.probe import Measured, Probe, Subject, compared, labelled, oracles_of
from engram.core.settings import name_of
from engram.data.table import Batch, Target
from engram.engine.lm import sequence_logp
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.stats.intervals import mean


@dataclass(kw_only=True, eq=False)
class Quantization(Probe):
    """What rounding the weights to so many `bits` adds to the probability of the right answers of the forget and of the
    retain rows, beside what it adds in retrained models. Above theirs on forget rows: the weights still hold it.

    Labels are needed; rows of numbers give no finding. EngramError for less than 2 bits. Cost: two forward passes over
    both kinds of rows per model, and a copy of the model.
    """

    bits: int = 4
    oracles: int = 5
    margin: float = MARGINS["distance"]

    asks: ClassVar[frozenset[str]] = frozenset({"model", "forget", "retain"})

    @classmethod
    def tiny(cls) -> Quantization:
        """A setting for checks on a handful of rows."""
        return cls(oracles=2)

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        self.check(subject)
        if self.bits < 2:
            raise EngramError(f"{name_of(self)} needs 2 bits or more, not {self.bits}")
        run = run or Run()
        oracles = oracles_of(subject, self.oracles, run)
        coarse = {id(model): rounded(model, self.bits) for model in (subject.model, *oracles)}
        found = []
        for kind in ("forget", "retain"):
            rows = labelled(subject.rows[kind])
            if not len(rows) or rows.target == Target.NUMBERS:
                continue

            def added(model: nn.Module, rows: Any = rows) -> Measured:
                new, old = (predict(m, rows, _probability, run=run) for m in (coarse[id(model)], model))
                estimate = mean(new - old)
                return estimate.value, (estimate.low, estimate.high)

            name = f"probability that {self.bits} bits add on {kind} rows"
            found.append(
                compared(name, added, subject.model, oracles, n=len(rows), margin=self.margin, unit="probability")
            )
        return found


@torch.no_grad()
def rounded(model: nn.Module, bits: int) -> nn.Module:
    """A copy with every weight of two or more dimensions, but those of embeddings, rounded to so many bits."""
    new = copy.deepcopy(model)
    tables = {id(module.weight) for module in new.modules() if isinstance(module, nn.Embedding)}
    for name, weight in new.named_parameters():
        if weight.ndim >= 2 and weight.is_floating_point() and id(weight) not in tables:
            weight.copy_(_rounded(weight, bits, _outputs(new, name)))
    return new


def _rounded(weight: Tensor, bits: int, axis: int) -> Tensor:
    """Round to nearest, a scale for each output channel."""
    steps = 2 ** (bits - 1) - 1
    others = [k for k in range(weight.ndim) if k != axis]
    scale = weight.abs().amax(others, keepdim=True) / steps
    return torch.where(scale > 0, (weight / scale).round() * scale, weight)


def _outputs(model: nn.Module, name: str) -> int:
    """The axis of output channels: the last one in transformers' Conv1D, else the first."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return 1 if type(owner).__name__ == "Conv1D" else 0


def _probability(output: Any, batch: Batch) -> Tensor:
    assert batch.labels is not None
    found = sequence_logp(output.logits, batch.labels, reduce="mean").double()
    return found.clamp(min=math.log(1e-30)).exp()
