"""The one training loop: equal to the loop that one would write by hand, and to itself after an interruption."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from engram.data.table import Batch, Table
from engram.engine import fit as fitting
from engram.engine.fit import fit
from engram.engine.losses import Mean, by_target, per_row
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.engine.teacher import EMA
from engram.errors import EngramError
from engram.models.build import build
from engram.stats.seeds import generator

Pair = tuple[Batch, Batch | None]


def rows(n: int = 50, seed: int = 0) -> Table:
    x = torch.randn(n, 6, generator=generator("rows", seed))
    return Table({"values": x}, (x[:, :3].argmax(1)))


def network(seed: int = 0, **options: Any) -> nn.Module:
    spec = {"name": "MLP", "hidden": [8], **options}
    return build(spec, inputs={"values": (6,)}, classes=(0, 1, 2), generator=generator("weights", seed))


def usual(model: nn.Module) -> Callable[[Batch], Mean]:
    def step(batch: Batch) -> Mean:
        assert batch.labels is not None
        return by_target(model(**batch.inputs).logits, batch.labels)

    return step


def order(table: Table, size: int = 16) -> Callable[[int], Iterator[Batch]]:
    return lambda epoch: table.batches(size, seed=3, epoch=epoch)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(optimizer: Optimizer, epochs: int = 3, run: Run | None = None, **options: Any) -> nn.Module:
    model = network().train()
    fit(usual(model), order(rows()), model=model, optimizer=optimizer, epochs=epochs, run=run or Run(), **options)
    return model


# --- what a loss averages over


def test_the_arithmetic_of_means() -> None:
    a, b = Mean.of(torch.tensor([1.0, 2.0, 6.0])), Mean.over(torch.tensor(8.0), 2)
    assert a.value == 3 and b.value == 4
    assert (a + b).value == 7 and (a - b).value == -1 and (-a).value == -3
    assert (2 * a).value == 6 and (a * 0.5).value == 1.5
    assert [float(count) for _, count in (3 * a + b).terms] == [3, 2]
    assert Mean.of(torch.tensor(5.0)).value == 5
    assert Mean.over(torch.tensor(0.0), 0).value == 0  # a term over nothing
    assert Mean.over(torch.tensor(0.0), torch.tensor(0)).value == 0
    assert (a + Mean.of(torch.zeros(0))).value == 3


@given(st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=6), min_size=1, max_size=4))
def test_sums_and_counts_of_pieces_give_the_mean_of_the_whole(pieces: list[list[int]]) -> None:
    parts = [Mean.of(torch.tensor(piece, dtype=torch.float64)).terms[0] for piece in pieces]
    whole = Mean.over(sum((s for s, _ in parts), torch.zeros(())), sum(float(c) for _, c in parts))
    everything = [x for piece in pieces for x in piece]
    assert float(whole.value) == pytest.approx(sum(everything) / len(everything), abs=1e-9)


# --- one update a batch


@pytest.mark.parametrize(
    ("plan", "plain"),
    [
        (Optimizer("sgd", 0.1, momentum=0.9, nesterov=True, weight_decay=0.01), "sgd"),
        (Optimizer("adam", 0.01, weight_decay=0.01), "adam"),
        (Optimizer("adamw", 0.01, weight_decay=0.1), "adamw"),
    ],
)
def test_it_is_the_loop_that_one_would_write(plan: Optimizer, plain: str) -> None:
    model, table = network(), rows()
    optimizer: torch.optim.Optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
        "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    }[plain](model.parameters())
    losses = []
    for epoch in range(3):
        seen = []
        for batch in table.batches(16, seed=3, epoch=epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(**batch.inputs).logits, batch.labels)
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        losses.append(sum(seen) / len(seen))
    run, same = Run(), network()
    history = fit(usual(same), order(table), model=same, optimizer=plan, epochs=3, run=run)
    assert torch.equal(weights(same), weights(model))
    assert history.losses == pytest.approx(losses, rel=1e-6)
    assert (run.cost.steps, run.cost.rows) == (3 * 4, 3 * 50) and run.cost.seconds > 0


def test_no_epochs_leave_the_model_as_it_was() -> None:
    assert torch.equal(weights(trained(Optimizer(), epochs=0)), weights(network()))


def test_frozen_parameters_stay() -> None:
    model = network()
    model.encoder.requires_grad_(False)  # type: ignore[union-attr]
    before = copy.deepcopy(model.state_dict())
    fit(usual(model), order(rows()), model=model, optimizer=Optimizer(lr=0.1), epochs=1, run=Run())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_dropout_follows_the_run_and_moves_no_global_draw(
    moved_by: Callable[[Callable[[], object]], list[str]],
) -> None:
    def once(seed: int) -> Tensor:
        model = network(dropout=0.5).train()
        fit(usual(model), order(rows()), model=model, optimizer=Optimizer(lr=0.01), epochs=1, run=Run(seed=seed))
        return weights(model)

    assert torch.equal(once(0), once(0)) and not torch.equal(once(0), once(1))
    assert moved_by(lambda: once(0)) == []


# --- micro-batches


@pytest.mark.parametrize("micro", [1, 3, 5, 16, 100])
def test_micro_batches_change_nothing(micro: int) -> None:
    plan = Optimizer("sgd", 0.1, clip=0.5)
    assert torch.allclose(weights(trained(plan, micro=micro)), weights(trained(plan)), atol=1e-5)


def pairs(epoch: int) -> Iterator[Pair]:
    many, few = rows(40, seed=1), rows(40, seed=2)
    for one in many.batches(20, seed=1, epoch=epoch):
        yield one, few.batch(one.rows[:7])


@pytest.mark.parametrize("micro", [2, 4, 9])
def test_micro_batches_of_two_terms_with_different_counts(micro: int) -> None:
    def once(micro: int | None) -> Tensor:
        model = network()
        sizes: list[int] = []

        def step(pair: Pair) -> Mean:
            first, second = pair
            assert second is not None
            sizes.append(len(first) + len(second))
            return usual(model)(first) - 0.3 * usual(model)(second)

        fit(step, pairs, model=model, optimizer=Optimizer("sgd", 0.1), epochs=2, run=Run(), micro=micro)
        assert micro is None or max(sizes) <= micro
        return weights(model)

    assert torch.allclose(once(micro), once(None), atol=1e-5)


def test_micro_batches_of_a_pair_without_a_partner_and_unused_parameters() -> None:
    def once(micro: int | None) -> tuple[Tensor, Tensor]:
        model = network()
        model.register_parameter("unused", nn.Parameter(torch.ones(3)))
        fit(
            lambda pair: usual(model)(pair[0]) + Mean.of(torch.zeros(())),  # a term without a gradient
            lambda epoch: ((one, None) for one, _ in pairs(epoch)),
            model=model,
            optimizer=Optimizer("adamw", 0.01, weight_decay=0.5),
            epochs=1,
            run=Run(),
            micro=micro,
        )
        return weights(model), model.get_parameter("unused").detach()

    whole, cut = once(None), once(6)
    assert torch.allclose(cut[0], whole[0], atol=1e-5)
    assert torch.equal(whole[1], torch.ones(3)) and torch.equal(cut[1], torch.ones(3))


def test_micro_batches_need_one_loss() -> None:
    model = network()
    main = torch.optim.SGD(model.parameters(), 0.1)

    def step(batch: Batch) -> Iterator[tuple[Mean, torch.optim.Optimizer]]:
        yield usual(model)(batch), main

    with pytest.raises(EngramError, match="leave out micro-batches"):
        fit(step, order(rows()), model=model, optimizer={"a": main}, epochs=1, run=Run(), micro=2)


# --- several updates a batch


def test_each_yielded_loss_is_an_update_that_is_done_when_the_step_goes_on() -> None:
    model = nn.utils.skip_init(nn.Linear, 2, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    one, two = (torch.optim.SGD(model.parameters(), lr) for lr in (1.0, 0.5))
    seen: list[list[float]] = []
    table = Table({"values": torch.tensor([[1.0, 2.0]])})

    def step(batch: Batch) -> Iterator[tuple[Mean, torch.optim.Optimizer]]:
        yield Mean.of(model(batch.inputs["values"])), one  # gradient (1, 2)
        seen.append(model.weight.detach().flatten().tolist())
        yield Mean.of(model(batch.inputs["values"]).square()), two  # w = (-1, -2): gradient 2 · (-5) · (1, 2)
        seen.append(model.weight.detach().flatten().tolist())

    run, ticks = Run(), []
    history = fit(
        step,
        lambda epoch: table.batches(1),
        model=model,
        optimizer={"one": one, "two": two},
        epochs=1,
        run=run,
        after_step=ticks.append,
    )
    assert seen == [[-1.0, -2.0], [4.0, 8.0]]
    assert run.cost.steps == 2 and ticks == [1, 2]
    assert history.losses == [12.5]  # the mean of 0 and 25


def test_one_loss_needs_one_optimiser() -> None:
    model = network()
    with pytest.raises(EngramError, match="needs an Optimizer"):
        fit(
            usual(model),
            order(rows()),
            model=model,
            optimizer={"a": torch.optim.SGD(model.parameters(), 0.1)},
            epochs=1,
            run=Run(),
        )


# --- rates, clipping, what follows an update


@pytest.mark.parametrize(
    ("plan", "wanted"),
    [
        (Optimizer(), [1, 1, 1, 1, 1]),
        (Optimizer(schedule="linear"), [1, 0.75, 0.5, 0.25, 0]),
        (Optimizer(schedule="cosine"), [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
        (Optimizer(schedule="steps", milestones=(0.5, 0.75), gamma=0.1), [1, 1, 0.1, 0.01, 0.01]),
        (Optimizer(warmup=0.5), [0, 0.5, 1, 1, 1]),
        (Optimizer(schedule="linear", warmup=0.5), [0, 0.5, 1, 0.5, 0]),
    ],
)
def test_schedules(plan: Optimizer, wanted: list[float]) -> None:
    assert [plan.factor(k / 4) for k in range(5)] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("steps", [None, 4])
def test_the_rate_moves_each_epoch_or_within(steps: int | None) -> None:
    model, rates = network(), []
    plan = Optimizer("sgd", 0.2, momentum=0.0, schedule="linear")
    before = weights(model)

    def after(k: int) -> None:
        nonlocal before
        rates.append(float((weights(model) - before).norm()))
        before = weights(model)

    def step(batch: Batch) -> Mean:  # a gradient of constant length
        return Mean.of(torch.cat([p.flatten() for p in model.parameters()]).sum())

    fit(step, order(rows()), model=model, optimizer=plan, epochs=2, run=Run(), steps=steps, after_step=after)
    shares = [k / 8 for k in range(8)] if steps else [0.0] * 4 + [0.5] * 4
    length = math.sqrt(len(before))
    assert rates == pytest.approx([0.2 * (1 - share) * length for share in shares], rel=1e-4)


def test_the_gradient_is_clipped() -> None:
    model, before = network(), weights(network())
    plan = Optimizer("sgd", 1.0, momentum=0.0, clip=0.01)
    fit(usual(model), lambda epoch: [rows().batch(torch.arange(50))], model=model, optimizer=plan, epochs=1, run=Run())
    assert float((weights(model) - before).norm()) == pytest.approx(0.01, rel=1e-3)
    assert float((weights(trained(Optimizer("sgd", 1.0, clip=1e6), 1)) - before).norm()) > 0.1


def test_what_follows_an_update_sees_its_number_and_the_new_weights() -> None:
    model, seen = network(), []

    def clamp(k: int) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.125, 0.125)
        seen.append(k)

    fit(usual(model), order(rows()), model=model, optimizer=Optimizer(), epochs=2, run=Run(), after_step=clamp)
    assert seen == list(range(1, 9)) and float(weights(model).abs().max()) == 0.125


# --- interruption


class Killed(BaseException):
    """What a program ends by in the middle."""


def experiment(run: Run, stop: int | None = None) -> tuple[nn.Module, EMA, list[float]]:
    """A training with dropout, momentum, a schedule and an averaged copy, then one in a phase; it can end after so
    many updates."""
    model = network(dropout=0.3, norm="batch").train()
    average = EMA(model, 0.9)

    def after(k: int) -> None:
        if k == stop:
            raise Killed
        average.update(model)

    history = fit(
        usual(model),
        order(rows()),
        model=model,
        optimizer=Optimizer("adam", 0.02, schedule="cosine"),
        epochs=4,
        run=run,
        steps=4,
        state={"average": average},
        after_step=after,
    )
    run.phase("more", lambda: fit_more(model, run))
    return model, average, history.losses


def fit_more(model: nn.Module, run: Run) -> None:
    fit(usual(model), order(rows(seed=1)), model=model, optimizer=Optimizer("sgd", 0.01), epochs=1, run=run)


@pytest.fixture
def keep_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "CHECKPOINT_EVERY", 0.0)
    monkeypatch.setattr(fitting, "WORTH_KEEPING", 0.0)


@pytest.mark.usefixtures("keep_every_epoch")
@pytest.mark.parametrize("stop", [3, 4, 6, 16])  # in the first epoch, at its end, in the second one, at the end
def test_after_an_interruption_the_same_bits(stop: int, tmp_path: Path) -> None:
    whole, average, losses = experiment(Run(seed=1))
    with pytest.raises(Killed):
        experiment(Run(tmp_path, seed=1), stop)
    assert (tmp_path / "journal" / "fit" / "value.json").exists() == (stop > 4)
    model, again, history = experiment(Run(tmp_path, seed=1))
    for one, other in ((model, whole), (again.model, average.model)):
        assert all(torch.equal(v, one.state_dict()[k]) for k, v in other.state_dict().items())
    assert history == losses and again.updates == average.updates


@pytest.mark.usefixtures("keep_every_epoch")
def test_the_cost_of_checkpointed_epochs_counts_again(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        experiment(Run(tmp_path), 9)  # two epochs of four updates were kept
    run, whole = Run(tmp_path), Run()
    experiment(run)
    experiment(whole)
    assert (run.cost.steps, run.cost.rows) == (whole.cost.steps, whole.cost.rows)


@pytest.mark.usefixtures("keep_every_epoch")
def test_a_finished_training_is_loaded_and_its_checkpoint_goes_with_the_phase(tmp_path: Path) -> None:
    def once(run: Run) -> list[Tensor]:
        calls: list[int] = []
        model = network()

        def step(batch: Batch) -> Mean:
            calls.append(1)
            return usual(model)(batch)

        fit(step, order(rows()), model=model, optimizer=Optimizer(), epochs=2, run=run, name="alone")
        assert len(calls) == expected
        return [weights(model)]

    expected = 8
    first = once(Run(tmp_path))
    expected = 0
    assert torch.equal(once(Run(tmp_path))[0], first[0])
    expected = 8
    run = Run(tmp_path)
    run.phase("outer", lambda: once(run))
    assert not (tmp_path / "journal" / "outer" / "alone").exists()


def test_a_short_training_writes_nothing(tmp_path: Path) -> None:
    trained(Optimizer(), run=Run(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_computes_in_it_and_keeps_the_weights_in_float32() -> None:
    model, seen = network(), []

    def step(batch: Batch) -> Mean:
        logits = model(**batch.inputs).logits
        seen.append(logits.dtype)
        assert batch.labels is not None
        return Mean.of(per_row(logits, batch.labels))

    run = Run(precision="bfloat16")
    fit(step, order(rows()), model=model, optimizer=Optimizer("sgd", 0.1), epochs=1, run=run)
    assert set(seen) == {torch.bfloat16} and weights(model).dtype == torch.float32
    exact = weights(trained(Optimizer("sgd", 0.1), 1))
    assert not torch.equal(weights(model), exact) and torch.allclose(weights(model), exact, atol=0.02)


def test_a_loss_that_is_no_number_ends_the_training_and_says_where() -> None:
    model = nn.Linear(2, 1, device="meta").to_empty(device="cpu")
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    losses = iter([1.0, 1.0, float("nan")])

    def step(batch: Batch) -> Mean:
        return next(losses) * Mean.of(model(batch.inputs["values"])[:, 0])

    table = Table({"values": torch.ones(4, 2)})
    with pytest.raises(EngramError, match="the loss is no number any more in epoch 3 of fit"):
        fit(step, lambda e: table.batches(4, epoch=e), model=model, optimizer=Optimizer(), epochs=5, run=Run())


def test_weights_that_the_last_update_ruined_are_not_given_out() -> None:
    model = nn.Linear(1, 1, bias=False, device="meta").to_empty(device="cpu")
    nn.init.ones_(model.weight)
    table = Table({"values": torch.full((4, 1), 1e3)})

    def step(batch: Batch) -> Mean:
        return Mean.of(model(batch.inputs["values"])[:, 0])

    sgd = Optimizer("sgd", lr=1e38)
    with pytest.raises(EngramError, match="weights are no number any more in epoch 1 of fit"):
        fit(step, lambda e: table.batches(4, epoch=e), model=model, optimizer=sgd, epochs=1, run=Run())
