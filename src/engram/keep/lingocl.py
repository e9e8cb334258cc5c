"""LingoCL: class names, embedded by a language model and frozen, take the place of the trained classifier.

Ni, Zhao, Zhang, Hu, Meng, Zhang, Xiang: Enhancing Visual Continual Learning with Language-Guided Supervision. CVPR
2024, arXiv 2403.16124.

1. When a task comes, each of its classes gets the unit vector w_c of its name, from a frozen language model. No row
   is trained, decayed or computed again afterwards.
2. The logits are s_c = eta * cos(f(x), w_c). Where features and vectors differ in width, a linear map on the visual
   side is trained, and kept over all tasks.
3. Everything else is the host's: how it classifies, distils, replays, penalises.

Old, new and future classes have their places in one space, so features need not move to make room; and classes that
were never learnt can be scored by their names.

There is no official code. Here the learner is any that follows a gradient: it is handed its first model with the
frozen head in it, and is told of classes through that head, so that it runs as it is. The head has no bias. The map
is counted to the encoder, so that a host's penalty on features holds it too. The paper's template, its way to match
widths and eta are not known to us; two public re-implementations take the bare name. Cosines without a scale (eta = 1)
leave the softmax flat, and hardly train.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engram.core.learner import Forgetful, Learner, fresh
from engram.core.learning import GradientLearner
from engram.core.needs import Need, Needs
from engram.core.settings import make, name_of
from engram.core.trace import State
from engram.data.table import Ids, Table
from engram.data.task import Task
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.language_head import LanguageHead, Mapped, visual
from engram.models.predictor import Predictor
from engram.models.text import VECTOR_FILES, Embedder, as_vectors, read_vectors

CONTROLS = ("random", "orthogonal")
NEAR = 0.95  # cosine above which two classes can hardly be told apart
Names = Mapping[int, str]


@dataclass(kw_only=True, eq=False)
class LingoCL(Learner):
    """A host learner with a frozen head of class names.

    `host`: a learner that follows a gradient, by name, as {"name": …, setting: value}, or as it is; its `network` may
    be anything that ends in one class head, which is left out.

    `encoder`, where a name's vector comes from: the directory of a transformers text encoder or causal language model
    with its tokenizer (`pool`: "mean", "last", "cls" or "own", see `models.text.Embedder`); "spelling", which needs no
    model and knows no meaning; a file of vectors (`models.text.read_vectors`) or a mapping {name: vector}, looked up
    by the class's name, else by its number; or a control that knows no names: "random" directions, or "orthogonal"
    ones, of the features' width, or of `width`.

    `names`: of the classes, by number, or in order; left out, those of the tasks. `template`: the text that is
    embedded, {} being the name. `vocabulary`: texts (or a file with one a line) over which vectors are centred, and
    with `whiten` also whitened; to be chosen beforehand, without regard to tasks. `scale`: eta, and where it starts
    with `learn_scale`.

    Two names whose vectors have a cosine above 0.95 are said in the run. Cost: the host's, and one pass of the encoder
    a class. The encoder stays in memory, on the CPU, and is no part of what is saved.
    """

    host: Any = "keep.LwF"
    encoder: Any = "spelling"
    names: Any = None
    template: str = "{}"
    pool: str = "mean"
    vocabulary: Any = ()
    whiten: bool = False
    width: int = 0
    scale: float = 16.0
    learn_scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.inner = _host(self.host)
        self.traces = self.inner.traces
        if isinstance(self.inner, Forgetful):
            self.forget = self.inner.forget  # this learner can forget by itself exactly if the host can
        if "{}" not in self.template:
            raise EngramError(f"the template {self.template!r} has no place {{}} for the name of a class")
        if isinstance(self.encoder, Mapping):
            self.encoder = {name: vector.tolist() for name, vector in as_vectors(self.encoder).items()}

    @classmethod
    def tiny(cls) -> LingoCL:
        small = {"network": {"name": "MLP", "hidden": [16]}, "epochs": 3, "batch_size": 32, "optimizer": {"lr": 0.01}}
        digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        words = ["apple", "river", "seventeen", "house", "neon", "fire"]
        return cls(host={"name": "keep.LwF", **small}, names=digits, vocabulary=words, whiten=True, learn_scale=True)

    @property
    def needs(self) -> Needs:
        told = self.names is not None or self.encoder in CONTROLS
        return tuple(one if told else one | {Need.CLASS_NAMES} for one in self.inner.needs)

    @property
    def model(self) -> nn.Module:
        return self.inner.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self.inner.model = model

    @property
    def started(self) -> bool:
        return self.inner.started

    @property
    def head(self) -> LanguageHead:
        """The frozen head: the model's, or what the host keeps aside while another one predicts. EngramError before the
        first task, and where a method has made a model without it."""
        parts = (*self.model.modules(), *vars(self.inner).values())
        found = next((part for part in parts if isinstance(part, LanguageHead)), None)
        if found is None:
            raise EngramError("the model has no head of class names any more; what makes models has to keep it")
        return found

    def learn(self, task: Task, run: Run | None = None) -> None:
        """Embed the names of the task's new classes, and let the host learn."""
        run = run or Run()
        with run.scope("language"):
            self._tell(task, run)
        self.inner.learn(task, run)

    def refresh(self, run: Run | None = None) -> None:
        self.inner.refresh(run)

    def holds(self, ids: Iterable[str]) -> Ids:
        return self.inner.holds(ids)

    def drop(self, rows: Table) -> Ids:
        return self.inner.drop(rows)

    def state_dict(self) -> State:
        """The host's: the vectors stand in its head."""
        return self.inner.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.inner.load_state_dict(state)

    def zero_shot(self, classes: Mapping[int, str] | Iterable[int], run: Run | None = None) -> nn.Module:
        """A copy of the model that can answer with these classes too, though it never learnt them: it scores them by
        their names. `classes`: numbers with names, or numbers alone where `names` tells them.

        Among them alone it is asked by `accuracy(model, table, classes=…)`. The learner stays as it is.
        """
        labels = sorted(classes)
        names = classes if isinstance(classes, Mapping) else _numbered(self.names)
        model, head = copy.deepcopy(self.model), copy.deepcopy(self.head)
        new = [c for c in labels if c not in _live(head)]
        if new:
            head.know(new, self._vectors(new, names, head.width, _rows(head), run or Run()))
        head.grow(labels, None)
        model.head = head
        return model.eval()

    def gram(self) -> tuple[tuple[int, ...], Tensor]:
        """The live classes, ascending, and the cosines of their vectors, [C, C]."""
        classes = _live(self.head)
        rows = self.head.weight[self.head.columns(classes)].double()
        return classes, rows @ rows.T

    def _tell(self, task: Task, run: Run) -> None:
        """Let the head know the vectors of the task's classes; the first task makes it."""
        classes = sorted({*task.classes, *task.train.classes})
        if not classes:
            raise EngramError("LingoCL learns rows with class labels, and this task has none")
        names = _numbered(self.names) if self.names is not None or self.encoder in CONTROLS else task.names
        if not self.started:
            return self._begin(classes, names, task, run)
        head = self.head
        new = [c for c in classes if c not in _live(head)]
        if new:
            head.know(new, self._vectors(new, names, head.width, _rows(head), run))
            self._warn(new, names, run)

    def _begin(self, classes: list[int], names: Names, task: Task, run: Run) -> None:
        """The host's first model, ending in the frozen head."""
        encoder, inputs = visual(self.inner.first_model(task, run))
        vectors = self._vectors(classes, names, self.width or inputs, torch.zeros(0, self.width or inputs), run)
        head = LanguageHead(vectors.shape[1], self.scale, self.learn_scale)
        head.know(classes, vectors)
        self.model = Predictor(_mapped(encoder, inputs, head.width, run), head)
        self._warn(classes, names, run)

    def _vectors(self, classes: Sequence[int], names: Names, width: int, there: Tensor, run: Run) -> Tensor:
        """Vectors [k, d] of classes; of controls, in this width, and at right angles to those that are `there`."""
        if self.encoder == "random":
            return torch.stack([torch.randn(width, generator=run.generator("direction", c)) for c in classes])
        if self.encoder == "orthogonal":
            return orthogonal(len(classes), there, run.generator("directions"))
        return self._embedder([self._text(c, names) for c in classes])

    def _text(self, label: int, names: Names) -> str:
        """What is embedded for a class, or the key that is looked up."""
        if self._store is not None:
            name = names.get(label, "")
            return name if name in self._store else str(label)
        if label not in names:
            raise EngramError(f"class {label} has no name; give names=… for all classes, or a table with class names")
        return self.template.replace("{}", names[label])

    @cached_property
    def _store(self) -> dict[str, Tensor] | None:
        """Vectors that were given; None where an encoder makes them."""
        if isinstance(self.encoder, Mapping):
            return as_vectors(self.encoder)
        path = Path(self.encoder) if isinstance(self.encoder, str | Path) else Path()
        return read_vectors(path) if path.is_file() or path.suffix in VECTOR_FILES else None

    @cached_property
    def _embedder(self) -> Embedder:
        source = self.encoder if self._store is None else self._look_up
        return Embedder(source, pool=self.pool, centre=_listed(self.vocabulary), whiten=self.whiten)

    def _look_up(self, texts: Sequence[str]) -> Tensor:
        store = self._store or {}
        absent = [text for text in texts if text not in store]
        if absent:
            raise EngramError(f"there is no vector for {absent[0]!r} among the {len(store)} that were given")
        return torch.stack([store[text] for text in texts])

    def _warn(self, new: Sequence[int], names: Names, run: Run) -> None:
        """Say which new classes lie nearly in one place with another one."""
        head = self.head
        cosines = head.weight[head.columns(new)] @ head.weight.T
        pairs = [(other, c) for c, row in zip(new, cosines, strict=True) for other in head.classes[row > NEAR].tolist()]
        for other, c in pairs:
            if other < c or other not in new:
                one, two = (names.get(label, f"class {label}") for label in (other, c))
                run.report.say(
                    f"the vectors of {one!r} and {two!r} are nearly the same (cosine above {NEAR}), and the model will "
                    "hardly tell them apart; centre or whiten over a vocabulary, or give clearer names"
                )


