"""One thread per process, no network, and no test that moves the global random state."""

from __future__ import annotations

import os

# Before torch and numpy are imported, and inherited by the processes that tests start.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    MPLBACKEND="Agg",
)

import importlib
import random
import shutil
from collections.abc import Callable, Iterator

import hypothesis
import numpy as np
import pytest
import torch

from engram.data.table import Table

torch.set_num_threads(1)
for library in ("sklearn.model_selection", "engram.core.running", "engram.report.page"):
    importlib.import_module(library)  # some draw a random number as they are imported: not in the middle of a test

hypothesis.settings.register_profile("engram", max_examples=25, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "engram")

States = dict[str, object]


def random_states() -> States:
    """The global random states, in a form that can be compared."""
    _, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (np.asarray(keys).tobytes(), *rest),
        "random": random.getstate(),
    }


def moved(before: States, after: States) -> list[str]:
    """The libraries whose global random state differs."""
    return [name for name, state in before.items() if after[name] != state]


@pytest.fixture(autouse=True)
def global_random_state_stays() -> Iterator[None]:
    """Fail a test that drew from a global generator or seeded one."""
    before = random_states()
    yield
    libraries = moved(before, random_states())
    if libraries:
        pytest.fail(f"the test moved the global random state of {', '.join(libraries)}: draw from an own generator")


@pytest.fixture
def moved_by() -> Callable[[Callable[[], object]], list[str]]:
    """moved_by(act): the libraries whose global random state `act` moves; it is put back afterwards."""

    def measure(act: Callable[[], object]) -> list[str]:
        kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
        before = random_states()
        try:
            act()
            return moved(before, random_states())
        finally:
            torch.set_rng_state(kept[0])
            np.random.set_state(kept[1])
            random.setstate(kept[2])

    return measure


def _lacking() -> dict[str, str]:
    """The markers whose tests cannot run here, with the reason."""
    lacking = {}
    if not torch.cuda.is_available():
        lacking["gpu"] = "there is no CUDA device"
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        lacking["browser"] = "Chromium is not installed"
    return lacking


def _together(items: list[pytest.Item]) -> None:
    """Put the experiments of a paper behind the module that proves what must hold of it: in one process, what both
    train is trained once."""
    last = {item.path: k for k, item in enumerate(items)}
    home = {
        slug: last[item.path] for item in items for slug, _ in getattr(getattr(item, "function", None), "__holds__", ())
    }

    def place(k: int) -> int:
        params = items[k].callspec.params if hasattr(items[k], "callspec") else {}
        return home.get(params.get("slug"), k)

    items[:] = [items[k] for k in sorted(range(len(items)), key=place)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run; keep what belongs to one paper together."""
    _together(items)
    lacking = _lacking()
    for item in items:
        for name in lacking.keys() & {marker.name for marker in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=lacking[name]))


@pytest.fixture(scope="session")
def split() -> tuple[Table, Table]:
    """Handwritten digits: 1257 training and 540 test rows, pixels / 16."""
    from engram.reproduce.digits import digits

    return digits()
