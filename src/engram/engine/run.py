"""A run: the directory where work happens, its seed, its journal of finished phases, its cost.

Resume is re-execution. The program runs again from the top; `phase` hands back what was already computed. Nothing
else is needed for the same bits to come out, because every random draw is a function of (seed, scope, name) and of no
other draw.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed as dist
from torch import nn

from engram.engine.cost import Cost
from engram.engine.journal import Journal
from engram.engine.memory import reuse_freed
from engram.engine.progress import Progress, Silent
from engram.errors import EngramError, unknown
from engram.models.seeding import seeded
from engram.stats.seeds import derive, generator

T = TypeVar("T")
PRECISIONS = ("float32", "bfloat16")


class Run:
    """Seeds, journal, device and cost of one piece of work.

    `directory`: where phases are journaled; None keeps them in memory, for tests and notebooks. `seed`: all draws
    follow from it. `device`: where models are trained. `precision`: "float32" or "bfloat16" (autocast). `watch`: is
    called after every epoch of every training with the open scopes, the number of epochs done and the model, to measure
    it on its way; it must leave the model as it is.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        seed: int = 0,
        device: str = "cpu",
        precision: str = "float32",
        progress: Progress | None = None,
        watch: Callable[[tuple[str, ...], int, nn.Module], None] | None = None,
    ) -> None:
        reuse_freed()
        self.directory = Path(directory) if directory is not None else None
        self.seed = seed
        self.device = _device(device)
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        self.precision = precision
        self.report: Progress = progress or Silent()
        self.watch = watch
        self.journal = Journal(self.directory / "journal" if self.directory else None)
        self.cost = Cost()
        self._path: tuple[str, ...] = ()
        self._root = 0  # draws are named by the path from here on
        self._seen: list[Counter[str]] = [Counter()]

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, number of processes)."""
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1

    @property
    def path(self) -> tuple[str, ...]:
        """The names of the scopes that are open."""
        return self._path

    @contextmanager
    def scope(self, *names: object) -> Iterator[None]:
        """Give the draws and phases of a block a name of their own; the k-th block of a name becomes `name#k`."""
        name = "/".join(map(str, names))
        self._seen[-1][name] += 1
        count = self._seen[-1][name]
        self._path = (*self._path, name if count == 1 else f"{name}#{count}")
        self._seen.append(Counter())
        try:
            yield
        finally:
            self._path = self._path[:-1]
            self._seen.pop()

    def phase(self, name: str, make: Callable[[], T]) -> T:
        """What `make()` returns, computed once: a resumed run loads it.

        Values: tensors, modules (through `engram.models.pack`), numbers, strings, None, and lists, tuples, dicts of
        them. What was journaled inside `make` is deleted once the phase is finished; its cost counts again on resume.
        """
        with self.scope(name):
            found = self.journal.load(self._path)
            if found is not None:
                value, cost = found
                self.cost.add(Cost.of(cost))
                return value
            before = self.cost.copy()
            value = make()
            if self.directory is None or self.shard[0] == 0:  # processes share the directory; one of them writes
                self.journal.store(self._path, value, asdict(self.cost.since(before)))
            return value

    def share(self, name: str, make: Callable[[], T]) -> T:
        """A phase that stands beside all scopes: computed once per run, whoever asks for it first.

        The name has to say everything that the value depends on. While `make` works, this run's scope is that of the
        name: draws do not depend on who asked, and the scopes that are open here count no block of it.
        """
        here = self._path, self._root, self._seen
        self._path, self._root, self._seen = ("shared",), 0, [Counter()]
        try:
            return self.phase(name, make)
        finally:
            self._path, self._root, self._seen = here

    def has_shared(self, name: str) -> bool:
        """Whether `share` has computed the value of a name."""
        return self.journal.has(("shared", name))

    def generator(self, *names: object) -> torch.Generator:
        """The random generator of a name: the same stream from its start, each time it is asked for."""
        return generator(self.seed, *self._path[self._root :], *names)

    def number(self, *names: object) -> int:
        """A seed in [0, 2**63) for libraries that want a number."""
        return derive(self.seed, *self._path[self._root :], *names)

    def seeded(self, *names: object) -> AbstractContextManager[None]:
        """Run a block (dropout, weight initialisation) under a global generator of its own, put back afterwards."""
        return seeded(self.generator(*names))

    def autocast(self) -> AbstractContextManager[None]:
        """Compute a block in this run's precision: in bfloat16 where that is safe, or as it stands."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show progress over `total` steps; the block calls the handed function with how many more are done."""
        with self.report.task(what, total) as advance:
            yield advance

    def with_seed(self, seed: int) -> Run:
        """This run as seen under another seed: the same directory, device and cost; draws as in a run of that seed
        that has just begun, whatever scopes are open here."""
        twin = copy.copy(self)
        twin.seed = seed
        twin._path = (*self._path, f"seed={seed}")
        twin._root = len(twin._path)
        twin._seen = [Counter()]
        return twin

    def write(self, name: str, content: dict[str, object] | list[object]) -> None:
        """Put a JSON file into the run's directory, whole or not at all; nothing for a run in memory."""
        from engram.files import write_atomic

        if self.directory is not None:
            write_atomic(self.directory / name, json.dumps(content, indent=1, default=str) + "\n")


def _device(name: str) -> torch.device:
    """The device of a name. EngramError for one that torch does not know or that is not there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise EngramError(f"the device {name!r} cannot be used here, say cpu: {why}") from error
    return device