def orthogonal(count: int, there: Tensor, generator: torch.Generator) -> Tensor:
    """Random unit rows [count, d] at right angles to each other and to the orthonormal rows `there` [k, d].

    EngramError if d has no room for them.
    """
    width = there.shape[1]
    if len(there) + count > width:
        raise EngramError(f"there is no room for {len(there) + count} orthogonal vectors in width {width}; raise width")
    drawn = torch.randn(count, width, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(torch.cat([there.double().cpu(), drawn]).T).Q.T[len(there) :]


def _host(spec: Any) -> GradientLearner:
    """A host of one's own that has learnt nothing."""
    learner = fresh(spec) if isinstance(spec, Learner) else make(spec, wing="keep")
    if not isinstance(learner, GradientLearner):
        raise EngramError(f"{name_of(learner)} trains no class head by gradient, so names cannot take its place")
    return learner


def _mapped(encoder: nn.Module, inputs: int, width: int, run: Run) -> nn.Module:
    """The encoder, with a map where its features have another width."""
    with run.seeded("map"):
        return encoder if inputs == width else Mapped(encoder, inputs, width)


def _live(head: LanguageHead) -> tuple[int, ...]:
    return tuple(head.live.nonzero()[:, 0].tolist())


def _rows(head: LanguageHead) -> Tensor:
    """Vectors of the classes that the head knows, [k, d]."""
    return head.weight[head.weight.any(1)]


def _numbered(names: Any) -> dict[int, str]:
    """Names by class number, from a mapping or a list."""
    pairs = names.items() if isinstance(names, Mapping) else enumerate(names or ())
    try:
        return {int(label): str(name) for label, name in pairs}
    except ValueError as error:
        raise EngramError(f"names are given as {{class number: name}}, or in order, not as {names!r}") from error


def _listed(vocabulary: Any) -> list[str]:
    """The texts, or the lines of the file of that name."""
    if not isinstance(vocabulary, str | Path):
        return list(vocabulary)
    try:
        lines = Path(vocabulary).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EngramError(f"the vocabulary {vocabulary} cannot be read: {error}") from error
    return [line.strip() for line in lines if line.strip()]
