"""One flipped bit in every kind of file: an error that says so in a sentence, or the same as without; never another
result in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import engram
from engram.cli import main
from engram.core.certificate import issue, keygen, verify
from engram.core.examination import predicate
from engram.core.ledger import Ledger
from engram.core.persist import load_learner
from engram.core.running import Running, read_config
from engram.core.stored import account_of, read_statistics
from engram.data.preprocessing import Preprocessing
from engram.engine.journal import Journal
from engram.errors import EngramError
from engram.models import io
from engram.models.seeding import seeded
from engram.report.page import write_audit, write_report
from engram.stats.seeds import generator
from engram.testing import fingerprint

pytestmark = [pytest.mark.faults, pytest.mark.slow]

MOST = 400  # places in one file


@pytest.fixture(scope="module")
def desk(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the commands of the desk write, beside a run and an interrupted journal."""
    home = tmp_path_factory.mktemp("damage")
    for name in ("run", "forgot", "model", "learner"):
        shutil.copytree(lab.home / name, home / name)
    for name in ("forgot.sqlite", "forgot.sqlite.key", "config.yaml"):
        shutil.copyfile(lab.home / name, home / name)
    rows = f"--data {lab.home}/train.parquet"
    prepare = f"prepare --model {lab.home}/model {rows} --method ssd --out {home}/statistics"
    assert main(prepare.split()) == 0
    audit = f"audit --before {lab.home}/model --after {home}/forgot {rows} --forget {lab.home}/ids.txt"
    assert main(f"{audit} --test {lab.home}/test.parquet --out {home}/audit".split()) == 3
    keygen(home / "desk.key")
    (home / "certificate.json").write_text(
        issue(home / "forgot", predicate(home / "forgot", home / "audit"), home / "desk.key")
    )
    Journal(home / "journal").store(("a",), {"x": torch.arange(20.0), "y": [1.5, (2, "three")]}, {"seconds": 1.5})
    with seeded(generator("a transformer")):
        config = ViTConfig(
            image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8, num_labels=3,
        )  # fmt: skip
        engram.save(ViTForImageClassification(config), home / "vit")
    return home


def model(home: Path) -> Any:
    loaded = io.load(home)
    config, weights = io.pack(loaded)
    return config, fingerprint(weights)


def ledger(home: Path) -> Any:
    book = Ledger(home / "forgot.sqlite")
    book.verify()
    where = [[(h.entry, h.path, h.forgotten) for h in book.where(f"digit-{k}")] for k in (0, 3, 11, 12, 150, 250)]
    return where, [vars(entry) for entry in book.entries()]


def rendered(write: Callable[[Path], Path]) -> Callable[[Path], str]:
    return lambda home: write(home).read_text()


def resumed(home: Path) -> Any:
    """Whether the run in `home/run` may go on with the config in `home/config.yaml`."""
    return Running(read_config(home / "config.yaml"), home / "run", resume=True).plan.resolved()


