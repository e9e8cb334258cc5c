"""Membership attacks: can one tell from the model's outputs that the forget rows were trained on?

Forget rows are the members, test rows the others. The attack compares one score per row (Yeom et al. 2018,
arXiv 1709.01604); TPR at a low FPR says what it achieves with certainty (Carlini et al. 2022, arXiv 2112.03570). An AUC
of 0.5 is not the aim: the aim is the AUC of the same attack on models that never saw the forget rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engram.audit.populations import with_columns
from engram.core.finding import MARGINS, Finding, figure
from engram.core.probe import Measured, Probe, Subject, compared, labelled, oracles_of
from engram.core.settings import name_of
from engram.data.table import Batch, Table, Target
from engram.engine.losses import per_row, token_losses
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError, unknown
from engram.stats import scores
from engram.stats.intervals import Estimate, auc, tpr_at
from engram.stats.membership import logistic_attack, roc

POINTS = 64  # of a curve that is kept
LEAST_LIKELY = 0.2  # share of an answer's tokens
LEAST = 10  # rows a side for the logistic attack


@dataclass(kw_only=True, eq=False)
class Membership(Probe):
    """The loss-threshold attack (AUC and ROC curve), its TPR at 1 % FPR, and the logistic attack on the loss.

    `score`: "loss", "entropy" (needs no labels), "confidence" (logit of the label's probability), or for token rows
    "min-k" (mean log-probability of the fifth of an answer's tokens that is least likely: Shi et al., Detecting
    Pretraining Data from Large Language Models, ICLR 2024, arXiv 2310.16789; for classes the loss). After a class
    request the others are test rows of the forgotten classes, if there are any (as in SCRUB). The same attack on the
    model before forgetting is given as a plain figure. EngramError where a score does not suit the labels, or there
    are none. Cost: one forward pass over forget and test rows per model.
    """

    score: str = "loss"
    fpr: float = 0.01
    oracles: int = 5
    margin: float = MARGINS["AUC"]

    asks: ClassVar[frozenset[str]] = frozenset({"model", "forget", "test"})

    @classmethod
    def tiny(cls) -> Membership:
        """A setting for checks on a handful of rows."""
        return cls(oracles=2)

    def check(self, subject: Subject) -> None:
        """EngramError for what is not at hand, an unknown score, and rows that it cannot be taken of."""
        super().check(subject)
        if self.score not in SCORES:
            raise unknown("score", self.score, SCORES)
        forget = subject.rows["forget"]
        if self.score in FOR_CLASSES and forget.target in (Target.NUMBERS, Target.TOKENS):
            raise EngramError(
                f"{name_of(self)} with score={self.score!r} is for classifiers, and the labels of the forget rows are "
                f"{forget.target}; use score='loss'"
            )
        if self.score == "min-k" and forget.target == Target.NUMBERS:
            raise EngramError(
                f"{name_of(self)} with score='min-k' wants tokens or classes, no numbers; use score='loss'"
            )
        for side, table in zip(("forget", "test"), self._sides(subject), strict=True):
            if not len(table):
                raise EngramError(
                    f"{name_of(self)} with score={self.score!r} needs labels, and no {side} row has one; "
                    "score='entropy' does without"
                )

    def _sides(self, subject: Subject) -> tuple[Table, Table]:
        """Members and others."""
        others = "test-forget" if len(subject.rows.get("test-forget", ())) else "test"
        both = subject.rows["forget"], subject.rows[others]
        return both if self.score == "entropy" else (labelled(both[0]), labelled(both[1]))

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        self.check(subject)
        run = run or Run()
        members, others = self._sides(subject)
        oracles = oracles_of(subject, self.oracles, run)
        attack = _Attack(members, others, self.score, run)
        common: dict[str, Any] = {"n": min(len(members), len(others)), "protocol": attack.protocol}
        model = subject.model
        found = [
            compared(
                "AUC of the threshold attack", attack.auc, model, oracles, unit="AUC", margin=self.margin, **common
            ),
            compared(
                f"TPR at {self.fpr:.0%} FPR",
                attack.rate(self.fpr),
                model,
                oracles,
                unit="rate",
                margin=self.margin,
                **common,
            ),
        ]
        found[0] = Finding(**{**_fields(found[0]), "curve": attack.curve(model)})
        if min(len(members), len(others)) >= LEAST:
            logistic = attack.logistic(run.number("logistic attack"))
            name = "accuracy of the logistic attack"
            found.append(compared(name, logistic, model, oracles, unit="accuracy", margin=self.margin, **common))
        if subject.before is not None:
            value, interval = attack.auc(subject.before)
            name = "AUC of the threshold attack before forgetting"
            found.append(figure(name, value, common["n"], "AUC", interval=interval, protocol=attack.protocol))
        return found


class _Attack:
    def __init__(self, members: Table, others: Table, score: str, run: Run) -> None:
        self.members, self.others, self.score, self.run = members, others, score, run
        self.protocol = {"score": score, "members": len(members), "others": len(others)}

    def auc(self, model: nn.Module) -> Measured:
        return _measured(auc(*self._scores(model)))

    def rate(self, fpr: float) -> Any:
        return lambda model: _measured(tpr_at(*self._scores(model), fpr))

    def logistic(self, seed: int) -> Any:
        def measure(model: nn.Module) -> Measured:
            members, others = self._scores(model)
            return _measured(logistic_attack(-members, -others, seed=seed))

        return measure

    def curve(self, model: nn.Module) -> dict[str, list[float]]:
        found = roc(*self._scores(model))
        keep = torch.linspace(0, len(found.fpr) - 1, min(POINTS, len(found.fpr))).long().tolist()
        return {"fpr": [float(found.fpr[i]) for i in keep], "tpr": [float(found.tpr[i]) for i in keep]}

    def _scores(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Scores that are higher for members."""
        reader = SCORES[self.score]
        members, others = (
            predict(model, table, reader, run=self.run).double() for table in (self.members, self.others)
        )
        return members.clamp(-1e6, 1e6), others.clamp(-1e6, 1e6)  # a label whose class is not live has an infinite loss


def _loss(output: Any, batch: Batch) -> Tensor:
    assert batch.labels is not None
    return -per_row(with_columns(output.logits, batch.labels), batch.labels)


def _entropy(output: Any, batch: Batch) -> Tensor:
    return -scores.entropy(output.logits)


def _confidence(output: Any, batch: Batch) -> Tensor:
    assert batch.labels is not None
    return scores.margin(with_columns(output.logits, batch.labels), batch.labels)


def _min_k(output: Any, batch: Batch) -> Tensor:
    if batch.labels is None or batch.labels.ndim == 1:
        return _loss(output, batch)
    losses, counts = token_losses(output.logits, batch.labels)
    taken = (counts * LEAST_LIKELY).ceil().clamp(min=1)
    hardest = losses.sort(1, descending=True).values
    return -(hardest * (torch.arange(losses.shape[1], device=losses.device) < taken[:, None])).sum(1) / taken


SCORES = {"loss": _loss, "entropy": _entropy, "confidence": _confidence, "min-k": _min_k}
FOR_CLASSES = ("entropy", "confidence")


def _measured(found: Estimate) -> Measured:
    return found.value, (found.low, found.high)


def _fields(finding: Finding) -> dict[str, Any]:
    return {name: getattr(finding, name) for name in finding.__dataclass_fields__}
