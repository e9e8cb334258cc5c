"""Forgetters of language models side by side: what they forget, and what it costs, on their way.

A model learns questions and answers about some authors; each method is asked to forget a share of the authors, and is
measured after some of its epochs against a model that never saw them. Two numbers make the plane that the field reads:
model utility (harmonic mean of probability, ROUGE-L recall and truth ratio on retained pairs, and on real authors and
world facts where the start was a pretrained model), and forget quality (p-value of the Kolmogorov-Smirnov test on truth
ratios). A model in ruins can have a high p-value: one is never shown without the other.

Settings are chosen on other authors: every method tries as many. The score of a trial is the harmonic mean of its
utility, as a share of the retrained model's, and of 1 - the KS statistic.

A guard (ECO) is measured through its interface, and marked: the weights behind it hold all that they held. It trains no
epochs, so that its course is its end.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from engram.audit.tofu import SECTIONS, evaluate, forget_quality, ks_statistic, scores_of, utility_of
from engram.compare.work import FORMAT, Row, Work, spread
from engram.core.forgetter import Forgetter
from engram.core.request import Request
from engram.core.settings import make
from engram.data.qa import Pair, pairs, read_pairs
from engram.data.table import Table
from engram.data.vocabulary import byte_pairs
from engram.engine.optimizer import Optimizer
from engram.engine.predict import evaluating
from engram.engine.progress import Progress
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.environment import require
from engram.errors import EngramError, unknown
from engram.models.guards import is_guard
from engram.models.io import load
from engram.models.seeding import seeded
from engram.stats.seeds import derive, generator

TABLE = "language.parquet"
PAIRS = ("full.jsonl", "retain_perturbed.jsonl", "forget10_perturbed.jsonl")  # of a directory in TOFU's layout
OTHERS = {"authors": "real_authors_perturbed.jsonl", "facts": "world_facts_perturbed.jsonl"}
REFUSALS = "idontknow.jsonl"
LEARNT = 0.95  # a ROUGE-L recall that counts as knowing the answer
NOTHING, RETRAIN = "Nothing", "Retrain"


def _grid(name: str, *rates: float, **fixed: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"name": f"forget.{name}", "lr": lr, **fixed} for lr in rates)


def _preferring(name: str, **fixed: Any) -> tuple[dict[str, Any], ...]:
    """The published beta, and less of it with more weight on the retain rows."""
    return (
        *_grid(name, 1e-3, 3e-4, beta=0.1, **fixed),
        *_grid(name, 1e-3, 3e-4, **{"beta": 0.02, **fixed, **({"retain_weight": 5.0} if len(fixed) else {})}),
    )


def _guarding(*settings: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    return tuple({"name": "forget.ECO", **setting} for setting in settings)


_RATES = (1e-3, 3e-4, 1e-4, 3e-5)
_ALL = 2**16  # coordinates of an embedding, or fewer
METHODS: dict[str, tuple[dict[str, Any], ...]] = {
    "GA": _grid("GradientAscent", *_RATES),
    "GA+RT": _grid("GradientDifference", *_RATES),
    "GA+KL": _grid("KLForget", *_RATES),
    "NPO": _preferring("NPO")[:2] + _grid("NPO", 1e-3, 3e-4, beta=0.02, retain_weight=0.0),
    "NPO+RT": _preferring("NPO", retain_ratio=3.0),
    "NPO+KL": _preferring("NPO", retain_ratio=3.0, retain_term="kl"),
    "DPO+RT": _preferring("DPO", retain_ratio=3.0),
    "IDK+RT": _grid("IDK", *_RATES, retain_ratio=3.0),
    "WHP": tuple(
        {"name": "forget.WhosHarryPotter", "lr": lr, "alpha": alpha, "reinforcement": {"name": "adamw", "lr": lr}}
        for lr, alpha in ((1e-3, 5.0), (3e-4, 5.0), (1e-3, 1.0))
    ),
    "SimNPO+RT": (
        *_grid("SimNPO", 1e-3, 3e-4, retain_ratio=3.0),
        *_grid("SimNPO", 1e-3, 3e-4, retain_ratio=3.0, beta=4.5, retain_weight=5.0),
    ),
    "ECO": _guarding({"dims": _ALL}, {"dims": 1}, {"kind": "flip", "strength": float(_ALL)}),
    "ECO-given": _guarding(  # strengths that were published for TOFU; all signs are turned in "ECO"
        {"dims": _ALL, "strength": 5.0}, {"dims": _ALL, "strength": 50.0}, {"dims": 1, "strength": 50.0}
    ),
}
METHODS["NPO"] = tuple({**setting, "retain_weight": 0.0} for setting in METHODS["NPO"])


SCORES = ("probability", "ROUGE-L", "truth ratio")
MEASURES = (
    *(f"{part} {name}" for part in ("forget", "retain") for name in SCORES),
    "utility",
    "utility of retraining",
    "forget quality",
    "KS statistic",
    "score",
    "seconds",
)


@dataclass(frozen=True)
class Comparison:
    """`data`: a directory in TOFU's layout, or a JSON-lines file of pairs with their perturbed answers. `model`: a
    directory or a hub name to start from; None is a GPT-2 of the sizes in `network` with a tokenizer of its own.
    `authors`: how many are learnt, and the same number again for tuning; None learns all that there are, and tunes on
    forgetting the first of them. `fractions` of them, the last ones, must be forgotten.
    `points`: the epochs of unlearning after which is measured, the last one being the end. `rows`: of each table that
    are measured, at most. `group`: the column that tells authors apart."""

    data: str
    model: str | None = None
    network: Mapping[str, float] = field(default_factory=lambda: {"n_embd": 128, "n_layer": 2, "n_head": 4})
    vocabulary: int = 2048
    epochs: int = 22
    lr: float = 3e-3
    batch_size: int = 8
    authors: int | None = 20
    group: str = "author"
    fractions: tuple[float, ...] = (0.1, 0.2, 0.5)
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    points: tuple[int, ...] = (2, 5, 10)
    rows: int = 40
    trials: int = 3
    budget: float = 600.0
    jobs: int = 1
    device: str = "cpu"
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in (NOTHING, *METHODS):
                raise unknown("forgetter of language models", name, (NOTHING, *METHODS))
        if not self.fractions or not all(0 < share < 1 for share in self.fractions):
            raise EngramError(f"fractions {self.fractions}: a share of the authors lies between 0 and 1")
        if not self.points or list(self.points) != sorted({*self.points}) or self.points[0] < 1:
            raise EngramError(f"points {self.points}: epochs from 1 on, in increasing order")

    @property
    def names(self) -> tuple[str, ...]:
        """The methods; left out, all."""
        return self.methods or (NOTHING, *METHODS)


@dataclass(frozen=True)
class Cell:
    """A method at a share of the authors with a seed; `tuning`: the trials that choose its setting."""

    method: str
    fraction: float
    seed: int
    tuning: bool

    @property
    def name(self) -> str:
        """A file name."""
        return f"{self.method}-{'tuning' if self.tuning else f'{self.fraction:g}-{self.seed}'}"


class Contest(Work):
    """A comparison in a directory; it can be interrupted and goes on, with more methods too."""

    free = (*Work.free, "methods")
    measured = MEASURES

    def __init__(self, plan: Comparison, out: str | Path, progress: Progress | None = None) -> None:
        super().__init__(plan, out, progress)
        home = Path(plan.data)
        files = [home / name for name in PAIRS if (home / name).exists()] if home.is_dir() else [home]
        if not files:
            raise EngramError(f"{home} holds none of {', '.join(PAIRS)}: no pairs to learn")
        given = [row for row in read_pairs(*files) if plan.group in row]
        if not any(row.get("perturbed_answer") for row in given):
            raise EngramError(
                f"no pair of {plan.data} has both {plan.group} and perturbed_answer: whose pairs are forgotten, and "
                "wrong answers beside the right one, as TOFU has them"
            )
        self.pairs = [row for row in given if plan.authors is None or row.get("perturbed_answer")]
        self.tokenizer = self._tokenizer()
        worlds = [self._world(False)] if plan.authors is None else [self._world(False), self._world(True)]
        asked = [self._asked(world) for world in worlds]
        self.worlds, self.asked = ({False: tables[0], True: tables[-1]} for tables in (worlds, asked))
        self.train = self.worlds[False]  # what the page counts

    def cells(self) -> tuple[list[Cell], list[Cell]]:
        """What tunes, and what is reported."""
        plan = self.plan
        tuning = [Cell(name, plan.fractions[0], plan.seeds[0], True) for name in plan.names if name != NOTHING]
        return tuning, [
            Cell(name, share, seed, False) for name in plan.names for share in plan.fractions for seed in plan.seeds
        ]

    def estimate(self) -> str:
        """What it will take, from an epoch of training."""
        recipe = self.recipe()
        start = time.perf_counter()
        Recipe(recipe.network, recipe.optimizer, 1, recipe.batch_size)(self.train, 0)
        one = time.perf_counter() - start
        plan, (tuning, reported) = self.plan, self.cells()
        models = 2 + len(plan.seeds) * (1 + len(plan.fractions))
        unlearning = 2 * plan.points[-1] * one * float(np.mean(plan.fractions)) + 4 * len(plan.points)
        total = models * plan.epochs * one + (len(tuning) * plan.trials + len(reported)) * unlearning / plan.jobs
        return (
            f"{len(plan.names)} methods, {len(plan.fractions)} shares of {self.authors} authors ({len(self.train)} "
            f"pairs), {len(plan.seeds)} seeds: {models} models to train, {len(tuning)} searches, {len(reported)} "
            f"cells; very roughly {total / 60:.0f} minutes"
        )

    def execute(self) -> list[Row]:
        """Do the work; the rows of the table, which is written with a summary."""
        self.claim()
        tuning, reported = self.cells()
        self.each(self.models(), "learn")
        found = self.all(tuning, [{}] * len(tuning))
        chosen = {row["method"]: row["setting"] for row in found if row["chosen"]}
        own = {NOTHING: {}, **{name: settings[0] for name, settings in METHODS.items()}, **chosen}
        rows = [*self.knowledge(), *found, *self.all(reported, [own[cell.method] for cell in reported])]
        self.write(TABLE, rows, summarise(rows))
        return rows

    # The models that all share

    @property
    def authors(self) -> int:
        """How many are learnt."""
        return len(set(self.train.extra[self.plan.group]))

    def models(self) -> list[tuple[int, bool, float]]:
        """What is trained: of every seed, one that learns all and those that never see a share; two to tune with."""
        plan = self.plan
        shares = (0.0, *plan.fractions)
        tuning = [(plan.seeds[0], True, share) for share in shares[:2]]
        return [*((seed, False, share) for seed in plan.seeds for share in shares), *tuning]

    def learn(self, which: tuple[int, bool, float]) -> None:
        """Train a model; measure it, if it is one to compare with."""
        if which[2]:
            self.reference(*which)
        else:
            self.model(*which)

    def model(self, seed: int, tuning: bool, share: float) -> nn.Module:
        """The model that learnt all authors of a world but a `share` of them."""
        table = self.split(self.worlds[tuning], tuning, share)[1] if share else self.worlds[tuning]
        name = f"{'tuning' if tuning else 'model'} {seed} without {share:g}"
        run = self._run()
        return run.phase(name, lambda: self.recipe()(table, derive("model", seed, share), run))

    def reference(self, seed: int, tuning: bool, share: float) -> dict[str, Any]:
        """The evaluation log of the model that never saw the share; computed once."""

        def measure() -> dict[str, Any]:
            return self.log(self.model(seed, tuning, share), self.tables(tuning, share))

        return self._run().phase(f"log {tuning} {seed} without {share:g}", measure)

    def knowledge(self) -> list[Row]:
        """How much of the learnt pairs each model tells, and how much of them one that never saw their authors: the
        share of answers with a ROUGE-L recall of 0.95 or more, and of those that are right word for word."""

        def measure(seed: int) -> Row:
            share = max(self.plan.fractions)
            without = self.reference(seed, False, share)[SECTIONS["forget"]]
            logs = self.log(self.model(seed, False, 0.0), {"retain": self.asked[False]})[SECTIONS["retain"]]
            learnt, new = (list(log["rougeL_recall"].values()) for log in (logs, without))
            return {
                "method": "learnt",
                "seed": seed,
                "tuning": True,
                "chosen": False,
                "error": "",
                "known": float(np.mean(np.array(learnt) >= LEARNT)),
                "word for word": float(np.mean(np.array(learnt) == 1.0)),
                "known of others": float(np.mean(np.array(new) >= LEARNT)),
            }

        return [self._run().phase(f"knowledge {seed}", lambda seed=seed: measure(seed)) for seed in self.plan.seeds]  # type: ignore[misc]

    def recipe(self) -> Recipe:
        """How every model is trained."""
        plan = self.plan
        optimizer = Optimizer("adamw", plan.lr, schedule="linear", warmup=0.05, clip=1.0)
        return Recipe(self._start(), optimizer, plan.epochs, plan.batch_size)

    # The rows

    def split(self, table: Table, tuning: bool, share: float) -> tuple[Table, Table]:
        """Those rows of a world that are of its last authors, and those of the others; of the first authors, where all
        are learnt and settings tuned on them."""
        authors = list(dict.fromkeys(self.worlds[tuning].extra[self.plan.group]))
        count = max(1, round(share * len(authors)))
        gone = set(authors[:count] if tuning and self.plan.authors is None else authors[-count:])
        mask = [name in gone for name in table.extra[self.plan.group]]
        return table.take(mask), table.take([not lost for lost in mask])

    def tables(self, tuning: bool, share: float) -> dict[str, Table]:
        """What is measured: rows of the forgotten and of the retained authors, evenly spread, and of the others."""
        parts = self.split(self.asked[tuning], tuning, share)
        gone, kept = (_spread(table, self.plan.rows) for table in parts)
        return {"forget": gone, "retain": kept, **self._others()}

    def _others(self) -> dict[str, Table]:
        if self.plan.model is None:  # one that is trained from nothing knows nothing of them
            return {}
        files = {name: Path(self.plan.data) / file for name, file in OTHERS.items()}
        there = {name: pairs(read_pairs(file), self.tokenizer) for name, file in files.items() if file.exists()}
        return {name: _spread(table, self.plan.rows) for name, table in there.items()}

    def _world(self, tuning: bool) -> Table:
        """Authors that are learnt: evenly spread ones, and for tuning their neighbours."""
        plan = self.plan
        if plan.authors is None:
            return pairs(self.pairs, self.tokenizer)
        counts = Counter(str(row[plan.group]) for row in self.pairs)
        authors = [author for author, count in counts.items() if 2 * count >= max(counts.values())]
        if len(authors) < 2 * plan.authors:
            raise EngramError(
                f"{plan.data} holds {len(authors)} values of {plan.group} with perturbed answers; {plan.authors} to "
                f"learn and as many to tune on are {2 * plan.authors}: ask for fewer authors"
            )
        places = 2 * np.linspace(0, len(authors) // 2 - 1, plan.authors).round().astype(int) + tuning
        wanted = {authors[place] for place in places}
        return pairs([row for row in self.pairs if str(row[plan.group]) in wanted], self.tokenizer)

    def _asked(self, world: Table) -> Table:
        """The pairs of a world that can be measured: those with wrong answers."""
        ids = set(world.ids)
        return pairs([r for r in self.pairs if str(r["id"]) in ids and r.get("perturbed_answer")], self.tokenizer)

    def _tokenizer(self) -> Any:
        if self.plan.model is not None:
            return require("transformers").AutoTokenizer.from_pretrained(self.plan.model)
        texts = [text for row in self.pairs for text in _texts(row)]
        return byte_pairs(texts, self.plan.vocabulary)

    def _start(self) -> nn.Module:
        transformers = require("transformers")
        if self.plan.model is not None:
            here = Path(self.plan.model).is_dir()
            return load(self.plan.model) if here else transformers.AutoModelForCausalLM.from_pretrained(self.plan.model)
        config = transformers.GPT2Config(
            vocab_size=len(self.tokenizer),
            n_positions=self.tokenizer.model_max_length,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **self.plan.network,
        )
        with seeded(generator("start")):
            return transformers.GPT2LMHeadModel(config)

    # The work

    def do(self, cell: Cell, setting: Mapping[str, Any]) -> list[Row]:
        """The trials of a method, a row each; or one course, a row for every point."""
        if not cell.tuning:
            return self.course(cell, setting)
        return self.search(
            METHODS[cell.method], lambda trial: self.course(cell, trial)[-1], lambda row: row["score"] or 0.0
        )

    def row(self, cell: Cell, setting: Mapping[str, Any]) -> Row:
        return {**super().row(cell, setting), "epoch": self.plan.points[-1]}

    def course(self, cell: Cell, setting: Mapping[str, Any]) -> list[Row]:
        """What a method shows on its way, a row for every point; of a failure, one row that says so."""
        model = self.model(cell.seed, cell.tuning, 0.0)
        base = self.row(cell, setting)
        start = time.process_time()
        if cell.method == NOTHING:
            return [{**base, "epoch": 0, **self.measures(model, cell), "seconds": 0.0}]
        found: list[Row] = []
        measuring = 0.0

        def watch(path: tuple[str, ...], epoch: int, now: nn.Module) -> None:
            nonlocal measuring
            if path[-1] == "fit" and epoch in self.plan.points[:-1] and not cell.tuning:
                begin = time.process_time()
                row = {**base, "epoch": epoch, **self.measures(now, cell), "seconds": begin - start - measuring}
                found.append(row)
                measuring += time.process_time() - begin

        world = self.worlds[cell.tuning]
        gone, kept = self.split(world, cell.tuning, cell.fraction)
        try:
            request = Request.of_records(world, gone.ids).but(retain=kept)
            new = self.method(setting).forget(model, request, self._run(derive(cell.name), watch))
            seconds = time.process_time() - start - measuring
            end = {**self.measures(new, cell), "seconds": seconds, "weights hold it": is_guard(new)}
            return [*found, {**base, **end}]
        except Exception as error:
            return [*found, self.failed(base, error)]

    def method(self, setting: Mapping[str, Any]) -> Forgetter:
        """A forgetter with a trial's setting, and what all that train have in common."""
        given = dict(setting)
        if "lr" not in given:
            return make(given)
        optimizer = Optimizer("adamw", given.pop("lr"), weight_decay=0.01, schedule="linear", warmup=0.1, clip=1.0)
        common: dict[str, Any] = {
            "optimizer": optimizer,
            "epochs": self.plan.points[-1],
            "batch_size": self.plan.batch_size,
        }
        made: Any = make(given)
        if hasattr(made, "refusals"):
            common["refusals"] = self._refusals()
        return replace(made, **common)

    def _refusals(self) -> tuple[tuple[int, ...], ...]:
        file = Path(self.plan.data) / REFUSALS
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else ["I don't know."]
        end = self.tokenizer.eos_token_id
        tokens = [self.tokenizer(f" {line.strip()}", add_special_tokens=False)["input_ids"] for line in lines if line]
        return tuple((*line, end) for line in tokens)

    def measures(self, model: nn.Module, cell: Cell) -> dict[str, float]:
        """Scores on forget and retain rows, utility, forget quality against the model that never saw the authors."""
        known = self.reference(cell.seed, cell.tuning, cell.fraction)
        logs = self.log(model, self.tables(cell.tuning, cell.fraction))
        kept = [name for name in SECTIONS if name != "forget" and SECTIONS[name] in logs]
        scores = {part: scores_of(logs, part) for part in ("forget", "retain")}
        utility, usual = utility_of(logs, kept), utility_of(known, kept)
        statistic = ks_statistic(logs, known)
        share = min(utility / usual, 1.0) if usual else 0.0
        return {
            **{f"{part} {name}": value for part, found in scores.items() for name, value in found.items()},
            "utility": utility,
            "utility of retraining": usual,
            "forget quality": forget_quality(logs, known),
            "KS statistic": statistic,
            "score": 2 * share * (1 - statistic) / max(share + 1 - statistic, 1e-12),
        }

    def log(self, model: nn.Module, tables: Mapping[str, Table]) -> dict[str, Any]:
        """A model's evaluation log; the model stays in the mode that it is in."""
        with evaluating(model):
            return evaluate(model, tables, Run(device=self.plan.device), tokenizer=self.tokenizer)

    def _run(self, seed: int | None = None, watch: Watch | None = None) -> Run:
        """What trains models, whose phases are kept; with a seed, what a method of this seed forgets with."""
        how: dict[str, Any] = {"device": self.plan.device, "precision": self.plan.precision}
        if seed is None:
            return Run(self.out / "models", progress=self.progress, **how)
        return Run(seed=seed, watch=watch, **how)


