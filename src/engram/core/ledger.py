"""The ledger: which records went into which model, which requests came, what was done, what was found.

An append-only list of entries, each with the hash of the one before, and a membership table that says which holder (a
model, learner, cache, checkpoint, shadow model or prepared statistics) learnt which record. A record is known by a
keyed hash of its id alone; the key lies beside the ledger, never in it. Importing this imports no torch.

What a chain of hashes can show: any entry that was changed, removed or put in between. Whoever may write the file can
also compute a whole new chain; so keep the hash of the last entry (certificates hold one) somewhere else, and give it
to `verify`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from engram.errors import EngramError
from engram.files import write_atomic
from engram.stats import bits

try:
    import sqlalchemy as sa
except ImportError as error:  # pragma: no cover
    raise EngramError("the ledger needs SQLAlchemy: pip install 'engram[service]'") from error

SCHEMA = 1
KEY_BYTES = 16  # of a record's keyed hash
HOLDERS = ("model", "learner", "cache", "checkpoint", "shadow", "statistics")
START = "0" * 64  # what stands before the first entry

_tables = sa.MetaData()
_meta = sa.Table("meta", _tables, sa.Column("name", sa.String(40), primary_key=True), sa.Column("value", sa.Text))
_entry = sa.Table(
    "entry",
    _tables,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("time", sa.String(40), nullable=False),
    sa.Column("kind", sa.String(40), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("previous", sa.String(64), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
)
_record = sa.Table(
    "record",
    _tables,
    sa.Column("key", sa.LargeBinary, primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    sqlite_with_rowid=False,
)
_membership = sa.Table(
    "membership",
    _tables,
    sa.Column("chunk", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("entry", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("role", sa.String(10), primary_key=True),
    sa.Column("bits", sa.LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)
LEARNT, FORGOTTEN, REQUESTED = "learnt", "forgotten", "requested"


@dataclass(frozen=True)
class Entry:
    """One row of the ledger."""

    number: int
    time: str
    kind: str
    body: dict[str, Any]
    previous: str
    hash: str


@dataclass(frozen=True)
class Holding:
    """Something that learnt a record. `standing`: its files are still there, and no entry says that it is gone.
    `forgotten`: None, or the method and entry by which it was forgotten approximately."""

    entry: int
    what: str
    path: str
    standing: bool
    forgotten: str | None


class Ledger:
    """`place`: a file (SQLite), or the URL of a database. `key`: the file of the key; left out, `PLACE.key` beside a
    file, `engram-ledger.key` in the working directory for a URL. A new ledger makes one, readable by its owner alone.

    Writers wait for one another. EngramError: a ledger of a newer schema, another ledger's key, a database that cannot
    be reached.
    """

    def __init__(self, place: str | Path = "ledger.sqlite", key: str | Path | None = None) -> None:
        self.place = str(place)
        url = self.place if "://" in self.place else f"sqlite:///{Path(self.place).absolute()}"
        file = None if "://" in self.place else Path(self.place)
        self.key_file = Path(key) if key else Path(f"{file}.key") if file else Path("engram-ledger.key")
        if file is not None:
            _refuse_other_files(file)
        if file is not None and not file.exists() and self.key_file.exists():
            self._read_key()  # before a ledger is begun with it
        self._engine = _engine(url)
        self._open()

    # Writing

    def add(self, kind: str, body: Mapping[str, Any]) -> Entry:
        """Append an entry: plain data, no ids of records and no personal data."""
        with self._writing() as db:
            return self._append(db, kind, dict(body))

    def add_holder(
        self,
        what: str,
        path: str | Path,
        ids: Iterable[str],
        *,
        weights: str | None = None,
        parent: int | None = None,
        action: int | None = None,
        **more: Any,
    ) -> Entry:
        """Note that something at `path` learnt the records `ids`, and what its `parent` (an entry) had learnt.

        `action`: the entry of the forgetting it comes from: what that took out exactly is not learnt any more; what it
        took out approximately is, and is said to be forgotten.
        """
        if what not in HOLDERS:
            raise EngramError(f"{what!r} holds no records; a holder is one of {', '.join(HOLDERS)}")
        with self._writing() as db:
            learnt, new = self._numbers(db, ids)
            forgotten: set[int] = set()
            if parent is not None:
                self._get(db, parent)
                learnt |= self._members(db, parent, LEARNT)
                forgotten |= self._members(db, parent, FORGOTTEN)
            if action is not None:
                done = self._get(db, action).body
                gone = self._members(db, done["request"], REQUESTED) & learnt
                learnt, forgotten = (learnt - gone, forgotten) if done["exact"] else (learnt, forgotten | gone)
            body = {
                "what": what,
                "path": str(Path(path).absolute()),
                "weights": weights,
                "parent": parent,
                "action": action,
                "records": len(learnt),
                **new,
                **more,
            }
            return self._append(db, "holder", body, {LEARNT: learnt, FORGOTTEN: forgotten & learnt})

    def add_request(self, ids: Iterable[str], *, what: Mapping[str, Any], reason: str = "", **more: Any) -> Entry:
        """Note a request to forget. `what`: how it was put, in words without personal data. `reason`: free text, kept
        as it is for ever: names do not belong in it."""
        with self._writing() as db:
            members, new = self._numbers(db, ids)
            body = {"what": dict(what), "records": len(members), "reason": reason, **new, **more}
            return self._append(db, "request", body, {REQUESTED: members})

    def add_action(self, request: int, *, method: Mapping[str, Any], exact: bool, residue: int, **more: Any) -> Entry:
        """Note what was done about a request: the method with its settings, how many records some trace still holds."""
        body = {"request": request, "method": dict(method), "exact": exact, "residue": residue, **more}
        return self.add("action", body)

    def new_key(self) -> Entry:
        """Begin a new key: records that are known under the old one can never be linked to an id again."""
        write_key(self.key_file)
        with self._writing() as db:
            self._set(db, "key", self._check())
            return self._append(db, "new key", {})

    # Reading

    def entries(self, kind: str | None = None) -> list[Entry]:
        """All entries in order, or those of a kind."""
        query = sa.select(_entry).order_by(_entry.c.number)
        with self._reading() as db:
            return [_as_entry(row) for row in db.execute(query if kind is None else query.where(_entry.c.kind == kind))]

    def get(self, number: int) -> Entry:
        """The entry of a number."""
        with self._reading() as db:
            return self._get(db, number)

    def holder_of(self, path: str | Path, weights: str | None = None) -> Entry | None:
        """The last holder that was noted at a path; with the digest of the weights that stand there, the last that had
        them, at this path or else at another (a model that was moved or copied)."""
        there = str(Path(path).absolute())
        holders = self.entries("holder")
        if weights is not None:
            holders = [entry for entry in holders if entry.body.get("weights") == weights]
        here = [entry for entry in holders if entry.body.get("path") == there]
        found = here or (holders if weights is not None else [])
        return found[-1] if found else None

    def where(self, id: str) -> list[Holding]:
        """What learnt this record: one look at the record, one at the piece of every membership that it falls into.
        Trust in the answer rests on `verify`."""
        with self._reading() as db:
            key = self._key(db)
            number = db.execute(sa.select(_record.c.number).where(_record.c.key == _keyed(key, id))).scalar()
            if number is None:
                return []
            query = sa.select(_membership.c.entry, _membership.c.role, _membership.c.bits)
            rows = db.execute(query.where(_membership.c.chunk == number // bits.CHUNK))
            held = {(entry, role) for entry, role, piece in rows if bits.has(piece, number)}
            holders = sorted(entry for entry, role in held if role == LEARNT)
            gone = self._gone(db)
            return [self._holding(db, entry, held, gone) for entry in holders]

    def purge(self, id: str, *, models: bool = False) -> list[Holding]:
        """Delete what learnt a record and still stands: caches, checkpoints, shadow models and statistics, and with
        `models` the models and learners too, which are flagged otherwise. Returns what was deleted or flagged."""
        found = [holding for holding in self.where(id) if holding.standing]
        for holding in found:
            delete = models or holding.what not in ("model", "learner")
            if delete:
                _delete(Path(holding.path))
            self.add("gone" if delete else "flagged", {"holder": holding.entry, "path": holding.path})
        return found

    def verify(self, head: str | None = None) -> Entry | None:
        """Compute the chain anew; the last entry. EngramError names the first entry that was changed, removed or put
        in, or the memberships and records that were. `head`: the hash of an entry that is known from elsewhere; it must
        be there. Cost: one pass over the whole ledger."""
        previous, last, seen = START, None, head is None
        entries = self.entries()
        for expected, entry in enumerate(entries, 1):
            self._verify(entry, expected, previous)
            previous, last, seen = entry.hash, entry, seen or entry.hash == head
        with self._reading() as db:
            count, end = (self._value(db, name) for name in ("count", "head"))
            self._verify_records(db, entries)
        found = last.number if last else 0
        if count != str(found) or end != previous:
            raise EngramError(f"the ledger ends at entry {found} of {count}: the last entries were removed or put in")
        if not seen:
            raise EngramError(f"no entry of the ledger has the hash {head}: it is another ledger, or was written anew")
        return last

    def export(self) -> Iterator[str]:
        """Every entry as a line of JSON."""
        return (json.dumps(vars(entry), ensure_ascii=False, sort_keys=True) for entry in self.entries())

    # Inside

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self._told(), self._engine.connect() as db:
            yield db

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A database that refuses, and a file that was damaged, end in a sentence."""
        try:
            yield
        except EngramError:
            raise
        except sa.exc.SQLAlchemyError as error:
            raise EngramError(f"the ledger {self.place} cannot be opened, read or written: {_reason(error)}") from error
        except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
            raise EngramError(f"the ledger {self.place} is damaged ({error}); bring it back from a copy") from error

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """One writer at a time, all or nothing."""
        with self._told(), self._engine.connect().execution_options(writes=True) as db, db.begin():
            if db.dialect.name == "postgresql":
                db.execute(sa.text("SELECT pg_advisory_xact_lock(20110)"))
            yield db

    def _open(self) -> None:
        with self._reading() as db:
            there = sa.inspect(db).has_table("meta")
            found = int(self._value(db, "schema") or 0) if there else SCHEMA
        if found > SCHEMA:
            raise EngramError(f"the ledger {self.place} has schema {found}; this version reads schema {SCHEMA}")
        if there:
            return
        with self._writing() as db:
            if sa.inspect(db).has_table("meta"):  # another process was first
                return
            _tables.create_all(db)
            if not self.key_file.exists():
                write_key(self.key_file)
            start = {"schema": SCHEMA, "count": 0, "head": START, "records": 0, "key": self._check()}
            db.execute(_meta.insert(), [{"name": name, "value": str(value)} for name, value in start.items()])

    def check_key(self) -> None:
        """EngramError if the key is missing or another ledger's: without it no record can be noted or looked up."""
        with self._reading() as db:
            self._key(db)

    def _read_key(self) -> bytes:
        try:
            return bytes.fromhex(self.key_file.read_text().strip())
        except (OSError, ValueError) as error:
            raise EngramError(
                f"the key of the ledger, {self.key_file}, cannot be read ({error}), and without it no record can be "
                "looked up; `engram ledger new-key` begins a new one and gives the records so far up"
            ) from error

    def _key(self, db: sa.Connection) -> bytes:
        key = self._read_key()
        if not hmac.compare_digest(str(self._value(db, "key")), _check_of(key)):
            raise EngramError(f"{self.key_file} is the key of another ledger than {self.place}")
        return key

    def _check(self) -> str:
        return _check_of(self._read_key())

    def _value(self, db: sa.Connection, name: str) -> str | None:
        return db.execute(sa.select(_meta.c.value).where(_meta.c.name == name)).scalar()

    def _set(self, db: sa.Connection, name: str, value: object) -> None:
        db.execute(_meta.update().where(_meta.c.name == name).values(value=str(value)))

    def _append(
        self, db: sa.Connection, kind: str, body: dict[str, Any], members: Mapping[str, set[int]] | None = None
    ) -> Entry:
        number = int(self._value(db, "count") or 0) + 1
        pieces = {role: bits.pieces(numbers) for role, numbers in (members or {}).items() if numbers}
        if members is not None:
            body = {**body, "members": {role: bits.digest(found) for role, found in pieces.items()}}
        previous, time = str(self._value(db, "head")), datetime.now(UTC).isoformat(timespec="seconds")
        entry = Entry(number, time, kind, body, previous, _hash(number, time, kind, body, previous))
        db.execute(_entry.insert().values({**vars(entry), "body": _plain(body)}))
        rows = [
            {"chunk": chunk, "entry": number, "role": role, "bits": piece}
            for role, found in pieces.items()
            for chunk, piece in found.items()
        ]
        if rows:
            db.execute(_membership.insert(), rows)
        self._set(db, "count", number)
        self._set(db, "head", entry.hash)
        return entry

    def _get(self, db: sa.Connection, number: int) -> Entry:
        row = db.execute(sa.select(_entry).where(_entry.c.number == number)).first()
        if row is None:
            raise EngramError(f"the ledger has no entry {number}")
        return _as_entry(row)

    def _numbers(self, db: sa.Connection, ids: Iterable[str]) -> tuple[set[int], dict[str, Any]]:
        """The numbers of records; new ones get the next, and are told with a digest for the entry that is written."""
        new: dict[str, Any] = {}
        key = self._key(db)
        wanted = {_keyed(key, id): None for id in ids}
        known = self._known(db, list(wanted))
        fresh = [digest for digest in wanted if digest not in known]
        if fresh:
            first = int(self._value(db, "records") or 0)
            found = dict(zip(fresh, range(first, first + len(fresh)), strict=True))
            rows = [{"key": digest, "number": found[digest]} for digest in sorted(found)]  # sorted: full pages
            db.execute(_record.insert(), rows)
            self._set(db, "records", first + len(fresh))
            known |= found
            new = {"new": {"count": len(fresh), "sha256": hashlib.sha256(b"".join(fresh)).hexdigest()}}
        return {known[digest] for digest in wanted}, new

    def _known(self, db: sa.Connection, keys: Sequence[bytes]) -> dict[bytes, int]:
        query = sa.select(_record.c.key, _record.c.number)
        if len(keys) > 20_000:  # one pass over the table
            among = set(keys)
            return {_bytes(key): number for key, number in db.execute(query) if _bytes(key) in among}
        parts = [keys[i : i + 500] for i in range(0, len(keys), 500)]
        return {
            _bytes(key): number for part in parts for key, number in db.execute(query.where(_record.c.key.in_(part)))
        }

    def _members(self, db: sa.Connection, entry: int, role: str) -> set[int]:
        query = sa.select(_membership.c.chunk, _membership.c.bits)
        rows = db.execute(query.where(_membership.c.entry == entry, _membership.c.role == role))
        return bits.numbers({chunk: _bytes(piece) for chunk, piece in rows})

    def _verify(self, entry: Entry, expected: int, previous: str) -> None:
        if entry.number != expected:
            raise EngramError(f"entry {expected} of the ledger was removed; entry {entry.number} stands in its place")
        if entry.previous != previous:
            raise EngramError(f"entry {expected} of the ledger was changed or put in: it does not follow the last")
        if _hash(entry.number, entry.time, entry.kind, entry.body, entry.previous) != entry.hash:
            raise EngramError(f"entry {expected} of the ledger was changed")
        self._verify_members(entry)

    def _verify_members(self, entry: Entry) -> None:
        if "members" not in entry.body:
            return
        query = sa.select(_membership.c.role, _membership.c.chunk, _membership.c.bits)
        pieces: dict[str, dict[int, bytes]] = {}
        with self._reading() as db:
            for role, chunk, piece in db.execute(query.where(_membership.c.entry == entry.number)):
                pieces.setdefault(role, {})[chunk] = _bytes(piece)
        if {role: bits.digest(found) for role, found in pieces.items()} != entry.body["members"]:
            raise EngramError(f"the records of entry {entry.number} of the ledger were changed")

    def _verify_records(self, db: sa.Connection, entries: Iterable[Entry]) -> None:
        """The keyed hashes of the records, in the order in which entries brought them, without gap or surplus."""
        rows = enumerate(db.execute(sa.select(_record.c.number, _record.c.key).order_by(_record.c.number)))
        total = 0
        for entry in entries:
            if new := entry.body.get("new"):
                total += new["count"]
                found = hashlib.sha256()
                for k, (number, key) in islice(rows, new["count"]):
                    found.update(_bytes(key) if k == number else b"")
                if found.hexdigest() != new["sha256"]:
                    raise EngramError(f"the records that entry {entry.number} of the ledger brought were changed")
        if next(rows, None) is not None or self._value(db, "records") != str(total):
            raise EngramError(f"the ledger should know {total} records: some were removed or put in")

    def _gone(self, db: sa.Connection) -> set[int]:
        rows = db.execute(sa.select(_entry.c.body).where(_entry.c.kind == "gone")).scalars()
        return {json.loads(body)["holder"] for body in rows}

    def _holding(self, db: sa.Connection, number: int, held: set[tuple[int, str]], gone: set[int]) -> Holding:
        body = self._get(db, number).body
        how = self._forgotten(db, body, held) if (number, FORGOTTEN) in held else None
        return Holding(number, body["what"], body["path"], number not in gone and Path(body["path"]).exists(), how)

    def _forgotten(self, db: sa.Connection, body: Mapping[str, Any], held: set[tuple[int, str]]) -> str:
        """The last request of the record in this line."""
        action = None if body["action"] is None else self._get(db, body["action"]).body
        if action is None or (action["request"], REQUESTED) not in held:
            return self._forgotten(db, self._get(db, body["parent"]).body, held)
        return f"{action['method'].get('name', 'an unknown method')}, approximate (entry {body['action']})"


