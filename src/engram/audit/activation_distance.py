"""Activation distance: how far a model's probabilities on the forget rows lie from those of retrained models.

Chundawat, Tarun, Mandal, Kankanhalli: Can Bad Teaching Induce Forgetting? AAAI 2023, arXiv 2205.08096 (L2); Kurmanji,
Triantafillou, Hayes, Triantafillou: SCRUB. NeurIPS 2023, arXiv 2302.09880 (L1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from engram.audit.populations import alike, chances
from engram.core.finding import MARGINS, Finding
from engram.core.probe import Measured, Probe, Subject, compared_pairwise, oracles_of
from engram.engine.run import Run
from engram.stats.intervals import mean


@dataclass(kw_only=True, eq=False)
class ActivationDistance(Probe):
    """The mean over forget rows of ||p - p_*|| in the L`norm` norm (2 or 1), the mean over the retrained models; beside
    it, that of every retrained model from the other ones.

    Labels are not needed. 0 for equal models, at most √2 (L2) or 2 (L1). EngramError for models that give no class
    probabilities. Cost: one forward pass over the forget rows per model.
    """

    norm: float = 2
    oracles: int = 5
    margin: float = MARGINS["distance"]

    asks: ClassVar[frozenset[str]] = frozenset({"model", "forget", "oracles"})

    @classmethod
    def tiny(cls) -> ActivationDistance:
        """A setting for checks on a handful of rows."""
        return cls(oracles=2)

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        self.check(subject)
        run = run or Run()
        forget = subject.rows["forget"]
        oracles = oracles_of(subject, self.oracles, run)
        known = {id(model): chances(self, model, forget, run) for model in (subject.model, *oracles)}

        def distance(model: nn.Module, others: Sequence[nn.Module]) -> Measured:
            pairs = [alike(known[id(model)], known[id(other)]) for other in others]
            rows = torch.stack([torch.linalg.vector_norm(p - q, self.norm, dim=1) for p, q in pairs]).mean(0)
            found = mean(rows)
            return found.value, (found.low, found.high)

        return [
            compared_pairwise(
                f"activation distance (L{self.norm:g}) on forget rows",
                distance,
                subject.model,
                oracles,
                n=len(forget),
                unit="distance",
                margin=self.margin,
                protocol={"norm": f"L{self.norm:g}"},
            )
        ]
