"""Find mistyped keys and values of a configuration by reading the source of its targets, without importing them."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

_SPECIAL = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}
_SCALARS = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
# How a configuration gives a callable.
_NODE = "a node with _target_"


class ConfigError(ValueError):
    """A user's mistake in the configuration, told in one line."""


class Parameters(NamedTuple):
    """annotations: of each argument of a callable, None where there is none.  open: it takes **keywords.
    module: whose names the annotations use."""

    annotations: dict[str, ast.expr | None]
    open: bool
    module: str


class Definition(NamedTuple):
    """A class or function and the file it stands in."""

    node: ast.ClassDef | ast.FunctionDef
    module: str


def check(config: dict[str, Any], root: type) -> None:
    """Raise ConfigError at the first key or value that the dataclass `root` or the `_target_` of a node does not take.

    config: resolved, plain containers. Values are compared with annotations made of int, float, str, bool, None,
    Literal and Callable; what cannot be read from the source is not checked. A dataclass has checked the types of its
    values itself; its fields may have `choices`, and numbers `least` or `above`, in their metadata.
    """
    _check_fields("", "the configuration", config, root)
    for f in dataclasses.fields(root):
        if dataclasses.is_dataclass(f.default_factory):
            _check_fields(f"{f.name}.", f.name, config[f.name], f.default_factory)
    for path, node in _targets(config, ""):
        _check_node(path, node)


def _check_node(path: str, node: dict[str, Any]) -> None:
    target = node["_target_"]
    parameters = parameters_of(target)
    if parameters is None:
        if target.startswith("fff."):
            module, _, name = target.rpartition(".")
            raise ConfigError(f"{path}._target_: no such class or function {target!r}; {suggest(name, _names(module))}")
        package = target.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{path}._target_={target!r}: no module {package!r} is installed")
        return
    for name, value in node.items():
        if name in _SPECIAL:
            continue
        if name not in parameters.annotations:
            if not parameters.open:
                raise ConfigError(no_such(f"{path}.{name}", target, name, list(parameters.annotations)))
        elif (expected := _mismatch(value, parameters.annotations[name], parameters.module)) is not None:
            raise ConfigError(_takes(f"{path}.{name}", value, target, expected))


def no_such(path: str, owner: str, name: str, valid: Iterable[str]) -> str:
    return f"{path}: {owner} has no {name!r}; {suggest(name, valid)}"


def _takes(path: str, value: Any, owner: str, expected: Iterable[Any]) -> str:
    return f"{path}={value!r}: {owner} takes {' or '.join(map(str, expected))} here"


