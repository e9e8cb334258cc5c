"""Editing what a language or text model reads, at its embedding layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from engram.errors import EngramError


@contextmanager
def replaced(model: nn.Module, new: Tensor | Callable[[Tensor], Tensor], prefill_only: bool = False) -> Iterator[None]:
    """Inside the block the model reads `new` [B, T, d] (or new(old)) in place of its token embeddings [B, T,
    d].

    Works on every model with `get_input_embeddings`, also on those that take no `inputs_embeds`; gradients
    reach `new`, and neither it nor the embedding table is changed. `prefill_only`: passes over one token (T =
    1), as cached generation makes after the prompt, are left alone. Raises EngramError when the shapes
    differ.
    """
    layer = _embedding(model)

    def edit(_: nn.Module, __: Any, old: Tensor) -> Tensor:
        if prefill_only and old.shape[1] == 1:
            return old
        edited = new(old.clone()) if callable(new) else new.clone()
        if edited.shape != old.shape:
            raise EngramError(
                f"the new embeddings are {list(edited.shape)}, the model reads {list(old.shape)} here; "
                "give one for each token (prefill_only=True if it generates)."
            )
        return edited

    handle = layer.register_forward_hook(edit)
    try:
        yield
    finally:
        handle.remove()


def _embedding(model: Any) -> nn.Module:
    find = getattr(model, "get_input_embeddings", None)
    layer = find() if callable(find) else None
    if not isinstance(layer, nn.Module):
        raise EngramError(f"{type(model).__name__} has no get_input_embeddings: its tokens cannot be replaced.")
    return layer
