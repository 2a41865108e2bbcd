"""Source text of the Python standard library: what the bundled models were trained on, and what was held out."""

import sysconfig
from functools import cache
from pathlib import Path

import numpy as np

from framework.models import recall_form

HELD_OUT = ("csv.py", "heapq.py", "json/decoder.py", "queue.py", "shlex.py", "textwrap.py")
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}


def library() -> tuple[bytes, bytes]:
    """The text to train on and the held-out text, of the running Python, files in order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    # _sysconfigdata is written by the build and holds the paths of one machine
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not SKIPPED & set(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    )
    train = b"\n".join((root / name).read_bytes() for name in names if name not in HELD_OUT)
    return train, b"\n".join((root / name).read_bytes() for name in HELD_OUT)


@cache
def held_out() -> str:
    """The held-out text as it is bundled, about 96,000 characters; no bundled model was trained on it."""
    return (Path(recall_form.__file__).parent / "text" / "held_out.txt").read_text()


def lines(random: np.random.Generator, count: int) -> list[str]:
    """So many held-out lines in a row, from a random one on, going round at the end; empty ones are left out."""
    every = [line for line in held_out().splitlines() if line.strip()]
    begin = int(random.integers(len(every)))
    return [every[(begin + number) % len(every)] for number in range(count)]
