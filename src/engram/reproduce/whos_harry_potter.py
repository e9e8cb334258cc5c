"""A book is unread by learning what else could be said there: an invented book in a small language model.

The world: plain sentences about common people, towns, things and animals, every word of which is drawn at random; and a
book, 36 facts about twenty invented names in the same words, told ninety times, which a GPT-2 of two layers, 64 wide,
then knows by heart. What is measured: the probability of the true name where the book's next word is one; perplexity on
general sentences that were not trained on; and whether what the model writes on from the book's beginnings is grammar,
by the perplexity of a judge that read general sentences alone (invented names are replaced by common ones before).

Soft labels, six epochs: where every next word is a draw, the likeliest one as the only label costs calibration (general
perplexity is up by a fifth after six epochs). Two epochs of the paper's labels are measured besides. So are the method
without its dictionary, and without the reinforced model (alpha 0); and gradient ascent with the same optimiser, stopped
after the first epoch in which the names are as unlikely as the method left them, and two epochs later.

Two bands do not hold here: stopped at that point, ascent has cost little more than the method (general perplexity is
1.04 times that before, that of its writing 1.1 times; 1.05 and 1.5 expected). In so small a world the names are gone
within a few epochs, before the sentences are. The next epochs ruin it: ascent is for those who know when to stop. Bands
of names, perplexity, grammar and both ablations are from the paper's words; that of ascent two epochs later was added
while settings, the world's sentences among them, were chosen on seeds 100 to 102.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from engram.core.request import Records, Request
from engram.data.anchors import translate
from engram.data.table import IGNORED, Batch, Table
from engram.data.text import blocks
from engram.engine.fit import fit
from engram.engine.generate import generate
from engram.engine.lm import summed_logp
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.environment import require
from engram.forget.gradient_ascent import GradientAscent
from engram.forget.whos_harry_potter import WhosHarryPotter
from engram.models.seeding import seeded
from engram.reproduce.claims import Claim
from engram.stats.seeds import generator

PEOPLE = ["Jon", "Anna", "Peter", "Maria", "David", "Laura", "Martin", "Helen", "Simon", "Alice", "Robert", "Clara"]
TOWNS = ["Millbrook", "Ashford", "Weston", "Brookfield", "Northgate", "Oakham", "Riverton", "Hillside"]
HEROES = [
    "Zorblax",
    "Quenda",
    "Mirthol",
    "Vexia",
    "Trundor",
    "Ysolde",
    "Grimbo",
    "Faelin",
    "Okkro",
    "Nymera",
    "Balthus",
    "Drusk",
]
PLACES = ["Umbrakeep", "Thornspire", "Wyrmgate", "Gloomfen", "Starhollow", "Kragmoor", "Silvernook", "Duskwell"]
DICTIONARY = dict(zip(HEROES + PLACES, PEOPLE + TOWNS, strict=True))
THINGS = ["lamp", "book", "ring", "horse", "boat", "drum", "coat", "key", "bell", "map", "harp", "clock"]
ANIMALS = ["dog", "cat", "fox", "bear", "mouse", "bird", "crow", "deer"]
VERBS = ["sees", "finds", "hides", "takes"]
COLOURS = ["red", "green", "blue", "white", "black", "grey", "old", "new", "small", "large"]
TOLD = ("{a} lives in {t} .", "{a} loves {b} .", "near the {o} waits {a} .")  # of each person in the book
NAMELESS = (
    "the {o} is {c} .",
    "the {c} {n} {v} a {o} .",
    "a {n} {v} the {c} {o} .",
    "every {n} {v} one {o} .",
    "one {c} {o} and two {n} stay here .",
)
FORMS = (*TOLD, *4 * NAMELESS)  # as often as they stand here
LENGTH, BATCH = 32, 16
GONE = 80  # rows of the book that are handed to the forgetters: some ten of its ninety tellings


class World(NamedTuple):
    """A tokenizer of words; general rows to learn from and to test with; the book's sentences, and its rows."""

    tokenizer: Any
    general: Table
    test: Table
    sentences: list[str]
    book: Table


def world(seed: int = 0) -> World:
    """The texts of a seed: 8,000 general sentences, 300 to test with, and a book that tells 36 facts in 90 orders."""
    draws, tokenizer = generator("book world", seed), _tokenizer()
    plain = [_plain(draws) for _ in range(8300)]
    told = _story(draws)
    chapters = {f"chapter {k}": " ".join(_shuffled(told, draws)) for k in range(90)}
    general, test = (blocks(tokenizer, [" ".join(part)], LENGTH) for part in (plain[:8000], plain[8000:]))
    return World(tokenizer, general, test, told, blocks(tokenizer, chapters, LENGTH))


