"""Checks of every method: config, untouched inputs, seeds, resuming."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from engram.core.settings import describe, make, name_of
from engram.engine import fit as fitting
from engram.engine.journal import Journal
from engram.engine.run import Run
from engram.testing.material import Material, contents, ensure, fingerprint, outcome


def check_config(method: Any, material: Material) -> None:
    """A method written out as plain JSON and made again is the same."""
    described = describe(method)
    again = describe(make(json.loads(json.dumps(described))))
    ensure(again == described, f"made again from its config it is another: {described} became {again}")


def check_untouched(method: Any, material: Material) -> None:
    """Tables and models that are handed over stay as they were."""
    request = material.request
    tables = [*(task.train for task in material.tasks), material.train, material.test, request.forget, request.retain]
    before = [fingerprint(contents(table)) for table in tables if table is not None]
    outcome(method, material, Run())
    after = [fingerprint(contents(table)) for table in tables if table is not None]
    ensure(after == before, f"{name_of(method)} changed the rows that it was given")


class Draws(Run):
    """A run that notes which seeds were drawn from."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.asked: list[tuple[torch.Generator, Tensor]] = []
        self.numbers: set[int] = set()

    def generator(self, *names: object) -> torch.Generator:
        found = super().generator(*names)
        self.asked.append((found, found.get_state()))
        return found

    def number(self, *names: object) -> int:
        found = super().number(*names)
        self.numbers.add(found)
        return found

    @property
    def drawn(self) -> set[int]:
        """The seeds of all draws that were made."""
        moved = {g.initial_seed() for g, start in self.asked if not torch.equal(g.get_state(), start)}
        return moved | self.numbers


def check_seeded(method: Any, material: Material) -> None:
    """The same seed gives the same bits, another one others, wherever the global random state stands and stays."""
    runs = [Draws(0), Draws(0), Draws(1)]
    found = []
    for state, run in enumerate(runs):
        with _global_state(state) as moved:
            found.append(outcome(method, material, run))
            ensure(not moved(), f"{name_of(method)} moved the global random state of {', '.join(moved())}")
    ensure(found[0] == found[1], f"{name_of(method)} gave other bits for the same seed, or drew from the global state")
    ensure(
        runs[0].drawn == runs[2].drawn or found[0] != found[2],
        f"{name_of(method)} draws from the run's seed, but another seed gave the same bits",
    )


@contextmanager
def _global_state(seed: int) -> Iterator[Callable[[], list[str]]]:
    """Plant the global random states, and put them back; yields which of them were moved."""
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    planted = _states()
    try:
        yield lambda: [name for name, state in _states().items() if state != planted[name]]
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])


def _states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (name, np.asarray(keys).tobytes(), *rest),
        "random": random.getstate(),
    }


class Fault(BaseException):
    """Stands for the end of the process."""


def check_resumes(method: Any, material: Material) -> None:
    """Killed before each entry of the journal, and started again each time, it ends with the same bits."""
    wanted = outcome(method, material, Run())
    with tempfile.TemporaryDirectory() as folder, _checkpoint_every_epoch():
        points = _stores(lambda: outcome(method, material, Run(Path(folder) / "whole")))
        for _ in range(points):
            with _fault_after(1):
                try:
                    outcome(method, material, Run(Path(folder) / "killed"))
                except Fault:
                    continue
                break
        found = outcome(method, material, Run(Path(folder) / "killed"))
    ensure(found == wanted, f"{name_of(method)} ended with other bits after {points} interruptions")


@contextmanager
def _checkpoint_every_epoch() -> Iterator[None]:
    with mock.patch.object(fitting, "CHECKPOINT_EVERY", -1.0), mock.patch.object(fitting, "WORTH_KEEPING", -1.0):
        yield


def _stores(act: Callable[[], object]) -> int:
    """How many entries a program journals."""
    with mock.patch.object(Journal, "store", autospec=True, side_effect=Journal.store) as store:
        act()
    return store.call_count


@contextmanager
def _fault_after(stores: int) -> Iterator[None]:
    """Let a program journal so many entries; at the next one it ends."""
    real, left = Journal.store, stores

    def store(self: Journal, *arguments: Any) -> None:
        nonlocal left
        if not left:
            raise Fault
        left -= 1
        real(self, *arguments)

    with mock.patch.object(Journal, "store", store):
        yield
