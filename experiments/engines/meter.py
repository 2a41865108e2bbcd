"""The read bandwidth of the machine, or of its GPU where the program may see one: a large sum on all cores. It competes
with nobody: the others are held to it."""

from typing import Any

from experiments.benches.case import FLOAT, Case
from experiments.engines.protocol import Block, Program, serve
from experiments.engines.settling import settle_torch

BYTES = 1 << 29  # many times the caches of a processor
ON_GPU = 1 << 32  # so many that starting the sum takes no time beside it


class Meter(Program):
    """A tensor that is summed."""

    def __init__(self) -> None:
        import torch

        there = torch.cuda.is_available()
        self.bytes = ON_GPU if there else BYTES
        self.data: Any = torch.ones(self.bytes // 4, device="cuda" if there else "cpu")

    def load(self, folder: str, dtype: str = FLOAT) -> None:
        del folder, dtype  # there is no model

    def prepare(self, case: Case) -> Block:
        del case
        return Block(lambda _: self.data.sum(), facts={"bytes": self.bytes}, settle=settle_torch)


if __name__ == "__main__":
    serve(Meter)
