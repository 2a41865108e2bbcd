"""The read bandwidth of the machine: a large sum on all cores. It competes with nobody: the others are held to it."""

from typing import Any

from experiments.bench_case import Case
from experiments.engines.protocol import Block, Program, serve

BYTES = 1 << 29  # many times the caches of a processor


class Meter(Program):
    """A tensor that is summed."""

    def __init__(self) -> None:
        import torch

        self.data: Any = torch.ones(BYTES // 4)

    def load(self, folder: str) -> None:
        del folder  # there is no model

    def prepare(self, case: Case) -> Block:
        del case
        return Block(lambda _: self.data.sum(), facts={"bytes": BYTES})


if __name__ == "__main__":
    serve(Meter)
