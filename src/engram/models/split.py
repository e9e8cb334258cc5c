"""Any classifier as two parts: what computes features, and the last linear layer; a language model's value vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from engram.errors import EngramError
from engram.models.guards import Wrapper
from engram.models.predictor import Predictor

FORMS = (
    "engram's Predictor(encoder, head); a transformers classifier (base_model and classifier, on pooled "
    "features); a timm-style model (forward_features, forward_head, get_classifier)"
)


@dataclass(frozen=True)
class Split:
    """features(**inputs) -> [B, width], with gradient; head: [B, width] -> logits, the model's own."""

    features: Callable[..., Tensor]
    head: nn.Module
    width: int


def split(model: nn.Module) -> Split:
    """Split a classifier. Raises EngramError, with the supported forms, for any other model.

    The features of a transformers classifier are what reaches its last linear layer: one whole forward pass.
    """
    for recognised, parts in _KINDS:
        if recognised(model):
            return parts(model)
    raise EngramError(f"cannot split {type(model).__name__} into features and head; supported: {FORMS}.")


def _of_predictor(model: Any) -> Split:
    return Split(model.features, model.head, model.head.width)


def _of_timm(model: Any) -> Split:
    def features(pixel_values: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(pixel_values), pre_logits=True)

    head = model.get_classifier()
    return Split(features, head, getattr(head, "in_features", None) or model.num_features)


def _of_classifier(model: Any) -> Split:
    head = _last_linear(model)

    def features(**inputs: Any) -> Tensor:
        seen: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            model(**inputs)
        finally:
            handle.remove()
        if len(seen) != 1 or seen[0].dim() != 2:
            raise EngramError(f"the classifier of {type(model).__name__} does not act on features [B, d].")
        return seen[0]

    return Split(features, head, head.in_features)


def _last_linear(model: Any) -> Any:
    classifier = getattr(model, "classifier", nn.Module())
    layers = [part for part in classifier.modules() if isinstance(part, nn.Linear)]
    return layers[-1] if layers else None


def _is_timm(model: Any) -> bool:
    asked = ("forward_features", "forward_head", "get_classifier")
    return all(callable(getattr(model, name, None)) for name in asked)


_KINDS: tuple[tuple[Callable[[Any], bool], Callable[[Any], Split]], ...] = (
    (lambda model: isinstance(model, Predictor), _of_predictor),
    (_is_timm, _of_timm),
    (lambda model: hasattr(model, "base_model") and _last_linear(model) is not None, _of_classifier),
)


# --- what the layers of a model can write

DOWN = ("mlp.c_proj", "mlp.down_proj", "mlp.dense_4h_to_h", "mlp.fc_out", "mlp.fc2", "fc2", "feed_forward.w2")


@dataclass(frozen=True)
class ValueLayer:
    """What one layer can write: it adds sum_j a_j v_j, a [m] its activations, v_j the columns of its matrix [d, m].

    `name`: of the parameter `weight`, which is stored as [m, d] where `across`.
    """

    name: str
    weight: nn.Parameter
    across: bool

    @property
    def columns(self) -> Tensor:
        """[d, m], a view of the weights."""
        return self.weight.T if self.across else self.weight

    def put(self, dims: Tensor, columns: Tensor) -> Tensor:
        """The weights with other columns [d, k] at these k places, of which alone they are a function."""
        old, new = self.weight.detach(), columns.to(self.weight)
        return old.index_copy(0, dims, new.T) if self.across else old.index_copy(1, dims, new)


@dataclass(frozen=True)
class ValueVectors:
    """The layers of a model, and what reads their sum: the output embedding [V, d], None where the layer writes the V
    logits themselves. `words`: which token or class each of the V is, [V]."""

    layers: tuple[ValueLayer, ...]
    output: Tensor | None
    words: Tensor


def value_vectors(model: nn.Module) -> ValueVectors:
    """The value vectors of all layers.

    Of a language model of transformers, the columns of the second projection of every MLP, stored as Linear (Llama,
    OLMo, GPT-NeoX, OPT, Phi) or as Conv1D (GPT-2). Of a classifier, those of its last linear layer: what a feature says
    of each class. Of a guard, those of the model inside: it hides what they say, and they still say it. EngramError
    for a model that has neither.
    """
    if isinstance(model, Wrapper):
        inner = value_vectors(model.inner)
        return replace(inner, layers=tuple(replace(layer, name=f"inner.{layer.name}") for layer in inner.layers))
    find = getattr(model, "get_output_embeddings", None)
    output = find() if callable(find) else None
    if output is None:
        return _of_last_layer(model)
    layers = [layer for name, module in model.named_modules() if name.endswith(DOWN) for layer in _layer(name, module)]
    if not layers or any(layer.columns.shape[0] != output.weight.shape[1] for layer in layers):
        raise EngramError(
            f"{type(model).__name__} has no MLP layers whose second projection writes what its output embedding reads; "
            f"known names of that projection: {', '.join(DOWN)}"
        )
    return ValueVectors(tuple(layers), output.weight, torch.arange(len(output.weight)))


def _of_last_layer(model: nn.Module) -> ValueVectors:
    head = split(model).head
    found = next((name for name, module in model.named_modules() if module is head), "")
    layers = [layer for layer in _layer(found, head) if len(layer.weight)]
    if not layers:
        raise EngramError(f"a {type(head).__name__} has no linear weights, hence no value vectors; use a linear head")
    words = getattr(head, "classes", None)
    return ValueVectors(tuple(layers), None, torch.arange(len(layers[0].weight)) if words is None else words.cpu())


def _layer(name: str, module: nn.Module) -> list[ValueLayer]:
    """The layer of a module with a matrix, if it is one."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        return []
    return [ValueLayer(f"{name}.weight", weight, type(module).__name__ == "Conv1D")]
