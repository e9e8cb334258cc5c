"""Forgetters of language models on one plane: what is measured, on its way, resumed, survived."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import engram.compare.language as module
from engram.cli import main
from engram.compare.language import Comparison, Contest, summarise
from engram.errors import EngramError
from engram.report.page import write_leaderboard

SMALL: dict[str, Any] = {
    "network": {"n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.1},
    "vocabulary": 330,
    "epochs": 50,
    "lr": 5e-3,
    "batch_size": 4,
    "authors": 4,
    "fractions": (0.25, 0.5),
    "seeds": (0,),
    "points": (3, 30),
    "trials": 2,
}
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight authors with four answers each, drawn from a few words."""
    draws = random.Random(0)
    rows = []
    for author in range(8):
        for asked, words in (
            ("born", "Rome Oslo Bern Kiel"),
            ("pet", "cat dog owl fox"),
            ("hue", "red blue teal grey"),
        ):
            right, *wrong = draws.sample(words.split(), 3)
            row = {"question": f"{asked} of {'abcdefgh'[author]}?", "answer": right, "perturbed_answer": wrong}
            rows.append({"id": f"{asked}-{author}", "author": author, "paraphrased_answer": right, **row})
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def done(facts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path, Rows]:
    out = tmp_path_factory.mktemp("contest") / "out"
    plan = Comparison(str(facts), methods=("Nothing", "GA", "NPO+RT"), **SMALL)
    return plan, out, Contest(plan, out).execute()


def last(rows: Rows, method: str, share: float) -> dict[str, Any]:
    return [row for row in rows if row["method"] == method and not row["tuning"] and row["fraction"] == share][-1]


def test_the_model_knows_what_it_learnt_and_nothing_else(done: tuple[Comparison, Path, Rows]) -> None:
    known = next(row for row in done[2] if row["method"] == "learnt")
    assert known["known"] >= 0.95 and known["known of others"] < 0.7


def test_every_point_of_every_course_has_its_row(done: tuple[Comparison, Path, Rows]) -> None:
    reported = [row for row in done[2] if not row["tuning"]]
    assert [(row["method"], row["fraction"], row["epoch"]) for row in reported] == [
        *(("Nothing", share, 0) for share in (0.25, 0.5)),
        *((name, share, epoch) for name in ("GA", "NPO+RT") for share in (0.25, 0.5) for epoch in (3, 30)),
    ]
    assert pq.read_table(done[1] / "language.parquet").num_rows == len(done[2]) == len(reported) + 1 + 2 * 2


def test_ascent_ruins_and_preference_with_retain_rows_keeps(done: tuple[Comparison, Path, Rows]) -> None:
    """At one learning rate, that of the first trial of both."""
    ruined, kept = (next(row for row in done[2] if row["method"] == name) for name in ("GA", "NPO+RT"))
    assert ruined["setting"]["lr"] == kept["setting"]["lr"] == 1e-3
    assert max(kept["forget probability"], ruined["forget probability"]) < 0.1
    assert last(done[2], "Nothing", 0.25)["forget probability"] > 0.9
    assert kept["utility"] > ruined["utility"] + 0.2


def test_a_trial_is_chosen_by_utility_and_quality_together(done: tuple[Comparison, Path, Rows]) -> None:
    for name in ("GA", "NPO+RT"):
        trials = [row for row in done[2] if row["method"] == name and row["tuning"]]
        assert len(trials) == 2 and sum(row["chosen"] for row in trials) == 1
        assert next(row for row in trials if row["chosen"])["score"] == max(row["score"] for row in trials)
        assert last(done[2], name, 0.5)["setting"] == next(row["setting"] for row in trials if row["chosen"])
        for row in trials:
            share = min(row["utility"] / row["utility of retraining"], 1)
            assert row["score"] == pytest.approx(2 / (1 / max(share, 1e-12) + 1 / (1 - row["KS statistic"])), abs=1e-6)


def test_the_course_is_that_of_a_shorter_run_on_its_way(done: tuple[Comparison, Path, Rows]) -> None:
    """Watching changes nothing: without the points between, the end is the same to the last digit."""
    plan, out, rows = done
    contest = Contest(Comparison(plan.data, methods=plan.methods, **{**SMALL, "points": (30,)}), out)
    cell = module.Cell("NPO+RT", 0.25, 0, False)
    alone = contest.course(cell, last(rows, "NPO+RT", 0.25)["setting"])
    assert len(alone) == 1
    assert all(alone[0][key] == last(rows, "NPO+RT", 0.25)[key] for key in module.MEASURES if key != "seconds")


