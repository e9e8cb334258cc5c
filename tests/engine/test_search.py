"""The search over settings, errors, and mean average precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from engram.core.chronicle import front
from engram.data.table import Table
from engram.engine.predict import error_of, error_of_scores
from engram.engine.run import Run
from engram.engine.search import Best, drawn
from engram.errors import EngramError
from engram.models.output import Output
from engram.stats.multilabel import average_precisions, mean_average_precision
from engram.testing import holds

# --- mean average precision


@holds("nevis22", 5)
@pytest.mark.parametrize("prevalence", [0.05, 0.2, 0.5, 0.9])
def test_random_scores_give_the_prevalence_and_perfect_ones_one(prevalence: float) -> None:
    draws = np.random.default_rng(0)
    labels = (draws.random((4000, 5)) < prevalence).astype(float)
    assert mean_average_precision(draws.random((4000, 5)), labels) == pytest.approx(prevalence, abs=0.02)
    assert mean_average_precision(np.zeros((4000, 5)), labels) == pytest.approx(labels.mean())
    assert mean_average_precision(labels + 0.1 * draws.random((4000, 5)), labels) == 1.0


@holds("nevis22", 5)
@given(n=st.integers(2, 40), ties=st.integers(1, 12), seed=st.integers(0, 99))
def test_it_is_the_average_precision_of_scikit_learn(n: int, ties: int, seed: int) -> None:
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, 2, (n, 3)).astype(float)
    labels[0] = 1.0
    scores = draws.integers(0, ties, (n, 3)).astype(float)
    wanted = [average_precision_score(labels[:, k], scores[:, k]) for k in range(3)]
    assert average_precisions(scores, labels) == pytest.approx(wanted, abs=1e-12)


def test_a_worked_ranking() -> None:
    """Relevant at ranks 1 and 3: (1 + 2/3) / 2."""
    labels = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    assert mean_average_precision(torch.tensor([[4.0], [3.0], [2.0], [1.0]]), labels) == pytest.approx(5 / 6)


def test_unknown_labels_and_labels_that_no_row_has_do_not_count() -> None:
    nan = math.nan
    labels = np.array([[1.0, 0.0], [nan, 0.0], [0.0, 0.0]])
    scores = np.array([[2.0, 1.0], [9.0, 2.0], [1.0, 3.0]])
    assert mean_average_precision(scores, labels) == 1.0
    assert math.isnan(mean_average_precision(scores[:, 1:], labels[:, 1:]))
    with pytest.raises(EngramError, match=r"\[n, k\]"):
        mean_average_precision(scores, labels[:, :1])


# --- errors


class Says(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, values: Tensor) -> Output:
        return Output(logits=self.logits[values[:, 0].long()])


def test_the_error_is_among_the_classes_asked_for() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0], [9.0, 2.0, 1.0], [9.0, 0.0, 3.0], [0.0, 9.0, 0.0]])
    rows = Table({"values": torch.arange(4.0)[:, None]}, torch.tensor([2, 1, 1, -1]))
    model = Says(logits)
    assert error_of(model, rows, (1, 2)) == pytest.approx(1 / 3)  # the row without a label does not count
    assert error_of(model, rows, (0, 1, 2)) == 1.0
    assert error_of(model, rows, (0, 1, 2, 7)) == 1.0  # a class without a column is never told


def test_the_error_of_several_labels_is_that_of_their_ranking() -> None:
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    table = Table({"values": torch.arange(3.0)[:, None]}, labels)
    assert error_of_scores(labels, table, (4, 5)) == 0.0
    logits = torch.cat([torch.zeros(3, 4), labels], 1)
    assert error_of(Says(logits), table, (4, 5)) == 0.0
    assert error_of(Says(logits), table, (5, 4)) > 0.0


# --- trials


def test_a_longer_search_begins_as_the_shorter_one_does() -> None:
    settings = [drawn(k, (1e-4, 1e-1), (0.0, 0.3), Run(seed=3)) for k in range(400)]
    assert settings[:5] == [drawn(k, (1e-4, 1e-1), (0.0, 0.3), Run(seed=3)) for k in range(5)]
    rates = np.log10([s.lr for s in settings])
    assert rates.min() >= -4 and rates.max() <= -1 and rates.mean() == pytest.approx(-2.5, abs=0.15)
    assert np.mean([s.smoothing for s in settings]) == pytest.approx(0.15, abs=0.02)
    fixed = drawn(0, (0.1, 0.1), (0.2, 0.2), Run())
    assert (fixed.lr, fixed.smoothing) == (pytest.approx(0.1), pytest.approx(0.2))


@pytest.mark.parametrize(("lr", "smoothing"), [((0.0, 1.0), (0, 0)), ((2.0, 1.0), (0, 0)), ((1, 2), (0.5, 0.2))])
def test_spans_out_of_order_are_refused(lr: tuple[float, float], smoothing: tuple[float, float]) -> None:
    with pytest.raises(EngramError, match="low <= high"):
        drawn(0, lr, smoothing, Run())


def test_the_best_state_is_kept_and_not_the_last() -> None:
    model, best = nn.BatchNorm1d(1), Best()
    for step, error in enumerate((0.5, 0.2, 0.2, 0.9), 1):
        with torch.no_grad():
            model.weight.fill_(step)
        best.look(error, model, step)
    assert (best.error, best.step, float(best.weights["weight"])) == (0.2, 2, 2.0)
    again = Best()
    again.load_state_dict(best.state_dict())
    assert again.step == 2 and torch.equal(again.weights["weight"], best.weights["weight"])


def test_the_front_is_what_no_other_beats() -> None:
    points = [(3.0, 0.1), (1.0, 0.5), (2.0, 0.5), (2.0, 0.3), (4.0, 0.2)]
    assert front(points) == [1, 3, 0]
    for k in range(len(points)):
        beaten = any(a <= points[k][0] and b <= points[k][1] and (a, b) != points[k] for a, b in points)
        assert (k in front(points)) is not beaten
