"""Probes: what does a model still know?"""

from __future__ import annotations

from importlib import import_module

_HOMES = {
    "DefinitionFilter": "engram.audit.in_context",
    "NameFilter": "engram.audit.in_context",
    "behind": "engram.audit.in_context",
    "forget_quality": "engram.audit.tofu",
    "ks_statistic": "engram.audit.tofu",
    "model_utility": "engram.audit.tofu",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    """Public names are imported when they are asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
