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
    "CompactTransformer": "engram.models.cct:CompactTransformer",
    "ConvolvedTransformer": "engram.models.convolved_attention:ConvolvedTransformer",
    "TaskPart": "engram.models.convolved_attention:TaskPart",
    "SplitFeatures": "engram.models.frozen:SplitFeatures",
    "RandomFeatures": "engram.models.frozen:RandomFeatures",
    "LinearHead": "engram.models.heads:LinearHead",
    "CosineHead": "engram.models.heads:CosineHead",
    "NearestMeanHead": "engram.models.heads:NearestMeanHead",
    "MatrixHead": "engram.models.heads:MatrixHead",
    "ValueHead": "engram.models.heads:ValueHead",
    "CodingHead": "engram.models.coding:CodingHead",
    "KeyValueHead": "engram.models.key_value:KeyValueHead",
    "LanguageHead": "engram.models.language_head:LanguageHead",
    "Mapped": "engram.models.language_head:Mapped",
    "Embedding": "engram.models.compatible:Embedding",
    "BasisTransform": "engram.models.compatible:BasisTransform",
    "Predictor": "engram.models.predictor:Predictor",
    "Prompted": "engram.models.prompts:Prompted",
    "PromptPool": "engram.models.prompts:PromptPool",
    "Routed": "engram.models.routed:Routed",
    "Columns": "engram.models.columns:Columns",
    "Experts": "engram.models.experts:Experts",
    "Hypernetwork": "engram.models.hypernetwork:Hypernetwork",
    "HyperTask": "engram.models.hypernetwork:HyperTask",
    "ChunkedGenerator": "engram.models.hypernetwork:ChunkedGenerator",
    "RecurrentGenerator": "engram.models.hypernetwork:RecurrentGenerator",
    "Autoencoder": "engram.models.autoencoder:Autoencoder",
    "AutoencoderGate": "engram.models.autoencoder:AutoencoderGate",
    "VariationalEncoder": "engram.models.open_variational:VariationalEncoder",
    "Decoder": "engram.models.open_variational:Decoder",
    "Tails": "engram.models.open_variational:Tails",
    "OpenClassifier": "engram.models.open_variational:OpenClassifier",
    "Wrapper": "engram.models.guards:Wrapper",
    "ShiftedLogits": "engram.models.shifted:ShiftedLogits",
    "GenericLogits": "engram.models.generic:GenericLogits",
    "PromptClassifier": "engram.models.guarded_lm:PromptClassifier",
    "RowClassifier": "engram.models.guarded_lm:RowClassifier",
    "GuardedLM": "engram.models.guarded_lm:GuardedLM",
    "GuardedInputs": "engram.models.guarded_lm:GuardedInputs",
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
