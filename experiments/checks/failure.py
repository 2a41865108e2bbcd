"""What a check of `kvtwin check` says where it fails, and what it makes of an exception."""

import inspect
import linecache
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framework.errors import KvtwinError
from framework.policy import Policy


@dataclass(frozen=True)
class Failure:
    """What failed, where, and the smallest example that shows it."""

    what: str
    where: Mapping[str, Any] = field(default_factory=dict)
    example: Mapping[str, Any] = field(default_factory=dict)


def broken(policy: Policy, error: Exception, library: str = "") -> Failure:
    """The failure that an exception stands for: its message, and the call and line of the policy's file."""
    cause = error.__cause__ if isinstance(error, KvtwinError) and error.__cause__ is not None else error
    where: dict[str, Any] = {"library": library} if library else {}
    frames = [
        frame for frame in traceback.extract_tb(cause.__traceback__) if frame.filename in sources(policy)
    ]
    if frames:
        where |= {"file": Path(frames[-1].filename).name, "line": frames[-1].lineno}
        where |= {"call": (linecache.getline(frames[-1].filename, frames[-1].lineno or 0)).strip()}
    if cause is error:
        text = str(error)
    else:
        text = f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0][:300]}"
    if "NoneType" in text:
        text += " (is what it reads declared in `needs`?)"
    head, _, example = text.partition("\npositions ")
    return Failure(head, where, {"positions": example} if example else {})


def sources(policy: Policy) -> set[str]:
    """Files that define the policy's class and its bases, except the contract itself."""
    kinds = [kind for kind in type(policy).__mro__ if issubclass(kind, Policy) and kind is not Policy]
    return {str(inspect.getsourcefile(kind)) for kind in kinds}
