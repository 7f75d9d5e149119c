"""Imports point down the layers, and only the top knows the configuration."""

from __future__ import annotations

import ast

from conftest import ROOT

# What each part of the package may import from it.
ALLOWED = {
    "errors": set(),
    "settings": {"errors"},
    "files": {"errors"},
    "ops": set(),
    "nn": {"ops"},
    "models": {"ops", "nn", "errors"},
    "data": {"files", "errors", "settings"},
    "training": {"ops", "nn", "models", "files", "errors", "runs", "settings", "stopping"},
    "evaluation": {"files", "errors", "settings"},
    "runs": {"models", "errors"},
    "stopping": set(),
    "choices": set(),
    "naming": {"choices", "errors", "launched", "models", "processes", "runs"},
    "continuing": {"choices", "data", "errors", "models", "runs", "training"},
    "launched": {"errors", "processes"},
    "processes": {"choices", "data", "files", "errors", "stopping"},
}
TOP = {"__main__", "assemble", "experiment", "trainers", "tracking", "weights", "cli", "__init__"}


def imports(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_layers():
    package = ROOT / "rubiks"
    problems = []
    parts = set()
    for path in package.rglob("*.py"):
        part = path.relative_to(package).parts[0].removesuffix(".py")
        parts.add(part)
        if part in TOP:
            continue
        for name in imports(path):
            first, _, rest = name.partition(".")
            if first in ("hydra", "omegaconf"):
                problems.append(f"{path} imports {name}")
            other = rest.partition(".")[0]
            if first == "rubiks" and other and other != part and other not in ALLOWED[part]:
                problems.append(f"{path} imports {name}")
    assert not problems
    assert parts == set(ALLOWED) | TOP
