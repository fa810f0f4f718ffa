"""Who may import whom: the contracts of .importlinter hold, and only one module loads the core."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sharded_pc"


def test_contracts() -> None:
    call = "from importlinter.cli import lint_imports_command as run; run()"
    done = subprocess.run(
        [sys.executable, "-c", call, "--no-cache", "--config", ROOT / ".importlinter"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def imports(path: Path) -> Iterator[str]:
    """Full names of everything that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_one_module_imports_the_extension() -> None:
    """import-linter cannot see it: the extension has no source beside it."""
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any("_native" in name.split(".") for name in imports(path))
    }
    assert found == {"native/core.py"}


def test_every_layer_is_named() -> None:
    """A new module at the top of the package must be put into a layer."""
    config = (ROOT / ".importlinter").read_text()
    layers = config.split("contract:layers]")[1].split("[importlinter:")[0]
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    modules |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    named = {word.removeprefix("sharded_pc.") for word in layers.split()}
    assert modules - named == set()
