"""Questions and answers as token rows: what is asked for, what stands beside it, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engram.data.qa import pairs, read_pairs
from engram.data.table import IGNORED
from engram.data.vocabulary import byte_pairs
from engram.errors import EngramError

ROWS = [
    {"id": "a", "question": "Where?", "answer": "in Rome", "author": 1},
    {"id": "b", "question": "Who was it then?", "answer": "Ada", "author": 2},
]
OTHER = [
    {"id": "b", "paraphrased_answer": "it was Ada", "perturbed_answer": ["Bob", "Carol"]},
    {"id": "a", "paraphrased_answer": "Rome", "perturbed_answer": ["in Oslo", "in Bern", "in Kiel"]},
]


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return byte_pairs([row["question"] + str(row["answer"]) for row in ROWS], 300, longest=64)


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def test_rows_of_one_id_come_together(tmp_path: Path) -> None:
    one, two = written(tmp_path / "1.jsonl", ROWS), written(tmp_path / "2.jsonl", OTHER)
    found = read_pairs(one, two)
    assert [row["id"] for row in found] == ["a", "b"]
    assert found[1]["answer"] == "Ada" and found[1]["perturbed_answer"] == ["Bob", "Carol"]


def test_the_answer_is_asked_for_and_the_question_is_not(tokenizer: object, tmp_path: Path) -> None:
    table = pairs(read_pairs(written(tmp_path / "1.jsonl", ROWS)), tokenizer)
    assert table.labels is not None and table.extra["author"] == ("1", "2")
    for row, wanted in enumerate(ROWS):
        ids, mask = table.inputs["input_ids"][row], table.inputs["attention_mask"][row].bool()
        asked = table.labels[row] != IGNORED
        end = [tokenizer.eos_token_id]  # type: ignore[attr-defined]
        text = tokenizer.decode(ids[mask])  # type: ignore[attr-defined]
        assert text == f"Question: {wanted['question']}\nAnswer: {wanted['answer']}<|end|>"
        assert tokenizer.decode(ids[asked]) == f" {wanted['answer']}<|end|>"  # type: ignore[attr-defined]
        assert table.labels[row][asked].tolist()[-1:] == end and not bool((asked & ~mask).any())


def test_other_answers_follow_the_same_question(tokenizer: object, tmp_path: Path) -> None:
    table = pairs(read_pairs(written(tmp_path / "1.jsonl", ROWS), written(tmp_path / "2.jsonl", OTHER)), tokenizer)
    wrong, labels = (torch.as_tensor(table.extra[f"perturbed_{part}"]) for part in ("ids", "labels"))
    assert wrong.shape == labels.shape and wrong.shape[:2] == (2, 2)  # as many as every row has
    told = [tokenizer.decode(i[k != IGNORED]) for i, k in zip(wrong.flatten(0, 1), labels.flatten(0, 1), strict=True)]  # type: ignore[attr-defined]
    assert told == [f" {text}<|end|>" for text in ("in Oslo", "in Bern", "Bob", "Carol")]
    begin = tokenizer("Question: Where?\nAnswer:")["input_ids"]  # type: ignore[operator]
    assert wrong[0, 1, : len(begin)].tolist() == begin
    assert "paraphrased_ids" in table.extra


def test_a_batch_loses_only_padding(tokenizer: object, tmp_path: Path) -> None:
    table = pairs(read_pairs(written(tmp_path / "1.jsonl", ROWS)), tokenizer)
    batch = table.batch(torch.tensor([0]))
    short = batch.trimmed()
    used = int(table.inputs["attention_mask"][0].sum())
    assert used < table.labels.shape[1]  # type: ignore[union-attr]
    assert short.labels is not None and short.labels.shape[1] == short.inputs["input_ids"].shape[1] == used
    assert torch.equal(short.inputs["input_ids"], batch.inputs["input_ids"][:, :used])
    assert len(table.batch(torch.tensor([0, 1])).trimmed().inputs["input_ids"][0]) == table.labels.shape[1]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"id": "a", "question": "Where?", "answer": " "}', "row 'a' has no answer"),
        ('{"question": "", "answer": "x"}', "row '0' has no question"),
        ('{"id": "a", ', "line 1 of .* is no JSON"),
        ("[1]", "no object"),
    ],
)
def test_bad_rows_are_named(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(EngramError, match=says):
        read_pairs(tmp_path / "bad.jsonl")


def test_what_does_not_fit_is_said(tokenizer: object, tmp_path: Path) -> None:
    with pytest.raises(EngramError, match=r"row 'b' has .* more than 24"):
        pairs([{**row, "answer": "x " * (20 if row["id"] == "b" else 1)} for row in ROWS], tokenizer, longest=24)
    with pytest.raises(EngramError, match="no questions"):
        pairs([], tokenizer)
    with pytest.raises(EngramError, match="cannot be read"):
        read_pairs(tmp_path / "nothing.jsonl")
