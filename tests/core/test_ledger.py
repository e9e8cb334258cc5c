"""The ledger: what learnt which record, and a chain that shows what was changed."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engram.core.ledger import Ledger
from engram.errors import EngramError
from engram.stats.bits import CHUNK

IDS = tuple(f"zebra-{k}" for k in range(40))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def story(place: Path | str, home: Path) -> Ledger:
    """A model, statistics and a cache of it; two requests, one done approximately, one exactly."""
    for name in ("model", "forgot", "exact", "statistics", "cache"):
        (home / name).mkdir(exist_ok=True)
    ledger = Ledger(place, home / "key")
    first = ledger.add_holder("model", home / "model", IDS[:30], weights="aa")
    ledger.add_holder("statistics", home / "statistics", IDS[:30], parent=first.number)
    ledger.add_holder("cache", home / "cache", IDS[10:12])
    request = ledger.add_request(IDS[:5], what={"records": "a list of ids"}, reason="withdrawn")
    action = ledger.add_action(request.number, method={"name": "forget.SSD"}, exact=False, residue=5)
    second = ledger.add_holder("model", home / "forgot", (), parent=first.number, action=action.number)
    request = ledger.add_request(IDS[4:8], what={"records": "a list of ids"})
    action = ledger.add_action(request.number, method={"name": "forget.Retrain"}, exact=True, residue=0)
    ledger.add_holder("model", home / "exact", (), parent=second.number, action=action.number)
    return ledger


def found(ledger: Ledger, id: str) -> dict[str, str | None]:
    return {Path(holding.path).name: holding.forgotten for holding in ledger.where(id)}


def check_story(ledger: Ledger) -> None:
    ssd = "forget.SSD, approximate (entry 5)"
    assert found(ledger, IDS[0]) == {"model": None, "statistics": None, "forgot": ssd, "exact": ssd}
    assert found(ledger, IDS[4]) == {"model": None, "statistics": None, "forgot": ssd}
    assert found(ledger, IDS[6]) == {"model": None, "statistics": None, "forgot": None}
    assert found(ledger, IDS[10]) == dict.fromkeys(("model", "statistics", "cache", "forgot", "exact"))
    assert found(ledger, IDS[35]) == found(ledger, "nobody") == {}
    last = ledger.verify()
    assert last is not None and last.number == 9


def test_where_follows_lineage_and_what_was_forgotten(place: Path, tmp_path: Path) -> None:
    check_story(story(place, tmp_path))
    check_story(Ledger(place, tmp_path / "key"))


def test_what_is_gone_stands_no_more(place: Path, tmp_path: Path) -> None:
    ledger = story(place, tmp_path)
    shutil.rmtree(tmp_path / "exact")
    assert [h.standing for h in ledger.where(IDS[0])] == [True, True, True, False]
    purged = ledger.purge(IDS[0])
    assert [h.what for h in purged] == ["model", "statistics", "model"]
    assert (tmp_path / "model").exists() and not (tmp_path / "statistics").exists()
    assert [e.kind for e in ledger.entries()][-3:] == ["flagged", "gone", "flagged"]
    (tmp_path / "statistics").mkdir()  # another thing at that place
    assert [Path(h.path).name for h in ledger.where(IDS[0]) if h.standing] == ["model", "forgot"]
    ledger.purge(IDS[0], models=True)
    assert not (tmp_path / "model").exists() and (tmp_path / "statistics").exists()
    ledger.verify()


def test_no_id_and_no_personal_data_stands_in_the_file(place: Path, tmp_path: Path) -> None:
    story(place, tmp_path)
    content = place.read_bytes() + b"".join(p.read_bytes() for p in tmp_path.glob("ledger.sqlite-*"))
    assert b"zebra" not in content
    assert (tmp_path / "key").read_bytes().strip() not in content
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0


def test_another_key_is_refused_and_a_lost_one_unlinks(place: Path, tmp_path: Path) -> None:
    ledger = story(place, tmp_path)
    key = tmp_path / "key"
    own = key.read_text()
    key.write_text("00" * 32)
    with pytest.raises(EngramError, match="key of another ledger"):
        ledger.where(IDS[0])
    key.unlink()
    with pytest.raises(EngramError, match="new-key"):
        ledger.where(IDS[0])
    ledger.verify()  # needs no key
    ledger.new_key()
    assert ledger.where(IDS[0]) == [] and key.read_text() != own
    ledger.add_holder("cache", tmp_path / "cache", IDS[:1])
    assert list(found(ledger, IDS[0])) == ["cache"]


def execute(place: Path, statement: str) -> None:
    with sqlite3.connect(place) as db:
        db.execute(statement)


TAMPERING = {
    "UPDATE entry SET body = replace(body, 'withdrawn', 'invented') WHERE number = 4": "entry 4 .* changed",
    "UPDATE entry SET time = '2020-01-01T00:00:00+00:00' WHERE number = 2": "entry 2 of the ledger was changed",
    "UPDATE entry SET body = '{broken' WHERE number = 2": "entry 2 of the ledger was changed",
    "DELETE FROM entry WHERE number = 3": "entry 3 of the ledger was removed",
    "DELETE FROM entry WHERE number = 1": "entry 1 of the ledger was removed",
    "DELETE FROM entry WHERE number = 9": "ends at entry 8 of 9",
    "INSERT INTO entry SELECT 10, time, kind, body, previous, hash FROM entry WHERE number = 9": "entry 10 .* put in",
    "DELETE FROM membership WHERE entry = 1": "records of entry 1 .* changed",
    "UPDATE membership SET bits = x'ff' WHERE entry = 4": "records of entry 4 .* changed",
    "UPDATE membership SET role = 'forgotten' WHERE entry = 4": "records of entry 4 .* changed",
}


@pytest.mark.parametrize("statement", TAMPERING)
def test_verify_names_the_first_entry_that_was_touched(statement: str, place: Path, tmp_path: Path) -> None:
    ledger = story(place, tmp_path)
    execute(place, statement)
    with pytest.raises(EngramError, match=TAMPERING[statement]):
        ledger.verify()


def test_a_chain_that_was_written_anew_is_seen_by_a_hash_from_elsewhere(place: Path, tmp_path: Path) -> None:
    ledger = story(place, tmp_path)
    head = ledger.entries()[4].hash
    ledger.verify(head)
    anew = Ledger(tmp_path / "other.sqlite", tmp_path / "key")
    anew.add("request", {"records": 0})
    anew.verify()
    with pytest.raises(EngramError, match="no entry of the ledger has the hash"):
        anew.verify(head)


def test_a_newer_schema_and_what_is_no_ledger_are_refused(place: Path, tmp_path: Path) -> None:
    story(place, tmp_path)
    execute(place, "UPDATE meta SET value = '2' WHERE name = 'schema'")
    with pytest.raises(EngramError, match="schema 2; this version reads schema 1"):
        Ledger(place, tmp_path / "key")
    (tmp_path / "short").write_text("SQLite takes so short a file for an empty database")
    with pytest.raises(EngramError, match="short cannot be opened: that is a file of another kind"):
        Ledger(tmp_path / "short")
    assert (tmp_path / "short").read_text().startswith("SQLite takes")
    (tmp_path / "bad.key").write_text("no key")
    with pytest.raises(EngramError, match="the key of the ledger"):
        Ledger(tmp_path / "new", tmp_path / "bad.key")
    assert not (tmp_path / "new").exists()
    (tmp_path / "text").write_text("no database" * 100)
    with pytest.raises(EngramError, match="cannot be opened"):
        Ledger(tmp_path / "text")
    with pytest.raises(EngramError, match="no database"):
        Ledger("nonsense://host/name", tmp_path / "key")


def test_unknown_holders_and_entries_are_refused(place: Path) -> None:
    ledger = Ledger(place)
    with pytest.raises(EngramError, match="'brain' holds no records"):
        ledger.add_holder("brain", "somewhere", IDS)
    with pytest.raises(EngramError, match="no entry 7"):
        ledger.add_holder("model", "somewhere", IDS, parent=7)
    assert ledger.entries() == []


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=st.sets(st.integers(0, 3 * CHUNK), min_size=1, max_size=30))
def test_memberships_are_exact_across_pieces(members: set[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("pieces")
    ledger = Ledger(home / "ledger.sqlite")
    with ledger._writing() as db:
        entry = ledger._append(db, "holder", {"what": "model"}, {"learnt": members})
        assert ledger._members(db, entry.number, "learnt") == members
    ledger.verify()


def write_some(arguments: tuple[str, str, int]) -> None:
    place, key, who = arguments
    ledger = Ledger(place, key)
    for k in range(6):
        request = ledger.add_request([f"w{who}-{k}", "shared"], what={"writer": who})
        ledger.add_holder("model", f"{key}-{who}-{k}", [f"w{who}-{k}", "shared"], request=request.number)


def check_two_writers(place: str, key: str) -> None:
    Ledger(place, key)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(write_some, [(place, key, who) for who in (0, 1)]))
    ledger = Ledger(place, key)
    last = ledger.verify()
    assert last is not None and last.number == 24
    assert len(ledger.where("shared")) == 12
    assert [len(ledger.where(f"w{who}-{k}")) for who in (0, 1) for k in range(6)] == [1] * 12


def test_two_processes_that_write_at_once_lose_nothing(place: Path) -> None:
    check_two_writers(str(place), f"{place}.key")


def test_a_ledger_needs_no_torch(place: Path) -> None:
    code = "import sys, engram.core.ledger as l; l.Ledger(sys.argv[1]).where('x'); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code, str(place)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def _programs() -> Path | None:
    """The folder of PostgreSQL's programs."""
    folders = [*Path("/usr/lib/postgresql").glob("*/bin"), *map(Path, os.environ["PATH"].split(os.pathsep))]
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "pg_ctl").exists()), None)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of its own; without PostgreSQL's programs or the driver the tests are skipped."""
    pytest.importorskip("pg8000", reason="the PostgreSQL driver pg8000 is not installed")
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    home = tmp_path_factory.mktemp("postgres")
    port = 20000 + os.getpid() % 20000
    run = _as_another_user(home)
    run(programs / "initdb", "-D", home / "data", "-U", "engram", "-A", "trust")
    start = ("start", "-w", "-l", home / "log", "-o", f"-p {port} -k {home} -c listen_addresses=127.0.0.1 -c fsync=off")
    run(programs / "pg_ctl", "-D", home / "data", *start)
    yield f"postgresql+pg8000://engram@127.0.0.1:{port}/postgres"
    run(programs / "pg_ctl", "-D", home / "data", "stop", "-m", "fast")


