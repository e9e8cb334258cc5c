"""The data of the small experiments: scikit-learn's handwritten digits, pixels / 16, and streams of them."""

from __future__ import annotations

from collections.abc import Sequence

from engram.core.learner import Learner
from engram.data.readers import read, train_test
from engram.data.streams import Stage, class_stream
from engram.data.table import Table
from engram.engine.predict import accuracy
from engram.engine.run import Run


def digits() -> tuple[Table, Table]:
    """Train and test rows: the stratified 70/30 split of published reference figures."""
    return train_test(read("sklearn:digits"), 0.3, seed=0, how="sklearn")


def five_pairs(order: str = "natural", seed: int = 0) -> list[Stage]:
    """Five tasks of two classes."""
    return class_stream(*digits(), base=2, increment=2, order=order, seed=seed)  # type: ignore[arg-type]


def curve(learner: Learner, stages: Sequence[Stage], seed: int = 0) -> list[float]:
    """Accuracy over all classes seen, after each task."""
    run, seen, found = Run(seed=seed), None, []
    for stage in stages:
        learner.learn(stage.task, run)
        learner.refresh(run)
        seen = stage.test if seen is None else seen.concat(stage.test)
        found.append(accuracy(learner.model, seen))
    return found
