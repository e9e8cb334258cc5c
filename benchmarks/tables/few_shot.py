"""Continual few-shot learning: ProtoNet, tuning and replay on characters and clothes that they never saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables.common import arguments, page, said, settings, write
from engram.audit.few_shot import FewShotProtocol
from engram.core.finding import Finding
from engram.core.learner import Learner, fresh
from engram.core.probe import Subject
from engram.data.readers import read
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.run import Run
from engram.keep.nmc import NMC
from engram.keep.pretrain_tune import PretrainTune, layers
from engram.keep.proto_net import ProtoNet
from engram.reproduce.cfsl_instances import by_pixels
from engram.stats.seeds import generator

SEED = 0
NETWORK = {"name": "ConvNet", "channels": 1, "widths": [32, 64, 64, 64], "norm": "batch"}
STEPS = 20
PROTO = ProtoNet(network=NETWORK, epochs=20, batch_size=100, ways=10)
TUNE = PretrainTune(network=NETWORK, epochs=10, batch_size=100)
FAST: dict[str, Learner] = {
    "nearest mean of pixels": NMC(),
    "ProtoNet, encoder as it was drawn": replace(PROTO, epochs=0),
    "ProtoNet": PROTO,
}
LONGER = f"PretrainTune, {STEPS} steps"
JOINT = f"PretrainTune, all sets at once, {5 * STEPS} steps"
SLOW: dict[str, PretrainTune] = {
    "PretrainTune, 5 steps": TUNE,
    LONGER: replace(TUNE, steps=STEPS),
    f"{LONGER}, replay": replace(TUNE, steps=STEPS, sets=5),
    JOINT: replace(TUNE, steps=5 * STEPS),
}
APART = {"ways": 1, "shots": 1, "sets": 5}  # a class in each set
INTRO = """Learners are pretrained on some classes and examined on others, by `audit.FewShotProtocol`: in every episode
a copy takes in small support sets in order and then tells all of their classes apart, 5 queries for each class and
set. base: 10 classes, five of which come every two sets of one row each. long A: 20 classes in 8 sets. new long A: 20
classes, two at a time, in 20 sets. wide A: 20 classes, ten at a time, in 4 sets. Instances 4x5: 20 images of one class
in 4 sets, to be told again as they were, and with a rectangle of 25, 50 or 75 % of the area set to 0, which is the
background. Figures are percent: mean ± half of the 95 % t interval over {fast} episodes, {slow} for PretrainTune; the
first of these are the same for all learners. One split into classes and one pretraining (seed {seed}). Chance is 10 %
for base and 5 % for the others; for Fashion-MNIST's five classes, one in each set, 20 %. Replay keeps the last 5 sets
and adds 10 rows of them to every step; the row above it takes as many steps without. PretrainTune at 5 steps is the
setting of the paper, which gives replay 5 to 120 steps. All sets at once is the bound that keeps every row."""


@dataclass(frozen=True)
class Setting:
    """Rows to pretrain on, rows of other classes, and what is asked about these."""

    title: str
    base: Table
    novel: Table
    configurations: tuple[Any, ...]


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    parser = arguments(__doc__)
    parser.add_argument("--episodes", type=int, default=20, help="of the fast learners; a third as many of the others")
    given = parser.parse_args()
    slow = max(2, given.episodes // 3)
    parts = [INTRO.format(fast=given.episodes, slow=slow, seed=SEED)]
    for setting in (omniglot(given.data), fashion(given.data)):
        lines = list(_lines(setting, given.episodes, slow))
        parts.append(f"## {setting.title}\n\n" + "\n".join(lines))
    parts += [NOTES, f"## Settings\n\n{settings({**FAST, **SLOW})}"]
    write(given.out, page("Continual few-shot learning", "\n\n".join(parts), said()))


def omniglot(data: Path) -> Setting:
    """100 characters to pretrain on, and 36 others; 28 x 28, ink is 1."""
    table = read(data / "omniglot" / "background_small1.parquet", image_size=28)
    table = replace(table, inputs={"pixel_values": 255 - table.inputs["pixel_values"]})
    order = torch.randperm(len(table.classes), generator=generator("omniglot", SEED)).tolist()
    sets = ("base", "long A", "new long A", "wide A", "instances 4x5")
    title = "Omniglot, 100 characters, then others of 36"
    return Setting(title, table.of_classes(order[:100]), table.of_classes(order[100:]), sets)


def fashion(data: Path) -> Setting:
    """400 training rows of each of five classes, and the test rows of the other five."""
    train, test = (read(data / "fashion_mnist" / f"{part}.parquet") for part in ("train", "test"))
    order = torch.randperm(10, generator=generator("fashion", SEED)).tolist()
    labels = torch.as_tensor(train.labels)
    base = torch.cat([(labels == c).nonzero()[:400, 0] for c in order[:5]])
    asked = (APART, "instances 4x5")
    return Setting("Fashion-MNIST, 5 classes, then the others", train.take(base), test.of_classes(order[5:]), asked)


def _lines(setting: Setting, fast: int, slow: int) -> Iterator[str]:
    """The rows of a table."""

    def probe(count: int, together: bool = False) -> FewShotProtocol:
        return FewShotProtocol(configurations=setting.configurations, episodes=count, together=together)

    found = probe(fast).findings(by_pixels, setting.novel, Run(seed=SEED))
    yield from _head(found)
    yield _row("nearest image by pixels", found)
    for name, learner in FAST.items():
        yield _row(name, _examined(probe(fast), _pretrained(learner, setting), setting))
    known = _pretrained(TUNE, setting)
    for name, learner in SLOW.items():
        yield _row(name, _examined(probe(slow, name == JOINT), _as(known, learner), setting))


def _pretrained(learner: Learner, setting: Setting) -> Learner:
    found = fresh(learner)
    found.learn(Task(setting.base), Run(seed=SEED))
    return found


def _as(known: Learner, wanted: PretrainTune) -> PretrainTune:
    """A learner of the wanted settings that knows what another one was pretrained on."""
    found = fresh(wanted)
    assert isinstance(found, PretrainTune)
    found.load_state_dict(known.state_dict())
    found.rates = torch.full((len(layers(found.model)), found.steps), found.rate)
    return found


def _examined(probe: FewShotProtocol, learner: Learner, setting: Setting) -> list[Finding]:
    subject = Subject(learner.model, rows={"test": setting.novel}, learner=learner)
    return probe.examine(subject, Run(seed=SEED))


def _head(found: Sequence[Finding]) -> Iterator[str]:
    names = [one.name.removeprefix("accuracy, ") for one in found]
    yield f"| learner | {' | '.join(names)} |"
    yield f"|---|{'---:|' * len(names)}"


def _row(name: str, found: Sequence[Finding]) -> str:
    """Percent; the half of an interval that was cut off at 0 or 1 is the longer one."""
    cells = []
    for one in found:
        low, high = one.interval or (one.value, one.value)
        cells.append(f"{100 * one.value:.1f} ± {100 * max(one.value - low, high - one.value):.1f}")
    line = f"| {name} | {' | '.join(cells)} |"
    print(line, flush=True)
    return line


NOTES = """## What to take

