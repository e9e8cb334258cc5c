"""The command line, as a newcomer meets it: help without heavy imports, one sentence for a mistake, no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engram.cli import main

TINY = """
title: Tiny
data: {source: "sklearn:digits", limit: 240}
stream: {scenario: class, base: 5, increment: 5, order: natural}
learners: {exact: {name: keep.NMC}}
probes: [{name: audit.Accuracy, oracles: 2}, {name: audit.Membership, oracles: 2}]
events: [{learn: all}, {forget: {classes: [3]}}]
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(TINY)
    assert main(["run", str(folder / "tiny.yaml"), "--out", str(folder / "run"), "--quiet"]) == 0
    return folder / "run"


@pytest.mark.parametrize("words", ["--help", "papers", "methods", "run --help", "methods --have model,forget-rows"])
def test_help_and_lists_import_nothing_heavy(words: str) -> None:
    code = (
        "import sys\nfrom engram.cli import main\n"
        f"try:\n    main({words.split()!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert found.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nothing.yaml"], "there is no config file nothing.yaml"),
        (["run", "quickstart", "--learnrs.network.epochs=3", "--out", "x"], "did you mean 'learners'"),
        (["run", "quickstart", "--title"], "--title needs a value"),
        (["run", "quickstart", "more"], "unexpected argument 'more'"),
        (["methods", "SDD"], "did you mean 'SSD'"),
        (["methods", "Finetune"], "several wings"),
        (["methods", "--have", "forget-row"], "did you mean 'forget-rows'"),
        (["papers", "--wing", "keeps"], "no wing 'keeps'"),
        (["reproduce", "sdd"], "did you mean 'ssd'"),
        (["reproduce", "tofu-nonsense"], "unknown paper"),
        (["reproduce", "noprop"], "no experiment for 'noprop' yet"),
        (["report", "nowhere"], "nowhere holds no run"),
        (["predict", "--model", "nowhere", "--data", "sklearn:digits"], "nowhere"),
        (["learn", "--learner", "nowhere", "--data", "sklearn:digits", "--out", "x"], "holds no learner"),
    ],
)
def test_a_mistake_ends_in_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("engram: ") and captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_papers_and_methods_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["papers", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 54
    assert main(["methods", "--have", "forget-rows,forget-labels", "--wing", "forget", "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert "forget.GradientAscent" in names and "forget.Retrain" not in names


def test_the_help_of_one_method_names_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "ssd"]) == 0
    out = capsys.readouterr().out
    assert "alpha: float | Literal['auto'] = 2.0" in out and "2308.07707" in out


def test_a_run_prints_a_table_and_its_report(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["run", str(done.parent / "tiny.yaml"), "--out", str(done.parent / "again"), "--json", "--seed", "4"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["events"][-1]["title"] == "forget class 3"
    assert Path(found["report"]).exists()
    assert main(["run", str(done.parent / "tiny.yaml"), "--out", str(done)]) == 2
    assert "finished run" in capsys.readouterr().err


def test_the_report_is_rendered_again_and_runs_compared(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = (done / "report.html").read_text()
    assert main(["report", str(done)]) == 0
    assert (done / "report.html").read_text() == first
    assert main(["report", str(done), str(done)]) == 0
    assert (done.parent / "comparison.html").exists()


def test_a_learner_goes_on_and_predicts(done: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    learner = done / "models" / "exact"
    assert (
        main(["predict", "--model", str(learner), "--data", "sklearn:digits", "--out", str(tmp_path / "p.jsonl")]) == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(rows) == 1797 and {"id", "class", "name", "probability"} == set(rows[0])
    assert 3 not in {row["class"] for row in rows}
    words = ["learn", "--learner", str(learner), "--data", "sklearn:digits", "--out", str(tmp_path / "more")]
    assert main(words) == 2  # it holds most of these rows already
    assert "was learnt before" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_learning_on_overwrites_nothing(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(done.rglob("*"))
    assert main(["learn", "--learner", str(done / "models" / "exact"), "--data", "iris.csv", "--out", str(done)]) == 2
    assert "exists; choose another --out" in capsys.readouterr().err
    assert sorted(done.rglob("*")) == before


def test_a_device_that_is_not_there_is_named(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learner = str(done / "models" / "exact")
    assert main(["predict", "--model", learner, "--data", "sklearn:digits", "--device", "cpuu"]) == 2
    assert "the device 'cpuu' cannot be used" in capsys.readouterr().err


def test_prediction_says_so_when_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TINY.replace("classes: [3]", "where: label >= 0, probes: []").replace("keep.NMC", "keep.ACU")
    (tmp_path / "all.yaml").write_text(config)
    assert main(["run", str(tmp_path / "all.yaml"), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    learner = str(tmp_path / "run" / "models" / "exact")
    assert main(["predict", "--model", learner, "--data", "sklearn:digits"]) == 2
    assert "no class is live" in capsys.readouterr().err


def test_methods_says_so_when_nothing_is_possible(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--wing", "forget", "--have", "model,forget-rows"]) == 0
    assert "no method of this wing can do with forget-rows, model" in capsys.readouterr().out
    assert main(["methods", "--wing", "forget", "--have", "forget-rows,forget-labels"]) == 0
    assert "forget.GradientAscent" in capsys.readouterr().out
