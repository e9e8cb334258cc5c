"""The forgetting score of the NeurIPS 2023 competition: how private the forget rows are, times what utility is left.

Triantafillou et al.: Are we making progress in unlearning? Findings from the first NeurIPS unlearning competition.
2024, arXiv 2406.09073. The arithmetic is in `stats.forgetting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engram.audit.populations import PopulationProbe, class_rows, confidences, parted, populations
from engram.core.finding import Finding
from engram.core.probe import Measured, Subject
from engram.data.table import Table
from engram.engine.predict import hits
from engram.engine.run import Run
from engram.stats.forgetting import forgetting_score, points, row_epsilons
from engram.stats.intervals import mean


@dataclass(kw_only=True, eq=False)
class ForgettingScore(PopulationProbe):
    """The forgetting quality F (mean points of the forget rows) and the score F · RA_u / RA_* · TA_u / TA_*.

    It examines the method rather than one model: `models` originals (the competition: 512) are trained on all rows and
    forget the request, and twice as many are retrained without it. ε beyond ceil(ln(models - 1)) earns nothing, so
    values at different numbers of models do not compare; the references are retrained against retrained models at the
    same number. Intervals: t over the rows' points. EngramError for rows without class labels. Cost: 3 `models`
    trainings, `models` times forgetting, O(forget rows · models²); shared with ULiRA and KLoM.
    """

    margin: float = 0.05

    @classmethod
    def tiny(cls) -> ForgettingScore:
        """A setting for checks on a handful of rows."""
        return cls(models=4)

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        run = run or Run()
        self.check(subject)
        forget, retain, test = (class_rows(self, subject, name) for name in self.tables)
        made = populations(subject, self.models, run)
        said = [
            torch.cat([confidences(models, forget, run), _accuracies(models, (retain, test), run)], 1)
            for models in (made.unlearned, made.retrained)
        ]  # [N, n + 2] of either kind, the accuracies last
        quality, score = _scores(said[0], said[1][: self.models])
        floors = [_scores(one, other) for one, other in parted(said[1], run)]
        protocol = {"models of each kind": self.models}
        common: dict[str, Any] = {"n": len(forget), "unit": "score", "margin": self.margin, "protocol": protocol}
        references = [tuple(floor[k][0] for floor in floors) for k in range(2)]
        return [
            Finding("forgetting quality", quality[0], interval=quality[1], reference=references[0], **common),
            Finding("forgetting score", score[0], interval=score[1], reference=references[1], **common),
        ]


def _accuracies(models: Sequence[nn.Module], tables: Sequence[Table], run: Run) -> Tensor:
    """[N, tables] of every model."""
    shares = [[float(hits(model, table, run=run).double().mean()) for table in tables] for model in models]
    return torch.tensor(shares, dtype=torch.float64)


def _scores(one: Tensor, other: Tensor) -> tuple[Measured, Measured]:
    """Forgetting quality and score of models `one` beside retrained ones, both [N, n + 2]."""
    models = len(one)
    epsilons = row_epsilons(one[:, :-2], other[:, :-2])
    found = mean(points(epsilons, models))
    low, high = max(0.0, found.low), min(1.0, found.high)
    pairs = [(float(one[:, k].mean()), float(other[:, k].mean())) for k in (-2, -1)]
    left = forgetting_score([0.0], models, pairs[0], pairs[1])  # of full points
    return (found.value, (low, high)), (left * found.value, (left * low, left * high))
