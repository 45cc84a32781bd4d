"""Every hint that is written in imgtool's code, as a template with `{}` for what is filled in.

A hint is what a parameter called `hint` is given, or a field of the classes that carry one, by
name or by place. Where that is a name, it is what the function or the module gives that name;
where it is a call or a property of ours, what that returns; where it is looked up in a table, the
values of the table.
"""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
_CALLED = ("hint", "do", "step")
# Whose `do` or `step` is a hint; elsewhere these words mean other things.
_CARRIERS = ("Finding", "Unseen", "Said", "_Known", "Packed")
_DEEP = 4  # a function that calls a function ...
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class _Module:
    """What a module defines, by name."""

    name: str
    tree: ast.Module
    functions: dict[str, list[_Function]] = field(default_factory=dict)
    properties: dict[str, list[_Function]] = field(default_factory=dict)
    values: dict[str, list[ast.expr]] = field(default_factory=dict)


def _modules() -> list[_Module]:
    found = []
    for path in sorted((ROOT / "imgtool").rglob("*.py")):
        name = str(path.relative_to(ROOT / "imgtool"))
        module = _Module(name, ast.parse(path.read_text()))
        for node in ast.walk(module.tree):
            if isinstance(node, _Function):
                is_property = any(
                    isinstance(one, ast.Name) and one.id == "property"
                    for one in node.decorator_list
                )
                into = module.properties if is_property else module.functions
                into.setdefault(node.name, []).append(node)
        _learn(module.tree.body, module.values)
        found.append(module)
    return found


def _learn(body: list[ast.stmt], values: dict[str, list[ast.expr]]) -> None:
    """What names are given in these lines, those of functions inside left out."""
    for statement in body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                values.setdefault(name, []).append(value)
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                values.setdefault(name, []).append(value)
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=parts)):
                for one, part in zip(names, parts, strict=False):  # a starred one takes several
                    if isinstance(one, ast.Name):
                        values.setdefault(one.id, []).append(part)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                continue
        for _, inner in ast.iter_fields(statement):
            if isinstance(inner, list):
                _learn([one for one in inner if isinstance(one, ast.stmt)], values)
                for one in inner:
                    if isinstance(one, ast.ExceptHandler | ast.match_case):
                        _learn(one.body, values)


def _places(modules: list[_Module]) -> dict[str, set[int]]:
    """For each function and class by whose name a hint is given by place: which place that is."""
    found: dict[str, set[int]] = {}

    def note(name: str, parameters: list[str]) -> None:
        for at, parameter in enumerate(parameters):
            if parameter in (_CALLED if name in _CARRIERS else _CALLED[:1]):
                found.setdefault(name, set()).add(at)

    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
                note(
                    node.name, [one.target.id for one in fields if isinstance(one.target, ast.Name)]
                )
                for method in node.body:
                    if isinstance(method, ast.FunctionDef):
                        name = node.name if method.name == "__init__" else method.name
                        note(name, [one.arg for one in method.args.args][1:])
            elif isinstance(node, ast.Module | _Function):
                for one in node.body:
                    if isinstance(one, _Function):
                        note(one.name, [parameter.arg for parameter in one.args.args])
    return found


class _Collector:
    def __init__(self) -> None:
        self.modules = _modules()
        self.places = {**_places(self.modules), "hint": {0}}

    def hints_of(self, module: _Module) -> Iterator[str]:
        yield from self._within(module, module.tree, {})

    def _within(
        self, module: _Module, node: ast.AST, names: dict[str, list[ast.expr]]
    ) -> Iterator[str]:
        if isinstance(node, _Function):
            names = dict(names)
            _learn(node.body, names)
        if isinstance(node, ast.Call):
            for expression in self._given(node):
                yield from self._templates(module, expression, names, _DEEP) or []
        for child in ast.iter_child_nodes(node):
            yield from self._within(module, child, names)

    def _given(self, call: ast.Call) -> Iterator[ast.expr]:
        """The hints that a call is given."""
        name = call.func.attr if isinstance(call.func, ast.Attribute) else None
        name = call.func.id if isinstance(call.func, ast.Name) else name
        called = _CALLED if name in _CARRIERS else _CALLED[:1]
        yield from (word.value for word in call.keywords if word.arg in called)
        if isinstance(call.func, ast.Name) and name == "call":
            return  # a parameter of that name, which is another function each time
        for place in self.places.get(name or "", ()):
            if len(call.args) > place:
                yield call.args[place]

    def _returned(self, module: _Module, name: str, kind: str, deep: int) -> list[str]:
        """What functions, or properties, of a name return: the module's own, or any of ours."""
        own = [module] if name in getattr(module, kind) else self.modules
        found = []
        for one in own:
            for function in getattr(one, kind).get(name, ()):
                names: dict[str, list[ast.expr]] = {}
                _learn(function.body, names)
                for node in ast.walk(function):
                    if isinstance(node, ast.Return) and node.value is not None:
                        found += self._templates(one, node.value, names, deep - 1)
        return found

    def _templates(
        self, module: _Module, node: ast.expr, names: dict[str, list[ast.expr]], deep: int
    ) -> list[str]:
        """What an expression may be as text: several where it has a choice in it."""

        def of(one: ast.expr) -> list[str]:
            return self._templates(module, one, names, deep)

        match node:
            case ast.Constant(value=str() as text):
                return [text]
            case ast.Constant():
                return []
            case ast.JoinedStr(values=parts):
                every = [of(part) or ["{}"] for part in parts]
                return ["".join(one) for one in itertools.product(*every)]
            case ast.FormattedValue():
                return ["{}"]
            case ast.IfExp(body=first, orelse=second):
                return of(first) + of(second)
            case ast.BoolOp(values=values):
                return [text for value in values for text in of(value)]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                pairs = itertools.product(of(left) or [""], of(right) or [""])
                return ["".join(pair) for pair in pairs]
            case ast.Dict(values=values):
                return [text for value in values for text in of(value)]
            case ast.Name(id=name) if deep and (name in names or name in module.values):
                given = names.get(name) or module.values[name]
                return [
                    text for one in given for text in self._templates(module, one, names, deep - 1)
                ]
            case ast.Subscript(value=ast.Name() as table):
                return of(table)
            case ast.Call(func=ast.Attribute(value=ast.Name() as table, attr="get")):
                return of(table)
            case ast.Call(func=ast.Name(id=name)) if deep:
                return self._returned(module, name, "functions", deep) or ["{}"]
            case ast.Attribute(attr=name) if deep and name in _CALLED:
                return self._returned(module, name, "properties", deep) or ["{}"]
            case _:
                return ["{}"]


@functools.cache
def hints() -> dict[str, str]:
    """Each template with the modules that it is in."""
    found: dict[str, set[str]] = {}
    collector = _Collector()
    for module in collector.modules:
        for template in collector.hints_of(module):
            words = " ".join(template.split())
            if any(letter.isalpha() for letter in words.replace("{}", "")):
                found.setdefault(words, set()).add(module.name)
    return {template: ", ".join(sorted(names)) for template, names in sorted(found.items())}


if __name__ == "__main__":
    for template, modules in hints().items():
        print(f"{modules}: {template}")
