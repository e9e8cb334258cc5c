"""Generic predictions: what a model would say had it not read a text, from itself and a copy that read it again.

    v_generic = v_base - alpha * relu(v_reinforced - v_base)

Eldan, Russinovich: Who's Harry Potter? arXiv 2310.02238. What reading the text again makes likelier is what the text
taught.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.data.table import IGNORED
from engram.errors import EngramError
from engram.models.guards import Wrapper, sharing
from engram.models.predictor import supervised_loss

CACHES = ("cache", "past_key_values")  # what transformers calls it, now and before


def generic(base: Tensor, reinforced: Tensor, alpha: float, centre: bool = False) -> Tensor:
    """v_base - alpha * relu(v_reinforced - v_base), [..., V]; never above `base`.

    `centre`: take the mean over the last axis off both before they are compared (a softmax does not know their
    constants). An entry that is -inf in `base` (a class that is not there) stays so.
    """
    there = torch.isfinite(base)
    gap = _centred(reinforced, there) - _centred(base, there) if centre else reinforced - base
    return base - alpha * torch.where(there, gap, 0.0).relu()


def _centred(v: Tensor, there: Tensor) -> Tensor:
    mean = torch.where(there, v, 0.0).sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp(min=1)
    return v - mean


class GenericLogits(Wrapper):
    """A model that answers with its generic predictions, made anew for every token.

    `reinforced`: the copy that read the text again, frozen. Both models' weights still hold what the text taught, the
    second more than ever: a guard, not an erasure, and whoever has the files can undo it. Cost: two forward passes for
    every one, and twice the memory. EngramError for a forward pass over a cache (`generate` keeps its own).
    """

    def __init__(self, inner: nn.Module, reinforced: nn.Module, alpha: float = 1.0, centre: bool = False) -> None:
        super().__init__(inner)
        self.reinforced = sharing(reinforced)
        self.alpha, self.centre = alpha, centre
        self.train(False)

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        given = [name for name in CACHES if inputs.get(name) is not None]
        if given:
            raise EngramError(f"a guard of two models has no single cache; leave out {given[0]}, or call generate")
        return inputs

    def after(self, inputs: dict[str, Any], output: Any) -> Any:
        given = {name: value for name, value in inputs.items() if name != "labels"}
        told = copy.copy(output)
        told.logits = generic(output.logits, self.reinforced(**given).logits, self.alpha, self.centre)
        if inputs.get("labels") is not None:
            told.loss = _loss(told.logits, inputs["labels"])
        return told

    def generate(self, input_ids: Tensor | None = None, **inputs: Any) -> Any:
        """The inner model's `generate`; every token is chosen, or drawn, from the generic predictions.

        EngramError for several beams: what the library then hands over are no logits any more, and their constants
        matter.
        """
        if inputs.get("num_beams", self._inner().generation_config.num_beams) not in (None, 1):
            raise EngramError("generic predictions are made of logits, which a search with beams has lost; num_beams=1")
        own = _Reinforced(self.reinforced, self.alpha, self.centre, inputs.get("attention_mask"))
        others = inputs.pop("logits_processor", None) or []
        return self._inner().generate(input_ids=input_ids, **inputs, logits_processor=[own, *others])

    def train(self, mode: bool = True) -> GenericLogits:
        super().train(mode)
        if hasattr(self, "reinforced"):
            self.reinforced.eval()
        return self


class _Reinforced:
    """A logits processor: the second model reads along, with a cache of its own while the text only grows."""

    def __init__(self, model: nn.Module, alpha: float, centre: bool, mask: Tensor | None) -> None:
        self.model: Any = model
        self.alpha, self.centre, self.mask = alpha, centre, mask
        self.read: Tensor | None = None
        self.cache: Any = None
        known = inspect.signature(self.model.forward).parameters
        self.placed = "position_ids" in known
        self.kept = next((name for name in CACHES if name in known), CACHES[-1])

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        grown = self.read is not None and torch.equal(self.read, input_ids[:, : self.read.shape[1]])
        start = self.read.shape[1] if grown and self.read is not None else 0
        mask = self._mask(input_ids)
        output = self.model(
            input_ids=input_ids[:, start:],
            attention_mask=mask,
            use_cache=True,
            **{self.kept: self.cache if grown else None},
            **self._places(mask, start),
        )
        self.read, self.cache = input_ids, getattr(output, self.kept)
        return generic(scores, output.logits[:, -1].to(scores), self.alpha, self.centre)

    def _mask(self, ids: Tensor) -> Tensor:
        """The mask of the prompt, ones behind it; rows repeated as `generate` repeats them for several answers."""
        given = torch.ones_like(ids[:, :1]) if self.mask is None else self.mask.to(ids)
        given = given.repeat_interleave(len(ids) // len(given), 0)
        return F.pad(given, (0, ids.shape[1] - given.shape[1]), value=1)

    def _places(self, mask: Tensor, start: int) -> Mapping[str, Tensor]:
        """Positions that do not count the padding on the left, for models that take them."""
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, start:]} if self.placed else {}


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.ndim == 2 and not labels.is_floating_point():
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORED)
    return supervised_loss(logits, labels)
