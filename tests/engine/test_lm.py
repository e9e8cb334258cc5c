"""The log-probability of an answer, token by token, and of a class."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engram.data.table import IGNORED, MISSING, Batch, Table
from engram.engine.lm import (
    greedy,
    kl_to,
    live_classes,
    log_probs,
    other_answers,
    questions,
    sequence_logp,
    summed_logp,
)
from engram.errors import EngramError
from engram.models.build import build
from engram.models.output import Output
from engram.stats.seeds import generator

LABELS = torch.tensor(
    [[4, 1, 3, 0, 2], [IGNORED, IGNORED, IGNORED, 2, 4], [0, IGNORED, 1, IGNORED, 3], [2] + [IGNORED] * 4]
)


def logits() -> Tensor:
    return 3 * torch.randn(4, 5, 6, generator=generator("logits"))


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_a_token_is_told_from_what_stands_before_it(reduce: str) -> None:
    chances = torch.softmax(logits().double(), 2)
    for row, found in enumerate(sequence_logp(logits(), LABELS, reduce).tolist()):
        each = [math.log(chances[row, t - 1, LABELS[row, t]]) for t in range(1, 5) if LABELS[row, t] != IGNORED]
        assert found == pytest.approx(sum(each) / (max(len(each), 1) if reduce == "mean" else 1), rel=1e-5)


def test_sum_or_mean_has_to_be_said() -> None:
    with pytest.raises(TypeError, match="reduce"):
        sequence_logp(logits(), LABELS)  # type: ignore[call-arg]


def test_an_answer_without_tokens_is_certain() -> None:
    assert sequence_logp(logits(), LABELS, "sum")[3] == 0 and sequence_logp(logits(), LABELS, "mean")[3] == 0


def test_the_sum_is_the_chance_of_the_answer_among_all_answers() -> None:
    """Over all answers of two tokens the chances add up to 1, if the model does not look at them."""
    answers = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    labels = torch.cat([torch.full((36, 1), IGNORED), answers], 1)
    chances = sequence_logp(logits()[:1, :3].expand(36, -1, -1), labels, "sum").double().exp()
    assert float(chances.sum()) == pytest.approx(1, abs=1e-6) and float(chances.max()) < 1


def test_the_last_position_tells_nothing_of_the_answer() -> None:
    changed = logits()
    changed[:, -1] += torch.arange(6.0)
    assert torch.equal(sequence_logp(changed, LABELS, "sum"), sequence_logp(logits(), LABELS, "sum"))


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_a_class_is_an_answer_of_one_token(reduce: str) -> None:
    scores, labels = logits()[:, 0], torch.tensor([5, 0, MISSING, 3])
    wanted = F.log_softmax(scores, 1)[torch.arange(4), labels]
    wanted[2] = 0  # no label
    assert torch.allclose(sequence_logp(scores, labels, reduce), wanted, atol=1e-6)
    tokens = torch.stack([torch.full((4,), IGNORED), torch.where(labels == MISSING, IGNORED, labels)], 1)
    padded = torch.stack([scores, torch.zeros_like(scores)], 1)
    assert torch.allclose(sequence_logp(padded, tokens, reduce), wanted, atol=1e-6)


def test_the_gradient_raises_what_is_asked_for_alone() -> None:
    z = logits().requires_grad_()
    sequence_logp(z, LABELS, "sum")[1].backward()
    assert z.grad is not None
    assert z.grad.flatten(2).any(2).nonzero().tolist() == [[1, 2], [1, 3]]
    assert z.grad[1, 2, 2] > 0 and z.grad[1, 3, 4] > 0


def test_readers_give_log_probabilities_by_row() -> None:
    batch = Batch({}, LABELS, torch.arange(4))
    assert torch.equal(summed_logp(Output(logits=logits()), batch), sequence_logp(logits(), LABELS, "sum"))
    found = log_probs(Output(logits=logits().bfloat16()), batch)
    assert found.dtype == torch.float32 and torch.allclose(found.exp().sum(-1), torch.ones(4, 5), atol=1e-5)
    assert torch.allclose(found[..., 1] - found[..., 0], logits()[..., 1] - logits()[..., 0], atol=0.1)


@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6)], ids=["rows", "tokens"])
def test_kl_is_the_sum_over_classes_and_the_mean_over_places(shape: tuple[int, ...]) -> None:
    one, other = (2 * torch.randn(*shape, generator=generator("kl", k)) for k in range(2))
    one[..., 2] = -math.inf  # what the reference holds impossible counts 0
    p, q = (torch.softmax(scores.double(), -1) for scores in (one, other))
    each = torch.where(p > 0, p * (p / q).clamp(min=1e-300).log(), 0.0).sum(-1)
    found = kl_to(torch.log_softmax(one, -1), other)
    assert float(found.value) == pytest.approx(float(each.mean()), rel=1e-5)
    assert [count for _, count in found.terms] == [each.numel()]


def test_kl_to_oneself_is_0_without_a_gradient_and_dead_columns_do_no_harm() -> None:
    scores = logits()[:, 0].clone()
    scores[:, 3] = -math.inf
    own = scores.clone().requires_grad_()
    loss = kl_to(torch.log_softmax(scores, 1), own).value
    loss.backward()
    assert loss.abs() < 1e-6 and own.grad is not None and float(own.grad.abs().max()) < 1e-6


def test_live_classes_are_those_that_can_be_told() -> None:
    model = build("MLP", inputs={"values": (6,)}, classes=(4, 0, 2), generator=generator("weights"))
    model.head.retire([2])  # type: ignore[operator,union-attr]
    assert live_classes(model, Table({"values": torch.zeros(3, 6)})).tolist() == [0, 4]


def test_a_question_is_what_stands_before_the_first_answer_token() -> None:
    assert questions(LABELS).tolist() == [0, 3, 0, 0]
    assert questions(torch.full((2, 5), IGNORED)).tolist() == [5, 5]


def test_other_answers_stand_behind_the_questions() -> None:
    ids = torch.tensor([[7, 8, 1, 2, 0], [7, 3, 0, 0, 0], [7, 7, 7, 9, 4]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    labels = torch.where(torch.tensor([[0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 1]]).bool(), ids, IGNORED)
    table = Table({"input_ids": ids, "attention_mask": mask}, labels, ("a", "b", "c"))
    found = other_answers(table, [[5, 6, 5]], generator("draws"))
    assert found.ids == table.ids and found.labels is not None
    assert found.inputs["input_ids"].tolist() == [[7, 8, 5, 6, 5, 0], [7, 5, 6, 5, 0, 0], [7, 7, 7, 5, 6, 5]]
    assert found.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [1] * 6]
    asked = found.labels != IGNORED
    assert asked.sum(1).tolist() == [3, 3, 3] and found.labels[asked].tolist() == [5, 6, 5] * 3
    assert questions(found.labels).tolist() == questions(labels).tolist() == [2, 1, 3]


def test_other_answers_are_drawn_from_all_and_a_class_is_an_answer_of_one_token() -> None:
    table = Table({"values": torch.zeros(200, 6)}, torch.zeros(200, dtype=torch.long))
    found = other_answers(table, [[1], [2], [4]], generator("draws"))
    assert found.labels is not None and torch.bincount(found.labels).tolist()[3] == 0
    assert all(40 < int((found.labels == c).sum()) < 95 for c in (1, 2, 4))
    assert torch.equal(found.inputs["values"], table.inputs["values"])


@pytest.mark.parametrize("answers", [[], [[1], []], [[1, 2]]], ids=["none", "an empty one", "too long for a class"])
def test_answers_that_fit_no_row_are_refused(answers: list[list[int]]) -> None:
    with pytest.raises(EngramError, match="answer"):
        other_answers(Table({"values": torch.zeros(3, 6)}, torch.tensor([0, 1, 2])), answers, generator("draws"))


class Counter(nn.Module):
    """The likeliest token after n is n + 1, of 10; in eval mode alone."""

    def forward(self, input_ids: Tensor) -> Output:
        shift = 2 if self.training else 1
        return Output(logits=F.one_hot((input_ids + shift) % 10, 10).float())


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [(None, [[3, 4, 5, 6], [8, 9, 0, 1]]), (9, [[3, 4, 5, 6], [8, 9, 9, 9]]), (20, [[3, 4, 5, 6], [8, 9, 0, 1]])],
)
def test_greedy_takes_the_likeliest_token_until_its_stop(stop: int | None, wanted: list[list[int]]) -> None:
    model = Counter().train()
    assert greedy(model, torch.tensor([[5, 2], [5, 7]]), 4, stop).tolist() == wanted and model.training
    assert greedy(model, torch.tensor([[5, 7]]), 8, 9).tolist() == [[8, 9]]