def _refuse_other_files(file: Path) -> None:
    """SQLite takes a short file for an empty database, and would write over it."""
    if file.is_file() and (start := file.open("rb").read(16)) and not start.startswith(b"SQLite format 3"):
        raise EngramError(f"the ledger {file} cannot be opened: that is a file of another kind; name another --ledger")


def write_key(path: Path) -> None:
    """A new random key, readable by its owner alone."""
    write_atomic(path, secrets.token_hex(32) + "\n", mode=0o600)


def _engine(url: str) -> sa.Engine:
    try:
        sqlite = url.startswith("sqlite")
        engine = sa.create_engine(url, connect_args={"timeout": 60} if sqlite else {}, poolclass=sa.pool.NullPool)
    except (sa.exc.ArgumentError, ImportError) as error:
        raise EngramError(f"{url} is no database that can be used here: {error}") from error
    if sqlite:
        sa.event.listen(engine, "connect", _by_hand)
        sa.event.listen(engine, "begin", _begin)
    return engine


def _by_hand(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where `_begin` says


def _begin(db: sa.Connection) -> None:
    db.exec_driver_sql("BEGIN IMMEDIATE" if db.get_execution_options().get("writes") else "BEGIN")


def _plain(body: Mapping[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _hash(number: int, time: str, kind: str, body: Mapping[str, Any], previous: str) -> str:
    content = json.dumps([number, time, kind, _plain(body), previous], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def _keyed(key: bytes, id: str) -> bytes:
    return hmac.digest(key, id.encode(), "sha256")[:KEY_BYTES]


def _check_of(key: bytes) -> str:
    return hmac.digest(key, b"the key of this ledger", "sha256").hex()


def _as_entry(row: Any) -> Entry:
    try:
        body = json.loads(row.body)
    except ValueError:
        body = {"unreadable": row.body}  # `verify` says so
    return Entry(row.number, row.time, row.kind, body, row.previous, row.hash)


def _bytes(value: Any) -> bytes:
    """Bytes as a database hands them over."""
    if isinstance(value, bytes | memoryview):
        return bytes(value)
    raise TypeError(f"{type(value).__name__} in the place of bytes")


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]
