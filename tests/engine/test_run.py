"""Runs: every phase once, draws by name, and a second execution that ends where the first one would have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engram.engine.journal import ENTRY, Journal
from engram.engine.run import Run
from engram.errors import EngramError

PLACES = pytest.mark.parametrize("on_disk", [True, False], ids=["on disk", "in memory"])


def counted(value: object) -> tuple[Callable[[], object], list[int]]:
    """A maker of the value, and the list that grows whenever it is called."""
    calls: list[int] = []

    def make() -> object:
        calls.append(1)
        return value

    return make, calls


def draw(run: Run, *names: object) -> Tensor:
    return torch.rand(3, generator=run.generator(*names))


@PLACES
def test_a_phase_is_computed_once(on_disk: bool, tmp_path: Path) -> None:
    make, calls = counted({"a": torch.arange(3), "b": (1, None)})
    first = Run(tmp_path) if on_disk else Run()
    found = first.phase("one", make)
    again = Run(tmp_path) if on_disk else first
    again._seen[0].clear()  # the program starts anew
    loaded = again.phase("one", make)
    assert len(calls) == 1
    assert isinstance(loaded, dict) and isinstance(found, dict)
    assert torch.equal(loaded["a"], found["a"]) and loaded["b"] == (1, None)


def test_the_kth_phase_of_a_name_is_another(tmp_path: Path) -> None:
    first = [Run(tmp_path).phase("x", lambda: 1)]
    run = Run(tmp_path)
    assert [run.phase("x", lambda k=k: k) for k in (7, 8, 9)] == [*first, 8, 9]
    assert {p.name for p in (tmp_path / "journal").iterdir()} == {"x", "x#2", "x#3"}


@PLACES
def test_nested_phases_are_deleted_when_the_outer_one_is_done(on_disk: bool, tmp_path: Path) -> None:
    run = Run(tmp_path) if on_disk else Run()
    inner, calls = counted(torch.ones(2))

    def killed() -> None:
        run.phase("inner", inner)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.phase("outer", killed)
    assert run.path == ()
    run._seen[0].clear()
    assert run.phase("outer", lambda: run.phase("inner", inner)) is not None
    assert len(calls) == 1  # what was done before the interruption was not done again
    assert run.journal.load(("outer",)) is not None
    assert run.journal.load(("outer", "inner")) is None
    assert not (tmp_path / "journal" / "outer" / "inner").exists()


def test_scopes_name_draws_and_count_their_blocks() -> None:
    run = Run(seed=3)
    with run.scope("learn"):
        with run.scope("epoch", 1):
            assert run.path == ("learn", "epoch/1")
            inside = draw(run, "order")
        first = draw(run, "order")
    with run.scope("learn"):
        assert run.path == ("learn#2",)
        second = draw(run, "order")
    assert run.path == ()
    assert len({tuple(t.tolist()) for t in (inside, first, second, draw(run, "order"))}) == 4
    twin = Run(seed=3)
    with twin.scope("learn"):
        assert torch.equal(draw(twin, "order"), first)
        assert torch.equal(draw(twin, "order"), first)  # asking twice moves nothing
    with Run(seed=4).scope("learn"):
        assert not torch.equal(draw(Run(seed=4), "order"), first)


def test_a_scope_ends_with_its_block_even_by_an_error() -> None:
    run = Run()
    with pytest.raises(ZeroDivisionError), run.scope("a"):
        raise ZeroDivisionError
    with run.scope("a"):
        assert run.path == ("a#2",)


def program(run: Run, stop: int | None = None) -> list[Tensor]:
    """Phases that draw, draw inside of scopes, and phases of the same name; it can end after any phase."""
    found: list[Tensor] = []

    def phase(name: str) -> None:
        if stop is not None and len(found) == stop:
            raise KeyboardInterrupt
        found.append(run.phase(name, lambda: nested(name)))

    def nested(name: str) -> Tensor:
        with run.scope("inner"):
            return draw(run, name) + run.phase("deep", lambda: draw(run, "x"))

    for k in range(2):
        phase("a")
        with run.scope("block", k):
            phase("b")
            found[-1] = found[-1] + run.share("common", lambda: nested("common")) + draw(run, "after")
    return found


@pytest.mark.parametrize("stop", range(4))
def test_skipping_a_finished_phase_moves_no_other_draw(stop: int, tmp_path: Path) -> None:
    whole = program(Run(seed=1))
    with pytest.raises(KeyboardInterrupt):
        program(Run(tmp_path, seed=1), stop)
    assert torch.equal(torch.stack(program(Run(tmp_path, seed=1))), torch.stack(whole))


def test_a_shared_value_does_not_depend_on_who_asks_first(tmp_path: Path) -> None:
    def ask(run: Run) -> Tensor:
        return run.share("value", lambda: draw(run, "x") + run.phase("part", lambda: draw(run, "y")))

    one, other = Run(tmp_path), Run()
    with one.scope("a"):
        first = ask(one)
        assert one.path == ("a",)
        assert torch.equal(ask(one), first)
        assert one.phase("part", lambda: 5) == 5  # the first block of its name here: the shared one does not count
        assert one.journal.load(("a", "part")) is not None
    assert torch.equal(ask(other), first)
    assert not (tmp_path / "journal" / "shared" / "value" / "part").exists()


def test_a_shared_value_that_cannot_be_made_leaves_the_scope() -> None:
    run = Run()
    with run.scope("a"), pytest.raises(ZeroDivisionError):
        run.share("value", lambda: 1 / 0)
    assert run.path == ()


def test_under_another_seed_draws_are_those_of_a_run_that_begins() -> None:
    run = Run(seed=5)
    with run.scope("outer"):
        twin = run.with_seed(9)
        with twin.scope("inner"):
            assert torch.equal(draw(twin, "x"), inner_draw(Run(seed=9)))
            assert twin.path == ("outer", "seed=9", "inner")
        assert twin.number("n") == Run(seed=9).number("n") != run.number("n")
        twin.cost.steps += 1
    assert run.cost.steps == 1 and run.seed == 5


def inner_draw(run: Run) -> Tensor:
    with run.scope("inner"):
        return draw(run, "x")


@pytest.mark.parametrize("name", [ENTRY, "value-*.safetensors"])
@pytest.mark.parametrize("cut", [True, False], ids=["cut short", "changed"])
def test_a_damaged_file_of_the_journal_is_named(name: str, cut: bool, tmp_path: Path) -> None:
    Run(tmp_path).phase("one", lambda: torch.arange(4.0))
    [file] = (tmp_path / "journal" / "one").glob(name)
    content = file.read_bytes()
    file.write_bytes(content[:-3] if cut else b"]" + content[1:])
    with pytest.raises(EngramError, match=r"one.*delete .*one to redo it|one.*delete it to redo it"):
        Run(tmp_path).phase("one", lambda: torch.zeros(4))


def test_tensors_that_are_missing_are_named(tmp_path: Path) -> None:
    Run(tmp_path).phase("one", lambda: torch.arange(4.0))
    next((tmp_path / "journal" / "one").glob("value-*")).unlink()
    with pytest.raises(EngramError, match=r"journal entry .*one cannot be read"):
        Run(tmp_path).phase("one", lambda: torch.zeros(4))


def test_an_entry_without_its_json_is_made_anew(tmp_path: Path) -> None:
    Run(tmp_path).phase("one", lambda: torch.arange(4.0))
    (tmp_path / "journal" / "one" / ENTRY).unlink()
    assert torch.equal(Run(tmp_path).phase("one", lambda: torch.ones(2)), torch.ones(2))
    assert torch.equal(Run(tmp_path).phase("one", lambda: torch.zeros(1)), torch.ones(2))


def test_a_replacement_that_is_interrupted_leaves_the_old_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    journal.store(("a",), torch.zeros(3), {"steps": 1})
    from engram.engine import journal as module

    real = module.write_atomic

    def killed(path: Path, data: bytes | str) -> None:
        if path.name == ENTRY:
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(module, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        journal.store(("a",), torch.ones(3), {"steps": 2})
    monkeypatch.undo()
    found = journal.load(("a",))
    assert found is not None and torch.equal(found[0], torch.zeros(3)) and found[1] == {"steps": 1}
    journal.store(("a",), torch.ones(3), {"steps": 2})
    assert len(list((tmp_path / "a").iterdir())) == 2  # nothing of the old one stays behind


def test_cost_counts_again_on_resume(tmp_path: Path) -> None:
    def work(run: Run) -> Run:
        def make() -> int:
            run.cost.steps += 3
            run.cost.rows += 10
            run.cost.seconds += 0.5
            run.phase("inner", lambda: setattr(run.cost, "flops", run.cost.flops + 8.0))
            return 1

        run.cost.steps += 100  # outside of the phase: done again
        run.phase("work", make)
        return run

    first, again = work(Run(tmp_path)), work(Run(tmp_path))
    assert again.cost == first.cost
    assert (first.cost.steps, first.cost.rows, first.cost.seconds, first.cost.flops) == (103, 10, 0.5, 8.0)


def test_a_file_of_a_run_is_written_into_its_directory_alone(tmp_path: Path) -> None:
    Run(tmp_path / "run").write("a.json", {"x": [1, 2]})
    assert (tmp_path / "run" / "a.json").read_text() == '{\n "x": [\n  1,\n  2\n ]\n}\n'
    Run().write("a.json", {"x": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_seeded_block_moves_no_global_draw(moved_by: Callable[[Callable[[], object]], list[str]]) -> None:
    run = Run(seed=2)

    def block() -> Tensor:
        with run.seeded("weights"):
            return torch.rand(4)

    assert torch.equal(block(), block())
    assert moved_by(block) == []
