"""Learners along one stream under one protocol: what is measured, resumed, survived."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import engram.compare.continual as module
from engram.cli import main
from engram.compare.continual import Comparison, Contest, Stream, configured, held_out, summarise, trials
from engram.compare.course import bytes_of, follow, numbers, operations
from engram.data.streams import class_stream
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.finetune import Finetune
from engram.keep.lwf import LwF
from engram.keep.nmc import NMC
from engram.keep.virtual_outliers import VirtualOutliers

STREAM = Stream(limit=500, base=4, increment=3)
PLAN = Comparison(
    (STREAM,),
    learners=("NMC", "Finetune", "Replay", "Joint"),
    common={"network": {"name": "MLP", "hidden": [32]}, "epochs": 4, "buffer": 60},
    seeds=(0, 1),
    trials=2,
)
HALVES = Stream(limit=300, base=5, increment=5)
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    out = tmp_path_factory.mktemp("contest") / "out"
    return out, Contest(PLAN, out).execute()


def reported(rows: Rows) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["learner"], row["seed"]): row for row in rows if not row["tuning"]}


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    left_out = "accuracy matrix", "over tasks"  # NaN above the diagonal, and seconds
    return {key: value for key, value in row.items() if key not in left_out and "seconds" not in key}


def test_every_course_has_its_row(done: tuple[Path, Rows]) -> None:
    assert set(reported(done[1])) == {(f"keep.{name}", seed) for name in PLAN.learners for seed in PLAN.seeds}
    assert pq.read_table(done[0] / "continual.parquet").num_rows == len(done[1]) == 8 + 3 * 2


def test_the_figures_are_those_of_the_accuracy_matrix(done: tuple[Path, Rows]) -> None:
    for row in done[1]:
        matrix = np.array(row["accuracy matrix"]["class"])
        aware = np.array(row["accuracy matrix"]["task"])
        seen = np.tril(np.ones((3, 3), dtype=bool))
        assert matrix.shape == (3, 3) and np.isnan(matrix[~seen]).all()
        assert (aware[seen] >= matrix[seen]).all()
        assert row["final accuracy"] == pytest.approx(matrix[-1].mean())
        means = [matrix[k, : k + 1].mean() for k in range(3)]
        assert row["incremental accuracy"] == pytest.approx(np.mean(means))


def test_what_learners_hold_is_measured(done: tuple[Path, Rows]) -> None:
    rows = reported(done[1])
    train = len(Contest(PLAN, done[0]).tables[STREAM.name][0])
    held = {name: rows[f"keep.{name}", 0]["rows held"] for name in PLAN.learners}
    assert held == {"NMC": 0, "Finetune": 0, "Replay": 60, "Joint": train}
    assert rows["keep.Joint", 0]["bytes per task"] > rows["keep.NMC", 0]["bytes per task"] > 0
    assert rows["keep.NMC", 0]["parameters"] == 10 * 64
    assert rows["keep.NMC", 0]["parameters per task"] == 3 * 64
    over = rows["keep.Joint", 0]["over tasks"]
    assert over["rows held"][-1] == train and over["rows held"] == sorted(over["rows held"])
    assert all(len(values) == 3 and min(values) >= 0 for values in over.values())
    assert rows["keep.Joint", 0]["seconds"] == pytest.approx(sum(over["seconds"]))


def test_operations_are_counted_along_the_first_class_order(done: tuple[Path, Rows]) -> None:
    rows = reported(done[1])
    names = "GFLOP of the second task", "GFLOP of the last task"
    assert all(rows["keep.Joint", 0][name] > rows["keep.Finetune", 0][name] > 0 for name in names)
    assert rows["keep.Joint", 0][names[1]] > rows["keep.Joint", 0][names[0]]
    assert all(rows["keep.Joint", 1][name] is None for name in names)
    learners = summarise(done[1])["streams"][0]["learners"]
    joint = next(entry for entry in learners if entry["learner"] == "keep.Joint")
    assert joint["measures"][names[1]][0] == rows["keep.Joint", 0][names[1]]


def test_operations_are_those_of_the_matrix_products() -> None:
    """Forward, gradients of both weights, and the gradient that passes back through the head."""
    train, test = Contest(PLAN, Path("unused")).tables[STREAM.name]
    first, *_ = class_stream(train, test, base=4, increment=3)
    learner = Finetune(network={"name": "MLP", "hidden": [32]}, epochs=2)
    n, inside, head = len(first.task.train), 64 * 32, 32 * 4
    assert operations(learner, first, Run()) == 2 * 2 * n * (2 * inside + 3 * head)
    assert not learner.started  # a copy did the work


def test_rehearsal_beats_plain_fine_tuning_and_joint_training_beats_both(done: tuple[Path, Rows]) -> None:
    rows = reported(done[1])
    for seed in PLAN.seeds:
        final = {name: rows[f"keep.{name}", seed]["final accuracy"] for name in PLAN.learners}
        assert final["Finetune"] < final["Replay"] < final["Joint"]


def test_the_tuning_stream_has_another_order(done: tuple[Path, Rows]) -> None:
    contest = Contest(PLAN, done[0])
    orders = [[stage.task.classes for stage in contest.stages(STREAM, seed)] for seed in (*PLAN.seeds, 1_000_000)]
    assert len({json.dumps(order) for order in orders}) == 3
    tuned = {row["seed"] for row in done[1] if row["tuning"]}
    assert tuned == {1_000_000}
    for row in (row for row in done[1] if row["chosen"]):
        rivals = [r["incremental accuracy"] for r in done[1] if r["tuning"] and r["learner"] == row["learner"]]
        assert row["incremental accuracy"] == max(rivals)
        assert all(reported(done[1])[row["learner"], seed]["setting"] == row["setting"] for seed in PLAN.seeds)


def test_no_test_row_has_a_part_in_tuning(done: tuple[Path, Rows]) -> None:
    contest = Contest(PLAN, done[0])
    train, test = contest.tables[STREAM.name]
    stages = contest.stages(STREAM, 1_000_000, tuning=True)
    learnt, judged = ({id for s in stages for id in part(s).ids} for part in (lambda s: s.task.train, lambda s: s.test))
    assert not learnt & judged and learnt | judged == set(train.ids) and not judged & set(test.ids)
    assert len(judged) == pytest.approx(0.3 * len(train), abs=10)


def test_a_class_of_one_row_is_judged_by_that_row() -> None:
    train = Contest(PLAN, Path("unused")).tables[STREAM.name][0]
    one = train.of_classes([0]).take([0])
    learnt, judged = held_out(train.of_classes([1, 2]).concat(one))
    assert learnt.of_classes([0]).ids == judged.of_classes([0]).ids == one.ids
    assert not set(learnt.of_classes([1, 2]).ids) & set(judged.ids)


def test_it_goes_on_where_it_was_interrupted(
    done: tuple[Path, Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, count = Contest._measured, []

    def killed(self: Contest, *args: Any) -> dict[str, Any]:
        count.append(args)
        if len(count) == 6:
            raise KeyboardInterrupt
        return measured(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Contest, "_measured", killed)
        with pytest.raises(KeyboardInterrupt):
            Contest(PLAN, tmp_path / "out").execute()
    again = Contest(PLAN, tmp_path / "out").execute()
    assert [timeless(row) for row in again] == [timeless(row) for row in done[1]]


def test_a_learner_that_fails_has_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("it broke")

    monkeypatch.setattr(NMC, "learn", broken)
    plan = Comparison((HALVES,), learners=("NMC", "ACU"), seeds=(0,), trials=1)
    rows = Contest(plan, tmp_path / "out").execute()
    assert {row["learner"]: row["error"] for row in rows} == {"keep.NMC": "RuntimeError: it broke", "keep.ACU": ""}
    (stream,) = summarise(rows)["streams"]
    acu, nmc = stream["learners"]
    assert nmc["failed"] == ["RuntimeError: it broke"] and nmc["accuracy matrix"] == []
    assert acu["accuracy matrix"] == [row[: k + 1] for k, row in enumerate(rows[1]["accuracy matrix"]["class"])]


def test_common_settings_reach_those_that_know_them() -> None:
    common = {"epochs": 3, "buffer": 7}
    assert configured("keep.Replay", common, {"lr": 0.1}).optimizer.lr == pytest.approx(1e-4)  # type: ignore[attr-defined]
    assert configured("keep.Replay", common, {}).buffer == 7  # type: ignore[attr-defined]
    assert isinstance(configured("keep.NMC", common, {}), NMC)


def test_a_host_takes_common_settings_and_the_learning_rate_too() -> None:
    """LingoCL has no learning rate of its own, VirtualOutliers has one besides its host's."""
    common = {"network": {"name": "MLP", "hidden": [9]}, "epochs": 3}
    named: Any = configured("keep.LingoCL", common, {"lr": 0.1})
    assert named.inner.epochs == 3 and named.inner.network == common["network"]
    assert named.inner.optimizer.lr == pytest.approx(0.1 * LwF().optimizer.lr)
    spec = {"name": "keep.VirtualOutliers", "host": {"name": "keep.Finetune", "epochs": 7}}
    outliers: Any = configured(spec, common, {"lr": 10.0})
    assert (outliers.inner.epochs, outliers.epochs) == (7, 3)
    assert outliers.optimizer.lr == pytest.approx(10 * VirtualOutliers(host="keep.Finetune").optimizer.lr)
    assert outliers.inner.optimizer.lr == pytest.approx(10 * Finetune().optimizer.lr)
    assert [len(trials(name)) for name in ("keep.LingoCL", spec, "keep.NMC")] == [5, 5, 1]


