"""What keeps the code small: few flags, and no circle of imports. (ruff limits the branches.)"""
import ast
import dataclasses
from graphlib import TopologicalSorter

from toys import ROOT

from config import Config

MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
           for folder in (".", "extras") for path in sorted((ROOT / folder).glob("*.py"))}


def test_train_has_at_most_50_flags():
    assert sum("help" in field.metadata for field in dataclasses.fields(Config)) <= 50


def imports(node):
    """The modules that are imported when the file is: not those that a function or method imports."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child)


def test_no_circle_of_imports():
    graph = {name: MODULES.keys() & set(imports(ast.parse(path.read_text()))) - {name}   # started as itself
             for name, path in MODULES.items()}
    assert "objective" in graph["sampler"] and "config" in graph["extras.latents"]
    TopologicalSorter(graph).prepare()          # CycleError names the circle
