"""Scores of logits: the worked numbers, the formulas written down, retired columns, conformal sets."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, inf, log

import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from torch import Tensor

from engram.errors import EngramError
from engram.stats.scores import conformal_threshold, cross_entropy, energy, entropy, margin, modified_entropy
from engram.stats.seeds import generator, uniform

WORKED, FIRST = torch.tensor([[2.0, 1.0, 0.0]]).double(), torch.tensor([0])
LOGITS = 3 * torch.randn(40, 5, generator=generator("logits"), dtype=torch.float64)
Y = torch.arange(40) % 5
BY_CLASS = [margin, cross_entropy, modified_entropy]
SCORES: list[Callable[[Tensor, Tensor], Tensor]] = [*BY_CLASS, lambda z, y: energy(z), lambda z, y: entropy(z)]


@pytest.mark.parametrize(
    ("score", "value"), list(zip(SCORES, [0.686738, 0.407606, 0.213634, -2.407606, 0.832396], strict=True))
)
def test_worked_numbers(score: Callable[[Tensor, Tensor], Tensor], value: float) -> None:
    assert score(WORKED, FIRST).tolist() == pytest.approx([value], abs=5e-7)


def test_worked_probabilities() -> None:
    assert WORKED.softmax(1)[0].tolist() == pytest.approx([0.665241, 0.244728, 0.090031], abs=5e-7)
    given = torch.tensor([[0.7, 0.2, 0.1]]).double().log()
    assert modified_entropy(given, FIRST).item() == pytest.approx(0.162167, abs=5e-7)


def test_the_formulas_in_probabilities() -> None:
    p = LOGITS.softmax(1)
    own = p.gather(1, Y[:, None]).squeeze(1)
    others = (p * torch.log1p(-p)).sum(1) - own * torch.log1p(-own)
    assert torch.allclose(margin(LOGITS, Y), own.log() - (1 - own).log())
    assert torch.allclose(cross_entropy(LOGITS, Y), -own.log())
    assert torch.allclose(modified_entropy(LOGITS, Y), -(1 - own) * own.log() - others)
    assert entropy(LOGITS).numpy() == pytest.approx(scipy_entropy(p, axis=1))
    assert torch.allclose(energy(LOGITS), -LOGITS.exp().sum(1).log())


@pytest.mark.parametrize("columns", [[1, 3], torch.tensor([1, 3]), slice(1, 4, 2)])
def test_energy_of_some_columns(columns: list[int] | Tensor | slice) -> None:
    assert torch.equal(energy(LOGITS, columns), energy(LOGITS[:, [1, 3]]))


@pytest.mark.parametrize("score", SCORES)
def test_retired_columns_are_as_if_absent(score: Callable[[Tensor, Tensor], Tensor]) -> None:
    live = torch.tensor([0, 2, 3])
    retired = torch.full_like(LOGITS, -inf).index_copy(1, live, LOGITS[:, live])
    place = torch.arange(40) % 3
    assert torch.allclose(score(retired, live[place]), score(LOGITS[:, live], place), atol=1e-12, rtol=0)


def test_a_retired_class_and_the_only_one_left() -> None:
    z, both = torch.tensor([[1.0, -inf], [-inf, 1.0]]), torch.tensor([1, 1])
    assert margin(z, both).tolist() == [-inf, inf]
    assert cross_entropy(z, both).tolist() == modified_entropy(z, both).tolist() == [inf, 0]
    assert entropy(z).tolist() == entropy(z, normalise=True).tolist() == [0, 0]


def test_normalised_entropy_counts_live_columns() -> None:
    level = torch.tensor([[0.0, 0, 0, 0], [5.0, 5, -inf, -inf], [1.0, 1, 1, -inf]])
    assert entropy(level, normalise=True).tolist() == pytest.approx([1, 1, 1])
    assert entropy(level).tolist() == pytest.approx([log(4), log(2), log(3)])
    assert torch.allclose(entropy(LOGITS, normalise=True), entropy(LOGITS) / log(5))


@pytest.mark.parametrize("lead", [20.0, 30.0, 40.0])
def test_no_digits_are_lost_where_a_probability_rounds_to_one(lead: float) -> None:
    z = torch.tensor([[lead, 0.0, 0.0]])  # float32: p of the first is 1
    rest = 2 * torch.tensor(-lead).double().exp().item()
    assert z.softmax(1)[0, 0] == 1
    right, wrong = modified_entropy(z, FIRST).item(), modified_entropy(z, FIRST + 1).item()
    tail = rest / (1 + rest)
    direct = tail * tail + 2 * (tail / 2) ** 2  # -ln(1 - x) is x to this many digits
    assert right == pytest.approx(direct, rel=1e-5, abs=0)
    assert wrong == pytest.approx(lead + lead - log(2), rel=1e-5)
    assert margin(z, FIRST).item() == pytest.approx(lead - log(2), rel=1e-6)


@pytest.mark.parametrize(("n", "alpha", "rank"), [(9, 0.1, 9), (99, 0.05, 95), (10, 0.5, 6), (9, 0.7, 3)])
def test_the_conformal_threshold_is_an_order_statistic(n: int, alpha: float, rank: int) -> None:
    right = uniform(torch.arange(n), "calibration")
    scores, labels = torch.cat([right, 1 - right], 1), torch.zeros(n, dtype=torch.long)
    assert rank == ceil(round((n + 1) * (1 - alpha), 9))
    assert conformal_threshold(scores, labels, alpha) == (1 - right).flatten().sort().values[rank - 1].item()


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_conformal_sets_hold_the_true_class_as_often_as_promised(alpha: float) -> None:
    n, trials, held = 24, 400, 0.0
    for trial in range(trials):
        p = torch.randn(n + 50, 4, generator=generator("conformal", trial), dtype=torch.float64).mul(2).softmax(1)
        labels = torch.multinomial(p, 1, generator=generator("labels", trial)).squeeze(1)
        threshold = conformal_threshold(p[:n], labels[:n], alpha)
        held += ((1 - p[n:].gather(1, labels[n:, None])) <= threshold).double().mean().item() / trials
    assert 1 - alpha - 0.01 < held < 1 - alpha + 1 / (n + 1) + 0.01


def test_too_few_calibration_rows_let_every_class_in() -> None:
    scores, labels = torch.full((8, 2), 0.5), torch.zeros(8, dtype=torch.long)
    assert conformal_threshold(scores, labels, 0.1) == inf
    assert conformal_threshold(scores, labels, 0.12) == 0.5


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, float("nan")])
def test_alpha_is_a_rate(alpha: float) -> None:
    with pytest.raises(EngramError, match="allowed error rate"):
        conformal_threshold(torch.ones(3, 2), torch.zeros(3, dtype=torch.long), alpha)
