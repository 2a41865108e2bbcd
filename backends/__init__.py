"""How it runs: one folder per library, each under the contract of `framework.backend`."""

import difflib
import importlib
from dataclasses import dataclass

from framework.backend import Backend
from framework.errors import KvtwinError

MODULES = {"reference": "framework.reference", "torch": "backends.torch", "flax": "backends.flax"}


@dataclass(frozen=True)
class Backends:
    """The backends by name; a library is imported only when its backend is asked for."""

    def names(self) -> list[str]:
        """All names."""
        return list(MODULES)

    def get(self, name: str) -> Backend:
        """The backend of this name."""
        if name not in MODULES:
            near = difflib.get_close_matches(name, MODULES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise KvtwinError(f"no backend {name!r}{hint}\nexpected one of {', '.join(MODULES)}")
        return importlib.import_module(MODULES[name]).Backend()


backends = Backends()
