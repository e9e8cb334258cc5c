"""The command line, as a newcomer meets it: help without heavy imports, one sentence for a mistake, no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engram import cli, commands, comparing, files
from engram.cli import main
from engram.core.ledger import Ledger
from engram.core.persist import load_learner, save_learner
from engram.core.running import Running
from engram.data.preprocessing import Preprocessing
from engram.data.readers import read
from engram.data.task import Task
from engram.keep.finetune import Finetune
from engram.models.io import digest, load
from engram.reproduce import claims
from engram.reproduce.claims import Claim

TINY = """
title: Tiny
data: {source: "sklearn:digits", limit: 240}
stream: {scenario: class, base: 5, increment: 5, order: natural}
learners: {exact: {name: keep.NMC}}
probes: [{name: audit.Accuracy, oracles: 2}, {name: audit.Membership, oracles: 2}]
events: [{learn: all}, {forget: {classes: [3]}}]
"""
LEARN = "events: [learn]\n"


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
        (["run", "."], ". is a directory"),
        (["run", "quickstart", "--title=["], "--title=[ cannot be read as YAML"),
        (["reproduce", "--json", "ssd"], "say which paper, and say it first"),
        (["run", "quickstrat"], "did you mean 'quickstart'"),
        (["run", "quickstart", "--learners.network.epochs=-1"], "epochs of keep.Replay is -1; give 0 or more"),
        (["run", "quickstart", "--learners.network.epochs=0"], "network learns nothing in epochs: 0"),
        (["run", "quickstart", "--learners.network.optimizer.lr=-1"], "lr of the optimizer is -1"),
        (["run", "quickstart", "--batch-size", "0"], "batch_size is 0; give 1 or more"),
        (["run", "quickstart", "--learners=NMC", "--batch-size", "8"], "no learner of this run has a batch_size"),
        (["run", "quickstart", "--resume"], "holds no run to resume"),
        (["methods", "SDD"], "did you mean 'SSD'"),
        (["methods", "Finetune"], "several wings"),
        (["methods", "--have", "forget-row"], "did you mean 'forget-rows'"),
        (["papers", "--wing", "keeps"], "no wing 'keeps'"),
        (["reproduce", "sdd"], "did you mean 'ssd'"),
        (["reproduce", "tofu-nonsense"], "unknown paper"),
        (["reproduce", "noprop"], "no experiment for 'noprop' yet"),
        (["report", "nowhere"], "nowhere holds no run"),
        (
            ["predict", "--model", "nowhere", "--data", "sklearn:digits"],
            "nowhere holds no saved model (config.json is missing); there is no such directory",
        ),
        (["predict", "--model", ".", "--data", "sklearn:digits", "--batch-size", "0"], "the batch size is 0"),
        (["predict", "--model", ".", "--data", "sklearn:digits", "--out", "."], ". exists; choose another --out"),
        (["reproduce", "nmc-baseline", "--json", "."], ". exists; choose another --json FILE"),
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


def test_the_claims_of_a_paper_go_to_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Claim("it holds", "0.5", (0.0, 1.0), (0.5,)), Claim("it does not", "0.5", (0.0, 1.0), (1.5,))]
    monkeypatch.setattr(claims, "reproduce", lambda slug, scale: found)
    file = tmp_path / "new" / "claims.json"
    assert main(["reproduce", "ssd", "--scale", "smoke", "--json", str(file)]) == 1
    assert [claim["inside"] for claim in json.loads(file.read_text())] == [True, False]
    assert "OUTSIDE: does not hold here" in capsys.readouterr().out
    assert main(["reproduce", "ssd", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == json.loads(file.read_text())
    assert main(["reproduce", "ssd", "--json", str(file)]) == 2  # what stands there stays


def test_the_batch_size_of_a_run_is_that_of_every_learner_that_has_one(tmp_path: Path) -> None:
    learners = "{a: {name: keep.Finetune, epochs: 1}, b: {name: keep.Joint, epochs: 1}, exact: {name: keep.NMC}}"
    (tmp_path / "two.yaml").write_text(TINY.replace("{exact: {name: keep.NMC}}", learners).split("probes")[0] + LEARN)
    words = ["run", str(tmp_path / "two.yaml"), "--out", str(tmp_path / "run"), "--quiet", "--batch-size", "7"]
    assert main(words) == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["learners"]
    assert (written["a"]["batch_size"], written["b"]["batch_size"]) == (7, 7)
    assert "batch_size" not in written["exact"]
    first, *_ = json.loads((tmp_path / "run" / "events.json").read_text())
    assert first["cost"]["steps"] == -(-first["rows"] // 7)
    assert main([*words, "--resume"]) == 0


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a network that has learnt five digits, and two files of rows."""
    folder = tmp_path_factory.mktemp("network")
    learners = "{network: {name: keep.Finetune, epochs: 1, network: {name: MLP, hidden: [8]}}}"
    (folder / "one.yaml").write_text(TINY.replace("{exact: {name: keep.NMC}}", learners).split("probes")[0] + LEARN)
    assert main(["run", str(folder / "one.yaml"), "--out", str(folder / "run"), "--quiet"]) == 0
    return folder / "run" / "models" / "network"


