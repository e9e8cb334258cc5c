"""The journal of finished phases: JSON and safetensors, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from engram.errors import EngramError
from engram.files import write_atomic

Path_ = tuple[str, ...]
ENTRY = "value.json"
TENSOR, MODULE, TUPLE = "__tensor__", "__module__", "__tuple__"


class Journal:
    """Values by path. On disk an entry is a folder: `value-DIGEST.safetensors` first, then `value.json`, which names
    that digest; an entry without a JSON file was not finished, and one that is being replaced keeps its old value until
    the new JSON file is there. Without a directory, values stay in memory."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.memory: dict[Path_, tuple[Any, dict[str, float]]] = {}

    def store(self, path: Path_, value: Any, cost: dict[str, float]) -> None:
        """Keep a value; entries below the path are deleted."""
        if self.directory is None:
            self.memory = {p: v for p, v in self.memory.items() if p[: len(path)] != path}
            self.memory[path] = (value, cost)
            return
        folder = self._folder(path)
        tensors: dict[str, Tensor] = {}
        tree = flatten(value, tensors)
        content = save_bytes(tensors)
        entry = {"path": path, "cost": cost, "digest": hashlib.sha256(content).hexdigest(), "value": tree}
        entry["sha256"] = _seal(entry)
        file = folder / _tensors(entry)
        write_atomic(file, content)
        write_atomic(folder / ENTRY, json.dumps(entry))
        for other in folder.iterdir():
            if other.is_dir():
                shutil.rmtree(other)
            elif other.name not in (ENTRY, file.name):
                other.unlink()

    def load(self, path: Path_) -> tuple[Any, dict[str, float]] | None:
        """A stored value and what it cost, or None; EngramError names a file that was damaged."""
        if self.directory is None:
            return self.memory.get(path)
        folder = self._folder(path)
        if not (folder / ENTRY).exists():
            return None
        try:
            entry = json.loads((folder / ENTRY).read_text())
            if entry["sha256"] != _seal(entry):
                raise ValueError("it was changed since it was written")
            file = folder / _tensors(entry)
            content = file.read_bytes()
            tree, cost = entry["value"], entry["cost"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EngramError(f"the journal entry {folder} cannot be read ({error}); delete it to redo it") from error
        if hashlib.sha256(content).hexdigest() != entry["digest"]:
            raise EngramError(f"{file} was changed or cut short; delete {folder} to redo it")
        return unflatten(tree, load_bytes(content)), cost

    def has(self, path: Path_) -> bool:
        """Whether a value is stored."""
        return path in self.memory if self.directory is None else (self._folder(path) / ENTRY).exists()

    def forget(self, path: Path_) -> None:
        """Delete what is stored at a path and below."""
        self.memory = {p: v for p, v in self.memory.items() if p[: len(path)] != path}
        if self.directory is not None and self._folder(path).exists():
            shutil.rmtree(self._folder(path))

    def _folder(self, path: Path_) -> Path:
        assert self.directory is not None
        return self.directory.joinpath(*map(_file_name, path))


def _seal(entry: dict[str, Any]) -> str:
    """The digest of an entry's own content."""
    content = {key: value for key, value in entry.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _tensors(entry: dict[str, Any]) -> str:
    """The name of the file with an entry's tensors."""
    return f"value-{entry['digest'][:16]}.safetensors"


def _file_name(name: str) -> str:
    """A readable file name; a short digest keeps names apart that read alike, and from being the folder above."""
    plain = re.sub(r"[^A-Za-z0-9_.#=-]+", "-", name)[:60]
    return plain if plain == name and name.strip(".") else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A JSON tree of the value; its tensors are put into `tensors` and referred to by name."""
    if isinstance(value, nn.Module):
        from engram.models.io import pack

        config, weights = pack(value)
        return {MODULE: config, "weights": flatten(dict(weights), tensors)}
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {TENSOR: name}
    if isinstance(value, dict):
        return {"keys": [_key(k) for k in value], "values": [flatten(v, tensors) for v in value.values()]}
    if isinstance(value, tuple):
        return {TUPLE: [flatten(v, tensors) for v in value]}
    if isinstance(value, list):
        return [flatten(v, tensors) for v in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"a phase cannot journal a {type(value).__name__}; return tensors, modules and plain data")


def unflatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that `flatten` took apart."""
    if isinstance(tree, list):
        return [unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if TENSOR in tree:
        return tensors[tree[TENSOR]]
    if MODULE in tree:
        from engram.models.io import unpack

        return unpack(tree[MODULE], unflatten(tree["weights"], tensors))
    if TUPLE in tree:
        return tuple(unflatten(item, tensors) for item in tree[TUPLE])
    return {k: unflatten(v, tensors) for k, v in zip(tree["keys"], tree["values"], strict=True)}


def _key(key: Any) -> str | int:
    if not isinstance(key, str | int):
        raise TypeError(f"a phase cannot journal a dict with the key {key!r}; keys are strings or integers")
    return key
