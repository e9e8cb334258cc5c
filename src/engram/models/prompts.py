"""Learnt prefixes in the attention of a frozen vision transformer.

Prefix tuning (Li, Liang 2021, arXiv 2101.00190): in some layers the keys and values that tokens attend to get rows put
before them, K' = [P_k; K] and V' = [P_v; V]. Queries, and with them the number of tokens, stay what they are. The rows
stand where projected keys and values stand; they are not projected themselves.

Two kinds of networks take them: those built of `models.vit.Attention` (ViT, CCT), and transformers models whose
attention goes through the library's attention interface. Neither is changed outside a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.errors import EngramError
from engram.models import hub
from engram.models.encoders import Encoder
from engram.models.guards import sharing
from engram.models.output import Output
from engram.models.vit import Attention

Prefix = tuple[Tensor, Tensor]  # keys and values, each [length, width], or [B, length, width] with one for every row
INTERFACE = "engram_prefix"  # the name among transformers' attention functions


def attentions(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules of a network, from the first layer on. EngramError if it has none that can take
    prefixes."""
    library = any(hub.is_transformers(part) for part in model.modules())
    found = [m for m in model.modules() if isinstance(m, Attention) or (library and _on_the_interface(m))]
    if not found:
        raise EngramError(
            f"{type(model).__name__} has no attention that takes prefixes; use engram's ViT or CCT, or a transformers "
            "vision transformer"
        )
    return found


@contextmanager
def prefixed(model: nn.Module, prefixes: Mapping[int, Prefix]) -> Iterator[None]:
    """Within the block, the attention of these layers (counted from 0) finds the prefixes before its own keys and
    values; gradients reach them. Afterwards the model is as it was. EngramError for a layer that is not there."""
    layers = attentions(model) if prefixes else []
    with ExitStack() as stack:
        for layer, prefix in prefixes.items():
            if not 0 <= layer < len(layers):
                raise EngramError(f"there is no layer {layer} to put a prompt into; the network has {len(layers)}")
            insert = _before_projections if isinstance(layers[layer], Attention) else _through_the_interface
            stack.enter_context(insert(layers[layer], prefix))
        yield


