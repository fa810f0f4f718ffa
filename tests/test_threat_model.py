"""docs/threat-model.md names code, tests and limits that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "threat-model.md").read_text()
LIMIT = re.compile(r"^\| (`[A-Z].*) \| `(sharded_pc/\S+)` \|", re.MULTILINE)


def test_every_file_is_there():
    named = set(re.findall(r"`((?:sharded_pc|tests)/[^`]*)`", TEXT))
    assert len(named) > 20
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_limit_is_there():
    rows = LIMIT.findall(TEXT)
    assert len(rows) > 10
    for names, path in rows:
        assert set(re.findall(r"`(\w+)`", names)) <= constants(ROOT / path), path


def constants(path: Path) -> set[str]:
    nodes = ast.parse(path.read_text()).body
    assigned = [node.targets for node in nodes if isinstance(node, ast.Assign)]
    assigned += [[node.target] for node in nodes if isinstance(node, ast.AnnAssign)]
    return {each.id for targets in assigned for each in targets if isinstance(each, ast.Name)}
