"""engram: learn, keep, forget, protect, recall and audit the knowledge in a trained model.

The nouns and verbs of everyday use stand here; the methods are in `engram.learn`, `engram.keep`,
`engram.forget`, `engram.protect`, `engram.recall` and `engram.audit`. Names load what they need when first
used, so `import engram` is quick.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0.dev0"

_HOMES = {
    "Run": "engram.engine.run",
    "Table": "engram.data.table",
    "Task": "engram.data.task",
    "erase": "engram.core.verbs",
    "examine": "engram.core.verbs",
    "load": "engram.core.persist",
    "save": "engram.models.io",
}

__all__ = ["Run", "Table", "Task", "__version__", "erase", "examine", "load", "save"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'engram' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # found once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
