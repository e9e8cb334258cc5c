"""A language model learns invented people, forgets one, and is asked before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from engram.cli import main
from engram.core.reading import rows_for
from engram.core.running import read_config
from engram.data.qa import generated
from engram.engine.predict import hits
from engram.errors import EngramError
from engram.models.build import build
from engram.models.io import load, save

NETWORK = {
    "name": "GPT2",
    "vocab_size": 330,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 2,
    "initializer_range": 0.1,
}
CONFIG: dict[str, Any] = {
    **read_config("facts"),
    "data": {"source": "facts:6", "tokenizer": {"vocabulary": 330, "longest": 64}},
    "learners": {"gpt": {**read_config("facts")["learners"]["gpt"], "network": NETWORK, "epochs": 60}},
    "probes": [{"name": "audit.Memorization", "oracles": 0}],
    "events": [{"learn": "all"}, {"forget": {"where": "person == Dosu"}}],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the timeline: one that shows content, and one that does not."""
    home = tmp_path_factory.mktemp("facts")
    (home / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    assert main(["run", str(home / "config.yaml"), "--out", str(home / "silent"), "--quiet"]) == 0
    assert main(["run", str(home / "config.yaml"), "--out", str(home / "shown"), "--quiet", "--show-content"]) == 0
    return home


def answers(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "events.json").read_text())[-1]["answers"]  # type: ignore[no-any-return]


def test_what_was_learnt_is_said_before_and_not_after(home: Path) -> None:
    learnt, forgot = json.loads((home / "silent" / "events.json").read_text())
    assert learnt["accuracy"][0]["hits"] >= 17 and learnt["accuracy"][0]["n"] == 18
    assert forgot["accuracy"][0]["n"] == 15  # without the three that must go
    found = answers(home / "silent")
    assert [row["id"] for row in found] == ["town-0", "work-0", "prize-0"]
    assert all(row["before"] == {"length": row["length"], "recall": 1.0} for row in found)
    assert sum(row["after"]["recall"] for row in found) < 2


def test_texts_are_kept_and_shown_on_request_only(home: Path) -> None:
    quiet, loud = answers(home / "silent"), answers(home / "shown")
    truth = {row["id"]: row["answer"] for row in generated(6)}
    assert all("text" not in row["before"] for row in quiet)
    assert all(row["before"]["text"].strip() == truth[row["id"]] for row in loud)
    texts = "".join(path.read_text() for path in (home / "silent").glob("*.*") if path.suffix != ".parquet")
    assert truth["town-0"] not in texts and truth["prize-0"] not in texts
    pages = [(home / name / "report.html").read_text() for name in ("silent", "shown")]
    assert truth["prize-0"] in pages[1] and "ROUGE-L recall of the true answer" in pages[0]
    question = next(row["question"] for row in generated(6) if row["id"] == "prize-0")
    assert question in pages[1] and question not in pages[0]
    assert main(["report", str(home / "shown"), "--quiet"]) == 0
    assert truth["prize-0"] not in (home / "shown" / "report.html").read_text()


def test_the_model_lies_beside_its_tokenizer_and_the_desk_takes_both(home: Path, tmp_path: Path) -> None:
    folder = home / "silent" / "models" / "gpt"
    assert len(AutoTokenizer.from_pretrained(folder)) <= 330
    words = ("--data", "facts:6", "--where", "person == Pake", "--method", "NPO", "--set", "epochs=40")
    assert main(["forget", "--model", str(folder), *words, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    model = load(tmp_path / "out" / "model")
    rows = rows_for(tmp_path / "out" / "model", model, "facts:6")
    pake = rows.rows_of(["town-1", "work-1", "prize-1"])
    assert bool(hits(load(folder / "model"), rows)[pake].all()) and not bool(hits(model, rows)[pake].any())


def test_texts_are_read_with_the_tokenizer_of_the_learner_around_the_model(home: Path, tmp_path: Path) -> None:
    folder, source = home / "silent" / "models" / "gpt" / "model", tmp_path / "rows.jsonl"
    rows = [{"id": "a", "prompt": "Where?", "text": "Here."}, {"id": "b", "prompt": "Who?", "text": "She."}]
    source.write_text("\n".join(map(json.dumps, rows)))
    table = rows_for(folder, load(folder), str(source), prompt="prompt")
    words = AutoTokenizer.from_pretrained(folder.parent)
    assert words.decode(table.inputs["input_ids"][0], skip_special_tokens=True) == "Where?Here."
    with pytest.raises(EngramError, match=r"unknown column 'promt'.*did you mean 'prompt'"):
        rows_for(folder, load(folder), str(source), prompt="promt")
    source.write_text("\n".join(map(json.dumps, [{**rows[0], "text": ""}, rows[1]])))
    with pytest.raises(EngramError, match="the text of row 'a' is empty"):
        rows_for(folder, load(folder), str(source), prompt="prompt")


def test_prompts_are_for_models_that_write(tmp_path: Path) -> None:
    network = build(
        {"name": "MLP", "hidden": [4]}, inputs={"values": (2,)}, classes=(0, 1), generator=torch.Generator()
    )
    with pytest.raises(EngramError, match="'lead' was named as that of prompts, and the model writes none"):
        rows_for(tmp_path, network, "sklearn:digits", prompt="lead")


def test_without_a_tokenizer_nothing_is_guessed(home: Path, tmp_path: Path) -> None:
    model = load(home / "silent" / "models" / "gpt" / "model")
    save(model, tmp_path / "bare" / "model")
    with pytest.raises(EngramError, match="no tokenizer lies in"):
        rows_for(tmp_path / "bare" / "model", model, "facts:6")


def test_the_report_says_what_a_guard_does_not_erase(home: Path, tmp_path: Path) -> None:
    guard = {"name": "forget.ECO", "dims": 32, "strength": 5.0, "folds": 2}
    gpt = {**CONFIG["learners"]["gpt"], "epochs": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "learners": {"gpt": gpt}, "forgetter": guard}))
    assert main(["run", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert json.loads((tmp_path / "run" / "events.json").read_text())[-1]["weights_hold_it"] is True
    assert "The weights still hold it" in (tmp_path / "run" / "report.html").read_text()
    assert "The weights still hold it" not in (home / "silent" / "report.html").read_text()


def test_too_few_people_are_refused() -> None:
    with pytest.raises(EngramError, match="at least 5"):
        generated("3")
