"""Fast and slow weights: each step moves its own, limits are plain methods, and new classes stay learnable."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.erasure import forget
from engram.core.learner import fork
from engram.core.request import Request
from engram.core.settings import settings
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.forget.finetune import Finetune
from engram.keep.fast_slow import FastSlow, divided, normalised
from engram.reproduce.few_shot_cl_brain import Laboratory, brief, world
from engram.stats.seeds import generator
from engram.testing import fingerprint, holds

BASE, FIRST, SECOND = (0, 1, 2, 3), (4, 5, 6), (7, 8, 9)
SMALL: dict[str, Any] = {"network": {"name": "MLP", "hidden": [32]}, "epochs": 4, "base_episodes": 10}
PLAIN: dict[str, Any] = {"strength": 0.0, "tie": 0.0, "eta": 0.0}
FREE: dict[str, Any] = {"halvings": None, "slow_episodes": 0}


def few(digits: Any, classes: tuple[int, ...], shots: int = 5) -> Table:
    rows = [digits.train.of_classes([c]).take(range(shots)) for c in classes]
    return rows[0].concat(*rows[1:])


@pytest.fixture(scope="module")
def base(digits: Any) -> FastSlow:
    """It knows the base."""
    learner = FastSlow(**SMALL)
    learner.learn(Task(digits.train.of_classes(BASE).take(range(160))), Run())
    return learner


@pytest.fixture(scope="module")
def begun(base: FastSlow, digits: Any) -> FastSlow:
    """It knows a task of five shots besides."""
    return taught(base, few(digits, FIRST))


def varied(learner: FastSlow, **changes: Any) -> FastSlow:
    twin = FastSlow(**{**settings(learner), **changes})
    twin.load_state_dict(learner.state_dict())
    return twin


def taught(learner: FastSlow, rows: Table, run: Run | None = None, **changes: Any) -> FastSlow:
    twin = varied(learner, **changes)
    twin.learn(Task(rows), run or Run())
    return twin


def body(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("encoder.")}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# --- two states


@holds("few-shot-cl-brain", 1)
def test_each_step_moves_its_own_weights_alone(begun: FastSlow, digits: Any, monkeypatch: Any) -> None:
    seen: list[tuple[str, str, str]] = []
    steps = FastSlow._consolidate_slow

    def watched(self: FastSlow, *given: Any) -> None:
        seen.append(("between", fingerprint(body(self.slow_model)), fingerprint(self.model.state_dict())))
        steps(self, *given)

    monkeypatch.setattr(FastSlow, "_consolidate_slow", watched)
    start = fingerprint(body(begun.slow_model)), fingerprint(begun.model.state_dict())
    end = taught(begun, few(digits, SECOND), rho=0.2)
    ((_, slow, fast),) = seen
    assert slow == start[0] and fast != start[1]
    assert fingerprint(end.model.state_dict()) == fast and fingerprint(body(end.slow_model)) != slow


def test_both_kinds_start_as_one(base: FastSlow) -> None:
    assert fingerprint(base.model.state_dict()) == fingerprint(base.slow_model.state_dict())
    assert base.importances.values == {} and base.moved == {} and base.spread > 0


def test_fast_weights_start_from_the_slow_ones_and_their_offset(begun: FastSlow, digits: Any) -> None:
    """theta_s + (theta_f - theta_s as it was before the slow episodes), with a stiffness of 0."""
    base = varied(begun, eta=0.0)
    fast, slow = body(base.model), body(base.slow_model)
    assert base.moved and any(bool(by.any()) for by in base.moved.values())
    start = taught(base, few(digits, SECOND), epochs=0, eta=0.0)
    for name, p in body(start.model).items():
        offset = fast[name] - (slow[name] - base.moved[name])
        torch.testing.assert_close(p, slow[name] + offset, rtol=1e-5, atol=1e-7)
    stiff = taught(begun, few(digits, SECOND), epochs=0, eta=1.0)
    for name, p in body(stiff.model).items():
        by = begun.moved[name] / (1 + begun.importances.values[name])
        torch.testing.assert_close(p, (fast[name] + by).float(), rtol=1e-5, atol=1e-7)


# --- limits


@holds("few-shot-cl-brain", 2)
def test_without_rho_and_episodes_slow_weights_never_change(begun: FastSlow, digits: Any) -> None:
    end = taught(begun, few(digits, SECOND), rho=0.0, slow_episodes=0)
    assert equal(body(end.slow_model), body(begun.slow_model))
    support, asked = few(digits, SECOND, 3), digits.test.of_classes(SECOND)
    logits = [predict(one.few_shot(support), asked) for one in (begun, end)]
    assert torch.equal(*logits)


@holds("few-shot-cl-brain", 2)
def test_with_rho_one_and_no_episodes_slow_weights_are_the_fast_ones(begun: FastSlow, digits: Any) -> None:
    end = taught(begun, few(digits, SECOND), rho=1.0, eta=0.0, **FREE)
    assert equal(body(end.slow_model), body(end.model)) and not equal(body(end.model), body(begun.model))


@holds("few-shot-cl-brain", 2)
@pytest.mark.parametrize("plan", [Optimizer(lr=1e-3), Optimizer("sgd", lr=0.05)])
def test_without_what_holds_step_one_is_plain_fine_tuning(
    begun: FastSlow, digits: Any, plan: Optimizer, monkeypatch: Any
) -> None:
    """Step for step: a loop by hand over the encoder and the rows of the new classes, from the same start."""
    rows, run = few(digits, SECOND), Run()
    calm = varied(begun, **PLAIN, optimizer=plan, batch_size=4, slow_episodes=0, rho=0.0)
    calm.moved = {}
    start = copy.deepcopy(calm.model)
    found: list[dict[str, Tensor]] = []
    after = FastSlow.after_step

    def watched(self: FastSlow, step: int) -> None:
        after(self, step)
        found.append({n: p.detach().clone() for n, p in self.model.named_parameters()})

    monkeypatch.setattr(FastSlow, "after_step", watched)
    orders: list[Any] = []
    batches = FastSlow.batches
    monkeypatch.setattr(FastSlow, "batches", lambda s, t, e, r: orders.append(list(batches(s, t, e, r))) or orders[-1])
    calm.learn(Task(rows), run)
    _finetuned_like(start, rows, orders, plan, found)


def _finetuned_like(model: Any, rows: Table, orders: Any, plan: Optimizer, found: list[dict[str, Tensor]]) -> None:
    """Compare with rows of new classes as prototypes, then every update by torch's optimiser."""
    u = F.normalize(predict(model, rows, "pooler_output").double(), dim=1)
    new = F.normalize(torch.stack([u[rows.labels == c].mean(0) for c in SECOND]), dim=1).float()
    fixed, own = model.head.weight.detach().clone(), nn.Parameter(new)
    classes = model.head.classes.tolist() + list(SECOND)
    optimizer = plan.build([*model.encoder.parameters(), own])
    place = {c: k for k, c in enumerate(classes)}
    for k, batch in enumerate([one for epoch in orders for one in epoch]):
        weights = F.normalize(torch.cat([fixed, own]), dim=1)
        logits = 16.0 * F.normalize(model.features(**batch.inputs), dim=1) @ weights.T
        loss = F.cross_entropy(logits, torch.tensor([place[c] for c in batch.labels.tolist()]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, p in model.encoder.named_parameters():
            torch.testing.assert_close(found[k][f"encoder.{name}"], p.detach(), rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(found[k]["head.weight"], torch.cat([fixed, own]).detach(), rtol=1e-4, atol=2e-6)
    assert len(found) == k + 1 > 10


# --- per-weight steps


@holds("few-shot-cl-brain", 6)
@pytest.mark.parametrize("plan", [Optimizer(lr=1e-3), Optimizer("sgd", lr=0.05), Optimizer("adamw", weight_decay=0.1)])
def test_a_larger_importance_never_makes_the_first_step_larger(begun: FastSlow, digits: Any, plan: Optimizer) -> None:
    rows, moves = few(digits, SECOND), []
    omega = begun.importances.values
    for factor in (1.0, 2.0, 4.0):
        learner = varied(begun, optimizer=plan, epochs=1, batch_size=64, tie=0.1, eta=3.0)
        learner.moved = {}
        learner.importances.values = {name: factor * value for name, value in omega.items()}
        start = body(learner.model)
        learner.learn(Task(rows), Run())
        moves.append({n: (p.double() - start[n]).abs() for n, p in body(learner.model).items()})
    for small, large in zip(moves[1:], moves, strict=False):
        assert all(bool((small[n] <= large[n] + 1e-8).all()) for n in small)
    ratio = torch.cat([(moves[1][n] / moves[0][n])[moves[0][n] > 1e-4] for n in omega])
    wanted = torch.cat([((1 + 3 * omega[n]) / (1 + 6 * omega[n]))[moves[0][n] > 1e-4] for n in omega])
    assert len(ratio) > 50 and torch.allclose(ratio, wanted, rtol=0.01)


def test_slow_weights_move_by_rho_over_one_plus_eta_omega(begun: FastSlow, digits: Any) -> None:
    end = taught(begun, few(digits, SECOND), rho=0.2, eta=2.0, **FREE)
    before, fast = body(begun.slow_model), body(end.model)
    for name, p in body(end.slow_model).items():
        weight = 0.2 / (1 + 2 * end.importances.values[name])
        wanted = before[name] + weight * (fast[name] - before[name])
        torch.testing.assert_close(p.double(), wanted, rtol=1e-5, atol=1e-7)


def test_importances_are_cut_off_scaled_and_kept_above_a_floor() -> None:
    found = {"encoder.a": torch.tensor([0.0, 1.0, 2.0, 3.0]).double(), "encoder.b": torch.tensor([4.0, 100.0]).double()}
    scaled = normalised({**found, "head.weight": torch.tensor([1e6]).double()}, 5 / 6, 0.05)
    assert scaled["encoder.a"].tolist() == [0.05, 0.25, 0.5, 0.75] and scaled["encoder.b"].tolist() == [1.0, 1.0]
    assert list(scaled) == ["encoder.a", "encoder.b"] and normalised({}, 0.9, 0.01) == {}
    silent = normalised({"encoder.a": torch.zeros(3).double()}, 0.9, 0.01)
    assert silent["encoder.a"].tolist() == [0.01] * 3


def test_the_loss_of_step_one(begun: FastSlow, digits: Any) -> None:
    """Cross-entropy + strength · sum of Omega (theta_f - start)² + tie · ||theta_f - theta_s||²."""
    rows = few(digits, SECOND)
    learner = taught(begun, rows, epochs=0, tie=0.3, strength=7.0, slow_episodes=0, rho=0.0)
    learner._prepare(Task(rows, classes=SECOND), Run())
    learner.start(Task(rows, classes=SECOND), Run())
    start, slow, draws = body(learner.model), body(learner.slow_model), generator("moves")
    with torch.no_grad():
        for name, p in learner.model.named_parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=draws) * name.startswith("encoder."))
    batch = rows.batch(torch.arange(len(rows)))
    output = learner.model(**batch.inputs)
    wanted = F.cross_entropy(output.logits.detach(), batch.labels).double()  # type: ignore[arg-type]
    for name, p in body(learner.model).items():
        wanted += 7.0 * (learner.importances.values[name] * (p - start[name]).square()).sum()
        wanted += 0.3 * (p - slow[name]).square().sum()
    assert float(learner.terms(batch, output).value.detach()) == pytest.approx(float(wanted), rel=1e-5)


# --- slow episodes


def test_the_loss_of_an_episode(begun: FastSlow, digits: Any) -> None:
    """Against a slow formulation, row by row, with the noise of old prototypes switched off."""
    learner = varied(begun, distillation=0.7)
    learner.spread = 0.0
    rows = few(digits, (7, 8), 4)
    order = [0, 1, 4, 5, 2, 3, 6, 7]
    batch = rows.with_labels(rows.labels - 7).take(order).batch(torch.arange(8))  # type: ignore[operator]
    others = F.normalize(torch.randn(3, 32, generator=generator("others")), dim=1)
    model = learner.slow_model
    found = learner.episode_loss(
        model, batch, begun_elsewhere := copy.deepcopy(begun.slow_model), others, Run().generator()
    )
    with torch.no_grad():
        next(iter(begun_elsewhere.parameters())).add_(0.1)
        u = F.normalize(model.features(**batch.inputs), dim=1)
        v = F.normalize(begun_elsewhere.features(**batch.inputs), dim=1)
    moved = learner.episode_loss(model, batch, begun_elsewhere, others, Run().generator())
    prototypes = [*(F.normalize(u[k : k + 2].mean(0), dim=0) for k in (0, 2)), *others]
    asked = [*u[4:], *others]
    told = [0, 0, 1, 1, 2, 3, 4]
    each = [
        -torch.log_softmax(torch.stack([-8.0 * (x - p).square().sum() for p in prototypes]), 0)[c]
        for x, c in zip(asked, told, strict=True)
    ]
    plain = float(torch.stack(each).mean())
    assert float(found.value.detach()) == pytest.approx(plain, rel=1e-4)
    drift = float((u - v).square().sum(1).mean())
    assert drift > 1e-4 and float(moved.value.detach()) == pytest.approx(plain + 0.7 * drift, rel=1e-4)


@pytest.mark.parametrize("halvings", [0, 2])
def test_rho_is_halved_and_in_the_end_slow_weights_are_as_before(
    begun: FastSlow, digits: Any, halvings: int, monkeypatch: Any
) -> None:
    tried: list[float] = []
    whole, losses = FastSlow.interpolate, iter([1.0, *[2.0] * 9])
    monkeypatch.setattr(FastSlow, "_loss", lambda *given: next(losses))
    monkeypatch.setattr(FastSlow, "interpolate", lambda s, b, rho: (tried.append(rho), whole(s, b, rho))[1])
    end = taught(begun, few(digits, SECOND), rho=0.2, halvings=halvings)
    assert tried == [*[0.2, 0.1, 0.05][: halvings + 1], 0.0]
    assert equal(body(end.slow_model), body(begun.slow_model)) and end.moved == {}


def test_what_is_told_no_worse_is_taken_at_once(begun: FastSlow, digits: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(FastSlow, "_loss", lambda *given: 1.0)
    end = taught(begun, few(digits, SECOND), rho=0.2)
    free = taught(begun, few(digits, SECOND), rho=0.2, halvings=None)
    assert not equal(body(end.slow_model), body(begun.slow_model))
    assert not equal(body(end.slow_model), body(free.slow_model))  # no row is set apart


def test_rows_set_apart(digits: Any) -> None:
    table = few(digits, (0, 1), 5).concat(few(digits, (2,), 2), few(digits, (3,), 1))
    rows, apart = divided(table, Run())
    assert apart.labels.tolist() == [0, 1] and set(rows.ids) | set(apart.ids) == set(table.ids)  # type: ignore[union-attr]
    assert not set(rows.ids) & set(apart.ids)
    single = few(digits, (0, 1), 1)
    assert divided(single, Run()) == (single, single)


# --- prototypes


def test_prototypes_of_new_classes_alone_are_refreshed(begun: FastSlow, digits: Any) -> None:
    rows = few(digits, SECOND)
    end = taught(begun, rows)
    for new, old in ((end.model, begun.model), (end.slow_model, begun.slow_model)):
        u = F.normalize(predict(new, rows, "pooler_output").double(), dim=1)
        for c in SECOND:
            wanted = F.normalize(u[rows.labels == c].mean(0), dim=0).float()
            torch.testing.assert_close(new.head.weight[new.head.columns([c])][0].detach(), wanted)  # type: ignore[union-attr,operator,index]
        kept = old.head.classes.tolist()  # type: ignore[union-attr,operator]
        at = [m.head.weight[m.head.columns(kept)] for m in (new, old)]  # type: ignore[union-attr,operator,index]
        assert kept == [*BASE, *FIRST] and torch.equal(*at)


def test_few_shot_predicts_by_the_slow_weights(begun: FastSlow, digits: Any) -> None:
    support, asked = few(digits, SECOND), digits.test.of_classes(SECOND)
    before = fingerprint(begun.state_dict())
    logits = predict(begun.few_shot(support), asked)
    assert fingerprint(begun.state_dict()) == before
    assert logits.isfinite()[:, list(SECOND)].all() and not logits.isfinite()[:, : SECOND[0]].any()
    u, v = (F.normalize(predict(begun.slow_model, t, "pooler_output").double(), dim=1) for t in (support, asked))
    means = torch.stack([u[support.labels == c].mean(0) for c in SECOND])
    near = F.cosine_similarity(v[:, None], means[None], dim=2).argmax(1) + SECOND[0]
    assert float((logits.argmax(1) == near).double().mean()) > 0.99
    assert accuracy(begun.few_shot(support), asked) > 0.6


def test_batch_statistics_are_those_of_the_first_task(digits: Any) -> None:
    learner = FastSlow(**{**SMALL, "network": {"name": "ConvNet", "widths": [8, 16], "norm": "batch"}, "epochs": 2})
    learner.learn(Task(few(digits, BASE, 20)), Run())
    wanted = fingerprint(dict(learner.model.encoder.named_buffers()))  # type: ignore[union-attr,operator]
    learner.learn(Task(few(digits, FIRST)), Run())
    for model in (learner.model, learner.slow_model):
        assert fingerprint(dict(model.encoder.named_buffers())) == wanted  # type: ignore[union-attr,operator]


# --- what it takes, and what it gives back


def test_single_rows_are_learnt(base: FastSlow, digits: Any) -> None:
    end = taught(base, few(digits, FIRST, 1))
    assert accuracy(end.model, few(digits, FIRST, 1), classes=FIRST) == 1


def test_dropped_rows_leave_the_slow_weights(begun: FastSlow, digits: Any) -> None:
    twin: Any = fork(begun)
    rows = few(digits, FIRST)
    forget(twin, Request.of_classes(rows, (4,)).but(retain=few(digits, BASE)), Finetune(epochs=1))
    assert fingerprint(body(twin.slow_model)) == fingerprint(body(twin.model)) and twin.moved == {}
    twin.model.head.retire([5])
    twin.refresh()
    assert not bool(twin.slow_model.head.live[5]) and bool(begun.slow_model.head.live[5])  # type: ignore[union-attr,index]
    twin.learn(Task(few(digits, SECOND)), Run())
    assert accuracy(twin.model, digits.test.of_classes(SECOND), classes=SECOND) > 0.6


def test_an_interrupted_training_goes_on_where_it_was(
    base: FastSlow, digits: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    """The process dies in the last epoch of step 1, then in step 2; new ones end with equal bits."""
    monkeypatch.setattr("engram.engine.fit.CHECKPOINT_EVERY", 0.0)
    monkeypatch.setattr("engram.engine.fit.WORTH_KEEPING", 0.0)
    rows = few(digits, FIRST)
    calm = taught(base, rows)
    whole = FastSlow.batches
    for name, dies in (
        ("batches", lambda s, t, e, r: whole(s, t, e, r) if e < 3 else 1 / 0),
        ("_episodes", lambda *given: 1 / 0),
    ):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(FastSlow, name, dies)
            taught(base, rows, Run(tmp_path / "run"))
    resumed = taught(base, rows, Run(tmp_path / "run"))
    assert fingerprint(calm.state_dict()) == fingerprint(resumed.state_dict())


def test_what_it_cannot_learn_from(digits: Any) -> None:
    with pytest.raises(EngramError, match="no class labels"):
        FastSlow.tiny().learn(Task(digits.train.with_labels(torch.ones(len(digits.train), 1))), Run())
    with pytest.raises(EngramError, match="FastSlow wants an encoder with a class head"):
        FastSlow(network=nn.ReLU()).learn(Task(digits.train), Run())
    with pytest.raises(EngramError, match="no slow weights yet"):
        FastSlow().few_shot(digits.train)


# --- a stream of numbers


@pytest.fixture(scope="module")
def labs() -> list[Laboratory]:
    """Five seeds, other than those of the claims."""
    return [brief(seed) for seed in range(10, 15)]


@holds("few-shot-cl-brain", 3)
def test_fine_tuning_harms_new_classes_and_slow_weights_are_not_harmed() -> None:
    """Ten tasks of five classes with five rows each."""
    lab = Laboratory(world(10), 10, epochs=10, base_episodes=30)
    fine, slow = (lab.change(name) for name in ("fine-tuning", "both steps"))
    assert fine <= -0.03 and slow >= -0.01 and slow - fine >= 0.03


@holds("few-shot-cl-brain", 4, 5)
def test_each_step_does_its_part(labs: list[Laboratory]) -> None:
    seen = {n: sum(x.seen(n) for x in labs) / 5 for n in ("both steps", "step 1 alone", "fine-tuning")}
    novel = {n: sum(x.novel(n) for x in labs) / 5 for n in ("both steps", "step 2 alone")}
    assert all(x.seen("both steps") >= x.seen("fine-tuning") + 0.1 for x in labs)
    assert seen["both steps"] >= seen["step 1 alone"] - 0.01 and seen["step 1 alone"] >= seen["fine-tuning"] - 0.01
    assert novel["both steps"] >= novel["step 2 alone"] - 0.01