def suggest(name: str, valid: Iterable[str]) -> str:
    """The nearest of the valid names, or all of them if none is near."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there is {', '.join(valid) or 'nothing to choose from'}"


def _check_fields(path: str, owner: str, node: dict[str, Any], schema: type) -> None:
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for name, value in node.items():
        if name not in fields:
            raise ConfigError(no_such(path + name, owner, name, fields))
        limits = fields[name].metadata
        if "choices" in limits and value not in limits["choices"]:
            raise ConfigError(_takes(path + name, value, owner, limits["choices"]))
        if value is not None and "least" in limits and not value >= limits["least"]:
            raise ConfigError(f"{path}{name}={value} must be at least {limits['least']}")
        if value is not None and "above" in limits and not value > limits["above"]:
            raise ConfigError(f"{path}{name}={value} must be above {limits['above']}")


def _targets(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield path, node
        for key, value in node.items():
            yield from _targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _targets(value, f"{path}[{i}]")


def _mismatch(value: Any, annotation: ast.expr | None, module: str) -> list[Any] | None:
    """What `annotation` allows, if that is simple and `value` is none of it; otherwise None."""
    allowed = _alternatives(annotation, module)
    if allowed is None or (isinstance(value, str) and "${" in value):
        return None
    for option in allowed:
        if option in _SCALARS:
            # A bool is an int to Python, not to a reader of a configuration.
            if isinstance(value, _SCALARS[option]) and (option == "bool" or not isinstance(value, bool)):
                return None
        elif isinstance(value, dict) if option == _NODE else (value == option and type(value) is type(option)):
            return None
    return allowed


def _alternatives(annotation: ast.expr | None, module: str) -> list[Any] | None:
    """Scalar type names, literal values and _NODE that an annotation is made of; None if it holds anything else."""
    match annotation:
        case ast.Name(id=name) if name in _SCALARS:
            return [name]
        case ast.Name(id="Callable") | ast.Subscript(value=ast.Name(id="Callable")):
            return [_NODE]
        case ast.Name(id=name):
            alias = _assigned(module, name)
            return None if alias is None else _alternatives(*alias)
        case ast.Constant(value=None):
            return [None]
        case ast.Constant(value=str(source)):
            return _alternatives(ast.parse(source, mode="eval").body, module)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            sides = _alternatives(left, module), _alternatives(right, module)
            return None if None in sides else sides[0] + sides[1]
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            values = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return [v.value for v in values] if all(isinstance(v, ast.Constant) for v in values) else None
    return None


def is_number(parameters: Parameters, name: str) -> bool:
    """Whether an argument takes any number, by its annotation."""
    return "float" in (_alternatives(parameters.annotations[name], parameters.module) or [])


@cache
def _assigned(module: str, name: str) -> tuple[ast.expr, str] | None:
    """What a name stands for at the top level of a module, for aliases like `Mode = Literal["soft", "hard"]`, and the
    module that says so: this one, or the one of the same package that it is imported from."""
    tree = _parse(module)
    for node in _statements(tree.body) if tree is not None else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value, module
        if isinstance(node, ast.ImportFrom):
            home = _absolute(node, module)
            # What a whole library exports under this name would take long to parse, and is a class more often than not.
            near = home != module and home.partition(".")[0] == module.partition(".")[0]
            for alias in node.names if near else ():
                if (alias.asname or alias.name) == name:
                    return _assigned(home, alias.name)
    return None


@cache
def parameters_of(target: str) -> Parameters | None:
    """Arguments of the class or function with this dotted name; None if its source does not tell."""
    module, _, name = target.rpartition(".")
    definition = _find(module, name)
    return None if definition is None else _parameters(definition)


def _parameters(definition: Definition) -> Parameters | None:
    node = definition.node
    if isinstance(node, ast.FunctionDef):
        return _arguments(node, definition.module, skip=0)
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return _arguments(member, definition.module, skip=1)
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        fields = {m.target.id: m.annotation for m in node.body if isinstance(m, ast.AnnAssign)}
        return Parameters(fields, bool(node.bases), definition.module)
    for base in node.bases:
        found = _find(definition.module, base.id) if isinstance(base, ast.Name) else None
        if found is not None:
            return _parameters(found)
    return None


def _arguments(function: ast.FunctionDef, module: str, skip: int) -> Parameters:
    a = function.args
    named = [*a.posonlyargs, *a.args][skip:] + a.kwonlyargs
    return Parameters({argument.arg: argument.annotation for argument in named}, a.kwarg is not None, module)


def _find(module: str, name: str, seen: frozenset[str] = frozenset()) -> Definition | None:
    """The class or function `name` of `module`, through imports from other modules and fff's table of homes."""
    tree = _parse(module)
    if tree is None or module in seen:
        return None
    seen = seen | {module}
    for node in _statements(tree.body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return Definition(node, module)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find(_absolute(node, module), alias.name)
                if alias.name == "*" and (found := _find(_absolute(node, module), name, seen)):
                    return found
    home = _homes(tree).get(name)
    return None if home is None else _find(home, name)


def _names(module: str) -> list[str]:
    tree = _parse(module)
    if tree is None:
        return []
    defined = [n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    imported = [alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names]
    return [*defined, *imported, *_homes(tree)]


def _homes(tree: ast.Module) -> dict[str, str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME":
            return ast.literal_eval(node.value)
    return {}


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if node.level == 0:
        return node.module or ""
    file = _file(module)
    package = module.split(".") if file is not None and file.name == "__init__.py" else module.split(".")[:-1]
    package = package[: len(package) - (node.level - 1)]
    return ".".join([*package, node.module] if node.module else package)


@cache
def _parse(module: str) -> ast.Module | None:
    file = _file(module)
    return None if file is None else ast.parse(file.read_text(encoding="utf-8"))


@cache
def _file(module: str) -> Path | None:
    """Source file of a module. Only the folders of its top-level package are looked up: finding a submodule by
    importlib would import its parents."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top) if top else None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or []:
        path = Path(folder, *rest)
        for file in (path / "__init__.py", path.with_name(path.name + ".py")):
            if file.is_file():
                return file
    return None