def _as_another_user(home: Path) -> Callable[..., None]:
    """PostgreSQL refuses to run as root."""
    import pwd

    user: str | None = None
    if os.getuid() == 0:
        user = next((name for name in ("postgres", "nobody") if _exists(pwd, name)), None)
        shutil.chown(home, user)
        for folder in home.parents[:3]:
            folder.chmod(folder.stat().st_mode | 0o711)

    def run(*words: object) -> None:
        command = list(map(str, words))
        found = subprocess.run(command, capture_output=True, text=True, user=user, cwd=home, timeout=120)
        if found.returncode:
            pytest.fail(f"PostgreSQL is installed and does not start: {found.stderr.strip().splitlines()[-1:]}")

    return run


def _exists(pwd: object, name: str) -> bool:
    try:
        return bool(pwd.getpwnam(name))  # type: ignore[attr-defined]
    except KeyError:
        return False


def test_the_story_on_postgresql(postgres: str, tmp_path: Path) -> None:
    check_story(story(postgres, tmp_path))


def test_two_processes_on_postgresql(postgres: str, tmp_path: Path) -> None:
    from sqlalchemy import create_engine, text

    with create_engine(postgres, isolation_level="AUTOCOMMIT").connect() as db:
        db.execute(text("CREATE DATABASE two"))
    check_two_writers(postgres.replace("/postgres", "/two"), str(tmp_path / "key"))
