"""BT²: orthogonal bases, the identity of inner products, room for two geometries, gradients, and the toy on digits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.keep.halves import NEW, begun, halves, learnt
from torch import Tensor, nn

from engram.core.erasure import forget
from engram.core.request import Request
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.fit import fit
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.predict import features, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.forget.retrain import Retrain
from engram.keep.bct import BCT, SMALL
from engram.keep.bt2 import BT2, Upgrade, away
from engram.models import seeded
from engram.models.compatible import BasisTransform, Rotation
from engram.models.encoders import Identity
from engram.models.heads import LinearHead
from engram.reproduce.bt2 import DIGITS, World
from engram.testing import holds

SETTINGS: dict[str, Any] = {
    "network": SMALL, "dim": 8, "extra": 2, "epochs": 3, "batch_size": 32, "optimizer": Optimizer(lr=1e-2),
}  # fmt: skip


def drawn(seed: int, own: int = 6, old: int = 5, extra: int = 2, scale: float = 2.0, width: int = 9) -> Upgrade:
    """An upgrade with random weights, rotations included."""
    with seeded(torch.Generator().manual_seed(seed)), torch.no_grad():
        made = Upgrade(BasisTransform(Identity(width), own, old, extra, scale), LinearHead(own, range(3), bias=False))
        for rotation in (made.first, made.second):
            rotation.lower.normal_()
    return made


def rows(seed: int, n: int = 20, width: int = 9) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def off(matrix: Tensor) -> float:
    """How far from orthogonal."""
    return float((matrix.T @ matrix - torch.eye(len(matrix)).to(matrix)).abs().max().detach())


@holds("bt2", 1)
def test_rotations_are_orthogonal_at_the_start_and_after_a_hundred_steps() -> None:
    made = drawn(0, own=24, old=20, extra=6)
    starts = [rotation().detach().clone() for rotation in (made.first, made.second)]
    aim = F.normalize(rows(1, 64, 20), dim=1)
    adam = torch.optim.Adam(made.parameters(), lr=1e-2)
    for _ in range(100):
        adam.zero_grad()
        away(made(values=rows(2, 64)).extra["old"], aim).value.backward()
        adam.step()
    for rotation, start in zip((made.first, made.second), starts, strict=True):
        assert off(start) < 1e-10 and off(rotation()) < 1e-10
        assert off(rotation().float()) < 1e-5
        assert (rotation() - start).abs().max() > 0.1
    assert off(made.finished().encoder.basis) < 1e-5  # type: ignore[union-attr,arg-type]


def test_a_rotation_starts_uniform_and_is_cayleys_form() -> None:
    with seeded(torch.Generator().manual_seed(0)):
        rotation = Rotation(4)
        signs = [torch.linalg.det(Rotation(3).base).sign().item() for _ in range(20)]
    assert torch.equal(rotation(), rotation.base) and set(signs) == {1.0, -1.0}
    with torch.no_grad():
        rotation.lower.copy_(rows(3, 4, 4))
    lower = rotation.lower.double().tril(-1)
    s, one = lower - lower.T, torch.eye(4).double()
    expected = (one + s / 2) @ torch.linalg.inv(one - s / 2) @ rotation.base
    assert torch.allclose(rotation(), expected, atol=1e-12)


@holds("bt2", 2)
@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6), extra=st.integers(0, 5), own=st.integers(5, 9), scale=st.sampled_from([0.5, 1.0, 2.0])
)
def test_no_basis_loses_anything(seed: int, extra: int, own: int, scale: float) -> None:
    made = drawn(seed, own=own, old=5, extra=extra, scale=scale).double()
    x = rows(seed + 1).double()
    v, u = made.encoder.parts(values=x)
    phi = made(values=x).pooler_output
    assert phi.shape == (20, extra + own)
    assert torch.allclose(phi @ phi.T, v @ v.T + scale**2 * (u @ u.T), atol=1e-12)
    assert torch.allclose(phi @ made.encoder.recovered(made.basis()), u, atol=1e-12)
    assert torch.allclose(phi.norm(dim=1), torch.full((20,), (scale**2 + (extra > 0)) ** 0.5).double())


@holds("bt2", 2)
def test_lengths_are_those_of_the_paper_and_the_finished_model_is_the_trained_one() -> None:
    made = drawn(5, own=128, old=128, extra=32, width=40)
    x = rows(6, 10, 40)
    trained = made(values=x)
    assert torch.allclose(trained.pooler_output.norm(dim=1), torch.full((10,), 5**0.5), atol=1e-5)
    v, u = made.encoder.parts(values=x)
    found = trained.pooler_output @ trained.pooler_output.T
    assert torch.allclose(found, v @ v.T + 4 * u @ u.T, atol=1e-5)
    model = made.finished()
    served = model(values=x)
    assert torch.allclose(served.pooler_output, trained.pooler_output, atol=1e-5)
    assert torch.allclose(served.logits, trained.logits, atol=1e-5)
    assert not model.encoder.basis.requires_grad  # type: ignore[union-attr]


def test_the_embedding_is_the_one_written_down() -> None:
    made = drawn(7, own=6, old=5, extra=2, scale=2.0)
    x = rows(8, 4)
    with torch.no_grad():
        P, Q = made.first().float(), made.second().float()
        found = made(values=x)
        for row in range(4):
            h = made.encoder.layer.weight @ x[row] + made.encoder.layer.bias
            u = h[:6] / h[:6].norm()
            between = made.encoder.bridge.weight @ h.clamp(min=0) + made.encoder.bridge.bias
            v = between[:2] / between[:2].norm()
            e = torch.cat([v, P @ (2.0 * u)])
            w = Q @ e[:5]
            assert torch.allclose(found.extra["own"][row], u, atol=1e-6)
            assert torch.allclose(found.extra["old"][row], w, atol=1e-6)
            assert torch.allclose(found.pooler_output[row], torch.cat([w, e[5:]]), atol=1e-6)
            assert torch.allclose(found.logits[row], made.head.weight @ u, atol=1e-6)


@pytest.fixture
def free() -> tuple[Tensor, Tensor]:
    """Two geometries of 60 rows that have nothing in common: old [60, 6] and new [60, 8], at unit length."""
    return F.normalize(rows(11, 60, 6), dim=1), F.normalize(rows(12, 60, 8), dim=1)


def left(free: tuple[Tensor, Tensor], extra: int, steps: int = 150) -> float:
    """1 - cos(w, phi_o), when u is phi'_n whatever happens, and v and the rotations are what can be learnt."""
    old, new = free
    with seeded(torch.Generator().manual_seed(0)):
        made = Upgrade(BasisTransform(Identity(1), 8, 6, extra), LinearHead(8, range(2), bias=False))
        v = nn.Parameter(torch.randn(60, extra))
    adam = torch.optim.Adam([v, *made.first.parameters(), *made.second.parameters()], lr=0.05)
    for _ in range(steps):
        adam.zero_grad()
        phi = made.encoder.turned(F.normalize(v, dim=1), new, made.basis().float())
        loss = away(phi[:, :6], old).value
        loss.backward()
        adam.step()
    return loss.item()


