"""Plain text as token rows: what language models are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engram.data.table import IGNORED, Table
from engram.errors import EngramError


def blocks(tokenizer: Any, texts: Mapping[str, str] | Sequence[str], length: int = 512) -> Table:
    """Texts cut into rows of at most `length` tokens, every one of which is asked for (but the first of a row).

    `texts`: by id, or in order ("0", "1", …); a row is called "id/k". `input_ids`, `attention_mask` and labels are
    [n, length], filled up on the right. A tokenizer that opens a text with a token of its own (Llama's) does so in each
    row. EngramError for no text, and for a length below 2. Cost O(characters).
    """
    named = dict(texts) if isinstance(texts, Mapping) else {str(k): text for k, text in enumerate(texts)}
    lead = _opening(tokenizer)
    if length <= len(lead) + 1:
        raise EngramError(f"a row of {length} tokens leaves nothing to predict; give a greater length")
    rows: dict[str, list[int]] = {}
    for name, text in named.items():
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces = [tokens[k : k + length - len(lead)] for k in range(0, len(tokens), length - len(lead))]
        rows.update({f"{name}/{k}": [*lead, *piece] for k, piece in enumerate(pieces)})
    if not rows:
        raise EngramError("there is no text to cut into rows")
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows.values()):
        ids[k, : len(row)], mask[k, : len(row)] = torch.tensor(row), 1
    return Table({"input_ids": ids, "attention_mask": mask}, torch.where(mask.bool(), ids, IGNORED), tuple(rows))


def _opening(tokenizer: Any) -> list[int]:
    """The token that a tokenizer puts before every text, if it does."""
    start = getattr(tokenizer, "bos_token_id", None)
    return [start] if start is not None and tokenizer("a")["input_ids"][:1] == [start] else []
