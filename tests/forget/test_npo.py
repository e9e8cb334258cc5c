"""Negative preference optimisation and its family: identities, worlds small enough to compute, and a language model."""

from __future__ import annotations

import copy
import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from engram.core.needs import Need
from engram.core.request import Request
from engram.core.unlearning import GradientForgetter, usual_loss
from engram.data.table import IGNORED, Batch, Table
from engram.engine import lm
from engram.engine.losses import token_losses
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.forget.dpo import DPO
from engram.forget.gradient_ascent import GradientAscent
from engram.forget.gradient_difference import GradientDifference
from engram.forget.idk import IDK
from engram.forget.kl import KLForget
from engram.forget.language import Retaining
from engram.forget.npo import NPO, rejection
from engram.forget.simnpo import SimNPO
from engram.reproduce.facts import STOP, SmallGPT2, facts, recall
from engram.reproduce.npo import benchmark, drift
from engram.testing import checks_of, digits, holds

WORLD = 24
FAST = Optimizer("adamw", lr=1e-3)
REFUSALS = ((7, STOP), (8, 7, STOP))
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed (the extra `language`)")


@pytest.fixture(scope="module")
def table() -> Table:
    return facts(WORLD)


@pytest.fixture(scope="module")
def model(table: Table) -> nn.Module:
    return SmallGPT2(WORLD)(table, 0)


@pytest.fixture(scope="module")
def request_of_six(table: Table) -> Request:
    return Request.of_records(table, table.ids[:6])


@pytest.fixture(scope="module")
def started(model: nn.Module) -> nn.Module:
    """The model, moved: no log-ratio is 0 any more."""
    moved = copy.deepcopy(model)
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in moved.parameters():
            p += 0.02 * torch.randn(p.shape, generator=draws)
    return moved


def pair(request: Request) -> tuple[Batch, Batch]:
    """All forget rows, and the first nine retain rows."""
    assert request.forget is not None and request.retain is not None
    return request.forget.batch(torch.arange(6)), request.retain.batch(torch.arange(9))


def loss_of(method: GradientForgetter, model: nn.Module, now: nn.Module, request: Request) -> Tensor:
    """The loss of that pair for a model `now` that was `model` before."""
    method.targets(model, request, Run())
    forget, retain = pair(request)
    return method.terms(now, forget, retain if method.retain_weight else None).value


def sums(model: Any, batch: Batch) -> Tensor:
    """log p(answer) by a loop over rows and tokens, [B]."""
    assert batch.labels is not None
    logp = torch.log_softmax(model(**batch.inputs).logits, -1)
    told = [
        torch.stack([logp[i, t - 1, row[t]] for t in range(1, len(row)) if row[t] != IGNORED]).sum()
        for i, row in enumerate(batch.labels)
    ]
    return torch.stack(told)


# --- what must hold


@holds("npo", 1)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_the_loss_becomes_gradient_ascent_as_beta_goes_to_zero(ratios: list[float]) -> None:
    r, beta = torch.tensor(ratios, dtype=torch.float64), 1e-4
    gap = float(rejection(r, beta).value) - 2 / beta * math.log(2) - float(r.mean())
    assert abs(gap) < 1e-3
    assert gap == pytest.approx(float(beta * r.square().mean() / 4), abs=1e-8)


@holds("npo", 2)
def test_at_the_reference_a_language_model_has_the_gradient_of_ascent_on_sums(
    model: nn.Module, request_of_six: Request
) -> None:
    beta = 0.3
    found = loss_of(NPO(beta=beta, retain_weight=0.0), model, model, request_of_six)
    assert float(found.detach()) == pytest.approx(2 / beta * math.log(2), rel=1e-6)
    wanted = sums(model, pair(request_of_six)[0]).mean()
    params = list(model.parameters())
    for one, other in zip(torch.autograd.grad(found, params), torch.autograd.grad(wanted, params), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_force_on_a_row_is_that_of_the_paper() -> None:
    r = torch.linspace(-40, 40, 33, dtype=torch.float64, requires_grad=True)
    for beta in (0.05, 0.1, 1.0):
        (found,) = torch.autograd.grad(rejection(r, beta).value, r)
        wanted = 2 * (beta * r).exp() / (1 + (beta * r).exp()) / len(r)
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=0)
    assert math.isfinite(float(rejection(torch.tensor([-1e4, 1e4]), 1.0).value))  # log-sigmoid, never log(sigmoid)