@holds("bt2", 3)
def test_without_extra_numbers_the_geometries_have_to_coincide_and_each_makes_room(free: tuple[Tensor, Tensor]) -> None:
    losses = [left(free, extra) for extra in (0, 2, 4, 6)]
    assert losses[0] > 0.3  # no rotation of u is phi_o
    assert all(less < more - 0.02 for more, less in pairwise(losses))
    assert losses[-1] < 0.01


@holds("bt2", 3)
def test_with_as_many_extra_numbers_as_the_old_space_has_it_is_held_exactly(free: tuple[Tensor, Tensor]) -> None:
    old, new = free
    made = drawn(13, own=8, old=6, extra=6)
    Q = made.second().float()
    phi = made.encoder.turned(old @ Q, new, made.basis().float())  # v = Qᵀ phi_o
    assert torch.allclose(phi[:, :6], old, atol=1e-5)
    assert torch.allclose(phi @ made.encoder.recovered(made.basis()).float(), new, atol=1e-5)
    nothing = drawn(13, own=8, old=6, extra=0)
    P, Q = nothing.first().float(), nothing.second().float()
    turned = nothing.encoder.turned(torch.zeros(60, 0), new, nothing.basis().float())
    expected = 2 * new @ P.T
    assert torch.allclose(turned, torch.cat([expected[:, :6] @ Q.T, expected[:, 6:]], 1), atol=1e-5)


