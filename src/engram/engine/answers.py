"""What a model answers to the questions of a table, and how likely it holds other answers.

Token tables, padded on the right, hold other answers to their questions in the columns NAME_ids and NAME_labels
[n, k, T]; a row with fewer of them has rows in which nothing is asked for. A class is an answer of one token: class
tables hold other classes in a column NAME_labels [n, k], MISSING where there are fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engram.data.table import IGNORED, MISSING, Batch, Table, Target
from engram.engine.lm import greedy, log_probs, questions, sequence_logp
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.environment import require
from engram.errors import EngramError
from engram.stats.text import contains, same_answer

AT_ONCE = 64  # rows that are answered together
Answer = list[int]  # token ids without the end of sequence
Same = Callable[[Answer, Sequence[Answer]], bool]  # is a told answer one of these?


def told(model: nn.Module, table: Table, run: Run) -> list[Answer]:
    """The likeliest answer to every question, token by token, at most as long as the table is wide; of classes, the
    likeliest one."""
    if table.target == Target.CLASSES:
        return predict(model, table, run=run).argmax(1)[:, None].tolist()
    assert table.labels is not None
    begin, ids, stop = questions(table.labels).tolist(), table.inputs["input_ids"], _stop(model)
    width, found = ids.shape[1], dict[int, Answer]()
    for rows in _alike(begin, _spread(model, width)):
        prompt, mask = _prompts([ids[row, : begin[row]] for row in rows])
        most = width - min(begin[row] for row in rows)
        answers = greedy(model, prompt.to(run.device), most, stop, mask.to(run.device)).tolist()
        cut = (answer[: width - begin[row]] for row, answer in zip(rows, answers, strict=True))
        found.update(zip(rows, (_until(answer, stop) for answer in cut), strict=True))
    run.cost.rows += len(table)
    return [found[row] for row in range(len(table))]


def _alike(lengths: Sequence[int], spread: int) -> Iterator[list[int]]:
    """The numbers of some prompts, longest first, whose lengths differ by `spread` at most; together all of them."""
    some: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if some and (len(some) == AT_ONCE or lengths[some[0]] - lengths[row] > spread):
            yield some
            some = []
        some.append(row)
    if some:
        yield some


def _spread(model: Any, width: int) -> int:
    """By how much the lengths of prompts may differ that are answered together: none of them may outgrow the model."""
    if not hasattr(model, "generate"):
        return 0
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return max(room - width, 0) if isinstance(room, int) else width


def _prompts(given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts filled up on the left, and which of their tokens are theirs, [B, T]."""
    filled = nn.utils.rnn.pad_sequence(list(given), batch_first=True, padding_side="left")
    lengths = torch.tensor([len(prompt) for prompt in given])
    places = torch.arange(filled.shape[1]) >= filled.shape[1] - lengths[:, None]
    return filled, places.long()


def truths(model: nn.Module, table: Table) -> list[Answer]:
    """The answers of the table itself."""
    assert table.labels is not None
    if table.target == Target.CLASSES:
        return table.labels[:, None].tolist()
    return [_until(row[row != IGNORED].tolist(), _stop(model)) for row in table.labels]


def has(table: Table, name: str) -> bool:
    """Whether the table holds other answers of this name."""
    return f"{name}_labels" in table.extra


def options(model: nn.Module, table: Table, name: str) -> list[list[Answer]]:
    """The other answers of a name to every question."""
    found: Any = torch.as_tensor(table.extra[f"{name}_labels"])
    if table.target == Target.CLASSES:
        return [[[label] for label in row if label != MISSING] for row in found.tolist()]
    stop = _stop(model)
    return [[_until(o[o != IGNORED].tolist(), stop) for o in row if bool((o != IGNORED).any())] for row in found]


def logp(model: nn.Module, table: Table, name: str, run: Run) -> Tensor:
    """For every row, the mean over its other answers of a name of their mean log-probability per token, in nats, [n]
    float64; NaN where there are none."""
    labels = torch.as_tensor(table.extra[f"{name}_labels"])
    if table.target == Target.CLASSES:
        every = predict(model, table, log_probs, run=run).double()
        found = every.gather(1, labels.clamp(min=0))
        return found.masked_fill(labels == MISSING, torch.nan).nanmean(1)
    ids = torch.as_tensor(table.extra[f"{name}_ids"]).flatten(0, 1)
    asked = labels.flatten(0, 1) != IGNORED
    there = asked.any(1)
    read = (asked.flip(1).cumsum(1).flip(1) > 0).long()  # up to the last token that is asked for
    rows = Table({"input_ids": ids[there], "attention_mask": read[there]}, labels.flatten(0, 1)[there])
    found = torch.full((len(there),), torch.nan, dtype=torch.float64)
    found[there] = predict(model, rows, mean_logp, run=run)
    return found.reshape(labels.shape[:2]).nanmean(1)


def mean_logp(output: Any, batch: Batch) -> Tensor:
    """A reader for `engine.predict`: log p(answer | question), mean over the answer's tokens, [B] float64."""
    assert batch.labels is not None
    return sequence_logp(output.logits, batch.labels, reduce="mean").double()


def sameness(tokenizer: str | None) -> Same:
    """How answers are compared: as text, by `stats.text.same_answer`, with a tokenizer (a name or directory), its line
    ends cutting the answer; else token by token. Either may hold the other."""
    if tokenizer is None:
        return lambda answer, accepted: any(contains(answer, a) or contains(a, answer) for a in accepted)
    words = require("transformers").AutoTokenizer.from_pretrained(tokenizer)

    def read(answer: Answer) -> str:
        return words.decode(answer, skip_special_tokens=True).strip().partition("\n")[0]

    return lambda answer, accepted: same_answer(read(answer), map(read, accepted))


def among(said: Sequence[Answer], some: Sequence[Sequence[Answer]], same: Same) -> Tensor:
    """1 for every row whose told answer is one of the row's, else 0, [n] float64."""
    found = [float(same(one, accepted)) for one, accepted in zip(said, some, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


def asked_for(table: Table, what: str) -> Table:
    """The table; EngramError where it asks for no class and no tokens."""
    if table.target not in (Target.CLASSES, Target.TOKENS):
        raise EngramError(f"{what} asks for classes or tokens, and the target of these rows is {table.target}")
    return table


def _stop(model: nn.Module) -> int | None:
    found = getattr(getattr(model, "config", None), "eos_token_id", None)
    return found if isinstance(found, int) else None


def _until(tokens: Answer, stop: int | None) -> Answer:
    return tokens[: tokens.index(stop)] if stop is not None and stop in tokens else tokens