@holds("npo", 3)
def test_logits_run_away_linearly_with_ascent_and_logarithmically_with_npo() -> None:
    assert drift(None, 0) > 3.5
    assert drift(0.1, 0) < 1.6


@pytest.mark.slow
@holds("npo", 4)
@pytest.mark.parametrize("seed", [0, 1])
def test_on_random_features_npo_ends_nearer_to_retraining_than_ascent_on_both_kinds_of_rows(seed: int) -> None:
    found = benchmark(seed)
    assert found["before", "forget"] > 1 and found["before", "retain"] < 0.05
    for part in ("forget", "retain"):
        assert found["NPO+RT", part] < found["GA+RT", part]
    assert found["NPO+RT", "forget"] < 0.06 and found["NPO+RT", "retain"] < 0.05


# --- the losses, each against its formula written out


def test_npo_takes_sums_over_the_answer_and_not_means(
    model: nn.Module, started: nn.Module, request_of_six: Request
) -> None:
    beta = 0.7
    found = loss_of(NPO(beta=beta, retain_weight=0.0), model, started, request_of_six)
    forget, _ = pair(request_of_six)
    r = sums(started, forget) - sums(model, forget)
    torch.testing.assert_close(found, -(2 / beta) * F.logsigmoid(-beta * r).mean(), rtol=1e-5, atol=1e-6)
    shrunk = -(2 / beta) * F.logsigmoid(-beta * r / 2).mean()  # answers have two tokens
    assert abs(float((found - shrunk).detach())) > 0.01


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("term", ["loss", "kl"])
@pytest.mark.parametrize("method", [NPO, DPO, SimNPO, KLForget])
def test_the_term_on_the_retain_rows(
    method: type[Retaining], term: str, weight: float, model: nn.Module, started: nn.Module, request_of_six: Request
) -> None:
    more = {"refusals": REFUSALS} if method is DPO else {}
    whole = loss_of(method(retain_term=term, retain_weight=weight, **more), model, started, request_of_six)
    alone = loss_of(method(retain_weight=0.0, **more), model, started, request_of_six)
    _, retain = pair(request_of_six)
    p, q = (torch.log_softmax(m(**retain.inputs).logits, -1) for m in (model, started))
    kl = (p.exp() * (p - q)).sum(2).mean()  # reference || model, over all positions
    wanted = kl if term == "kl" else usual_loss(started, retain).value
    torch.testing.assert_close(whole - alone, weight * wanted, rtol=1e-4, atol=1e-5)


def test_the_divergence_is_zero_at_the_reference_and_so_is_its_gradient(
    model: nn.Module, request_of_six: Request
) -> None:
    method = KLForget()
    method.targets(model, request_of_six, Run())
    found = method.divergence(model, pair(request_of_six)[1]).value
    assert abs(float(found.detach())) < 1e-6
    params = list(model.parameters())
    assert max(float(g.abs().max()) for g in torch.autograd.grad(found, params)) < 1e-5


def test_a_class_that_cannot_be_told_adds_nothing_to_the_divergence() -> None:
    reference = torch.log_softmax(torch.tensor([[1.0, 2.0, -torch.inf], [0.0, -torch.inf, 0.0]]), 1)
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [3.0, -torch.inf, 0.0]], requires_grad=True)
    found = lm.kl_to(reference, logits).value
    p, q = 1 / (1 + math.e), 1 / (1 + math.exp(-3))
    one = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    other = 0.5 * math.log(0.5 / q) + 0.5 * math.log(0.5 / (1 - q))
    assert float(found.detach()) == pytest.approx((one + other) / 2, rel=1e-5)
    (gradient,) = torch.autograd.grad(found, logits)
    assert bool(gradient.isfinite().all())


def test_ascent_and_difference_take_the_mean_over_tokens(model: nn.Module, request_of_six: Request) -> None:
    forget, retain = pair(request_of_six)

    def tokens(batch: Batch) -> Tensor:
        assert batch.labels is not None
        losses, counts = token_losses(model(**batch.inputs).logits, batch.labels)  # type: ignore[operator]
        return losses.sum() / counts.sum()

    ascent = loss_of(GradientAscent(), model, model, request_of_six)
    difference = loss_of(GradientDifference(), model, model, request_of_six)
    torch.testing.assert_close(ascent, -tokens(forget))
    torch.testing.assert_close(difference, tokens(retain) - tokens(forget))


