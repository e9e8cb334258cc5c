"""TOFU: what a model still says of facts that it was asked to forget, and what that cost the others.

Maini, Feng, Schwarzschild, Lipton, Kolter: TOFU: A Task of Fictitious Unlearning for LLMs. COLM 2024, arXiv 2401.06121;
used so by Zhang, Lin, Bai, Mei: Negative Preference Optimization, COLM 2024, arXiv 2404.05868.

Per item, with P(a) = exp(-mean token loss of the answer a):
- probability: P(answer); where the answer is one of several options, P(answer) / (P(answer) + sum of P(wrong answers));
- ROUGE-L recall: length of the longest common subsequence of the greedy answer and the true one, over the true length;
- truth ratio R = mean P(wrong answers) / P(paraphrased answer). The mean is arithmetic in the TOFU paper, geometric in
  its published code; scored as min(R, 1/R) on forget items and max(0, 1 - R) on all others. Both in [0, 1].

Model utility: the harmonic mean of the three scores on retained items, real authors and world facts. Forget quality:
the p-value of a Kolmogorov-Smirnov test between the truth ratios on the forget items of the unlearned model and of one
that was trained without them; 1 is best. A model in ruins can have a high p-value: never read it without the utility.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.special import logsumexp
from scipy.stats import ks_2samp
from torch import Tensor, nn

from engram.core.finding import MARGINS, Finding, figure
from engram.core.probe import Probe, Subject, labelled, oracles_of
from engram.data.table import IGNORED, Batch, Table, Target
from engram.engine.answers import told, truths
from engram.engine.lm import log_probs, sequence_logp
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.environment import require
from engram.errors import EngramError, unknown
from engram.stats.intervals import mean
from engram.stats.text import rouge_l

Logs = Mapping[str, Mapping[str, Mapping[str, Any]]]  # section -> measure -> item -> number, or numbers
SECTIONS = {
    "retain": "eval_log.json",
    "authors": "eval_real_author_wo_options.json",
    "facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}  # a table of the subject -> its section of a log
OPTIONS = ("authors", "facts")  # here the true answer competes with the wrong ones
RATIOS = ("geometric", "arithmetic")


# --- from the numbers in a log


def model_utility(logs: Logs | str | Path, truth_ratio: str = "arithmetic") -> float:
    """Harmonic mean of nine scores in [0, 1]: probability, ROUGE-L recall and truth ratio on retained items, real
    authors and world facts; 0 where one of them is 0.

    `logs`: an evaluation log in TOFU's layout, or the path of its JSON. `truth_ratio`: which mean over wrong answers:
    "arithmetic" or "geometric". EngramError for a log that lacks something, and for a loss that is no number.
    """
    found = _read(logs)
    return utility_of(found, [name for name in SECTIONS if name != "forget"], truth_ratio)


def forget_quality(
    unlearned_logs: Logs | str | Path, retain_logs: Logs | str | Path, truth_ratio: str = "geometric"
) -> float:
    """p-value in [0, 1] of the two-sample Kolmogorov-Smirnov test between the truth ratios on the forget items of the
    unlearned model and of a model trained without them; 1 for equal ones.

    Arguments as for `model_utility`; published figures use the geometric mean.
    """
    return _test(_read(unlearned_logs), _read(retain_logs), truth_ratio)[1]


def ks_statistic(
    unlearned_logs: Logs | str | Path, retain_logs: Logs | str | Path, truth_ratio: str = "geometric"
) -> float:
    """The statistic of that test: the largest distance of the two distribution functions, in [0, 1]."""
    return _test(_read(unlearned_logs), _read(retain_logs), truth_ratio)[0]


def log_truth_ratio(logs: Logs | str | Path, section: str = "forget", truth_ratio: str = "geometric") -> np.ndarray:
    """log R of every item of a section (forget, retain, authors, facts), [n]."""
    if truth_ratio not in RATIOS:
        raise unknown("truth_ratio", truth_ratio, RATIOS)
    found = _read(logs)
    wrong = _column(found, section, "average_perturb_loss")
    right = _column(found, section, "avg_paraphrased_loss", instead="avg_gt_loss")[:, 0]
    count = (~np.isnan(wrong)).sum(1)
    if truth_ratio == "geometric":
        return right - np.nansum(wrong, 1) / count
    return right + logsumexp(np.where(np.isnan(wrong), -np.inf, -wrong), axis=1) - np.log(count)


def scores_of(logs: Logs, section: str, truth_ratio: str = "arithmetic") -> dict[str, float]:
    """Means over the items of a section, each in [0, 1]: probability, ROUGE-L and truth ratio."""
    names = ("probability", "ROUGE-L", "truth ratio")
    return {name: float(s.mean()) for name, s in zip(names, _scores(logs, section, truth_ratio), strict=True)}


def utility_of(logs: Logs, sections: Sequence[str], truth_ratio: str = "arithmetic") -> float:
    """Model utility over these sections alone: the harmonic mean of three scores of each, 0 where one is 0."""
    return _harmonic([score for name in sections for score in scores_of(logs, name, truth_ratio).values()])


def _test(one: Logs, other: Logs, truth_ratio: str) -> tuple[float, float]:
    """Statistic and p-value; the logarithm keeps the order of R, and neither overflows."""
    a, b = (log_truth_ratio(logs, "forget", truth_ratio) for logs in (one, other))
    found = ks_2samp(a, b)
    return float(found.statistic), float(found.pvalue)


def _scores(logs: Logs, section: str, truth_ratio: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probability, ROUGE-L recall and truth-ratio score of every item, each [n] in [0, 1]."""
    ratio = log_truth_ratio(logs, section, truth_ratio)
    truth = np.exp(-np.abs(ratio)) if section == "forget" else -np.expm1(np.minimum(ratio, 0))
    return _probability(logs, section), _column(logs, section, "rougeL_recall")[:, 0], truth


