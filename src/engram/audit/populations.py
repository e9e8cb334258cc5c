"""What probes over many models share: which rows they can look at, what every model says of them, what retraining alone
would give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from engram.core.probe import Measured, Probe, Subject, labelled
from engram.core.settings import name_of
from engram.data.table import Batch, Table, Target
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.stats import scores
from engram.stats.intervals import bootstrap

CLIP = 100.0  # of confidences, on both sides
LEAST = 2  # rows
FLOORS = 8  # how often the retrained models are parted for the noise floor
RESAMPLES = 200


@dataclass(kw_only=True, eq=False)
class PopulationProbe(Probe):
    """Compares `models` unlearned models with as many retrained ones, by their confidences in the labels of `tables`;
    `least`: of how many it can say anything."""

    models: int = 100

    asks: ClassVar[frozenset[str]] = frozenset({"model", "request", "forget", "retain", "test", "recipe", "forgetter"})
    tables: ClassVar[tuple[str, ...]] = ("forget", "retain", "test")
    least: ClassVar[int] = 3

    def check(self, subject: Subject) -> None:
        """EngramError for what is not at hand, rows without class labels, and too few models."""
        super().check(subject)
        models_enough(self, self.models, self.least)
        for name in self.tables:
            class_rows(self, subject, name)


@dataclass(frozen=True)
class Populations:
    """N models after forgetting, and twice as many retrained ones: N to compare with, and N more for the floor."""

    unlearned: list[nn.Module]
    retrained: list[nn.Module]

    @property
    def compared(self) -> list[nn.Module]:
        """The N retrained models that the unlearned ones are compared with."""
        return self.retrained[: len(self.unlearned)]


def populations(subject: Subject, n: int, run: Run) -> Populations:
    """Trained once per run, for all probes. Cost: 3 n trainings and n times forgetting."""
    unlearned = [made.model for made in subject.models("unlearned", n, run)]
    return Populations(unlearned, [made.model for made in subject.models("oracle", 2 * n, run)])


def parted(retrained: Tensor, run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Retrained models [2 N, …] against retrained models: random halves of N each, some times over."""
    draws = run.generator("parts of the retrained models")
    for _ in range(FLOORS):
        one, other = torch.randperm(len(retrained), generator=draws).tensor_split(2)
        yield retrained[one], retrained[other]


def class_rows(probe: Probe, subject: Subject, name: str) -> Table:
    """The labelled rows of a table of the subject. EngramError where their labels are no classes, or are missing."""
    table = subject.rows[name]
    if table.target in (Target.NUMBERS, Target.TOKENS):
        raise EngramError(f"{name_of(probe)} is for classifiers, and the labels of the {name} rows are {table.target}")
    known = labelled(table)
    if len(known) < LEAST:
        raise EngramError(
            f"{name_of(probe)} needs class labels on {LEAST} {name} rows or more; "
            f"{len(known)} of {len(table)} rows have one"
        )
    return known


def models_enough(probe: Probe, n: int, least: int) -> None:
    """EngramError for fewer models than can say anything."""
    if n < least:
        raise EngramError(f"{name_of(probe)} needs {least} models or more of each kind to say anything, not {n}")


def confidences(models: Sequence[nn.Module], table: Table, run: Run) -> Tensor:
    """Margins, the logits of the label's probability, of every row by every model: [N, n] float64, within ±100."""
    found = [predict(model, table, _margin, run=run) for model in models]
    return torch.stack(found).clamp(-CLIP, CLIP)


def chances(probe: Probe, model: nn.Module, table: Table, run: Run) -> Tensor:
    """Class probabilities [n, C] float64; labels are not needed. EngramError for models of numbers or tokens."""
    logits = predict(model, table, run=run)
    if table.target in (Target.NUMBERS, Target.TOKENS) or logits.ndim != 2 or logits.shape[1] < 2:
        raise EngramError(f"{name_of(probe)} compares class probabilities, and this model gives none")
    return torch.softmax(logits.double(), 1).nan_to_num()


def with_columns(logits: Tensor, labels: Tensor) -> Tensor:
    """Class logits [B, C] with columns of -inf for those classes of the labels [B] that a model never heard of; others
    as they are."""
    if labels.ndim != 1 or labels.is_floating_point() or logits.ndim != 2 or not len(labels):
        return logits
    missing = max(0, int(labels.max()) + 1 - logits.shape[1])
    return nn.functional.pad(logits, (0, missing), value=-torch.inf)


def alike(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same number of classes: one that a model never heard of has probability 0."""
    width = max(p.shape[1], q.shape[1])
    p, q = (nn.functional.pad(x, (0, width - x.shape[1])) for x in (p, q))
    return p, q


def over_rows(values: Tensor, statistic: Callable[[np.ndarray], float], run: Run) -> Measured:
    """A statistic of rows [n, …] with its bootstrap interval over the rows, which takes in the value itself."""
    found = bootstrap(values, statistic, np.random.default_rng(run.number("resampled rows")), resamples=RESAMPLES)
    return found.value, (min(found.low, found.value), max(found.high, found.value))


def _margin(output: Any, batch: Batch) -> Tensor:
    assert batch.labels is not None
    logits = with_columns(output.logits.double(), batch.labels)
    return scores.margin(logits, batch.labels).nan_to_num(-CLIP, CLIP, -CLIP)
