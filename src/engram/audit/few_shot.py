"""The benchmark of continual few-shot learning, as a probe of a learner: class test and instance test.

Antoniou, Patacchiola, Ochal, Storkey: Defining Benchmarks for Continual Few-Shot Learning. arXiv 2004.11967 (2020);
Kowadlo, Ahmed, Mayan, Rawlinson: Expanding continual few-shot learning benchmarks to include recognition of specific
instances. PLOS ONE 2024, arXiv 2209.07863.

In every episode a fork of the learner takes in a few small support sets, one after the other, and then tells the
queries of all of them apart; after that the fork is gone. In the class test queries are other rows of the classes that
were shown; in the instance test every row is a class, and the queries are these very rows, as they were or damaged.

An episode's classes follow after all columns that the learner has, and it chooses among them alone: so any learner can
be examined, on rows of classes that it never saw. Predictions are of the row alone; published ones use the batch
statistics of all queries together. Chance is 1 / the number of labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from engram.core.finding import Finding, figure
from engram.core.learner import Learner, fork
from engram.core.probe import Probe, Subject
from engram.data.episodes import Episode, episodes
from engram.data.noise import corrupted
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.predict import hits, predict
from engram.engine.run import Run
from engram.errors import EngramError, unknown
from engram.stats.intervals import mean

# support sets in order, tables of queries, a run -> for each of these tables, the mask [n] of rows told right
Answer = Callable[[Sequence[Table], Sequence[Table], Run], Iterable[Tensor]]


@dataclass(frozen=True)
class Configuration:
    """What an episode is made of; see `data.episodes`."""

    ways: int
    shots: int
    sets: int
    change: int = 1
    instances: bool = False

    @property
    def group(self) -> int:
        """Labels that come together: those of a block of sets, or of a set of the instance test."""
        return self.ways * self.shots if self.instances else self.ways

    @property
    def labels(self) -> int:
        """The number of labels of an episode."""
        return self.group * self.sets // (1 if self.instances else self.change)

    @property
    def title(self) -> str:
        """In words."""
        kind = "instances" if self.instances else f"change {self.change}"
        return f"{self.ways}-way {self.shots}-shot x {self.sets}, {kind}"


CONFIGURATIONS: dict[str, Configuration] = {
    "base": Configuration(5, 1, 4, 2),
    "long A": Configuration(5, 1, 8, 2),
    "new long A": Configuration(2, 1, 20, 2),
    "wide A": Configuration(10, 1, 4, 2),
    "wide B": Configuration(100, 1, 4, 2),
    **{
        f"instances {sets}x{shots}": Configuration(1, shots, sets, instances=True)
        for sets, shots in ((1, 20), (2, 10), (4, 5), (10, 2), (20, 1))
    },
}  # of the published code


@dataclass(kw_only=True, eq=False)
class FewShotProtocol(Probe):
    """Mean accuracy of a learner over episodes, with a t interval over them; the subject's learner stays as it is.

    `configurations`: published names, or mappings of `ways`, `shots`, `sets`, `change` and `instances`. `queries`: rows
    asked about per class and set. `damage`, `levels`: what is done to the queries of instance tests, see
    `data.noise.corrupt`; each level has a finding. `together`: all support sets are shown at once, an upper bound for a
    learner that takes as many steps in all.
    The curve of a finding is the accuracy by order of arrival: of the classes of each block of sets, or the instances
    of each set. EngramError for an unknown configuration, fewer than 2 episodes, and test rows that do not suffice.
    Cost: for every episode a copy of the learner, what it takes to learn `sets` tasks, and a pass over the queries.
    """

    configurations: Sequence[Any] = ("base", "long A", "new long A", "wide A", "instances 4x5")
    queries: int = 5
    episodes: int = 100
    damage: str = "occlusion"
    levels: Sequence[float] = (0.0, 0.25, 0.5, 0.75)
    together: bool = False

    asks: ClassVar[frozenset[str]] = frozenset({"learner", "test"})

    @classmethod
    def tiny(cls) -> FewShotProtocol:
        shapes = {"ways": 2, "shots": 1, "sets": 2}, {"ways": 1, "shots": 1, "sets": 3, "instances": True}
        return cls(configurations=shapes, queries=1, episodes=2, levels=(0.0, 0.5))

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        self.check(subject)
        assert subject.learner is not None
        known = predict(subject.learner.model, subject.rows["test"].take([0])).shape[1]
        return self.findings(partial(_answered, subject.learner, known), subject.rows["test"], run or Run())

    def findings(self, answer: Answer, test: Table, run: Run) -> list[Finding]:
        """The same about any way to answer, for baselines that are no learners. Episodes depend on the run's seed, the
        configuration and the rows alone."""
        found: list[Finding] = []
        for name in self.configurations:
            shape = configuration(name)
            with run.scope("few-shot", name if isinstance(name, str) else shape.title):
                scores = run.phase("episodes", partial(self._scores, answer, test, shape, run))
            found += self._findings(name, shape, scores)
        return found

    def check(self, subject: Subject) -> None:
        """EngramError for what is not at hand, an unknown configuration, and too few episodes for an interval."""
        super().check(subject)
        for name in self.configurations:
            configuration(name)
        if self.episodes < 2:
            raise EngramError(f"an interval needs 2 episodes or more, not {self.episodes}")

    def _scores(self, answer: Answer, test: Table, shape: Configuration, run: Run) -> Tensor:
        """Accuracies [levels, episodes, groups]."""
        drawn = episodes(test, queries=self.queries, count=self.episodes, seed=run.number("episodes"), **asdict(shape))
        found = []
        with run.progress(f"few-shot episodes, {shape.title}", self.episodes) as advance:
            for k, episode in enumerate(drawn):
                inner = Run(seed=run.number("episode", k), device=str(run.device))
                asked = [self._damaged(episode.queries, level, k, run) for level in self._levels(shape)]
                answered = answer(self._shown(episode), asked, inner)
                found.append(torch.stack([_by_group(hit, episode.queries, shape) for hit in answered]))
                run.cost.add(inner.cost)
                advance(1)
        return torch.stack(found, 1)

    def _levels(self, shape: Configuration) -> Sequence[float]:
        return self.levels if shape.instances else (0.0,)

    def _damaged(self, queries: Table, level: float, number: int, run: Run) -> Table:
        return corrupted(queries, self.damage, level, run.generator("damage", number)) if level else queries

    def _shown(self, episode: Episode) -> Sequence[Table]:
        first, *others = episode.supports
        return (first.concat(*others),) if self.together else episode.supports

    def _findings(self, name: Any, shape: Configuration, scores: Tensor) -> Iterator[Finding]:
        for level, values in zip(self._levels(shape), scores, strict=True):
            estimate = mean(values.mean(1))
            interval = max(0.0, estimate.low), min(1.0, estimate.high)
            damaged = f", {self.damage} {level:g}" if shape.instances else ""
            yield figure(
                f"accuracy, {name if isinstance(name, str) else shape.title}{damaged}",
                estimate.value,
                self.episodes,
                "accuracy",
                interval=interval,
                better="higher",
                protocol={**asdict(shape), "queries": self.queries, "labels": shape.labels, "together": self.together},
                curve={"accuracy by arrival": values.mean(0).tolist()},
            )


def configuration(name: str | Mapping[str, Any]) -> Configuration:
    """A configuration by its published name, or from its numbers."""
    if isinstance(name, Mapping):
        return Configuration(**name)
    if name not in CONFIGURATIONS:
        raise unknown("few-shot configuration", name, CONFIGURATIONS)
    return CONFIGURATIONS[name]


def _answered(
    learner: Learner, known: int, shown: Sequence[Table], asked: Sequence[Table], run: Run
) -> Iterator[Tensor]:
    """For each table that is asked about, the mask of rows that a fork tells right when it has learnt what is shown."""
    twin = fork(learner)
    seen: set[int] = set()
    for k, support in enumerate(shown):
        rows = _after(support, known)
        twin.learn(Task(rows, None, k + 1, tuple(c for c in rows.classes if c not in seen), rows.names), run)
        seen |= set(rows.classes)
    twin.refresh(run)
    return (hits(twin.model, _after(table, known), classes=tuple(sorted(seen)), run=run) for table in asked)


def _after(rows: Table, known: int) -> Table:
    """The same rows with labels that follow after those a learner has columns for."""
    assert rows.labels is not None
    names = {label + known: name for label, name in rows.names.items()}
    return replace(rows, labels=rows.labels + known, names=names)


def _by_group(hit: Tensor, queries: Table, shape: Configuration) -> Tensor:
    """The share of hits [groups] among the queries of each group of labels."""
    assert queries.labels is not None
    groups = queries.labels // shape.group
    return torch.stack([hit[groups == g].double().mean() for g in groups.unique()])
