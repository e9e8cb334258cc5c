"""What most tests of forgetters begin with; a file with another model has its own."""

from __future__ import annotations

import pytest
from tests.forget.digit_three import RECIPE, Split
from torch import nn

from engram.core.request import Request


@pytest.fixture(scope="module")
def model(split: Split) -> nn.Module:
    return RECIPE(split[0], 0)


@pytest.fixture(scope="module")
def request_of_three(split: Split) -> Request:
    return Request.of_classes(split[0], (3,))
