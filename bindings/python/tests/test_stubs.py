"""The stubs name what the compiled half has, and nothing else: no type checker needed."""

from __future__ import annotations

import ast
import inspect
import unittest
from pathlib import Path
from types import FunctionType

import mandoline
from mandoline import _mandoline, aio

#: What every class has, and what PyO3 makes of orders and context managers.
USUAL = {"__doc__", "__module__", "__eq__", "__ne__", "__repr__", "__str__", "__reduce__"}


def members(names: object) -> set[str]:
    return {name for name in names if name not in USUAL}  # type: ignore[attr-defined]


class Stubs(unittest.TestCase):
    def test_the_stubs_and_the_compiled_half_agree(self) -> None:
        stub = ast.parse((Path(mandoline.__file__).parent / "_mandoline.pyi").read_text())
        written = {node.name: node for node in stub.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
        present = {name for name in vars(_mandoline) if not name.startswith("__")}
        self.assertEqual(set(written), present)
        for name, node in written.items():
            if not isinstance(node, ast.ClassDef):
                continue
            said = members(part.name for part in node.body if isinstance(part, ast.FunctionDef))
            there = members(vars(getattr(_mandoline, name)))
            # Of an order, what is written may be less than all six.
            orders = {"__lt__", "__le__", "__gt__", "__ge__"}
            self.assertEqual(said - orders, there - orders, name)
            self.assertLessEqual(said & orders, there, name)
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and not part.name.startswith("__"):
                    self.check_arguments(name, part)

    def check_arguments(self, owner: str, part: ast.FunctionDef) -> None:
        if any(isinstance(mark, ast.Name) and mark.id == "property" for mark in part.decorator_list):
            return
        signature = inspect.signature(getattr(getattr(_mandoline, owner), part.name))
        said = [one.arg for one in part.args.args + part.args.kwonlyargs]
        there = list(signature.parameters)
        self.assertEqual([one for one in said if one != "self"], [one for one in there if one != "self"], f"{owner}.{part.name}")

    def test_both_forms_have_the_same_methods(self) -> None:
        for name in ["Clerk", "Slicelet"]:
            of = [getattr(module, name) for module in (mandoline, aio)]
            plain, waiting = [
                {name for name, value in vars(one).items() if isinstance(value, (FunctionType, property))}
                - {"__enter__", "__exit__", "__aenter__", "__aexit__"}
                for one in of
            ]
            self.assertEqual(plain, waiting)


if __name__ == "__main__":
    unittest.main()
