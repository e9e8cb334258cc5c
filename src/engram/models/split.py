"""Any classifier as two parts: what computes features, and the last linear layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from engram.errors import EngramError
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
