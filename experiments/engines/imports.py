"""`import framework` in a new interpreter, as an engine: everybody who uses kvtwin waits for that first."""

import subprocess
import sys

from experiments.bench_case import FLOAT, Case
from experiments.engines.protocol import Block, Program, serve

CODE = "import sys, framework; sys.exit(bool({'torch', 'jax'} & set(sys.modules)))"


class Imports(Program):
    """Starts Python, imports, ends; fails where torch or jax came along."""

    def load(self, folder: str, dtype: str = FLOAT) -> None:
        del folder, dtype

    def prepare(self, case: Case) -> Block:
        del case
        return Block(lambda _: subprocess.run([sys.executable, "-c", CODE], check=True))


if __name__ == "__main__":
    serve(Imports)
