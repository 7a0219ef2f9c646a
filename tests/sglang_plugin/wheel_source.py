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


HTTP_SERVER = "sglang/srt/entrypoints/http_server.py"


def routes_of(wheel: Path) -> set[str]:
    """The routes of a wheel's HTTP server as "GET /path", with those of the routers it includes."""
    tree = parse(wheel, HTTP_SERVER)
    assert tree is not None
    found = _declared(tree, "app")
    included = {
        ast.unparse(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "app.include_router"
    }
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if (alias.asname or alias.name) in included:
                assert isinstance(node, ast.ImportFrom)
                assert node.module
                module = parse(wheel, node.module.replace(".", "/") + ".py")
                assert module is not None
                found |= _declared(module, alias.name)
                included.remove(alias.asname or alias.name)
    assert not included, f"{wheel}: not found where {included} come from"
    return found


def _declared(tree: ast.Module, name: str) -> set[str]:
    """The routes that functions of a module are decorated with, of the object ``name``."""
    found = set()
    for function in ast.walk(tree):
        for call in getattr(function, "decorator_list", ()):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            if ast.unparse(call.func.value) != name or call.func.attr == "exception_handler":
                continue
            path = call.args[0]
            if isinstance(path, ast.Call):  # os.environ.get(NAME, default)
                path = path.args[1]
            if isinstance(path, ast.Name):  # set by a variable only
                continue
            assert isinstance(path, ast.Constant), ast.unparse(call)
            assert isinstance(path.value, str)
            methods = [word.value for word in call.keywords if word.arg == "methods"]
            names = ast.literal_eval(methods[0]) if methods else [call.func.attr.upper()]
            found |= {f"{method} {path.value}" for method in names}
    return found