@holds("bt2", 5)
def test_the_loss_written_down_and_what_takes_no_gradient(tiny: Table) -> None:
    learner = begun(BT2(**SETTINGS, own=1.5, pseudo=7.0, match=3.0), tiny)
    batch = tiny.of_classes(NEW).batch(torch.arange(20))
    output = learner.model(**batch.inputs)
    learner.terms(batch, output).value.backward()
    frozen = [learner.classifier.weight, learner.recorded.values, learner.aims.values]
    assert not any(part.requires_grad or part.grad is not None for part in frozen)
    trained = dict(learner.model.named_parameters())
    for name in (
        "encoder.inner.layers.0.0.weight",
        "encoder.bridge.weight",
        "head.weight",
        "first.lower",
        "second.lower",
    ):
        assert trained[name].grad.abs().max() > 0
    names = {id(p) for p in learner.model.parameters()}
    assert not names & {id(part) for part in frozen}

    u, w, total = output.extra["own"].detach(), output.extra["old"].detach(), 0.0
    head = learner.model.head.weight.detach()
    for row, label in enumerate(batch.labels.tolist()):  # type: ignore[union-attr]
        at, aim, old = NEW.index(label), learner.aims.values[row], learner.recorded.values[row]
        total -= float((head @ u[row]).log_softmax(0)[at])
        total += 1.5 * (1 - float(u[row] @ aim))
        total -= 7.0 * float((learner.classifier.weight @ (w[row] / w[row].norm())).log_softmax(0)[at])
        total += 3.0 * (1 - float(w[row] / w[row].norm() @ old))
    assert learner.terms(batch, output).value.item() == pytest.approx(total / 20, rel=1e-5)


def test_an_independent_model_that_is_given_is_the_aim(tiny: Table) -> None:
    first, second = halves(tiny)
    better = BCT(network={"name": "MLP", "hidden": [20]}, dim=11, epochs=1, batch_size=32)
    better.learn(second)
    learner = BT2(**SETTINGS, independent=better.model)
    learner.learn(first)
    learner._prepare(second, Run())
    assert torch.allclose(learner.aims.values, features(better.model, second.train), atol=1e-6)  # type: ignore[union-attr]
    assert learner.model.encoder.own == 11 and learner.model.encoder.width == 13  # type: ignore[union-attr]


@pytest.mark.parametrize(("dim", "extra", "says"), [(4, 2, "no room"), (16, 9, "extra is 0 to 8")])
def test_spaces_that_do_not_fit_are_refused(tiny: Table, dim: int, extra: int, says: str) -> None:
    first, second = halves(tiny)
    old = BCT(**{**SETTINGS, "extra": 0})
    old.learn(first)
    learner = BT2(**{**SETTINGS, "dim": dim, "extra": extra}, old=old.model)
    with pytest.raises(EngramError, match=says):
        learner.learn(second)


def test_what_was_forgotten_before_an_upgrade_is_not_in_what_it_imitates(tiny: Table) -> None:
    """The old space is that of the model as it is now, not as the last task left it."""
    learner = BT2(**SETTINGS)
    first, second = halves(tiny)
    learner.learn(first)
    original = features(learner.model, second.train)
    forget(learner, Request.of_classes(first.train, (2,)), Blunted())
    learner._prepare(second, Run())
    assert learner.recorded is not None
    assert not torch.allclose(learner.recorded.values, original, atol=1e-3)