# what is read, from which folder, by what, out of which files
READERS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a model": ("model", model, "config.json model.safetensors SHA256SUMS"),
    "a transformer": ("vit", model, "config.json model.safetensors SHA256SUMS"),
    "preprocessing": ("model", lambda home: Preprocessing.load(home).to_dict(), "preprocessing.json SHA256SUMS"),
    "a learner": (
        "learner",
        lambda home: (fingerprint(load_learner(home)[0].state_dict()), load_learner(home)[1]),
        "learner.json traces.safetensors SHA256SUMS model/config.json model/model.safetensors model/SHA256SUMS",
    ),
    "statistics": (
        ".",
        lambda home: fingerprint(read_statistics(home / "statistics", io.load(home / "model"))),
        "statistics/statistics.json statistics/statistics.safetensors statistics/SHA256SUMS",
    ),
    "a journal": ("journal", lambda home: fingerprint(Journal(home).load(("a",))), "a/value.json a/*.safetensors"),
    "an account": ("forgot", account_of, "erasure.json SHA256SUMS"),
    "what is certified": (
        ".",
        lambda home: predicate(home / "forgot", home / "audit"),
        "audit/audit.json audit/SHA256SUMS forgot/erasure.json forgot/model.safetensors",
    ),
    "an audit's report": ("audit", rendered(write_audit), "audit.json SHA256SUMS"),
    "a run's report": (
        "run",
        rendered(write_report),
        "events.json config.yaml environment.json metrics.parquet SHA256SUMS",
    ),
    "a certificate": (
        ".",
        lambda home: verify(home / "certificate.json", home / "desk.pub", home / "forgot"),
        "certificate.json desk.pub forgot/erasure.json forgot/model.safetensors",
    ),
    "a signing key": (
        ".",
        lambda home: (
            (home / "new.json").write_text(issue(home / "forgot", {"claim": "none"}, home / "desk.key")),
            verify(home / "new.json", home / "desk.pub"),
        ),
        "desk.key",
    ),
    "a ledger": (".", ledger, "forgot.sqlite forgot.sqlite.key"),
    "a run's config": (".", resumed, "run/config.yaml run/run.json config.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("case", READERS)
def test_a_flipped_bit_is_found_or_changes_nothing(case: str, desk: Path, copied: Any, flips: Any) -> None:
    folder, read, names = READERS[case]
    home = copied(desk / folder) if folder != "." else copied(desk)
    whole = read(home)
    for name in names.split():
        [file] = home.glob(name)
        found = 0
        for place in flips(file, MOST if "report" not in case and "config" not in case else MOST // 4):
            try:
                assert read(home) == whole, f"byte {place} of {name} gives another result in silence"
            except EngramError as error:
                assert str(error)
                found += 1
        if name not in ("run/run.json",):  # which resuming does not read
            assert found, f"no change of {name} was found"
    assert read(home) == whole


COMMANDS = {
    "model/config.json": "forget", "model/model.safetensors": "forget", "model/preprocessing.json": "forget",
    "statistics/statistics.json": "forget", "statistics/statistics.safetensors": "forget",
    "forgot.sqlite.key": "forget", "forgot.sqlite": "ledger where digit-3 --ledger @forgot.sqlite",
    "learner/learner.json": "learner", "learner/traces.safetensors": "learner",
    "learner/model/model.safetensors": "learner", "forgot/erasure.json": "issue", "audit/audit.json": "issue",
    "forgot/model.safetensors": "issue", "desk.key": "issue",
    "certificate.json": "certificate verify @certificate.json --key @desk.pub --model @forgot",
    "desk.pub": "certificate verify @certificate.json --key @desk.pub --model @forgot",
    "run/events.json": "report @run", "run/config.yaml": "report @run", "run/environment.json": "report @run",
}  # fmt: skip
LONG = {
    "forget": "forget --model @model --data {0}/train.parquet --forget {0}/ids.txt --method ssd "
    "--statistics @statistics --quiet --ledger @forgot.sqlite --out @out",
    "learner": "forget --model @learner --data {0}/train.parquet --forget {0}/ids.txt --quiet --out @out",
    "issue": "certificate issue --model @forgot --audit @audit --key @desk.key --out @out",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_it_in_one_sentence(
    name: str, lab: Any, desk: Path, copied: Any, flips: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    home = copied(desk)
    words = LONG.get(COMMANDS[name], COMMANDS[name]).format(lab.home).replace("@", f"{home}/").split()
    for place in flips(home / name, 8):
        code, said = main(words), capsys.readouterr().err
        assert code in (0, 2), place
        if code == 0:  # a key that signs, but another; a newline; an unused part of the ledger
            assert name in ("desk.key", "forgot.sqlite.key", "forgot.sqlite", "desk.pub"), place
        else:
            assert said.startswith("engram: ") and "Traceback" not in said and said.count("\n") == 1, said
        for left in (home / "out", home / "out.work"):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["value.json", "*.safetensors"])
def test_a_damaged_journal_stops_a_run_until_it_is_deleted(
    kind: str, lab: Any, faulty: Any, tmp_path: Path, flips: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with faulty(9, KeyboardInterrupt).at((Journal, "store")), pytest.raises(KeyboardInterrupt):
        lab.run(tmp_path / "run")
    words = [*lab.run_words(tmp_path / "run"), "--resume"]
    file = sorted((tmp_path / "run" / "journal").rglob(kind))[0]
    for _ in flips(file, 5):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("engram: ") and said.count("\n") == 1 and "delete" in said
    shutil.rmtree(file.parent)
    assert main(words) == 0
    assert lab.run_outcome(tmp_path / "run") == lab.expected["run"]


def test_a_damaged_ticket_stops_a_request(lab: Any, faulty: Any, tmp_path: Path, flips: Any) -> None:
    out = tmp_path / "new"
    with faulty(2, KeyboardInterrupt).at((Journal, "store")):
        assert lab.forget(out) == 130
    for _ in flips(Path(f"{out}.work") / "request.sha256", 20):
        assert lab.forget(out, "--resume") == 2
    lab.resume(out)
    assert lab.forget_outcome(out) == lab.expected["forget"]
    assert json.loads((out / "erasure.json").read_text())["ticket"]
