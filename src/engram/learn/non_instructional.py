"""Following instructions, learnt without instructions: fine-tuning on a stronger model's continuations of halved texts.

Xie, Syu, Lee: Non-instructional Fine-tuning: Enabling Instruction-Following Capabilities in Pre-trained Language Models
without Instruction-Following Data. 2024, arXiv 2409.00096.

A text is cut at its middle into x and a second half that is thrown away. A stronger model, the teacher, goes on from x:
y ~ p_teacher(. | x). The base model is fine-tuned to answer the user's turn x with y and an end of sequence,

    L = - mean over the tokens t of y and the end, of log p(y_t | x, y_<t),

and x itself is not learnt: with it, this would be further pretraining. `make` builds the pairs, `data.qa.pairs` writes
them as token rows, `NonInstructional` trains. Without a teacher `make` gives the original second halves, the control.
The paper's other recipe, continuous writing, is that control on texts that the teacher wrote.

Text passes between the models, never tokens: teacher and base may have different tokenizers. The paper found 0.7% of
its pairs to be instructional by a judge; `signs` looks for them by their form, and `make` leaves them out. Unverified,
hence reconstructed: where the cut falls exactly (here at the border of words nearest to the middle character), rank,
learning rate, epochs and filter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from engram.core.learning import GradientLearner
from engram.data.qa import ANSWER, QUESTION, tokenizer_for
from engram.data.task import Task
from engram.engine import lm
from engram.engine.generate import generate
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.io import digest, load

CONTROL = "the text itself"
PLACE = "\u27e8text\u27e9"  # stands for the user's words while a chat template is asked how it writes them
OF_QUESTION = {
    "question": re.compile(r"\?\W*$"),
    "request": re.compile(
        r"^\W*(?:please|write|list|explain|describe|summari[sz]e|translate|tell me|give me|how (?:do|can|to))\b", re.I
    ),
}
OF_ANSWER = {
    "refusal": re.compile(r"^\W*(?:i(?:['\u2019]m| am) sorry|i (?:can['\u2019]t|cannot)|as an ai|could you)\b", re.I)
}
OF_BOTH = {
    "roles": re.compile(r"^\s*(?:user|human|assistant|instruction|response|question|answer|q|a)\s*:", re.I | re.M),
    "list": re.compile(r"^\s*(?:\d+[.)]|[-*\u2022])\s+\S", re.M),
}


@dataclass(kw_only=True, eq=False)
class NonInstructional(GradientLearner):
    """Fine-tuning of a causal language model on pairs: `data.qa.pairs(make(…), …)` is the task's table.

    `network`: the base model, a directory or a module (which stays as it is); one that was tuned on instructions will
    do too. `lora`: the rank of LoRA adapters (peft) on its linear layers, which are trained alone and merged at the
    end, so that a plain model comes out; 0 trains all weights. Cost: as the template; the pairs, one generation each,
    are paid for in `make`.
    """

    optimizer: Optimizer = field(default_factory=lambda: Optimizer("adamw", lr=1e-4, schedule="cosine", warmup=0.03))
    epochs: int = 3
    lora: int = 0

    @classmethod
    def tiny(cls) -> NonInstructional:
        """A setting for checks on a handful of rows."""
        return cls(network={"name": "MLP", "hidden": [32]}, epochs=3, batch_size=32, optimizer=Optimizer(lr=1e-2))

    def start(self, task: Task, run: Run) -> None:
        if not self.lora:
            return
        self.frozen = [p for p in self.model.parameters() if p.requires_grad]
        with run.seeded("adapters"):
            self.model = lm.adapted(self.model, self.lora)
        for p in self.frozen:
            p.requires_grad_(False)

    def end(self, task: Task, run: Run) -> None:
        if not self.lora:
            return
        self.model = lm.merged(self.model)
        for p in self.frozen:
            p.requires_grad_(True)


def make(
    texts: Mapping[str, str] | Sequence[str],
    teacher: nn.Module | str | Path | None = None,
    tokenizer: Any = None,
    *,
    max_new: int = 256,
    greedy: bool = False,
    request: str = "{}",
    words: tuple[int, int] = (20, 600),
    filtered: bool = True,
    batch_size: int = 32,
    run: Run | None = None,
) -> list[dict[str, str]]:
    """Pairs {"id", "question", "answer", "teacher"}: the first half of each text, and what the teacher says next.

    `texts`: by id, or in order ("0", "1", …). `teacher`: a causal language model, or its directory, which then knows
    its `tokenizer` too; None: the answers are the original second halves. It writes at most `max_new` tokens, drawn
    from its distribution by the run's seed, or the likeliest (`greedy`). `request`: what a chat model is asked, {}
    being the half, as in `turns(tokenizer)["question"]`; it does not get into the pairs. `words`: texts of fewer are
    left out, of more are cut behind so many first. Pairs without an answer are left out, and, where `filtered`, those
    with `signs` of an instruction. `teacher` in a pair says who wrote the answer, for licences.

    Cost: one generation per text, a phase of the run: a run with a directory does it once. EngramError for no pair
    left, for a teacher without a tokenizer, and for a half that leaves no room for the answer in the teacher.
    """
    cut = {id: halves(text) for id, text in _documents(texts, words).items()}
    if teacher is None:
        answers, author = [second for _, second in cut.values()], CONTROL
    else:
        model, reader = _read(teacher, tokenizer)
        prompts = [request.format(first) for first, _ in cut.values()]
        size: dict[str, Any] = {"max_new": max_new, "greedy": greedy, "batch_size": batch_size}
        run, author = run or Run(), _author(teacher)
        answers = run.phase("continuations", lambda: generate(model, reader, prompts, **size, run=run))
    told = zip(cut.items(), map(str.strip, answers), strict=True)
    found = [{"id": id, "question": x, "answer": y, "teacher": author} for (id, (x, _)), y in told if y]
    found = [pair for pair in found if not (filtered and signs(pair))]
    if not found:
        raise EngramError(f"no pair is left of {len(texts)} texts; give longer ones, or lower `words`, now {words}")
    return found


def halves(text: str) -> tuple[str, str]:
    """The text cut before the white space between two words that is nearest to its middle character; the two parts
    make up the text. EngramError for a text of fewer than two words."""
    borders = [gap.start() for gap in re.finditer(r"(?<=\S)\s+(?=\S)", text)]
    if not borders:
        raise EngramError(f"the text {text[:40]!r} has no two words to cut between; leave it out")
    place = min(borders, key=lambda border: abs(2 * border - len(text)))
    return text[:place], text[place:]


def signs(pair: Mapping[str, str]) -> tuple[str, ...]:
    """What in a pair looks like an instruction or a conversation: a question at the end of the first half, a request at
    its beginning, an answer that refuses or asks back, names of roles, marks of lists; nothing for running text."""
    x, y = pair["question"], pair["answer"]
    places = [(OF_QUESTION, (x,)), (OF_ANSWER, (y,)), (OF_BOTH, (x, y))]
    return tuple(
        name for kinds, parts in places for name, form in kinds.items() if any(form.search(part) for part in parts)
    )


def turns(tokenizer: Any) -> dict[str, str]:
    """`question` and `answer` of `data.qa.pairs` by the tokenizer's chat template: x is the user's turn, and y the
    assistant's, which the end of sequence ends; those of TOFU for a tokenizer without a template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return {"question": QUESTION, "answer": ANSWER}
    user = [{"role": "user", "content": PLACE}]
    asked = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    if tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        asked = asked.removeprefix(tokenizer.bos_token)  # the tokenizer itself puts it there
    return {"question": asked.replace("{", "{{").replace("}", "}}").replace(PLACE, "{}"), "answer": "{}"}


def _documents(texts: Mapping[str, str] | Sequence[str], words: tuple[int, int]) -> dict[str, str]:
    """The texts that are long enough, by id, without the words beyond the limit."""
    least, most = words
    if not 2 <= least <= most:
        raise EngramError(f"words={words} should be the fewest words of a text, at least 2, and the most")
    named = dict(texts) if isinstance(texts, Mapping) else {str(k): text for k, text in enumerate(texts)}
    ends = {id: [word.end() for word in islice(re.finditer(r"\S+", text), most)] for id, text in named.items()}
    return {id: named[id][: found[-1]].strip() for id, found in ends.items() if len(found) >= least}


def _read(teacher: nn.Module | str | Path, tokenizer: Any) -> tuple[nn.Module, Any]:
    """The teacher and its tokenizer."""
    if not isinstance(teacher, nn.Module):
        return load(teacher), tokenizer or tokenizer_for(teacher, ())
    if tokenizer is None:
        raise EngramError("a teacher that is given as a module needs its `tokenizer`; give it, or a directory for both")
    return teacher, tokenizer


def _author(teacher: nn.Module | str | Path) -> str:
    return f"{type(teacher).__name__} {digest(teacher)[:12]}" if isinstance(teacher, nn.Module) else str(teacher)
