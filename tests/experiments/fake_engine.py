"""An engine that answers at once, for the run loop: `python -m tests.experiments.fake_engine NAME FILE [what it does]`.

It writes a line to FILE for each block that it runs, and prints on standard output, as libraries do.
"""

import os
import sys
import time
from pathlib import Path

from experiments.benches.case import Case
from experiments.engines.protocol import Block, Program, serve


class Fake(Program):
    """Named; `dies` at its third block, `sleeps` there, `refuses` every case."""

    def __init__(self) -> None:
        self.name, self.file, self.does = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
        self.blocks = 0
        print("a library says hello")

    def load(self, folder: str, dtype: str = "float32") -> None:
        self._write("loads", Path(folder).name, *([] if dtype == "float32" else [dtype]))

    def prepare(self, case: Case) -> Block:
        if "refuses" in self.does:
            raise ValueError(f"cannot do {case.kind}\nfor reasons of its own")
        return Block(lambda _: self._run(case), facts={"cache_bytes": 8.0 * case.context, "bytes": 1e6})

    def _run(self, case: Case) -> None:
        self.blocks += 1
        if "dies" in self.does and self.blocks == 3:
            print("out of everything", file=sys.stderr, flush=True)
            os._exit(7)
        if "sleeps" in self.does and self.blocks == 3:
            time.sleep(600)
        self._write("runs", str(case.context))

    def _write(self, *words: str) -> None:
        with self.file.open("a") as file:
            file.write(" ".join([self.name, *words]) + "\n")


if __name__ == "__main__":
    serve(Fake)
