"""Finds the members of a kind: one file in a folder is one member, and the file name is its public name.

A member is spelled `name(field=value, ...)`, with literal values or other members of the kind as arguments. Outside the
repository it is named by a dotted module (`pack.module`, `pack.module:Class`) or by a path (`my.py`, `my.py:Class`).
"""

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import numpy as np

from framework.errors import KvtwinError

Member = TypeVar("Member")

# Modules loaded from a path are called this and a hash of the path and the text: an edited file is a new module.
_LOADED = "_kvtwin_member_"


@dataclass(frozen=True)
class Registry(Generic[Member]):
    """The members of one kind: `kind` is its word in messages, `package` its folder, `base` its base class."""

    kind: str
    package: str
    base: type[Member]

    def names(self) -> tuple[str, ...]:
        """Public names of the bundled members, sorted; nothing is imported."""
        spec = importlib.util.find_spec(self.package)
        folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or []]
        found = {name for folder in folders for entry in folder.iterdir() if (name := _public_name(entry))}
        return tuple(sorted(found))

    def get(self, name: str) -> type[Member]:
        """The class called `name`: a bundled member, a dotted module or a path. Raises KvtwinError."""
        module, class_name = self._module(name)
        candidates = self._defined_in(module)
        if class_name:
            if class_name not in candidates:
                raise KvtwinError(
                    f"{name!r} holds no {self.kind} called {class_name!r}{_near(class_name, candidates)}\n"
                    f"expected {self._expected()}; found: {_listed(candidates)}"
                )
            return candidates[class_name]
        leaves = _leaves(candidates)
        if len(leaves) != 1:
            raise KvtwinError(
                f"{name!r} defines {len(leaves) or 'no'} {self.kind} classes"
                f"{': ' if leaves else ''}{', '.join(each.__name__ for each in leaves)}\n"
                f"expected one final {self._expected()}, defined in this file"
            )
        return leaves[0]

    def make(self, text: str) -> Member:
        """The instance that `text` spells: `snapkv(budget=64, window=16)`, `full()` or just `full`.

        Arguments are literals or members of the same kind; a member in an argument that is named by a path or with a
        colon has its name in quotes: `protect(policy='my.py'(budget=8))`. No other code runs. Raises KvtwinError.
        """
        text = text.strip()
        name, bracket, arguments = text.partition("(")
        # A bare name need not be an expression (it may be a path), so the call is parsed under a stand-in.
        stand_in = f"_({arguments}" if bracket else "_()"
        try:
            call = ast.parse(text if text[:1] in ("'", '"') else stand_in, mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise self._unreadable(text) from error
        if isinstance(call, ast.Call):
            name = _quoted(call.func) or name
        if not name.strip() or not (
            isinstance(call, ast.Call) and isinstance(call.func, (ast.Name, ast.Constant))
        ):
            raise self._unreadable(text)
        return self._build(name.strip(), call, text)

    def spelling(self, instance: Member) -> str:
        """`name(field=value, ...)`, as `make` reads it back; fields equal to their default are left out."""
        return self._spelled(instance, nested=False)

    def _module(self, name: str) -> tuple[ModuleType, str]:
        """The module that `name` names, and the class name after a colon, if any."""
        place, colon, class_name = name.rpartition(":")
        if not (colon and class_name.isidentifier()):
            place, class_name = name, ""
        if place.endswith(".py") or "/" in place or "\\" in place:
            return _load(place, self.kind), class_name
        if "." in place or class_name:
            return _import(place, self.kind), class_name
        if name not in self.names():
            raise KvtwinError(
                f"no {self.kind} is called {name!r}{_near(name, self.names())}\n"
                f"expected one of {_listed(self.names())}, a dotted module, or a path ending in .py"
            )
        return _import(f"{self.package}.{name}", self.kind), ""

    def _defined_in(self, module: ModuleType) -> dict[str, type[Member]]:
        return {
            each.__name__: each
            for each in vars(module).values()
            if isinstance(each, type)
            and issubclass(each, self.base)
            and each is not self.base
            and each.__module__ == module.__name__
        }

    def _build(self, name: str, call: ast.Call, text: str) -> Member:
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise KvtwinError(
                f"{text!r} has an argument without a name\nexpected {name}(field=value, ...), as in budget=64"
            )
        keys = [keyword.arg for keyword in call.keywords]
        if len(set(keys)) < len(keys):
            raise KvtwinError(f"{text!r} gives one argument twice; expected each field once")
        member = self.get(name)
        values = {str(keyword.arg): self._value(keyword.value, text) for keyword in call.keywords}
        _check_fields(member, name, values)
        try:
            return member(**values)
        except KvtwinError:
            raise
        except Exception as error:
            raise KvtwinError(f"{text!r} cannot be made: {_first_line(error)}") from error

    def _value(self, node: ast.expr, text: str) -> Any:
        """A literal, a member, or a tuple of them."""
        if isinstance(node, ast.Tuple):
            return tuple(self._value(each, text) for each in node.elts)
        if isinstance(node, ast.Call) and (name := _quoted(node.func) or _dotted(node.func)):
            return self._build(name, node, ast.unparse(node))
        if (name := _dotted(node)) and ("." in name or name in self.names()):
            return self._build(name, ast.Call(node, [], []), name)
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise KvtwinError(
                f"{text!r} holds {ast.unparse(node)}, which is not a value\n"
                f"expected a number, a string in quotes, True, False, None, a tuple, or a {self.kind}"
            ) from error

    def _spelled(self, instance: Member, nested: bool) -> str:
        name = self._name(type(instance))
        if "(" in name or (nested and not all(part.isidentifier() for part in name.split("."))):
            name = repr(name)
        shown = [
            f"{each.name}={self._literal(value)}"
            for each in (fields(instance) if is_dataclass(instance) else ())
            if each.init and (value := getattr(instance, each.name)) != _default(each)
        ]
        return f"{name}({', '.join(shown)})"

    def _name(self, member: type) -> str:
        """The name by which `get` finds this class."""
        module = member.__module__
        if module.startswith(f"{self.package}."):
            return module.removeprefix(f"{self.package}.")
        if not module.startswith(_LOADED):
            return f"{module}:{member.__qualname__}"
        loaded = sys.modules[module]
        path = Path(str(loaded.__file__))
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        return f"{path}:{member.__qualname__}" if len(_leaves(self._defined_in(loaded))) > 1 else str(path)

    def _literal(self, value: Any) -> str:
        if isinstance(value, self.base):
            return self._spelled(value, nested=True)
        if isinstance(value, tuple):
            return f"({', '.join(map(self._literal, value))}{',' if len(value) == 1 else ''})"
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float) and math.isinf(value):
            return "1e999" if value > 0 else "-1e999"
        return repr(value)

    def _expected(self) -> str:
        return f"subclass of {self.base.__module__}.{self.base.__qualname__}"

    def _unreadable(self, text: str) -> KvtwinError:
        return KvtwinError(
            f"{text!r} does not spell a {self.kind}\nexpected name(field=value, ...), as in snapkv(budget=64)"
        )