def test_a_learner_goes_on_with_another_batch_size_and_precision(network: Path, tmp_path: Path) -> None:
    words = ["learn", "--learner", str(network), "--data", "sklearn:digits"]
    assert main([*words, "--out", str(tmp_path / "usual")]) == 0
    assert main([*words, "--out", str(tmp_path / "small"), "--batch-size", "300"]) == 0
    assert main([*words, "--out", str(tmp_path / "rough"), "--precision", "bfloat16"]) == 0
    sizes = [load_learner(tmp_path / name)[0].batch_size for name in ("usual", "small", "rough")]
    assert sizes == [64, 300, 64]
    weights = [digest(load(tmp_path / name / "model")) for name in ("usual", "small", "rough")]
    assert len(set(weights)) == 3


def test_a_batch_size_for_a_learner_that_has_none(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["learn", "--learner", str(done / "models" / "exact"), "--data", "sklearn:digits"]
    assert main([*words, "--out", str(tmp_path / "more"), "--batch-size", "8"]) == 2
    assert "keep.NMC has no batch_size; leave it out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_predictions_in_every_form(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", "--model", str(network), "--data", "sklearn:digits"]
    assert main(words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == lines
    file = tmp_path / "p.jsonl"
    assert main([*words, "--out", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(file), "rows": len(lines)}
    assert [json.loads(line) for line in file.read_text().splitlines()] == lines
    assert main([*words, "--out", str(file)]) == 2  # what stands there stays
    assert main([*words, "--out", str(tmp_path / "q.jsonl"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main([*words, "--out", str(tmp_path / "r.jsonl")]) == 0
    assert capsys.readouterr().out == f"predictions of {len(lines)} rows stand in {tmp_path / 'r.jsonl'}\n"


def test_predictions_in_bfloat16_are_near_and_not_the_same(network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", "--model", str(network), "--data", "sklearn:digits", "--json"]
    assert main(words) == 0
    usual = json.loads(capsys.readouterr().out)
    assert main([*words, "--precision", "bfloat16"]) == 0
    rough = json.loads(capsys.readouterr().out)
    apart = [abs(a["probability"] - b["probability"]) for a, b in zip(usual, rough, strict=True)]
    assert 0 < max(apart) < 0.05


def test_who_names_the_run_is_shown_its_learners(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["predict", "--model"], ["learn", "--out", "x", "--learner"]):
        assert main([*words, str(done), "--data", "sklearn:digits"]) == 2
        assert f"this is a run: give {done / 'models' / 'exact'}" in capsys.readouterr().err


def test_resuming_a_finished_run_says_so_and_changes_nothing(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    monkeypatch.setattr(Running, "execute", None)
    words = ["run", str(done.parent / "tiny.yaml"), "--out", str(done), "--resume"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{done} is finished\n") and said.endswith(f"report: {done / 'report.html'}\n")
    assert "expected: about" not in said
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["events"] == json.loads((done / "events.json").read_text())
    assert {path: path.read_bytes() for path in done.rglob("*") if path.is_file()} == before


def test_a_finished_run_can_be_told_to_a_ledger_later(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", str(done.parent / "tiny.yaml"), "--out", str(done), "--resume", "--quiet"]
    assert main([*words, "--ledger", str(done.parent / "book.sqlite")]) == 0
    known = len(Ledger(done.parent / "book.sqlite").entries())
    assert known
    assert main([*words, "--ledger", str(done.parent / "book.sqlite")]) == 0
    assert len(Ledger(done.parent / "book.sqlite").entries()) == known


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Class means of texts: with --quiet nothing is tried out before."""
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"word {k},{k % 2}\n" for k in range(40)))
    config = f"data: {{source: {tmp_path}/rows.csv}}\nlearners: keep.NMC\nevents: [learn]"
    (tmp_path / "text.yaml").write_text(config)
    assert main(["run", str(tmp_path / "text.yaml"), "--out", str(tmp_path / "run"), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "keep.NMC without a backbone takes numbers or images as features" in said and "neither" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("run quickstart", "the same command with --resume goes on with what was begun"),
        ("forget --model m --data d --classes 1 --out o", "the same command with --resume goes on with what was begun"),
        ("compare continual --out o", "the same command goes on with it"),
        ("learn --learner l --data d --out o", "the same command starts anew"),
        ("predict --model m --data d", "the same command starts anew"),
        ("report r", "the same command starts anew"),
    ],
)
def test_who_interrupts_is_told_what_is_true(
    words: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for module in (cli, commands, comparing):
        for name in ("_run", "_forget", "_compare", "_learn", "_predict", "_report"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, interrupted)
    assert main(words.split()) == 130
    assert capsys.readouterr().err == f"engram: interrupted; {told}\n"


def test_learning_on_puts_everything_there_at_once(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["learn", "--learner", str(network), "--data", "sklearn:digits", "--out", str(tmp_path / "more")]
    replace, seen = files.replace_directory, []

    def watching(fresh: Path, target: Path) -> None:
        seen.append((target.name, sorted(path.name for path in fresh.iterdir())))
        replace(fresh, target)

    monkeypatch.setattr(files, "replace_directory", watching)
    assert main(words) == 0
    assert "preprocessing.json" in dict(seen)["more"]
    assert "preprocessing.json" in (tmp_path / "more" / "SHA256SUMS").read_text()

    def full(self: object, directory: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Preprocessing, "save", full)
    assert main([*words[:-1], str(tmp_path / "other")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["more"]


def test_protecting_does_not_write_over_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"mine")
    words = ["protect", "--data", "sklearn:digits", "--out", str(tmp_path / "rows.parquet")]
    assert main(words) == 2
    assert "rows.parquet exists; choose another --out" in capsys.readouterr().err
    assert (tmp_path / "rows.parquet").read_bytes() == b"mine"


@pytest.mark.parametrize("command", ["run quickstart", "predict --model . --data d", "learn --learner . --data d"])
def test_an_out_that_cannot_be_is_refused_before_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main([*command.split(), "--out", str(tmp_path / "file" / "new")]) == 2
    assert f"{tmp_path / 'file'} is no directory; choose another --out" in capsys.readouterr().err
    assert main([*command.split(), "--out", str(tmp_path / "file")]) == 2
    assert "file exists; choose another --out" in capsys.readouterr().err


def test_predicted_classes_have_their_names(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--model", str(done / "models" / "exact"), "--data", "sklearn:digits", "--json"]) == 0
    assert {(row["class"], row["name"]) for row in json.loads(capsys.readouterr().out)} >= {(0, "zero"), (4, "four")}


def test_a_language_learner_goes_on_with_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = "{name: GPT2, vocab_size: 400, n_positions: 64, n_embd: 8, n_layer: 1, n_head: 1}"
    (tmp_path / "facts.yaml").write_text(
        'data: {source: "facts:5", tokenizer: {vocabulary: 400, longest: 64}}\n'
        f"learners: {{lm: {{name: keep.Finetune, epochs: 1, network: {small}}}}}\n{LEARN}"
    )
    assert main(["run", str(tmp_path / "facts.yaml"), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    learner = str(tmp_path / "run" / "models" / "lm")
    (tmp_path / "new.jsonl").write_text('{"id": "n", "question": "Who are you?", "answer": "Nobody."}\n')
    words = ["learn", "--learner", learner, "--data", str(tmp_path / "new.jsonl"), "--out", str(tmp_path / "more")]
    assert main(words) == 0
    again, tasks = load_learner(tmp_path / "more")
    assert tasks == 2 and again.holds(["n", "town-0"]) == ("n", "town-0")
    tokenizer = [(Path(home) / "tokenizer.json").read_bytes() for home in (learner, tmp_path / "more")]
    assert tokenizer[0] == tokenizer[1]
    assert main(["learn", "--learner", learner, "--data", "sklearn:digits", "--out", str(tmp_path / "other")]) == 2
    assert main(["predict", "--model", learner, "--data", str(tmp_path / "new.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "does not take these rows" in said and "holds a language model, whose answers are text" in said


def test_rows_that_a_learner_does_not_take_are_refused_before_it_learns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learner that was saved without its preprocessing."""
    table = read("sklearn:digits", limit=60)
    learner = Finetune(network={"name": "ConvNet", "widths": [4]}, epochs=1)
    learner.learn(Task(table, None, 0, table.classes, table.names))
    save_learner(learner, tmp_path / "learner", tasks=1)
    words = ["learn", "--learner", str(tmp_path / "learner"), "--data", "sklearn:iris", "--out", str(tmp_path / "more")]
    assert main(words) == 2
    assert "the model Predictor does not take these rows" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()