def test_a_variant_has_a_name_of_its_own(tmp_path: Path) -> None:
    own = {"keep.NMC-raw": {"name": "keep.NMC", "normalise": False}}
    plan = Comparison((HALVES,), learners=("NMC", "NMC-raw"), own=own, seeds=(0,), trials=1)
    rows = Contest(plan, tmp_path / "out").execute()
    plain, raw = (row for row in rows if not row["error"])
    assert (plain["learner"], raw["learner"]) == ("keep.NMC", "keep.NMC-raw")
    assert plain["accuracy matrix"] != raw["accuracy matrix"]
    with pytest.raises(EngramError, match="NMC-raw"):
        Comparison(learners=("NMC-raw",))


def test_bytes_are_those_of_all_tensors(tmp_path: Path) -> None:
    learner = NMC()
    course = follow(learner, Contest(PLAN, tmp_path / "out").stages(STREAM, 0), Run())
    assert course.parameters[-1] == numbers(learner.model) and course.flops == [0, 0, 0]
    assert course.memory[-1] == bytes_of(learner.state_dict()) > course.memory[0]
    assert bytes_of({"a": [np.zeros(3)], "b": "text", "c": None}) == 0


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngramError, match="is no learner"):
        Comparison(learners=("forget.SSD",))
    with pytest.raises(EngramError, match="compared on classes"):
        Contest(Comparison((Stream("sklearn:diabetes"),)), tmp_path / "out")
    with pytest.raises(EngramError, match="two streams are called digits-2-2"):
        Comparison((Stream(), Stream(limit=300)))
    with pytest.raises(EngramError):
        Contest(Comparison((Stream(base=11, increment=2),), learners=("NMC",)), tmp_path / "out").execute()
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(EngramError, match="is a file"):
        Contest(Comparison((STREAM,), learners=("NMC",)), tmp_path / "file").execute()


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "compare continual --limit 300 --methods NMC ACU --seeds 0 --stream 4 3 --stream 5 5 --trials 1 --quiet"
    assert main([*words.split(), "--out", str(tmp_path / "out")]) == 0
    assert "keep.ACU" in capsys.readouterr().out
    page = (tmp_path / "out" / "leaderboard.html").read_text()
    assert "keep.ACU" in page and "<h2>digits-4-3</h2>" in page and "<h2>digits-5-5</h2>" in page
    table = pq.read_table(tmp_path / "out" / module.TABLE)
    assert set(table.column("stream").to_pylist()) == {"digits-4-3", "digits-5-5"}