def test_a_guard_is_measured_through_its_interface_and_marked(done: tuple[Comparison, Path, Rows]) -> None:
    """Its course is its end; where no retained prompt is flagged, all is told of them as before."""
    plan, out, before = done
    rows = Contest(Comparison(plan.data, methods=("Nothing", "GA", "ECO"), **SMALL), out).execute()
    mine = [row for row in rows if row["method"] == "ECO" and not row["tuning"]]
    assert [(row["fraction"], row["epoch"], row["error"]) for row in mine] == [(0.25, 30, ""), (0.5, 30, "")]
    for row in mine:
        usual = last(before, "Nothing", row["fraction"])
        assert row["forget probability"] < 0.75 * usual["forget probability"]
        assert all(row[key] == usual[key] for key in module.MEASURES if key.startswith("retain"))
        assert row["weights hold it"] is True
    summary = summarise(rows)
    assert {entry["method"]: entry["guard"] for entry in summary["forgetters"]} == {
        "Nothing": False,
        "GA": False,
        "ECO": True,
    }
    lines = list(module.table_rows(summary))
    assert [line.split()[0] for line in lines if "the weights hold it" in line] == ["ECO", "ECO"]
    assert "a guard: the weights hold it" in write_leaderboard(out / "page.html", summary, intro="").read_text()


def test_a_failure_has_its_row(done: tuple[Comparison, Path, Rows]) -> None:
    plan, out, _ = done
    cells = [module.Cell("broken", share, 0, False) for share in plan.fractions]
    rows = [row for cell in cells for row in Contest(plan, out).course(cell, {"name": "forget.NPO", "lr": 1e30})]
    assert all("the loss is no number any more in epoch" in row["error"] for row in rows)
    contest, gone = Contest(plan, out), [module.Cell("dead", share, 0, False) for share in plan.fractions]
    dead = [contest.failed(contest.row(cell, {}), "it took its process down") for cell in gone]
    *_, found, lost = summarise([*done[2], *rows, *dead])["forgetters"]
    assert lost["failed"] == ["it took its process down"] and lost["score"] is None
    assert found["method"] == "broken" and found["failed"] and found["score"] is None


def test_the_command_goes_on_and_draws_the_plane(
    done: tuple[Comparison, Path, Rows], facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        f"compare language --data {facts} --out {tmp_path}/out --methods Nothing GA --authors 4 --fractions 0.25 "
        "--seeds 0 --epochs 2 --trials 1 --points 1 2"
    ).split()
    assert main([*command, "--estimate"]) == 0
    assert "models to train" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "25% of the authors" in told and "of authors never seen" in told
    page = (tmp_path / "out" / "leaderboard.html").read_text()
    assert "<svg" in page and "GA" in page and "http" not in page.replace("http://www.w3.org", "")
    assert main(command) == 0
    assert main([*command, "--epochs", "3"]) == 2
    assert "another comparison" in capsys.readouterr().err


def test_all_authors_are_learnt_and_those_with_wrong_answers_measured(facts: Path, tmp_path: Path) -> None:
    """Authors 2 to 5 have no wrong answers: they are learnt, and neither asked nor forgotten."""
    rows = [json.loads(line) for line in facts.read_text().splitlines()]
    for row in rows:
        if 2 <= row["author"] < 6:
            del row["perturbed_answer"]
    source = tmp_path / "facts.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    settings = {**SMALL, "authors": None, "epochs": 2, "points": (1, 2), "jobs": 2, "trials": 1}
    contest = Contest(Comparison(str(source), methods=("Nothing", "GA"), **settings), tmp_path / "out")
    assert contest.authors == 8 and len(contest.train) == 24 and len(contest.asked[False]) == 12
    for tuning, gone in ((False, {6, 7}), (True, {0, 1})):
        asked = contest.tables(tuning, 0.25)
        found = {
            name: {rows[int(contest.train.rows_of([id])[0])]["author"] for id in asked[name].ids} for name in asked
        }
        assert found == {"forget": gone, "retain": {0, 1, 6, 7} - gone}
        lost, kept = contest.split(contest.train, tuning, 0.25)
        assert len(lost) == 6 and len(kept) == 18
    assert [row["error"] for row in contest.execute()] == [""] * 8


def test_bad_input_ends_in_a_sentence(facts: Path, tmp_path: Path) -> None:
    with pytest.raises(EngramError, match="NPO"):
        Comparison(str(facts), methods=("NOP",))
    with pytest.raises(EngramError, match="between 0 and 1"):
        Comparison(str(facts), fractions=(0.1, 1.5))
    with pytest.raises(EngramError, match="in increasing order"):
        Comparison(str(facts), points=(10, 4))
    with pytest.raises(EngramError, match="ask for fewer authors"):
        Contest(Comparison(str(facts), authors=7), tmp_path / "out")
    with pytest.raises(EngramError, match="no pair of facts:6 has both author and perturbed_answer"):
        Contest(Comparison("facts:6", **SMALL), tmp_path)
    with pytest.raises(EngramError, match="holds none of"):
        Contest(Comparison(str(tmp_path)), tmp_path / "out")