def test_dpo_by_its_formula_with_sums(model: nn.Module, started: nn.Module, request_of_six: Request) -> None:
    beta = 0.4
    method = DPO(beta=beta, retain_weight=0.0, refusals=REFUSALS)
    found = loss_of(method, model, started, request_of_six)
    true, refused = pair(request_of_six)[0], method.preferred.batch(torch.arange(6))
    r_w, r_l = (sums(started, batch) - sums(model, batch) for batch in (refused, true))
    torch.testing.assert_close(found, -(2 / beta) * F.logsigmoid(beta * (r_w - r_l)).mean(), rtol=1e-5, atol=1e-5)
    assert len({len(row[row != IGNORED]) for row in refused.labels}) == 2  # type: ignore[union-attr]


def test_idk_is_one_mean_over_the_tokens_of_both_parts(model: nn.Module, request_of_six: Request) -> None:
    method = IDK(refusals=REFUSALS)
    found = loss_of(method, model, model, request_of_six)
    refused, retain = method.refused.batch(torch.arange(6)), pair(request_of_six)[1]
    parts = []
    for batch in (refused, retain):
        assert batch.labels is not None
        parts.append(token_losses(model(**batch.inputs).logits, batch.labels))  # type: ignore[operator]
    wanted = (parts[0][0].sum() + parts[1][0].sum()) / (parts[0][1].sum() + parts[1][1].sum())
    torch.testing.assert_close(found, wanted)
    means = sum(losses.sum() / counts.sum() for losses, counts in parts) / 2
    assert abs(float((found - means).detach())) > 1e-2


