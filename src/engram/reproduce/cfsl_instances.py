"""More classes make continual few-shot learning harder, occlusion breaks instance recognition, replay helps both.

On numbers of three of scikit-learn's handwritten digits, side by side in one image of 8 × 24: a thousand classes of
real handwriting. Learners are pretrained on some numbers, made of one part of the digits, and examined on other
numbers, made of the other part. A small fully connected network; the published networks are convolutional and see
Omniglot.

That ProtoNet tells more classes right than the nearest image by pixels lies outside its band: digits of one size in
fixed places are nearly as alike by their pixels as they can be, and sixty numbers teach an encoder no more. Characters
of Omniglot, whose place and slant differ from drawer to drawer, are in the table of results.

Baselines: the nearest support image by the cosine of pixels, and tuning on all support sets at once, which is the upper
bound of tuning. The published replay takes many more gradient steps than tuning without; here its gain is measured
over as many steps without replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from engram.audit.few_shot import FewShotProtocol
from engram.core.finding import Finding
from engram.core.learner import Learner
from engram.core.probe import Subject
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.run import Run
from engram.keep.pretrain_tune import PretrainTune
from engram.keep.proto_net import ProtoNet
from engram.reproduce.claims import Claim
from engram.reproduce.digits import digits
from engram.stats.knn import nearest
from engram.stats.seeds import generator

PLACES, BASE, NOVEL, ROWS = 3, 60, 240, 20
NETWORK = {"name": "MLP", "hidden": [128, 64]}
HARD = "instances 10x2"
STEPS, EPISODES = 20, 10
SLOW = ("tuning, more steps", "replay", "joint")


@dataclass(frozen=True)
class World:
    """Numbers to pretrain on, and other numbers to be examined on."""

    base: Table
    novel: Table


@cache
def world(seed: int) -> World:
    """Numbers of a seed; no digit image of the base is in the others."""
    train, test = digits()
    order = torch.randperm(10**PLACES, generator=generator("numbers", seed))
    return World(
        written(train, order[:BASE], "base", seed),
        written(test, order[BASE : BASE + NOVEL], "novel", seed),
    )


def written(table: Table, numbers: Tensor, name: str, seed: int) -> Table:
    """`ROWS` images [1, 8, 24] of each number, of digits drawn from a table; classes are 0, 1, … in their order."""
    assert table.labels is not None
    figures = torch.stack([numbers // 10**place % 10 for place in reversed(range(PLACES))], 1).repeat_interleave(
        ROWS, 0
    )
    pools = [(table.labels == digit).nonzero()[:, 0] for digit in range(10)]
    chosen = torch.rand(figures.shape, generator=generator(name, seed))
    cells = zip(figures.flatten().tolist(), chosen.flatten().tolist(), strict=True)
    rows = torch.stack([pools[digit][int(u * len(pools[digit]))] for digit, u in cells])
    images = table.inputs["pixel_values"][rows, 0].reshape(len(figures), PLACES, 8, 8)
    labels = torch.arange(len(numbers)).repeat_interleave(ROWS)
    ids = tuple(f"{name}-{row}" for row in range(len(labels)))
    return Table({"pixel_values": images.transpose(1, 2).flatten(2)[:, None]}, labels, ids)


def claims(seeds: Iterable[int]) -> list[Claim]:
    """How accuracy depends on the number of classes, occlusion and replay, and what the best learner is."""
    seeds = list(seeds)
    labs = [Laboratory(seed, 2 if len(seeds) == 1 else EPISODES) for seed in seeds]

    def claim(says: str, paper: str, band: tuple[float, float], *parts: tuple[str, Any, float]) -> Claim:
        one, other = ([lab.accuracy(*part) for lab in labs] for part in parts)
        return Claim(says, paper, band, tuple(a - b for a, b in zip(one, other, strict=True)))

    fall = "more classes are harder"
    helps = "replay helps much, most for instances"
    bound = "no figure: a bound that is set here"
    return [
        claim("ProtoNet: accuracy of 10 classes less that of 20", fall, (0.03, 0.4), proto("base"), proto("long A")),
        claim("tuning: accuracy of 10 classes less that of 20", fall, (0.03, 0.4), tuned("base"), tuned("long A")),
        claim(
            "ProtoNet's accuracy less tuning's, 20 classes in 20 sets",
            "ProtoNet is best in most tests",
            (0.2, 0.9),
            proto("new long A"),
            tuned("new long A"),
        ),
        claim(
            "ProtoNet: accuracy on 20 instances less that on 20 classes",
            "the plain instance test is as accurate as class tests",
            (-0.05, 0.6),
            proto(HARD),
            proto("long A"),
        ),
        claim(
            "ProtoNet: accuracy on instances less that with 75 % hidden",
            "poor under strong occlusion",
            (0.3, 1.0),
            proto(HARD),
            proto(HARD, 0.75),
        ),
        claim("gain by replay, instances, over tuning as published", helps, (0.2, 0.95), replayed(HARD), tuned(HARD)),
        claim("gain by replay, instances, at equal steps", helps, (0.2, 0.95), replayed(HARD), longer(HARD)),
        claim("gain by replay, classes, at equal steps", helps, (0.1, 0.7), replayed("base"), longer("base")),
        claim("tuning on all sets at once less replay, instances", bound, (0.0, 0.6), joint(HARD), replayed(HARD)),
        claim(
            "ProtoNet's accuracy less that of pixels, 20 classes", bound, (0.05, 0.6), proto("long A"), near("long A")
        ),
    ]


Part = tuple[str, Any, float]  # the learner, the configuration, the share hidden


def part(kind: str, name: Any, hidden: float = 0.0) -> Part:
    """A kind of learner in a configuration."""
    return kind, name, hidden


proto, near = partial(part, "ProtoNet"), partial(part, "pixels")  # near: the nearest support image
tuned, replayed = partial(part, "tuning"), partial(part, "replay")  # five steps a set; and with the last five sets
longer = partial(part, "tuning, more steps")  # as many steps as with replay, without it
joint = partial(part, "joint")  # as many steps in all, on the support sets together


class Laboratory:
    """Learners of one seed, each pretrained once, and what was found of them in each configuration. `slow`: episodes of
    the learners that take many steps."""

    def __init__(self, seed: int, slow: int = EPISODES) -> None:
        self.world, self.slow, self.seed = world(seed), slow, seed
        self.known: dict[str, Learner] = {}
        self.found: dict[str, list[Finding]] = {}

    def accuracy(self, name: str, shape: Any, hidden: float = 0.0) -> float:
        """Of a learner in a configuration, with a share of the queries' area hidden."""
        key = f"{name} {shape}"
        if key not in self.found:
            self.found[key] = self.examined(name, shape)
        return self.found[key][0 if hidden == 0 else 1].value

    def examined(self, name: str, shape: Any) -> list[Finding]:
        """The findings of a configuration, whole and with three quarters hidden; equal episodes for all learners."""
        count = self.slow if name in SLOW else EPISODES
        settings: dict[str, Any] = {"configurations": (shape,), "episodes": count, "levels": (0.0, 0.75)}
        probe = FewShotProtocol(**settings, together=name == "joint")
        if name == "pixels":
            return probe.findings(by_pixels, self.world.novel, Run())
        learner = self.learner(name)
        return probe.examine(Subject(learner.model, rows={"test": self.world.novel}, learner=learner), Run())

    def learner(self, name: str) -> Learner:
        """A learner that knows the base."""
        if name not in self.known:
            self.known[name] = LEARNERS[name]()
            self.known[name].learn(Task(self.world.base), Run(seed=self.seed))
        return self.known[name]


