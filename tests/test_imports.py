"""Imports point one way: core < {kernels, calib, io, data, hardware} < nn < {models, ptq, qat, evaluation} < sweep."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "jquant"
RANKS = {
    "core": 0,
    **dict.fromkeys(("kernels", "calib", "io", "data", "hardware"), 1),
    "nn": 2,
    **dict.fromkeys(("models", "ptq", "qat", "evaluation"), 3),
    "sweep": 4,
}


def test_rooms_import_only_lower_rooms() -> None:
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0]
        if room not in RANKS:
            continue  # __init__ re-exports, cli and config_file stand above all rooms
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for other in (name.split(".")[1] for name in names if name.startswith("jquant.")):
                if other != room and not RANKS.get(other, 9) < RANKS[room]:
                    wrong.append(f"{file.relative_to(PACKAGE)} imports {other}")
    assert not wrong
