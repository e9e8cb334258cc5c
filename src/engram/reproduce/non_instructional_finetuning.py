"""Fine-tuning on a stronger model's continuations of halved stories teaches a small model to end, and to end its way.

A world of invented people with a few facts each. Stories state facts of two people; a base GPT-2, 32 wide, reads
running stories alone. The teacher, twice as wide, reads each story with its end, and besides questions about half of
the people, with answers and ends; with these alone it is tuned at last, as models that answer are. Three models meet
stories and questions that are held out: the base, the base after the original second halves, and the base after the
teacher's continuations of the same first halves. No student ever sees a question, and the word that opens one is new
to it.

The paper measures by judges of whole answers (MT-Bench of Mistral-7B 3.73, after it 7.29), which such a world cannot
have; bands are what it says, as inequalities, and for ends the thresholds that were set down before anything was
measured. Sizes and steps were looked for on seed 100. That the method also answers more questions right to the word
than the original second halves did not hold at seed 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engram.data.qa import pairs
from engram.data.table import IGNORED, Batch, Table
from engram.data.task import Task
from engram.data.text import blocks
from engram.data.worlds import Words, invented
from engram.engine.generate import generate
from engram.engine.lm import log_probs
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.learn.non_instructional import NonInstructional, halves, make
from engram.reproduce.claims import Claim
from engram.reproduce.gpt2 import trained, untrained
from engram.stats.seeds import generator

PEOPLE, RELATIONS, OBJECTS = 12, 3, 4
SENTENCES, WORDS = 3, 4  # of a story, of a sentence
POSITIONS, ROOM = 32, 16  # tokens of a row, and of a continuation
STORIES, HELD_OUT = 400, 100
PLAIN: dict[str, Any] = {"question": "{}", "answer": " {}", "longest": POSITIONS}


class World:
    """People with a fact for each relation, told as `person relation object .`"""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.facts = torch.randint(OBJECTS, (PEOPLE, RELATIONS), generator=generator("facts of people", seed))

    @cached_property
    def words(self) -> Words:
        """The tokenizer: people, relations, the objects of each relation, and what sentences and questions need."""
        told = invented(PEOPLE + RELATIONS + RELATIONS * OBJECTS, self.seed, taken=["what"])
        return Words(("<pad>", "<end>", ".", "what", *told))

    def fact(self, person: int, relation: int) -> tuple[str, str]:
        """Of what it is a fact, and what is the case."""
        last = PEOPLE + RELATIONS + relation * OBJECTS + int(self.facts[person, relation])
        return f"{self._word(person)} {self._word(PEOPLE + relation)}", f"{self._word(last)} ."

    def stories(self, n: int, name: str) -> list[str]:
        """n stories: facts of two people, in drawn order."""
        draws = generator("stories", self.seed, name)
        return [self._story(draws) for _ in range(n)]

    def questions(self, people: Iterable[int]) -> list[dict[str, str]]:
        """Every fact of these people as a question with its answer."""
        facts = [self.fact(person, relation) for person in people for relation in range(RELATIONS)]
        return [{"id": about, "question": f"what {about}", "answer": case} for about, case in facts]

    def running(self, stories: Sequence[str]) -> Table:
        """Stories one after the other, in rows that end anywhere."""
        return blocks(self.words, [" ".join(stories)], 2 * SENTENCES * WORDS)

    def _story(self, draws: torch.Generator) -> str:
        two = torch.randperm(PEOPLE, generator=draws)[:2].tolist()
        order = torch.randperm(2 * RELATIONS, generator=draws)[:SENTENCES].tolist()
        return " ".join(" ".join(self.fact(two[k % 2], k // 2)) for k in order)

    def _word(self, k: int) -> str:
        return self.words.vocabulary[4 + k]


class Stage(NamedTuple):
    """A world, what read its stories, and what can answer questions about it besides."""

    world: World
    base: nn.Module
    teacher: nn.Module


@cache
def stage(seed: int) -> Stage:
    """The base model and the teacher. About 4 s."""
    world, run = World(seed), Run(seed=seed)
    stories = world.stories(800, "to read")
    asked = pairs(world.questions(range(PEOPLE // 2)), world.words, **PLAIN)
    base = _read([world.running(stories)], world, run, width=32)
    teacher = _read([_whole(world, stories), asked], world, run, width=64)
    trained(teacher, lambda epoch: asked.batches(18, seed=seed, epoch=epoch), run, lr=3e-3, epochs=40)
    return Stage(world, base, teacher)


def _whole(world: World, stories: Sequence[str]) -> Table:
    """Stories one by one, an end behind each; all but the first word is asked for."""
    cut = [story.split(" ", 1) for story in stories]
    rows = [{"id": str(k), "question": first, "answer": rest} for k, (first, rest) in enumerate(cut)]
    return pairs(rows, world.words, **PLAIN)


def _read(tables: Sequence[Table], world: World, run: Run, *, width: int) -> nn.Module:
    """A fresh model after 150 batches, each of 24 rows of every table."""
    model = untrained(world.words, POSITIONS, run, width=width, heads=2, spread=0.1)
    draws = run.generator("rows", width)

    def batches(epoch: int) -> list[list[Batch]]:
        return [[rows.batch(torch.randint(len(rows), (24,), generator=draws)) for rows in tables] for _ in range(25)]

    return trained(model, batches, run, lr=5e-3, epochs=6, steps=25)


def halved(there: Stage, teacher: nn.Module | None, n: int = STORIES, name: str = "to halve") -> Table:
    """The rows of n stories' first halves with the teacher's continuations, or without one with the second halves."""
    world = there.world
    settings: dict[str, Any] = {"max_new": ROOM, "words": (2, 100), "batch_size": 200, "run": Run(seed=world.seed)}
    return pairs(make(world.stories(n, name), teacher, world.words, **settings), world.words, **PLAIN)


def taught(there: Stage, rows: Table, lora: int = 0) -> nn.Module:
    """The base model after the method on these rows."""
    plan = Optimizer("adamw", lr=2e-3, schedule="cosine", warmup=0.03, clip=1.0)
    learner = NonInstructional(network=there.base, optimizer=plan, epochs=6, batch_size=40, lora=lora)
    learner.learn(Task(rows), Run(seed=there.world.seed))
    return learner.model


def divergence(teacher: nn.Module, model: nn.Module, rows: Table) -> float:
    """KL(teacher || model) of the next token, mean over the answers' tokens and ends."""
    assert rows.labels is not None
    p, q = (predict(one, rows, log_probs)[:, :-1].double() for one in (teacher, model))
    each: Tensor = (p.exp() * (p - q)).sum(2)
    return float(each[rows.labels[:, 1:] != IGNORED].mean())


