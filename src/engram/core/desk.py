"""The erasure desk: directories and files in, directories out. What `engram forget`, `audit` and `prepare` do."""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import nn

from engram import catalogue
from engram.core import erasure
from engram.core.environment import environment
from engram.core.forgetter import Forgetter
from engram.core.learner import Forgetful, Learner
from engram.core.needs import Need, lacking, satisfied
from engram.core.persist import MODEL, is_learner, load_learner, save_learner
from engram.core.probe import labelled
from engram.core.reading import rows_for
from engram.core.request import Concept, Request
from engram.core.settings import describe, make, name_of
from engram.core.stored import (
    ACCOUNT,
    account_of,
    copy_beside,
    home_of,
    model_in,
    read_recipe,
    read_statistics,
    write_statistics,
)
from engram.core.verbs import automatic
from engram.data.table import Table
from engram.data.where import column_of
from engram.engine.predict import predict
from engram.engine.progress import Progress
from engram.engine.run import Run
from engram.errors import EngramError, nearest, unknown
from engram.files import new_directory, refuse_existing, sweep, write_atomic
from engram.models import io
from engram.models.guards import is_guard

FORMAT = 1
Account = dict[str, Any]


@dataclass(frozen=True)
class What:
    """What must be forgotten, as a command line names it: one of these."""

    ids: Path | None = None
    classes: tuple[str, ...] = ()
    where: str | None = None
    concept: str | None = None

    def request(self, table: Table, *, ignore_missing: bool = False) -> Request:
        """The request on the rows of a table. EngramError names ids, classes or columns that are not there."""
        given = [self.ids is not None, bool(self.classes), self.where is not None, self.concept is not None]
        if sum(given) != 1:
            raise EngramError("say what must be forgotten by one of --forget FILE, --classes, --where and --concept")
        if self.concept is not None:
            return Request(Concept(self.concept), None, table if len(table) else None)
        if self.classes:
            return Request.of_classes(table, tuple(_class(table, name) for name in self.classes))
        if self.where is not None:
            return Request.of_records(table, table.where(self.where).ids)
        return Request.of_records(table, _ids(self.ids or Path(), table, ignore_missing))

    def columns(self) -> dict[str, Any]:
        """What reading the rows has to keep for it."""
        name = column_of(self.where) if self.where is not None else "id"
        return {} if name in ("id", "label") else {"keep": (name,)}

    def words(self) -> dict[str, Any]:
        """How the request was put, without the ids of records."""
        if self.ids is not None:
            return {"records": "a list of ids"}
        return {
            k: v for k, v in {"classes": list(self.classes), "where": self.where, "concept": self.concept}.items() if v
        }


@dataclass(frozen=True)
class Choice:
    """The method that was taken, why, and the candidates: (name, what it lacks)."""

    method: Forgetter | None  # None: the learner's own
    name: str
    why: str
    candidates: tuple[tuple[str, str], ...]

    def lines(self) -> list[str]:
        """For the person who asked for "auto"."""
        listed = [f"  {name:<28} {lack or 'can be used'}" for name, lack in self.candidates]
        return ["candidates:", *listed, f"taken: {self.name}, {self.why}"]


