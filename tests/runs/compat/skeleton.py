"""Skeletons of vLLM's modules, read from a wheel: names and signatures without bodies.

A build for GPUs cannot be imported without a GPU. The hook relies only on names and signatures,
which the source contains.
"""

import ast
import importlib
import sys
import zipfile
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


class WheelFinder(MetaPathFinder, Loader):
    """Makes `import vllm…` find the skeletons of one wheel, even if vLLM is installed."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = zipfile.ZipFile(wheel)
        self.files = set(self.wheel.namelist())

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """None for other packages; raises for a vLLM module that the wheel does not contain."""
        if name.partition(".")[0] != "vllm":
            return None
        stem = name.replace(".", "/")
        for file, is_package in ((f"{stem}/__init__.py", True), (f"{stem}.py", False)):
            if file in self.files:
                return ModuleSpec(name, self, origin=file, is_package=is_package)
        raise ModuleNotFoundError(name, name=name)

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module with skeletons of all names that its source defines or imports."""
        assert module.__spec__ is not None
        source = self.wheel.read(str(module.__spec__.origin)).decode()
        for statement in _top_level(ast.parse(source).body):
            for name in _bound(statement):
                if not name.startswith("__"):  # Python itself would call a module's __getattr__
                    setattr(module, name, object())
            match statement:
                case ast.ImportFrom(module=str(where), level=0) if hasattr(module, "__path__"):
                    self._re_export(module, where, statement.names)
                case ast.ClassDef():
                    setattr(module, statement.name, _skeleton(statement, vars(module)))
                case ast.FunctionDef() | ast.AsyncFunctionDef() if statement.name != "__getattr__":
                    setattr(module, statement.name, _without_body(statement))

    def _re_export(self, package: ModuleType, module: str, names: list[ast.alias]) -> None:
        """Re-export from a package the names that it imports from vLLM's modules."""
        if module.partition(".")[0] == "vllm":
            found = importlib.import_module(module)
            for alias in names:
                setattr(package, alias.asname or alias.name, getattr(found, alias.name, object()))


def install(wheel: Path) -> None:
    """Make `import vllm` import this wheel's skeletons from now on."""
    assert not any(name.partition(".")[0] == "vllm" for name in sys.modules)
    sys.meta_path.insert(0, WheelFinder(wheel))


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at import, including those under `if` and `try`."""
    for statement in body:
        yield statement
        for part in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try):
                yield from _top_level(getattr(statement, part, []))


def _bound(statement: ast.stmt) -> list[str]:
    """The names that a statement defines in its module."""
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return [name]
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return [alias.asname or alias.name.partition(".")[0] for alias in names]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def _skeleton(found: ast.ClassDef, known: dict[str, object]) -> type:
    """A class with its methods' parameters and the bases that the same module defines."""
    bases = [known.get(base.id) for base in found.bases if isinstance(base, ast.Name)]
    members: dict[str, object] = {}
    fields = []
    for statement in found.body:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                members[statement.name] = _without_body(statement)
            case ast.AnnAssign(target=ast.Name(id=name)):
                fields.append(name)
    members["__annotations__"] = dict.fromkeys(fields, object)
    if any(ast.unparse(base) == "msgspec.Struct" for base in found.bases):
        members["__struct_fields__"] = tuple(fields)
    return type(found.name, tuple(base for base in bases if isinstance(base, type)), members)


def _without_body(found: ast.FunctionDef | ast.AsyncFunctionDef) -> object:
    """A function with these parameters, without annotations; defaults are None.

    Of its body only the names of the attributes are left that it sets on `self`.
    """
    parameters = found.args
    for parameter in ast.walk(parameters):
        if isinstance(parameter, ast.arg):
            parameter.annotation = None
    parameters.defaults = [ast.Constant(None) for _ in parameters.defaults]
    parameters.kw_defaults = [d and ast.Constant(None) for d in parameters.kw_defaults]
    body = [ast.parse(f"self.{name} = None").body[0] for name in _set_on_self(found)]
    bare = ast.FunctionDef(
        name="bare", args=parameters, body=body or [ast.Pass()], decorator_list=[]
    )
    module = ast.Module([bare], type_ignores=[])
    names: dict[str, object] = {}
    exec(compile(ast.fix_missing_locations(module), "<wheel>", "exec"), names)  # noqa: S102
    return names["bare"]


def _set_on_self(found: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The attributes that a method sets on `self`."""
    return [
        node.attr
        for statement in found.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    ]
