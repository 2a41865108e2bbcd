"""Importing what is under `framework` in a new interpreter, as an engine: both backends wait for that first."""

import subprocess
import sys

from experiments.benches.case import FLOAT, Case
from experiments.engines.protocol import Block, Program, serve

MODULES = "framework.backend, framework.codec, framework.generate, framework.policy, framework.weights"
CODE = f"import sys, {MODULES}; sys.exit('torch' in sys.modules or 'jax' in sys.modules)"


class Imports(Program):
    """Starts Python, imports, ends; fails where torch or jax came along."""

    def load(self, folder: str, dtype: str = FLOAT) -> None:
        del folder, dtype

    def prepare(self, case: Case) -> Block:
        del case
        return Block(lambda _: subprocess.run([sys.executable, "-c", CODE], check=True))


if __name__ == "__main__":
    serve(Imports)
