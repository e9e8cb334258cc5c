from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.keep.halves import NEW, OLD, SMALL, begun, halves, learnt
from torch import Tensor, nn

from engram.core.erasure import forget
from engram.core.learner import fork
from engram.core.request import Request
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.forget.finetune import Finetune as Repair
from engram.keep.napa_vq import NAPAVQ, Together, drift, overlap, refreshed, updated
from engram.models import Identity, LinearHead, Predictor, ValueHead, load, save, seeded
from engram.models.coding import CodingHead
from engram.reproduce import napa_vq as measured
from engram.testing import holds

FEW: dict[str, Any] = {**SMALL, "neighbours": 3, "pseudo": 16}


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def squares(x: float, *places: float) -> Tensor:
    return torch.tensor([[(x - place) ** 2 for place in places]], dtype=torch.float64)


def linked(n: int, *pairs: tuple[int, int]) -> Tensor:
    graph = torch.eye(n, dtype=torch.float64)
    for i, j in pairs:
        graph[i, j] = graph[j, i] = 1.0
    return graph


# --- the graph


def slowly(graph: Tensor, distances: Tensor, k: int) -> Tensor:
    """The batched rule by its words, row by row."""
    new = graph.clone()
    orders = [sorted(range(len(graph)), key=lambda j: float(row[j])) for row in distances]
    for i in range(len(graph)):
        won = [order[:k] for order in orders if order[0] == i]
        for j in range(len(graph)):
            hits = sum(j in nearest for nearest in won)
            edge = (1.0 if hits else float(graph[i, j])) * 0.9 ** (len(won) - hits)
            new[i, j] = edge if edge > 0.33 else 0.0  # between 0.9 ** 11 = 0.314 and 0.9 ** 10 = 0.349
    return (new + new.T) / 2


@holds("napa-vq", 1)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 7), st.integers(1, 9))
def test_the_graph_follows_its_rule_and_stays_symmetric_with_ones_on_the_diagonal(
    seed: int, rows: int, n: int, k: int
) -> None:
    draws, graph = gen(seed), torch.eye(n, dtype=torch.float64)
    for _ in range(4):
        distances = torch.rand(rows, n, generator=draws, dtype=torch.float64)
        new = updated(graph, distances, k)
        assert torch.allclose(new, slowly(graph, distances, k), atol=1e-12)
        assert torch.equal(new, new.T) and torch.equal(new.diag(), torch.ones(n, dtype=torch.float64))
        assert float(new.min()) >= 0 and float(new.max()) <= 1
        graph = new


MISS = torch.tensor([[0.0, 2.0, 1.0, 9.0], [2.0, 0.0, 9.0, 1.0]])  # 0 and 1 win a row each; none has the other near


@holds("napa-vq", 1)
@pytest.mark.parametrize("at_once", [False, True])
def test_an_edge_survives_ten_misses_and_is_cut_at_the_eleventh(at_once: bool) -> None:
    both = torch.tensor([[0.0, 1.0, 5.0, 9.0], [1.0, 0.0, 5.0, 9.0]])
    fresh = updated(torch.eye(4, dtype=torch.float64), both, 2)
    assert fresh[0, 1] == 1.0

    def after(misses: int) -> float:
        graph = fresh
        for batch in [MISS.repeat(misses, 1)] if at_once else [MISS] * misses:
            graph = updated(graph, batch, 2)
        return float(graph[0, 1])

    assert after(10) == pytest.approx(0.9**10, rel=1e-12)
    assert after(11) == 0.0
    again = updated(updated(fresh, MISS.repeat(10, 1), 2), both, 2)
    assert updated(again, MISS.repeat(10, 1), 2)[0, 1] > 0  # refreshed in between


@holds("napa-vq", 1)
@pytest.mark.parametrize("k", [4, 9])
def test_with_every_vector_near_the_rows_that_win_become_one(k: int) -> None:
    assert torch.equal(refreshed(linked(4), MISS, k), torch.cat([torch.ones(2, 4), torch.eye(4)[2:]]).double())
    everyone = 1 - torch.eye(4)
    assert torch.equal(updated(linked(4), everyone, k), torch.ones(4, 4, dtype=torch.float64))


def test_vectors_that_are_not_live_become_nobodys_neighbours() -> None:
    far = torch.tensor([[0.0, math.inf, 1.0], [1.0, math.inf, 0.0]])
    assert torch.equal(updated(linked(3), far, 3), linked(3, (0, 2)))