def _probability(logs: Logs, section: str) -> np.ndarray:
    right = _column(logs, section, "avg_gt_loss")
    if section not in OPTIONS:
        return np.exp(-right[:, 0])
    wrong = _column(logs, section, "average_perturb_loss")
    losses = np.where(np.isnan(wrong), np.inf, wrong)
    return np.exp(-right[:, 0] - logsumexp(-np.concatenate([right, losses], 1), axis=1))


def _harmonic(numbers: Sequence[float]) -> float:
    return 0.0 if min(numbers) <= 0 else len(numbers) / float(sum(1 / x for x in numbers))


def _read(logs: Logs | str | Path) -> Logs:
    if isinstance(logs, Mapping):
        return logs
    try:
        return json.loads(Path(logs).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise EngramError(f"the evaluation log {logs} cannot be read: {error}") from error


def _column(logs: Logs, section: str, measure: str, instead: str | None = None) -> np.ndarray:
    """A measure of all items of a section, [n, k], in the order of the items' losses; NaN where an item has fewer."""
    if section not in SECTIONS:
        raise unknown("section", section, SECTIONS)
    part = logs.get(SECTIONS[section], {})
    name = measure if measure in part or instead is None else instead
    if name not in part or not part[name]:
        raise EngramError(f"the evaluation log holds no {name} in {SECTIONS[section]}; evaluate these items first")
    lists = [np.atleast_1d(np.asarray(part[name][item], dtype=float)) for item in _items(part, name)]
    for item, values in zip(_items(part, name), lists, strict=True):
        if not len(values) or np.isnan(values).any():
            raise EngramError(f"{name} of item {item} in {SECTIONS[section]} is no number; the model may be in ruins")
    table = np.full((len(lists), max(map(len, lists))), np.nan)
    for row, values in zip(table, lists, strict=True):
        row[: len(values)] = values
    return table


def _items(part: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    """The items of a section, in the order of `avg_gt_loss` if the measure has the same ones."""
    items = list(part.get("avg_gt_loss", part[name]))
    if set(items) != set(part[name]):
        raise EngramError(f"the evaluation log has {len(items)} items, and {name} of {len(part[name])} or of others")
    return items


# --- from a model


def evaluate(
    model: nn.Module, tables: Mapping[str, Table], run: Run | None = None, tokenizer: Any = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """A model's evaluation log in TOFU's layout, of tables named retain, forget, authors or facts.

    Token tables, padded on the right, carry their wrong answers in the extra columns `perturbed_ids` and
    `perturbed_labels` [n, k, T], and a paraphrased answer, if any, in `paraphrased_ids` and `paraphrased_labels`
    [n, T]. Greedy answers end with the table's width; they are compared as words, stemmed, by rouge-score with a
    `tokenizer` (a name, a directory, or one of transformers), else token by token. For classes, the other live classes
    are the wrong answers.

    Cost: 2 + k forward passes over the rows, and the greedy answers. EngramError for token rows without wrong answers.
    """
    run = run or Run()
    recall = _recall_of_words(tokenizer) if tokenizer else rouge_l
    return {SECTIONS[name]: _evaluated(model, name, table, run, recall) for name, table in tables.items()}


Recall = Callable[[list[int], list[int]], float]  # of what was told, and the truth


def _evaluated(model: nn.Module, name: str, table: Table, run: Run, recall: Recall) -> dict[str, dict[str, Any]]:
    measures = _of_classes(model, table, run) if table.target == Target.CLASSES else _of_tokens(model, table, run, name)
    if table.target == Target.TOKENS:
        said = told(model, table, run)
        truth = truths(model, table)
        measures["rougeL_recall"] = [recall(*pair) for pair in zip(said, truth, strict=True)]
    return {measure: dict(zip(table.ids, values, strict=True)) for measure, values in measures.items()}


def _of_classes(model: nn.Module, table: Table, run: Run) -> dict[str, list[Any]]:
    """The label is the answer, of one token; all other live classes are wrong answers."""
    assert table.labels is not None
    losses = -predict(model, table, log_probs, run=run).double()
    own = torch.nn.functional.one_hot(table.labels, losses.shape[1]).bool()
    wrong = [row[mask].tolist() for row, mask in zip(losses, torch.isfinite(losses) & ~own, strict=True)]
    right = losses[own].tolist()
    return {
        "avg_gt_loss": right,
        "avg_paraphrased_loss": right,
        "average_perturb_loss": wrong,
        "rougeL_recall": (losses.argmin(1) == table.labels).double().tolist(),
    }


def _of_tokens(model: nn.Module, table: Table, run: Run, name: str) -> dict[str, list[Any]]:
    if "perturbed_ids" not in table.extra:
        raise EngramError(
            f"the {name} rows hold no wrong answers; add the columns perturbed_ids and perturbed_labels, [n, k, tokens]"
        )
    right = predict(model, table, _loss, run=run).tolist()
    wrong = _other(table, "perturbed")
    losses = predict(model, wrong, _loss, run=run).reshape(len(table), -1).tolist()
    said = _other(table, "paraphrased") if "paraphrased_ids" in table.extra else None
    paraphrased = right if said is None else predict(model, said, _loss, run=run).tolist()
    return {"avg_gt_loss": right, "avg_paraphrased_loss": paraphrased, "average_perturb_loss": losses}


def _loss(output: Any, batch: Batch) -> Tensor:
    assert batch.labels is not None
    return -sequence_logp(output.logits, batch.labels, reduce="mean").double()


def _other(table: Table, kind: str) -> Table:
    """The questions with other answers, one row each."""
    ids, labels = (torch.as_tensor(table.extra[f"{kind}_{part}"]) for part in ("ids", "labels"))
    ids, labels = ids.reshape(-1, ids.shape[-1]), labels.reshape(-1, labels.shape[-1])
    asked = (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0  # up to the last token that is asked for
    return Table({"input_ids": ids, "attention_mask": asked.long()}, labels)


def _recall_of_words(given: Any) -> Recall:
    tokenizer = require("transformers").AutoTokenizer.from_pretrained(given) if isinstance(given, str | Path) else given
    scorer = require("rouge_score.rouge_scorer", "language").RougeScorer(["rougeL"], use_stemmer=True)

    def recall(told: list[int], truth: list[int]) -> float:
        said, wanted = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (told, truth))
        return float(scorer.score(wanted, said)["rougeL"].recall)

    return recall


# --- the probe


@dataclass(kw_only=True, eq=False)
class TOFU(Probe):
    """Probability, ROUGE-L recall and truth ratio on forget and retain rows, beside the oracles' (and on rows named
    authors and facts, if there are any); model utility over all but the forget rows; forget quality, the median
    p-value over the oracles. `evaluate` says what the tables hold.

    `truth_ratio`: the mean over wrong answers that scores use; forget quality takes the geometric one, as published.
    `limit`: rows of each table, the first ones. Cost: that of `evaluate`, for the model and for each oracle.
    """

    truth_ratio: str = "arithmetic"
    tokenizer: str | None = None
    limit: int = 300
    oracles: int = 5
    margin: float = MARGINS["distance"]

    asks: ClassVar[frozenset[str]] = frozenset({"model", "forget", "retain"})

    @classmethod
    def tiny(cls) -> TOFU:
        """A setting for checks on a handful of rows."""
        return cls(oracles=2, limit=20)

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        run = run or Run()
        tables = self._tables(subject)
        if not tables:
            return []
        models = [subject.model, *oracles_of(subject, self.oracles, run)]
        own, *others = [evaluate(model, tables, run, self.tokenizer) for model in models]
        found = [finding for name in tables for finding in self._of_section(name, own, others)]
        found.append(self._utility(tables, own, others))
        return [*found, self._quality(own, others)] if others else found

    def _tables(self, subject: Subject) -> dict[str, Table]:
        """The first rows of every table that has answers; none where forget or retain rows have none."""
        known = {name: labelled(subject.rows[name]) for name in SECTIONS if name in subject.rows}
        first = {name: table.take(range(min(len(table), self.limit))) for name, table in known.items()}
        usable = {n: t for n, t in first.items() if len(t) and t.target in (Target.CLASSES, Target.TOKENS)}
        return usable if {"forget", "retain"} <= set(usable) else {}

    def _of_section(self, name: str, own: Logs, others: Sequence[Logs]) -> list[Finding]:
        measured = _scores(own, name, self.truth_ratio)
        references = [_scores(log, name, self.truth_ratio) for log in others]
        labels = ("probability of the answer", "ROUGE-L recall", "truth ratio")
        return [
            Finding(
                f"{label} on {name} rows",
                (estimate := mean(values)).value,
                len(values),
                (estimate.low, estimate.high),
                unit="score",
                reference=tuple(float(reference[k].mean()) for reference in references),
                margin=self.margin,
                protocol={"truth ratio": self.truth_ratio},
            )
            for k, (label, values) in enumerate(zip(labels, measured, strict=True))
        ]

    def _utility(self, tables: Mapping[str, Table], own: Logs, others: Sequence[Logs]) -> Finding:
        kept = [name for name in tables if name != "forget"]

        def utility(logs: Logs) -> float:
            return utility_of(logs, kept, self.truth_ratio)

        return figure(
            "model utility",
            utility(own),
            sum(len(tables[name]) for name in kept),
            "score",
            better="higher",
            reference=tuple(utility(log) for log in others),
            protocol={"truth ratio": self.truth_ratio, "rows": kept},
        )

    def _quality(self, own: Logs, others: Sequence[Logs]) -> Finding:
        tests = [_test(own, log, "geometric") for log in others]
        statistic, p = (float(np.median(values)) for values in zip(*tests, strict=True))
        protocol = {"test": "two-sample Kolmogorov-Smirnov", "statistic": statistic, "oracles": len(others)}
        n = len(own[SECTIONS["forget"]]["avg_gt_loss"])
        return figure("forget quality", p, n, "p", better="higher", protocol=protocol)
