"""LingoCL on real sentences and images: the head trained, or frozen with vectors of the classes' names, of other
classes' names, or of chance.

python -m benchmarks.tables.lingocl --data FEATURES --out docs/results/lingocl.md

FEATURES is what `python -m benchmarks.features` writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.tables.common import by_hand, page, said, write
from engram.compare.course import follow
from engram.core.learner import Learner
from engram.core.learning import GradientLearner
from engram.data.readers import read, train_test
from engram.data.streams import Stage, class_stream
from engram.data.table import Table
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.keep.finetune import Finetune
from engram.keep.lingocl import LingoCL
from engram.keep.lwf import LwF
from engram.keep.replay import Replay
from engram.models import MLP, LinearHead, Predictor, seeded
from engram.models.language_head import Mapped
from engram.models.text import read_vectors
from engram.reproduce.claims import Claim
from engram.stats.intervals import mean
from engram.stats.seeds import generator

STREAMS = {  # title: (files, classes of a task)
    "CLINC150, (15, 15, 10)": ("clinc150", 15),
    "CIFAR-100, (10, 10, 10)": ("cifar100", 10),
}
HOSTS: tuple[type[GradientLearner], ...] = (Finetune, LwF, Replay)
HEADS = ("trained", "names", "shuffled", "random")
SEEDS, TUNING = range(2000, 2005), 3000  # class orders that are reported, and the one that chooses learning rates
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
EPOCHS, HIDDEN = 5, 128
SHOWN = {
    "final accuracy": "final",
    "task-aware final": "final, task known",
    "incremental accuracy": "incremental",
    "forgetting": "forgetting",
}
CLAIMS = {  # measure, its sign, the head that names are compared with: (claim, paper, band); written before measuring
    ("final accuracy", 1, "trained"): (
        "final accuracy, names above a trained head",
        "+3.2 to +6.1 (eleven methods, ImageNet-100)",
        (0.032, 0.6),
    ),
    ("forgetting", -1, "trained"): ("forgetting, a trained head above names", "2.6 to 13.1", (0.026, 0.8)),
    ("final accuracy", 1, "shuffled"): ("final accuracy, names above shuffled ones", "above; no figure", (0.01, 0.4)),
    ("final accuracy", 1, "random"): (
        "final accuracy, names above random directions",
        "above; no figure",
        (0.01, 0.4),
    ),
}
INTRO = """The claims of [LingoCL](https://arxiv.org/abs/2403.16124) on real rows: a frozen head of class names keeps
more than a trained one, and keeps it because the names mean something. Rows are frozen features, which
`python -m benchmarks.features` writes: the sentences of CLINC150 through MiniLM (384 numbers), whose names go through
the same encoder; and CIFAR-100 through the ResNet-56 trained on CIFAR-10 (64), which has seen no language. On them a
network with a hidden layer of {hidden} and a linear map to 384 is trained, {epochs} epochs a task; it is the same
for all heads:

- *trained*: a linear head, as the host has it;
- *names*: frozen, the vectors of the classes' names, cosines times 16;
- *shuffled*: frozen, the same vectors dealt out anew among the classes of the stream;
- *random*: frozen, random directions.

Class orders: seeds {first} to {last}; mean ± half of the 95 % t interval over the five, in points of percent.
Differences are paired by class order. Every head on every host has its own learning rate
({rates}): the one with the highest final accuracy on a class order of its own
(seed {tuning}), learnt from four fifths of the training rows and judged on the fifth, so that no test row is seen. The
bands were written before measuring: the paper's least gain and up, and a point at least over shuffled names and random
directions. The [comparison](continual.md) of many learners, on other class orders and without the map before trained
heads, was known. A first pass over two hosts on sentences had rates from 0.0003 to 0.01; frozen heads chose the
lowest, so 0.0001 came in for 0.01."""


@dataclass(frozen=True)
class World:
    """A stream of one of the data sets, and the vectors of all names."""

    data: Path
    files: str
    each: int

    @cached_property
    def train(self) -> Table:
        return read(self.data / f"{self.files}-train.parquet")

    @cached_property
    def test(self) -> Table:
        return read(self.data / f"{self.files}-test.parquet")

    @cached_property
    def vectors(self) -> dict[str, Tensor]:
        """By the names of the classes, in their order."""
        found = read_vectors(self.data / "names.safetensors")
        return {name: found[name] for _, name in sorted(self.train.names.items())}

    def stages(self, seed: int) -> list[Stage]:
        """The tasks that are reported, in the class order of a seed."""
        return class_stream(self.train, self.test, base=self.each, increment=self.each, order="pycil", seed=seed)

    def tuning(self) -> list[Stage]:
        """Tasks of four fifths of the training rows, judged on the others."""
        return class_stream(
            *train_test(self.train, 0.2), base=self.each, increment=self.each, order="pycil", seed=TUNING
        )

    def learner(self, host: type[GradientLearner], head: str, rate: float, seed: int) -> Learner:
        """A host with one of the heads."""
        inputs, width = self.train.inputs["values"].shape[1], len(next(iter(self.vectors.values())))
        with seeded(generator("network", seed)):
            trunk = Mapped(MLP(inputs, hidden=(HIDDEN,)), HIDDEN, width)
            network = Predictor(trunk, LinearHead(width))
        inner = host(network=network, optimizer=Optimizer(lr=rate), epochs=EPOCHS)
        return inner if head == "trained" else LingoCL(host=inner, encoder=self.encoder(head, seed))

    def encoder(self, head: str, seed: int) -> str | dict[str, Tensor]:
        """Where a frozen head's vectors come from."""
        if head == "random":
            return "random"
        names = list(self.vectors)
        order = torch.arange(len(names))
        if head == "shuffled":
            order = torch.randperm(len(names), generator=generator("shuffled", seed))
        return {name: self.vectors[names[other]] for name, other in zip(names, order.tolist(), strict=True)}

    def figures(self, host: type[GradientLearner], head: str, rate: float, seed: int) -> dict[str, float]:
        """What such a learner shows along the stream that is reported, or along the one that chooses rates."""
        stages = self.tuning() if seed == TUNING else self.stages(seed)
        return follow(self.learner(host, head, rate, seed), stages, Run(seed=seed)).figures()


@dataclass(frozen=True)
class Arm:
    """A host with a head: the learning rate that was chosen, and what it shows, by class order."""

    host: str
    head: str
    rate: float
    found: list[dict[str, float]]

    def values(self, measure: str) -> list[float]:
        """By class order."""
        return [figures[measure] for figures in self.found]

    @property
    def row(self) -> str:
        """A line of the table."""
        cells = [_percent(self.values(measure)) for measure in SHOWN]
        return f"| {self.host} | {self.head} | {' | '.join(cells)} | {self.rate:g} |"


def arms(world: World) -> Iterator[Arm]:
    """All heads on all hosts."""
    for host in HOSTS:
        for head in HEADS:
            rate = max(RATES, key=lambda rate: world.figures(host, head, rate, TUNING)["final accuracy"])
            arm = Arm(host.__name__, head, rate, [world.figures(host, head, rate, seed) for seed in SEEDS])
            print(arm.row, flush=True)
            yield arm


def claims(host: str, heads: dict[str, Arm]) -> Iterator[Claim]:
    """What is claimed of names, on one host."""
    for (measure, sign, other), (says, paper, band) in CLAIMS.items():
        pairs = zip(heads["names"].values(measure), heads[other].values(measure), strict=True)
        yield Claim(f"{host}: {says}", paper, band, tuple(sign * (one - two) for one, two in pairs))


def section(title: str, found: list[Arm]) -> str:
    """A stream's tables."""
    lines = [
        f"| host | head | {' | '.join(SHOWN.values())} | learning rate |",
        f"|---|---|{'---:|' * (len(SHOWN) + 1)}",
    ]
    lines += [arm.row for arm in found]
    verdicts = ["| claim | paper | expected | here | |", "|---|---|---|---:|---|"]
    for host in dict.fromkeys(arm.host for arm in found):
        verdicts += map(_verdict, claims(host, {arm.head: arm for arm in found if arm.host == host}))
    return "\n\n".join([f"## {title}", "\n".join(lines), "\n".join(verdicts)])


def main() -> None:
    """Measure and write the page; what was written by hand stays."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of benchmarks.features")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file")
    given = parser.parse_args()
    hand = by_hand(given.out, STREAMS)
    parts = [section(title, list(arms(World(given.data, *stream)))) for title, stream in STREAMS.items()]
    settings = {"hidden": HIDDEN, "epochs": EPOCHS, "rates": ", ".join(f"{rate:g}" for rate in RATES), "tuning": TUNING}
    intro = INTRO.format(first=SEEDS[0], last=SEEDS[-1], **settings)
    write(given.out, page("Class names for a head", "\n\n".join([intro, *hand.values(), *parts]), said()))


def _verdict(claim: Claim) -> str:
    low, high = (100 * bound for bound in claim.band)
    inside = "inside" if claim.inside else "**outside**"
    return f"| {claim.says} | {claim.paper} | {low:g} to {high:g} | {_percent(claim.values, '+.1f')} | {inside} |"


def _percent(values: Iterable[float], form: str = ".1f") -> str:
    found = mean(list(values))
    return f"{100 * found.value:{form}} ± {50 * (found.high - found.low):.1f}"


if __name__ == "__main__":
    main()