# --- NA-VQ


@holds("napa-vq", 2)
def test_repulsion_by_hand() -> None:
    own = torch.tensor([0])
    near = squares(0.4, 0, 1, 10)
    assert near[0].tolist() == pytest.approx([0.16, 0.36, 92.16])
    assert overlap(near, own, linked(3, (0, 1)), 1e-3).item() == 0.0
    assert overlap(squares(0.6, 0, 1, 10), own, linked(3, (0, 1)), 1e-3).item() == pytest.approx(0.20)
    assert overlap(near, own, linked(3), 1e-3).item() == pytest.approx(0.16)  # nobody is near
    pushed = near.clone()
    pushed[0, 0] = 1000.0  # far enough for the loss to be at work
    pushed.requires_grad_()
    overlap(pushed, own, linked(3, (0, 1), (0, 2)), 1e-3).sum().backward()
    assert pushed.grad is not None
    assert pushed.grad[0].tolist() == pytest.approx([1.0, -0.523, -0.477], abs=5e-4)


@holds("napa-vq", 5)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_the_gradient_is_that_of_constant_weights(seed: int) -> None:
    draws, labels = gen(seed), torch.tensor([0, 1, 2, 3, 4, 0])
    graph = linked(5, (0, 1), (0, 2), (1, 3), (2, 3))
    phi = 3 * torch.randn(6, 2, generator=draws, dtype=torch.float64)
    vectors = torch.randn(5, 2, generator=draws, dtype=torch.float64)

    def gradient(loss: Any) -> Tensor:
        x = phi.clone().requires_grad_()
        return torch.autograd.grad(loss((x[:, None] - vectors).square().sum(2)).sum(), x)[0]

    def constant(found: Tensor) -> Tensor:
        parts = []
        for d, y in zip(found, labels.tolist(), strict=True):
            near = [j for j in range(5) if j != y and graph[y, j] > 0]
            w = [math.exp(-0.2 * float(d[j].detach())) for j in near]
            parts.append(torch.relu(d[y] - sum(a / sum(w) * d[j] for a, j in zip(w, near, strict=True))))
        return torch.stack(parts)

    found = gradient(lambda d: overlap(d, labels, graph, 0.2))
    assert torch.allclose(found, gradient(constant), atol=1e-6)
    assert bool(found.any())


def test_gradients_are_finite_where_features_stand_on_their_vector_or_did_not_move() -> None:
    learner = NAPAVQ(**FEW)
    with seeded(gen()):
        learner.model = Predictor(Identity(3), CodingHead(3, [0, 1]))
    learner.old = learner._columns([])
    learner.live = learner._columns([0, 1])
    learner._make_room([])
    phi = learner.head.weight.detach()[:, 0].clone().requires_grad_()
    cross, apart = learner.classify(phi, torch.tensor([0, 1]))
    (cross + apart + drift(phi, phi.detach())).value.backward()
    assert phi.grad is not None and bool(phi.grad.isfinite().all())


# --- coding vectors


@holds("napa-vq", 3)
@pytest.mark.parametrize("plan", [Optimizer("sgd", lr=0.5, weight_decay=0.1), Optimizer("adamw", weight_decay=0.1)])
def test_old_vectors_are_the_same_bits_after_any_later_task(tiny: Table, plan: Optimizer) -> None:
    learner, run, before = NAPAVQ(**FEW, coding=plan, later=1.0), Run(), torch.empty(0, 1, 32)
    for index, classes in enumerate([(3, 1), (7, 4, 0), (2,)]):
        learner.learn(Task(tiny.of_classes(classes), index=index, classes=classes), run)
        now = learner.head.weight.detach().clone()
        assert torch.equal(now[: len(before)], before)
        assert bool((now[len(before) :] != learner.held[len(before) :].cpu()).any(2).all())
        before = now


def test_a_class_that_comes_again_learns_again(tiny: Table) -> None:
    learner = NAPAVQ(**FEW)
    first, second = halves(tiny)
    learner.learn(first)
    before, means = learner.head.weight.detach().clone(), learner.means.clone()
    learner.learn(Task(second.train.concat(tiny.of_classes([2])), index=1))
    moved = (learner.head.weight.detach()[:5] != before).flatten(1).any(1)
    assert moved.tolist() == [False, False, True, False, False]
    assert (learner.means[:5] != means[:5]).any(1).tolist() == [False, False, True, False, False]