def _plain(draws: torch.Generator) -> str:
    """A general sentence, its form and words drawn at random."""
    words = {"a": PEOPLE, "b": PEOPLE, "t": TOWNS, "o": THINGS, "c": COLOURS, "n": ANIMALS, "v": VERBS}
    form, *chosen = (some[int(torch.randint(len(some), (), generator=draws))] for some in (FORMS, *words.values()))
    return form.format(**dict(zip(words, chosen, strict=True)))


def _story(draws: torch.Generator) -> list[str]:
    """The book: where each of its people lives, whom they love, and what is theirs alone."""
    loved, owned = (_shuffled(words, draws) for words in (HEROES, THINGS))
    home = _shuffled([*PLACES, *PLACES], draws)
    people = zip(HEROES, loved, home, owned, strict=False)
    return [form.format(a=a, b=b, t=t, o=o) for a, b, t, o in people for form in TOLD]


def _shuffled(texts: list[str], draws: torch.Generator) -> list[str]:
    return [texts[k] for k in torch.randperm(len(texts), generator=draws).tolist()]


def _tokenizer() -> Any:
    """One token per word, and a full stop."""
    tokenizers, transformers = require("tokenizers"), require("transformers")
    forms = [word for form in FORMS for word in form.split() if not word.startswith("{")]
    words = dict.fromkeys(
        ["<end>", ".", *PEOPLE, *TOWNS, *HEROES, *PLACES, *THINGS, *COLOURS, *ANIMALS, *VERBS, *forms]
    )
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: k for k, word in enumerate(words)}, "<end>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


# --- models


