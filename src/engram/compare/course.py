"""A learner along a stream: what it knows after every task, what it holds, and what each task cost it."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from engram.core.learner import Learner, fork
from engram.data.buffer import Buffer
from engram.data.streams import Stage
from engram.engine.cost import flops_of
from engram.engine.predict import hits
from engram.engine.run import Run
from engram.stats import continual


@dataclass(frozen=True)
class Course:
    """What a learner showed along a stream: accuracy [T, T] among all classes seen and among the task's own, and the
    sizes of the test sets. After every task: the numbers in its model (weights, and buffers such as class means), the
    bytes of all its state, and the training rows in its buffers. Of every task: the seconds of CPU that learning took,
    and the floating-point operations where they were counted (else 0)."""

    matrix: np.ndarray
    aware: np.ndarray
    sizes: list[int]
    parameters: list[int]
    memory: list[int]
    rows: list[int]
    seconds: list[float]
    flops: list[int]

    def figures(self) -> dict[str, float]:
        """The protocol's metrics; task means unless said otherwise."""
        return {
            "final accuracy": continual.average_accuracy(self.matrix),
            "incremental accuracy": continual.average_incremental(self.matrix),
            "sample-mean incremental": continual.average_incremental(self.matrix, self.sizes),
            "task-aware final": continual.average_accuracy(self.aware),
            "forgetting": continual.forgetting(self.matrix),
            "backward transfer": continual.backward_transfer(self.matrix),
            "learning accuracy": continual.learning_accuracy(self.matrix),
        }


def follow(learner: Learner, stages: Sequence[Stage], run: Run, count: Collection[int] = ()) -> Course:
    """Take a learner along a stream; every task so far is tested after every task.

    `count`: tasks, from 0, whose operations are counted: on a copy of the learner that takes them in besides, since
    counting slows small operations about sixfold.
    """
    size = len(stages)
    course = Course(np.full((size, size), np.nan), np.full((size, size), np.nan), [], [], [], [], [], [])
    for k, stage in enumerate(stages):
        course.flops.append(operations(learner, stage, run) if k in count else 0)
        start = time.process_time()
        learner.learn(stage.task, run)
        learner.refresh(run)
        course.seconds.append(time.process_time() - start)
        course.sizes.append(len(stage.test))
        _test(learner, stages[: k + 1], course)
        _weigh(learner, course)
    return course


def _test(learner: Learner, stages: Sequence[Stage], course: Course) -> None:
    k = len(stages) - 1
    for j, stage in enumerate(stages):
        course.matrix[k, j] = float(hits(learner.model, stage.test).double().mean())
        own = stage.task.classes
        course.aware[k, j] = float(hits(learner.model, stage.test, classes=own).double().mean())


def _weigh(learner: Learner, course: Course) -> None:
    course.parameters.append(numbers(learner.model))
    course.memory.append(bytes_of(learner.state_dict()))
    course.rows.append(sum(len(trace) for trace in learner.traces.values() if isinstance(trace, Buffer)))


def operations(learner: Learner, stage: Stage, run: Run) -> int:
    """Floating-point operations, as `flops_of` counts them, while a copy of the learner takes in a task."""
    return flops_of(lambda: fork(learner).learn(stage.task, Run(seed=run.seed)))


def numbers(model: nn.Module) -> int:
    """How many numbers a model holds, in weights and in buffers of floating point."""
    parts = (*model.parameters(), *model.buffers())
    return sum(part.numel() for part in parts if part.is_floating_point())


def bytes_of(state: Any) -> int:
    """The bytes of all tensors in a state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(map(bytes_of, state.values()))
    return sum(map(bytes_of, state)) if isinstance(state, list | tuple) else 0
