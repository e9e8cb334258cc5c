"""Two processes give what one gives. Everything that two of them do is done in one start, since imports take seconds.

Started as a program, with a folder and a rank, this file is one of the two.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from engram import testing
from engram.catalogue import methods
from engram.core.erasure import forget
from engram.core.forgetter import Forgetter
from engram.core.frozen import FrozenLearner
from engram.core.learner import Forgetful, Learner
from engram.core.learning import GradientLearner
from engram.core.probe import Probe, Subject
from engram.core.request import Request
from engram.core.settings import load_class, settings
from engram.data.table import Batch, Table
from engram.data.task import Task
from engram.engine import fit as fitting
from engram.engine.fit import fit
from engram.engine.journal import flatten
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.build import build
from engram.stats.seeds import generator
from engram.testing.material import supplies

Outcome = dict[str, Tensor]
Pair = tuple[Batch, Batch]
PATIENCE = 60.0  # seconds for a collective operation, before whoever waits gives up
LIMIT = 300.0  # seconds until both are ended
SGD, SLOW, ADAM = Optimizer("sgd", 0.1), Optimizer("sgd", 0.02), Optimizer("adam", 1e-2)


def rows(n: int = 50, seed: int = 0) -> Table:
    x = torch.randn(n, 6, generator=generator("rows", seed))
    return Table({"values": x}, x[:, :3].argmax(1))


def network(**options: Any) -> nn.Module:
    spec = {"name": "MLP", "hidden": [8], **options}
    return build(spec, inputs={"values": (6,)}, classes=(0, 1, 2), generator=generator("weights")).train()


def usual(model: nn.Module, batch: Batch) -> Mean:
    assert batch.labels is not None
    return by_target(model(**batch.inputs).logits, batch.labels)


def shares(table: Table, size: int, run: Run) -> Callable[[int], Iterator[Batch]]:
    return lambda epoch: table.batches(size, seed=3, epoch=epoch, shard=run.shard)


def told(model: nn.Module, run: Run, losses: list[float]) -> Outcome:
    return {**model.state_dict(), "losses": torch.tensor(losses), "cost": cost(run)}


def cost(run: Run) -> Tensor:
    """Steps and rows: together, processes do no more work than one."""
    return torch.tensor([run.cost.steps, run.cost.rows])


# --- trainings of about 50 steps


def one_loss(n: int, size: int, epochs: int, folder: Path, plan: Optimizer = SGD, micro: int | None = None) -> Outcome:
    model, run = network(), Run()
    batches = shares(rows(n), size, run)
    step = partial(usual, model)
    history = fit(step, batches, model=model, optimizer=plan, epochs=epochs, run=run, micro=micro)
    return told(model, run, history.losses)


def two_terms(folder: Path, micro: int | None = None) -> Outcome:
    """Batches of 20 rows with 7 partners, whose loss is climbed."""
    model, run = network(), Run()
    many, few = rows(), rows(seed=1)
    rank, world = run.shard

    def pairs(epoch: int) -> Iterator[Pair]:
        for batch in many.batches(20, seed=3, epoch=epoch):
            yield many.batch(batch.rows[rank::world]), few.batch(batch.rows[:7][rank::world])

    def step(pair: Pair) -> Mean:
        return usual(model, pair[0]) - 0.3 * usual(model, pair[1])

    history = fit(step, pairs, model=model, optimizer=SGD, epochs=17, run=run, micro=micro)
    return told(model, run, history.losses)


def used_by_one(folder: Path, micro: int | None = None) -> Outcome:
    """A parameter that only the batch, and so the process, with row 0 uses; AdamW moves what has any gradient."""
    model, run = network(), Run()
    own = nn.Parameter(torch.ones(3))
    model.register_parameter("own", own)

    def step(batch: Batch) -> Mean:
        loss = usual(model, batch)
        found = batch.rows == 0
        return loss + Mean.over((own * found.sum()).square().sum() if found.any() else torch.zeros(()), found.sum())

    plan = Optimizer("adamw", 1e-2, weight_decay=0.1)
    batches = shares(rows(), 10, run)
    history = fit(step, batches, model=model, optimizer=plan, epochs=10, run=run, micro=micro)
    return told(model, run, history.losses)


def several_updates(folder: Path) -> Outcome:
    """Two updates a batch, of the head and then of the encoder."""
    model, run = network(), Run()
    head, encoder = (SGD.build(getattr(model, name).parameters()) for name in ("head", "encoder"))

    def step(batch: Batch) -> Iterator[tuple[Mean, torch.optim.Optimizer]]:
        yield usual(model, batch), head
        yield 0.5 * usual(model, batch), encoder

    optimizers = {"head": head, "encoder": encoder}
    history = fit(step, shares(rows(51), 10, run), model=model, optimizer=optimizers, epochs=5, run=run)
    return told(model, run, history.losses)


class Killed(BaseException):
    """What a program ends by in the middle."""


def resumed(folder: Path) -> Outcome:
    """A training in a phase, killed in its eighth epoch and started again; then a third time, when it is done."""
    outcomes = []
    for stop in (38, None, None):
        model, run = network(), Run(folder / "run")
        updates: list[int] = []
        with _checkpoint_every_epoch():
            try:
                found = run.phase("outer", partial(_interrupted, model, run, stop, updates))
                outcomes.append({**found, "updates": torch.tensor(updates)})
            except Killed:
                pass
        if dist.is_initialized():
            dist.barrier()  # a program starts again when the first one is over
    assert torch.equal(outcomes[0]["head.weight"], outcomes[1]["head.weight"])
    assert not len(outcomes[1]["updates"])
    return outcomes[0]


def _interrupted(model: nn.Module, run: Run, stop: int | None, updates: list[int]) -> Outcome:
    def after(k: int) -> None:
        updates.append(k)
        if k == stop:
            raise Killed

    batches = shares(rows(), 10, run)
    fit(partial(usual, model), batches, model=model, optimizer=SGD, epochs=10, run=run, after_step=after)
    return dict(model.state_dict())


def _checkpoint_every_epoch() -> Any:
    return mock.patch.multiple(fitting, CHECKPOINT_EVERY=-1.0, WORTH_KEEPING=-1.0)


def statistical(seed: int, folder: Path) -> Outcome:
    """The accuracy on new rows of a model with batch statistics and dropout."""
    model, run = network(norm="batch", dropout=0.2, hidden=[32]), Run(seed=seed)
    batches = shares(rows(200, seed), 20, run)
    fit(partial(usual, model), batches, model=model, optimizer=ADAM, epochs=5, run=run)
    return {**model.state_dict(), "accuracy": torch.tensor(accuracy(model, rows(1000, seed=99)))}


TRAININGS: dict[str, Callable[[Path], Outcome]] = {
    "even batches": partial(one_loss, 50, 10, 10),
    "even batches with Adam": partial(one_loss, 50, 10, 10, plan=ADAM),
    "odd batches": partial(one_loss, 50, 7, 7),
    "a last batch of one row": partial(one_loss, 51, 10, 9),
    "micro-batches": partial(one_loss, 51, 10, 9, micro=2),
    "micro-batches in one process alone": partial(one_loss, 49, 7, 7, micro=3),
    "a clipped gradient": partial(one_loss, 51, 10, 9, plan=Optimizer("sgd", 0.5, clip=0.2)),
    "a rate that moves": partial(one_loss, 51, 10, 9, plan=Optimizer("sgd", 0.2, schedule="cosine", warmup=0.2)),
    "two terms": two_terms,
    "two terms in micro-batches": partial(two_terms, micro=4),
    "a parameter that one process uses": used_by_one,
    "a parameter that one process uses, in micro-batches": partial(used_by_one, micro=2),
    "several updates a batch": several_updates,
    "an interrupted training": resumed,
}
SEEDS = range(5)
STATISTICAL = {f"statistical {seed}": partial(statistical, seed) for seed in SEEDS}


# --- methods for about 50 steps, with batches of four rows and of one. By SGD, for Adam makes rounding large wherever a
# gradient vanishes, as that of a distillation does in its first step.


def material() -> testing.Material:
    """Five rows of each digit, so that the last batch of a task has one row."""
    whole = testing.digits()
    tasks = [replace(task, train=_five_each(task)) for task in whole.tasks]
    return testing.Material(
        (tasks[0], tasks[1]), whole.test, replace(whole.recipe, epochs=7, batch_size=4, optimizer=SLOW)
    )


def _five_each(task: Task) -> Table:
    assert task.train.labels is not None
    places = [(task.train.labels == c).nonzero()[:5, 0] for c in task.train.classes]
    return task.train.take(torch.cat(places).sort().values)


def method(name: str) -> Any:
    cls: Any = load_class(name)
    tiny = cls.tiny()
    learns = isinstance(tiny, Learner)  # what climbs a loss for 50 steps has to do so slowly, or it gets out of hand
    longer = {"epochs": 4 if learns else 7, "batch_size": 4, "optimizer": SLOW if learns else SLOW.scaled(0.1)}
    given = settings(tiny)
    return cls(**{**given, **{key: value for key, value in longer.items() if key in given}})


def learning(name: str, folder: Path) -> Outcome:
    own, run = material(), Run()
    learner = testing.learnt(method(name), own.tasks, run)
    found = {f"learnt {key}": value for key, value in learner.model.state_dict().items()}
    if isinstance(learner, Forgetful):
        try:
            forget(learner, own.request, None, run)
        except EngramError:  # it lets go of whole classes only
            forget(learner, Request.of_classes(own.train, (3,)), None, run)
    tensors: Outcome = {}
    flatten(learner.state_dict(), tensors)
    return {**found, **tensors, "cost": cost(run)}


def forgetting(name: str, folder: Path) -> Outcome:
    """The first task's rows are forgotten, 25 of 50."""
    own, forgetter, run = material(), method(name), Run()
    given = supplies(forgetter, own)
    request = Request.of_records(own.train, own.tasks[0].train.ids).but(general=own.test, at_hand=given)
    model = forgetter.forget(own.model(), request, run)
    return {**model.state_dict(), "cost": cost(run)}