class Blunted(Retrain):
    """Stands for any forgetter that changes an encoder."""

    @property
    def needs(self) -> Any:
        return (frozenset(),)

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        import copy

        new = copy.deepcopy(model)
        with torch.no_grad():
            new.encoder.layer.weight[:, :4] = 0  # type: ignore[union-attr,operator,index]
        return new


def test_the_finished_model_can_be_fine_tuned_and_keeps_its_inner_products(tiny: Table) -> None:
    model = learnt(BT2(**SETTINGS), tiny).model

    def step(batch: Any) -> Mean:
        return Mean.of(model(**batch.inputs, labels=batch.labels).loss)

    rows = tiny.of_classes(NEW)
    basis = model.encoder.basis.clone()
    fit(
        step,
        lambda epoch: rows.batches(16, seed=0, epoch=epoch),
        model=model,
        optimizer=Optimizer(),
        epochs=2,
        run=Run(),
    )
    assert torch.equal(model.encoder.basis, basis)
    assert torch.allclose(features(model, tiny).norm(dim=1), torch.full((len(tiny),), 5**0.5), atol=1e-5)
    assert torch.isfinite(predict(model, rows)[:, list(NEW)]).all()


# --- the toy


@pytest.fixture(scope="module")
def world(split: tuple[Table, Table]) -> World:
    return World.of(split, DIGITS, Run(seed=0))


@holds("bt2", 4)
def test_on_digits_it_searches_the_old_gallery_and_is_as_good_as_the_independent_model(world: World) -> None:
    old, alone = world.vectors(world.old), world.vectors(world.alone)
    new = world.vectors(world.upgraded(world.bt2()))
    bct = world.vectors(world.upgraded(world.bct()))
    assert old.shape[1] == 16 and new.shape[1] == 20
    assert world.precision(new, old) >= world.precision(old, old)
    assert world.precision(new, new) >= world.precision(alone, alone) - 0.03
    assert world.precision(bct, bct) < world.precision(new, new)


@holds("bt2", 4)
def test_an_independent_models_queries_find_no_more_than_if_they_were_turned_at_random(
    world: World, split: tuple[Table, Table]
) -> None:
    """Chance in the old gallery is not the share of a class: vectors of a class lie together in both spaces, so that
    queries under a random orthogonal map have it by the luck of the direction (0.16, with a deviation of 0.05)."""
    found, chance = [], []
    for one in (world, *(World.of(split, DIGITS, Run(seed=seed)) for seed in (1, 2))):
        old, alone = one.vectors(one.old), one.vectors(one.alone)
        maps = [torch.linalg.qr(rows(k, 16, 16).double())[0] for k in range(20)]
        chance.append(torch.tensor([one.precision(alone @ turn, old) for turn in maps]))
        found.append(one.precision(alone, old))
        assert found[-1] < chance[-1].max() < 0.6 * one.precision(old, old)
    assert sum(found) / 3 == pytest.approx(float(torch.cat(chance).mean()), abs=0.05)


def test_the_newest_of_a_chain_of_kinds_searches_the_oldest_gallery(world: World) -> None:
    few = Task(world.train.take(range(400)))
    kinds = ({"name": "ConvNet", "widths": [8, 16]}, {"name": "ViT", "patch_size": 4, "width": 24, "depth": 1})
    first = {"name": "MLP", "hidden": [64]}
    changes = {"epochs": 6, "batch_size": 32, "optimizer": Optimizer(lr=5e-3)}
    learner = BT2(network=first, upgrades=kinds, extra=4, **{**DIGITS.common, **changes}, own=5.0)
    found = []
    for _ in range(3):
        learner.learn(few, world.run)
        found.append((type(learner.model.encoder.inner).__name__, world.vectors(learner.model)))
    assert [(name, vectors.shape[1]) for name, vectors in found] == [("MLP", 16), ("ConvNet", 20), ("ViT", 20)]
    stranger = world.precision(world.vectors(world.alone), found[0][1])
    assert world.precision(found[2][1], found[0][1]) > stranger + 0.2
    assert world.precision(found[2][1], found[1][1]) > stranger + 0.2
