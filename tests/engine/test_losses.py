"""Losses against their formulas, written out row by row. What a `Mean` is stands in the tests of `fit`."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
from torch import Tensor

from engram.data.table import IGNORED, MISSING
from engram.engine.losses import Mean, binary_by_class, by_target, distil, per_row, supcon, token_losses
from engram.stats.seeds import generator

CLASSES = torch.tensor([2, 0, MISSING, 1])
NUMBERS = torch.tensor([[1.0, -2], [math.nan, 3], [math.nan, math.nan], [0, 0.5]])
TOKENS = torch.tensor(
    [[5, 1, 2, 0], [1, IGNORED, 3, IGNORED], [IGNORED] * 4, [2, IGNORED, IGNORED, 4]]
)  # the first label of a row is never asked for: nothing comes before it


def normal(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=generator("scores", *shape))


LOGITS = {"classes": normal(4, 3), "numbers": normal(4, 2), "tokens": normal(4, 4, 6)}
LABELS = {"classes": CLASSES, "numbers": NUMBERS, "tokens": TOKENS}


def softmax(scores: list[float]) -> list[float]:
    total = sum(map(math.exp, scores))
    return [math.exp(score) / total for score in scores]


def sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score))


def parts(kind: str) -> list[list[float]]:
    """What every row has: the loss of its label, of each known value, or of each answer token."""
    logits, labels = LOGITS[kind].tolist(), LABELS[kind].tolist()
    if kind == "classes":
        return [[] if y == MISSING else [-math.log(softmax(z)[y])] for z, y in zip(logits, labels, strict=True)]
    if kind == "numbers":
        pairs = (zip(z, y, strict=True) for z, y in zip(logits, labels, strict=True))
        return [[(a - b) ** 2 for a, b in pair if not math.isnan(b)] for pair in pairs]
    return [
        [-math.log(softmax(z[t - 1])[y[t]]) for t in range(1, 4) if y[t] != IGNORED]
        for z, y in zip(logits, labels, strict=True)
    ]


@pytest.mark.parametrize("kind", LABELS)
def test_the_loss_of_a_row_is_the_mean_over_its_parts_and_0_without_any(kind: str) -> None:
    wanted = [sum(part) / max(len(part), 1) for part in parts(kind)]
    assert per_row(LOGITS[kind], LABELS[kind]).tolist() == pytest.approx(wanted, rel=1e-5)
    assert wanted[2] == 0


def test_the_sum_over_a_rows_tokens() -> None:
    found = per_row(LOGITS["tokens"], TOKENS, reduce="sum")
    assert found.tolist() == pytest.approx([sum(part) for part in parts("tokens")], rel=1e-5)


def test_token_losses_stand_where_their_token_is() -> None:
    losses, counts = token_losses(LOGITS["tokens"], TOKENS)
    assert losses.shape == (4, 3) and counts.tolist() == [3, 1, 0, 1]
    assert ((losses != 0) == (TOKENS[:, 1:] != IGNORED)).all()
    assert losses[losses != 0].tolist() == pytest.approx([*chain(*parts("tokens"))], rel=1e-5)


@pytest.mark.parametrize("kind", LABELS)
def test_the_usual_loss_is_the_mean_over_labelled_rows_or_over_tokens(kind: str) -> None:
    rows = [part for part in parts(kind) if part]
    each = [*chain(*rows)] if kind == "tokens" else [sum(part) / len(part) for part in rows]
    found = by_target(LOGITS[kind], LABELS[kind])
    assert float(found.value) == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert [float(count) for _, count in found.terms] == [len(each)]


@pytest.mark.parametrize("kind", LABELS)
def test_rows_without_labels_have_a_loss_of_0_and_no_gradient(kind: str) -> None:
    logits = LOGITS[kind][2:3].clone().requires_grad_()
    loss = by_target(logits, LABELS[kind][2:3]).value
    loss.backward()
    assert loss == 0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("kind", LABELS)
def test_unknown_parts_leave_the_gradient_of_others_finite(kind: str) -> None:
    logits = LOGITS[kind].clone().requires_grad_()
    per_row(logits, LABELS[kind]).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert logits.grad[[0, 1, 3]].flatten(1).any(1).all() and not logits.grad[2].any()


@pytest.mark.parametrize("kind", LABELS)
def test_no_rows_count_nothing(kind: str) -> None:
    found = by_target(LOGITS[kind][:0], LABELS[kind][:0])
    assert found.value == 0 and [float(count) for _, count in found.terms] == [0]


def test_a_column_that_is_not_live_changes_no_loss() -> None:
    wide = torch.cat([LOGITS["classes"], torch.full((4, 2), -math.inf)], 1)
    assert torch.equal(per_row(wide, CLASSES), per_row(LOGITS["classes"], CLASSES))


@pytest.mark.parametrize("kind", LABELS)
def test_low_precision_logits_have_a_loss_in_float32(kind: str) -> None:
    low = LOGITS[kind].bfloat16()
    assert per_row(low, LABELS[kind]).dtype == torch.float32
    assert torch.equal(per_row(low, LABELS[kind]), per_row(low.float(), LABELS[kind]))


def test_sigmoid_cross_entropy_is_summed_over_classes() -> None:
    scores, targets = normal(4, 3), torch.rand(4, 3, generator=generator("targets"))
    each = [
        sum(-y * math.log(sigmoid(z)) - (1 - y) * math.log(1 - sigmoid(z)) for z, y in zip(*row, strict=True))
        for row in zip(scores.tolist(), targets.tolist(), strict=True)
    ]
    found = binary_by_class(scores, targets)
    assert float(found.value) == pytest.approx(sum(each) / 4, rel=1e-5)
    assert [count for _, count in found.terms] == [4]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_distillation_is_the_cross_entropy_at_a_temperature(temperature: float) -> None:
    student, teacher = normal(4, 3), normal(3, 4).T
    each = []
    for row, taught in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = (softmax([z / temperature for z in scores]) for scores in (taught, row))
        each.append(-sum(a * math.log(b) for a, b in zip(p, q, strict=True)))
    found = distil(student, teacher, temperature)
    assert float(found.value) == pytest.approx(sum(each) / 4, rel=1e-5)
    assert [count for _, count in found.terms] == [4]


def test_distillation_from_oneself_has_no_gradient() -> None:
    student = normal(4, 3).requires_grad_()
    distil(student, student.detach(), 2.0).value.backward()
    assert student.grad is not None and float(student.grad.abs().max()) < 1e-7


def test_weights_of_a_loss_weigh_its_gradient() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (Mean.of(x) - 0.5 * Mean.over(x[:1].sum(), 4)).value.backward()
    assert x.grad is not None and x.grad.tolist() == [0.5 - 0.125, 0.5]


def contrast(z: Tensor, y: list[int], temperature: float) -> list[float]:
    """The supervised contrastive loss of each anchor that has a partner, pair by pair."""
    u = [row / row.norm() for row in z.double()]
    losses = []
    for i, label in enumerate(y):
        others = [a for a in range(len(y)) if a != i]
        chances = softmax([float(u[i] @ u[a]) / temperature for a in others])
        own = [-math.log(p) for p, a in zip(chances, others, strict=True) if y[a] == label]
        losses += [sum(own) / len(own)] if own else []
    return losses


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_contrast_is_the_mean_over_anchors_with_a_partner(temperature: float) -> None:
    z, labels = normal(7, 5), [0, 1, 0, 2, 1, 0, 3]
    found = supcon(z, torch.tensor(labels), temperature)
    wanted = contrast(z, labels, temperature)
    assert len(wanted) == 5 and [int(count) for _, count in found.terms] == [5]
    assert float(found.value) == pytest.approx(sum(wanted) / 5, rel=1e-5)


def test_contrast_sees_directions_alone_and_leaves_out_rows_without_a_label() -> None:
    z, labels = normal(6, 5), torch.tensor([0, 1, MISSING, 0, 1, MISSING])
    lengths = torch.tensor([1, 2, 3, 0.1, 5, 6]).unsqueeze(1)
    found = supcon(lengths * z, labels, 0.2)
    assert float(found.value) == pytest.approx(sum(contrast(z[[0, 1, 3, 4]], [0, 1, 0, 1], 0.2)) / 4, rel=1e-5)


@pytest.mark.parametrize("labels", [[], [0], [0, 1], [MISSING, MISSING]])
def test_contrast_without_partners_is_0_with_no_gradient(labels: list[int]) -> None:
    z = normal(len(labels), 3).requires_grad_()
    found = supcon(z, torch.tensor(labels, dtype=torch.long))
    found.value.backward()
    assert found.value == 0 and z.grad is not None and not z.grad.any()


def test_contrast_of_low_precision_is_computed_in_float32() -> None:
    z, labels = normal(6, 5).bfloat16(), torch.tensor([0, 1, 0, 1, 2, 2])
    with torch.autocast("cpu", torch.bfloat16):
        found = supcon(z, labels).value
    assert found.dtype == torch.float32 and torch.equal(found, supcon(z.float(), labels).value)