def test_the_model_tells_the_nearest_vector_of_unit_length(tiny: Table) -> None:
    learner = learnt(NAPAVQ(**FEW, rotate=True), tiny)
    phi = F.normalize(predict(learner.model, tiny, "pooler_output").double(), dim=1)
    vectors = F.normalize(learner.head.weight.detach().double()[:, 0], dim=1)
    distances = (phi[:, None] - vectors).norm(dim=2)
    logits = predict(learner.model, tiny)
    assert torch.equal(logits.argmax(1), learner.head.classes[distances.argmin(1)])
    assert torch.allclose(logits[:, learner.head.classes].double(), -10 * distances, atol=1e-4)


def test_the_head_grows_starts_as_normal_numbers_and_loads_by_itself(tmp_path: Path) -> None:
    head = CodingHead(200, views=4)
    head.grow([5, 2], gen())
    first = head.weight.detach().clone()
    head.grow([9], gen(1))
    assert torch.equal(head.weight.detach()[:2], first)
    assert float(first.mean()) == pytest.approx(0, abs=0.1) and float(first.std()) == pytest.approx(1, 0.1)
    head.retire([2])
    save(Predictor(Identity(200), head), tmp_path / "model")
    x = torch.randn(3, 200, generator=gen(2))
    again = load(tmp_path / "model")
    assert torch.equal(again(values=x).logits, head(x))
    assert torch.isneginf(head(x)).all(0).tolist() == [c not in (5, 9) for c in range(10)]


# --- NA-PA


@holds("napa-vq", 4)
@pytest.mark.parametrize("rotate", [False, True])
def test_pseudo_features_lie_in_their_own_half_of_the_way_to_a_neighbour(tiny: Table, rotate: bool) -> None:
    learner = begun(NAPAVQ(**{**FEW, "pseudo": 200}, rotate=rotate), tiny)
    views, means = learner.views, learner.means
    p, labels = learner.pseudo_features(gen())
    assert p.dtype == torch.float64
    assert set(labels.tolist()) == {views * place for place in range(5)}
    for row, i in zip(p, labels.tolist(), strict=True):
        near = (learner.graph[i] > 0).nonzero()[:, 0].tolist()
        assert min(_off_the_way(row, means[i], means[j]) for j in near) < 1e-5
    alone = torch.eye(len(means), dtype=torch.float64)
    learner.memory.values["graph"] = alone
    p, labels = learner.pseudo_features(gen())
    assert torch.equal(p, means[labels])
    learner.memory.values["graph"] = torch.ones_like(alone)
    learner.own = 1.0
    p, labels = learner.pseudo_features(gen())
    assert torch.equal(p, means[labels])


def _off_the_way(p: Tensor, mine: Tensor, other: Tensor) -> float:
    """How far p is from the nearer half of the segment."""
    way = other - mine
    share = ((p - mine) @ way / (way @ way).clamp(min=1e-300)).clamp(0, 0.5)
    return float((p - mine - share * way).norm())


@holds("napa-vq", 6)
def test_pseudo_features_move_vectors_of_new_classes_alone(tiny: Table) -> None:
    learner = begun(NAPAVQ(**FEW), tiny)
    learner.memory.values["graph"] = torch.ones_like(learner.graph)
    means = learner.means.clone()
    learner.model.zero_grad()
    learner.replay(gen()).value.backward()
    assert all(p.grad is None for p in learner.model.encoder.parameters())
    gradient = learner.head.weight.grad
    assert torch.equal(gradient[:5], torch.zeros_like(gradient[:5]))
    assert bool(gradient[5:].any())
    p, _ = learner.pseudo_features(gen())
    before = torch.cdist(p, learner.head.weight.detach().double()[5:, 0]).mean()
    with torch.no_grad():
        learner.head.weight -= 1e-2 * gradient
    assert torch.cdist(p, learner.head.weight.detach().double()[5:, 0]).mean() > before
    assert torch.equal(learner.means, means)