def test_the_estimate_tries_a_task_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "compare continual --limit 300 --methods NMC Finetune --epochs 1 --estimate"
    assert main(words.split()) == 0
    out = capsys.readouterr().out
    assert "learners: 2; class orders: 3; streams: digits-2-2 (5 tasks, 209 rows)" in out and "min here" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "match"),
    [("continual --data sklearn:digits sklearn:wine --test a.csv", "2 --data and 1 --test"),
     ("unlearning --data sklearn:digits sklearn:wine", "takes one --data"),
     ("continual --network [", "--network=[ cannot be read as YAML"),
     ("continual --epochs 0", "--epochs is 0; give 1 or more"),
     ("unlearning --jobs 0", "--jobs is 0; give 1 or more")],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(words: str, match: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *words.split(), "--estimate"]) == 2
    assert match in capsys.readouterr().err


def test_images_of_other_sizes_are_brought_to_one(tmp_path: Path) -> None:
    from PIL import Image

    for label in "abcd":
        (tmp_path / "images" / label).mkdir(parents=True)
        for k in range(6):
            Image.new("L", (5 + k, 6), 40 * k).save(tmp_path / "images" / label / f"{k}.png")
    stream = Stream(str(tmp_path / "images"), image_size=8)
    train, _ = Contest(Comparison((stream,), learners=("NMC",)), tmp_path / "out").tables["images-2-2"]
    assert train.shapes["pixel_values"] == (1, 8, 8)
    with pytest.raises(EngramError, match="image-size"):
        Contest(Comparison((replace(stream, image_size=None),), learners=("NMC",)), tmp_path / "out")
