"""Forgetters under one protocol: what is measured, resumed, survived."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import engram.compare.unlearning as module
from engram.cli import main
from engram.compare.unlearning import Comparison, Contest, spaces, summarise, trainings
from engram.engine.optimizer import Optimizer
from engram.errors import EngramError

PLAN = Comparison(
    network={"name": "MLP", "hidden": [32]},
    optimizer=Optimizer("adam", lr=0.01),
    limit=600,
    epochs=6,
    methods=("Retrain", "GradientAscent", "Finetune", "SSD"),
    requests=("random", "class"),
    seeds=(0, 1),
    trials=2,
)
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    out = tmp_path_factory.mktemp("contest") / "out"
    return out, Contest(PLAN, out).execute()


def without_seconds(rows: Sequence[dict[str, Any]]) -> Rows:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_every_cell_has_its_row_and_every_trial_too(done: tuple[Path, Rows]) -> None:
    reported = [row for row in done[1] if not row["tuning"]]
    assert {(r["method"], r["kind"], r["seed"]) for r in reported} == {
        (f"forget.{name}", kind, seed) for name in PLAN.methods for kind in PLAN.requests for seed in PLAN.seeds
    }
    trials = [row for row in done[1] if row["tuning"]]
    assert len(trials) == 3 * 2 * 2  # three methods with settings, two kinds, two trials
    assert sum(row["chosen"] for row in trials) == 6
    table = pq.read_table(done[0] / "unlearning.parquet")
    assert table.num_rows == len(done[1]) and table["seed"].to_pylist() == [row["seed"] for row in done[1]]


def test_the_chosen_setting_is_that_of_the_least_gap_and_is_reported(done: tuple[Path, Rows]) -> None:
    for row in (row for row in done[1] if row["chosen"]):
        rivals = [r["gap"] for r in done[1] if r["tuning"] and (r["method"], r["kind"]) == (row["method"], row["kind"])]
        assert row["gap"] == min(rivals)
        mine = [r for r in done[1] if not r["tuning"] and (r["method"], r["kind"]) == (row["method"], row["kind"])]
        assert [r["setting"] for r in mine] == [row["setting"]] * len(PLAN.seeds)


def test_retraining_is_as_good_as_retraining(done: tuple[Path, Rows]) -> None:
    gaps = {row["method"]: row["gap"] for row in done[1] if row["kind"] == "class" and not row["tuning"]}
    assert gaps["forget.Retrain"] < 0.05
    for row in done[1]:
        assert row["oracle forget accuracy"] == 0 if row["kind"] == "class" else row["oracle forget accuracy"] > 0.5
    summary = summarise(done[1])
    assert summary["methods"][0]["method"] == "forget.Retrain" and summary["methods"][0]["cost"][0] == 1.0
    found = {entry["method"]: entry["search"] for entry in summary["methods"]}
    assert found["forget.Retrain"] == 0
    base = {row["kind"]: row["seconds"] for row in done[1] if row["method"] == "forget.Retrain" and row["seed"] == 0}
    spent = [row["seconds"] / base[row["kind"]] for row in done[1] if row["tuning"] and row["method"] == "forget.SSD"]
    assert found["forget.SSD"] == pytest.approx(sum(spent) / 2)  # two kinds
    ranking = json.loads((done[0] / "ranking.json").read_text())
    assert sorted(ranking["order"]) == ["forget.Finetune", "forget.GradientAscent", "forget.SSD"]


def test_the_tuning_request_is_another_one(tmp_path: Path) -> None:
    contest = Contest(PLAN, tmp_path / "out")
    for kind in module.KINDS:
        tuning, reported = (contest.request(kind, flag) for flag in (True, False))
        assert set(tuning.ids) != set(reported.ids)
        assert tuning.retain is not None and not set(tuning.ids) & set(tuning.retain.ids)
    subclass = contest.request("subclass", False)
    assert subclass.forget is not None and subclass.retain is not None
    assert len(subclass.forget.classes) == 1 and set(subclass.forget.classes) <= set(subclass.retain.classes)


def test_it_goes_on_where_it_was_interrupted(
    done: tuple[Path, Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, count = Contest._measured, []

    def killed(self: Contest, *args: Any) -> dict[str, Any]:
        count.append(args)
        if len(count) == 9:
            raise KeyboardInterrupt
        return measured(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Contest, "_measured", killed)
        with pytest.raises(KeyboardInterrupt):
            Contest(PLAN, tmp_path / "out").execute()
    finished = {path.name for path in (tmp_path / "out" / "cells").iterdir()}
    assert finished
    assert without_seconds(Contest(PLAN, tmp_path / "out").execute()) == without_seconds(done[1])


def test_a_method_that_fails_has_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engram.forget.finetune import Finetune

    def broken(*_: Any) -> None:
        raise TypeError("it broke")

    monkeypatch.setattr(Finetune, "forget", broken)
    plan = Comparison(limit=300, epochs=1, methods=("Retrain", "Finetune"), requests=("class",), seeds=(0,), trials=1)
    rows = Contest(plan, tmp_path / "out").execute()
    errors = {row["method"]: row["error"] for row in rows if not row["tuning"]}
    assert errors == {"forget.Retrain": "", "forget.Finetune": "TypeError: it broke"}
    assert summarise(rows)["methods"][-1]["failed"] == ["TypeError: it broke"]


def test_what_is_no_model_is_that_method_s_error_and_it_is_not_recommended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engram.forget.finetune import Finetune

    monkeypatch.setattr(Finetune, "forget", lambda *_: torch.nn.Identity())
    methods = ("Retrain", "Finetune", "SSD")
    plan = Comparison(limit=300, epochs=1, methods=methods, requests=("class",), seeds=(0,), trials=1, oracles=1)
    rows = Contest(plan, tmp_path / "out").execute()
    errors = {row["method"]: row["error"] for row in rows if not row["tuning"]}
    assert errors["forget.Finetune"] and not errors["forget.Retrain"] and not errors["forget.SSD"]
    assert json.loads((tmp_path / "out" / "ranking.json").read_text())["order"] == ["forget.SSD"]


def test_a_method_that_takes_its_process_down_has_a_row_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool breaks; then every cell is tried in a process of its own (here: this one)."""

    class Process:
        def __init__(self, n_jobs: int) -> None:
            assert n_jobs == 2

        def __call__(self, work: Iterable[tuple[Any, Any, Any]]) -> None:
            for call, given, _ in work:
                if given[-1][0].method == "forget.Finetune":
                    raise BrokenProcessPool
                call(*given)

    def broken(self: Contest, things: Sequence[Any], name: str) -> None:
        raise BrokenProcessPool

    monkeypatch.setattr("joblib.Parallel", Process)
    monkeypatch.setattr(Contest, "each", broken)
    methods = ("Retrain", "Finetune", "SSD")
    plan = Comparison(limit=300, epochs=1, methods=methods, requests=("class",), seeds=(0,), trials=1, oracles=1)
    rows = Contest(plan, tmp_path / "out").execute()
    errors = {row["method"]: row["error"] for row in rows if not row["tuning"]}
    assert "took its process down" in errors["forget.Finetune"] and not errors["forget.SSD"]
    assert not any(row["chosen"] for row in rows if row["method"] == "forget.Finetune")
    assert summarise(rows)["methods"][-1]["method"] == "forget.Finetune"


