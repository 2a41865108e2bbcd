"""When work is recorded and when it is run each time, with CUDA played by a few stand-ins."""

from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from backends.torch.recorded import WARM, Recorded
from framework.errors import KvtwinError


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of CUDA, in order."""
    told: list[str] = []

    class Stream:
        def wait_stream(self, other: Any) -> None:
            told.append("wait")

    class Graph:
        def replay(self) -> None:
            told.append("replay")

    @contextmanager
    def graph(made: Graph) -> Any:
        told.append("record")
        yield

    for name, value in {
        "Stream": Stream, "current_stream": Stream, "stream": lambda stream: nullcontext(), "CUDAGraph": Graph,
        "graph": graph,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return told


def test_work_is_recorded_after_some_runs_and_then_repeated(events: list[str]) -> None:
    recorded = Recorded(torch.device("cuda"))
    for _ in range(WARM + 3):
        recorded(lambda: events.append("run"))
    assert events == ["wait", "run", "wait"] * WARM + ["record", "run"] + ["replay"] * 3


def test_work_that_asks_the_host_is_run_each_time(events: list[str]) -> None:
    recorded, x = Recorded(torch.device("cuda")), torch.arange(3)

    def run() -> None:
        events.append("run")
        if x[0].item() == 0:
            events.append("asked")

    for _ in range(WARM + 3):
        recorded(run)
    assert events == ["wait", "run", "asked", "wait"] * (WARM + 3)
    assert recorded.graph is None


def test_on_a_cpu_nothing_is_recorded(events: list[str]) -> None:
    recorded = Recorded(torch.device("cpu"))
    for _ in range(WARM + 3):
        recorded(lambda: events.append("run"))
    assert events == ["run"] * (WARM + 3)


def test_what_cannot_be_recorded_is_refused(events: list[str]) -> None:
    recorded = Recorded(torch.device("cuda"))

    def run() -> None:
        if "record" in events:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    for _ in range(WARM):
        recorded(run)
    with pytest.raises(
        KvtwinError, match="(?s)not permitted when stream is capturing\nexpected hooks of the policy"
    ):
        recorded(run)
