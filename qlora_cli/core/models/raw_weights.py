"""Linear layers whose weight a model reads without calling them: neither packed weights nor adapters take part there.

Mixers of state-space models hand `self.out_proj.weight` to a fused kernel, or compute `self.dt_proj.weight @ x`; which
ones is read from the classes' own source, so that it holds for code paths that are not taken on this machine too.
"""

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from torch import nn

# What is asked of a weight without its values.
FACTS = {"dtype", "device", "shape", "ndim", "size", "numel", "is_cuda", "requires_grad", "is_meta"}
# What a condition may be made of to be decided by the module's settings alone, apart from `self.NAME`.
DECIDED = (ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.Compare, ast.cmpop, ast.Constant, ast.Load)
INITIALISES = ("__init__", "reset_parameters", "init_weights", "_init_weights", "tie_weights")


def read_raw(model: nn.Module) -> set[str]:
    """Full names of the linear layers of a model whose weight is read by the module that holds them."""
    found = set()
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):  # which reads what it wraps, and calls it
            continue
        linears = {child for child, part in module.named_children() if isinstance(part, nn.Linear)}
        reads = [read for kind in type(module).__mro__ if linears for read in _reads_of(kind)]
        raw = {child for child, guards in reads if child in linears and all(_may_be(*g, module) for g in guards)}
        found |= {f"{name}.{child}" if name else child for child in raw}
    return found


Guard = tuple[ast.expr, bool]  # a condition, and what it has to be
Read = tuple[str, tuple[Guard, ...]]  # a child whose weight is read, and under which conditions


def _reads_of(kind: type) -> list[Read]:
    return _reads_by_class(kind.__module__).get(kind.__qualname__, [])


@cache
def _reads_by_class(module: str) -> dict[str, list[Read]]:
    """What the methods of each class in a module of code read; {} where there is no source."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):
        return {}
    if ".weight" not in source:
        return {}
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    return {node.name: list(_reads_in(_methods(node), ())) for node in classes}


def _methods(kind: ast.ClassDef) -> list[ast.FunctionDef]:
    return [node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name not in INITIALISES]


def _reads_in(nodes: Iterable[ast.AST], guards: tuple[Guard, ...]) -> Iterator[Read]:
    for node in nodes:
        if isinstance(node, ast.If):
            yield from _reads_in([node.test], guards)
            yield from _reads_in(node.body, (*guards, (node.test, True)))
            yield from _reads_in(node.orelse, (*guards, (node.test, False)))
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if node.attr == "weight" and (child := _of_self(node.value)):
                yield child, guards
            if node.attr in FACTS:
                continue
        yield from _reads_in(ast.iter_child_nodes(node), guards)


def _of_self(node: ast.AST) -> str | None:
    """NAME of `self.NAME`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


def _may_be(test: ast.expr, wanted: bool, module: nn.Module) -> bool:
    """Whether a condition can come out so: where only settings of the module stand in it, whether it does."""
    values: list[ast.AST] = [test]
    while values:
        node = values.pop()
        name = _of_self(node)
        if name is not None:
            if name == "training" or not isinstance(getattr(module, name, None), bool | int | float | str):
                return True
        elif isinstance(node, DECIDED):
            values.extend(ast.iter_child_nodes(node))
        else:
            return True
    decided: Any = eval(compile(ast.Expression(test), "<condition>", "eval"), {"__builtins__": {}}, {"self": module})
    return bool(decided) == wanted
