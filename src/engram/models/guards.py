"""Guards: modules around a frozen model that change what goes in or comes out."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import Tensor, nn

from engram.models.config import Configured


def is_guard(model: object) -> bool:
    """Is this a guard, behind which the weights still hold what it hides?"""
    return isinstance(model, Wrapper) and not model.erases_weights


class Wrapper(Configured, nn.Module):
    """A model with something before and after it; a subclass overrides `before`, `after` or both.

    The inner model is frozen and in evaluation mode for good. It is a copy of the module that *shares the
    storage* of all weights and buffers with it: no second copy in memory, the given module's flags stay as
    they are, and whoever trains that module in place changes this one too. Saved and loaded together with its
    inner model.
    """

    erases_weights: ClassVar[bool] = False  # a guard hides what the weights still hold; reports read this

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = sharing(inner)
        self.train(False)

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the inner model is given instead of `inputs`."""
        return inputs

    def after(self, inputs: dict[str, Any], output: Any) -> Any:
        """The answer, from what the inner model was given and what it said."""
        return output

    def forward(self, **inputs: Any) -> Any:
        given = self.before(inputs)
        return self.after(given, self.inner(**given))

    def generate(self, input_ids: Tensor | None = None, **inputs: Any) -> Any:
        """The inner model's `generate` after `before`; `after` plays no part in it.

        A guard that acts on each generated token overrides this and hands over a logits processor.
        """
        return self._inner().generate(**self.before({"input_ids": input_ids, **inputs}))

    def get_input_embeddings(self) -> nn.Module:
        return self._inner().get_input_embeddings()

    @property
    def config(self) -> Any:
        """That of the inner model, as callers of its library expect; `describe()` tells the wrapper's own."""
        return self._inner().config

    def train(self, mode: bool = True) -> Wrapper:
        super().train(mode)
        self.inner.eval()
        return self

    def _inner(self) -> Any:
        return self.inner


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the module tree on the same storage, without gradients. Costs no memory for weights."""
    memo: dict[int, Any] = {id(weight): nn.Parameter(weight.detach(), False) for weight in model.parameters()}
    memo.update((id(buffer), buffer) for buffer in model.buffers())
    return copy.deepcopy(model, memo)
