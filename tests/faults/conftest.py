"""A tiny run and a tiny erasure request that the tests of faults interrupt, starve of disk and damage."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.datasets import load_digits

import engram
from engram.cli import main
from engram.core.ledger import Ledger
from engram.core.persist import load_learner, save_learner
from engram.core.running import Running
from engram.data.readers import read_with
from engram.data.task import Task
from engram.engine import fit as fitting
from engram.engine.optimizer import Optimizer
from engram.engine.recipe import Recipe
from engram.keep.acu import ACU
from engram.models.io import digest, load
from engram.testing import fingerprint

CONFIG: dict[str, Any] = {
    "title": "Learn, forget, learn",
    "seed": 1,
    "data": {"source": "sklearn:digits", "share": 0.3, "limit": 120},
    "stream": {"scenario": "class", "base": 5, "increment": 5, "order": "natural"},
    "learners": {
        "network": {"name": "keep.Replay", "network": {"name": "MLP", "hidden": [8]}, "epochs": 2, "buffer": 20},
        "exact": {"name": "keep.NMC"},
    },
    "forgetter": {"name": "forget.GradientDifference", "epochs": 2},
    "events": [{"learn": 1}, {"forget": {"records": 5}}, {"learn": "all"}],
}
NOTED = ["holder", "request", "action", "holder"]  # what one request leaves in a new ledger
Outcome = dict[str, Any]


@dataclass
class Faulty:
    """Stands in the place of functions, and raises at the k-th call of any of them, before or after its work."""

    k: int
    error: Callable[[], BaseException]
    after: bool = False
    calls: int = 0
    hit: bool = False

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            now = self.calls == self.k and not self.hit
            self.calls += 1
            if now and not self.after:
                self._raise()
            result = real(*args, **more)
            if now:
                self._raise()
            return result

        return call

    def _raise(self) -> None:
        self.hit = True
        raise self.error()

    @contextmanager
    def at(self, *places: tuple[Any, str]) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in places:
                real = open if name == "open" else getattr(owner, name)
                patch.setattr(owner, name, self.wrap(real), raising=False)
            yield


@dataclass
class Lab:
    """`home`: rows, a model, a learner, a recipe, a list of ids, a config."""

    home: Path
    expected: dict[str, Outcome] = field(default_factory=dict)

    # `engram run`

    def run_words(self, out: Path) -> list[str]:
        return ["run", f"{self.home}/config.yaml", "--out", str(out), "--quiet"]

    def run(self, out: Path, *, resume: bool = False) -> None:
        running = Running(CONFIG, out, resume=resume)
        running.execute()
        running.finish()

    def run_outcome(self, out: Path) -> Outcome:
        """What a run measured, seconds aside, and the whole state of its learners, bit for bit."""
        assert json.loads((out / "run.json").read_text())["status"] == "finished"
        records = json.loads((out / "events.json").read_text())
        for record in records:
            del record["cost"]["seconds"]
        found = {name: load_learner(out / "models" / name) for name in CONFIG["learners"]}
        states = {name: (fingerprint(learner.state_dict()), tasks) for name, (learner, tasks) in found.items()}
        return {"records": records, "states": states, "left": left(out)}

    # `engram forget`

    def forget_words(self, out: Path, *more: str) -> list[str]:
        words = (
            f"forget --model {self.home}/model --data {self.home}/train.parquet --forget {self.home}/ids.txt --quiet"
        )
        method = "--method GradientDifference --set epochs=3"
        return [*words.split(), *method.split(), "--out", str(out), "--ledger", f"{out}.sqlite", *more]

    def forget(self, out: Path, *more: str) -> int:
        return main(self.forget_words(out, *more))

    def resume(self, out: Path) -> None:
        """Go on with a request; one that was finished before its interruption says so."""
        finished = out.exists() and not Path(f"{out}.work").exists()
        assert self.forget(out, "--resume") == (2 if finished else 0)

    def forget_outcome(self, out: Path) -> Outcome:
        """The new model, its account (what must differ aside), and what the ledger says; no request is told twice."""
        account = json.loads((out / "erasure.json").read_text())
        account["cost"].pop("seconds")
        account.pop("environment")  # the checkout's commit may be another by now
        told, ticket = account.pop("ledger"), account.pop("ticket")
        ledger = Ledger(f"{out}.sqlite")
        ledger.verify()
        entries = ledger.entries()
        assert [entry.kind for entry in entries] == NOTED
        assert entries[2].number == told["action"] and entries[2].hash == told["hash"]
        assert [entry.body.get("ticket") for entry in entries] == [None, ticket, ticket, ticket]
        weights = digest(load(out))
        assert entries[3].body["weights"] == weights
        where = [(Path(h.path).name == out.name, h.forgotten, h.standing) for h in ledger.where("digit-3")]
        files = sorted(path.name for path in out.iterdir())
        left_over = [name for name in left(out.parent) if out.name in name] + list(out.parent.glob(f"{out.name}.work"))
        return {"account": account, "weights": weights, "where": where, "files": files, "left": left_over}


def left(directory: Path) -> list[str]:
    """Names of what was left half-written."""
    return sorted(path.name for path in directory.rglob(".*"))


@pytest.fixture(scope="session")
def faulty() -> type[Faulty]:
    return Faulty


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    home = tmp_path_factory.mktemp("lab")
    x, y = load_digits(n_class=4, return_X_y=True)
    names = [("zero", "one", "two", "three")[c] for c in y]
    ids = [f"digit-{k}" for k in range(len(y))]
    rows = pa.table({"id": ids, **{f"p{j}": x[:, j] for j in range(1, 64, 4)}, "label": names})
    pq.write_table(rows.slice(0, 200), home / "train.parquet")
    pq.write_table(rows.slice(200, 200), home / "test.parquet")
    table, preprocessing = read_with(home / "train.parquet")
    recipe = Recipe({"name": "MLP", "hidden": [8]}, Optimizer("adam", lr=0.01), epochs=3)
    engram.save(recipe(table, 0), home / "model")
    learner = ACU(size=16)
    learner.learn(Task(table, None, 0, table.classes, table.names))
    save_learner(learner, home / "learner", tasks=1)
    for name in ("model", "learner"):
        preprocessing.save(home / name)
    (home / "ids.txt").write_text("\n".join(f"digit-{k}" for k in range(12)) + "\n")
    (home / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    found = Lab(home)
    with pytest.MonkeyPatch.context() as patch:
        every_epoch(patch)
        found.run(home / "run")
        assert found.forget(home / "forgot") == 0
    found.expected = {"run": found.run_outcome(home / "run"), "forget": found.forget_outcome(home / "forgot")}
    return found


def every_epoch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fitting, "CHECKPOINT_EVERY", 0.0)
    patch.setattr(fitting, "WORTH_KEEPING", 0.0)


@pytest.fixture(autouse=True)
def every_epoch_is_journaled(monkeypatch: pytest.MonkeyPatch) -> None:
    every_epoch(monkeypatch)


@pytest.fixture
def flips() -> Callable[..., Iterator[int]]:
    """flips(file, most): flip one bit of a file at a time, in every byte or in `most` bytes spread over it; the place
    is yielded, and the file is whole again afterwards."""

    def flip(file: Path, most: int) -> Iterator[int]:
        content, draws = file.read_bytes(), random.Random(file.name)
        places = range(len(content)) if len(content) <= most else sorted(draws.sample(range(len(content)), most))
        try:
            for place in places:
                changed = bytearray(content)
                changed[place] ^= 1 << draws.randrange(8)
                file.write_bytes(changed)
                yield place
        finally:
            file.write_bytes(content)

    return flip


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """copied(path): a copy of a file or directory that may be damaged."""

    def copy(path: Path) -> Path:
        target = tmp_path / path.name
        shutil.copytree(path, target) if path.is_dir() else shutil.copyfile(path, target)
        return target

    return copy
