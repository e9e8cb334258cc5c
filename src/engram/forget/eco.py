"""Embedding-corrupted prompts: a classifier in front of a model that stays as it is, and noise where it says so.

Liu, Wang, Flanigan, Liu: Large Language Model Unlearning via Embedding-Corrupted Prompts. NeurIPS 2024, arXiv
2406.07933.

1. A classifier learns to tell prompts to forget from prompts to keep, each class weighted N / N_c.
2. A prompt is flagged if p(forget) is above one half and above a threshold: given, or conformal, p >= 1 - q with q the
   ceil((n + 1)(1 - alpha)) / n quantile of 1 - p over forget prompts that the classifier was not fitted to.
3. The embeddings of a flagged prompt's tokens are damaged, all but the last one, or those of the named entities alone:
   N(0, sigma²) on the first coordinates (or zeros, or turned signs), while the prompt is read; later tokens are not.
4. sigma is learnt without gradients, by the two-point rule

       g = (D(sigma + eps) - D(max(sigma - eps, 1e-8))) / (2 eps),   sigma <- max(sigma - lr g, sigma_min)

   where D is the distance of a score on the forget answers from what a model would score that never knew them.

The knowledge stays in the weights. What comes out is a `models.guarded_lm.GuardedLM`, which hides it from whoever asks
through it, until they find words that the classifier does not know.

Where paper and code differ: the published search lowers the accuracy among answers, here `objective="accuracy"`, which
has no slope where a model is sure; followed is the paper's distance. Of the strengths that were tried the one with the
least D is taken, not the last. The published noise is new at every call; here it follows from a seed and from the
tokens read so far. The classifier there is a RoBERTa of 125 million weights; here it is logistic regression on counts
of tokens and pairs of tokens, weighted by rarity, which knows no synonyms but reads token ids as they come.
Reconstructed: the score, which is the mean log-probability of the right answer less that of wrong ones, per token (a
model that never knew holds both alike: 0, a surrogate that needs no second model); that calibration looks at forget
prompts alone, by cross-validation; how a prompt's end is found (`end`). Left out: random coordinates, replacing, and
the ablations (constants, shuffling, reversal); a strength for each coordinate.
Beyond the paper: for models that read no tokens, the input itself stands for the embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor, nn

from engram.core.forgetter import Forgetter, rows
from engram.core.needs import Need, Needs, needs
from engram.core.request import Request
from engram.data.anchors import spelled, translate
from engram.data.table import IGNORED, Batch, Table, Target
from engram.engine.lm import log_probs, other_answers, questions, sequence_logp
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.environment import require
from engram.errors import EngramError, unknown
from engram.models.guarded_lm import (
    CORRUPTIONS,
    Guard,
    GuardedInputs,
    GuardedLM,
    PromptClassifier,
    RowClassifier,
    Scorer,
    prompts,
)
from engram.stats.scores import conformal_threshold

MARK = 4  # tokens that tell a prompt's end, at most
OTHERS = 4  # wrong answers that the right one is compared with, where rows bring none
ENOUGH = {"distance": 0.1, "accuracy": 0.02}  # a D that needs no further step
Make = Callable[[float], Guard]


@dataclass(kw_only=True, eq=False)
class ECO(Forgetter):
    """`kind`: "noise" on the first `dims` coordinates, "zero" or "flip" of the largest ones. `strength`: the standard
    deviation of the noise, or the number of coordinates; "learnt" for noise, which needs the answers: from `start` in
    `steps` steps of `rate`, never below `least`, looking `eps` to either side. `objective`: the "distance" of the score
    from `target`, in nats per token, or the "accuracy" among the answers.

    `threshold`: a probability (the paper has 0.99 to 0.9999), or "conformal": at least 1 - `alpha` of new forget
    prompts of the same kind are flagged, as far as that takes no probability below one half; it is calibrated on
    `folds` parts of the forget prompts in turn. `longest`, `places`: of the runs of tokens that the classifier reads;
    `penalty`: its L2 weight.

    `entities`: names whose tokens alone are damaged where they stand in a prompt; they need a fast `tokenizer` (an
    object, a directory or a hub name). `end`: the tokens that end a prompt where its answer follows; None takes what
    the ends of all prompts at hand share, up to 4 tokens.

    Cost: logistic regression, `folds` + 1 times, and 2 `steps` passes over the forget rows and their wrong answers.
    EngramError for settings that are not there, an `eps` that is too large, and a strength to be learnt of answers that
    cannot be compared.
    """

    kind: Literal["noise", "zero", "flip"] = "noise"
    dims: int = 1
    strength: float | Literal["learnt"] = "learnt"
    objective: Literal["distance", "accuracy"] = "distance"
    target: float = 0.0
    start: float = 0.1
    least: float = 0.1
    eps: float = 0.0999
    rate: float = 100.0
    steps: int = 10
    threshold: float | Literal["conformal"] = "conformal"
    alpha: float = 0.05
    folds: int = 10
    longest: int = 2
    places: int = 2**16
    penalty: float = 0.1
    entities: tuple[str, ...] = ()
    tokenizer: Any = None
    end: tuple[int, ...] | None = None

    @classmethod
    def tiny(cls) -> ECO:
        """A setting for checks on a handful of rows."""
        return cls(dims=8, steps=3, folds=2, places=2**10)

    @property
    def needs(self) -> Needs:
        asked = {Need.FORGET_ROWS, Need.RETAIN_ROWS}
        return needs(asked | {Need.FORGET_LABELS} if self.strength == "learnt" else asked)

    def check(self, request: Request) -> None:
        """Besides what all forgetters check: EngramError for a setting that cannot be."""
        super().check(request)
        for what, given, there in (("kind", self.kind, CORRUPTIONS), ("objective", self.objective, ENOUGH)):
            if given not in there:
                raise unknown(what, given, there)
        if self.strength == "learnt" and self.kind != "noise":
            raise EngramError(f"a number of coordinates is not learnt; give strength=… for kind={self.kind!r}")
        if not 0 < self.eps < min(self.start, self.least):
            raise EngramError(f"eps={self.eps:g} has to be above 0, and below start and least")
        if self.entities and self.tokenizer is None:
            raise EngramError("entities are words, and prompts are tokens: give the `tokenizer` too")

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        self.check(request)
        run = run or Run()
        run.report.say("no weight forgets anything: prompts are guarded, for as long as the model is asked through it")
        gone, kept = rows(request.forget), rows(request.retain)
        with run.scope("forget"):
            make = self.guard(copy.deepcopy(model).to(run.device), gone, kept, run)
            if self.strength != "learnt":
                return make(float(self.strength))
            return make(run.phase("strength", lambda: self.learnt(make, gone, run)))

    def guard(self, model: nn.Module, gone: Table, kept: Table, run: Run) -> Make:
        """The guarded model as a function of the strength, its classifier fitted."""
        name = _input(gone)
        settings: dict[str, Any] = {"kind": self.kind, "dims": self.dims, "seed": run.number("noise")}
        if name != "input_ids":
            values = [_numbers(table, name) for table in (gone, kept)]
            reader = RowClassifier(values[0].shape[1])
            settings["threshold"] = self.fit(reader, [sparse.csr_matrix(part) for part in values], _spread, run)
            return lambda strength: GuardedInputs(model, reader, name, strength=strength, **settings).to(run.device)
        end = shared_end(gone, kept) if self.end is None else self.end
        asked = [_prompts(table, end) for table in (gone, kept)]
        prompt = PromptClassifier(self.places, self.longest)
        settings["threshold"] = self.fit(prompt, [_counts(prompt, *part) for part in asked], _rarity, run)
        settings |= {"end": end, "entities": self.pieces(*asked[0])}
        return lambda strength: GuardedLM(model, prompt, strength=strength, **settings).to(run.device)

    # The classifier

    def fit(self, classifier: Scorer, features: Sequence[Any], scales: Callable[[Any], np.ndarray], run: Run) -> float:
        """Fit the classifier to the features [n, width] of forget and of retain rows; the threshold of its p."""
        scale = scales(sparse.vstack(features).tocsc())
        used = np.flatnonzero(scale)
        gone, kept = (part.tocsc()[:, used].multiply(scale[used]).tocsr() for part in features)
        found = run.phase("classifier", lambda: _logistic(gone, kept, self.penalty))
        weight = torch.zeros(len(scale), dtype=torch.float64)
        weight[used] = found["weight"] * torch.from_numpy(scale[used])
        classifier.put(weight, found["bias"])
        if self.threshold != "conformal":
            return float(self.threshold)
        q = run.phase("threshold", lambda: self.misfit(gone, kept, run))
        if q == float("inf"):
            run.report.say(f"{gone.shape[0]} forget prompts are too few for alpha={self.alpha:g}: p > 0.5 is flagged")
        return max(1 - q, 0.5)

    def misfit(self, gone: Any, kept: Any, run: Run) -> float:
        """The conformal quantile of 1 - p(forget), each forget row read by a classifier that was fitted without it."""
        folds = min(self.folds, gone.shape[0])
        if folds < 2:
            return float("inf")
        p = np.zeros(gone.shape[0])
        order = torch.randperm(len(p), generator=run.generator("folds")).numpy()
        for out in np.array_split(order, folds):
            fit = _logistic(gone[np.setdiff1d(order, out)], kept, self.penalty)
            p[out] = 1 / (1 + np.exp(-(gone[out] @ fit["weight"].numpy() + float(fit["bias"]))))
        scores = torch.from_numpy(np.stack([1 - p, p], 1))
        return conformal_threshold(scores, torch.ones(len(p), dtype=torch.int64), self.alpha)

    def pieces(self, ids: Tensor, there: Tensor) -> list[list[int]]:
        """The runs of tokens that write an entity: in these prompts, and alone. EngramError where none stands there."""
        if not self.entities:
            return []
        tokenizer = self.tokenizer
        if isinstance(tokenizer, str):
            tokenizer = require("transformers").AutoTokenizer.from_pretrained(tokenizer)
        same = {name: name for name in self.entities}
        runs = {run for row, own in zip(ids, there, strict=True) for run in _named(tokenizer, row[own].tolist(), same)}
        if not runs:
            raise EngramError("no entity stands in the forget prompts; check their spelling, and the tokenizer")
        alone = (tokenizer(text, add_special_tokens=False)["input_ids"] for e in self.entities for text in (e, f" {e}"))
        return [list(run) for run in sorted(runs | {tuple(run) for run in alone})]

    # The strength

    def learnt(self, make: Make, gone: Table, run: Run) -> float:
        """The strength with the least D among those that the search tries."""
        read = _answers(gone, run)
        tried: dict[float, float] = {}

        def objective(strength: float) -> float:
            if strength not in tried:
                tried[strength] = self.gap(read(make(strength)))
            return tried[strength]

        search: dict[str, Any] = {
            "eps": self.eps,
            "rate": self.rate,
            "least": self.least,
            "enough": ENOUGH[self.objective],
        }
        objective(two_point(objective, self.start, steps=self.steps, **search))
        able = [strength for strength in tried if strength >= self.least]
        found = min(able, key=lambda strength: (tried[strength], strength))
        run.report.say(f"strength {found:g}: D is {tried[found]:.3g}, after {tried[min(tried)]:.3g} with next to none")
        return found

    def gap(self, logp: Tensor) -> float:
        """D from the log-probabilities of the right answer and of wrong ones behind it, [n, 1 + k], -inf for none."""
        there = logp.isfinite()
        if self.objective == "accuracy":
            return float((logp.argmax(1) == 0).double().mean() - (1 / there.sum(1)).mean())
        wrong = torch.where(there, logp, 0.0)[:, 1:].sum(1) / (there.sum(1) - 1)
        return abs(float((logp[:, 0] - wrong).mean()) - self.target)


def two_point(
    objective: Callable[[float], float],
    start: float,
    *,
    eps: float,
    rate: float,
    steps: int,
    least: float,
    enough: float = -float("inf"),
) -> float:
    """The minimum of a function of one number above `least`, by gradient descent on its central differences; sooner
    where the value at `eps` above is below `enough`. Cost: 2 values a step."""
    s = start
    for _ in range(steps):
        above, below = objective(s + eps), objective(max(s - eps, 1e-8))
        if above < enough:
            break
        s = max(s - rate * (above - below) / (2 * eps), least)
    return s


# --- what is read


def _input(table: Table) -> str:
    """The tensor that prompts are told by. EngramError where there are several."""
    if "input_ids" in table.inputs:
        return "input_ids"
    if len(table.inputs) != 1:
        raise EngramError(f"a prompt is input_ids, or one tensor of numbers; these rows have {sorted(table.inputs)}")
    return next(iter(table.inputs))


def _numbers(table: Table, name: str) -> Tensor:
    """[n, width] float64, as the model reads them."""
    return table.batch(torch.arange(len(table))).inputs[name].flatten(1).double()


def _prompts(table: Table, end: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Token ids and which of them are prompt, [n, T]: what stands before the answer; the whole row where all of it is
    asked for."""
    ids = table.inputs["input_ids"]
    there = table.inputs.get("attention_mask", torch.ones_like(ids)).bool()
    if table.target != Target.TOKENS:
        return ids, prompts(ids, there, end)
    assert table.labels is not None
    begin = questions(table.labels)[:, None]
    return ids, there & ((torch.arange(ids.shape[1]) < begin) | (begin == 0))