def test_new_classes_have_means_by_the_old_encoder_then_by_the_new_one_and_old_means_stay(tiny: Table) -> None:
    learner, run = NAPAVQ(**FEW, rotate=True), Run()
    first, second = halves(tiny)
    learner.learn(first, run)
    before, old = fork(learner), learner.means.clone()
    learner._prepare(second, run)
    learner.start(second, run)
    assert torch.allclose(learner.means[20:], _means(before, tiny, NEW), atol=1e-6)
    learner = fork(before)
    learner.learn(second, run)
    assert torch.equal(learner.means[:20], old)
    assert torch.allclose(learner.means[20:], _means(learner, tiny, NEW), atol=1e-6)


def _means(learner: NAPAVQ, table: Table, classes: Iterable[int]) -> Tensor:
    """Means of the features of rotated rows, class by class."""
    found = []
    for c in classes:
        for quarters in range(learner.views):
            pixels = table.of_classes([c]).inputs["pixel_values"].rot90(quarters, (2, 3))
            found.append(learner.model(pixel_values=pixels).pooler_output.double().mean(0).detach())
    return torch.stack(found)


# --- the whole


def test_the_loss_of_a_later_task_written_down(tiny: Table) -> None:
    learner = begun(NAPAVQ(**FEW, rotate=True, repulsion=0.7, augmentation=3.0, feature=2.0), tiny)
    task = halves(tiny)[1]
    batch = task.train.batch(torch.arange(0, 30, 3))
    graph, vectors = learner.graph.clone(), learner.head.weight.detach().double().flatten(0, 1)
    value = float(learner.step((batch, gen(5)), task).value.detach())

    turned = [batch.inputs["pixel_values"].rot90(quarters, (2, 3)) for quarters in range(4)]
    phi = learner.model(pixel_values=torch.cat(turned)).pooler_output.detach().double()
    labels = [4 * c + quarters for quarters in range(4) for c in batch.labels.tolist()]  # classes in natural order
    wanted, graph = _terms(phi, labels, vectors, graph)
    cross, apart = wanted
    learner.memory.values["graph"] = graph
    p, which = learner.pseudo_features(gen(5))
    (cross_p, apart_p), _ = _terms(p, which.tolist(), vectors, graph)
    taught = 0.0  # the model has not moved since the teacher was taken
    assert value == pytest.approx(cross + 0.7 * (apart + apart_p) + 3.0 * cross_p + 2.0 * taught, rel=1e-4)

    with torch.no_grad():
        learner.model.encoder.layers[0][0].weight.mul_(1.1)
    learner.memory.values["graph"] = torch.eye(len(graph), dtype=torch.float64)
    learner.repulsion = learner.augmentation = 0.0
    moved = learner.model(pixel_values=torch.cat(turned)).pooler_output.detach().double()
    (cross, _), _ = _terms(moved, labels, vectors, graph)
    value = float(learner.step((batch, gen(5)), task).value.detach())
    assert value == pytest.approx(cross + 2.0 * float((moved - phi).square().sum().sqrt()), rel=1e-4)


def _terms(x: Tensor, labels: list[int], vectors: Tensor, graph: Tensor) -> tuple[tuple[float, float], Tensor]:
    """Cross-entropy and repulsion as loops, and the graph after them."""
    distances = (x[:, None] - vectors).square().sum(2).sqrt()
    graph = slowly(graph, distances, 3)
    cross, apart = 0.0, 0.0
    for d, y in zip(distances.tolist(), labels, strict=True):
        top = max(-value / 0.1 for value in d)
        cross += d[y] / 0.1 + top + math.log(sum(math.exp(-value / 0.1 - top) for value in d))
        near = [j for j in range(len(d)) if j != y and graph[y, j] > 0]
        w = [math.exp(-1e-3 * d[j] ** 2) for j in near]
        apart += max(0.0, d[y] ** 2 - sum(a / sum(w) * d[j] ** 2 for a, j in zip(w, near, strict=True)))
    return (cross / len(labels), apart / len(labels)), graph


def test_each_optimiser_has_its_own_rate_and_clips_its_own_gradient(tiny: Table) -> None:
    a, b = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    plan = Optimizer("sgd", lr=1.0, momentum=0.0, clip=1.0)
    both = Together([(plan, [a]), (Optimizer("sgd", lr=0.5, momentum=0.0), [b])])
    (a @ torch.tensor([3.0, 4.0]) + b @ torch.tensor([30.0, 40.0])).backward()
    both.step()
    assert a.tolist() == pytest.approx([-0.6, -0.8]) and b.tolist() == [-15.0, -20.0]

    learner = begun(NAPAVQ(**{**FEW, "epochs": 10}), tiny)
    learner.optimizers()
    list(learner.batches(halves(tiny)[1], 5, Run()))
    encoder, coding = (part.param_groups[0]["lr"] for part in learner.together.parts)
    assert encoder == pytest.approx(1e-3 * 0.1 * 0.1) and coding == pytest.approx(0.5 * 0.1 * 0.01)


