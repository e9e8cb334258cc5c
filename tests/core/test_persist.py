"""Learners as directories: what was saved comes back, and damage is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engram.core.learner import Learner
from engram.core.persist import LEARNER, MODEL, TRACES, is_learner, load_learner, save_learner
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.acu import ACU
from engram.keep.nmc import NMC
from engram.keep.replay import Replay
from engram.models import io
from engram.models.encoders import MLP
from engram.models.seeding import seeded
from engram.stats.seeds import generator
from engram.testing import digits, fingerprint, learnt

MAKERS: list[Callable[[], Learner]] = [ACU.tiny, NMC.tiny, Replay.tiny]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_learner(learnt(Replay.tiny(), digits().tasks[:1], Run()), tmp_path / "learner", tasks=1)
    return tmp_path / "learner"


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__qualname__)
def test_a_learner_comes_back_bit_by_bit(maker: Callable[[], Learner], tmp_path: Path) -> None:
    learner = learnt(maker(), digits().tasks[:1], Run())
    save_learner(learner, tmp_path / "learner", tasks=1)
    again, tasks = load_learner(tmp_path / "learner")
    assert tasks == 1 and type(again) is type(learner)
    assert fingerprint(again.state_dict()) == fingerprint(learner.state_dict())
    assert torch.equal(predict(again.model, digits().test), predict(learner.model, digits().test))
    assert torch.equal(
        predict(io.load(tmp_path / "learner" / MODEL), digits().test), predict(again.model, digits().test)
    )


def test_a_learner_that_has_learnt_nothing(tmp_path: Path) -> None:
    save_learner(ACU.tiny(), tmp_path / "learner")
    again, tasks = load_learner(tmp_path / "learner")
    assert tasks == 0 and not again.started and isinstance(again, ACU) and again.size == ACU.tiny().size


def test_a_learner_whose_model_is_gone_is_no_new_learner(saved: Path) -> None:
    shutil.rmtree(saved / MODEL)
    with pytest.raises(EngramError, match="holds no saved model"):
        load_learner(saved)


def test_what_belongs_to_a_learner_is_written_with_it(tmp_path: Path) -> None:
    save_learner(ACU.tiny(), tmp_path / "learner", beside=lambda folder: (folder / "words.txt").write_text("hello"))
    assert "words.txt" in (tmp_path / "learner" / "SHA256SUMS").read_text()

    def refuse(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(EngramError, match="No space left"):
        save_learner(ACU.tiny(), tmp_path / "other", beside=refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["learner"]


def test_a_backbone_that_was_handed_over_comes_back_with_the_model(tmp_path: Path) -> None:
    with seeded(generator("a backbone")):
        backbone = MLP(inputs=64, hidden=[8])
    learner = learnt(NMC(backbone=backbone), digits().tasks[:1], Run())
    save_learner(learner, tmp_path / "learner", tasks=1)
    again, _ = load_learner(tmp_path / "learner")
    assert isinstance(again, NMC) and again.backbone is None  # its weights stand in the model
    for one in (learner, again):
        one.learn(digits().tasks[1], Run())
    assert torch.equal(predict(again.model, digits().test), predict(learner.model, digits().test))


def test_saving_again_replaces(saved: Path) -> None:
    save_learner(learnt(NMC.tiny(), digits().tasks, Run()), saved, tasks=2)
    again, tasks = load_learner(saved)
    assert isinstance(again, NMC) and tasks == 2
    assert sorted(path.name for path in saved.parent.iterdir()) == ["learner"]  # nothing half-done beside it


@pytest.mark.parametrize("file", [LEARNER, TRACES, f"{MODEL}/model.safetensors", f"{MODEL}/config.json"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_truncated_file_is_named(saved: Path, file: str, share: float) -> None:
    content = (saved / file).read_bytes()
    (saved / file).write_bytes(content[: int(share * len(content))])
    with pytest.raises(EngramError) as error:
        load_learner(saved)
    assert str(saved / file) in str(error.value)


@pytest.mark.parametrize("file", [LEARNER, TRACES, f"{MODEL}/model.safetensors"])
def test_a_missing_file_is_named(saved: Path, file: str) -> None:
    (saved / file).unlink()
    with pytest.raises(EngramError, match=file):
        load_learner(saved)


def test_another_format_is_refused(saved: Path) -> None:
    entry = json.loads((saved / LEARNER).read_text())
    for content, found in (({**entry, "format": 99}, "99"), ([entry], "None")):
        (saved / LEARNER).write_text(json.dumps(content))
        with pytest.raises(EngramError, match=f"has format {found}; this version reads format 1"):
            load_learner(saved)


def test_is_learner(saved: Path, tmp_path: Path) -> None:
    assert is_learner(saved) and not is_learner(tmp_path)
    with pytest.raises(EngramError, match="holds no learner"):
        load_learner(tmp_path)
