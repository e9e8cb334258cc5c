"""OnePrompt: one prompt in a frozen vision transformer, shared by all tasks and trained on by each.

Huang, Chen, Hsu: OVOR: OnePrompt with Virtual Outlier Regularization for Rehearsal-Free Class-Incremental Learning.
ICLR 2024, arXiv 2402.04129 (section 3.2). Its other half is `keep.VirtualOutliers`.

1. In the first layers the attention finds learnt rows before its keys and values (prefix tuning): 10 rows in layers 0
   and 1, 40 in layers 2 to 4, half of them keys. With features of width 768 these are 107,520 numbers.
2. Prompt and head are trained with each task by cross-entropy over the columns of the task's classes alone.
3. A row is told by the largest logit among all classes seen.

There is no pool of prompts, no query and no guess at the task: one pass of the encoder a row, where `keep.L2P` takes
two. Nothing holds the prompt to earlier tasks.

Published code lowers the learning rate once per epoch along a quarter of a cosine, lr cos(99 pi e / (200 (E - 1)));
here it falls along half of a cosine with every batch. Without any prompt (`lengths` empty) this is a linear head on
frozen features, trained task by task: the plain baseline, for any encoder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from engram.core.learning import GradientLearner
from engram.core.needs import Need, Needs, needs
from engram.data.table import Batch, Target
from engram.data.task import Task
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.frozen import frozen_encoder
from engram.models.heads import LinearHead
from engram.models.output import Output
from engram.models.predictor import Predictor
from engram.models.prompts import Prompted
from engram.models.seeding import seeded
from engram.stats.scores import restricted


@dataclass(kw_only=True, eq=False)
class OnePrompt(GradientLearner):
    """A prompt and a linear head over a frozen encoder.

    `network`: the pretrained vision transformer, engram's or one of transformers: a directory or a module (a name gives
    an untrained one). `lengths`: rows of the prompt in layer 0, 1, …; even, 0 for none. EngramError for rows without
    class labels, and for a network that takes no prompts.

    Cost: a forward and a backward pass of the encoder for each row and epoch, without gradients of its weights; memory:
    the prompt and a row of the head per class.
    """

    network: Any = "ViT"
    lengths: tuple[int, ...] = (10, 10, 40, 40, 40)
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3, schedule="cosine"))
    epochs: int = 20
    batch_size: int = 128

    @classmethod
    def tiny(cls) -> OnePrompt:
        small = {"name": "ViT", "patch_size": 4, "width": 8, "depth": 2, "heads": 2}
        return cls(network=small, lengths=(2, 4), epochs=2, batch_size=32, optimizer=Optimizer(lr=1e-2))

    @property
    def needs(self) -> Needs:
        return needs({Need.BOUNDARIES, Need.BACKBONE})

    def first_model(self, task: Task, run: Run) -> nn.Module:
        if task.train.target != Target.CLASSES:
            raise EngramError(
                f"prompts are trained with class labels, and the target of these rows is {task.train.target}"
            )
        encoder = frozen_encoder(self.network, inputs=task.train.shapes, generator=run.generator("weights"))
        with seeded(run.generator("prompts")):
            encoder = self.prompted(encoder)
        return Predictor(encoder, LinearHead(int(encoder.width)))  # type: ignore[arg-type]

    def prompted(self, encoder: nn.Module) -> nn.Module:
        """The frozen encoder with what is to be learnt in it."""
        return Prompted(encoder, self.lengths)

    def start(self, task: Task, run: Run) -> None:
        self.columns = task.train.classes

    def terms(self, batch: Batch, output: Output) -> Mean:
        assert batch.labels is not None and output.logits is not None
        return by_target(restricted(output.logits, self.columns), batch.labels)
