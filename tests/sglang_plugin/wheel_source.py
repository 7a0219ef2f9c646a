"""Look a dotted path up in a wheel's source, without importing it."""

import ast
import zipfile
from functools import cache
from pathlib import Path


@cache
def parse(wheel: Path, member: str) -> ast.Module | None:
    """The syntax tree of one file of a wheel, or None if it has no such file."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            return ast.parse(archive.read(member))
        except KeyError:
            return None


def find(wheel: Path, dotted: str) -> ast.AST | None:
    """Return the definition (def, class or assignment) at ``dotted``, or None."""
    parts = dotted.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = parse(wheel, "/".join(parts[:length]) + ".py")
        if module is not None:
            return _descend(module, parts[length:])
    return None


def _descend(node: ast.AST, names: list[str]) -> ast.AST | None:
    for name in names:
        found = [child for child in getattr(node, "body", ()) if name in _names(child)]
        if not found:
            return None
        # A class may be rebuilt by an assignment to its own name below it.
        node = next((child for child in found if isinstance(child, ast.ClassDef)), found[-1])
    return node


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def is_registered(wheel: Path, dotted: str, key: str) -> bool:
    """True if the module of the dictionary ``dotted`` registers ``key`` in it at import.

    Knows SGLang's two ways: ``@register_...("key")`` and ``Registry.register("key", ...)``.
    """
    parts = dotted.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = parse(wheel, "/".join(parts[:length]) + ".py")
        if module is not None:
            return any(
                isinstance(node, ast.Call)
                and "register" in ast.unparse(node.func)
                and node.args
                and isinstance(node.args[0], ast.Constant)
                and node.args[0].value == key
                for node in ast.walk(module)
            )
    return False


def used_of(wheel: Path, module: str, name: str) -> set[str]:
    """The attributes that a module uses of what it imports under ``name``; none if it does not."""
    tree = parse(wheel, module.replace(".", "/") + ".py")
    if tree is None or not any(
        isinstance(node, ast.Import)
        and name in [alias.asname or alias.name for alias in node.names]
        for node in tree.body
    ):
        return set()
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == name
    }
