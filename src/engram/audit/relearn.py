"""Relearn time and the anamnesis index: how soon is the forgotten known again?

Tarun, Chundawat, Mandal, Kankanhalli: Deep Regression Unlearning. ICML 2023, arXiv 2210.08196; Chundawat et al.:
Zero-Shot Machine Unlearning. IEEE TIFS 2023, arXiv 2201.05629.

A copy of the model is trained on with all rows until its loss on the forget rows is at most (1 + α) times that of the
model before forgetting; the relearn time RT is the number of batches this takes, 1 or more. AIN = RT(unlearned) /
RT(retrained): 1 is right, near 0 the memory is only hidden, above 1 more was destroyed than retraining does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engram.core.finding import Finding
from engram.core.probe import Measured, Probe, Subject, compared, compared_pairwise, labelled, oracles_of
from engram.core.settings import name_of
from engram.data.table import Batch, Table
from engram.engine.fit import fit
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.io import digest
from engram.stats.intervals import mean
from engram.stats.seeds import derive, generator

LOOKED_AT = 500  # forget rows at most, after every batch


@dataclass(kw_only=True, eq=False)
class RelearnTime(Probe):
    """The number of batches after which the forget rows are known again, beside that of retrained models.

    `excess`: α. `epochs`: where it stops; the time is then one batch more than that took, and where a retrained model
    needs as long there is no verdict: take more epochs. `repeats`: orders of the rows, the same for every
    model; the interval is a t interval over them. `margin`: a share of the retrained models' time, at least one batch.
    Models are copied; classes that were retired are taken up again. EngramError where a row has no label, or the loss
    before forgetting is no number. Cost: models times repeats, up to `epochs` over all rows, and a forward pass over up
    to 500 forget rows after every batch.
    """

    lr: float = 1e-3
    epochs: int = 10
    batch_size: int = 256
    excess: float = 0.05
    repeats: int = 5
    oracles: int = 5
    margin: float = 0.1

    asks: ClassVar[frozenset[str]] = frozenset({"model", "before", "forget", "retain"})

    @classmethod
    def tiny(cls) -> RelearnTime:
        """A setting for checks on a handful of rows."""
        return cls(lr=1e-2, epochs=4, batch_size=16, repeats=2, oracles=2)

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        self.check(subject)
        run = run or Run()
        work = self.relearning(subject, run)
        oracles = oracles_of(subject, self.oracles, run)

        def measure(model: nn.Module) -> Measured:
            return _mean(work.times(model))

        usual = [measure(oracle)[0] for oracle in oracles] or [1.0]
        found = compared(
            "relearn time",
            measure,
            subject.model,
            oracles,
            n=self.repeats,
            unit="batches",
            margin=max(1.0, self.margin * fmean(usual)),
            protocol=work.protocol,
        )
        return [work.judged(found, oracles)]

    def check(self, subject: Subject) -> None:
        """EngramError for what is not at hand, rows without labels, and a model that cannot be trained on."""
        super().check(subject)
        if not all(len(labelled(subject.rows[name])) for name in ("forget", "retain")):
            raise EngramError(f"{name_of(self)} trains on forget and retain rows, and one side has no labels")
        if self.repeats < 2:
            raise EngramError(f"{name_of(self)} needs 2 repeats or more for an interval, not {self.repeats}")
        if not any(True for _ in subject.model.parameters()):
            raise EngramError(f"{name_of(self)} trains the model on, and this one has no parameters")

    def relearning(self, subject: Subject, run: Run) -> Relearning:
        """What relearning takes place on, and until when."""
        forget, retain = (labelled(subject.rows[name]) for name in ("forget", "retain"))
        assert subject.before is not None
        order = torch.randperm(len(forget), generator=generator(run.seed, "forget rows to look at"))
        look = forget.take(order[:LOOKED_AT])
        target = (1 + self.excess) * _loss(subject.before, look, run)
        if not math.isfinite(target):
            raise EngramError(f"{name_of(self)} needs the loss on the forget rows before forgetting, which is {target}")
        return Relearning(self, retain.concat(forget), look, target, run)


@dataclass(kw_only=True, eq=False)
class AIN(RelearnTime):
    """The anamnesis index: the relearn time over the mean of the retrained models', order by order; beside it, that of
    every retrained model over the other ones. `margin`: of the ratio. Settings, errors and cost as of `RelearnTime`,
    with which it shares the work."""

    asks: ClassVar[frozenset[str]] = frozenset({"model", "before", "forget", "retain", "oracles"})

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        self.check(subject)
        run = run or Run()
        work = self.relearning(subject, run)
        oracles = oracles_of(subject, self.oracles, run)

        def index(model: nn.Module, others: Sequence[nn.Module]) -> Measured:
            usual = torch.stack([work.times(other) for other in others]).mean(0)
            return _mean(work.times(model) / usual)

        usual = torch.stack([work.times(oracle) for oracle in oracles]).mean().item()
        found = compared_pairwise(
            "anamnesis index",
            index,
            subject.model,
            oracles,
            n=self.repeats,
            unit="ratio",
            margin=self.margin,
            protocol={**work.protocol, "batches for retrained models": round(usual, 2)},
        )
        return [work.judged(found, oracles)]


@dataclass(frozen=True, eq=False)
class Relearning:
    """Training on with `rows` until the loss on `look` is at most `target`."""

    plan: RelearnTime
    rows: Table
    look: Table
    target: float
    run: Run

    @property
    def most(self) -> int:
        """Batches after which it stops."""
        return self.plan.epochs * -(-len(self.rows) // self.plan.batch_size)

    @property
    def protocol(self) -> dict[str, Any]:
        """How the time was taken, in words."""
        plan = self.plan
        return {
            "until the loss on forget rows is": round(self.target, 6),
            "at most, in batches": self.most,
            "batch size": plan.batch_size,
            "learning rate": plan.lr,
            "repeats": plan.repeats,
        }

    def judged(self, found: Finding, oracles: Sequence[nn.Module]) -> Finding:
        """The finding; without interval and verdict if a retrained model had not relearnt at the end."""
        late = any(bool((self.times(oracle) > self.most).any()) for oracle in oracles)
        return replace(found, interval=None) if late else found

    def times(self, model: nn.Module) -> Tensor:
        """Batches [repeats] float64, one number for each order of the rows; one more than `most` where they did not do.
        Taken once per run."""
        plan = self.plan
        how = (plan.lr, plan.epochs, plan.batch_size, self.target, self.rows.digest, self.look.digest)
        name = f"{derive(digest(model), self.run.seed, *how):016x}"
        found = [
            self.run.share(f"relearn time {k} of {name}", partial(self._time, model, k)) for k in range(plan.repeats)
        ]
        return torch.tensor(found, dtype=torch.float64)

    def _time(self, model: nn.Module, repeat: int) -> int:
        twin, order = copy.deepcopy(model), derive(self.run.seed, "relearn order", repeat)
        clock = _Clock()
        head: Any = getattr(twin, "head", None)
        if hasattr(head, "grow"):
            head.grow(self.rows.classes, generator(self.run.seed, "relearn head"))

        def step(batch: Batch) -> Mean:
            assert batch.labels is not None
            return by_target(twin(**batch.inputs).logits, batch.labels)

        def batches(epoch: int) -> Iterator[Batch]:
            for batch in self.rows.batches(self.plan.batch_size, seed=order, epoch=epoch, shard=self.run.shard):
                if clock.done:
                    return
                yield batch

        def look(_: int) -> None:
            clock.batches += 1
            clock.done = _loss(twin, self.look, self.run) <= self.target

        plan = Optimizer(lr=self.plan.lr)
        fit(
            step,
            batches,
            model=twin.train().requires_grad_(True),
            optimizer=plan,
            epochs=self.plan.epochs,
            run=self.run,
            state={"clock": clock},
            after_step=look,
        )
        return clock.batches if clock.done else self.most + 1


@dataclass
class _Clock:
    batches: int = 0
    done: bool = False

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches, self.done = int(state["batches"]), bool(state["done"])


def _loss(model: nn.Module, table: Table, run: Run) -> float:
    return predict(model, table, "loss", run=run).double().mean().item()


def _mean(times: Tensor) -> Measured:
    found = mean(times)
    return found.value, (found.low, found.high)
