"""Closed-form learning and forgetting equals retraining. On digits, with random features."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from engram.core.learner import fork
from engram.core.request import Request
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.predict import accuracy
from engram.engine.run import Run
from engram.keep.acu import ACU
from engram.reproduce.claims import Claim
from engram.reproduce.digits import curve, digits, five_pairs
from engram.stats.seeds import generator


def claims(seeds: Iterable[int]) -> list[Claim]:
    """Relative error of the head after forgetting, against a refit; the accuracy that is left of a class."""
    train, test = digits()
    records, classes, left = [], [], []
    for seed in seeds:
        learner = ACU(size=200)
        learner.learn(Task(train, classes=train.classes), Run(seed=seed))
        order = torch.randperm(len(train), generator=generator("half to forget", seed))
        half = train.take(order[: len(train) // 2])
        records.append(_error(learner, train, half, seed))
        nines = train.of_classes([9])
        classes.append(_error(learner, train, nines, seed))
        twin = fork(learner)
        twin.forget(Request.of_classes(train, (9,)))  # type: ignore[attr-defined]
        left.append(accuracy(twin.model, test.of_classes([9])))
    stream = five_pairs()
    joint = ACU(size=200)
    joint.learn(Task(train, classes=train.classes), Run())
    gap = curve(ACU(size=200), stream)[-1] - accuracy(joint.model, test)
    return [
        Claim("relative error after forgetting half of the records", "exact", (0.0, 1e-8), tuple(records)),
        Claim("relative error after forgetting a class", "exact", (0.0, 1e-8), tuple(classes)),
        Claim("accuracy left on a forgotten class", "0", (0.0, 0.0), tuple(left)),
        Claim(
            "last accuracy of 5 tasks minus that of all data at once", "0: learning is exact too", (0.0, 0.0), (gap,)
        ),
    ]


def _error(learner: ACU, train: Table, rows: Table, seed: int) -> float:
    """Relative difference of the head's weights from a fresh fit on the rows that stay."""
    twin, fitted = fork(learner), ACU(size=200)
    twin.forget(Request.of_records(train, rows.ids))  # type: ignore[attr-defined]
    left = train.without(rows.ids)
    fitted.learn(Task(left, classes=train.classes), Run(seed=seed))
    columns = list(left.classes)
    one, other = (model.head.weight[model.head.columns(columns)] for model in (twin.model, fitted.model))  # type: ignore[union-attr,operator,index]
    return float(((one - other).norm() / other.norm()).detach())