@holds("napa-vq", 7)
def test_distillation_keeps_and_the_whole_beats_coding_vectors_alone_by_a_tenth() -> None:
    final, old = ({name: one[k] for name, one in measured.measure(0).items()} for k in (0, 1))
    assert final["whole"] > final["no distillation"] + 0.1
    assert final["whole"] > final["plain"] + 0.1
    assert old["whole"] > old["no augmentation"]


def test_a_class_that_is_forgotten_leaves_means_and_graph(tiny: Table) -> None:
    learner = NAPAVQ(**FEW)
    first, second = halves(tiny)
    learner.learn(first)
    done = forget(learner, Request.of_classes(first.train, (2,)), Repair(epochs=1))
    assert set(done.residue) == set(first.train.of_classes((2,)).ids)
    learner.model.head.retire([2])  # type: ignore[union-attr, operator]
    learner.refresh()
    assert not learner.means[2].any()
    assert torch.equal(learner.graph[2], torch.eye(5, dtype=torch.float64)[2])
    learner.learn(second)
    assert not learner.old[2] and torch.isneginf(predict(learner.model, tiny)[:, 2]).all()
    assert torch.equal(learner.graph[2], torch.eye(10, dtype=torch.float64)[2])
    learner.learn(Task(first.train.of_classes((2,)), index=2))
    assert learner.means[2].any() and torch.isfinite(predict(learner.model, tiny)[:, 2]).all()


def test_a_class_that_was_announced_without_rows_has_no_pseudo_features(tiny: Table) -> None:
    learner = NAPAVQ(**FEW)
    learner.learn(Task(tiny.of_classes(OLD[:3]), classes=OLD))
    learner.learn(Task(tiny.of_classes(NEW), index=1, classes=NEW))
    assert learner.old.tolist() == [True] * 3 + [False] * 7


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner = NAPAVQ.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(second)
    assert torch.equal(predict(learner.model, tiny), predict(twin.model, tiny))
    assert torch.equal(learner.graph, twin.graph)


def test_rows_without_a_label_are_left_out(tiny: Table) -> None:
    labels = tiny.labels.clone()  # type: ignore[union-attr]
    labels[::2] = -1
    learner = NAPAVQ(**FEW)
    learner.learn(Task(tiny.with_labels(labels)))
    assert learner.holds(tiny.ids) == tiny.ids[1::2]


def test_what_does_not_go_is_said_in_a_sentence(tiny: Table) -> None:
    for wrong in ({"neighbours": 0}, {"pseudo": 0}, {"own": 1.5}, {"temperature": 0.0}):
        with pytest.raises(EngramError, match=r"ha(ve|s) to be"):
            NAPAVQ(**wrong)  # type: ignore[arg-type]
    plain = Table({"values": torch.eye(3)}, torch.tensor([0, 1, 1]))
    with pytest.raises(EngramError, match="square images"):
        NAPAVQ(**FEW, rotate=True).learn(Task(plain))
    with pytest.raises(EngramError, match="no class labels"):
        NAPAVQ(**FEW).learn(Task(Table({"values": torch.eye(3)}, torch.ones(3, 1))))
    with seeded(gen()):
        numbers, other = Predictor(Identity(3), ValueHead(3, 2)), Predictor(Identity(3), LinearHead(3, [0]))
    with pytest.raises(EngramError, match="class head"):
        NAPAVQ(**{**FEW, "network": numbers}).learn(Task(plain))
    learner = NAPAVQ(**FEW)
    learner.model = other
    with pytest.raises(EngramError, match="goes on from a model with its coding vectors"):
        learner.learn(Task(plain))


def test_features_that_cannot_learn_still_get_coding_vectors(tiny: Table) -> None:
    learner, task = NAPAVQ(network="Identity", epochs=60, batch_size=8, neighbours=3), halves(tiny)[0]
    learner.learn(task)
    assert accuracy(learner.model, task.train) > 0.7
