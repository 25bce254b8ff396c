"""Linear layers whose weight a model reads without calling them: neither packed weights nor adapters take part there.

Mixers of state-space models hand `self.out_proj.weight` to a fused kernel, or compute `self.dt_proj.weight @ x`; which
ones is read from the classes' own source, so that it holds for code paths that are not taken on this machine too. Where
`self.training` decides nothing in a class but whether that kernel is tried, its modules are held in evaluation
(`call_layers`): the layer is then called, and may be packed and adapted.
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
        held = _can_be_held(type(module))
        raw = {c for c, guards in reads if c in linears and all(_may_be(*g, module, held) for g in guards)}
        found |= {f"{name}.{child}" if name else child for child in raw}
    return found


def call_layers(model: nn.Module) -> None:
    """Holds in evaluation the modules that would give the weights of linear layers away in training only.

    Whatever else they do is the same in both. Their children are in training with the rest of the model.
    """
    for module in model.modules():
        kind: Any = type(module)
        if _can_be_held(kind):
            module.__class__ = _held_class(kind)


@cache
def _held_class(kind: type) -> type:
    if isinstance(inspect.getattr_static(kind, "training", None), property):
        return kind
    held = property(lambda self: False, lambda self, mode: None)
    # Source and names are the class's own: transformers goes by them.
    own = {"training": held, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), own)


def _can_be_held(kind: type) -> bool:
    """Whether training changes nothing in a class of transformers but that weights are read raw."""
    if not kind.__module__.startswith("transformers.models."):
        return False
    return kind.__qualname__ in _classes_by_training(kind.__module__)


@cache
def _classes_by_training(module: str) -> frozenset[str]:
    """Classes in which `self.training` stands in conditions before raw reads, as what has to be so, and nowhere else."""
    found = set()
    for node in _classes_in(module):
        uses = sum(_of_self(n) == "training" for n in ast.walk(node))
        if not uses:
            continue
        conditions = [n for n in ast.walk(node) if isinstance(n, ast.If) and _needs_training(n.test) and not n.orelse]
        deciding = [n for n in conditions if any(_reads_in(n.body, ()))]
        if deciding and uses == sum(_of_self(n) == "training" for c in deciding for n in ast.walk(c)):
            found.add(node.name)
    return frozenset(found)


def _needs_training(test: ast.expr) -> bool:
    """Whether a condition is `self.training`, or that and others."""
    parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    return any(_of_self(part) == "training" for part in parts)


Guard = tuple[ast.expr, bool]  # a condition, and what it has to be
Read = tuple[str, tuple[Guard, ...]]  # a child whose weight is read, and under which conditions


def _reads_of(kind: type) -> list[Read]:
    return _reads_by_class(kind.__module__).get(kind.__qualname__, [])


@cache
def _reads_by_class(module: str) -> dict[str, list[Read]]:
    """What the methods of each class in a module of code read; {} where there is no source."""
    return {node.name: list(_reads_in(_methods(node), ())) for node in _classes_in(module)}


@cache
def _classes_in(module: str) -> tuple[ast.ClassDef, ...]:
    """Of a module that reads weights at all."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):
        return ()
    if ".weight" not in source:
        return ()
    return tuple(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))


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


def _may_be(test: ast.expr, wanted: bool, module: nn.Module, held: bool) -> bool:
    """Whether a condition can come out so: where only settings of the module stand in it, whether it does."""
    if held and wanted and _needs_training(test):
        return False
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
