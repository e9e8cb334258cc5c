"""Zero-retrain forgetting: does the model know more of the forget rows than a network that was never trained?

Chundawat, Tarun, Mandal, Kankanhalli: Can Bad Teaching Induce Forgetting? Unlearning in Deep Networks using an
Incompetent Teacher. AAAI 2023, arXiv 2205.08096.

ZRF = 1 - mean over forget rows of JS(p_model || p_random), the random one of the same architecture. The aim is what
retrained models score, which is less than 1: they know something of rows like these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from engram.audit.populations import alike, chances
from engram.core.finding import MARGINS, Finding, figure
from engram.core.probe import Measured, Probe, Subject, compared, oracles_of
from engram.engine.run import Run
from engram.engine.teacher import untrained
from engram.stats import divergence
from engram.stats.intervals import mean


@dataclass(kw_only=True, eq=False)
class ZRF(Probe):
    """ZRF of the model and of every retrained model, against one untrained network (drawn by the run's seed); and, as a
    plain figure, the value by the released code, with which published numbers compare.

    Labels are not needed. In [1 - ln 2, 1]. EngramError for models that give no class probabilities. Cost: one forward
    pass over the forget rows per model.
    """

    oracles: int = 5
    margin: float = MARGINS["distance"]

    asks: ClassVar[frozenset[str]] = frozenset({"model", "forget"})

    @classmethod
    def tiny(cls) -> ZRF:
        """A setting for checks on a handful of rows."""
        return cls(oracles=2)

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        self.check(subject)
        run = run or Run()
        forget = subject.rows["forget"]
        random = chances(self, untrained(subject.model, run.generator("untrained network")), forget, run)

        def measure(model: nn.Module) -> Measured:
            found = mean(1 - divergence.js(*alike(chances(self, model, forget, run), random)))
            return found.value, (found.low, found.high)

        oracles = oracles_of(subject, self.oracles, run)
        found = compared(
            "zero-retrain forgetting", measure, subject.model, oracles, n=len(forget), unit="ZRF", margin=self.margin
        )
        published = divergence.zrf(chances(self, subject.model, forget, run), random, as_published=True)
        return [found, figure("zero-retrain forgetting, as published", published, len(forget), "ZRF")]
