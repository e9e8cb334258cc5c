"""What the layers of a model compute on the way: read during a forward pass, without changing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from engram.errors import EngramError, unknown


@contextmanager
def capture(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of layers by name, [B, …], filled in by each forward pass within the block.

    They are the tensors themselves, with their gradient; of several calls of a layer the last one counts. Only own
    handles are taken off again. EngramError for a name that the model does not have, and for a layer whose output is
    not one tensor.
    """
    seen: dict[str, Tensor] = {}
    parts = dict(model.named_modules())
    wanted = list(names)
    for name in wanted:
        if name not in parts:
            raise unknown("layer", name, (part for part in parts if part))
    handles = [parts[name].register_forward_hook(partial(_keep, seen, name)) for name in wanted]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _keep(seen: dict[str, Tensor], name: str, module: nn.Module, _: Any, output: Any) -> None:
    if not isinstance(output, Tensor):
        kind = type(module).__name__
        raise EngramError(f"the layer {name!r} ({kind}) gives a {type(output).__name__}; name a layer within it")
    seen[name] = output
