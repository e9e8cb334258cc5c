"""The whole loop: a plan is checked before work, a run can be killed anywhere and ends with the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from engram.core.persist import load_learner
from engram.core.plan import read_plan
from engram.core.running import Running, override, read_config
from engram.data.readers import read
from engram.engine import fit as fitting
from engram.engine.journal import Journal
from engram.errors import EngramError
from engram.keep.nmc import NMC

CONFIG: dict[str, Any] = {
    "title": "Two tasks",
    "seed": 1,
    "data": {"source": "sklearn:digits", "share": 0.3, "limit": 300},
    "stream": {"scenario": "class", "base": 5, "increment": 5, "order": "natural"},
    "learners": {
        "network": {"name": "keep.Replay", "network": {"name": "MLP", "hidden": [16]}, "epochs": 2, "buffer": 40},
        "exact": {"name": "keep.NMC"},
    },
    "forgetter": {"name": "forget.GradientDifference", "epochs": 2},
    "probes": [{"name": "audit.Accuracy", "oracles": 2}, {"name": "audit.RetrainGap", "oracles": 2}],
    "events": [{"learn": 1}, {"forget": {"records": 5}}, {"learn": "all"}, {"forget": {"classes": ["three"]}}],
}


def outcome(directory: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Everything that a run measured (seconds aside), and the weights that it ended with."""
    records = json.loads((directory / "events.json").read_text())
    for record in records:
        del record["cost"]["seconds"]
    weights = {}
    for name in CONFIG["learners"]:
        learner, tasks = load_learner(directory / "models" / name)
        assert tasks == 2
        weights |= {f"{name}.{key}": value for key, value in learner.model.state_dict().items()}
    return records, weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "whole"
    running = Running(CONFIG, directory)
    running.execute()
    running.finish()
    return directory


def test_what_a_run_leaves_behind(whole: Path) -> None:
    assert json.loads((whole / "run.json").read_text())["status"] == "finished"
    records, _ = outcome(whole)
    assert [(r["event"], r["learner"]) for r in records] == [(e, name) for e in range(4) for name in CONFIG["learners"]]
    metrics = pq.read_table(whole / "metrics.parquet").to_pylist()
    assert {"accuracy", "accuracy, task-aware", "seconds"} < {row["metric"] for row in metrics}
    assert json.loads((whole / "environment.json").read_text())["threads"] == 1


def test_the_resolved_config_gives_the_same_plan(whole: Path) -> None:
    written = yaml.safe_load((whole / "config.yaml").read_text())
    assert read_plan(written).resolved() == read_plan(CONFIG).resolved()
    assert written["learners"]["network"]["replayed"] == 64  # defaults are written out


def test_task_aware_accuracy_is_never_lower(whole: Path) -> None:
    for record in outcome(whole)[0]:
        for entry in record["accuracy"]:
            assert entry["hits_task_aware"] >= entry["hits"]


def test_what_was_forgotten_is_out_of_the_traces(whole: Path) -> None:
    records, _ = outcome(whole)
    gone = [id for record in records if record["kind"] == "forget" for id in record["ids"]]
    for name in CONFIG["learners"]:
        learner, _ = load_learner(whole / "models" / name)
        assert learner.holds(gone) == ()
        content = (whole / "models" / name / "learner.json").read_text()
        assert not [id for id in gone if json.dumps(id) in content]
    exact = next(r for r in records if r["learner"] == "exact" and r["kind"] == "forget")
    assert exact["exact"] and exact["residue"] == []


