"""The targets of speed, and what measured results say of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.benches.case import FLOAT, FULL, HALF, NONE, OURS, REAL, Case, Kind
from experiments.benches.result import Result, Spread

Value = Callable[[Result], Spread | None]


@dataclass(frozen=True)
class Target:
    """A bound on a value of each result of `engines` in the cases that `of` takes, `least` or at most."""

    what: str
    of: Callable[[Case], bool]
    value: Value
    bound: float
    least: bool = False
    engines: tuple[str, ...] = OURS

    def met(self, value: float) -> bool:
        """Whether a value, as it is printed, is within the bound."""
        return round(value, 2) >= self.bound if self.least else round(value, 2) <= self.bound

    @property
    def shown(self) -> str:
        """The bound."""
        return f"{'>=' if self.least else '<='} {self.bound:.2f}"


def full(kind: Kind, *contexts: int, batch: int = 1) -> Callable[[Case], bool]:
    """Full caches of these contexts, on a CPU."""
    return lambda case: (
        (case.kind, case.batch, case.policy, case.codec, case.dtype) == (kind, batch, FULL, FULL, FLOAT)
        and case.context in contexts
    )


def on_gpu(case: Case) -> bool:
    """Decode with full caches on a GPU, which alone is measured in this dtype."""
    return (case.kind, case.policy, case.codec, case.dtype) == ("decode", FULL, FULL, HALF)


def alone_on_gpu(case: Case) -> bool:
    """Of these, one sequence behind a short context: what is read are the weights."""
    return on_gpu(case) and (case.batch, case.context) == (1, 128)


def start(cold: bool) -> Callable[[Case], bool]:
    """New processes."""
    return lambda case: case.kind == "start" and case.cold == cold


def flat(case: Case) -> bool:
    """A step far into a text under a budget."""
    return case.kind == "decode" and case.context == 32768 and case.policy != FULL


def pressed(case: Case) -> bool:
    """A prompt that is compressed."""
    return case.kind == "prefill" and case.policy != FULL


def speed(result: Result) -> Spread | None:
    """How many times as fast."""
    return result.speed


def time(result: Result) -> Spread | None:
    """The share of the other's time."""
    one = result.speed
    return None if one is None else Spread(1 / one.median, 1 / one.most, 1 / one.least)


def seconds(result: Result) -> Spread | None:
    """Seconds."""
    return result.seconds


def limit(result: Result) -> Spread | None:
    """Share of the bandwidth."""
    return result.limit


def memory(result: Result) -> Spread | None:
    """Bytes of the cache, as a share of those of the other."""
    value = result.memory
    return None if value is None else Spread(value, value, value)


def after_loading(result: Result) -> Spread | None:
    """Seconds of a start without those of the loading."""
    return result.after_loading


def peak(result: Result) -> Spread | None:
    """The most memory beyond what the imports take, as a share of the weights."""
    return result.peak


SPEED, TIME = "tokens/s over hf-dynamic", "time / hf-dynamic"
PRESSED = "prefill of 2048 and compression to 25%, time / kvpress"
TARGETS = (
    Target(f"decode at 128 and 2048, {SPEED}", full("decode", 128, 2048), speed, 2.4, True, ("flax",)),
    Target(f"decode at 128 and 2048, {SPEED}", full("decode", 128, 2048), speed, 2.0, True, ("torch",)),
    Target("decode at 128, share of the read bandwidth", full("decode", 128), limit, 0.8, True, ("flax",)),
    Target("decode at 128, share of the read bandwidth", full("decode", 128), limit, 0.65, True, ("torch",)),
    Target(f"decode at 128, batch 8, {SPEED}", full("decode", 128, batch=8), speed, 1.3, True),
    Target(f"prefill, {TIME}", full("prefill", 512, 2048, 4096), time, 0.9, engines=("flax",)),
    Target(f"prefill, {TIME}", full("prefill", 512, 2048, 4096), time, 1.0, engines=("torch",)),
    Target("decode behind 32768 under a budget of 1024, time / behind 2048", flat, time, 1.05),
    Target("the same, bytes of the cache / behind 2048", flat, memory, 1.0),
    Target(f"decode at 16384, {TIME}", full("decode", 16384), time, 0.5),
    Target(PRESSED, pressed, time, 0.9),
    Target("first token of a new process, s over loading", start(cold=False), after_loading, 5.0),
    Target("the same, nothing compiled before", start(cold=True), after_loading, 20.0),
    Target("loading and the first step, peak memory / weights", start(cold=False), peak, 1.3),
    Target("decode on a GPU, tokens/s over hf-compile", on_gpu, speed, 1.2, True),
    Target("decode on a GPU at 128, share of its read bandwidth", alone_on_gpu, limit, 0.6, True),
    Target("import framework, s", lambda case: case.kind == "import", seconds, 0.3, engines=("imports",)),
)


@dataclass(frozen=True)
class Finding:
    """A target on one result; `value` None where the engine failed."""

    target: Target
    result: Result
    value: Spread | None

    @property
    def met(self) -> bool:
        """Whether the median is within the bound."""
        return self.value is not None and self.target.met(self.value.median)


def findings(results: Sequence[Result]) -> list[Finding]:
    """Every target on every result of the larger model that it is about; those of which nothing was measured are left
    out."""
    return [
        Finding(target, result, target.value(result))
        for target in TARGETS
        for result in results
        if result.engine in target.engines
        and result.case.model in (REAL, NONE)
        and target.of(result.case)
        and (result.over or target.value not in OVER)
    ]


OVER = (speed, time, memory)  # values that need something to compare with
