"""A head that is never trained: its rows are vectors of the classes' names, at which features learn to point."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engram.errors import EngramError
from engram.models.encoders import Encoder
from engram.models.frozen import SplitFeatures
from engram.models.head import Head, class_ids
from engram.models.output import Output
from engram.models.predictor import Predictor
from engram.models.split import split


class LanguageHead(Head):
    """s_c = scale * cos(f, w_c), w_c a fixed vector for each class, given by `know` before the class is born.

    weight  [born, d] buffer of unit rows, so that no optimiser, penalty or decay can reach it

    A live class keeps its row for good; a retired one lost it, and has to be told again. `learn_scale`: the scale
    starts at `scale` and is trained, through its logarithm, the one parameter; it belongs to no class. Cosines are
    taken in float64, so that how many classes there are does not show in the logits of any.
    """

    rows: ClassVar[tuple[str, ...]] = ("weight",)
    weight: Tensor
    log_scale: nn.Parameter | None

    def __init__(self, width: int, scale: float = 16.0, learn_scale: bool = False, classes_total: int = 0) -> None:
        super().__init__(width, classes_total)
        if not scale > 0:
            raise EngramError(f"the scale of cosines has to be above 0, not {scale}; 16 to 30 is usual")
        self.scale = scale
        self.register_buffer("weight", torch.empty(0, width))
        self.register_parameter("log_scale", nn.Parameter(self.fresh("log_scale", 1, None)) if learn_scale else None)

    def fresh(self, name: str, count: int, generator: torch.Generator | None) -> Tensor:
        return torch.full((count,), math.log(self.scale))

    def scores(self, features: Tensor) -> Tensor:
        cosines = F.normalize(features.double(), dim=-1) @ F.normalize(self.weight.double(), dim=-1).T
        scaled = cosines * (self.scale if self.log_scale is None else self.log_scale.exp())
        return scaled.to(torch.promote_types(features.dtype, torch.float32))

    @torch.no_grad()
    def know(self, classes: Iterable[int] | Tensor, vectors: Tensor) -> None:
        """Take in the vectors [k, d] of classes; they are not predicted before they are grown. A live class keeps the
        one that it has. EngramError for vectors of another size, and for one that has no direction."""
        ids = class_ids(classes)
        if vectors.shape != (len(ids), self.width):
            raise EngramError(
                f"the vectors are {list(vectors.shape)}; {len(ids)} classes need [{len(ids)}, {self.width}]"
            )
        unit = F.normalize(vectors.double(), dim=1)
        lame = ~(unit.norm(dim=1) > 0.5)
        if bool(lame.any()):
            raise EngramError(f"the vector of class {ids[int(lame.nonzero()[0])]} is 0 or not finite: no direction")
        new = [k for k, label in enumerate(ids) if not self._lives(label)]
        labels = [ids[k] for k in new]
        self._give_birth(labels)
        self.weight[self.columns(labels)] = unit[new].to(self.weight)

    @torch.no_grad()
    def grow(self, classes: Iterable[int] | Tensor, generator: torch.Generator | None) -> None:
        """Make classes live that `know` has told about. EngramError for another one."""
        wanted = [label for label in class_ids(classes) if not self._lives(label)]
        told = set(self.classes[self.weight.any(1)].tolist())
        strange = [label for label in wanted if label not in told]
        if strange:
            raise EngramError(f"nobody told the head the vector of class {strange[0]}'s name; call know(…) first")
        self._give_birth(wanted)
        self.live[wanted] = True

    def _lives(self, label: int) -> bool:
        return label < len(self.live) and bool(self.live[label])


class Mapped(Encoder):
    """An encoder of `inputs` features and a trained linear map, without bias, to `width` of them.

    The map stands with the encoder and not with the head, so that whatever holds a learner's features holds it too.
    """

    def __init__(self, encoder: nn.Module, inputs: int, width: int) -> None:
        super().__init__()
        self.encoder, self.width = encoder, width
        self.map = nn.Linear(inputs, width, bias=False)

    def forward(self, **inputs: Any) -> Output:
        return Output(pooler_output=self.map(self.encoder(**inputs).pooler_output.flatten(1)))


def visual(model: nn.Module) -> tuple[nn.Module, int]:
    """What computes the features of a classifier, and how many: its own part, to be trained on; the head is left out.

    EngramError for a model of numbers, and for one that has no single last layer.
    """
    if isinstance(model, Predictor):
        if not isinstance(model.head, Head):
            raise EngramError(f"class names cannot take the place of a {type(model.head).__name__}; use a classifier")
        return model.encoder, model.head.width
    split(model).head.requires_grad_(False)
    features = SplitFeatures(model)
    return features, features.width