**ProtoNet.** Take it when new classes come with one or a few rows each and the encoder may be trained beforehand on
many classes of the same kind: on Omniglot it tells 92 % of ten new characters right and 86 % of twenty, in whatever
portions they come, where pixels reach 47 and 36 %, and a support set costs one forward pass. Do not take it to
recognise single images that will be damaged: episodes teach it to overlook what tells two images of a class apart.
Undamaged it knows every image; with a quarter of the area hidden 15 % of them on Omniglot and 20 % on Fashion-MNIST,
where the same encoder untrained keeps 56 and 45 % and plain pixels 99 and 93 %. What did not hold here: on
Fashion-MNIST, with five classes to learn from, training gains nothing over pixels (59 and 60 %).

**PretrainTune without replay.** Take it as the lower bound. It answers with the classes of the last sets: 8 to 17 % of
twenty characters in 8 or 20 sets at 5 steps, and with four times as many steps hardly more (10 to 23 %). As in the
paper, undamaged instances are about as hard as classes: 22 % of twenty, against 25 % of twenty classes in as many sets.

**PretrainTune with replay.** Take it when the network itself has to change and a few support sets may be kept. At equal
steps five sets kept lift ten characters from 47 to 89 % and instances from 23 to 89 %, so the gain is the replay's, not
that of more steps; and tuning on the images keeps more of them under occlusion than ProtoNet does (41 % against 15 at a
quarter). Do not take it for long streams with a short buffer: of twenty characters in 20 sets it knows 34 %, where
tuning on all sets at once, a bound that keeps everything, knows 80 %. It costs a hundred times the passes of ProtoNet
and ends below it in every class test on Omniglot. What did not hold here: with three quarters hidden every trained
learner is at chance, with or without replay, and pixels are at 23 and 42 %.

**FewShotProtocol.** Take it to compare learners on rows of classes that none of them saw; the learner stays as it is.
Predictions use fixed statistics and are of the row alone, so figures lie below published ones that use the statistics
of all queries. Omniglot's small set has 36 classes left here: 200 at once (wide B) want the full set."""


if __name__ == "__main__":
    main()
