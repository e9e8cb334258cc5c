"""Retrieval across encoders: planted spaces of which the answers are known, galleries, widths, references, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from engram.audit.compatibility import Compatibility
from engram.core.finding import Finding, Verdict
from engram.core.probe import Subject
from engram.data.table import Table
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.encoders import Identity
from engram.models.heads import LinearHead
from engram.models.output import Output
from engram.models.predictor import Predictor
from engram.stats.intervals import mean, proportion

WIDTH = 6


class Turned(Identity):
    """Rows times a matrix [WIDTH, d]."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(WIDTH)
        self.register_buffer("matrix", matrix)
        self.width = matrix.shape[1]

    def forward(self, values: Tensor | None = None, pixel_values: Tensor | None = None) -> Output:
        assert values is not None and isinstance(self.matrix, Tensor)
        return Output(pooler_output=values @ self.matrix)


def encoder(matrix: Tensor) -> nn.Module:
    return Predictor(Turned(matrix), LinearHead(matrix.shape[1]))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def rows() -> Table:
    """36 rows of three classes, each about a direction of its own, with noise."""
    labels = torch.arange(36) % 3
    return Table({"values": torch.eye(WIDTH)[labels] + 0.3 * drawn(0, 36, WIDTH)}, labels)


SAME = torch.eye(WIDTH)
SWAPPED = torch.eye(WIDTH)[[1, 2, 0, 3, 4, 5]]  # the directions of the classes in another order


def examined(model: nn.Module, before: nn.Module, rows: Table, probe: Any = None, **more: Any) -> dict[str, Finding]:
    tables = {"test": rows, **more.pop("tables", {})}
    subject = Subject(model, before=before, rows=tables, **more)
    return {finding.name: finding for finding in (probe or Compatibility()).examine(subject, Run())}


def precision(x: Tensor, y: Tensor, labels: Tensor) -> list[float]:
    """Average precision of each row, by scikit-learn, without the row itself."""
    x, y = (v / v.norm(dim=1, keepdim=True) for v in (x.double(), y.double()))
    others = [[j for j in range(len(y)) if j != i] for i in range(len(x))]
    return [
        average_precision_score((labels[rest] == labels[i]).numpy(), (x[i] @ y[rest].T).numpy())
        for i, rest in enumerate(others)
    ]


def test_all_three_tests_by_an_independent_formulation(rows: Table) -> None:
    old, new = drawn(1, WIDTH, WIDTH), torch.eye(WIDTH) + 0.3 * drawn(2, WIDTH, WIDTH)
    found = examined(encoder(new), encoder(old), rows)
    x, y = rows.inputs["values"] @ new, rows.inputs["values"] @ old
    assert rows.labels is not None
    for name, pair in {"old/old": (y, y), "new/old": (x, y), "new/new": (x, x)}.items():
        known = precision(*pair, rows.labels)
        finding = found[f"{name}: mean average precision"]
        assert finding.value == pytest.approx(sum(known) / 36) and finding.n == 36
        assert finding.interval == pytest.approx((mean(known).low, mean(known).high))
    apart = mean([a - b for a, b in zip(precision(x, y, rows.labels), precision(y, y, rows.labels), strict=True)])
    gain = found["new/old above old/old"]
    assert (gain.value, *gain.interval) == pytest.approx((apart.value, apart.low, apart.high))  # type: ignore[misc]
    assert all(finding.verdict == Verdict.NONE for finding in found.values())


def test_the_share_of_queries_that_are_right_at_once(rows: Table) -> None:
    found = examined(encoder(SAME), encoder(SAME), rows)
    x = rows.inputs["values"] / rows.inputs["values"].norm(dim=1, keepdim=True)
    near = (x @ x.T - 9 * torch.eye(36)).argmax(1)
    right = int((rows.labels[near] == rows.labels).sum())  # type: ignore[index]
    finding = found["new/old: right among the first 1"]
    wanted = proportion(right, 36)
    assert (finding.value, finding.interval) == (right / 36, (wanted.low, wanted.high))
    assert finding.value <= found["new/old: right among the first 5"].value


def test_an_encoder_is_compatible_with_itself_and_gains_nothing(rows: Table) -> None:
    found = examined(encoder(SAME), encoder(3.0 * SAME), rows)
    assert found["new/old above old/old"].value == pytest.approx(0)
    assert found["new/old: mean average precision"].value == found["new/new: mean average precision"].value