def test_simnpo_by_its_formula_has_no_reference(model: nn.Module, started: nn.Module, request_of_six: Request) -> None:
    method = SimNPO(beta=2.0, margin=0.3, retain_weight=0.0)
    forget, _ = pair(request_of_six)
    mean = sums(started, forget) / 2
    found = loss_of(method, model, started, request_of_six)
    torch.testing.assert_close(found, -F.logsigmoid(-2.0 * mean - 0.3).mean(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found, loss_of(method, started, started, request_of_six))


# --- refusals


def test_a_refusal_follows_the_question_and_ends_with_its_own_end() -> None:
    ids = torch.tensor([[5, 6, 20, 1, 0, 0], [5, 6, 7, 30, 31, 1]])
    labels = torch.tensor([[-100, -100, 20, 1, -100, -100], [-100, -100, -100, 30, 31, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    table = Table({"input_ids": ids, "attention_mask": mask}, labels, ("a", "b"))
    other = lm.other_answers(table, [[8, 9, 8, 1]], torch.Generator())
    assert other.ids == ("a", "b")
    assert other.inputs["input_ids"].tolist() == [[5, 6, 8, 9, 8, 1, 0], [5, 6, 7, 8, 9, 8, 1]]
    assert other.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]]
    assert other.labels is not None
    assert other.labels.tolist() == [[-100, -100, 8, 9, 8, 1, -100], [-100, -100, -100, 8, 9, 8, 1]]
    short = lm.other_answers(table, [[1]], torch.Generator())
    assert short.inputs["input_ids"].tolist() == [[5, 6, 1, 0], [5, 6, 7, 1]]


def test_refusals_are_drawn_once_by_the_runs_seed(model: nn.Module, request_of_six: Request) -> None:
    def drawn(seed: int) -> list[list[int]]:
        method = IDK(refusals=tuple((word, STOP) for word in range(30)))
        method.targets(model, request_of_six, Run(seed=seed))
        return method.refused.inputs["input_ids"].tolist()

    assert drawn(0) == drawn(0) != drawn(1)
    assert len({row[5] for row in drawn(0)}) > 2


def test_a_language_model_without_refusals_is_refused(model: nn.Module, request_of_six: Request) -> None:
    with pytest.raises(EngramError, match="give `refusals`"):
        DPO().forget(model, request_of_six)
    strange = request_of_six.forget
    assert strange is not None
    typed = Table({**strange.inputs, "position_ids": strange.inputs["input_ids"]}, strange.labels, strange.ids)
    with pytest.raises(EngramError, match="position_ids"):
        lm.other_answers(typed, REFUSALS, torch.Generator())


def test_a_classifier_without_refusals_guesses_among_its_live_classes() -> None:
    class Fixed(nn.Module):
        def forward(self, values: Tensor) -> Any:
            from engram.models.output import Output

            return Output(logits=torch.tensor([0.0, -torch.inf, 1.0, 2.0]).expand(len(values), -1))

    table = Table({"values": torch.zeros(400, 1)}, torch.zeros(400, dtype=torch.long))
    method = IDK()
    method.targets(Fixed(), Request.of_records(table, table.ids), Run())
    assert method.refused.labels is not None
    counts = method.refused.labels.bincount(minlength=4).tolist()
    assert counts[1] == 0 and min(counts[0], counts[2], counts[3]) > 100


# --- the reference is computed once


class Counted(nn.Module):
    """A model that counts its rows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.rows = inner, 0

    def forward(self, **inputs: Tensor) -> Any:
        self.rows += len(inputs["input_ids"])
        return self.inner(**inputs)


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        (NPO(retain_weight=0.0), 6),
        (NPO(retain_term="kl"), 6 + 18),
        (DPO(refusals=REFUSALS), 12),
        (KLForget(), 18),
        (SimNPO(), 0),
    ],
)
def test_the_model_before_sees_every_row_once_however_many_epochs(
    method: GradientForgetter, rows: int, model: nn.Module, request_of_six: Request
) -> None:
    counted = Counted(copy.deepcopy(model))
    method.epochs = 4
    method.forget(counted, request_of_six)
    assert counted.rows == rows


def test_the_divergence_needs_no_labels_of_retain_rows(model: nn.Module, request_of_six: Request) -> None:
    assert request_of_six.retain is not None
    bare = request_of_six.but(retain=request_of_six.retain.unlabelled())
    new = NPO(retain_term="kl", epochs=1, optimizer=FAST).forget(model, bare)
    assert any(not torch.equal(a, b) for a, b in zip(new.parameters(), model.parameters(), strict=True))
    assert NPO(retain_weight=0.0).needs == (frozenset({Need.FORGET_ROWS, Need.FORGET_LABELS}),)
    with pytest.raises(EngramError, match="retain-labels"):
        NPO(retain_term="loss").forget(model, bare)
    with pytest.raises(EngramError, match="retain_term 'lost'"):
        NPO(retain_term="lost").forget(model, bare)


VARIANTS = [
    NPO(beta=0.5, retain_term="kl", optimizer=FAST, epochs=2, batch_size=8),
    DPO(retain_weight=0.0, refusals=((2,), (5,)), optimizer=FAST, epochs=2, batch_size=8),
    pytest.param(NPO(lora=2, optimizer=FAST, epochs=2, batch_size=8), marks=needs_peft),
    pytest.param(DPO(lora=2, retain_term="kl", optimizer=FAST, epochs=2, batch_size=8), marks=needs_peft),
    pytest.param(IDK(lora=2, optimizer=FAST, epochs=2, batch_size=8), marks=needs_peft),
]


@pytest.mark.parametrize("method", VARIANTS, ids=["NPO+KL", "DPO alone", "NPO, LoRA", "DPO+KL, LoRA", "IDK, LoRA"])
def test_settings_beside_the_default_keep_the_promises_of_a_forgetter(method: GradientForgetter) -> None:
    material = digits()
    for check in checks_of(method):
        check(method, material)


# --- what the family does to a language model


def test_ascent_ruins_what_every_bounded_loss_keeps(model: nn.Module, table: Table, request_of_six: Request) -> None:
    gone, kept = table.take(range(6)), table.take(range(6, WORLD))
    assert recall(model, table) == 1
    common: dict[str, Any] = {"optimizer": FAST, "batch_size": 6}
    ascent = GradientAscent(epochs=40, **common).forget(model, request_of_six)
    assert recall(ascent, kept) < 0.2
    for method in (
        NPO(epochs=60, retain_ratio=3, **common),
        NPO(epochs=60, retain_ratio=3, retain_term="kl", retain_weight=5.0, **common),
        DPO(epochs=60, retain_ratio=3, refusals=REFUSALS, **common),
        IDK(epochs=60, retain_ratio=3, refusals=REFUSALS, **common),
        SimNPO(epochs=60, retain_ratio=3, **common),
    ):
        new = method.forget(model, request_of_six)
        assert recall(new, gone) < 0.2, method
        assert recall(new, kept) > 0.8, method


def test_after_idk_the_forget_questions_are_refused(model: nn.Module, request_of_six: Request) -> None:
    assert request_of_six.forget is not None and request_of_six.retain is not None
    method = IDK(epochs=60, retain_ratio=3, refusals=((7, STOP),), optimizer=FAST)
    new = method.forget(model, request_of_six)
    told = lm.greedy(new, request_of_six.forget.inputs["input_ids"][:, :5], 2, STOP)
    assert told.tolist() == [[7, STOP]] * 6
    assert 7 not in lm.greedy(new, request_of_six.retain.inputs["input_ids"][:, :5], 2, STOP)


# --- adapters


@needs_peft
def test_an_adapted_model_says_the_same_and_shares_its_weights(model: nn.Module, table: Table) -> None:
    flags = [p.requires_grad for p in model.parameters()]
    with Run().seeded("adapters"):
        twin = lm.adapted(model, 4)
    assert torch.equal(predict(twin, table), predict(model, table))
    own = {id(p) for p in model.parameters()}
    assert {id(p) for p in twin.parameters()} == own | {id(p) for p in lm.adapter_weights(twin)}
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not hasattr(model, "peft_config")


@needs_peft
@pytest.mark.parametrize("term", ["loss", "kl"])
def test_with_adapters_only_low_rank_changes_reach_the_weights(
    term: str, model: nn.Module, table: Table, request_of_six: Request
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan, weight = Optimizer("adamw", lr=5e-3), 1.0 if term == "loss" else 10.0
    method = NPO(lora=2, epochs=100, retain_ratio=3, retain_term=term, retain_weight=weight, optimizer=plan)
    new = method.forget(model, request_of_six)
    assert type(new) is type(model)
    assert list(new.state_dict()) == list(before)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    change = {name: value - before[name] for name, value in new.state_dict().items()}
    moved = {name for name, value in change.items() if bool(value.abs().max() > 0)}
    assert moved and all(name.endswith(("attn.weight", "proj.weight", "c_fc.weight")) for name in moved)
    assert all(int(torch.linalg.matrix_rank(change[name], rtol=1e-4)) <= 2 for name in moved)
    assert recall(new, table.take(range(6))) < 0.2
    assert recall(new, table.take(range(6, WORLD))) > 0.8


@needs_peft
def test_with_adapters_the_same_weights_are_the_reference(model: nn.Module, request_of_six: Request) -> None:
    with Run().seeded("adapters"):
        twin = lm.adapted(model, 2)
    with torch.no_grad():
        for p in lm.adapter_weights(twin):
            p += 0.1
    _, retain = pair(request_of_six)
    found = NPO(lora=2, retain_term="kl").divergence(twin, retain).value
    p, q = (torch.log_softmax(m(**retain.inputs).logits, -1) for m in (model, twin))
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(2).mean(), rtol=1e-4, atol=1e-6)
    assert float(found.detach()) > 1e-3
    assert all(p.requires_grad for p in lm.adapter_weights(twin))  # on again


@needs_peft
def test_merging_keeps_what_the_adapted_model_says(model: nn.Module, table: Table) -> None:
    with Run().seeded("adapters"):
        twin = copy.deepcopy(lm.adapted(model, 2))
    with torch.no_grad():
        for p in lm.adapter_weights(twin):
            p += 0.05
    wanted = predict(twin, table)
    assert not torch.allclose(wanted, predict(model, table), atol=1e-2)
    plain = lm.merged(twin)
    assert lm.adapter_weights(plain) == []
    torch.testing.assert_close(predict(plain, table), wanted, rtol=1e-4, atol=1e-4)


@needs_peft
def test_a_model_without_a_linear_layer_takes_no_adapter(model: nn.Module) -> None:
    with pytest.raises(EngramError, match="no trainable linear layer"):
        lm.adapted(copy.deepcopy(model).requires_grad_(False), 2)


# --- greedy answers


def test_step_by_step_is_what_transformers_generates(model: nn.Module, table: Table) -> None:
    prompt = table.inputs["input_ids"][:, :5]
    for stop in (STOP, None, int(table.inputs["input_ids"][3, 5])):
        assert torch.equal(lm.greedy(model, prompt, 3, stop), lm._step_by_step(model, prompt, 3, stop))
    found = lm.greedy(model, prompt, 3, STOP)
    assert bool((found[:, 1:] == STOP).all()) and torch.equal(found[:, 0], table.inputs["input_ids"][:, 5])