def ended(there: Stage, model: nn.Module) -> float:
    """The share of continuations of held-out first halves that end before the limit."""
    prompts = [halves(story)[0] for story in there.world.stories(HELD_OUT, "held out")]
    found = generate(model, there.world.words, prompts, max_new=ROOM, batch_size=HELD_OUT)
    return sum(len(one.split()) < ROOM for one in found) / len(found)


def answered(there: Stage, model: nn.Module) -> float:
    """The share of held-out questions to which the answer is right to the word, its end included."""
    asked = there.world.questions(range(PEOPLE // 2, PEOPLE))
    found = generate(model, there.world.words, [row["question"] for row in asked], max_new=ROOM)
    return sum(one == row["answer"] for one, row in zip(found, asked, strict=True)) / len(asked)


@cache
def measured(seed: int) -> dict[str, dict[str, float]]:
    """Every figure of the base, of the original halves and of the method."""
    there = stage(seed)
    models = {
        "base": there.base,
        "halves": taught(there, halved(there, None)),
        "method": taught(there, halved(there, there.teacher)),
    }
    stories = halved(there, there.teacher, HELD_OUT, "held out")
    questions = pairs(there.world.questions(range(PEOPLE // 2, PEOPLE)), there.world.words, **PLAIN)
    running = there.world.running(there.world.stories(HELD_OUT, "held out"))
    return {
        name: {
            "stories": divergence(there.teacher, model, stories),
            "questions": divergence(there.teacher, model, questions),
            "ended": ended(there, model),
            "answered": answered(there, model),
            "loss": float(predict(model, running, "loss").double().mean()),
        }
        for name, model in models.items()
    }


def claims(seeds: Iterable[int]) -> list[Claim]:
    """Ends, nearness to the teacher on stories and on questions, answers, what is lost of stories. About 7 s a seed."""
    found = [measured(seed) for seed in seeds]

    def less(figure: str, one: str, other: str) -> tuple[float, ...]:
        return tuple(each[one][figure] - each[other][figure] for each in found)

    def of(figure: str, name: str) -> tuple[float, ...]:
        return tuple(each[name][figure] for each in found)

    better = "instructions are followed better: MT-Bench of Mistral-7B 3.73, after it 7.29"
    return [
        Claim("continuations of held-out stories that end, base model", "none stated", (0.0, 0.2), of("ended", "base")),
        Claim("the same after the method", "answers end", (0.8, 1.0), of("ended", "method")),
        Claim(
            "nats by which the method is nearer to the teacher than the original halves, held-out stories",
            "the teacher's continuation is what is learnt",
            (0.0, 10.0),
            less("stories", "halves", "method"),
        ),
        Claim(
            "nats by which the original halves are nearer to the teacher than the base, held-out stories",
            "none stated",
            (0.0, 20.0),
            less("stories", "base", "halves"),
        ),
        Claim(
            "nats by which the method is nearer to the teacher than the original halves, questions never seen",
            better,
            (0.0, 20.0),
            less("questions", "halves", "method"),
        ),
        Claim(
            "share of questions answered right to the word, method less original halves",
            better,
            (0.0, 1.0),
            less("answered", "method", "halves"),
        ),
        Claim(
            "nats a token lost on held-out running stories",
            "format is learnt, abilities stay",
            (-0.05, 0.5),
            less("loss", "method", "base"),
        ),
    ]
