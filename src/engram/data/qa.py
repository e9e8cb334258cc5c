"""Questions and answers as token rows, with a paraphrase and wrong answers beside each: the layout of TOFU.

Maini, Feng, Schwarzschild, Lipton, Kolter: TOFU: A Task of Fictitious Unlearning for LLMs. COLM 2024, arXiv 2401.06121.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram.data.table import IGNORED, Table
from engram.data.vocabulary import byte_pairs
from engram.data.worlds import invented
from engram.environment import require
from engram.errors import EngramError
from engram.stats.seeds import generator

GENERATED = "facts:"
QUESTION, ANSWER = "Question: {}\nAnswer:", " {}"
Pair = Mapping[str, Any]


def read_pairs(*sources: str | Path) -> list[dict[str, Any]]:
    """The rows of JSON-lines files, one object a line with `question` and `answer`; rows of one `id` become one, and
    their columns come together (the pairs in one file, their `paraphrased_answer` and `perturbed_answer` in another).

    Ids are line numbers where there are none. "facts:N" stands for pairs about N invented people (`generated`).
    EngramError for a file or line that cannot be read.
    """
    found: dict[str, dict[str, Any]] = {}
    for source in sources:
        if str(source).startswith(GENERATED):
            found.update({row["id"]: row for row in generated(str(source).removeprefix(GENERATED))})
            continue
        for number, line in enumerate(_lines(source)):
            row = _row(line, f"line {number + 1} of {source}")
            found.setdefault(str(row.get("id", number)), {}).update(row)
    for id, row in found.items():
        for column in ("question", "answer"):
            if not str(row.get(column, "")).strip():
                raise EngramError(f"row {id!r} has no {column}; give one, or drop the row")
    return [{**row, "id": id} for id, row in found.items()]


def holds_pairs(source: str | Path) -> bool:
    """Whether a source's first row is a question with its answer."""
    if str(source).startswith(GENERATED):
        return True
    if Path(source).suffix not in (".jsonl", ".json") or not Path(source).is_file():
        return False
    with Path(source).open(encoding="utf-8", errors="replace") as lines:
        try:
            return {"question", "answer"} <= set(json.loads(next(lines, "[]")))
        except (ValueError, TypeError):
            return False


def generated(people: str | int, seed: int = 0) -> list[dict[str, Any]]:
    """Three questions with answers about each of so many invented people, in TOFU's layout: a paraphrase and four wrong
    answers each, which are true of others. EngramError for fewer than five people."""
    n = int(people) if str(people).isdigit() else 0
    if n < 5:
        raise EngramError(f"facts:{people} takes the number of people, at least 5, as in facts:20")
    words, draws = invented(2 * n, seed), generator("facts about people", seed)
    names, towns = ([word.capitalize() for word in part] for part in (words[:n], words[n:]))
    found = []
    for kind, question, answers, told in (
        ("town", "Where was {} born?", towns, "{} is the birthplace of {}"),
        (
            "work",
            "What does {} do?",
            [f"{town} {word}" for town, word in zip(towns, _cycled(WORK, n), strict=True)],
            "{} is the work of {}",
        ),
        (
            "prize",
            "Which prize did {} win?",
            [f"the {town} prize for {word}" for town, word in zip(towns, _cycled(FIELDS, n), strict=True)],
            "{} went to {}",
        ),
    ):
        order = torch.randperm(n, generator=draws).tolist()
        for k, name in enumerate(names):
            right, *wrong = (answers[order[(k + step) % n]] for step in range(5))
            row = {"id": f"{kind}-{k}", "person": name, "question": question.format(name), "answer": right}
            other = {
                "paraphrased_answer": told.format(right, name),
                "perturbed_answer": [told.format(w, name) for w in wrong],
            }
            found.append({**row, **other})
    return found


def _cycled(words: Sequence[str], n: int) -> list[str]:
    return [words[k % len(words)] for k in range(n)]


WORK = ("baker", "joiner", "nurse", "pilot", "tailor", "farmer")
FIELDS = ("verse", "maths", "film", "dance", "law")


