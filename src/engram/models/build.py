"""Models from a line of config: the name, what the data determine, and a seed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engram.environment import require
from engram.errors import EngramError, unknown
from engram.models.encoders import Encoder
from engram.models.heads import LinearHead, ValueHead
from engram.models.io import fresh, load
from engram.models.loadable import loadable
from engram.models.predictor import Predictor
from engram.models.seeding import seeded

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("MLP", "ConvNet", "Identity", "ResNet", "ViT", "CCT", "CompactTransformer")},
    "ResNet20": ("ResNet", {"blocks": 3}),
    "ResNet56": ("ResNet", {"blocks": 9}),
}  # name in a config -> class and its arguments

Spec = str | Path | Mapping[str, Any] | nn.Module


def build(
    spec: Spec,
    *,
    inputs: Mapping[str, Sequence[int]],
    classes: Iterable[int] | Tensor = (),
    outputs: int | None = None,
    generator: torch.Generator,
) -> nn.Module:
    """A model by name ("ResNet20"), mapping ({"name": "MLP", "hidden": [64]}), directory, or module (copied);
    {"fresh": DIRECTORY} is an untrained model like the saved one.

    inputs: the shape of one row by keyword, e.g. {"pixel_values": (3, 32, 32)}; arguments that follow from it
    may be left out. {"name": "GPT2", "vocab_size": …} is a causal language model of transformers by the keys of
    its GPT2Config, without dropout unless it says so. A named encoder gets a LinearHead of `classes`, or with
    `outputs` a ValueHead of that many numbers. Initial weights follow `generator`; the global one stays where it
    is. Raises EngramError for an unknown name.
    """
    if isinstance(spec, nn.Module):
        return copy.deepcopy(spec)
    if not isinstance(spec, Mapping | str | Path):
        raise EngramError(f"a model is a name, {{name: …}}, or the directory of a saved one; not {spec!r}")
    if not isinstance(spec, Mapping):
        if str(spec) not in ENCODERS and Path(spec).is_dir():
            return load(spec)
        spec = {"name": str(spec)}
    if "fresh" in spec:
        return fresh(str(spec["fresh"]), generator)
    with seeded(generator):
        if spec.get("name") == "GPT2":
            return _language_model(spec)
        encoder = _encoder(spec, inputs)
        head = LinearHead(encoder.width, classes) if outputs is None else ValueHead(encoder.width, outputs)
        return Predictor(encoder, head)


def _language_model(spec: Mapping[str, Any]) -> nn.Module:
    transformers = require("transformers", "language")
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "activation_function": "gelu_pytorch_tanh"}
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}  # as in data.vocabulary
    given = {key: value for key, value in spec.items() if key != "name"}
    model: nn.Module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**plain, **ends, **given}))
    return model


def _encoder(spec: Mapping[str, Any], inputs: Mapping[str, Sequence[int]]) -> Encoder:
    given = dict(spec)
    name = given.pop("name", None)
    if name not in ENCODERS:
        raise unknown("model (or directory of a saved model)", name, ENCODERS)
    class_name, preset = ENCODERS[name]
    cls = loadable(class_name)
    try:
        return cls(**{**cls.fitting(inputs), **preset, **given})
    except TypeError as error:
        raise EngramError(f"the model {name} cannot be built: {error}") from error
