"""Fine-tuning: train on each task as it comes, and do nothing to keep what was known. The lower bound."""

from __future__ import annotations

from dataclasses import dataclass

from engram.core.learning import GradientLearner


@dataclass(kw_only=True, eq=False)
class Finetune(GradientLearner):
    """Cross-entropy over all classes seen so far, on the rows of the task alone. Cost: epochs times rows."""

    @classmethod
    def tiny(cls) -> Finetune:
        return cls(network={"name": "MLP", "hidden": [32]}, epochs=3, batch_size=32)
