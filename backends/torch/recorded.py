"""Work that is the same each time, recorded as a CUDA graph; and a watch on what such a recording may not do."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from framework.errors import KvtwinError

WARM = 2  # runs before the recording: libraries load what they need at their first use
# What waits for the device or makes tensors whose size depends on their values.
WAITS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere",
    "masked_select", "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc",
    "lift_fresh", "_assert_async", "to_dense",
}  # fmt: skip
MOVES = {"_to_copy", "to", "copy_", "copy", "cpu", "cuda"}
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Watch(TorchDispatchMode):
    """Notes the operations that ask the host, or bring numbers from it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _asks(func, args, out):
            self.found.append(str(func))
        return out


def _asks(func: Any, args: Any, out: Any) -> bool:
    called = func.overloadpacket.__name__
    if called in WAITS or str(func) in ("aten.where.default", "aten.repeat_interleave.Tensor"):
        return True
    if called in INDEXES:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if called in MOVES:
        tensors = [x for x in (*args[:2], out) if isinstance(x, torch.Tensor)]
        return len({x.device.type for x in tensors}) > 1
    return False


class Recorded:
    """Runs what reads and writes tensors that stay, the same each time. On CUDA, after a few calls, by a graph of it.

    Where it asks the host, as a policy's own code may, there is no graph: it is run each time.
    """

    def __init__(self, device: torch.device):
        self.calls, self.records = 0, device.type == "cuda"
        self.asks: list[str] = []
        self.graph: Any = None

    def __call__(self, run: Callable[[], None]) -> None:
        if self.records and self.graph is None and self.calls >= WARM and not self.asks:
            self.graph = self._graph(run)
        if self.graph is not None:
            self.graph.replay()
        elif self.records:
            self._warm(run)
        else:
            run()
        self.calls += 1

    def _warm(self, run: Callable[[], None]) -> None:
        """A run that counts, on a stream of its own, as a recording wants it."""
        stream, here = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            if self.calls:
                run()
            else:
                with Watch() as watch:
                    run()
                self.asks = watch.found
        here.wait_stream(stream)

    def _graph(self, run: Callable[[], None]) -> Any:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            first = (str(error).splitlines() or [""])[0][:200]
            raise KvtwinError(
                f"a decode step could not be recorded as a CUDA graph: {first}\n"
                "expected hooks of the policy that neither read a number on the host nor make a tensor there"
            ) from error
        return graph