def _public_name(entry: Path) -> str:
    """The member that a file or a package folder holds; empty where it holds none."""
    name = entry.stem if entry.suffix == ".py" else entry.name if (entry / "__init__.py").is_file() else ""
    return name if name.isidentifier() and not name.startswith("_") else ""


def _leaves(classes: dict[str, type[Member]]) -> list[type[Member]]:
    """Those of the classes from which none of the others derives."""
    return [
        each
        for each in classes.values()
        if not any(each is not other and issubclass(other, each) for other in classes.values())
    ]


def _import(name: str, kind: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise KvtwinError(
            f"{name!r} is not the name of a module; expected a {kind} as in pack.module or my.py"
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise KvtwinError(
                f"no module is called {error.name!r}, looking for the {kind} {name!r}\n"
                "expected an installed module, or name the file by its path, ending in .py"
            ) from error
        raise _broken(name, kind, error) from error
    except (Exception, SystemExit) as error:
        raise _broken(name, kind, error) from error


def _load(place: str, kind: str) -> ModuleType:
    """The module in the file at `place`, under a private name that depends on its path and text."""
    path = Path(place).expanduser().resolve()
    if path.suffix != ".py" or not path.is_file():
        raise KvtwinError(f"no Python file is at {place!r}; expected the path of a {kind}, ending in .py")
    name = f"{_LOADED}{hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _broken(place, kind, error) from error
    return module


def _broken(place: str, kind: str, error: BaseException) -> KvtwinError:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}, line {error.lineno})"
    elif isinstance(error, ImportError):
        where = ""
    return KvtwinError(f"{place!r} does not import as a {kind}{where}:\n{_first_line(error)}")


def _check_fields(member: type, name: str, values: dict[str, Any]) -> None:
    known = [each for each in fields(member) if each.init] if is_dataclass(member) else []
    names = [each.name for each in known]
    for wrong in [key for key in values if key not in names]:
        raise KvtwinError(
            f"{name} has no field {wrong!r}{_near(wrong, names)}\nexpected one of {_listed(names)}"
        )
    missing = [each.name for each in known if _default(each) is MISSING and each.name not in values]
    if missing:
        raise KvtwinError(f"{name} needs {', '.join(missing)}; expected {name}({missing[0]}=..., ...)")
    if inspect.isabstract(member):
        lacking = ", ".join(sorted(getattr(member, "__abstractmethods__", ())))
        raise KvtwinError(
            f"{name} does not define {lacking}; expected a method of this name in {member.__name__}"
        )


def _default(each: Field) -> Any:
    """A field's default; MISSING, which equals no value, where it has none."""
    return each.default_factory() if each.default_factory is not MISSING else each.default


def _quoted(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _dotted(node: ast.expr) -> str | None:
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else None


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; near: {', '.join(near)}" if near else ""


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["without a message"]
    return f"{type(error).__name__}: {lines[0][:300]}"
