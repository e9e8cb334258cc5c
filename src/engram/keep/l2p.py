"""Learning to prompt: a pool of prompts, from which every row takes those whose keys are most like its own features.

Wang, Zhang, Lee, Zhang, Sun, Ren, Su, Perot, Dy, Pfister: Learning to Prompt for Continual Learning. CVPR 2022, arXiv
2112.08654. The baseline of `keep.OnePrompt`, in the form that is compared with there and in CODA-Prompt (L2P++).

1. The query q of a row is its feature without prompts; the N prompts with the largest cosine(q, key) are taken.
2. The loss is cross-entropy over the columns of the task's classes + pull * sum over the chosen keys of
   (1 - cosine(q, key)), mean over rows (eq. 5).

The paper puts prompts before the tokens and pools their outputs for the head; here, as in that later form, they are
prefixes of keys and values in the attention, and the head sees the class token. Published code has all rows of a batch
take the prompts that most of them chose, or lets the pull of a row reach the keys that other rows chose; here, as
written in the paper, a row's prompts are its own affair. The optional penalty on often used prompts is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from engram.data.table import Batch
from engram.data.task import Task
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.keep.one_prompt import OnePrompt
from engram.models.output import Output
from engram.models.predictor import Predictor
from engram.models.prompts import PromptPool


@dataclass(kw_only=True, eq=False)
class L2P(OnePrompt):
    """A pool of prompts and a linear head over a frozen encoder.

    `lengths`: rows of each prompt in layer 0, 1, …; even, 0 for none. `pool`: M, how many there are; `top`: N, how many
    a row takes; `pull`: weight of the keys' term.

    Cost: one more forward pass of the encoder a row than OnePrompt, in training and at test.
    """

    lengths: tuple[int, ...] = (20,)
    pool: int = 30
    top: int = 5
    pull: float = 1.0

    @classmethod
    def tiny(cls) -> L2P:
        small = {"name": "ViT", "patch_size": 4, "width": 8, "depth": 2, "heads": 2}
        plan = Optimizer(lr=1e-2)
        return cls(network=small, lengths=(2, 2), pool=4, top=2, epochs=2, batch_size=32, optimizer=plan)

    def prompted(self, encoder: nn.Module) -> nn.Module:
        return PromptPool(encoder, self.lengths, self.pool, self.top)

    def step(self, batch: Batch, task: Task) -> Mean:
        assert isinstance(self.model, Predictor)
        found = self.model.encoder(**batch.inputs)
        loss = self.terms(batch, Output(logits=self.model.head(found.pooler_output)))
        return loss + self.pull * Mean.of((1 - found.extra["likeness"]).sum(1))
