"""One mechanism, how stiff each group of weights is, gives many skills. On handwritten digits.

Five pairs of digits, each told apart among its own classes, under policies that differ in b alone. Few-shot: half of
the rows teach all ten digits; then five rows each of other digits come, under other names, and a copy of the first
block, held at b = 0.1, learns them beside a fresh block; the source is dissimilar where its rows have their pixels in
another order. Confusion: digits 0 to 7, then 8 and 9, all ten to be told apart. Forgetting: the same with rehearsal of
all, and then 8 and 9 shall go.

The paper shows toy experiments, and no figure of it was read: bands are what the reconstruction was expected to give.
Settings were chosen on seeds from 100 on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engram.core.learner import Learner
from engram.core.request import Request
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.keep.finetune import Finetune
from engram.keep.lifelong_framework import LifelongFramework
from engram.keep.policies import FROZEN, KEEP, POLICIES, Policy, Step
from engram.reproduce.claims import Claim
from engram.reproduce.digits import digits, five_pairs
from engram.stats.continual import forgetting

NETWORK: dict[str, Any] = {"name": "MLP", "hidden": [32, 32]}
SHOTS = 5
EARLY, LATE = (0, 1, 2, 3, 4, 5, 6, 7), (8, 9)
FRESH = Policy((KEEP,))
UNREPAIRED = Policy((KEEP, Step({"all": FROZEN}, rows="confused")))  # keeps the same rows, and repairs nothing


class Pairs(NamedTuple):
    """Of five pairs, each among its own classes: mean accuracy when learnt, and mean forgetting."""

    learnt: float
    forgotten: float


def pairs(policy: Any, seed: int, **settings: Any) -> Pairs:
    """Five pairs under a policy."""
    return along(LifelongFramework(policy=policy, **settings), seed)


def along(learner: Learner, seed: int) -> Pairs:
    """Take a learner along five pairs."""
    run, stages = Run(seed=seed), five_pairs()
    matrix = torch.full((5, 5), torch.nan, dtype=torch.float64)
    for i, stage in enumerate(stages):
        learner.learn(stage.task, run)
        for j, earlier in enumerate(stages[: i + 1]):
            matrix[i, j] = accuracy(learner.model, earlier.test, classes=earlier.task.classes)
    return Pairs(float(matrix.diagonal().mean()), forgetting(matrix))


def renamed(table: Table) -> Table:
    """The same digits under names of their own."""
    assert table.labels is not None
    return replace(table, labels=table.labels + 10, ids=tuple(f"again {id}" for id in table.ids))


def reordered(table: Table) -> Table:
    """The pixels in another order."""
    pixels = table.inputs["pixel_values"]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    moved = pixels.flatten(1)[:, order].reshape(pixels.shape)
    return replace(table, inputs={"pixel_values": moved}, ids=tuple(f"reordered {id}" for id in table.ids))


def few(table: Table, seed: int) -> Table:
    """A few rows of each class."""
    draws = torch.Generator().manual_seed(seed)
    shuffled = table.take(torch.randperm(len(table), generator=draws))
    assert shuffled.labels is not None
    return shuffled.take(torch.cat([(shuffled.labels == c).nonzero()[:SHOTS, 0] for c in shuffled.classes]))


class Few(NamedTuple):
    """Accuracy on digits of which few rows came: with a similar block learnt before, a dissimilar one, and from
    scratch."""

    similar: float
    dissimilar: float
    scratch: float


def few_shot(seed: int) -> Few:
    """Half of the rows, in the same or another order of the pixels; then a few of the other half."""
    train, test = digits()
    half, other = train.take(range(0, len(train), 2)), train.take(range(1, len(train), 2))
    rows = few(renamed(other), seed)
    similar, dissimilar = (_base(before, seed) for before in (half, reordered(half)))
    tries = ((similar, "few-shot"), (dissimilar, "few-shot"), (similar, FRESH))
    return Few(*(_with_few(base, policy, rows, renamed(test), seed) for base, policy in tries))


def _base(rows: Table, seed: int) -> LifelongFramework:
    learner = LifelongFramework(policy=FRESH)
    learner.learn(Task(rows, index=0, classes=rows.classes), Run(seed=seed))
    return learner


def _with_few(base: LifelongFramework, policy: Any, rows: Table, test: Table, seed: int) -> float:
    learner = LifelongFramework(policy=policy, epochs=40, batch_size=25)
    learner.load_state_dict(base.state_dict())
    learner.learn(Task(rows, index=1, classes=rows.classes), Run(seed=seed))
    return accuracy(learner.model, test, classes=rows.classes)


class Repair(NamedTuple):
    """What is left of the confusions that were found, as a share of them, and what the other classes lost."""

    left: float
    lost: float


def halves(policy: Any, seed: int) -> LifelongFramework:
    """A learner that has taken in digits 0 to 7, then 8 and 9."""
    learner, run, train = LifelongFramework(policy=policy), Run(seed=seed), digits()[0]
    for index, classes in enumerate((EARLY, LATE)):
        learner.learn(Task(train.of_classes(classes), index=index, classes=classes), run)
    return learner


def told(learner: LifelongFramework, test: Table) -> Tensor:
    """[10, 10]: the share of the test rows of a class that is told as another."""
    assert test.labels is not None
    counts = torch.zeros(10, 10, dtype=torch.float64)
    counts.index_put_((test.labels, predict(learner.model, test).argmax(1)), torch.ones((), dtype=torch.float64), True)
    return counts / counts.sum(1, keepdim=True)


def repair(seed: int, policy: Any = "confusion reduction") -> Repair:
    """Digits 0 to 7, then 8 and 9: confusions on test rows without repair, and with it."""
    plain, mended = halves(UNREPAIRED, seed), halves(policy, seed)
    before, after = (told(learner, digits()[1]) for learner in (plain, mended))
    found = plain.confusions()
    others = [c for c in range(10) if c not in {c for pair in found for c in pair}]
    rate = [sum(float(rates[c, d]) for c, d in found) for rates in (before, after)]
    lost = [float(before[c, c] - after[c, c]) for c in others]
    return Repair(rate[1] / rate[0], sum(lost) / max(1, len(lost)))


class Letting(NamedTuple):
    """Accuracy left on the classes that should go, the points that the others lost, and units made free."""

    left: float
    lost: float
    freed: int


def letting_go(seed: int, policy: Any = "overall refinement") -> Letting:
    """Forget digits 8 and 9; the others are told among all that is left."""
    (train, test), learner = digits(), halves(policy, seed)
    stay, go = test.of_classes(EARLY), test.of_classes(LATE)
    before, free = accuracy(learner.model, stay), learner.columns.free_units
    learner.forget(Request.of_classes(train, LATE), Run(seed=seed))
    lost = before - accuracy(learner.model, stay)
    return Letting(accuracy(learner.model, go), lost, learner.columns.free_units - free)


def claims(seeds: Iterable[int]) -> list[Claim]:
    """Skills, one by one, over seeds."""
    found: dict[str, list[float]] = {name: [] for name in CLAIMS}

    def note(**values: float) -> None:
        for name, value in values.items():
            found[name].append(value)

    for seed in seeds:
        kept, frozen = (pairs(name, seed) for name in ("no forgetting", "rain man"))
        tuned = along(Finetune(network=NETWORK, optimizer=LifelongFramework().optimizer), seed)
        note(kept=kept.forgotten, tuned=tuned.forgotten, recalled=frozen.forgotten, unmade=kept.learnt - frozen.learnt)
        awake, asleep = (pairs(name, seed) for name in ("sleep deprivation", "retention"))
        note(slept=awake.forgotten - asleep.forgotten)
        fading = (
            pairs("memory loss", seed).forgotten - pairs(replace(POLICIES["memory loss"], fade=1.0), seed).forgotten
        )
        note(faded=fading)
        taught = few_shot(seed)
        note(few=taught.similar - taught.scratch, unlike=taught.dissimilar - taught.scratch)
        mended, gone = repair(seed), letting_go(seed)
        note(mended=mended.left, beside=mended.lost, gone=gone.left, stayed=gone.lost, freed=gone.freed)
    return [_claim(name, values) for name, values in found.items()]


def _claim(name: str, values: list[float]) -> Claim:
    says, paper, band = CLAIMS[name]
    return Claim(says, paper, band, tuple(values))


CLAIMS: dict[str, tuple[str, str, tuple[float, float]]] = {
    "kept": ("no forgetting: mean forgetting of five pairs", "non-forgetting", (0.0, 0.0)),
    "tuned": ("fine-tuning of one such network: mean forgetting of five pairs", "catastrophic forgetting", (0.15, 0.6)),
    "recalled": ("rain man: mean forgetting of five pairs", "perfect recall", (0.0, 0.0)),
    "unmade": (
        "rain man: accuracy of pairs when learnt, less than with blocks of their own",
        "no abstraction",
        (0.02, 0.3),
    ),
    "slept": ("sleep deprivation: mean forgetting, more than with retention by importance", "forgets", (0.02, 0.4)),
    "faded": ("memory loss: mean forgetting, more than with b that does not fade", "forgets with time", (0.005, 0.3)),
    "few": (
        "few-shot, five rows a class: accuracy by a copy of a similar block, more than from scratch",
        "learns from few examples",
        (0.05, 0.4),
    ),
    "unlike": ("the same with a dissimilar block before", "no harm", (-0.03, 0.1)),
    "mended": ("confusion reduction: confusions left, as a share", "confusions are resolved", (0.0, 0.5)),
    "beside": ("confusion reduction: what classes that were not confused lose", "others stay", (-0.1, 0.02)),
    "gone": ("forgetting two classes: accuracy left on them", "the named task fades", (0.0, 0.0)),
    "stayed": ("forgetting two classes: accuracy that the others lose", "others stay", (-0.1, 0.02)),
    "freed": ("forgetting two classes: hidden units that are free again", "units are used anew", (64.0, 64.0)),
}
