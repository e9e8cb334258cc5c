"""Bad teacher: its loss row by row, its fixpoints, its ignorant teacher, and what it does on digits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.forget.digit_three import RECIPE, Split, scores
from torch import Tensor, nn

from engram.core.request import Request
from engram.data.table import Table
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.engine.teacher import untrained
from engram.errors import EngramError
from engram.forget import bad_teacher
from engram.forget.bad_teacher import BadTeacher
from engram.forget.finetune import Finetune
from engram.models.build import build
from engram.stats.seeds import generator

FAST = Optimizer(lr=1e-3)


def started(method: BadTeacher, model: nn.Module, request: Request) -> tuple[Table, Tensor]:
    """The rows that take part, forget rows first, and which of them are to be forgotten."""
    method.targets(model, request, Run())
    assert request.forget is not None
    return method.table, torch.arange(len(method.table)) < len(request.forget)


def ignorant_teacher(model: nn.Module) -> nn.Module:
    """The one that a new run draws."""
    run = Run()
    with run.scope("teachers"):
        return untrained(model, run.generator("incompetent teacher"))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_the_divergence_from_the_teacher_that_the_indicator_names(
    model: nn.Module, request_of_three: Request, temperature: float
) -> None:
    method = BadTeacher(temperature=temperature)
    table, gone = started(method, model, request_of_three)
    chosen = torch.tensor([0, 5, 200, 7, 300, 301])
    batch = table.batch(chosen)
    ignorant = ignorant_teacher(model)
    bad, good = (torch.softmax(predict(t, table)[chosen] / temperature, 1) for t in (ignorant, model))
    told = torch.where(gone[chosen][:, None], bad, good)
    student = copy.deepcopy(model)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(0.8)
    said = torch.log_softmax(student(**batch.inputs).logits / temperature, 1)
    wanted = F.kl_div(said, told, reduction="batchmean")
    torch.testing.assert_close(method.loss(student, batch).value, wanted, rtol=1e-5, atol=1e-6)


def test_each_teacher_is_a_fixpoint_on_its_own_rows(model: nn.Module, request_of_three: Request) -> None:
    method = BadTeacher()
    table, gone = started(method, model, request_of_three)
    ignorant = ignorant_teacher(model).requires_grad_(True)
    for student, own, other in ((model, ~gone, gone), (ignorant, gone, ~gone)):
        loss = method.loss(student, table.batch(own.nonzero()[:, 0])).value
        slopes = torch.autograd.grad(loss, list(student.parameters()))
        assert abs(float(loss.detach())) < 1e-6
        assert max(float(g.abs().max()) for g in slopes) < 1e-6
        assert float(method.loss(student, table.batch(other.nonzero()[:, 0])).value.detach()) > 0.1


def test_with_two_competent_teachers_nothing_moves(
    model: nn.Module, request_of_three: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bad_teacher, "untrained", lambda model, draws: model)
    plain = Optimizer("sgd", lr=0.1, momentum=0.0)
    new = BadTeacher(optimizer=plain, epochs=3).forget(model, request_of_three)
    for p, q in zip(model.parameters(), new.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_a_model_of_numbers_is_refused(split: Split) -> None:
    few = split[0].take(range(20))
    assert few.labels is not None
    numbers = few.with_labels(few.labels[:, None].float())
    model = Recipe({"name": "MLP", "hidden": [4]}, epochs=1)(numbers, 0)
    with pytest.raises(EngramError, match="no class probabilities"):
        BadTeacher().forget(model, Request.of_records(numbers, numbers.ids[:5]))


def test_columns_of_dead_classes_do_no_harm(split: Split) -> None:
    few = split[0].of_classes([1, 3, 8]).take(range(60))
    model = Recipe({"name": "MLP", "hidden": [8]}, epochs=1)(few, 0)
    new = BadTeacher(optimizer=FAST, batch_size=16).forget(model, Request.of_classes(few, (3,)))
    logits = predict(new, few)
    assert torch.isneginf(logits[:, [0, 2, 4, 5, 6, 7]]).all()
    assert logits[:, [1, 3, 8]].isfinite().all()


def test_no_label_is_needed_nor_looked_at(model: nn.Module, request_of_three: Request) -> None:
    assert request_of_three.forget is not None and request_of_three.retain is not None
    bare = request_of_three.but(
        forget=request_of_three.forget.unlabelled(), retain=request_of_three.retain.unlabelled()
    )
    one, other = (BadTeacher(optimizer=FAST).forget(model, r) for r in (bare, request_of_three))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_the_share_of_the_retain_rows(model: nn.Module, request_of_three: Request) -> None:
    assert request_of_three.forget is not None and request_of_three.retain is not None
    table, _ = started(BadTeacher(retain_share=0.3), model, request_of_three)
    gone, kept = len(request_of_three.forget), len(request_of_three.retain)
    assert table.ids[:gone] == request_of_three.forget.ids
    assert len(table) == gone + round(0.3 * kept) and set(table.ids[gone:]) < set(request_of_three.retain.ids)
    whole, _ = started(BadTeacher(retain_share=1.0), model, request_of_three)
    assert whole.ids[gone:] == request_of_three.retain.ids


@pytest.mark.parametrize("norm", [None, "batch"])
def test_the_ignorant_teacher_has_other_weights_and_no_memory(norm: str | None) -> None:
    spec = {"name": "MLP", "hidden": [8, 8], "norm": norm}
    model = build(spec, inputs={"values": (6,)}, classes=(0, 1, 2), generator=generator("weights"))
    x = torch.randn(200, 6, generator=generator("x")) + 5
    model.train()(values=x)  # running statistics move
    twin, again = (untrained(model, generator("ignorant")) for _ in range(2))
    start = build(spec, inputs={"values": (6,)}, classes=(0, 1, 2), generator=generator("weights"))
    for (name, p), q, r in zip(twin.named_parameters(), again.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q) and not p.requires_grad
        assert "layers.0.1" in name or "layers.1.1" in name or not torch.equal(p, r)  # norms start at 1 and 0
        assert 0.3 < float((p.abs().mean() + 0.01) / (r.detach().abs().mean() + 0.01)) < 3
    for one, other in zip(twin.encoder.buffers(), start.encoder.buffers(), strict=True):  # type: ignore[union-attr,operator]
        assert torch.equal(one, other)


def test_a_parameter_of_no_layer_is_drawn_anew() -> None:
    model = nn.Module()
    model.token, model.scale = nn.Parameter(torch.full((4, 500), 7.0)), nn.Parameter(torch.ones(3))
    twin = untrained(model, generator("ignorant"))
    assert abs(float(twin.get_parameter("token").std()) - 0.02) < 0.002
    assert torch.equal(twin.get_parameter("scale"), torch.ones(3))
    assert torch.equal(model.token, torch.full((4, 500), 7.0))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_forgets_a_class_sooner_than_finetuning_and_keeps_the_rest(
    split: Split, request_of_three: Request, seed: int
) -> None:
    model = RECIPE(split[0], seed)
    before, good = scores(model, split)
    method = BadTeacher(optimizer=FAST, epochs=2, batch_size=64, retain_share=1.0)
    forgotten, kept = scores(method.forget(model, request_of_three, Run(seed=seed)), split)
    baseline = Finetune(optimizer=FAST, epochs=2, batch_size=64).forget(model, request_of_three, Run(seed=seed))
    assert forgotten < 0.5 < scores(baseline, split)[0] < before
    assert kept > good - 0.03