@dataclass
class Desk:
    """One request on one model. `directory`: of a model or learner; `data`: the rows it was trained on, as far as they
    are at hand; `columns`: id, label, text, image, prompt. `ranking`: the order of "auto", if not the usual one."""

    directory: Path
    data: str
    what: What
    columns: Mapping[str, Any] = field(default_factory=dict)
    recipe: Path | None = None
    statistics: Path | None = None
    ranking: Path | None = None
    ignore_missing: bool = False
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        self.learner: Learner | None = None
        self.tasks = 0
        if is_learner(self.directory):
            self.learner, self.tasks = load_learner(self.directory)
            self.model = self.learner.model
            home = self.directory / MODEL
        else:
            self.model, home = io.load(self.directory), self.directory
        self.table = rows_for(home, self.model, self.data, **self.columns, **self.what.columns())
        at_hand = {
            Need.RECIPE: None if self.recipe is None else read_recipe(self.recipe, self.directory, self.table),
            Need.STATISTICS: None if self.statistics is None else read_statistics(self.statistics, self.model),
        }
        self.request = self.what.request(self.table, ignore_missing=self.ignore_missing).but(at_hand=at_hand)

    def choose(self, method: str | Mapping[str, Any]) -> Choice:
        """The method of a name, or by itself ("auto"): the learner's own exact forgetting, else the first in the order
        that can do with what is at hand. EngramError, naming what would be needed, if none can."""
        own = isinstance(self.learner, Forgetful)
        if method != "auto":
            made = make(method, wing="forget")
            if not isinstance(made, Forgetter):
                raise EngramError(f"{name_of(made)} is no forgetter; see engram methods --wing forget")
            if not _takes(made, self.request):
                raise EngramError(f"{name_of(made)} forgets records and classes; it cannot take a concept")
            made.check(self.request)
            return Choice(made, name_of(made), "as was asked for", ())
        have = self.request.have()
        order = automatic(self.request, self.ranking)
        made = [forgetter for name in order if _takes(forgetter := make(name), self.request)]
        if not made:
            raise EngramError("none of the usual methods takes a concept; name one with --method (engram methods)")
        lacks = [(name_of(m), "" if satisfied(m.needs, have) else f"lacks {lacking(m.needs, have)}") for m in made]
        if own and self.learner is not None:
            name = name_of(self.learner)
            exact = "exact: the same as never having learnt the rows" if self.learner.exact else "the learner's own way"
            return Choice(None, name, exact, ((name, ""), *lacks[:2]))
        fitting = [m for m, (_, lack) in zip(made, lacks, strict=True) if not lack]
        if not fitting:
            listed = "; ".join(f"{name} {lack}" for name, lack in lacks[:3])
            raise EngramError(f"no forgetter can do with what is at hand: {listed}; see engram methods --have …")
        why = "the first of the order that can be used"
        return Choice(fitting[0], name_of(fitting[0]), why, tuple(lacks[:3]))

    def is_known(self, held_out: str) -> None:
        """EngramError if the model finds the forget rows no likelier than rows of `held_out`, a source that it never
        saw: then there may be nothing to forget. Cost: a forward pass over both."""
        forget = self.request.forget
        if forget is None or not len(labelled(forget)):
            raise EngramError("without labelled forget rows nobody can tell whether the model knows them")
        home = home_of(self.directory)
        others = labelled(rows_for(home, self.model, held_out, **self.columns, **self.what.columns()))
        if not len(others):
            raise EngramError(f"{held_out} holds no labelled rows to compare with")
        run = Run(seed=self.seed, device=self.device)
        losses = (predict(self.model, table, "loss", run=run).double() for table in (labelled(forget), others))
        own, usual = (float(loss.mean()) for loss in losses)
        if not own < usual:
            raise EngramError(
                f"the loss on the forget rows ({own:.3g}) is not below that on rows never seen ({usual:.3g}): there "
                "may be nothing to forget; --force goes on"
            )

    def forget(
        self,
        choice: Choice,
        out: str | Path,
        *,
        resume: bool = False,
        ledger: Any = None,
        reason: str = "",
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Forget, and write the new model (or learner) to `out`, whole or not at all; its account, without ids.

        Finished phases are journaled in `OUT.work`, which is removed at the end; `resume` goes on from there. The
        ledger hears of each step once: its entries carry the request's ticket, a random number that `OUT.work` keeps.
        """
        target, work = Path(out), Path(f"{out}.work")
        if target.exists() and not (resume and work.exists()):
            done = f", and {work} is not there: that request was finished" if resume else ""
            raise EngramError(f"{target} exists{done}; choose another --out")
        if work.exists() and not resume:
            raise EngramError(f"{work} holds an interrupted request; go on with --resume, or delete it")
        run = Run(work, seed=self.seed, device=self.device, progress=progress)
        notes = _Notes(ledger, self, reason, self._claim(work, choice))
        if not target.exists():
            self._make(choice, target, run, notes)
        account = account_of(target)
        if account.get("ticket") != notes.ticket:
            raise EngramError(f"{target} exists, and is not what {work} was begun for; choose another --out")
        notes.holder(target, account)
        for dots in (".", ".."):  # half-written, and half-written in turn
            sweep(sorted(target.absolute().parent.glob(f"{dots}{glob.escape(target.name)}.*")))
        for finished in (work / "journal", work):  # the ticket goes last
            shutil.rmtree(finished, ignore_errors=True)
        return account

    def _make(self, choice: Choice, target: Path, run: Run, notes: _Notes) -> None:
        """Forget, and write the new model with its account."""
        result, exact, residue = self._forgotten(choice, run)
        account = run.phase("account", lambda: self._account(choice, result, exact, residue, run, notes))
        with new_directory(target) as fresh:
            self._write(result, fresh)
            (fresh / ACCOUNT).write_text(json.dumps(account, indent=1, ensure_ascii=False), encoding="utf-8")

    def _account(
        self, choice: Choice, result: nn.Module | Learner, exact: bool, residue: int, run: Run, notes: _Notes
    ) -> dict[str, Any]:
        """What was done, without ids, as it is written beside the model and told to the ledger."""
        account = {
            "format": FORMAT,
            "ticket": notes.ticket,
            "request": {**self.what.words(), "records": len(self.request.ids)},
            "method": describe(choice.method) if choice.method is not None else {"name": choice.name},
            "needed": sorted(self._needed(choice)),
            "exact": exact,
            "weights_hold_it": is_guard(result),
            "residue": residue,
            "before": io.digest(self.model),
            "cost": asdict(run.cost),
            "environment": environment(self.device),
        }
        lost: Mapping[int, float] = getattr(result, "lost", {}) if choice.method is None else {}
        if lost:  # a learner that forgets in its own way knows what that cost the classes that stay
            account["lost"] = {str(self.table.names.get(c, c)): round(share, 4) for c, share in sorted(lost.items())}
        return account | notes.action(account)

    def _claim(self, work: Path, choice: Choice) -> str:
        """The journal belongs to this request: its ticket. EngramError if it belongs to another."""
        method = choice.name if choice.method is None else describe(choice.method)
        mine = json.dumps([io.digest(self.model), self.table.digest, method, list(self.request.ids), self.seed])
        file = work / "request.sha256"
        ticket = file.read_text(errors="replace").partition(" ")[0] if file.exists() else uuid4().hex
        claim = f"{ticket} {_sha256(mine + ticket)}"
        if file.exists() and file.read_text(errors="replace") != claim:
            raise EngramError(f"{work} was begun for another request, model or method; delete it, or repeat that one")
        write_atomic(file, claim)
        return ticket

    def _forgotten(self, choice: Choice, run: Run) -> tuple[nn.Module | Learner, bool, int]:
        """The new model or learner, whether that is exact, and how many records some trace still holds."""
        if self.learner is not None:
            done = erasure.forget(self.learner, self.request, choice.method, run)
            return self.learner, done.exact, len(done.residue)
        assert choice.method is not None
        result = choice.method.forget(self.model, self.request, run)
        return result, choice.method.exact, 0 if choice.method.exact else len(self.request.ids)

    def _needed(self, choice: Choice) -> Iterable[str]:
        have = self.request.have()
        wanted = choice.method.needs if choice.method is not None else ()
        return next((map(str, need) for need in wanted if need <= have), ())

    def _write(self, result: nn.Module | Learner, fresh: Path) -> None:
        if isinstance(result, Learner):
            save_learner(result, fresh, tasks=self.tasks)
        else:
            io.save(result, fresh)
        copy_beside(self.directory, fresh)


def prepare(
    directory: Path,
    data: str,
    method: str | Mapping[str, Any],
    out: str | Path,
    columns: Mapping[str, Any],
    seed: int = 0,
    device: str = "cpu",
    ledger: Any = None,
) -> tuple[list[str], Table]:
    """Store what lets `method` forget later with the forget rows alone; the kinds of statistics, and their rows. The
    ledger hears of them before they stand there."""
    made = make(method, wing="forget")
    if not hasattr(made, "prepare"):
        able = [m.name for m in catalogue.methods() if any("statistics" in need for need in m.needs)]
        raise EngramError(f"{name_of(made)} has nothing to prepare; {', '.join(able)} have")
    refuse_existing(out)
    model = model_in(directory)
    table = rows_for(home_of(directory), model, data, **columns)
    found = made.prepare(model, table, Run(seed=seed, device=device))
    if ledger is not None:
        ledger.add_holder("statistics", out, table.ids)
    write_statistics(out, found, model=model, method=describe(made), rows=len(table))
    return sorted(found), table


class _Notes:
    """What the ledger is told, if there is one."""

    def __init__(self, ledger: Any, desk: Desk, reason: str, ticket: str) -> None:
        self.ledger, self.desk, self.reason, self.ticket = ledger, desk, reason, ticket
        self.parent = None
        if ledger is not None:
            weights = io.digest(desk.model)
            self.parent = ledger.holder_of(desk.directory, weights) or ledger.add_holder(
                self._kind, desk.directory, desk.table.ids, weights=weights, source="as told by its owner"
            )

    @property
    def _kind(self) -> str:
        return "model" if self.desk.learner is None else "learner"

    def action(self, account: Mapping[str, Any]) -> dict[str, Any]:
        if self.ledger is None:
            return {}
        request = self._noted("request") or self.ledger.add_request(
            self.desk.request.ids, what=self.desk.what.words(), reason=self.reason, ticket=self.ticket
        )
        kept = {key: account[key] for key in ("method", "exact", "residue", "needed", "weights_hold_it", "cost")}
        entry = self._noted("action") or self.ledger.add_action(request.number, **kept, ticket=self.ticket)
        return {"ledger": {"request": request.number, "action": entry.number, "hash": entry.hash}}

    def holder(self, out: Path, account: Mapping[str, Any]) -> None:
        if self.ledger is None or self.parent is None or self._noted("holder"):
            return
        if "ledger" not in account:
            raise EngramError("the request was begun without a ledger; resume it without one")
        weights, action = io.digest(model_in(out)), account["ledger"]["action"]
        more = {"parent": self.parent.number, "action": action, "ticket": self.ticket}
        self.ledger.add_holder(self._kind, out, (), weights=weights, **more)

    def _noted(self, kind: str) -> Any:
        """The entry of this kind that was written for this request before it was interrupted."""
        return next((e for e in self.ledger.entries(kind) if e.body.get("ticket") == self.ticket), None)


def _takes(method: Forgetter, request: Request) -> bool:
    """A concept is for methods that ask for one."""
    return not isinstance(request.what, Concept) or any(Need.CONCEPT in need for need in method.needs)


def _ids(file: Path, table: Table, ignore_missing: bool) -> tuple[str, ...]:
    """One id a line; blank lines do not count, and an id that comes twice counts once."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise EngramError(f"the list of ids {file} cannot be read: {error}") from error
    named = tuple(dict.fromkeys(filter(None, lines)))
    absent = [id for id in named if id not in table.positions]
    if absent and not ignore_missing:
        shown = ", ".join(absent[:5])
        near = nearest(absent[0], table.ids)
        raise EngramError(
            f"{len(absent)} of {len(named)} ids are not in the data: {shown}{' …' if len(absent) > 5 else ''}; "
            f"--ignore-missing goes on without them{f' (did you mean {near!r}?)' if near is not None else ''}"
        )
    return tuple(id for id in named if id in table.positions)


def _class(table: Table, name: str) -> int:
    by_name = {text: number for number, text in table.names.items()}
    if name in by_name:
        return by_name[name]
    if name.lstrip("-").isdigit() and int(name) in table.classes:
        return int(name)
    raise unknown("class", name, [*by_name, *map(str, table.classes)])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
