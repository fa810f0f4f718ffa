"""One target in Python under atheris; programs.py makes a program of it."""

from __future__ import annotations

import gc
import sys
import types

import atheris

from tests.fuzz import targets


def _instrument(package: str) -> None:
    """What is imported of it.  Not by atheris' import hook, which an editable install's gets in the
    way of."""
    for each in gc.get_objects():
        if isinstance(each, types.FunctionType) and str(each.__module__).split(".")[0] == package:
            atheris.instrument_func(each)


def main() -> None:
    atheris.enabled_hooks.add("str")
    name, *arguments = sys.argv[1:]
    target = targets.load(name)
    _instrument("sharded_pc")
    atheris.Setup(arguments, target.one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
