"""Workers of a sweep as processes of this machine, asked over pipes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

from experiments.benches.engine import cores
from experiments.result import Result
from experiments.sweeps.asking import Job
from experiments.sweeps.workers import Died, Engine, Worker
from framework.errors import KvtwinError

READY = "ready"
GRACE = 5.0  # seconds to end, for a process that has closed its pipe
# What libraries read when they start: threads for products, and for what XLA compiles.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PJRT_NPROC")


def importable() -> str:
    """Where this process finds modules, as PYTHONPATH."""
    return os.pathsep.join(dict.fromkeys(os.path.abspath(each) for each in sys.path))


class LocalWorker(Worker):
    """A process that runs experiments/sweeps/worker.py. What it writes is kept for the case that it dies."""

    def __init__(self, environment: dict[str, str]):
        self.log = tempfile.TemporaryFile()
        self.pipe, theirs = multiprocessing.Pipe()
        self.started = False
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "experiments.sweeps.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                env=environment,
            )

    def give(self, job: Job) -> None:
        with suppress(OSError):  # it has ended: `take` says how
            self.pipe.send(job)

    def take(self) -> list[Result] | None:
        try:
            told: Any = self.pipe.recv()
        except (EOFError, OSError):
            if self.started:
                raise Died(self._end()) from None
            raise KvtwinError(f"a worker process does not start: {self._end()}") from None
        if told == READY:
            self.started = True
            return None
        return told

    def _end(self) -> str:
        """How it ended, with the last words that it wrote."""
        try:
            code = self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.log.seek(0)
        words = self.log.read().decode(errors="replace").strip().splitlines()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        return f"{how}{f': {words[-1][:300]}' if words else ''}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()
        self.log.close()


class Processes(Engine):
    """So many processes at once, each with its share of the cores."""

    def __init__(self, count: int):
        share = str(max(1, cores() // count))
        self.environment = {**dict.fromkeys(THREADS, share), **os.environ, "PYTHONPATH": importable()}

    def start(self) -> LocalWorker:
        return LocalWorker(self.environment)

    def ready(self, workers: Sequence[Worker]) -> list[Worker]:
        pipes = {each.pipe: each for each in workers if isinstance(each, LocalWorker)}
        return [pipes[pipe] for pipe in wait(list(pipes)) if pipe in pipes]
