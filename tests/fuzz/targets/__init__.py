"""One module for each parser.  `one_input(data)` returns if its property holds for these bytes and
raises if not; `TOKENS` are words that mutations put in."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