def tokenizer_for(spec: str | Path | Mapping[str, Any], rows: Sequence[Pair]) -> Any:
    """The tokenizer of a directory or hub name; or, as {"vocabulary": 512, "longest": 64}, one made of the texts of
    `rows`."""
    if isinstance(spec, Mapping):
        texts = (
            str(text) for row in rows for text in (row["question"], row["answer"], *row.get("perturbed_answer", ()))
        )
        return byte_pairs(texts, int(spec.get("vocabulary", 2048)), int(spec.get("longest", 256)))
    try:
        return require("transformers", "language").AutoTokenizer.from_pretrained(spec)
    except (OSError, ValueError) as error:
        raise EngramError(f"the tokenizer {spec} cannot be read: {str(error).splitlines()[0]}") from error


def pairs(
    rows: Iterable[Pair], tokenizer: Any, *, question: str = QUESTION, answer: str = ANSWER, longest: int | None = None
) -> Table:
    """Rows of `read_pairs` as a table: the question, the answer and an end of sequence, of which the last two are asked
    for; `input_ids`, `attention_mask` and labels [n, T], filled up on the right.

    `question`, `answer`: how they are written, {} being the text. Where all rows have them, a `paraphrased_answer`
    becomes the columns `paraphrased_ids` and `paraphrased_labels` [n, T], and k wrong answers each
    (`perturbed_answer`) `perturbed_ids` and `perturbed_labels` [n, k, T]; other columns of text are kept as they are.
    `longest`: tokens of a row, at most (default: the tokenizer's limit). EngramError for a longer row and for no rows.
    """
    given = list(rows)
    if not given:
        raise EngramError("there are no questions to make a table of")
    limit = longest or tokenizer.model_max_length
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def written(row: Pair, text: str) -> tuple[list[int], list[int]]:
        """Tokens, and which of them are asked for."""
        asked = tokenizer(question.format(row["question"]))["input_ids"]
        told = [*tokenizer(answer.format(text), add_special_tokens=False)["input_ids"], *end]
        if len(asked) + len(told) > limit:
            raise EngramError(f"row {row['id']!r} has {len(asked) + len(told)} tokens, more than {limit}; shorten it")
        return [*asked, *told], [IGNORED] * len(asked) + told

    texts = [written(row, row["answer"]) for row in given]
    ids, labels = _padded(texts)
    lengths = torch.tensor([len(tokens) for tokens, _ in texts])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    told = {k: tuple(str(row[k]) for row in given) for k in given[0] if _kept(k) and all(k in row for row in given)}
    extra: dict[str, Any] = {**told, **_others(given, written)}
    return Table({"input_ids": ids, "attention_mask": mask}, labels, tuple(str(row["id"]) for row in given), extra)


def _others(given: Sequence[Pair], written: Any) -> dict[str, Tensor]:
    """The columns of other answers."""
    found: dict[str, Tensor] = {}
    if all("paraphrased_answer" in row for row in given):
        texts = [written(row, row["paraphrased_answer"]) for row in given]
        found["paraphrased_ids"], found["paraphrased_labels"] = _padded(texts)
    if all(row.get("perturbed_answer") for row in given):
        count = min(len(row["perturbed_answer"]) for row in given)
        texts = [written(row, text) for row in given for text in row["perturbed_answer"][:count]]
        ids, labels = (part.view(len(given), count, -1) for part in _padded(texts))
        found["perturbed_ids"], found["perturbed_labels"] = ids, labels
    return found


def _padded(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Tokens (0 behind them) and labels (IGNORED behind them), [n, T]."""
    width = max(len(tokens) for tokens, _ in rows)
    ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in rows])
    labels = torch.tensor([asked + [IGNORED] * (width - len(asked)) for _, asked in rows])
    return ids, labels


def _kept(name: str) -> bool:
    return name not in ("id", "paraphrased_answer", "perturbed_answer")


def _lines(source: str | Path) -> list[str]:
    try:
        return [line for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise EngramError(f"the questions in {source} cannot be read: {error}") from error


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise EngramError(f"{place} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise EngramError(f"{place} is no object with question and answer")
    return row
