"""SCRUB: a student that leaves its teacher on the forget rows and stays with it on the retain rows, by turns.

Kurmanji, Triantafillou, Hayes, Triantafillou: Towards Unbounded Machine Unlearning. NeurIPS 2023, arXiv 2302.09880.

With d(x) = KL(teacher(x) || student(x)), the teacher being the model before forgetting (the paper's algorithm 1):

- a max epoch, in the first `msteps` epochs: a pass over the forget rows, minimising -mean d;
- then, in every epoch, a min epoch: a pass over the retain rows, minimising alpha mean d + gamma mean cross-entropy.

Both go through the same optimiser. Published code takes d at a temperature of 2 or 4, times its square; the paper has
none. Left out is rewinding (SCRUB+R), the choice among the epochs' models by the error on unseen rows like the
forgotten ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engram.core.forgetter import rows
from engram.core.needs import Need, Needs, needs
from engram.core.request import Request
from engram.core.unlearning import GradientForgetter
from engram.data.table import Batch
from engram.engine.lm import kl_to
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.engine.teacher import RowCache, cached, class_logits


def _as_published() -> Optimizer:
    return Optimizer(lr=5e-4, weight_decay=0.1, schedule="steps", milestones=(0.5, 0.8, 0.9))


@dataclass(kw_only=True, eq=False)
class SCRUB(GradientForgetter):
    """`alpha`, `gamma`: weights of divergence and cross-entropy on the retain rows; `msteps`: epochs with a pass over
    the forget rows; `temperature`: that of both in the divergence, which is multiplied by its square.

    The defaults are those of the published small-scale experiments; the large ones have alpha 0.001, gamma 0.99,
    msteps 2, epochs 3, temperature 4 and SGD. For classifiers (EngramError where labels are numbers); without gamma no
    labels are needed. The divergence has no upper bound, so that `msteps` has to end its ascent, and no gradient at the
    teacher, so that the first max steps do little. Cost: epochs times the retain rows and msteps times the forget rows,
    forward and backward, and one forward pass over both.
    """

    optimizer: Optimizer = field(default_factory=_as_published)
    epochs: int = 10
    batch_size: int = 128
    alpha: float = 0.5
    gamma: float = 1.0
    msteps: int = 3
    temperature: float = 1.0

    @classmethod
    def tiny(cls) -> SCRUB:
        """A setting for checks on a handful of rows."""
        return cls(optimizer=Optimizer(lr=1e-2), epochs=3, msteps=2, batch_size=16, temperature=2.0)

    @property
    def needs(self) -> Needs:
        both = {Need.FORGET_ROWS, Need.RETAIN_ROWS}
        return needs(both | {Need.RETAIN_LABELS} if self.gamma else both)

    def targets(self, model: nn.Module, request: Request, run: Run) -> None:
        self.of_forget = cached(model, rows(request.forget), class_logits, run, "teacher on forget rows")
        self.of_retain = cached(model, rows(request.retain), class_logits, run, "teacher on retain rows")

    def batches(self, request: Request, epoch: int, run: Run) -> Iterator[Any]:
        """(batch, None) for a max step, (None, batch) for a min step."""
        cut: dict[str, Any] = {"seed": run.number("order"), "epoch": epoch, "shard": run.shard}
        if epoch < self.msteps:
            yield from ((batch, None) for batch in rows(request.forget).batches(self.batch_size, **cut))
        yield from ((None, batch) for batch in rows(request.retain).batches(self.batch_size, **cut))

    def terms(self, model: nn.Module, forget: Batch | None, retain: Batch | None) -> Mean:
        if forget is not None:
            return -self.divergence(model(**forget.inputs).logits, forget, self.of_forget)
        assert retain is not None
        logits = model(**retain.inputs).logits
        loss = self.alpha * self.divergence(logits, retain, self.of_retain)
        if not self.gamma:
            return loss
        assert retain.labels is not None
        return loss + self.gamma * by_target(logits, retain.labels)

    def divergence(self, logits: Tensor, batch: Batch, teacher: RowCache) -> Mean:
        """KL(teacher || student), mean over the rows of a batch, for the student's logits [B, C]."""
        told = torch.log_softmax(teacher(batch).float() / self.temperature, -1)
        return self.temperature**2 * kl_to(told, logits / self.temperature)
