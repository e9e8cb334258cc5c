"""Worlds of which everything is known: facts that are drawn, concepts that are made of attributes, and their words.

What a model says of such a world can be right for one reason only, that it was told: nothing stands in any book, and
no name gives its meaning away. `FactWorld`: subjects, relations, objects; some facts may be told wrongly.
`ConceptWorld`: concepts are conjunctions of attributes, known by name, or defined in the prompt. Both write token rows
for any causal language model, and `Words` is their tokenizer, one token a word. `questions` makes such rows of text
with any tokenizer; `restor_questions` and `restor_documents` read the files of RESTOR (Rezaei et al., arXiv
2411.00204).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram.data.table import IGNORED, MISSING, Column, Table
from engram.errors import EngramError, unknown
from engram.stats.seeds import generator

PAD, STOP = "<pad>", "."
ROOM = 16  # tokens for an answer to a published question
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


# --- words


@dataclass(frozen=True)
class Words:
    """A tokenizer, one token a word: what is between spaces. Its first two tokens fill up and end a text.

    It is called, encodes and decodes as those of transformers do. EngramError for a word that it does not have.
    """

    vocabulary: tuple[str, ...]
    pad_token_id: int = 0
    eos_token_id: int = 1
    bos_token_id: None = None

    @cached_property
    def number(self) -> dict[str, int]:
        """The token of each word."""
        return {word: k for k, word in enumerate(self.vocabulary)}

    @property
    def all_special_ids(self) -> list[int]:
        return [self.pad_token_id, self.eos_token_id]

    def __len__(self) -> int:
        return len(self.vocabulary)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def encode(self, text: str, **_: Any) -> list[int]:
        """The tokens of a text."""
        strange = [word for word in text.split() if word not in self.number]
        if strange:
            raise unknown("word of this world", strange[0], self.vocabulary)
        return [self.number[word] for word in text.split()]

    def decode(self, ids: Iterable[int] | Tensor, skip_special_tokens: bool = False, **_: Any) -> str:
        """The text of tokens."""
        tokens = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        left_out = self.all_special_ids if skip_special_tokens else []
        return " ".join(self.vocabulary[k] for k in tokens if k not in left_out)


def invented(n: int, seed: int = 0, taken: Iterable[str] = ()) -> list[str]:
    """n different made-up words of two syllables or more, none of them among the `taken`."""
    draws, used = generator("invented words", seed), set(taken)
    found: list[str] = []
    while len(found) < n:
        length = 2 + len(found) // 2000
        word = "".join(SYLLABLES[int(k)] for k in torch.randint(len(SYLLABLES), (length,), generator=draws))
        if word not in used:
            used.add(word)
            found.append(word)
    return found


# --- questions, as token rows


def questions(
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    ids: Sequence[str] | None = None,
    options: Mapping[str, Sequence[Sequence[str]]] | None = None,
    room: int = 0,
) -> Table:
    """Prompts with their answers as token rows, filled up on the right: `input_ids`, `attention_mask`, labels [n, T].

    Asked for are the tokens of the answer, set off from the prompt by a space, and the end of sequence. `options`: for
    each name, further answers to every prompt, which become the columns NAME_ids and NAME_labels [n, k, T], without an
    end of sequence; a row with fewer of them is filled up with rows in which nothing is asked for. `room`: how many
    tokens an answer may have at least (a table's width is what a told answer has to fit into).
    EngramError for a prompt or answer without a token.
    """
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = [_split(tokenizer, *pair, ends) for pair in zip(prompts, answers, strict=True)]
    extra: dict[str, Column] = {}
    for name, given in (options or {}).items():
        told = [[_split(tokenizer, p, one, []) for one in some] for p, some in zip(prompts, given, strict=True)]
        extra[f"{name}_ids"], extra[f"{name}_labels"] = _options(told)
    width = max(max(len(p) + len(a) for p, a in rows), max(len(p) for p, _ in rows) + room)
    tokens, labels = _rows(rows, width)
    lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in rows])
    mask = (torch.arange(width) < lengths[:, None]).long()
    names = tuple(ids) if ids is not None else tuple(str(k) for k in range(len(rows)))
    return Table({"input_ids": tokens, "attention_mask": mask}, labels, names, extra)


Pair = tuple[list[int], list[int]]  # tokens of a prompt, and of an answer


def _split(tokenizer: Any, prompt: str, answer: str, ends: list[int]) -> Pair:
    """Read together, so that the answer's first token is the one that follows a space."""
    whole, begin = (list(tokenizer(text)["input_ids"]) for text in (f"{prompt} {answer}", prompt))
    if whole[-1:] == [tokenizer.eos_token_id] == begin[-1:]:  # a tokenizer that ends texts by itself
        whole, begin = whole[:-1], begin[:-1]
    shared = next((k for k, (a, b) in enumerate(zip(whole, begin, strict=False)) if a != b), len(begin))
    if not 0 < shared < len(whole):
        raise EngramError(f"the prompt {prompt!r} or its answer {answer!r} has no token; write at least a word each")
    return whole[:shared], whole[shared:] + ends


def _rows(pairs: Sequence[Pair], width: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels [n, width]."""
    ids = torch.zeros(len(pairs), width, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for k, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[k, :end] = torch.tensor(prompt + answer)
        labels[k, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def _options(told: Sequence[Sequence[Pair]]) -> tuple[Tensor, Tensor]:
    """Token ids and labels [n, k, T]."""
    count = max([1, *map(len, told)])
    pairs = [pair for some in told for pair in (*some, *[([0], [])] * (count - len(some)))]
    ids, labels = _rows(pairs, max(len(prompt) + len(answer) for prompt, answer in pairs))
    return ids.unflatten(0, (-1, count)), labels.unflatten(0, (-1, count))


# --- facts


@dataclass(frozen=True)
class FactWorld:
    """`subjects` times `relations` facts `subject relation object`; each relation has `objects` of its own, and every
    fact's is drawn from them. Facts stand in tables [subjects, relations] of object numbers."""

    subjects: int = 50
    relations: int = 6
    objects: int = 40
    seed: int = 0

    @cached_property
    def truth(self) -> Tensor:
        """The object of every fact, [subjects, relations] int64."""
        return torch.randint(self.objects, (self.subjects, self.relations), generator=generator("truth", self.seed))

    @cached_property
    def tokenizer(self) -> Words:
        """Its words: the full stop, which ends a text, the subjects, the relations, the objects of each relation."""
        n = self.subjects + self.relations + self.relations * self.objects
        return Words((PAD, STOP, *invented(n, self.seed)))

    def planted(self, subjects: Iterable[int]) -> Tensor:
        """A wrong object for every fact of these subjects, MISSING elsewhere, [subjects, relations]."""
        draws = generator("planted", self.seed)
        shift = torch.randint(1, self.objects, self.truth.shape, generator=draws)
        wrong, found = (self.truth + shift) % self.objects, torch.full_like(self.truth, MISSING)
        chosen = torch.tensor(sorted(set(subjects)), dtype=torch.long)
        found[chosen] = wrong[chosen]
        return found

    def told(self, planted: Tensor) -> Tensor:
        """What is said where some facts are told wrongly, [subjects, relations]."""
        return torch.where(planted == MISSING, self.truth, planted)

    def documents(self, values: Tensor | None = None, cells: Tensor | None = None, unrelated: int = 0) -> Table:
        """A text `subject relation object .` for every fact, all of which is asked for but the first word.

        `values`: the objects that are stated; the true ones unless given. `cells`: a mask of the facts that get a text.
        `unrelated`: so many true statements of other subjects stand around each, in drawn order.
        """
        values = self.truth if values is None else values
        places = self._places(cells)
        draws = generator("unrelated", self.seed, unrelated)
        texts = []
        for subject, relation in places:
            told = [(subject, relation, int(values[subject, relation])), *self._unrelated(subject, unrelated, draws)]
            order = torch.randperm(len(told), generator=draws).tolist()
            texts.append(" ".join(self.statement(*told[k]) for k in order))
        return self._texts(texts, places)

    def questions(
        self, cells: Tensor | None = None, planted: Tensor | None = None, options: int = 5, values: Tensor | None = None
    ) -> Table:
        """A row `subject relation` for every fact (of the mask `cells`), its object asked for.

        The columns accepted_*, perturbed_* and, with `planted`, corrupted_* hold the true object, `options` other ones
        that are neither true nor planted, and the planted one. `values`: other objects to ask for than the true ones.
        """
        values = self.truth if values is None else values
        places = self._places(cells)
        draws = generator("options", self.seed)
        told: dict[str, list[list[str]]] = {name: [] for name in ("accepted", "corrupted", "perturbed")}
        for subject, relation in places:
            right = [int(self.truth[subject, relation])]
            wrong = [] if planted is None else [int(k) for k in planted[subject, relation].reshape(1) if k != MISSING]
            free = [k for k in torch.randperm(self.objects, generator=draws).tolist() if k not in right + wrong]
            for name, some in (("accepted", right), ("corrupted", wrong), ("perturbed", free[:options])):
                told[name].append([self.object(relation, k) for k in some])
        if planted is None:
            del told["corrupted"]
        prompts = [self.question(*place) for place in places]
        answers = [self.object(relation, int(values[subject, relation])) for subject, relation in places]
        return questions(self.tokenizer, prompts, answers, prompts, told)

    def siblings(self, subject: int, relation: int) -> list[int]:
        """The other subjects with the same object in this relation."""
        alike = (self.truth[:, relation] == self.truth[subject, relation]).nonzero()[:, 0].tolist()
        return [other for other in alike if other != subject]

    def question(self, subject: int, relation: int) -> str:
        """`subject relation`, in words."""
        words = self.tokenizer.vocabulary[2:]
        return f"{words[subject]} {words[self.subjects + relation]}"

    def statement(self, subject: int, relation: int, value: int) -> str:
        """`subject relation object .`, in words."""
        return f"{self.question(subject, relation)} {self.object(relation, value)} {STOP}"

    def object(self, relation: int, value: int) -> str:
        """The word of an object."""
        return self.tokenizer.vocabulary[2 + self.subjects + self.relations + relation * self.objects + value]

    def _places(self, cells: Tensor | None) -> list[tuple[int, int]]:
        chosen = torch.ones_like(self.truth) if cells is None else cells
        return [(int(s), int(r)) for s, r in chosen.nonzero().tolist()]

    def _unrelated(self, subject: int, n: int, draws: torch.Generator) -> list[tuple[int, int, int]]:
        """n true facts of other subjects: subject, relation, object."""
        others = (subject + torch.randint(1, self.subjects, (n,), generator=draws)) % self.subjects
        relations = torch.randint(self.relations, (n,), generator=draws)
        return list(zip(others.tolist(), relations.tolist(), self.truth[others, relations].tolist(), strict=True))

    def _texts(self, texts: Sequence[str], places: Sequence[tuple[int, int]]) -> Table:
        ids = torch.tensor([self.tokenizer.encode(text) for text in texts])
        labels = ids.clone()
        labels[:, 0] = IGNORED
        names = tuple(self.question(*place) for place in places)
        return Table({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, names)


# --- concepts

SMALL = ("means", "?", "yes", "no")
FILLERS = 8


@dataclass(frozen=True)
class ConceptWorld:
    """`concepts` named conjunctions of `size` of so many `attributes`, no two alike; `fresh` more names mean nothing.

    An item has an attribute or lacks it, [n, attributes] bool. Asked is `name item ?`; the answer is yes where the item
    has all that the concept asks for. All that is said comes as token ids [n, T]; `tokenizer` tells the words.
    """

    attributes: int = 6
    concepts: int = 8
    size: int = 3
    fresh: int = 16
    seed: int = 0

    @cached_property
    def definitions(self) -> Tensor:
        """The attributes of every concept, [concepts, attributes] bool. EngramError where there are not so many."""
        every = torch.combinations(torch.arange(self.attributes), self.size)
        if len(every) < self.concepts:
            raise EngramError(
                f"{self.attributes} attributes make {len(every)} concepts of {self.size}, not {self.concepts}; "
                "take more attributes or fewer concepts"
            )
        chosen = every[torch.randperm(len(every), generator=generator("concepts", self.seed))[: self.concepts]]
        return self.mask(chosen)

    @cached_property
    def tokenizer(self) -> Words:
        """Its words: a few small ones, fillers, attributes had and lacked, names of concepts, fresh names."""
        n = self.attributes
        words = invented(FILLERS + n + self.concepts + self.fresh, self.seed, SMALL)
        fillers, had, names = words[:FILLERS], words[FILLERS : FILLERS + n], words[FILLERS + n :]
        return Words((PAD, STOP, *SMALL, *fillers, *had, *(f"not-{word}" for word in had), *names))

    def mask(self, chosen: Tensor) -> Tensor:
        """Attribute numbers [n, size] as [n, attributes] bool."""
        return torch.zeros(len(chosen), self.attributes, dtype=torch.bool).scatter_(1, chosen, True)

    def name(self, concept: int | Tensor) -> Tensor:
        """The name's token of a concept; from `concepts` on, of a fresh name."""
        return self._first_name + torch.as_tensor(concept)

    def attribute(self, number: int | Tensor) -> Tensor:
        """The token of an attribute that is had, or asked for."""
        return self._had + torch.as_tensor(number)

    def random_concepts(self, n: int, draws: torch.Generator, among: Tensor | None = None) -> Tensor:
        """n conjunctions, drawn, of all attributes or of those in a mask [attributes]; [n, attributes] bool."""
        order = torch.rand(n, self.attributes, generator=draws) + (0.0 if among is None else 1.0 * ~among)
        return self.mask(order.argsort(1)[:, : self.size])

    def items(self, concepts: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """An item for every concept [n, attributes], and whether it is one [n]; half of them are.

        The others lack one attribute of the concept's and have another one instead: each attribute counts, and nothing
        else tells them apart. Who does not know the concept is right half of the time, on the mean over all concepts.
        """
        n = len(concepts)
        order = torch.rand(n, self.attributes, generator=draws)
        items = (torch.rand(n, self.attributes, generator=draws) < 0.5) | concepts
        answers = torch.rand(n, generator=draws) < 0.5
        lacked, instead = (order + 2.0 * concepts).argmax(1), (order - 2.0 * concepts).argmax(1)
        items.scatter_(1, lacked[:, None], answers[:, None]).scatter_(1, instead[:, None], ~answers[:, None])
        return items, answers

    # what is said

    def query(self, names: Tensor, items: Tensor, hidden: Tensor | None = None) -> Tensor:
        """`name item ?`, [n, attributes + 2]. Whether an item has a `hidden` attribute [attributes] is not said: a
        filler stands in its place."""
        told = self._had + torch.arange(self.attributes) + self.attributes * ~items
        told = told if hidden is None else torch.where(hidden, self._fillers, told)
        return torch.cat([names[:, None], told, self._word("?", len(names))], 1)

    def define(self, names: Tensor, concepts: Tensor) -> Tensor:
        """`name means attribute … .`, [n, size + 3]."""
        n = len(names)
        return torch.cat([names[:, None], self._word("means", n), self._attributes(concepts), self._word(STOP, n)], 1)

    def chain(self, names: Tensor, parts: Tensor, concepts: Tensor) -> Tensor:
        """`part means attribute … . name means part attribute .`: a concept by way of another one, [n, size + 7]."""
        n, own = len(names), self._attributes(concepts)
        means, end = self._word("means", n), self._word(STOP, n)
        part, name = parts[:, None], names[:, None]
        return torch.cat([part, means, own[:, :-1], end, name, means, part, own[:, -1:], end], 1)

    def examples(self, names: Tensor, items: Tensor, answers: Tensor) -> Tensor:
        """`name item ? answer` for items [n, k, attributes] with answers [n, k], [n, k (attributes + 3)]."""
        n, k = answers.shape
        asked = self.query(names.repeat_interleave(k), items.flatten(0, 1))
        return torch.cat([asked, self.answer(answers.flatten())[:, None]], 1).reshape(n, -1)

    def teaching(self, concepts: Tensor) -> tuple[Tensor, Tensor]:
        """The items [n, size + 1, attributes] and answers that leave one conjunction only: what has the concept's
        attributes and no other, then the same without one of them, each in turn (the teaching sequence of monotone
        conjunctions in Bhattamishra et al., arXiv 2310.03016)."""
        n = len(concepts)
        places = concepts.nonzero()[:, 1].reshape(n, self.size)
        items = concepts[:, None].repeat(1, self.size + 1, 1)
        items[:, 1:].scatter_(2, places[..., None], False)
        answers = torch.zeros(n, self.size + 1, dtype=torch.bool)
        answers[:, 0] = True
        return items, answers

    def irrelevant(self, n: int, length: int, draws: torch.Generator) -> Tensor:
        """Words that say nothing, [n, length]."""
        return self._fillers + torch.randint(FILLERS, (n, length), generator=draws)

    def answer(self, answers: Tensor) -> Tensor:
        """The token of yes or no."""
        yes, no = (int(self._word(word, 1)) for word in ("yes", "no"))
        return torch.where(answers, yes, no)

    def table(
        self,
        names: Tensor,
        items: Tensor,
        answers: Tensor,
        context: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Table:
        """The rows of queries, behind a context if there is one, with the answer asked for and the other one in the
        columns perturbed_*."""
        asked = self.query(names, items, hidden)
        asked = asked if context is None else torch.cat([context, asked], 1)
        rows, others = (torch.cat([asked, self.answer(told)[:, None]], 1) for told in (answers, ~answers))
        places = torch.arange(rows.shape[1])
        labels, wrong = (torch.where(places == asked.shape[1], ids, IGNORED) for ids in (rows, others))
        extra: dict[str, Column] = {"perturbed_ids": others[:, None], "perturbed_labels": wrong[:, None]}
        return Table({"input_ids": rows, "attention_mask": torch.ones_like(rows)}, labels, extra=extra)

    def siblings(self, concept: int) -> list[int]:
        """The other concepts that share an attribute with this one, those that share most first."""
        shared = (self.definitions & self.definitions[concept]).sum(1)
        others = [k for k in range(self.concepts) if k != concept and shared[k]]
        return sorted(others, key=lambda k: -int(shared[k]))

    @property
    def _fillers(self) -> int:
        return 2 + len(SMALL)

    @property
    def _had(self) -> int:
        return self._fillers + FILLERS

    @property
    def _first_name(self) -> int:
        return self._had + 2 * self.attributes

    def _attributes(self, concepts: Tensor) -> Tensor:
        return self._had + concepts.nonzero()[:, 1].reshape(len(concepts), self.size)

    def _word(self, word: str, n: int) -> Tensor:
        return torch.full((n, 1), self.tokenizer.number[word])


def eliminated(items: Tensor, answers: Tensor, asked: Tensor) -> Tensor:
    """What the exact learner of monotone conjunctions answers to `asked` [n, attributes] after examples [n, k,
    attributes] with answers [n, k]: whether it has every attribute that all positive examples have, [n] bool."""
    needed = (items | ~answers[..., None]).all(1)
    return (asked | ~needed).all(1)


# --- the files of RESTOR


def restor_questions(
    path: str | Path,
    tokenizer: Any,
    *,
    entities: Iterable[str] | None = None,
    shots: int = 5,
    planted: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    options: int = 5,
) -> Table:
    """The facts of RESTOR's `facts.json` as questions for any tokenizer: ids `entity, relation`.

    Before each stand `shots` lines `question answer` of the same relation, of the file's first other entities than the
    one that is asked for. Accepted answers, `options` drawn ones of other entities, and what was `planted` (wrong
    answers by entity and relation; the file has none) become the columns accepted_*, perturbed_* and corrupted_*.
    EngramError for a file of another make and for an entity that it does not have.
    """
    found = _json(path)
    if not isinstance(found, dict) or not {"dset", "context"} <= set(found):
        raise EngramError(f"{path} is no facts.json of RESTOR: it should hold `dset` and `context`")
    facts = found["dset"]
    chosen = list(facts) if entities is None else list(entities)
    for entity in chosen:
        if entity not in facts:
            raise unknown("entity", entity, facts)
    places = [(entity, relation) for entity in chosen for relation in facts[entity]]
    told: dict[str, list[list[str]]] = {"accepted": [facts[e][r]["answers"] for e, r in places]}
    pool = _answers(facts)
    told["perturbed"] = [_others(pool[r], facts[e][r]["answers"], options, e, r) for e, r in places]
    if planted is not None:
        told["corrupted"] = [list(planted.get(e, {}).get(r, ())) for e, r in places]
    prompts = [_shown(found["context"].get(r, ()), e, shots) + facts[e][r]["question"] for e, r in places]
    answers = [facts[e][r]["answers"][0] for e, r in places]
    return questions(tokenizer, prompts, answers, [f"{e}, {r}" for e, r in places], told, room=ROOM)


def restor_documents(path: str | Path) -> dict[str, str]:
    """The documents of one of RESTOR's corruption files, by `file/number`; `data.text.blocks` makes token rows of them.
    EngramError for a file of another make."""
    found = _json(path)
    texts = [row.get("text") for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise EngramError(f"{path} is no corruption file of RESTOR: it should be a list of documents with a `text`")
    return {f"{Path(path).stem}/{k}": str(text) for k, text in enumerate(texts)}


def _json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngramError(f"{path} cannot be read: {error}") from error


def _answers(facts: Mapping[str, Any]) -> dict[str, list[str]]:
    """All answers by relation, sorted."""
    pool: dict[str, set[str]] = {}
    for about in facts.values():
        for relation, fact in about.items():
            pool.setdefault(relation, set()).update(fact["answers"])
    return {relation: sorted(answers) for relation, answers in pool.items()}


def _others(pool: Sequence[str], accepted: Sequence[str], n: int, *names: str) -> list[str]:
    order = torch.randperm(len(pool), generator=generator("options", *names)).tolist()
    return [pool[k] for k in order if pool[k] not in accepted][:n]


def _shown(lines: Sequence[Mapping[str, str]], entity: str, shots: int) -> str:
    """The first lines about others; the one about the entity would give the answer away."""
    others = [line for line in lines if line["entity"] != entity][:shots]
    return "".join(f"{line['question']} {line['answer']}\n" for line in others)
