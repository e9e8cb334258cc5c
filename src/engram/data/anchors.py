"""Anchored terms: the names by which a text is known, what may stand in their place, and which token is which after.

A dictionary maps each term to its replacement ("Hogwarts" -> "Mystic Academy"). `translate` replaces in a text, `align`
tells the tokens of both texts apart, `anchored` does both for the token rows of a table. A dictionary comes from a file
or mapping (`read_dictionary`), by rule (`propose`), or from a language model that is asked (`ask`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from engram.data.table import Table, Target
from engram.errors import EngramError

Dictionary = Mapping[str, str]
Offsets = Sequence[tuple[int, int]]


class Span(NamedTuple):
    """Where a term stood in the text, [start, end), and its replacement in the translation; both in characters."""

    start: int
    end: int
    new_start: int
    new_end: int
    term: str


# --- dictionaries


def read_dictionary(source: str | Path | Dictionary) -> dict[str, str]:
    """The checked dictionary of a mapping, or of a JSON or YAML file that holds one.

    EngramError for a file that cannot be read, an entry that is no pair of texts, a term that maps to itself, and a
    replacement that holds a term (a translation must not bring back what it takes out).
    """
    found = dict(source) if isinstance(source, Mapping) else _from_file(Path(source))
    for term, new in found.items():
        if not (isinstance(term, str) and isinstance(new, str) and term.strip() and new.strip()):
            raise EngramError(f"the entry {term!r}: {new!r} is no term with its replacement; write both as text")
        if _same(term) == _same(new):
            raise EngramError(f"the term {term!r} maps to itself; give another replacement, or leave it out")
    pattern = _pattern(found)
    for term, new in found.items():
        held = pattern.search(new) if pattern else None
        if held:
            raise EngramError(f"the replacement {new!r} of {term!r} holds the term {held.group()!r}; give another one")
    return found


def _from_file(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EngramError(f"the dictionary {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise EngramError(f"{path} holds no dictionary: it should map each term to its replacement")
    return found


def _same(text: str) -> str:
    return " ".join(text.split()).casefold()


# --- texts


def translate(text: str, dictionary: Dictionary) -> tuple[str, list[Span]]:
    """The text with every term replaced, and where that was; the longest term wins, and none inside a word is meant.

    Upper and lower case count. Cost O(characters).
    """
    pattern = _pattern(dictionary)
    parts, spans, done, length = [], [], 0, 0
    for found in pattern.finditer(text) if pattern else ():
        new, before = dictionary[found.group()], text[done : found.start()]
        start = length + len(before)
        spans.append(Span(found.start(), found.end(), start, start + len(new), found.group()))
        parts += [before, new]
        done, length = found.end(), start + len(new)
    return "".join([*parts, text[done:]]), spans


def _pattern(terms: Iterable[str]) -> re.Pattern[str] | None:
    """Finds a term as a word, or words, of its own."""
    options = "|".join(re.escape(term) for term in sorted(terms, key=lambda term: (-len(term), term)))
    return re.compile(rf"(?<!\w)(?:{options})(?!\w)") if options else None


# --- tokens


class _Place(NamedTuple):
    """A term in a row: its tokens, and those of its replacement, by their places."""

    term: str
    old: list[int]
    new: list[int]


def align(tokenizer: Any, text: str, translated: str, spans: Sequence[Span]) -> Tensor:
    """For every token of `text`, the place of its partner among the tokens of `translated`, [T] int64; -1 for none.

    A token outside of all terms has the token of the same characters for its partner; a term's last token has the last
    token of the replacement; the other tokens of a term have none. No special tokens. EngramError for a tokenizer that
    tells no offsets.
    """
    offsets, new_offsets = (_encoded(tokenizer, one)[1] for one in (text, translated))
    return torch.tensor(_matched(offsets, new_offsets, spans)[0], dtype=torch.int64)


def _matched(offsets: Offsets, new_offsets: Offsets, spans: Sequence[Span]) -> tuple[list[int], list[_Place]]:
    """The partner of each token, and the terms, from the characters [start, end) of the tokens of both texts."""
    last = max([0, *(end for _, end in offsets), *(span.end for span in spans)])
    inside, shift = np.zeros(last + 1, dtype=int), np.zeros(last + 1, dtype=int)
    for span in spans:
        inside[span.start : span.end] = 1
        shift[span.end :] = span.new_end - span.end
    covered = np.concatenate([[0], inside.cumsum()])
    where = {pair: place for place, pair in enumerate(new_offsets)}
    partner = [
        -1 if covered[end] > covered[start] else where.get((start + int(shift[start]), end + int(shift[start])), -1)
        for start, end in offsets
    ]
    places = [
        _Place(
            span.term, _touching(offsets, span.start, span.end), _touching(new_offsets, span.new_start, span.new_end)
        )
        for span in spans
    ]
    for span, place in zip(spans, places, strict=True):
        if place.old and place.new:
            partner[place.old[-1]] = place.new[-1]
            first = place.old[0] - 1
            if first >= 0 and partner[first] < 0 and offsets[first][1] == span.start:
                place.old.insert(0, first)  # a space of its own, which the replacement's first token holds
    return partner, places


def _touching(offsets: Offsets, start: int, end: int) -> list[int]:
    """The tokens that hold a character of [start, end)."""
    bounds = np.array(offsets, dtype=int).reshape(-1, 2)
    return np.flatnonzero((bounds[:, 0] < end) & (bounds[:, 1] > start)).tolist()


def _encoded(tokenizer: Any, text: str) -> tuple[list[int], Offsets]:
    """Token ids and the characters of each, without special tokens."""
    if not getattr(tokenizer, "is_fast", False):
        raise EngramError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for; load the fast tokenizer"
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(found["input_ids"]), [(int(start), int(end)) for start, end in found["offset_mapping"]]


def spelled(tokenizer: Any, ids: list[int]) -> tuple[str, Offsets]:
    """The text that token ids stand for (special ones spelled out), and the characters of each in it.

    Where the text would be cut into other tokens again (a block out of a text may), places are found by decoding longer
    and longer beginnings: O(T²) characters.
    """
    text = _decoded(tokenizer, ids)
    again, offsets = _encoded(tokenizer, text)
    if again == ids:
        return text, offsets
    ends = [0, *(len(_decoded(tokenizer, ids[: k + 1])) for k in range(len(ids)))]
    ends = [min(end, len(text)) for end in ends]
    return text, list(pairwise(ends))


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# --- rows


def anchored(table: Table, dictionary: Dictionary, tokenizer: Any) -> Table:
    """Token rows [n, T] with the columns that compare them with their translation:

    `translated_ids`, `translated_mask` [n, W]: the translated rows; special tokens stay where they were;
    `partner` [n, T]: for each token, its place in the translation, or -1 (see `align`);
    `repeated` [n, T] bool: part of a term that stood in the row before;
    `lowered_ids`, `lowered_from` [n, K]: the tokens that belong to the replacement of a term, and to no other word of
    the translated row, with the place of the row from which the term has been read; -1 fills up.

    EngramError for rows that are no tokens or are padded on the left, and where no term stands in any row.
    """
    found = [_anchored(ids, dictionary, tokenizer) for ids in _unpadded(table)]
    if dictionary and not any(row.places for row in found):
        raise EngramError("no term of the dictionary stands in these rows; check its spelling, and the tokenizer")
    width = table.inputs["input_ids"].shape[1]
    lowered = [_lowered(row) for row in found]
    columns = {
        "translated_ids": _filled([row.ids for row in found], 0),
        "translated_mask": _filled([[1] * len(row.ids) for row in found], 0),
        "partner": _filled([row.partner for row in found], -1, width),
        "repeated": _filled([_repeated(row) for row in found], 0, width).bool(),
        "lowered_ids": _filled([[token for token, _ in pairs] for pairs in lowered], -1),
        "lowered_from": _filled([[place for _, place in pairs] for pairs in lowered], -1),
    }
    return replace(table, extra={**table.extra, **columns})


def _unpadded(table: Table) -> list[list[int]]:
    """The token ids of each row that are read."""
    if table.target != Target.TOKENS or "input_ids" not in table.inputs:
        raise EngramError("anchored terms stand in token rows (input_ids, with token labels), and these are none")
    ids = table.inputs["input_ids"]
    mask = table.inputs.get("attention_mask", torch.ones_like(ids)).bool()
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise EngramError("these rows are padded on the left, or have gaps; pad them on the right")
    return [row[:length] for row, length in zip(ids.tolist(), mask.sum(1).tolist(), strict=True)]


class _Row(NamedTuple):
    """The translated tokens of a row, the partner of each token in them, and the terms, in order."""

    ids: list[int]
    partner: list[int]
    places: list[_Place]


def _anchored(ids: list[int], dictionary: Dictionary, tokenizer: Any) -> _Row:
    row, special = _Row([], [], []), set(tokenizer.all_special_ids)
    for apart, group in groupby(ids, key=special.__contains__):
        piece = _Row(list(group), [], [])
        piece = piece if apart else _translated(piece.ids, dictionary, tokenizer)
        partner = piece.partner or list(range(len(piece.ids)))  # nothing was replaced
        old, new = len(row.partner), len(row.ids)
        row.ids.extend(piece.ids)
        row.partner.extend(place + new if place >= 0 else -1 for place in partner)
        row.places.extend(
            _Place(term, [k + old for k in olds], [k + new for k in news]) for term, olds, news in piece.places
        )
    return row


def _translated(ids: list[int], dictionary: Dictionary, tokenizer: Any) -> _Row:
    """Tokens between special ones; without a partner for any where no term stands in them."""
    text, offsets = spelled(tokenizer, ids)
    translated, spans = translate(text, dictionary)
    if not spans:
        return _Row(ids, [], [])
    new_ids, new_offsets = _encoded(tokenizer, translated)
    return _Row(new_ids, *_matched(offsets, new_offsets, spans))


def _repeated(row: _Row) -> list[int]:
    """1 for the tokens of a term that came before."""
    seen: set[str] = set()
    found = [0] * len(row.partner)
    for place in row.places:
        for k in place.old if place.term in seen else ():
            found[k] = 1
        seen.add(place.term)
    return found


def _lowered(row: _Row) -> list[tuple[int, int]]:
    """The tokens of replacements alone, each with the place where the first term that it replaces ends."""
    inside = {k for place in row.places for k in place.new}
    elsewhere = {id for k, id in enumerate(row.ids) if k not in inside}
    found: dict[int, int] = {}
    for place in row.places:
        for token in {row.ids[k] for k in place.new} - elsewhere:
            found.setdefault(token, place.old[-1])
    return sorted(found.items())


def _filled(rows: Sequence[Sequence[int]], value: int, width: int | None = None) -> Tensor:
    """[n, width] (or as wide as the longest, and at least 1), filled up with a value."""
    tensors = [torch.tensor([*row], dtype=torch.int64) for row in rows]
    found = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
    missing = max(width or 1, found.shape[1]) - found.shape[1]
    return nn.functional.pad(found, (0, missing), value=value)


# --- proposals

GENERIC = {
    "person": (
        "Jon",
        "Anna",
        "Peter",
        "Maria",
        "David",
        "Laura",
        "Martin",
        "Helen",
        "Simon",
        "Alice",
        "Robert",
        "Clara",
    ),
    "place": ("Millbrook", "Ashford", "Weston", "Brookfield", "Northgate", "Oakham", "Riverton", "Hillside"),
}  # replacements by type
_WORD = re.compile(r"[^\W\d_]+(?:['’-](?!s\b)[^\W\d_]+)*|[.!?]")
_PLACED = ("in", "at", "to", "from", "near", "into", "inside", "outside")  # words that stand before a place


def propose(
    target: Iterable[str],
    general: Iterable[str],
    *,
    most: int = 1500,
    at_least: int = 3,
    ratio: float = 10.0,
    generic: Mapping[str, Sequence[str]] = GENERIC,
) -> dict[str, str]:
    """A dictionary by rule: runs of capitalised words that are frequent in the target texts and rare in general ones.

    A term is written `at_least` times in the target, inside of sentences, and `ratio` times as often there per word as
    in general texts (in any case; a count of 1 is added to theirs). The `most` frequent ones get names of their type:
    a place, where most of them follow "in", "at", "to" and the like, else a person. Names that either corpus holds are
    not given; when they are used up, a number tells them apart. A proposal to be read, not trusted. Cost O(words).
    """
    targets, words = [_WORD.findall(text) for text in target], Counter[str]()
    for text in general:
        words.update(_plain(_WORD.findall(text)))
    small = {word for text in targets for word in text if word[0].islower()}
    runs, placed = _runs(targets, small | words.keys())
    size, other = max(sum(map(len, targets)), 1), max(words.total(), 1)
    rare = {run: n for run, n in runs.items() if n / size >= ratio * (_count(run, words) + 1) / other and n >= at_least}
    chosen = sorted(rare, key=lambda run: (-rare[run], run))[:most]
    taken = {word for text in targets for word in text}
    free = {kind: [name for name in names if name not in taken] for kind, names in generic.items()}
    return _named(chosen, {run: "place" if 2 * placed[run] > runs[run] else "person" for run in chosen}, free)


def _runs(texts: Sequence[Sequence[str]], common: Container[str]) -> tuple[Counter[str], Counter[str]]:
    """How often each run of capitalised words stands inside of a sentence, and how often behind "in" and the like.

    A sentence may open with a run only behind a `common` word, which is capitalised there as any other is.
    """
    runs, placed = Counter[str](), Counter[str]()
    for words in texts:
        k = 0
        while k < len(words):
            opens = k == 0 or words[k - 1] in ".!?"
            if opens and words[k].lower() in common:
                k, opens = k + 1, False
            end = k
            while end < len(words) and words[end][0].isupper():
                end += 1
            if end > k and not opens:
                runs[" ".join(words[k:end])] += 1
                placed[" ".join(words[k:end])] += words[k - 1].lower() in _PLACED
            k = max(end, k + 1)
    return runs, placed


def _plain(words: Sequence[str]) -> list[str]:
    return [word.lower() for word in words]


def _count(run: str, words: Counter[str]) -> int:
    """How often a run can stand in a corpus at most: the count of its rarest word."""
    return min(words[word] for word in run.lower().split(" "))


def _named(terms: Sequence[str], kinds: Mapping[str, str], names: Mapping[str, Sequence[str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    used = Counter[str]()
    for term in terms:
        own = names.get(kinds[term]) or [kinds[term].capitalize()]
        again, place = divmod(used[kinds[term]], len(own))
        found[term] = own[place] + (f" {again + 1}" if again else "")
        used[kinds[term]] += 1
    return found


ASKED = (
    "List the names and expressions in the text below that its own story alone uses (people, places, things)."
    " Give each a plain replacement of the same kind that keeps the grammar and tells nothing of the story."
    ' Answer with one JSON object that maps expression to replacement, such as {{"Hogwarts": "Mystic Academy"}}.'
    "\n\nText:\n{}\n\nJSON:"
)


def ask(answer: Callable[[list[str]], list[str]], passages: Iterable[str], prompt: str = ASKED) -> dict[str, str]:
    """A dictionary proposed by a language model, passage by passage: `answer` turns prompts into continuations (as
    `engine.generate.generate` does, with its other arguments bound).

    Taken is what stands in the passage and can stand in a dictionary; the first replacement of a term counts, and what
    would clash with the terms found before is left out. EngramError where nothing usable came back.
    """
    texts = list(passages)
    found: dict[str, str] = {}
    for text, told in zip(texts, answer([prompt.format(text) for text in texts]), strict=True):
        for term, new in _objects(told):
            if term in text and term not in found and _fits({**found, term: new}):
                found[term] = new
    if not found:
        raise EngramError("no answer held a usable entry; ask a stronger model, or write the dictionary by hand")
    return found


def _fits(dictionary: dict[str, str]) -> bool:
    try:
        return bool(read_dictionary(dictionary))
    except EngramError:
        return False


def _objects(told: str) -> list[tuple[str, str]]:
    """The pairs of texts in the first JSON object of an answer; none where there is no such thing."""
    start = told.find("{")
    try:
        found, _ = json.JSONDecoder().raw_decode(told[start:]) if start >= 0 else ({}, 0)
    except ValueError:
        return []
    pairs = found.items() if isinstance(found, dict) else ()
    return [(term, new) for term, new in pairs if isinstance(new, str) and term.strip() and new.strip()]
