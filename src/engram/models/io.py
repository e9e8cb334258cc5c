"""Models as files and as plain data: config.json and model.safetensors (and `SHA256SUMS`, their digests), and nothing
that could run code.

Own models and transformers models (alone, or inside one another) are saved; classes are found by name in
`engram.models.loadable` or in transformers, never by an import path out of a file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engram.errors import EngramError
from engram.files import check_sums, new_directory
from engram.models import hub
from engram.models.config import Configured
from engram.models.loadable import loadable
from engram.models.seeding import seeded

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(model: nn.Module, directory: str | Path) -> None:
    """Write the model into `directory`, whole or not at all; a saved model that is there is replaced.

    A transformers model is written by its own `save_pretrained`. Raises EngramError when the model is of no
    known kind, the directory holds something else, or the disk refuses; what was there then stays.
    """
    target = Path(directory)
    if target.is_dir() and any(target.iterdir()) and not (target / CONFIG).is_file():
        raise EngramError(f"{target} holds files, but no saved model: choose a new or an empty directory.")
    alone = hub.stands_alone(model)
    with new_directory(target) as fresh:
        try:
            hub.save(model, fresh) if alone else _write(model, fresh)
        except SafetensorError as error:
            raise OSError(f"{WEIGHTS}: {error}") from error


def load(directory: str | Path) -> nn.Module:
    """The model that `save` (or a transformers `save_pretrained`) wrote, on the CPU, in evaluation mode.

    Raises EngramError naming the file that is missing, damaged, or does not fit; that no byte of any file was changed
    is known where `save` wrote it.
    """
    model = _read(directory)
    check_sums(directory)
    return model


def _read(directory: str | Path) -> nn.Module:
    if not (Path(directory) / CONFIG).is_file():
        raise EngramError(f"{directory} holds no saved model ({CONFIG} is missing); {nearby(Path(directory))}")
    config = _read_config(Path(directory) / CONFIG)
    weights = Path(directory) / WEIGHTS
    _refuse_pickle(Path(directory))
    try:
        if "architectures" in config and "format" not in config:
            return hub.load(Path(directory), config)
        return unpack(config, load_file(weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise EngramError(f"cannot read {weights}: {error}") from error
    except Exception as error:  # a damaged config makes the class that it names raise anything
        raise EngramError(f"cannot load {directory}: {str(error) or type(error).__name__}") from error


def nearby(directory: Path) -> str:
    """Where a model or a learner may stand instead, in words, for whoever named a directory that holds none."""
    right = f"give one that engram wrote, or save_pretrained with {WEIGHTS}"
    if not directory.is_dir():
        return f"{'it is no' if directory.exists() else 'there is no such'} directory; {right}"
    learners = sorted(path for path in (directory / "models").glob("*") if path.is_dir() and path.name[0] != ".")
    if learners:
        return f"this is a run: give {' or '.join(map(str, learners[:3]))}"
    return right


def fresh(directory: str | Path, generator: torch.Generator) -> nn.Module:
    """An untrained model like the saved one: its config, new weights that follow `generator`."""
    config = _read_config(Path(directory) / CONFIG)
    if "architectures" in config and "format" not in config:
        config = {"class": hub.NAME, "architecture": (config["architectures"] or [None])[0], "config": config}
    description = {key: value for key, value in config.items() if key not in ("format", "tied")}
    with seeded(generator):
        model: nn.Module = _construct(description)
    return model


def pack(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model as (JSON-able config, CPU tensors that share no storage with it). `unpack` is the inverse."""
    if isinstance(model, Configured):
        description = model.describe()
    elif hub.is_transformers(model):
        description = hub.describe(model)
    else:
        raise EngramError(
            f"{type(model).__name__} cannot be saved: a model is built of engram's or transformers' modules, "
            "or derives from engram.models.Configured."
        )
    state = _state(model)
    aliases = _aliases(state)
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items() if name not in aliases
    }
    return {"format": FORMAT, **description, **({"tied": aliases} if aliases else {})}, tensors


def unpack(config: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """A new model, in evaluation mode, with these weights bit by bit, data types included.

    Raises EngramError for an unknown class or format, and for weights missing, left over or misshapen.
    """
    if config.get("format") != FORMAT or "class" not in config:
        raise EngramError(f"this is no model's config of format {FORMAT} (it needs a format and a class).")
    description = {key: value for key, value in config.items() if key not in ("format", "tied")}
    with seeded(torch.Generator().manual_seed(0)):
        model = _construct(description)
    state = tensors | {name: tensors[first] for name, first in config.get("tied", {}).items() if first in tensors}
    try:
        _take_types(model, state)
        model.load_state_dict(state)
    except RuntimeError as error:
        raise EngramError(f"the weights do not fit {description['class']}: {error}") from error
    return model.eval()


def digest(model: nn.Module) -> str:
    """sha256, in hex, over names, types, shapes and bytes of all weights and buffers, sorted by name."""
    total = hashlib.sha256()
    for name, tensor in sorted(_state(model).items()):
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        total.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _construct(description: Any) -> Any:
    """Plain data as it is; what has a class, as an object of it."""
    if isinstance(description, list):
        return [_construct(item) for item in description]
    if not isinstance(description, dict):
        return description
    if description.get("class") == hub.NAME:
        return hub.construct(description)
    parts = {key: _construct(value) for key, value in description.items() if key != "class"}
    return _made(loadable(description["class"]), parts) if "class" in description else parts


def _made(cls: Any, arguments: dict[str, Any]) -> Any:
    try:
        return cls(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise EngramError(f"the config does not fit {cls.__name__}: {error}") from error


def _take_types(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, own in model.state_dict(keep_vars=True).items():
        if name in state and own.dtype != state[name].dtype:
            own.data = own.data.to(state[name].dtype)


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise EngramError(f"the state {odd[0]!r} of {type(model).__name__} is no tensor; keep it as a buffer.")
    return state


def _aliases(state: dict[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are the same memory as an earlier one (tied weights), with that one's name."""
    first: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and first.setdefault(place, name) != name:
            aliases[name] = first[place]
    return aliases


PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def _refuse_pickle(directory: Path) -> None:
    pickled = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLED)
    if pickled and not any(directory.glob("*.safetensors")):
        raise EngramError(
            f"{directory} holds weights in pickle format ({pickled[0]}), which can run code when it is read; where you "
            "trust them, load the model with transformers and save_pretrained(…) it to a new directory, and use that"
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngramError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise EngramError(f"{path} holds no config: it should be a JSON object.")
    return config


def _write(model: nn.Module, directory: Path) -> None:
    config, tensors = pack(model)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
