"""The classes that a saved model may name: a fixed list, so that no file decides what is imported."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from engram.errors import EngramError, unknown

LOADABLE: dict[str, str | type] = {
    "MLP": "engram.models.encoders:MLP",
    "ConvNet": "engram.models.encoders:ConvNet",
    "Identity": "engram.models.encoders:Identity",
    "ResNet": "engram.models.resnet:ResNet",
    "ViT": "engram.models.vit:ViT",
    "CCT": "engram.models.vit:CCT",
    "SplitFeatures": "engram.models.frozen:SplitFeatures",
    "RandomFeatures": "engram.models.frozen:RandomFeatures",
    "LinearHead": "engram.models.heads:LinearHead",
    "CosineHead": "engram.models.heads:CosineHead",
    "NearestMeanHead": "engram.models.heads:NearestMeanHead",
    "MatrixHead": "engram.models.heads:MatrixHead",
    "ValueHead": "engram.models.heads:ValueHead",
    "KeyValueHead": "engram.models.key_value:KeyValueHead",
    "Predictor": "engram.models.predictor:Predictor",
    "Routed": "engram.models.routed:Routed",
    "Wrapper": "engram.models.guards:Wrapper",
    "ShiftedLogits": "engram.models.shifted:ShiftedLogits",
}  # name -> where it stands, imported when asked for


def register_loadable(cls: type) -> type:
    """Allow a Configured class of another package to be loaded by its name; also usable as a decorator.

    Raises EngramError when another class has that name.
    """
    known = LOADABLE.get(cls.__name__, cls)
    if known not in (cls, f"{cls.__module__}:{cls.__qualname__}"):
        raise EngramError(f"a loadable class {cls.__name__} exists already ({known}); choose another name.")
    LOADABLE.setdefault(cls.__name__, cls)
    return cls


def loadable(name: object) -> Any:
    """The class of that name. Raises EngramError with the nearest name."""
    if not isinstance(name, str) or name not in LOADABLE:
        raise unknown("class of a saved model", name, LOADABLE)
    found = LOADABLE[name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = getattr(import_module(module), attribute)
    return found