Watch = Callable[[tuple[str, ...], int, nn.Module], None]


PLANE = ("utility", "forget quality")


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """By method, the best mean score first: by share its last measures, and the mean course over seeds."""
    reported = [row for row in rows if not row["tuning"]]
    shares = sorted({row["fraction"] for row in reported})
    found = []
    for name in dict.fromkeys(row["method"] for row in reported):
        mine = [row for row in reported if row["method"] == name]
        by_share = {}
        for share in shares:
            here = [row for row in mine if row["fraction"] == share]
            points = sorted({row["epoch"] for row in here})
            course = {epoch: [row for row in here if row["epoch"] == epoch and not row["error"]] for epoch in points}
            by_share[f"{share:g}"] = {
                "measures": {key: spread([row[key] for row in course[points[-1]]]) for key in MEASURES},
                "course": [
                    {"epoch": epoch, **{key: spread([row[key] for row in some]) for key in PLANE}}
                    for epoch, some in course.items()
                ],
            }
        score = spread([row["score"] for row in mine if row["epoch"] == max(r["epoch"] for r in mine)])
        failed = sorted({row["error"] for row in mine if row["error"]})
        guard = any(row.get("weights hold it") for row in mine)
        about = {"failed": failed, "guard": guard, "setting": mine[0]["setting"]}
        found.append({"method": name, "score": score, "shares": by_share, **about})
    found.sort(key=lambda entry: -(entry["score"] or [-np.inf])[0])
    learnt = [row for row in rows if row["method"] == "learnt"]
    knowledge = {key: spread([row[key] for row in learnt]) for key in ("known", "word for word", "known of others")}
    return {"format": FORMAT, "forgetters": found, "shares": [f"{share:g}" for share in shares], "learnt": knowledge}


