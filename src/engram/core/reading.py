"""Rows as a saved model wants them: its own preprocessing, its image processor, its tokenizer, its class names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engram.data.preprocessing import FILE, Preprocessing
from engram.data.qa import holds_pairs, pairs, read_pairs
from engram.data.readers import read_with
from engram.data.table import IGNORED, MISSING, Table, Target
from engram.engine.predict import predict
from engram.environment import require
from engram.errors import EngramError, unknown

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")
PROCESSOR = "preprocessor_config.json"


def preprocessing_of(directory: str | Path) -> Preprocessing | None:
    """How the rows of a saved model were read, if that was saved beside it."""
    return Preprocessing.load(Path(directory)) if (Path(directory) / FILE).exists() else None


def rows_for(directory: str | Path, model: nn.Module, source: str | Path, **columns: Any) -> Table:
    """The rows of a source for the model of a directory.

    `columns`: `id`, `label`, `text`, `image`, and for language models `prompt`: the column of what comes before the
    text, of which nothing is asked. What lies beside the model decides the rest: `preprocessing.json` (columns,
    categories, means), `preprocessor_config.json` (size, mean and deviation of images), a tokenizer. For a language
    model, JSON lines with `question` and `answer` are written as `data.qa.pairs` has them. Class names are those
    of the model's config where it has any. EngramError if rows and model do not fit.
    """
    folder = Path(directory)
    prompt = columns.pop("prompt", None)
    words = generates(model)
    if prompt is not None and not words:
        raise EngramError(
            f"the column {prompt!r} was named as that of prompts, and the model writes none; leave it out"
        )
    if words and prompt is None and "text" not in columns and holds_pairs(source):
        return _fitting(pairs(read_pairs(source), _tokenizer(folder)), model)
    if words:
        columns.setdefault("label", False)
    processor = _json(folder / PROCESSOR)
    known = known_of(folder)
    table, _ = read_with(source, preprocessing=known, image_size=_size(processor), **columns)
    table = _normalised(table, processor)
    if "text" in table.extra and "input_ids" not in table.inputs and (words or _homes(folder)):
        table = tokenised(table, _tokenizer(folder), prompt=prompt, answers=words)
    if known is None:
        table = _named_as(table, model)
    return _fitting(table, model)


def tokenised(table: Table, tokenizer: Any, *, prompt: str | None = None, answers: bool = True) -> Table:
    """Texts as `input_ids` and `attention_mask` [n, T], padded to the longest. `answers`: the labels become the tokens
    of the text (those of the column `prompt`, put before it, are not asked for); else labels stay.

    EngramError for an unknown column, an empty text, and for a text that is longer than the tokenizer's limit.
    """
    if prompt and prompt not in table.extra:
        raise unknown("column", prompt, table.extra)
    texts, before = list(table.extra["text"]), list(table.extra[prompt]) if prompt else [""] * len(table)
    end = [tokenizer.eos_token_id] if answers and tokenizer.eos_token_id is not None else []
    rows, asked = [], []
    for id, lead, text in zip(table.ids, before, texts, strict=True):
        head = tokenizer(lead, add_special_tokens=not answers)["input_ids"] if lead else []
        body = tokenizer(text, add_special_tokens=not answers)["input_ids"] + end
        if len(body) == len(end):
            raise EngramError(f"the text of row {id!r} is empty; drop such rows")
        if len(head) + len(body) > tokenizer.model_max_length:
            raise EngramError(
                f"row {id!r} has {len(head) + len(body)} tokens, the model takes {tokenizer.model_max_length}; cut it"
            )
        rows.append([*head, *body])
        asked.append([IGNORED] * len(head) + body)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    inputs = {
        "input_ids": _padded(rows, pad),
        "attention_mask": _padded([[1] * len(row) for row in rows], 0),
    }
    labels = _padded(asked, IGNORED) if answers else table.labels
    return replace(table, inputs={**table.inputs, **inputs}, labels=labels)


def _padded(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows), default=0)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.int64)


def _homes(folder: Path) -> list[Path]:
    """Where a tokenizer lies: a model's directory, or the learner's directory around it."""
    return [home for home in (folder, folder.parent) if any((home / name).exists() for name in TOKENIZERS)]


def _tokenizer(folder: Path) -> Any:
    homes = _homes(folder)
    if not homes:
        raise EngramError(f"no tokenizer lies in {folder}; put its files ({TOKENIZERS[0]}, …) beside the model")
    folder = homes[0]
    try:
        return require("transformers").AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise EngramError(f"the tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}") from error


def known_of(folder: Path) -> Preprocessing | None:
    """How the rows were read: beside the model, or in the learner's directory around it."""
    return preprocessing_of(folder) or preprocessing_of(folder.parent)


def generates(model: nn.Module) -> bool:
    """Is this a language model, whose answers are text?"""
    return bool(getattr(model, "can_generate", bool)())


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise EngramError(f"{path} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _size(processor: Mapping[str, Any]) -> tuple[int, int] | None:
    size = processor.get("size") if processor.get("do_resize", True) else None
    if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        return int(size["height"]), int(size["width"])
    return None


def _normalised(table: Table, processor: Mapping[str, Any]) -> Table:
    """Images less the processor's mean, divided by its deviation, as float32."""
    if "pixel_values" not in table.inputs or not processor.get("do_normalize", bool(processor)):
        return table
    images = table.batch(torch.arange(len(table))).inputs["pixel_values"]
    mean, sd = (torch.tensor(processor[key], dtype=torch.float32) for key in ("image_mean", "image_std"))
    images = (images - mean.view(1, -1, 1, 1)) / sd.view(1, -1, 1, 1)
    return replace(table, inputs={**table.inputs, "pixel_values": images})


def _named_as(table: Table, model: nn.Module) -> Table:
    """Labels by the class ids of the model's config, where its classes have the names that the table's have."""
    ids = getattr(getattr(model, "config", None), "label2id", None) or {}
    if table.target != Target.CLASSES or table.labels is None or not set(table.names.values()) & set(ids):
        return table
    for name in table.names.values():
        if name not in ids:
            raise unknown("class of the model", name, ids)
    new = torch.tensor([int(ids[table.names[c]]) for c in sorted(table.names)])
    labels = torch.where(table.labels == MISSING, MISSING, new[table.labels.clamp(min=0)])
    return replace(table, labels=labels, names={int(number): name for name, number in ids.items()})


def columns_for(table: Table, model: nn.Module) -> int:
    """How many numbers the model gives for a row of the table. EngramError if it does not take its rows."""
    try:
        return predict(model, table.take([0])).shape[-1]
    except EngramError:
        raise
    except (TypeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise EngramError(f"the model {type(model).__name__} does not take these rows: {reason}") from error


def _fitting(table: Table, model: nn.Module) -> Table:
    """The table, if the model takes its rows and has a column for every label."""
    if not len(table):
        return table
    columns = columns_for(table, model)
    if table.labels is None or table.target == Target.TOKENS:
        return table
    if table.target == Target.NUMBERS and columns != table.labels.shape[1]:
        raise EngramError(f"the model gives {columns} numbers a row, the labels are {table.labels.shape[1]}")
    if table.target == Target.CLASSES and int(table.labels.max()) >= columns:
        raise EngramError(
            f"the head has {columns} classes, and the data has a class {int(table.labels.max())}: they do not fit"
        )
    return table
