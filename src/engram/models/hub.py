"""Models of the transformers library: recognised, described as plain data, rebuilt, saved and loaded.

Nothing here imports transformers before a model of it is at hand, and code that comes with a model is never
run.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from engram.errors import EngramError, unknown
from engram.models.seeding import seeded

NAME = "transformers"


def is_transformers(module: object) -> bool:
    """Whether `module` is a model of the transformers library."""
    library = sys.modules.get(NAME)
    return library is not None and isinstance(module, library.PreTrainedModel)


def describe(model: nn.Module) -> dict[str, Any]:
    """Class and settings as JSON-able data. Raises EngramError for a class that the library does not have."""
    name = type(model).__name__
    if getattr(sys.modules[NAME], name, None) is not type(model):
        raise EngramError(
            f"{type(model).__module__}.{name} is not a class of transformers itself, so it cannot be saved; "
            "save its inner model, or wrap it in a class known to engram.models.io.register_loadable."
        )
    config = json.loads(cast(Any, model).config.to_json_string(use_diff=False))
    return {"class": NAME, "architecture": name, "config": config, "options": _options(model)}


def construct(description: dict[str, Any]) -> nn.Module:
    """The model that `describe` described, with fresh weights."""
    import transformers

    settings = {key: value for key, value in description["config"].items() if key != "auto_map"}
    kind = settings.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise unknown("model type of transformers", kind, transformers.CONFIG_MAPPING.keys())
    config = transformers.CONFIG_MAPPING[kind].from_dict(settings)
    return _class(description["architecture"])(config, **description.get("options", {}))


def stands_alone(module: nn.Module) -> bool:
    """Whether `module` is a transformers model that transformers itself can save and load again, whole."""
    return is_transformers(module) and not describe(module)["options"]


def save(model: nn.Module, directory: Path) -> None:
    """Write a model that stands alone, as `save_pretrained` does."""
    with quiet():
        cast(Any, model).save_pretrained(directory)


def load(directory: Path, config: dict[str, Any]) -> nn.Module:
    """The model that `save_pretrained` wrote, in evaluation mode, from these files alone.

    Raises EngramError when a weight is missing; transformers would fill it with random numbers.
    """
    architectures = config.get("architectures") or [None]
    with quiet(), seeded(torch.Generator().manual_seed(0)):
        model, found = _class(architectures[0]).from_pretrained(
            directory, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    lacking = sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"]))
    if lacking:
        raise EngramError(f"{directory} lacks weights of {architectures[0]}: {', '.join(lacking[:5])}")
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block transformers shows no progress bars for files that take no time."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _options(model: nn.Module) -> dict[str, Any]:
    """What a constructor was told beside the config: classifiers build their encoders without a pooler."""
    optional = "add_pooling_layer" in inspect.signature(type(model)).parameters
    return {"add_pooling_layer": False} if optional and getattr(model, "pooler", None) is None else {}


def _class(name: str | None) -> Any:
    import transformers

    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise EngramError(f"transformers has no model class {name!r}; update transformers, or save the model anew.")
    return found
