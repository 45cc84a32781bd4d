"""Every hint that is written in imgtool's code, as a template with `{}` for what is filled in."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Called with a hint as this argument, by its place (or by `hint=` anywhere).
_PLACES = {"Finding": 4, "_Known": 2, "Packed": 2, "Said": 1, "hint": 0}


def _templates(node: ast.expr) -> list[str]:
    """What an expression may be as text: several where it has a choice in it."""
    match node:
        case ast.Constant(value=str() as text):
            return [text]
        case ast.Constant():
            return []
        case ast.JoinedStr(values=parts):
            every = [_templates(part) or ["{}"] for part in parts]
            return ["".join(one) for one in itertools.product(*every)]
        case ast.FormattedValue():
            return ["{}"]
        case ast.IfExp(body=first, orelse=second):
            return _templates(first) + _templates(second)
        case ast.BoolOp(values=values):
            return [text for value in values for text in _templates(value)]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            pairs = itertools.product(_templates(left) or [""], _templates(right) or [""])
            return ["".join(pair) for pair in pairs]
        case _:
            return ["{}"]


def _hints_in(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        yield from (word.value for word in node.keywords if word.arg == "hint")
        name = node.func.attr if isinstance(node.func, ast.Attribute) else None
        name = node.func.id if isinstance(node.func, ast.Name) else name
        place = _PLACES.get(name or "")
        if place is not None and len(node.args) > place:
            yield node.args[place]


def hints() -> dict[str, str]:
    """Each template with the modules that it is in."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "imgtool").rglob("*.py")):
        for expression in _hints_in(ast.parse(path.read_text())):
            for template in _templates(expression):
                words = " ".join(template.split())
                if any(letter.isalpha() for letter in words.replace("{}", "")):
                    found.setdefault(words, set()).add(str(path.relative_to(ROOT / "imgtool")))
    return {template: ", ".join(sorted(names)) for template, names in sorted(found.items())}


if __name__ == "__main__":
    for template, modules in hints().items():
        print(f"{modules}: {template}")
