"""Imports point down the layers, and only the top layer knows the configuration."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

PACKAGE = ROOT / "rubiks"

# What each part of the package may import from it.
ALLOWED = {
    "errors": set(),
    "version": set(),
    "settings": {"errors"},
    "files": {"errors"},
    "pages": {"errors", "files"},
    "ops": set(),
    "nn": {"ops"},
    "models": {"ops", "nn", "choices", "errors", "files", "version"},
    "data": {"files", "errors", "pages", "settings"},
    "training": {"ops", "nn", "models", "files", "errors", "runs", "settings", "stopping"},
    "evaluation": {"ops", "nn", "models", "files", "errors", "pages", "settings"},
    "predict": {"data", "evaluation", "export", "nn", "models", "pages", "files", "errors"},
    "export": {"nn", "models", "files", "errors"},
    "runs": {"models", "errors"},
    "stopping": set(),
    "choices": set(),
    "naming": {"choices", "errors", "launched", "models", "processes", "runs"},
    "continuing": {"choices", "data", "errors", "models", "runs", "training"},
    "launched": {"data", "errors", "processes", "rendezvous"},
    "rendezvous": {"errors"},
    "board": {"errors"},
    "watch": {"board", "errors", "stopping"},
    "parent": {"board", "choices", "data", "errors", "processes", "stopping", "watch"},
    "preflight": {"data", "errors", "files", "ops", "processes", "rendezvous", "version"},
    "processes": {"board", "errors", "rendezvous", "stopping", "watch"},
}
TOP = {"__main__", "assemble", "experiment", "trainers", "tracking", "weights", "cli", "__init__"}


# What each module of rubiks/models may import from it.
ALLOWED_IN_MODELS = {
    "tiers": set(),
    "clips": set(),
    "geometry": set(),
    "cuda_graphs": set(),
    "block_plan": set(),
    "backbone": {"tiers"},
    "preprocessing": set(),
    "model_card": {"tiers"},
    "source": set(),
    "saved_folder": {"model_card", "preprocessing", "source", "tiers"},
    "checkpoint": {"preprocessing", "saved_folder", "source", "tiers"},
    "training_support": {"backbone"},
    "training_block": {"block_plan", "geometry"},
    "training_path": {"backbone", "block_plan", "cuda_graphs", "geometry", "training_block", "training_support"},
    "inference_cpu": {"backbone", "block_plan", "clips"},
    "inference_cuda": {"backbone", "block_plan", "clips", "cuda_graphs", "geometry"},
    "stream": {"backbone", "inference_cpu"},
    "cost": {"rubiksnet"},
    "rubiksnet": {
        "backbone",
        "checkpoint",
        "clips",
        "cuda_graphs",
        "inference_cpu",
        "inference_cuda",
        "preprocessing",
        "saved_folder",
        "stream",
        "tiers",
        "training_path",
    },
    "inflation": {"block_plan", "rubiksnet"},
    "scoring": set(),
    "activation_maps": {"clips", "rubiksnet"},
    "shifts": {"rubiksnet"},
}


def imports(path) -> set[str]:
    """The names that a file imports anywhere, including those for type checking."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def import_graph() -> dict[str, set[str]]:
    """Each module of the package, with the modules of the package that it imports."""
    paths = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        paths[name.removesuffix(".__init__")] = path
    graph: dict[str, set[str]] = {name: set() for name in paths}
    for name, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & paths.keys()
            elif isinstance(node, ast.ImportFrom):
                # `from package import module` imports the module, any other name the package.
                found = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= {other if other in paths else node.module for other in found} & paths.keys()
    return graph


def test_hydra_composes_for_the_commands_alone():
    users = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        for name in imports(path)
        if name.partition(".")[0] in ("hydra", "omegaconf")
    }
    assert users == {"cli.entry", "cli.keys"}


def test_layers():
    problems = []
    parts = set()
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        parts.add(part)
        if part in TOP:
            continue
        for name in imports(path):
            first, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if first == "rubiks" and other and other != part and other not in ALLOWED[part]:
                problems.append(f"{path} imports {name}")
    assert not problems
    assert parts == set(ALLOWED) | TOP


def test_layers_within_models():
    prefix = "rubiks.models."
    found = {
        name.removeprefix(prefix): {other.removeprefix(prefix) for other in others if other.startswith(prefix)}
        for name, others in import_graph().items()
        if name.startswith(prefix)
    }
    assert found.keys() == ALLOWED_IN_MODELS.keys()
    for name, others in found.items():
        assert others <= ALLOWED_IN_MODELS[name], name


def test_imports_have_no_circle():
    """Imports for type checking and imports in functions count too."""
    graph = import_graph()
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")
    for name in order:
        print(f"{name}: {', '.join(sorted(graph[name])) or '-'}")