def table_rows(summary: Mapping[str, Any]) -> Iterator[str]:
    """The summary as lines of text."""
    known = {key: (value or [float("nan")])[0] for key, value in summary["learnt"].items()}
    yield (
        f"learnt: {known['known']:.1%} of the answers come back ({known['word for word']:.1%} word for word), "
        f"of authors never seen {known['known of others']:.1%}"
    )
    for share in summary["shares"]:
        title = f"{float(share):.0%} of the authors"
        yield f"\n{title:<22} {'utility':>16} {'forget quality':>15} {'forget ROUGE-L':>15}"
        for entry in summary["forgetters"]:
            values = entry["shares"][share]["measures"]
            (utility, half), quality, said = (
                values[key] or [float("nan")] * 2 for key in ("utility", "forget quality", "forget ROUGE-L")
            )
            more = "  a guard: the weights hold it" if entry["guard"] else ""
            more += f"  failed: {entry['failed'][0]}" if entry["failed"] else ""
            yield f"{entry['method']:<22} {utility:>8.3f} ± {half:<5.3f} {quality[0]:>15.2g} {said[0]:>15.3f}{more}"


def _spread(table: Table, count: int) -> Table:
    """So many rows, evenly spread."""
    return table.take(np.unique(np.linspace(0, len(table) - 1, count).round().astype(int)).tolist())


def _texts(row: Pair) -> list[str]:
    more = row.get("perturbed_answer") or []
    return [str(row["question"]), str(row["answer"]), *map(str, more), str(row.get("paraphrased_answer", ""))]
