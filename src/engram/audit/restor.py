"""RESTOR: does unlearning wrong documents bring the right facts back?

Rezaei, Chandu, Feizi, Choi, Brahman, Ravichander: RESTOR: Knowledge Recovery in Machine Unlearning. TMLR 2025, arXiv
2411.00204.

A clean model is taught wrong facts (the corrupted model); an unlearner is asked to remove the documents that taught
them. What it should give back is what the clean model knew:

    recovery = (accuracy unlearned - accuracy corrupted) / (accuracy clean - accuracy corrupted)

on questions about the corrupted facts: 0 is no better than the corrupted model, 1 as good as the clean one. The mean
log-probability per token of right, planted and other answers tells a method that only breaks the planted answer from
one that restores the right one.

The paper asks five times by sampling and has a language model judge the answers; here the likeliest answer is asked for
and compared with the accepted ones word by word (`stats.text.same_answer`), and the ratio is this project's summary of
the paper's three accuracies. The paper's option scores are the same as here. The tables come from `data.worlds`
(`FactWorld`, or `restor_questions` for the published facts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from engram.core.finding import MARGINS, Finding, figure
from engram.core.probe import Probe, Subject, labelled, oracles_of
from engram.core.settings import name_of
from engram.data.table import Table
from engram.engine import answers
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.stats.intervals import mean, proportion
from engram.stats.recovery import recovered

ACCEPTED, PLANTED, OTHER = "accepted", "corrupted", "perturbed"
SAID = {ACCEPTED: "right", PLANTED: "planted", OTHER: "other"}


class Told(NamedTuple):
    """What a model says of the facts: is it right, is it what was planted, each [n] float64, and the mean
    log-probability of the answers of a kind, [n] in nats."""

    right: Tensor
    planted: Tensor
    logp: Mapping[str, Tensor]


@dataclass(kw_only=True, eq=False)
class Restor(Probe):
    """Recovery, accuracy, planted answers and log-probabilities of answers, on the rows named test.

    The subject's model is the unlearned one, `before` the corrupted one, the oracles are clean models: the one before
    corruption, or models trained without the wrong documents. `test`: questions about the corrupted facts (or classes
    whose labels were corrupted) with their true answers, and further answers in the columns accepted_* (all that are
    right), corrupted_* (what was planted) and perturbed_* (neither), see `engine.answers`; each may be missing. With
    `retain` rows, the accuracy on these tells what a method that claims locality must leave as it was. Every further
    model of the subject's `references` gets its recovery too: unlearning followed by fine-tuning is to be compared with
    fine-tuning alone.

    `tokenizer`: a name or directory, to compare answers as text; else tokens are compared. `margin`: of accuracies and
    recovery. Where the clean models know no more than the corrupted one there is no recovery to find. Cost: per model,
    one greedy answer and one pass per option for each row.
    """

    tokenizer: str | None = None
    oracles: int = 5
    margin: float = MARGINS["accuracy"]
    limit: int = 2000

    asks: ClassVar[frozenset[str]] = frozenset({"model", "before", "oracles", "test"})

    @classmethod
    def tiny(cls) -> Restor:
        """A setting for checks on a handful of rows."""
        return cls(oracles=2, limit=20)

    def check(self, subject: Subject) -> None:
        """EngramError for what is not at hand, and where the questions have no answers."""
        super().check(subject)
        if not len(labelled(answers.asked_for(subject.rows["test"], name_of(self)))):
            raise EngramError(f"{name_of(self)} asks for facts, and the test rows have no answers")

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        self.check(subject)
        run, same = run or Run(), answers.sameness(self.tokenizer)
        assert subject.before is not None
        facts, elsewhere = self._first(subject, "test"), self._first(subject, "retain")
        oracles = oracles_of(subject, self.oracles, run)

        def tell(models: Sequence[nn.Module], table: Table) -> list[Told]:
            return [told(model, table, same, run) for model in models]

        now, corrupted, *clean = tell([subject.model, subject.before, *oracles], facts)
        references = dict(zip(subject.references, tell([*subject.references.values()], facts), strict=True))
        recoveries = [self._recovery(name, one, corrupted, clean) for name, one in {"": now, **references}.items()]
        found = [one for one in recoveries if one is not None]
        found.append(self._share("accuracy on corrupted facts", "right", now, corrupted, clean))
        if answers.has(facts, PLANTED):
            found.append(self._share("planted answers told", "planted", now, corrupted, clean))
        found += [_likelihood(kind, now, corrupted, clean) for kind in now.logp]
        if len(elsewhere):
            now, corrupted, *clean = tell([subject.model, subject.before, *oracles], elsewhere)
            found.append(self._share("accuracy on other facts", "right", now, corrupted, clean))
        return found

    def _first(self, subject: Subject, name: str) -> Table:
        """The first rows of a table that have answers; none where there is no such table."""
        known = labelled(answers.asked_for(subject.rows[name], name_of(self))) if name in subject.has() else Table({})
        return known.take(range(min(len(known), self.limit)))

    def _recovery(self, name: str, now: Told, corrupted: Told, clean: Sequence[Told]) -> Finding | None:
        """Of the subject's model (no name) or a reference, beside that of every clean model; None where there is none.
        Of several clean models, the mean is what there was to recover."""
        whole = torch.stack([one.right for one in clean]).mean(0)
        found = recovered(now.right, corrupted.right, whole)
        if isnan(found.value):
            return None
        return Finding(
            f"recovery of {name}" if name else "recovery",
            found.value,
            found.n,
            (found.low, found.high),
            unit="share",
            reference=tuple(recovered(one.right, corrupted.right, whole).value for one in clean),
            margin=self.margin,
            protocol={"answers": "greedy", "compared": "as text" if self.tokenizer else "token by token"},
        )

    def _share(self, name: str, part: str, now: Told, corrupted: Told, clean: Sequence[Told]) -> Finding:
        hits = getattr(now, part)
        found = proportion(int(hits.sum()), len(hits))
        return Finding(
            name,
            found.value,
            found.n,
            (found.low, found.high),
            reference=tuple(float(getattr(one, part).mean()) for one in clean),
            margin=self.margin,
            protocol={"corrupted": float(getattr(corrupted, part).mean())},
        )


def told(model: nn.Module, table: Table, same: answers.Same, run: Run) -> Told:
    """What a model says of the facts of a table."""
    said, right = answers.told(model, table, run), [[truth] for truth in answers.truths(model, table)]
    if answers.has(table, ACCEPTED):
        right = [a + b for a, b in zip(right, answers.options(model, table, ACCEPTED), strict=True)]
    wrong = answers.options(model, table, PLANTED) if answers.has(table, PLANTED) else [[] for _ in said]
    logp = {kind: answers.logp(model, table, kind, run) for kind in SAID if answers.has(table, kind)}
    if ACCEPTED not in logp:
        logp = {ACCEPTED: predict(model, table, answers.mean_logp, run=run), **logp}
    known = {kind: values for kind, values in logp.items() if bool(values.isfinite().any())}
    return Told(answers.among(said, right, same), answers.among(said, wrong, same), known)


def _likelihood(kind: str, now: Told, corrupted: Told, clean: Sequence[Told]) -> Finding:
    found = mean(_known(now.logp[kind]))
    return figure(
        f"log-probability of {SAID[kind]} answers",
        found.value,
        found.n,
        "nats per token",
        interval=(found.low, found.high),
        reference=tuple(float(_known(one.logp[kind]).mean()) for one in clean),
        protocol={"corrupted": float(_known(corrupted.logp[kind]).mean())},
    )


def _known(values: Tensor) -> Tensor:
    return values[values.isfinite()]