def proto_net(epochs: int = 60) -> ProtoNet:
    """ProtoNet for the numbers."""
    return ProtoNet(network=NETWORK, epochs=epochs, batch_size=60, ways=10)


def pretrain_tune(**settings: Any) -> PretrainTune:
    """Pretraining and tuning for the numbers."""
    return PretrainTune(network=NETWORK, epochs=20, batch_size=60, rate=0.03, **settings)


LEARNERS: dict[str, Callable[[], Learner]] = {
    "ProtoNet": proto_net,
    "tuning": pretrain_tune,
    "tuning, more steps": partial(pretrain_tune, steps=STEPS),
    "replay": partial(pretrain_tune, steps=STEPS, sets=5, replayed=8),
    "joint": partial(pretrain_tune, steps=10 * STEPS),
}


def by_pixels(shown: Sequence[Table], asked: Sequence[Table], run: Run) -> Iterator[Tensor]:
    """A baseline for `FewShotProtocol.findings`: the label of the nearest support image, by the cosine of pixels."""
    bank = shown[0].concat(*shown[1:])
    for queries in asked:
        assert bank.labels is not None and queries.labels is not None
        _, place = nearest(_flat(queries), _flat(bank), 1)
        yield bank.labels[place[:, 0]].eq(queries.labels)


def _flat(rows: Table) -> Tensor:
    return rows.inputs["pixel_values"].flatten(1).float()