def test_the_estimate_counts_the_models_that_a_method_trains(tmp_path: Path) -> None:
    assert [trainings(name) for name in ("nothing", "forget.SSD", "forget.OracleMatching")] == [1, 1, 10]
    assert trainings("forget.DatamodelMatching") == 600
    many = Comparison(methods=("Retrain", "DatamodelMatching"), limit=200, epochs=1, oracles=1)
    minutes = [
        int(re.findall(r"about (\d+) minutes", Contest(plan, tmp_path / "out").estimate())[0])
        for plan in (many, replace(many, methods=("Retrain",)))
    ]
    assert minutes[0] > 3 * minutes[1]


def test_a_method_sees_no_more_than_it_declares(done: tuple[Path, Rows]) -> None:
    needed = {row["method"]: row["needed"] for row in done[1]}
    assert needed["forget.GradientAscent"] == ["forget-labels", "forget-rows"]
    assert needed["forget.Finetune"] == ["retain-labels", "retain-rows"]


def test_what_cannot_be_compared_is_refused(done: tuple[Path, Rows], tmp_path: Path) -> None:
    with pytest.raises(EngramError, match="another comparison"):
        Contest(Comparison(limit=600, seeds=(5,)), done[0]).claim()
    with pytest.raises(EngramError, match="kind of request"):
        Comparison(requests=("classes",))
    with pytest.raises(EngramError, match="SSD"):
        Comparison(methods=("SDD",))
    with pytest.raises(EngramError, match="compared on classes"):
        Contest(Comparison(data="sklearn:diabetes"), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(EngramError, match="something else"):
        Contest(PLAN, tmp_path / "full").claim()


def test_a_guard_is_measured_and_not_recommended(tmp_path: Path) -> None:
    methods = ("Retrain", "ECO", "GradientAscent")
    plan = Comparison(limit=300, epochs=1, methods=methods, requests=("class",), seeds=(0,), trials=1, oracles=1)
    entries = {entry["method"]: entry for entry in summarise(Contest(plan, tmp_path / "out").execute())["methods"]}
    assert [name for name, entry in entries.items() if entry["guard"]] == ["forget.ECO"]
    assert entries["forget.ECO"]["gap"] is not None
    assert json.loads((tmp_path / "out" / "ranking.json").read_text())["order"] == ["forget.GradientAscent"]


def test_trials_begin_with_the_methods_own_setting() -> None:
    assert spaces("forget.Retrain") == []
    assert spaces("forget.SSD")[0] == {} and spaces("forget.SSD")[1] == {"alpha": "auto"}
    assert [s.get("strength") for s in spaces("forget.ECO")][:2] == [None, 1.0]
    assert [s.get("optimizer") for s in spaces("forget.SCRUB")][:3] == [None, 0.1, 10.0]


def test_the_command_writes_a_leaderboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "compare unlearning --limit 300 --epochs 1 --methods Retrain SSD --requests class --seeds 0 --trials 1"
    assert main([*words.split(), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert "forget.SSD" in capsys.readouterr().out
    assert "forget.SSD" in (tmp_path / "out" / "leaderboard.html").read_text()
    assert main([*words.split(), "--out", str(tmp_path / "other"), "--estimate"]) == 0
    assert "minutes" in capsys.readouterr().out and not (tmp_path / "other").exists()
    kinds = "compare unlearning --limit 300 --epochs 1 --methods Retrain,SSD --requests random,class,subclass"
    assert main([*kinds.split(), "--estimate"]) == 0
    assert capsys.readouterr().out.startswith("2 methods, 3 kinds of requests")
    assert main(kinds.split()) == 2
    assert "--out" in capsys.readouterr().err
