"""Values behind discrete keys are learnt class after class, and forgotten by mask. On the paper's toy, and on digits.

The toy (figure 2): eight Gaussian classes in the unit square, sd 0.035, in four tasks of two; one codebook of 400 keys
on the plain coordinates, placed on uniform points; Adam at 1e-3, 1000 steps a task. On digits, half of the training
rows place the keys, without labels, and the other half is learnt.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from engram.core.request import Request
from engram.data.streams import class_stream
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.keep.finetune import Finetune
from engram.keep.key_value import KeyValueBottleneck
from engram.reproduce.claims import Claim
from engram.reproduce.digits import curve, digits
from engram.stats.seeds import generator

MEANS = ((0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75), (0.75, 0.5), (0.5, 0.75), (0.25, 0.5), (0.5, 0.25))
TASKS = ((0, 4), (1, 5), (2, 6), (3, 7))
ADAM = Optimizer("adam", lr=1e-3)
LINEAR = {"name": "Identity"}


def claims(seeds: Iterable[int]) -> list[Claim]:
    """Bands of the toy are those of an independent run; on digits the ordering is claimed, and exactness of masks."""
    found = [(*_toy(seed), *_digits(seed)) for seed in seeds]
    kept, probe, left, rest, bits, gap = zip(*found, strict=True)
    return [
        Claim("toy: final accuracy of the bottleneck", "0.995 (independent run)", (0.95, 1.0), kept),
        Claim("toy: final accuracy of a linear probe", "0.25 (independent run)", (0.0, 0.4), probe),
        Claim("toy: accuracy on class 4 with its cells masked", "0.00 (independent run)", (0.0, 0.02), left),
        Claim("toy: accuracy on the other seven", "0.997 (independent run)", (0.95, 1.0), rest),
        Claim("digits: outputs that differ after masking a class and unmasking", "0: reversible", (0.0, 0.0), bits),
        Claim(
            "digits, 5 tasks: final accuracy above that of a linear probe",
            "far less forgetting than trained heads (its tables were not at hand)",
            (0.3, 0.9),
            gap,
        ),
    ]


def toy(seed: int) -> tuple[Table, Table, Table]:
    """Uniform points for the keys, training rows and test rows (100 a class)."""
    points = torch.rand(25600, 2, generator=generator("uniform points", seed))
    keys = Table({"values": points}, ids=tuple(f"point {k}" for k in range(len(points))))
    return keys, _rows("train", seed), _rows("test", seed)


def toy_learner(seed: int) -> tuple[KeyValueBottleneck, Table, Table]:
    """The bottleneck after the four tasks, and the rows."""
    keys, train, test = toy(seed)
    learner = KeyValueBottleneck(
        codebooks=1, keys=400, dim=2, projection="chunks", classes_total=8, optimizer=ADAM, epochs=1000, batch_size=200
    )
    learner.prepare(keys, Run(seed=seed))
    _take(learner, train, seed)
    return learner, train, test


def toy_probe(seed: int) -> float:
    """Final accuracy of a linear probe on the same tasks."""
    _, train, test = toy(seed)
    probe = Finetune(network=LINEAR, optimizer=ADAM, epochs=1000, batch_size=200)
    _take(probe, train, seed)
    return accuracy(probe.model, test)


def _take(learner: KeyValueBottleneck | Finetune, train: Table, seed: int) -> None:
    run = Run(seed=seed)
    for classes in TASKS:
        learner.learn(Task(train.of_classes(classes), classes=classes), run)


def _toy(seed: int) -> tuple[float, float, float, float]:
    """Accuracy of the bottleneck and the probe; with class 4 masked, on class 4 and on the others."""
    learner, train, test = toy_learner(seed)
    kept = accuracy(learner.model, test)
    learner.mask(learner.touched(Request.of_classes(train, (4,))))
    four = test.of_classes([4])
    return kept, toy_probe(seed), accuracy(learner.model, four), accuracy(learner.model, test.without(four.ids))


def _digits(seed: int) -> tuple[float, float]:
    """Logits of test rows that a mask taken off leaves changed; the lead over a linear probe after five tasks."""
    train, test = digits()
    order = torch.randperm(len(train), generator=generator("half for the keys", seed))
    half = len(train) // 2
    stages = class_stream(train.take(order[half:]), test, base=2, increment=2)
    learner = KeyValueBottleneck(keys=128, classes_total=10)
    learner.prepare(train.take(order[:half]).unlabelled(), Run(seed=seed))
    final = curve(learner, stages, seed)[-1]
    before = predict(learner.model, test)
    learner.mask(learner.touched(Request.of_classes(train.take(order[half:]), (3,))))
    learner.unmask()
    changed = float((predict(learner.model, test) != before).sum())
    probe = Finetune(network=LINEAR, optimizer=ADAM, epochs=30)
    return changed, final - curve(probe, stages, seed)[-1]


def _rows(part: str, seed: int) -> Table:
    labels = torch.arange(len(MEANS)).repeat_interleave(100)
    noise = torch.randn(len(labels), 2, generator=generator(part, seed))
    ids = tuple(f"{part} {k}" for k in range(len(labels)))
    return Table({"values": torch.tensor(MEANS)[labels] + 0.035 * noise}, labels, ids)