def _declared(name: str) -> str | None:
    """None where there is no class, which is for the conformance suite to complain of."""
    try:
        return str(getattr(load_class(name), "processes", "exact"))
    except (ImportError, AttributeError):
        return None


ROWS = [row for row in methods() if row.wing in ("keep", "forget")]
DECLARED = {row.name: declared for row in ROWS if (declared := _declared(row.name))}
METHODS = {
    row.name: partial(learning if row.wing == "keep" else forgetting, row.name) for row in ROWS if row.name in DECLARED
}
CASES: dict[str, Callable[[Path], Outcome]] = {**TRAININGS, **STATISTICAL, **METHODS}


# --- one of the two


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE))
    found: dict[str, Outcome | str] = {}
    for name, case in CASES.items():
        print(name, flush=True)  # the log of a process that hangs ends with where it does
        try:
            found[name] = {key: value.detach().clone() for key, value in case(folder / name.replace(" ", "-")).items()}
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


# --- what the two have found, and one


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome | str]]:
    """What each of two processes found, by case."""
    folder = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    logs = [folder / f"{rank}.log" for rank in range(2)]
    started = []
    for rank, log in enumerate(logs):
        with log.open("w") as stream:
            command = [sys.executable, __file__, str(folder), str(rank)]
            started.append(subprocess.Popen(command, env=environment, stdout=stream, stderr=stream))
    try:
        end = time.monotonic() + LIMIT
        codes = [process.wait(max(end - time.monotonic(), 0.1)) for process in started]
    except subprocess.TimeoutExpired:
        pytest.fail(f"the two processes did not end:\n{logs[0].read_text()}\n{logs[1].read_text()}")
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert codes == [0, 0], f"{logs[0].read_text()}\n{logs[1].read_text()}"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def both(two: list[dict[str, Outcome | str]], name: str) -> Outcome:
    """What the two found in a case: the same, bit by bit."""
    first, second = two[0][name], two[1][name]
    assert isinstance(first, dict) and isinstance(second, dict), (first, second)
    assert first.keys() == second.keys()
    assert [key for key, value in first.items() if not torch.equal(value, second[key])] == []
    return first