def shared_end(*tables: Table) -> tuple[int, ...]:
    """The last tokens, up to 4, that all prompts with an answer behind them share; () for none."""
    lasts = []
    for table in tables:
        if "input_ids" in table.inputs and table.target == Target.TOKENS:
            assert table.labels is not None
            places = questions(table.labels)[:, None] - torch.arange(1, MARK + 1)
            lasts.append(torch.where(places >= 0, table.inputs["input_ids"].gather(1, places.clamp(min=0)), -1))
    if not lasts:
        return ()
    last = torch.cat(lasts)  # [n, 4], backwards
    shared = ((last == last[0]) & (last >= 0)).all(0).long().cumprod(0)
    return tuple(last[0, : int(shared.sum())].flip(0).tolist())


def _named(tokenizer: Any, row: list[int], same: dict[str, str]) -> list[tuple[int, ...]]:
    """The tokens of every entity in a prompt, by the overlap of characters."""
    text, offsets = spelled(tokenizer, row)
    spans = translate(text, same)[1]
    return [
        tuple(token for token, (start, end) in zip(row, offsets, strict=True) if start < span.end and end > span.start)
        for span in spans
    ]


# --- logistic regression on sparse columns


def _counts(classifier: PromptClassifier, ids: Tensor, there: Tensor) -> Any:
    """How often each place's runs stand in each prompt, [n, places] sparse."""
    pairs = []
    for places, whole in classifier.runs(ids, there):
        row, column = whole.nonzero(as_tuple=True)
        pairs.append(torch.stack([row, places[row, column]]).numpy())
    row, place = np.concatenate(pairs, 1)
    return sparse.csr_matrix((np.ones(len(row)), (row, place)), shape=(len(ids), classifier.places))