def test_as_good_an_encoder_with_its_classes_elsewhere_is_not_compatible(rows: Table) -> None:
    found = examined(encoder(SWAPPED), encoder(SAME), rows)
    assert found["new/new: mean average precision"].value == pytest.approx(
        found["old/old: mean average precision"].value
    )
    gain = found["new/old above old/old"]
    assert gain.value < -0.3 and gain.interval is not None and gain.interval[1] < 0


def test_wider_vectors_are_cut_and_not_brought_to_length_again(rows: Table) -> None:
    """A new encoder that holds the old space first and noise after it is searched as the old one is."""
    noise = torch.cat([SAME, drawn(5, WIDTH, 3)], 1)
    found = examined(encoder(noise), encoder(SAME), rows)
    assert found["new/old above old/old"].value == pytest.approx(0)
    back = examined(encoder(SAME), encoder(noise), rows)  # a stored vector of small share counts little
    x = rows.inputs["values"]
    stored = torch.nn.functional.normalize(x @ noise, dim=1)[:, :WIDTH]
    order = torch.nn.functional.normalize(x, dim=1) @ stored.T
    assert rows.labels is not None
    known = [
        average_precision_score(
            (rows.labels[[j for j in range(36) if j != i]] == rows.labels[i]).numpy(),
            order[i, [j for j in range(36) if j != i]].numpy(),
        )
        for i in range(36)
    ]
    assert back["new/old: mean average precision"].value == pytest.approx(sum(known) / 36, abs=1e-6)


def test_a_gallery_of_its_own(rows: Table) -> None:
    """Rows that are no queries are searched whole; a query is left out if its class is not among them."""
    queries, gallery = rows.take(range(12)), rows.take(range(12, 36)).of_classes((0, 1))
    found = examined(encoder(SAME), encoder(SAME), queries, tables={"gallery": gallery})
    finding = found["new/old: mean average precision"]
    assert finding.n == 8
    alone = examined(encoder(SAME), encoder(SWAPPED), queries)
    among = examined(encoder(SAME), encoder(SWAPPED), queries, tables={"gallery": queries.take(range(11, -1, -1))})
    for name, finding_of in alone.items():  # known by their ids, wherever they stand
        assert among[name].value == pytest.approx(finding_of.value)


def test_gain_and_price_beside_an_independent_model(rows: Table) -> None:
    blurred = SAME.clone()
    blurred[:, 2] *= 0.1
    half = SAME.clone()
    half[:, 2] *= 0.4
    found = examined(encoder(half), encoder(blurred), rows, references={"independent": encoder(SAME)})
    value = {name: finding.value for name, finding in found.items()}
    of = {name: value[f"{name}: mean average precision"] for name in ("old/old", "new/old", "new/new")}
    best = examined(encoder(SAME), encoder(SAME), rows)["new/new: mean average precision"].value
    assert best > of["new/new"] > of["old/old"]
    assert value["price of compatibility"] == pytest.approx(best - of["new/new"])
    assert value["update gain"] == pytest.approx((of["new/old"] - of["old/old"]) / (best - of["old/old"]))
    nothing = examined(encoder(half), encoder(SAME), rows, references={"independent": encoder(blurred)})
    assert "update gain" not in nothing and nothing["price of compatibility"].value < 0


def test_a_limit_looks_at_the_same_rows_with_every_encoder(rows: Table) -> None:
    found = examined(encoder(SWAPPED), encoder(SAME), rows, Compatibility(limit=20))
    assert found["new/new: mean average precision"].n == 20
    assert found["new/new: mean average precision"].value == found["old/old: mean average precision"].value
    labels = torch.as_tensor(rows.labels).clone()
    labels[:6] = -1
    unlabelled = examined(encoder(SAME), encoder(SAME), rows.with_labels(labels))
    assert unlabelled["new/new: mean average precision"].n == 30


def test_rows_without_classes_are_refused(rows: Table, numbers: Table) -> None:
    model = encoder(SAME)
    for table in (numbers, rows.unlabelled(), rows.take([0])):
        with pytest.raises(EngramError, match="class labels"):
            examined(model, model, table)
    with pytest.raises(EngramError, match="before"):
        Compatibility().examine(Subject(model, rows={"test": rows}))
    with pytest.raises(EngramError, match="nothing to rank"):
        examined(model, model, rows.take([0, 1, 2]))
    assert all(math.isfinite(f.value) for f in examined(model, model, rows.take([0, 3, 1])).values())
