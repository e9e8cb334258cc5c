"""What most probes are tried on; see `planted`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.audit.planted import RECIPE, Anew, Nothing, random_labels

from engram.core.probe import Subject
from engram.core.request import Request
from engram.data.table import Table
from engram.engine.run import Run


@pytest.fixture(scope="session")
def run() -> Run:
    """One run for all probes, so that no model is trained twice."""
    return Run(seed=5)


@pytest.fixture(scope="session")
def memorised(split: tuple[Table, Table]) -> Subject:
    """A model that knows its 120 rows by heart, 50 of which it should forget; nothing has been done about it."""
    train, test = random_labels(split[0].take(range(120)), 1), random_labels(split[1].take(range(60)), 2)
    request = Request.of_records(train, train.ids[:50])
    assert request.forget is not None and request.retain is not None
    rows = {"forget": request.forget, "retain": request.retain, "test": test}
    model = RECIPE(train, 0)
    return Subject(model, before=model, request=request, rows=rows, recipe=RECIPE, forgetter=Nothing())


@pytest.fixture(scope="session")
def retrained(memorised: Subject) -> Subject:
    """The same request, carried out by one more retraining; and so is every model of a population."""
    return replace(memorised, model=RECIPE(memorised.rows["retain"], 99), forgetter=Anew())


@pytest.fixture
def numbers() -> Table:
    """30 rows of one value each, labelled with its double."""
    x = torch.linspace(-1, 1, 30).unsqueeze(1)
    return Table({"values": x}, 2 * x)