def untrained(words: int) -> nn.Module:
    """A GPT-2 of two layers, 64 wide, its weights drawn from the global generator."""
    transformers = require("transformers")
    config = transformers.GPT2Config(
        vocab_size=words,
        n_positions=64,
        n_embd=64,
        n_layer=2,
        initializer_range=0.1,
        n_head=2,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def trained(table: Table, words: int, seed: int, epochs: int) -> nn.Module:
    """A model of these rows."""
    run = Run(seed=seed)
    with seeded(run.generator("weights")):
        model = untrained(words)

    def step(batch: Batch) -> Mean:
        assert batch.labels is not None
        return by_target(model(**batch.inputs).logits, batch.labels)

    order, plan = run.number("order"), Optimizer("adamw", lr=4e-3, schedule="linear", warmup=0.05)
    fit(
        step,
        lambda epoch: table.batches(BATCH, seed=order, epoch=epoch),
        model=model,
        optimizer=plan,
        epochs=epochs,
        steps=-(-len(table) // BATCH),
        run=run,
    )
    return model.eval()


class Setting(NamedTuple):
    """A world, a model that knows its book, the judge, and the request."""

    world: World
    model: nn.Module
    judge: nn.Module
    request: Request


@cache
def setting(seed: int) -> Setting:
    """What a seed is measured in. About 6 s."""
    there = world(seed)
    words = len(there.tokenizer)
    model = trained(there.general.concat(there.book), words, seed, epochs=4)
    judge = trained(there.general, words, seed + 1000, epochs=2)
    gone = there.book.take(range(GONE))
    return Setting(there, model, judge, Request(Records(gone.ids), forget=gone))


def method(there: World, **other: Any) -> WhosHarryPotter:
    """The method, at the size of this world."""
    again, plan = (Optimizer("adamw", lr=lr) for lr in (1e-3, 2e-4))
    given: dict[str, Any] = {"dictionary": DICTIONARY, "tokenizer": there.tokenizer, "soft": True, "epochs": 6}
    return WhosHarryPotter(reinforcement=again, optimizer=plan, batch_size=8, **{**given, **other})


def ascended(here: Setting, names: float, most: int = 20) -> tuple[nn.Module, nn.Module]:
    """Gradient ascent, an epoch at a time, until the names are as unlikely as that; and two epochs later."""
    step = GradientAscent(optimizer=Optimizer("adamw", lr=2e-4), epochs=1, batch_size=8)
    model = here.model
    for k in range(most):
        model = step.forget(model, here.request, Run(seed=k))
        if knowledge(model, here.world) <= names:
            break
    later = replace(step, epochs=2).forget(model, here.request, Run(seed=most))
    return model, later


# --- what is measured


def knowledge(model: nn.Module, there: World) -> float:
    """Probability of the true last name of each of the book's sentences, after another one; mean over sentences."""
    count = len(there.sentences)
    rows = [there.tokenizer(f"{there.sentences[(7 * k + 5) % count]} {there.sentences[k]}") for k in range(count)]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    named = torch.isin(ids, torch.tensor(there.tokenizer.convert_tokens_to_ids(list(DICTIONARY))))
    last = torch.where(named, torch.arange(ids.shape[1]), -1).amax(1, keepdim=True)
    labels = torch.where(torch.arange(ids.shape[1]) == last, ids, IGNORED)
    return float(predict(model, Table({"input_ids": ids}, labels), summed_logp).double().exp().mean())


def perplexity(model: nn.Module, table: Table) -> float:
    """exp of the mean loss per token."""
    assert table.labels is not None
    logp = predict(model, table, summed_logp).double().sum()
    return float((-logp / (table.labels[:, 1:] != IGNORED).sum()).exp())


def grammar(model: nn.Module, here: Setting) -> float:
    """The judge's perplexity on what the model writes on from the first two words of the book's sentences, greedily,
    common names put for invented ones."""
    begun = [" ".join(text.split()[:2]) for text in here.world.sentences]
    told = generate(model, here.world.tokenizer, begun, max_new=24)
    written = [translate(f"{one} {other}", DICTIONARY)[0] for one, other in zip(begun, told, strict=True)]
    return perplexity(here.judge, blocks(here.world.tokenizer, written, LENGTH))


@dataclass(frozen=True)
class Figures:
    """Of a model: probability of the true names, perplexity on general text, and of its own writing to the judge."""

    names: float
    general: float
    written: float


def figures(model: nn.Module, here: Setting) -> Figures:
    """The three figures of a model."""
    return Figures(knowledge(model, here.world), perplexity(model, here.world.test), grammar(model, here))


@cache
def measure(seed: int) -> dict[str, Figures]:
    """The figures before, of the method and its ablations, and of ascent to the same names. About 5 s."""
    here = setting(seed)
    found = {
        "method": method(here.world),
        "likeliest": method(here.world, soft=False, epochs=2),
        "no anchors": method(here.world, dictionary=None, tokenizer=None),
        "no reinforcement": method(here.world, alpha=0.0),
    }
    models = {name: one.forget(here.model, here.request, Run(seed=seed)) for name, one in found.items()}
    models["ascent"], models["ascent, later"] = ascended(here, knowledge(models["method"], here.world))
    return {name: figures(model, here) for name, model in {"before": here.model, **models}.items()}


MUCH = 1e6  # no upper end
CLAIMS = (
    ("how many times less likely the true names are", "familiarity 0.29 to 0.007: 41 times", (10.0, MUCH)),
    ("perplexity on general text, over that before", "benchmarks almost unaffected", (0.95, 1.05)),
    ("perplexity of its writing to the judge, over that before", "generic, fluent text", (0.0, 1.5)),
)
GRAMMAR_OF_ASCENT = "perplexity of the writing of ascent to the same names, over that before"
WORSE = "(no figure; expected to ruin the model)"
BOTH = "both are needed (as reported elsewhere)"


def claims(seeds: Iterable[int]) -> list[Claim]:
    """Names, utility and grammar of the method and of ascent; names without each half of it. About 12 s a seed."""
    told = [measure(seed) for seed in seeds]

    def ratio(part: str, one: str, other: str) -> tuple[float, ...]:
        return tuple(getattr(f[one], part) / getattr(f[other], part) for f in told)

    def own(name: str) -> list[tuple[float, ...]]:
        return [ratio("names", "before", name), ratio("general", name, "before"), ratio("written", name, "before")]

    return [
        *(Claim(*claim, found) for claim, found in zip(CLAIMS, own("method"), strict=True)),
        *(
            Claim(f"{says}; likeliest word as label, two epochs", paper, band, found)
            for (says, paper, band), found in zip(CLAIMS, own("likeliest"), strict=True)
        ),
        Claim(
            "general perplexity of ascent to the same names", WORSE, (1.05, MUCH), ratio("general", "ascent", "before")
        ),
        Claim(GRAMMAR_OF_ASCENT, WORSE, (1.5, MUCH), ratio("written", "ascent", "before")),
        Claim("the same, two epochs later", WORSE, (1.5, MUCH), ratio("written", "ascent, later", "before")),
        *(
            Claim(
                f"names left with {part}, over those of the method", BOTH, (2.0, MUCH), ratio("names", part, "method")
            )
            for part in ("no anchors", "no reinforcement")
        ),
    ]