def same(found: Outcome, wanted: Outcome, tolerance: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    distances = {key: distance(found[key], value) for key, value in wanted.items()}
    assert {key: far for key, far in distances.items() if not far <= tolerance} == {}


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference; where values are above 1, as sums over rows are, in proportion to the largest one."""
    assert one.shape == other.shape and one.dtype == other.dtype
    if not one.numel():
        return 0.0
    return float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1.0))


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_the_model_of_one(name: str, two: list[dict[str, Outcome | str]], tmp_path: Path) -> None:
    same(both(two, name), TRAININGS[name](tmp_path))


@pytest.mark.parametrize("name", [name for name, declared in DECLARED.items() if declared == "exact"])
def test_a_method_declared_exact_gives_the_same_model(
    name: str, two: list[dict[str, Outcome | str]], tmp_path: Path
) -> None:
    same(both(two, name), METHODS[name](tmp_path))


@pytest.mark.parametrize("name", [name for name, declared in DECLARED.items() if declared == "one"])
def test_a_method_declared_for_one_process_is_refused_in_two(name: str, two: list[dict[str, Outcome | str]]) -> None:
    for found in two:
        assert found[name] == f"EngramError: {name} works in one process, and there are 2; start a single one"


def one_process(base: type) -> Any:
    return type("Alone", (base,), {"processes": "one"})()


@pytest.mark.parametrize(
    "work",
    [
        lambda: one_process(GradientLearner).learn(Task(rows())),
        lambda: one_process(FrozenLearner).begin(Task(rows()), Run()),
        lambda: one_process(Forgetter).check(Request.of_records(rows(), ("1",))),
        lambda: one_process(Probe).check(Subject(network())),
    ],
    ids=["GradientLearner", "FrozenLearner", "Forgetter", "Probe"],
)
def test_every_template_refuses_more_processes_than_its_method_can_work_in(
    work: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "shard", (0, 3))
    with pytest.raises(EngramError, match="Alone works in one process, and there are 3; start a single one"):
        work()


def test_batch_statistics_and_dropout_give_the_same_accuracy_in_two_processes(
    two: list[dict[str, Outcome | str]], tmp_path: Path
) -> None:
    apart = torch.stack([both(two, name)["accuracy"] for name in STATISTICAL]).double()
    alone = torch.stack([case(tmp_path)["accuracy"] for case in STATISTICAL.values()]).double()
    spread = float((alone.var() / 5 + apart.var() / 5).sqrt())
    assert not torch.equal(apart, alone) and float(alone.mean()) > 0.8
    assert abs(float(apart.mean() - alone.mean())) < 2.78 * spread


def test_every_declaration_has_its_test() -> None:
    """A first method that is "statistical" needs one beside those above."""
    assert set(DECLARED.values()) <= {"exact", "one"}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
