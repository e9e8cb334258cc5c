"""Continuations of prompts, as text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from engram.engine.predict import evaluating
from engram.engine.run import Run
from engram.errors import EngramError


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new: int,
    greedy: bool = True,
    stop: str | Sequence[str] | None = None,
    batch_size: int = 32,
    run: Run | None = None,
) -> list[str]:
    """What a language model says next, one text for each prompt, in their order; without the prompt, and without
    special tokens.

    At most `max_new` tokens, up to the tokenizer's end of sequence, cut before the first of the `stop` texts. `greedy`:
    the likeliest token each time; else tokens are drawn from the model's distribution, by the run's seed. Prompts of
    like length are answered together, padded on the left (with the end of sequence where the tokenizer has no padding
    token; neither is read). A model without a `generate` of its own gets prompts of one length at a time, and costs a
    pass over the whole text per token.

    EngramError for a prompt that has no token, or that leaves no room for `max_new` tokens in the model.
    """
    run = run or Run()
    ids = [_tokens(tokenizer, prompt) for prompt in prompts]
    _fits(model, ids, max_new)
    stops, ends = [stop] if isinstance(stop, str) else list(stop or ()), _ends(model, tokenizer)
    told: dict[int, str] = {}
    with run.scope("generate"), run.seeded("draws"), evaluating(model.to(run.device)):
        for chosen in _batches(ids, batch_size, mixed=hasattr(model, "generate")):
            batch, mask = (part.to(run.device) for part in _padded([ids[k] for k in chosen], _padding(tokenizer)))
            new = _continued(model, batch, mask, max_new, greedy, ends)
            texts = [tokenizer.decode(_until(row, ends), skip_special_tokens=True) for row in new]
            told.update(zip(chosen, (_cut(text, stops) for text in texts), strict=True))
    return [told[k] for k in range(len(ids))]


def _tokens(tokenizer: Any, prompt: str) -> list[int]:
    found = list(tokenizer(prompt)["input_ids"]) or [id for id in (tokenizer.bos_token_id,) if id is not None]
    if not found:
        raise EngramError(f"the prompt {prompt!r} has no token to go on from; write at least one word")
    return found


def _fits(model: Any, ids: Sequence[list[int]], max_new: int) -> None:
    if max_new < 1:
        raise EngramError(f"max_new={max_new} asks for no token; give at least 1")
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max(map(len, ids), default=0)
    if isinstance(room, int) and longest + max_new > room:
        raise EngramError(
            f"a prompt of {longest} tokens and {max_new} new ones do not fit into the model's {room}; "
            "shorten the prompt, or ask for fewer"
        )


def _batches(ids: Sequence[list[int]], size: int, mixed: bool) -> Iterator[list[int]]:
    """Numbers of prompts of like length, longest first (what does not fit into memory shows at once); of one length
    unless they may be `mixed`."""
    groups: dict[int, list[int]] = defaultdict(list)
    for k in sorted(range(len(ids)), key=lambda k: -len(ids[k])):
        groups[0 if mixed else len(ids[k])].append(k)
    for members in groups.values():
        yield from (members[start : start + size] for start in range(0, len(members), size))


def _padding(tokenizer: Any) -> int:
    """A token to pad with; it is masked, so that any will do."""
    given = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((id for id in given if id is not None), 0)


def _padded(rows: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [B, T], padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those that the model is set to stop at."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(id for id in found if id is not None))


def _continued(model: Any, ids: Tensor, mask: Tensor, length: int, greedy: bool, ends: list[int]) -> list[list[int]]:
    """The new tokens of every row."""
    if not hasattr(model, "generate"):
        return _step_by_step(model, ids, length, greedy, ends)
    choice = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    padding = {"eos_token_id": ends or None, "pad_token_id": ends[0] if ends else 0}
    found = model.generate(ids, attention_mask=mask, max_new_tokens=length, **choice, **padding)
    return found[:, ids.shape[1] :].tolist()


def _step_by_step(model: Any, ids: Tensor, length: int, greedy: bool, ends: list[int]) -> list[list[int]]:
    start, done = ids.shape[1], torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(length):
        logits = model(input_ids=ids).logits[:, -1]
        told = logits.argmax(1) if greedy else torch.multinomial(logits.float().softmax(1), 1)[:, 0]
        ids = torch.cat([ids, told[:, None]], 1)
        done = done | torch.isin(told, torch.tensor(ends, dtype=told.dtype, device=told.device))
        if bool(done.all()):
            break
    return ids[:, start:].tolist()


def _until(row: list[int], ends: list[int]) -> list[int]:
    return row[: min([len(row), *(row.index(id) for id in ends if id in row)])]


def _cut(text: str, stops: Sequence[str]) -> str:
    return text[: min([len(text), *(text.index(stop) for stop in stops if stop in text)])]