def _rarity(counts: Any) -> np.ndarray:
    """ln(n / how many prompts hold it) of every place, 0 for one that none holds."""
    held = np.diff(counts.indptr)
    return np.log(counts.shape[0] / np.maximum(held, 1)) * (held > 0)


def _spread(values: Any) -> np.ndarray:
    """1 / standard deviation of every column, 0 for a constant one."""
    deviation = values.toarray().std(0)
    return np.where(deviation > 0, 1 / np.maximum(deviation, 1e-12), 0.0)


def _logistic(gone: Any, kept: Any, penalty: float) -> dict[str, Tensor]:
    """Weight [width] and bias of forget rows against retain rows, each class weighted N / (2 N_c)."""
    from sklearn.linear_model import LogisticRegression

    label = np.arange(gone.shape[0] + kept.shape[0]) < gone.shape[0]
    fit = LogisticRegression(C=1 / penalty, class_weight="balanced", max_iter=1000)
    fit.fit(sparse.vstack([gone, kept]), label)
    return {"weight": torch.from_numpy(fit.coef_[0]), "bias": torch.tensor(float(fit.intercept_[0]))}


# --- what is answered


def _answers(table: Table, run: Run) -> Callable[[nn.Module], Tensor]:
    """A function of the model: log-probabilities of the right answer of each row, and of wrong ones behind it,
    [n, 1 + k], -inf for none; per token, for answers of several. EngramError for rows without answers to compare."""
    if table.target == Target.CLASSES:
        return partial(_of_classes, table=table, run=run)
    if table.target != Target.TOKENS:
        raise EngramError(f"answers can be compared of classes and tokens, not of {table.target}; give strength=…")
    others, wrong = _wrong_answers(table, run)
    right, some = _other(table, "paraphrased") if "paraphrased_ids" in table.extra else table, wrong.any(1)
    if not bool(some.any()):
        raise EngramError("all forget rows have the same answer, and no wrong ones beside it; give strength=…")
    return partial(_of_tokens, tables=[one.take(some) for one in (right, *others)], wrong=wrong[some], run=run)