@contextmanager
def _before_projections(attention: Any, prefix: Prefix) -> Iterator[None]:
    parts = zip((attention.key, attention.value), prefix, strict=True)
    handles = [part.register_forward_hook(partial(_put_before, rows)) for part, rows in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _put_before(rows: Tensor, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """[B, T, width] with rows before it: [B, length + T, width]."""
    return torch.cat([rows.to(output).expand(len(output), -1, -1), output], 1)


# --- transformers

_ACTIVE: dict[nn.Module, Prefix] = {}  # attention modules within a `prefixed` block


def _on_the_interface(module: nn.Module) -> bool:
    """Is this a module that hands projected queries, keys and values to the library's attention functions?"""
    return getattr(module, "is_causal", None) is False and hasattr(module, "config") and _key(module) is not None


def _key(attention: Any) -> Any:
    """The layer that makes the keys."""
    return getattr(attention, "k_proj", getattr(attention, "key", None))


@contextmanager
def _through_the_interface(attention: Any, prefix: Prefix) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(INTERFACE, _attend)
    AttentionMaskInterface.register(INTERFACE, sdpa_mask)
    before = attention.config._attn_implementation
    attention.config._attn_implementation = (
        INTERFACE  # layers may share one config; those without a prefix lose nothing
    )
    _ACTIVE[attention] = prefix
    try:
        yield
    finally:
        del _ACTIVE[attention]
        attention.config._attn_implementation = before


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention, scaled and fused, over the module's prefix and its own keys and values [B, heads, T, d]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if module in _ACTIVE:
        keys, values = (_by_head(rows, key) for rows in _ACTIVE[module])
        key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        if attention_mask is not None:  # True, or 0 where it is added: a prefix hides from nobody
            seen = attention_mask.dtype == torch.bool
            attention_mask = F.pad(attention_mask, (keys.shape[2], 0), value=True if seen else 0.0)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _by_head(rows: Tensor, like: Tensor) -> Tensor:
    """[length, width] or [B, length, width] -> [B, heads, length, d]."""
    batch, heads = like.shape[:2]
    return rows.to(like).expand(batch, -1, -1).unflatten(-1, (heads, -1)).transpose(1, 2)


# --- encoders with prompts


class _Prompted(Encoder):
    """A frozen encoder and what is learnt besides: for layer l a parameter [.., lengths[l], width], of whose rows the
    first half goes to the keys and the second to the values.

    `inner` is a copy that shares its weights with the given encoder, in evaluation mode for good.
    """

    def __init__(self, inner: nn.Module, lengths: Sequence[int], *of: int) -> None:
        super().__init__()
        odd = [length for length in lengths if length < 0 or length % 2]
        if odd:
            raise EngramError(f"half of a prompt goes to the keys, half to the values, so no prompt has {odd[0]} rows")
        self.inner = sharing(inner).eval()
        self.width = int(inner.width)  # type: ignore[arg-type]
        wanted = {layer: length for layer, length in enumerate(lengths) if length}
        sizes = _widths(self.inner, wanted)
        self.prompts = nn.ParameterDict(
            {str(layer): nn.Parameter(torch.rand(*of, length, sizes[layer])) for layer, length in wanted.items()}
        )

    def train(self, mode: bool = True) -> _Prompted:
        super().train(mode)
        self.inner.eval()
        return self

    def features(self, prompts: Mapping[int, Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """The frozen encoder's features [B, width] with these prompts, [.., length, width] by layer."""
        with prefixed(self.inner, {layer: _halves(rows) for layer, rows in prompts.items()}):
            return self.inner(**inputs).pooler_output.flatten(1)


class Prompted(_Prompted):
    """One prompt for all rows: layer l has lengths[l] rows (0: none), initially uniform in [0, 1). No lengths leave the
    frozen encoder alone, which may then be of any kind. One pass of the encoder a row. EngramError for an odd length,
    and for more layers than there are."""

    def __init__(self, inner: nn.Module, lengths: Sequence[int] = ()) -> None:
        super().__init__(inner, lengths)

    def forward(self, **inputs: Any) -> Output:
        return Output(pooler_output=self.features({int(k): p for k, p in self.prompts.items()}, inputs))


class PromptPool(_Prompted):
    """A pool of prompts, of which every row takes the `top` ones whose keys are most like its query.

    The query is the row's feature without any prompt, likeness the cosine. A prompt has lengths[l] rows in layer l,
    initially uniform in [0, 1); the chosen ones stand side by side, the most alike first. Keys [size, width] start
    uniform in [-1, 1). Two passes of the encoder a row. The output's `extra` has the `likeness` of the chosen keys, [B,
    top], whose gradient is that of the keys. EngramError as for `Prompted`, and for `top` beyond the pool's size.
    """

    def __init__(self, inner: nn.Module, lengths: Sequence[int], size: int, top: int) -> None:
        super().__init__(inner, lengths, size)
        if not 1 <= top <= size:
            raise EngramError(f"a row takes 1 to {size} prompts of a pool of {size}, not {top}")
        self.top = top
        self.keys = nn.Parameter(2 * torch.rand(size, self.width) - 1)

    def forward(self, **inputs: Any) -> Output:
        with torch.no_grad():
            query = self.features({}, inputs)
        likeness, chosen = (F.normalize(query, dim=1) @ F.normalize(self.keys, dim=1).T).topk(self.top, 1)
        prompts = {int(layer): p[chosen] for layer, p in self.prompts.items()}
        return Output(pooler_output=self.features(prompts, inputs), extra={"likeness": likeness})


def _widths(model: nn.Module, layers: Mapping[int, int]) -> dict[int, int]:
    """How many numbers a key has, over all heads, in each of these layers."""
    there = attentions(model) if layers else []
    beyond = [layer for layer in layers if layer >= len(there)]
    if beyond:
        raise EngramError(f"there is no layer {beyond[0]} to put a prompt into; the network has {len(there)}")
    return {layer: int(_key(there[layer]).out_features) for layer in layers}


def _halves(rows: Tensor) -> Prefix:
    """[length, width] or [B, prompts, length, width] -> keys and values, the prompts of a row side by side."""
    keys, values = rows.chunk(2, dim=-2)
    return (keys, values) if rows.dim() == 2 else (keys.flatten(1, 2), values.flatten(1, 2))
