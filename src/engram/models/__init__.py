"""Networks, heads, and what is done to whole models: splitting, wrapping, saving.

A model takes keyword tensors (`pixel_values`, `values`, `input_ids`, …) and answers with an object that has
`.logits`, `.pooler_output` and `.loss`, as transformers models do. A label is a column of the logits,
everywhere. Two functions have the name of their module: `from engram.models.build import build`, `…split
import split`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {
    "config": ("Configured",),
    "encoders": ("MLP", "ConvNet", "Encoder", "Identity"),
    "guards": ("Wrapper", "is_guard", "sharing"),
    "heads": (
        "CosineHead", "Head", "LinearHead", "MatrixHead", "NearestMeanHead", "ValueHead", "predict_classes",
    ),
    "io": ("digest", "load", "pack", "save", "unpack"),
    "loadable": ("register_loadable",),
    "output": ("Output",),
    "predictor": ("Predictor", "supervised_loss"),
    "resnet": ("ResNet", "load_cifar_resnet"),
    "seeding": ("seeded",),
    "split": ("Split",),
    "tokens": ("replaced",),
    "vit": ("CCT", "ViT"),
}  # fmt: skip

_HOME = {name: module for module, names in _PLACES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Public names are imported when they are asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
