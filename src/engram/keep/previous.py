"""Previous: each task's network starts from the backbone of the task before.

Bornschein et al.: NEVIS'22, 2022, arXiv 2211.11747, fine-tuning from the previous state (FT-prev); see `keep.per_task`.
The state before is the best one of the winning trial. On a stream of several kinds of rows it is that of the last task
whose rows had the same shape.
"""

from __future__ import annotations

from dataclasses import dataclass

from engram.engine.run import Run
from engram.keep.per_task import Job, PerTask
from engram.models.predictor import Predictor


@dataclass(kw_only=True, eq=False)
class Previous(PerTask):
    """Settings are those of `PerTask`. Cost: as Independent; the start costs nothing."""

    @classmethod
    def tiny(cls) -> Previous:
        small = {"name": "MLP", "hidden": [16]}
        return cls(network=small, epochs=2, batch_size=16, trials=2, lr=(1e-2, 1e-1), validate_every=2)

    def parent(self, job: Job, fresh: Predictor, run: Run) -> tuple[int | None, tuple[float, ...]]:
        return max(self.readers(job), default=None), ()
