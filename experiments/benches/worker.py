"""An engine's program as a process that is asked (experiments/engines/protocol.py), and the processes of a run."""

import json
import os
import select
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.benches.case import NONE, Case
from experiments.benches.engine import ROOT, Engine, Failed, environment
from framework.errors import KvtwinError

PATIENCE = 1800.0  # seconds until an engine counts as hung
GRACE = 2.0  # seconds to end by itself
TICKS = os.sysconf("SC_CLK_TCK")
READINGS = 5  # sums in a reading of the bandwidth


class Worker:
    """An engine's program, running. What it writes to standard error is appended to `log`."""

    def __init__(self, engine: Engine, log: Path, place: Path, env: Mapping[str, str]):
        self.log, self.loaded, self._rest = log, "", b""
        with log.open("ab") as errors:
            self._log_start = errors.tell()
            try:
                self.process = subprocess.Popen(
                    [engine.python, "-m", engine.program, *engine.words],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    cwd=place,
                    env=dict(env),
                    bufsize=0,
                    start_new_session=True,  # Ctrl-C is for the one who asks
                )
            except OSError as error:
                raise Failed(f"{engine.python} does not start: {error.strerror or error}") from None
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """The answer to a request. Raises Failed."""
        assert self.process.stdin is not None
        if self.process.stdin.closed:
            raise Failed("was ended, since it did not answer")
        with suppress(BrokenPipeError):  # it has ended: the answer says how
            self.process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        answer = json.loads(self._line())
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        pipe, until = self.process.stdout.fileno(), time.monotonic() + PATIENCE
        while b"\n" not in self._rest:
            ready, _, _ = select.select([pipe], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                self.close()
                raise Failed(f"no answer within {PATIENCE:.0f} s")
            piece = os.read(pipe, 1 << 16)
            if not piece:
                raise Failed(self._end())
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _end(self) -> str:
        """How it ended, with the last words that it wrote."""
        code = self.process.wait()
        with self.log.open("rb") as errors:
            errors.seek(self._log_start)
            words = errors.read().decode(errors="replace").strip().splitlines()
        how = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"{how}{f': {words[-1]}' if words else ''}"

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def resident(self, peak: bool = False) -> int | None:
        """Bytes of memory that it has, or had at most; None where the system does not say."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return None
        found = [line.split()[1] for line in status.splitlines() if line.startswith(_field(peak))]
        return 1024 * int(found[0]) if found else None

    def ticks(self) -> tuple[float, float] | None:
        """Seconds of cores that it and that anything else took so far; None where the system does not say."""
        try:
            every = [int(each) for each in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
            own = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        mine, idle = sum(int(each) for each in own[11:13]), every[3] + every[4]
        return mine / TICKS, (sum(every) - idle - mine) / TICKS

    def close(self) -> None:
        """End it."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # and what it has started
            self.process.wait()


def _field(peak: bool) -> str:
    return "VmHWM:" if peak else "VmRSS:"


class Meter:
    """The read bandwidth of the machine, by a process that sums a large array on all cores."""

    def __init__(self, start: Callable[[], Worker]):
        self.case = asdict(Case("import", NONE))
        with _without_which_nothing_goes():
            self.worker = start()
            self.bytes = self.worker.ask("prepare", case=self.case)["facts"]["bytes"]

    def read(self) -> float:
        """Bytes in a second now, the median of a few sums."""
        with _without_which_nothing_goes():
            seconds = [self.worker.ask("run", case=self.case)["seconds"] for _ in range(READINGS)]
        return float(self.bytes / statistics.median(seconds))

    def close(self) -> None:
        """End the process."""
        self.worker.close()


@contextmanager
def _without_which_nothing_goes() -> Iterator[None]:
    try:
        yield
    except Failed as error:
        raise KvtwinError(f"the read bandwidth of the machine cannot be measured: {error}") from None


@dataclass
class Workers:
    """The processes of a run, by engine. `foreign`: the folder from which other interpreters import the programs.
    `gpu`: whether they may see one."""

    logs: Path
    foreign: Path
    gpu: bool = False
    running: dict[str, Worker] = field(default_factory=dict)

    def new(self, engine: Engine, compile_cache: Path | None = None) -> Worker:
        """A process that is no part of this."""
        place = self.foreign if engine.foreign else ROOT
        return Worker(
            engine, self.logs / f"{engine.name}.log", place, environment(engine, compile_cache, self.gpu)
        )

    def get(self, engine: Engine, folder: str, dtype: str) -> Worker:
        """The engine's process with this model loaded; a new one where it has ended, or holds another model."""
        worker, what = self.running.get(engine.name), f"{folder} {dtype}"
        if worker is None or not worker.alive or worker.loaded != what:
            self.end([engine.name])
            worker = self.running[engine.name] = self.new(engine)
            worker.ask("load", folder=folder, dtype=dtype)
            worker.loaded = what
        return worker

    def end(self, names: Sequence[str]) -> None:
        """End these processes."""
        for each in names:
            if each in self.running:
                self.running.pop(each).close()

    def keep(self, names: Sequence[str]) -> None:
        """End all but these, which forget the cases that they had prepared."""
        self.end([each for each in self.running if each not in names])
        for each in list(self.running):
            try:
                self.running[each].ask("forget")
            except Failed:
                self.end([each])
