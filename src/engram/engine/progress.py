"""Progress of long work: on a terminal, or nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """What a run tells of its progress to."""

    def task(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A block of `total` steps under the name `what`."""

    def say(self, text: str) -> None:
        """One line for the person who waits."""


class Silent:
    """Says nothing."""

    @contextmanager
    def task(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda done: None

    def say(self, text: str) -> None:
        return None


class Terminal:
    """One line of progress on standard error through rich; plain lines where that is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self._live: list[str] = []

    @contextmanager
    def task(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        if self._live or not self.console.is_terminal:  # one bar at a time; inner work only moves the outer bar
            yield lambda done: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            self._live.append(what)
            try:
                yield lambda done: bar.advance(task, done)
            finally:
                self._live.pop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)