def _of_classes(model: nn.Module, table: Table, run: Run) -> Tensor:
    assert table.labels is not None
    logp, own = predict(model, table, log_probs, run=run).double(), table.labels[:, None]
    return torch.cat([logp.gather(1, own), logp.scatter(1, own, -torch.inf)], 1)


def _of_tokens(model: nn.Module, tables: Sequence[Table], wrong: Tensor, run: Run) -> Tensor:
    logp = torch.stack([predict(model, one, _mean_logp, run=run) for one in tables], 1)
    return logp.masked_fill(F.pad(~wrong, (1, 0)), -torch.inf)


def _mean_logp(output: Any, batch: Batch) -> Tensor:
    assert batch.labels is not None
    return sequence_logp(output.logits, batch.labels, reduce="mean").double()


def _wrong_answers(table: Table, run: Run) -> tuple[list[Table], Tensor]:
    """The questions with other answers, and which of these are wrong indeed, [n, k]: the rows' own wrong answers, else
    answers of other rows, drawn."""
    assert table.labels is not None
    if "perturbed_ids" in table.extra:
        labels = torch.as_tensor(table.extra["perturbed_labels"])
        return [_other(table, "perturbed", k) for k in range(labels.shape[1])], (labels != IGNORED).any(2)
    answers = list(dict.fromkeys(tuple(row[row != IGNORED].tolist()) for row in table.labels))
    draws = run.generator("wrong answers")
    made = [other_answers(table, answers, draws) for _ in range(OTHERS)]
    return made, torch.stack([_differ(table.labels, one.labels) for one in made], 1)


def _other(table: Table, kind: str, k: int | None = None) -> Table:
    """The rows with the answers that stand in columns of this kind, the k-th of several."""
    ids, labels = (torch.as_tensor(table.extra[f"{kind}_{part}"]) for part in ("ids", "labels"))
    ids, labels = (ids, labels) if k is None else (ids[:, k], labels[:, k])
    read = ((labels != IGNORED).flip(1).cumsum(1).flip(1) > 0).long()  # up to the last token that is asked for
    return Table({"input_ids": ids, "attention_mask": read}, labels)


def _differ(one: Tensor, other: Tensor | None) -> Tensor:
    """Which rows of labels [n, T] ask for another answer to the same question, [n]."""
    assert other is not None
    width = max(one.shape[1], other.shape[1])
    padded = (F.pad(labels, (0, width - labels.shape[1]), value=IGNORED) for labels in (one, other))
    return torch.ne(*padded).any(1)
