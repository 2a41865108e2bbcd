"""How an engine's program talks: a request a line on standard input, an answer a line on standard output, in JSON.

    {"do": "load", "folder": ..., "dtype": ...}    {"seconds": ...}
    {"do": "prepare", "case": {...}}   {"seconds": of the first block, "facts": {...}}
    {"do": "run", "case": {...}}       {"seconds": of a block}
    {"do": "forget"}                   {}

The first line of all is an answer without a request: {} once the libraries are imported. An answer with "error" says
that the request failed; the program goes on. It ends with its input.

The program may run in another environment, so that only the standard library is imported here.
"""

import json
import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TextIO

from experiments.benches.case import FLOAT, Case

Answer = dict[str, Any]


def nothing() -> None:
    """No state."""


@dataclass(frozen=True)
class Block:
    """What is timed: `work` on what `fresh` gives, which is made before the clock runs. `facts`: numbers to record.
    `settle`: waits until what was begun is done."""

    work: Callable[[Any], Any]
    fresh: Callable[[], Any] = nothing
    facts: dict[str, float] = field(default_factory=dict)
    settle: Callable[[], None] = nothing

    def seconds(self) -> float:
        """Of one run."""
        state = self.fresh()
        self.settle()
        begun = time.perf_counter()
        result = self.work(state)
        self.settle()
        ended = time.perf_counter()
        del state, result  # freed off the clock
        return ended - begun


class Program(ABC):
    """One engine in a process of its own. Making it imports its libraries."""

    @abstractmethod
    def load(self, folder: str, dtype: str = FLOAT) -> None:
        """Read a model from a Hugging Face folder, to compute in this dtype."""

    @abstractmethod
    def prepare(self, case: Case) -> Block:
        """What is timed in this case; raises where the engine cannot do it."""


def serve(make: Callable[[], Program]) -> None:
    """Answer until the input ends."""
    # What libraries print goes to standard error, where it cannot break a line.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    served = Served(make)
    _answer(out, served.begin)
    for line in sys.stdin:
        _answer(out, partial(served.answer, json.loads(line)))


@dataclass
class Served:
    """A program and the blocks that it has prepared, by case."""

    make: Callable[[], Program]
    program: Program | None = None
    blocks: dict[str, Block] = field(default_factory=dict)

    def begin(self) -> Answer:
        """Make the program."""
        self.program = self.make()
        return {}

    def answer(self, request: dict[str, Any]) -> Answer:
        """What a request is answered with."""
        assert self.program is not None
        if request["do"] == "forget":
            self.blocks.clear()
            return {}
        if request["do"] == "load":
            begun = time.perf_counter()
            self.program.load(request["folder"], request["dtype"])
            return {"seconds": time.perf_counter() - begun}
        case = Case(**request["case"])
        if request["do"] == "prepare":
            block = self.blocks[str(case)] = self.program.prepare(case)
            return {"seconds": block.seconds(), "facts": block.facts}
        return {"seconds": self.blocks[str(case)].seconds()}


def _answer(out: TextIO, act: Callable[[], Answer]) -> None:
    try:
        answer = act()
    except Exception as error:  # any: the libraries raise what they like, and the other cases go on
        traceback.print_exc()
        reason = str(error).strip().splitlines() or ["no reason given"]
        answer = {"error": f"{type(error).__name__}: {reason[0]}"}
    print(json.dumps(answer), file=out, flush=True)
