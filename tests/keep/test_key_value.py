"""Discrete key-value bottleneck: locality, masks that come off, wiping that stays, and what both cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engram.core.erasure import forget
from engram.core.learner import fork
from engram.core.persist import load_learner, save_learner
from engram.core.request import Classes, Records, Request
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.key_value import CellIndex, KeyValueBottleneck
from engram.models.key_value import KeyValueHead
from engram.models.seeding import seeded
from engram.reproduce.discrete_key_value_bottleneck import toy_learner, toy_probe
from engram.stats.seeds import generator
from engram.testing import holds

PLAIN = Optimizer("sgd", lr=2.0, momentum=0.0)


class Toy(NamedTuple):
    learner: KeyValueBottleneck
    train: Table
    test: Table


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy(*toy_learner(0))


@pytest.fixture(scope="module")
def square() -> Table:
    """Unlabelled rows for the keys: 2000 uniform points of the unit square."""
    points = torch.rand(2000, 2, generator=generator("square"))
    return Table({"values": points}, ids=tuple(f"point {k}" for k in range(2000)))


def blobs(*means: tuple[float, float], first: int = 0, n: int = 30, sd: float = 0.03) -> Table:
    """n rows around each mean; labels and ids count from `first`."""
    labels = torch.arange(len(means)).repeat_interleave(n)
    noise = torch.randn(len(labels), 2, generator=generator("blobs", first))
    ids = tuple(f"row {first} {k}" for k in range(len(labels)))
    return Table({"values": torch.tensor(means)[labels] + sd * noise}, labels + first, ids)


def made(keys: Table | None, *tasks: Table, **changes: Any) -> KeyValueBottleneck:
    """A learner with few keys and full batches, prepared on `keys`, that has learnt these rows task by task."""
    few = {"codebooks": 4, "keys": 40, "dim": 2, "epochs": 20, "optimizer": PLAIN, "classes_total": 4}
    learner = KeyValueBottleneck(**{**few, **changes})
    if keys is not None:
        learner.prepare(keys)
    run = Run()
    for rows in tasks:
        learner.learn(Task(rows, classes=rows.classes), run)
    return learner


def values(learner: KeyValueBottleneck) -> Tensor:
    """V by class id: [classes, C, M], rows of classes that were never born left out."""
    head = learner.head
    found: Tensor = head.values.detach()[head.classes.argsort()]
    return found.reshape(len(found), head.codebooks, head.keys).clone()


def corners() -> tuple[Table, Table]:
    """Two tasks of two classes, far apart."""
    return blobs((0.1, 0.1), (0.1, 0.35)), blobs((0.9, 0.9), (0.9, 0.65), first=2)


# --- what must hold by the paper


@holds("discrete-key-value-bottleneck", 1)
@pytest.mark.parametrize("codebooks", [1, 4])
def test_one_step_moves_the_cells_of_its_batch_alone(square: Table, codebooks: int) -> None:
    learner = made(square, blobs((0.1, 0.1), (0.6, 0.4)), codebooks=codebooks, epochs=1)
    batch = blobs((0.5, 0.5), (0.7, 0.2), first=2, n=3)
    before = values(learner)
    learner.learn(Task(batch, classes=batch.classes))
    moved = (values(learner) != before).any(0)
    touched = learner.touched(Request.of_classes(batch, (2, 3)))
    assert torch.equal(moved, touched)
    assert int(moved.sum(1).max()) <= len(batch)
    assert (before.any(0) & ~touched).any()


@pytest.mark.parametrize("change", [{"weight_decay": 0.1}, {"momentum": 0.9}])
def test_optimisers_with_a_memory_or_decay_move_other_cells(square: Table, change: dict[str, float]) -> None:
    rows = blobs((0.1, 0.1), (0.9, 0.9))
    plan = Optimizer("sgd", lr=2.0, **{"momentum": 0.0, **change})
    moved = []
    for optimizer in (PLAIN, plan):
        learner = made(square, rows, optimizer=optimizer, epochs=1)
        old = values(learner)
        first, second = (learner.head.nearest(part.inputs["values"], learner.head.usable) for part in halves(rows))
        trained = optimizer.build(learner.head.parameters())
        for cells, label in ((first, 0), (second, 1)):
            trained.zero_grad()
            F.cross_entropy(learner.head.read(cells), torch.full((len(cells),), label)).backward()
            old, last = values(learner), cells
            trained.step()
        selected = torch.zeros(learner.head.count.numel(), dtype=torch.bool)
        selected[learner.head.flat(last)] = True
        moved.append(bool((values(learner) != old).any(0).flatten()[~selected].any()))
    assert moved == [False, True]


def halves(rows: Table) -> tuple[Table, Table]:
    return rows.take(range(len(rows) // 2)), rows.take(range(len(rows) // 2, len(rows)))


@holds("discrete-key-value-bottleneck", 2)
def test_zero_values_say_nothing(square: Table) -> None:
    rows = blobs((0.1, 0.1), (0.6, 0.4), (0.9, 0.2))
    learner = made(square, rows, epochs=0, classes_total=0)
    logits = predict(learner.model, rows)
    assert torch.equal(logits, torch.zeros(len(rows), 3))
    assert rows.labels is not None
    for smoothing in (0.0, 0.1):
        loss = F.cross_entropy(logits, rows.labels, label_smoothing=smoothing)
        assert float(loss) == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-6)


@holds("discrete-key-value-bottleneck", 3)
def test_the_toy_is_kept_where_a_linear_probe_forgets_it(toy: Toy) -> None:
    assert accuracy(toy.learner.model, toy.test) > 0.95
    assert toy_probe(0) < 0.4


@holds("discrete-key-value-bottleneck", 4)
def test_masking_a_class_of_the_toy_forgets_it_and_unmasking_restores_every_bit(toy: Toy) -> None:
    learner, four = fork(toy.learner), toy.test.of_classes([4])
    assert isinstance(learner, KeyValueBottleneck)
    others = toy.test.without(four.ids)
    logits, stored = predict(learner.model, toy.test), values(learner)
    assert accuracy(learner.model, four) > 0.9
    learner.mask(learner.touched(Request.of_classes(toy.train, (4,))))
    assert accuracy(learner.model, four) == 0
    assert accuracy(learner.model, others) > 0.98
    assert torch.equal(values(learner), stored)
    assert not torch.equal(predict(learner.model, toy.test), logits)
    learner.unmask()
    assert torch.equal(predict(learner.model, toy.test), logits)


@holds("discrete-key-value-bottleneck", 4)
def test_deleting_the_values_makes_it_final(toy: Toy) -> None:
    learner, four = fork(toy.learner), toy.test.of_classes([4])
    assert isinstance(learner, KeyValueBottleneck)
    request = Request.of_classes(toy.train, (4,))
    cells = learner.touched(request)
    assert values(learner)[:, cells].any()
    done = forget(learner, request)
    learner.unmask()
    assert not done.exact
    assert not values(learner)[:, cells].any()
    assert torch.isneginf(predict(learner.model, four)[:, 4]).all()
    assert accuracy(learner.model, toy.test.without(four.ids)) > 0.98


@holds("discrete-key-value-bottleneck", 5)
@pytest.mark.parametrize("codebooks", [1, 4])
def test_the_order_of_tasks_with_cells_of_their_own_is_of_no_matter(square: Table, codebooks: int) -> None:
    one, other = corners()
    settings = {"codebooks": codebooks, "projection": "chunks" if codebooks == 1 else "random"}
    forth, back = made(square, one, other, **settings), made(square, other, one, **settings)
    assert not (forth.index.counts(one.ids) * forth.index.counts(other.ids)).any()
    torch.testing.assert_close(values(forth), values(back), rtol=0, atol=1e-6)
    assert values(forth).abs().max() > 0.1
    unknown = [made(square, *tasks, **settings, classes_total=0) for tasks in ((one, other), (other, one))]
    assert (values(unknown[0]) - values(unknown[1])).abs().max() > 1e-3  # a softmax over the classes seen so far


@holds("discrete-key-value-bottleneck", 6)
def test_training_leaves_keys_and_looking_leaves_counters(square: Table) -> None:
    one, other = corners()
    learner = made(square, one)
    keys, projection = learner.head.codebook.clone(), learner.head.projection.clone()
    learner.learn(Task(other, classes=other.classes))
    assert torch.equal(learner.head.codebook, keys) and torch.equal(learner.head.projection, projection)
    count, masked = learner.head.count.clone(), learner.head.masked.clone()
    predict(learner.model.train(), square)
    learner.activated(square)
    learner.trial(learner.touched(Request.of_classes(one, (0,))), one)
    assert torch.equal(learner.head.count, count) and torch.equal(learner.head.masked, masked)
    assert int(count.sum()) == learner.codebooks * (len(one) + len(other))


# --- the head


def head(**settings: Any) -> KeyValueHead:
    with seeded(generator("head")):
        made = KeyValueHead(6, **{"codebooks": 3, "keys": 5, "dim": 2, **settings})
    made.codebook.copy_(torch.randn(made.codebook.shape, generator=generator("codebook"), dtype=torch.float64))
    made.grow([1, 4], None)
    drawn = torch.randn(made.values.shape, generator=generator("values"))
    made.values.data.copy_(drawn)
    made.count.fill_(1)
    return made


def slowly(made: KeyValueHead, x: Tensor) -> Tensor:
    """Compact logits of one row, key by key."""
    total = torch.zeros(len(made.classes), dtype=torch.float64)
    for c in range(made.codebooks):
        z = x.double() @ made.projection[c]
        live = [j for j in range(made.keys) if made.count[c, j] > 0 and not made.masked[c, j]]
        if live:
            best = min(live, key=lambda j: float((z - made.codebook[c, j]).square().sum()))
            total += made.values.detach()[:, c * made.keys + best].double()
    return total / made.codebooks


def test_the_head_is_the_definition_with_masked_and_unused_keys_left_out() -> None:
    made = head()
    x = torch.randn(20, 6, generator=generator("x"))
    assert torch.allclose(made.projection.norm(dim=1), torch.ones(3, 2, dtype=torch.float64))
    for _ in range(5):
        wanted = torch.stack([slowly(made, row) for row in x])
        logits = made(x)
        torch.testing.assert_close(logits[:, [1, 4]].double(), wanted, rtol=0, atol=1e-6)
        assert torch.isneginf(logits[:, [0, 2, 3]]).all()
        made.masked[:, _] = True
        made.count[1, :3] = 0
    assert torch.equal(made(x)[:, [1, 4]], torch.zeros(20, 2))


def test_a_reserved_class_trains_and_is_not_predicted() -> None:
    made = head()
    made.reserve(range(6))
    made.values.data[2:] = -1.0
    kept = made.values.detach().clone()
    x = torch.randn(4, 6, generator=generator("x"))
    assert made.read(made.nearest(x, made.usable)).shape == (4, 6)
    assert torch.isneginf(made(x)[:, [0, 2, 3, 5]]).all()
    made.grow([0, 5], None)
    assert torch.equal(made.values, kept)
    assert torch.equal(made(x)[:, [0, 5]], torch.full((4, 2), -1.0))
    assert made.classes[made.places(torch.tensor([5, 1, 0]))].tolist() == [5, 1, 0]


def test_chunks_cut_the_features_and_must_fit() -> None:
    made, x = head(projection="chunks"), torch.arange(12.0).reshape(2, 6)
    assert torch.equal(made.project(x), x.double().reshape(2, 3, 2).transpose(0, 1))
    with pytest.raises(EngramError, match="3 chunks of 4 are not the 6 features"):
        head(projection="chunks", dim=4)
    with pytest.raises(EngramError, match="did you mean 'chunks'"):
        head(projection="chunk")


def test_the_gradient_is_never_longer_than_said_and_no_rate_below_4_c_climbs() -> None:
    made, labels = head(), torch.tensor([0, 1] * 10)
    cells = made.nearest(torch.randn(20, 6, generator=generator("x")), made.usable)
    loss = F.cross_entropy(made.read(cells), labels)
    for scale in (0.0, 1.0, 30.0):
        made.values.data.mul_(scale)
        (slope,) = torch.autograd.grad(F.cross_entropy(made.read(cells), labels), made.values)
        assert slope.norm() <= (2 / made.codebooks) ** 0.5
    made.values.data.zero_()
    for _ in range(30):
        last = loss = F.cross_entropy(made.read(cells), labels)
        (slope,) = torch.autograd.grad(loss, made.values)
        made.values.data -= 3.9 * made.codebooks * slope
        assert F.cross_entropy(made.read(cells), labels) <= last


# --- forgetting


@pytest.mark.parametrize("kind", ["records", "classes"])
def test_the_index_forgets_without_rows_what_rows_would(square: Table, kind: str) -> None:
    one, other = corners()
    full = Request.of_records(one, one.ids[:7]) if kind == "records" else Request.of_classes(one, (1,))
    bare = Request(Records(one.ids[:7]) if kind == "records" else Classes((1,)))
    found = []
    for request in (full, bare):
        learner = made(square, one, other)
        cells = learner.touched(request)
        residue = forget(learner, request).residue
        assert not values(learner)[:, cells].any()
        assert learner.holds(full.ids) == ()
        found.append((residue, learner.lost, values(learner), predict(learner.model, one)))
    assert found[0][:2] == found[1][:2]
    assert torch.equal(found[0][2], found[1][2]) and torch.equal(found[0][3], found[1][3])


def test_residue_is_who_shared_a_cell_and_the_cost_falls_on_its_neighbours(square: Table) -> None:
    near = blobs((0.1, 0.1), (0.16, 0.1), sd=0.02)
    far = blobs((0.9, 0.9), first=2)
    learner = made(square, near, far)
    alone = fork(learner)
    assert forget(alone, Request.of_classes(far, (2,))).residue == ()
    assert isinstance(alone, KeyValueBottleneck) and alone.lost == {0: 0.0, 1: 0.0}
    touched = learner.index.counts(near.of_classes([0]).ids), learner.index.counts(near.of_classes([1]).ids)
    shared = (touched[0] > 0) & (touched[1] > 0)
    share = float(touched[1][shared].sum()) / (learner.codebooks * 30)
    of_row = learner.index.inside(shared)[:30].any(1)
    residue = forget(learner, Request.of_classes(near, (0,))).residue
    assert residue == tuple(id for id, hit in zip(near.ids[:30], of_row.tolist(), strict=True) if hit)
    assert residue and 0 < share < 1
    assert learner.lost == {1: pytest.approx(share), 2: 0.0}
    assert not learner.head.usable[shared].any()


def test_residue_follows_chains_of_shared_cells_and_remembers_wiped_ones() -> None:
    def index() -> CellIndex:
        made = CellIndex(2, 9)
        made.add(
            ("a", "b", "c", "d"), torch.zeros(4, dtype=torch.int64), torch.tensor([[0, 0], [0, 1], [2, 1], [3, 3]])
        )
        return made

    def rows(*ids: str) -> Table:
        return Table({}, ids=ids)

    assert index().drop(rows("a")) == ("a",)
    assert index().drop(rows("d", "a", "b")) == ("a", "b")  # a shares with b, and b with c
    assert index().drop(rows("a", "b", "c", "x")) == ()
    later = index()
    later.drop(rows("b"))
    assert later.counts().sum() == 4 and later.holds(("a", "b", "c")) == ("a", "c")
    assert later.drop(rows("a")) == ("a",)
    assert later.drop(rows("b")) == ()


def test_it_does_not_equal_retraining_and_says_so(square: Table) -> None:
    near = blobs((0.1, 0.1), (0.16, 0.1), sd=0.02)
    learner = made(square, near)
    forget(learner, Request.of_classes(near, (0,)))
    retrained = made(square, near.of_classes([1]))
    assert (values(learner)[1] - values(retrained)[1]).abs().max() > 1e-3
    assert not KeyValueBottleneck.exact
    assert "does NOT equal retraining" in str(KeyValueBottleneck.__doc__)


def test_a_trial_tells_the_cost_of_a_request_and_changes_nothing(toy: Toy) -> None:
    learner = toy.learner
    logits, elsewhere = predict(learner.model, toy.test), torch.zeros_like(learner.head.masked)
    cells = learner.touched(Request.of_classes(toy.train, (4,)))
    found = learner.trial(cells, toy.test)
    assert found[4][0] > 0.9 and found[4][1] == 0
    assert all(abs(after - before) < 0.1 for c, (before, after) in found.items() if c != 4)
    assert torch.equal(predict(learner.model, toy.test), logits)
    assert all(before == after for before, after in learner.trial(elsewhere, toy.test).values())


def test_rows_at_hand_say_which_cells_they_select(square: Table) -> None:
    one, other = corners()
    learner = made(square, one, other)
    new = blobs((0.1, 0.1), first=9)
    cells = learner.activated(new)
    places = learner.head.nearest(new.inputs["values"], learner.head.usable)
    assert all(cells[c, j] for row in places.tolist() for c, j in enumerate(row))
    assert int(cells.sum()) == sum(len(places[:, c].unique()) for c in range(4))
    most = learner.activated(new, most=3)
    counts = torch.stack([torch.bincount(places[:, c], minlength=40) for c in range(4)])
    assert int(most.sum()) == 3 and counts[most].min() >= counts[cells & ~most].max()
    learner.wipe(cells)
    assert not values(learner)[:, cells].any() and learner.lost[0] > 0.5 and learner.lost[2] == 0
    assert learner.holds(one.ids) == one.ids


def test_wiped_cells_are_free_and_masked_ones_are_avoided(square: Table) -> None:
    one, other = corners()
    learner = made(square, one, other)
    cells = learner.touched(Request.of_classes(one, (0, 1)))
    learner.forget(Request.of_classes(one, (0, 1)))
    learner.learn(Task(one, classes=(0, 1)))
    assert torch.equal(learner.touched(Request.of_classes(one, (0, 1))), cells)
    assert accuracy(learner.model, one) == 1
    learner.mask(cells)
    again = blobs((0.1, 0.1), (0.1, 0.35), first=5)
    learner.learn(Task(again, classes=(5, 6)))
    assert not (learner.touched(Request.of_classes(again, (5, 6))) & cells).any()


def test_rows_that_placed_the_keys_are_residue(square: Table) -> None:
    one, other = corners()
    own, elsewhere = made(None, one, other), made(square, one, other)
    assert forget(own, Request.of_classes(one, (0, 1))).residue == one.ids
    assert forget(elsewhere, Request.of_classes(one, (0, 1))).residue == ()
    assert elsewhere.holds(square.ids[:3]) == square.ids[:3]


def test_keys_from_a_named_source() -> None:
    from engram.data.readers import read

    digits = read("sklearn:digits")
    rows = Table(digits.inputs, digits.labels, tuple(f"mine {id}" for id in digits.ids)).take(range(60))
    named = made(None, rows, key_rows="sklearn:digits", key_epochs=1)
    assert named.holds(digits.ids[:2]) == digits.ids[:2]
    assert named.needs == (frozenset({"general-rows"}),)


def test_masks_and_index_outlive_saving(square: Table, tmp_path: Path) -> None:
    one, other = corners()
    learner = made(square, one, other)
    learner.forget(Request.of_records(one, one.ids[:3]))
    learner.mask(learner.touched(Request.of_classes(other, (2,))))
    save_learner(learner, tmp_path / "learner")
    twin = load_learner(tmp_path / "learner")[0]
    assert isinstance(twin, KeyValueBottleneck) and twin.lost == learner.lost
    for each in (learner, twin):
        each.unmask()
        each.forget(Request(Classes((1,))))
    assert torch.equal(predict(twin.model, other), predict(learner.model, other))
    assert torch.equal(values(twin), values(learner))


def test_refuses_what_cannot_be(square: Table) -> None:
    one, other = corners()
    learner = made(square, one)
    before = values(learner)
    with pytest.raises(EngramError, match="frozen"):
        learner.prepare(square)
    with pytest.raises(EngramError, match=f"{one.ids[0]!r} was learnt before"):
        learner.learn(Task(one.take([0]).concat(other)))
    with pytest.raises(EngramError, match=f"{other.ids[0]!r} was never learnt"):
        learner.forget(Request(Records((one.ids[0], other.ids[0]))))
    with pytest.raises(EngramError, match="the request names was never learnt"):
        learner.forget(Request(Classes((3,))))
    assert torch.equal(values(learner), before) and learner.holds(one.ids) == one.ids
    learner.mask(torch.arange(4)[:, None].expand(4, 40) == 2)
    with pytest.raises(EngramError, match="every key of a codebook is masked"):
        learner.learn(Task(other))


@pytest.mark.parametrize("learned", [True, False])
def test_digits_are_kept_task_after_task(digits: Any, take: Any, learned: bool) -> None:
    from engram.data.streams import class_stream

    stages = class_stream(digits.train, digits.test, base=2, increment=2)
    learner = KeyValueBottleneck(keys=64, classes_total=10, epochs=20 if learned else 0)
    final = take(learner, stages).curve[-1]
    assert (final > 0.7) == learned
