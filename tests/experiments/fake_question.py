"""Questions for tests of sweeps: quick, and with any fate. Copied to where a test wants it, and named by its path."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.question import Answer, Held, Measure, Question


@dataclass(frozen=True, kw_only=True)
class Fake(Question):
    """Scores drawn from the seed, the policy and the codec. `log`: a file that gets a line for each time it is asked.

    `gate`: a file without which nobody gets an answer. `fate`: raise, exit, `die` for SIGKILL, `end` for words and
    code 3, or a path: SIGKILL unless it is there.
    """

    measures = (Measure("score", "higher", "points"), Measure("other", None))

    length: int = 9
    seconds: float = 0.0
    gate: str = ""
    fate: str = ""
    log: str = ""

    def ask(self, setting, seeds):
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()} {self.length} {setting.policy} {setting.codec} {list(seeds)}\n")
        time.sleep(self.seconds)
        while self.gate and not Path(self.gate).exists():
            time.sleep(0.02)
        self.meet_fate()
        return [self.answer(setting, seed) for seed in seeds]

    def meet_fate(self):
        if self.fate == "raise":
            raise ZeroDivisionError("one\ntwo\nthree\nfour")
        if self.fate == "exit":
            sys.exit("gone")
        if self.fate == "end":
            os.write(2, b"first\nlast words\n")
            os._exit(3)
        if self.fate == "die" or ("/" in self.fate and not Path(self.fate).exists()):
            if self.fate != "die":
                Path(self.fate).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def answer(self, setting, seed):
        name = [ord(each) for each in f"{setting.policy} {setting.codec}"]
        score, other = np.random.default_rng([seed, self.length, *name]).random(2, np.float32)
        held = Held(
            context=np.int64(self.length), requested=4.5, kept_min=3, kept_max=5, kept=np.float64(4.25),
            payload=2048 + seed, allocated=4096, full=8192, flags=("masked",) if seed % 2 else (),
        )  # fmt: skip
        return Answer(seed, {"other": other, "score": score}, held, f"said {seed}", "wanted")
