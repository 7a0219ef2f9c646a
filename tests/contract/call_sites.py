"""Find, by parsing, where a SGLang wheel calls kt_kernel and with what arguments."""

import ast
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WRAPPER_CLASS = "KTMoEWrapper"
MASK_FUNCTION = "generate_gpu_experts_masks"
WRAPPER_MODULE = "sglang/srt/layers/moe/kt_ep_wrapper.py"


@dataclass(frozen=True)
class Call:
    """One call: how many positional arguments, and which keywords, it always passes."""

    where: str
    function: str
    positional: int
    keywords: tuple[str, ...]
    constants: tuple[tuple[str, object], ...] = ()
    """Keywords whose value is a literal."""

    def __str__(self) -> str:
        return f"{self.function} at {self.where}"


@dataclass(frozen=True)
class CallSites:
    """Everything one wheel asks of kt_kernel."""

    imports: tuple[tuple[str, str], ...]
    """(where, name) of each ``from kt_kernel import name`` at module level."""
    constructions: tuple[Call, ...]
    static_calls: tuple[Call, ...]
    method_calls: tuple[Call, ...]
    mask_calls: tuple[Call, ...]


def extract(wheel: Path) -> CallSites:
    """Read every module of ``wheel`` that names kt_kernel."""
    imports: list[tuple[str, str]] = []
    constructions: list[Call] = []
    static_calls: list[Call] = []
    method_calls: list[Call] = []
    mask_calls: list[Call] = []
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if not member.endswith(".py"):
                continue
            source = archive.read(member).decode()
            if "kt_kernel" not in source:
                continue
            module = ast.parse(source)
            imports += _module_level_imports(module, member)
            for call, scope in _calls(module):
                where = f"{member}:{call.lineno}"
                match call.func:
                    case ast.Name(id=name) if name == WRAPPER_CLASS:
                        constructions.append(_describe(call, scope, where, name))
                    case ast.Name(id=name) if name == MASK_FUNCTION:
                        mask_calls.append(_describe(call, scope, where, name))
                    case ast.Attribute(value=ast.Name(id=owner), attr=method) if (
                        owner == WRAPPER_CLASS
                    ):
                        static_calls.append(_describe(call, scope, where, method))
                    # Only SGLang's wrapper module names its KTMoEWrapper "wrapper".
                    case ast.Attribute(value=owner_node, attr=method) if (
                        member == WRAPPER_MODULE and _last_name(owner_node) == "wrapper"
                    ):
                        method_calls.append(_describe(call, scope, where, method))
    return CallSites(
        tuple(imports),
        tuple(constructions),
        tuple(static_calls),
        tuple(method_calls),
        tuple(mask_calls),
    )


def _module_level_imports(module: ast.Module, member: str) -> Iterator[tuple[str, str]]:
    for statement in module.body:
        # SGLang guards the import with try; what it imports there is still required.
        inner = statement.body if isinstance(statement, ast.Try) else [statement]
        for node in inner:
            if isinstance(node, ast.ImportFrom) and node.module == "kt_kernel":
                for alias in node.names:
                    yield f"{member}:{node.lineno}", alias.name


def _calls(module: ast.Module) -> Iterator[tuple[ast.Call, ast.AST]]:
    """Yield each call with the innermost function (or the module) it is in."""

    def visit(node: ast.AST, scope: ast.AST) -> Iterator[tuple[ast.Call, ast.AST]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            scope = node
        if isinstance(node, ast.Call):
            yield node, scope
        for child in ast.iter_child_nodes(node):
            yield from visit(child, scope)

    yield from visit(module, module)


def _describe(call: ast.Call, scope: ast.AST, where: str, function: str) -> Call:
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        raise ValueError(f"{where}: {function}(*...) cannot be counted")
    keywords: list[str] = []
    constants: list[tuple[str, object]] = []
    for keyword in call.keywords:
        if keyword.arg is None:
            keywords += _keys_of(keyword.value, scope, where)
            continue
        keywords.append(keyword.arg)
        if isinstance(keyword.value, ast.Constant):
            constants.append((keyword.arg, keyword.value.value))
    return Call(where, function, len(call.args), tuple(keywords), tuple(constants))


def _keys_of(value: ast.expr, scope: ast.AST, where: str) -> list[str]:
    """Keys that ``**value`` may pass: of dict(...), {...}, a choice, or a name so assigned."""
    match value:
        case ast.Name(id=name):
            assigned = [
                node.value
                for node in ast.walk(scope)
                if isinstance(node, ast.Assign)
                and any(
                    isinstance(target, ast.Name) and target.id == name for target in node.targets
                )
            ]
            if not assigned:
                raise ValueError(f"{where}: nothing assigned to **{name} in the same function")
            return [key for each in assigned for key in _keys_of(each, scope, where)]
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            keys: list[str] = []
            for keyword in keywords:
                keys += (
                    _keys_of(keyword.value, scope, where) if keyword.arg is None else [keyword.arg]
                )
            return keys
        case ast.Dict(keys=dict_keys):
            if not all(isinstance(key, ast.Constant) for key in dict_keys):
                raise ValueError(f"{where}: a ** dictionary has computed keys")
            return [str(key.value) for key in dict_keys if isinstance(key, ast.Constant)]
        case ast.IfExp(body=body, orelse=orelse):
            return _keys_of(body, scope, where) + _keys_of(orelse, scope, where)
    raise ValueError(f"{where}: cannot tell the keys of **{ast.unparse(value)}")


def _last_name(node: ast.expr) -> str | None:
    """``wrapper`` for ``wrapper`` and for ``self.wrapper``."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    return None
