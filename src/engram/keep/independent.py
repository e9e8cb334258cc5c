"""Independent: a fresh network for each task, as if there had been no others.

Bornschein et al.: NEVIS'22, 2022, arXiv 2211.11747, the baseline that transfers nothing; see `keep.per_task`. With a
saved model as `network` it is the pretrained baseline: each task starts from that model's backbone. What it costs, and
each task's network to the bit, do not depend on the order of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from engram.engine.run import Run
from engram.keep.per_task import Job, PerTask
from engram.models.predictor import Predictor


@dataclass(kw_only=True, eq=False)
class Independent(PerTask):
    """Settings are those of `PerTask`. Cost: `trials` trainings for each task, the same in any order."""

    @classmethod
    def tiny(cls) -> Independent:
        small = {"name": "MLP", "hidden": [16]}
        return cls(network=small, epochs=2, batch_size=16, trials=2, lr=(1e-2, 1e-1), validate_every=2)

    def parent(self, job: Job, fresh: Predictor, run: Run) -> tuple[int | None, tuple[float, ...]]:
        return None, ()
