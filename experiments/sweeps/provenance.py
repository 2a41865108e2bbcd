"""Where a result comes from: the text and the libraries that computed it, the state of the checkout, the machine."""

import ast
import hashlib
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from experiments.benches.row import machine
from experiments.question import questions
from experiments.record import versions
from experiments.result import Cell
from framework.codec import codecs
from framework.policy import policies

ROOT = Path(__file__).parents[2]
ASKING = ROOT / "experiments" / "sweeps" / "asking.py"


def version(cell: Cell) -> str:
    """A checksum of what computes a cell: another one means that the result may be another one.

    It covers framework, backends, the question, its policy and codec wherever their files lie, what these import of
    experiments, how they are asked, and the versions of the libraries. What a file outside kvtwin imports from other
    files outside is not covered.
    """
    members = [questions.make(cell.question), policies.make(cell.policy), codecs.make(cell.codec)]
    own = {file for member in members for file in _files(member)}
    digest = hashlib.sha256(_machinery().encode())
    for file in sorted({ASKING} | _with_imports(own), key=lambda one: (one.name, str(one))):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def provenance(version: str) -> dict[str, str]:
    """What is to be known of a result that is computed now, in this process."""
    return {**_here(), "version": version, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


@cache
def _libraries() -> dict[str, str]:
    return {**versions(), "python": platform.python_version()}


@cache
def _machinery() -> str:
    """A checksum of framework, backends and the libraries, as they were when this process first asked."""
    digest = hashlib.sha256(repr(sorted(_libraries().items())).encode())
    files = [file for package in ("framework", "backends") for file in (ROOT / package).rglob("*.py")]
    for file in sorted(files):
        digest.update(str(file.relative_to(ROOT)).encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@cache
def _here() -> dict[str, str]:
    told = machine()
    return {
        **_libraries(),
        "commit": _git("rev-parse", "HEAD") or "",
        "dirty": {None: "", "": "no"}.get(_git("status", "--porcelain", "--untracked-files=no"), "yes"),
        "cpu": str(told["cpu"]),
        "cores": str(told["cores"]),
    }


def _git(*words: str) -> str | None:
    """What git says of the checkout that this file lies in; None where it lies in none, or where there is no git."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _files(member: Any) -> Iterator[Path]:
    """The files that define a member and the members inside it."""
    if isinstance(member, tuple):
        for each in member:
            yield from _files(each)
    if not is_dataclass(member) or isinstance(member, type):
        return
    for kind in type(member).__mro__:
        place = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if place and kind is not object:
            yield Path(place)
    for each in fields(member):
        yield from _files(getattr(member, each.name))


def _with_imports(files: set[Path]) -> set[Path]:
    """The files, and those of experiments that they import, wherever in their text."""
    found: set[Path] = set()
    ahead = set(files)
    while ahead:
        file = ahead.pop()
        found.add(file)
        ahead |= _imported(file.read_bytes()) - found
    return found


@cache
def _imported(text: bytes) -> frozenset[Path]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
    files = {ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith("experiments.")}
    return frozenset(file for file in files if file.is_file())