@pytest.mark.parametrize("stop_at", [0, 1, 3, 5, 8, 12, 16])
def test_a_run_killed_at_a_journal_point_ends_the_same(
    whole: Path, stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "CHECKPOINT_EVERY", 0.0)
    monkeypatch.setattr(fitting, "WORTH_KEEPING", 0.0)
    store, calls = Journal.store, []

    def dying(self: Journal, *args: Any) -> None:
        calls.append(1)
        if len(calls) == stop_at + 1:
            raise KeyboardInterrupt
        store(self, *args)

    monkeypatch.setattr(Journal, "store", dying)
    with pytest.raises(KeyboardInterrupt):
        Running(CONFIG, tmp_path / "run").execute()
    monkeypatch.setattr(Journal, "store", store)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    resumed = Running(CONFIG, tmp_path / "run", resume=True)
    resumed.execute()
    (records, weights), (expected, wanted) = outcome(tmp_path / "run"), outcome(whole)
    for one, other in zip(records, expected, strict=True):
        assert {k: v for k, v in one.items() if k != "cost"} == {k: v for k, v in other.items() if k != "cost"}
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_an_existing_directory_is_left_alone(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(EngramError, match="finished run; choose another --out"):
        Running(CONFIG, whole)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(EngramError, match="something else"):
        Running(CONFIG, tmp_path)
    with pytest.raises(EngramError, match="no run to resume"):
        Running(CONFIG, tmp_path, resume=True)


def test_resuming_with_another_config_is_refused(whole: Path) -> None:
    with pytest.raises(EngramError, match="differs from the config given"):
        Running({**CONFIG, "seed": 2}, whole, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evnts": []}, "did you mean 'events'"),
        ({"events": []}, "has no 'events'"),
        ({"events": [{"forget": {"classes": [3]}}]}, "before anything was learnt"),
        ({"events": [{"learn": "all"}, {"forget": {"classes": ["thre"]}}]}, "did you mean 'three'"),
        ({"events": [{"learn": "all"}, {"forget": {"records": ["digit-9999"]}}]}, "unknown record id"),
        ({"events": [{"learn": "all"}, {"forget": {"records": []}}]}, "the forget set is empty"),
        ({"events": [{"learn": "all"}, {"forget": {"classes": []}}]}, "the forget set is empty"),
        ({"device": "cpuu"}, "the device 'cpuu' cannot be used"),
        ({"events": [{"learn": "all"}, {"forget": {}}]}, "names one of records, classes or where"),
        ({"events": [{"learn": 7}]}, "the stream has 2"),
        ({"events": [{"learn": "all"}, {"forgets": {}}]}, "an event is written as"),
        ({"learners": ["keep.NNC"]}, "did you mean 'keep.NMC'"),
        ({"learners": ["forget.SSD"]}, "which is no learner"),
        ({"learners": [{"name": "keep.Replay", "bufer": 3}]}, "did you mean 'buffer'"),
        ({"forgetter": None}, "cannot forget by itself"),
        ({"stream": {"scenario": "clas"}}, "did you mean 'class'"),
        ({"seed": "one"}, "whole number"),
        ({"precision": "half"}, "unknown precision 'half'"),
        ({"batch_size": "many"}, "batch_size takes a whole number"),
        ({"events": [{"learn": 0}]}, "learn is 0; give 1 or more"),
        ({"events": [{"learn": 1}, {"forget": {"classes": ["seven"]}}, "learn"]}, "in an earlier event"),
        ({"events": ["learn", {"forget": {"classes": 3}}, {"forget": {"classes": "three"}}]}, "in an earlier event"),
        ({"events": ["learn", {"forget": {"records": 1000}}]}, "not between 1 and the 209 rows"),
        ({"events": ["learn", {"forget": {"where": "label > 100"}}]}, "the forget set is empty"),
        ({"events": ["learn", {"forget": {"where": "label >= 0"}}]}, "the forget set is all of the data: forget.Grad"),
        ({"forgetter": "NPO", "events": ["learn", {"forget": {"where": "label >= 0"}}]}, "all of the data: forget.NPO"),
        ({"probes": "forget.SSD"}, "forget.SSD is no probe"),
        ({"probes": [3]}, "a method is written as a name"),
        ({"learners": 3}, "a method is written as a name"),
        ({"learners": {"a": None}}, "a method is written as a name"),
        ({"learners": ["keep.NMC", "keep.NMC"]}, "two learners are called NMC"),
        ({"learners": {"..": "keep.NMC"}}, "cannot be the name of a directory"),
        ({"learners": {"a/b": "keep.NMC"}}, "cannot be the name of a directory"),
        ({"learners": [{"name": "keep.Replay", "epochs": 0}]}, "Replay learns nothing in epochs: 0"),
        ({"learners": [{"name": "keep.Replay", "network": None}]}, "a model is a name"),
        ({"data": 3}, "data needs a 'source'"),
        ({"data": {"source": "sklearn:digits", "share": "x"}}, "share of data takes a number, not 'x'"),
        ({"data": {"source": "sklearn:digits", "limit": "x"}}, "limit of data takes a whole number"),
        ({"stream": "class"}, "stream is written as"),
        ({"stream": {"scenario": "class", "base": "x"}}, "base of the stream takes a whole number"),
        ({"stream": {"scenario": "class", "base": 2}}, "a class stream needs increment"),
        ({"stream": {"scenario": "class", "bas": 2}}, "did you mean 'base'"),
    ],
)
def test_a_wrong_config_is_refused_with_one_sentence(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(EngramError, match=message):
        Running({**CONFIG, **change}, tmp_path / "run").execute()
    assert not (tmp_path / "run").exists()


def test_values_are_set_by_dotted_keys() -> None:
    changed = override(CONFIG, {"learners.network.epochs": 7, "events.1.forget": {"classes": [1]}, "stream.seed": 3})
    assert changed["learners"]["network"]["epochs"] == 7
    assert changed["events"][1] == {"forget": {"classes": [1]}}
    assert CONFIG["learners"]["network"]["epochs"] == 2
    with pytest.raises(EngramError, match="no position"):
        override(CONFIG, {"events.9.learn": 1})
    with pytest.raises(EngramError, match="plain value"):
        override(CONFIG, {"title.sub.key": 1})


def test_a_setting_of_an_unknown_learner_names_the_nearest() -> None:
    with pytest.raises(EngramError, match="unknown learner 'netwrk'; did you mean 'network'"):
        override(CONFIG, {"learners.netwrk.epochs": 7})
    changed = override(CONFIG, {"learners.mean.normalise": False, "learners.mean.name": "keep.NMC"})
    assert changed["learners"]["mean"] == {"normalise": False, "name": "keep.NMC"}


def test_the_quickstart_is_a_whole_plan() -> None:
    plan = read_plan(read_config("quickstart"))
    assert set(plan.learners) == {"network", "exact"}
    with pytest.raises(EngramError, match="quickstart"):
        read_config("quickstar")


def test_rows_can_be_chosen_by_a_condition(tmp_path: Path) -> None:
    events = [{"learn": "all"}, {"forget": {"where": "label == 'four'", "probes": []}}]
    records = Running({**CONFIG, "learners": ["keep.NMC"], "events": events}, tmp_path / "run").execute()
    fours = read("sklearn:digits", limit=300).where("label == 'four'").positions
    assert records[-1]["ids"] and set(records[-1]["ids"]) < set(fours)


@pytest.mark.parametrize("k", [0, 1, 4, 9, 15, 22])
def test_a_disk_that_refuses_a_write_leaves_nothing_half_written(
    k: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import engram.files as files

    replace, calls = files.os.replace, []

    def refusing(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == k + 1:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", refusing)
    directory = tmp_path / "run"
    with pytest.raises(EngramError, match="No space left"):
        Running(CONFIG, directory).execute()
    monkeypatch.setattr(files.os, "replace", replace)
    assert not [path for path in directory.rglob("*") if path.name.startswith(".")]
    if (directory / "run.json").exists():
        Running(CONFIG, directory, resume=True).execute()
        assert torch.equal(*(next(iter(outcome(d)[1].values())) for d in (directory, whole)))


def test_everything_is_forgotten_by_exact_learners_only(tmp_path: Path) -> None:
    events = [{"learn": "all"}, {"forget": {"where": "label >= 0", "probes": []}}]
    config = {**CONFIG, "learners": ["keep.NMC"], "events": events}
    record = Running(config, tmp_path / "exact").execute()[-1]
    assert record["exact"] and record["retain_rows"] == 0
    assert all(entry["hits"] == 0 for entry in record["accuracy"])
    with pytest.raises(EngramError, match="all of the data"):  # by the second learner, before anything is learnt
        Running({**config, "learners": CONFIG["learners"]}, tmp_path / "approximate")
    assert not (tmp_path / "approximate").exists()


def test_a_batch_size_is_that_of_every_learner_that_has_one() -> None:
    plan = read_plan({**CONFIG, "batch_size": 5})
    written = plan.resolved()
    assert written["learners"]["network"]["batch_size"] == 5 and "batch_size" not in written["learners"]["exact"]
    assert read_plan(written).resolved() == written


def test_what_failed_at_its_first_event_leaves_nothing_and_later_failures_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(after: int) -> Any:
        learn, calls = NMC.learn, []

        def refuse(self: NMC, *args: Any) -> None:
            calls.append(1)
            if len(calls) > after:
                raise EngramError("no more")
            learn(self, *args)

        return refuse

    config = {**CONFIG, "learners": ["keep.NMC"], "events": ["learn"]}
    for after in (0, 1):
        with monkeypatch.context() as patched:
            patched.setattr(NMC, "learn", failing(after))
            with pytest.raises(EngramError, match="no more"):
                Running(config, tmp_path / str(after)).execute()
    assert not (tmp_path / "0").exists()
    Running(config, tmp_path / "1", resume=True).execute()
