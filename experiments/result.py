"""One row of results: what was asked, in one spelling, and what came for one seed."""

import hashlib
import json
from dataclasses import asdict, dataclass, field

from experiments.question import Held


@dataclass(frozen=True)
class Cell:
    """What is run as one batch. All is spelled as the registries spell it, so that equal cells are equal texts.

    `policy` is without its budget. `budget`: tokens per kv head where it is a whole number of 1 or more, a share of the
    context where it lies below 1; None under a policy that keeps all, or one whose spelling brings its own for each
    layer or head. `model`: a bundled name, a folder, or "org/name"; `weights`: hash of its files.
    """

    question: str
    model: str
    weights: str
    policy: str
    budget: float | None
    codec: str
    backend: str
    dtype: str

    @property
    def key(self) -> str:
        """A hash of the content, by which a grid is deduplicated and a sweep goes on."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Result:
    """One cell and seed. `measures`, `held`, `said`, `wanted` as in `Answer`; `error` in their place where it failed.

    `seconds`: of the cell, shared evenly among its seeds. `provenance`: versions, git state, machine, time.
    """

    cell: Cell
    seed: int
    measures: dict[str, float] = field(default_factory=dict)
    held: Held | None = None
    said: str = ""
    wanted: str = ""
    seconds: float = 0.0
    error: str = ""
    provenance: dict[str, str] = field(default_factory=dict)
