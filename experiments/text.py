"""Held-out text: source files of the Python standard library that no bundled model was trained on."""

from functools import cache
from pathlib import Path

import numpy as np

from framework.models import recall_form


@cache
def held_out() -> str:
    """All of it, about 96,000 characters."""
    return (Path(recall_form.__file__).parent / "text" / "held_out.txt").read_text()


def lines(random: np.random.Generator, count: int) -> list[str]:
    """So many lines in a row, from a random one on, going round at the end; empty ones are left out."""
    every = [line for line in held_out().splitlines() if line.strip()]
    begin = int(random.integers(len(every)))
    return [every[(begin + number) % len(every)] for number in range(count)]
