"""What `kvtwin bench` asks: cases as data, groups of them that are timed in turns, and suites of groups.

Only the standard library is imported here: the programs in experiments/engines read cases too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["decode", "prefill", "start", "import"]

SMALL, REAL, NONE = "stories110m", "qwen2.5-0.5b", "none"
OURS = ("torch", "flax")
DYNAMIC, COMPILE, PRESS, IMPORTS = "hf-dynamic", "hf-compile", "kvpress", "imports"
FULL, FLOAT, HALF = "full()", "float32", "bfloat16"
BYTES = {FLOAT: 4, HALF: 2}  # of a number
KEPT = 0.25  # of a prompt that kvpress and kvtwin compress
# The settings that the classes of kvpress have by themselves.
PRESSES = (
    f'snapkv(fraction={KEPT}, kernel=5, pooling="mean", window=64)',
    f"expected_attention(fraction={KEPT})",
    f"keydiff(fraction={KEPT})",
    f"tova(fraction={KEPT})",
    f"window(fraction={KEPT})",
)


@dataclass(frozen=True)
class Case:
    """One thing to time.

    `decode`: `steps` greedy tokens behind `context` tokens, as one block; its unit is a step of all rows. `prefill`: a
    prompt of `context` tokens, compressed at its end where there is a policy. `start`: a new process until it has
    chosen the first token behind `context` tokens; `cold`: with empty compile caches. `import`: a new process that
    imports `framework` and ends. `dtype`: in which it is computed.
    """

    kind: Kind
    model: str
    context: int = 0
    batch: int = 1
    policy: str = FULL
    codec: str = FULL
    steps: int = 16
    cold: bool = False
    dtype: str = FLOAT

    def __str__(self) -> str:
        words = [self.kind, *(["cold"] if self.cold else []), self.model]
        words += [str(self.context)] if self.context else []
        words += [f"x{self.batch}"] if self.batch > 1 else []
        words += [each for each in (self.policy, self.codec) if each != FULL]
        return " ".join(words if self.dtype == FLOAT else [*words, self.dtype])

    @property
    def units(self) -> int:
        """Timed units in a block."""
        return self.steps if self.kind == "decode" else 1

    @property
    def tokens(self) -> int:
        """Tokens of one unit."""
        return {"decode": self.batch, "prefill": self.batch * self.context}.get(self.kind, 0)


@dataclass(frozen=True)
class Entry:
    """A case on an engine, and the entry of the same group that it is compared with."""

    case: Case
    engine: str
    over: "Entry | None" = None

    def __str__(self) -> str:
        return f"{self.engine}: {self.case}"


Group = Sequence[Entry]  # timed in turns: A B A B


def title(group: Group) -> str:
    """What a group is called in the rows: its cases, but for one that another engine only has to be compared with."""
    beside = {
        each.over for each in group
        if each.over and each.over.case != each.case and each.over.engine != each.engine
    }  # fmt: skip
    return " | ".join(dict.fromkeys(str(entry.case) for entry in group if entry not in beside))


def contest(case: Case, engines: Sequence[str], baseline: str | None = None) -> Group:
    """One case on several engines, each compared with the baseline, which is one of them."""
    base = None if baseline is None else Entry(case, baseline)
    return [base if base and name == baseline else Entry(case, name, base) for name in engines]


def beside_full(case: Case) -> Group:
    """A policy or a codec on both backends, beside Hugging Face's full cache of the same context."""
    base = Entry(replace(case, policy=FULL, codec=FULL), DYNAMIC)
    return [*(Entry(case, name, base) for name in OURS), base]


def flatness(near: Case, far: Case, engines: Sequence[str]) -> Group:
    """Two cases on each engine, the second compared with the first."""
    found: list[Entry] = []
    for name in engines:
        base = Entry(near, name)
        found += [base, Entry(far, name, base)]
    return found


def quick(model: str) -> list[Group]:
    """Two minutes on a small model: decode, prefill, a policy, a codec."""
    peers = ("hf-dynamic", "hf-static")
    return [
        contest(Case("decode", model, 128), (*OURS, *peers), DYNAMIC),
        contest(Case("decode", model, 512), (*OURS, *peers), DYNAMIC),
        contest(Case("prefill", model, 512), (*OURS, DYNAMIC), DYNAMIC),
        beside_full(Case("decode", model, 512, policy="h2o(budget=128)")),
        beside_full(Case("decode", model, 512, codec="int8()")),
    ]


def table(model: str) -> list[Group]:
    """What the table of targets in the README is made of."""
    peers = (DYNAMIC, "hf-static", COMPILE)
    groups = [contest(Case("decode", model, context), (*OURS, *peers), DYNAMIC) for context in (128, 2048)]
    groups += [contest(Case("decode", model, 128, batch=8), (*OURS, DYNAMIC), DYNAMIC)]
    groups += [
        contest(Case("prefill", model, context), (*OURS, DYNAMIC), DYNAMIC) for context in (512, 2048, 4096)
    ]
    near, far = (Case("decode", model, seen, policy="h2o(budget=1024)") for seen in (2048, 32768))
    groups += [flatness(near, far, OURS)]
    groups += [contest(Case("decode", model, 16384), (*OURS, DYNAMIC), DYNAMIC)]
    groups += [contest(Case("prefill", model, 2048, policy=each), (*OURS, PRESS), PRESS) for each in PRESSES]
    groups += [contest(Case("start", model, 32, cold=cold), (*OURS, DYNAMIC)) for cold in (False, True)]
    return [*groups, contest(Case("import", NONE), (IMPORTS,))]


def sweep(model: str) -> list[Group]:
    """Decode and prefill by context, batch, policy and codec."""
    three = (*OURS, DYNAMIC)
    groups = [contest(Case("decode", model, n), three, DYNAMIC) for n in (128, 512, 2048, 8192)]
    groups += [contest(Case("prefill", model, n), three, DYNAMIC) for n in (128, 512, 1024, 2048)]
    groups += [contest(Case("decode", model, 128, batch=n), three, DYNAMIC) for n in (2, 4, 8)]
    for policy in ("window", "h2o", "tova", "snapkv"):
        groups += [beside_full(Case("decode", model, 2048, policy=f"{policy}(budget=512)"))]
    for codec in ("int8()", "exl2_q4()", "kivi(bits=4)"):
        groups += [beside_full(Case("decode", model, 2048, codec=codec))]
    return groups


def gpu(model: str) -> list[Group]:
    """What there is to say of a GPU, in some minutes: all engines on full caches, a budget, a prompt, in bfloat16."""
    peers = (DYNAMIC, "hf-static", COMPILE)
    decode = Case("decode", model, dtype=HALF, steps=128)
    groups = [
        contest(replace(decode, context=context, batch=batch), (*OURS, *peers), COMPILE)
        for batch in (1, 8)
        for context in (128, 2048)
    ]
    groups += [contest(Case("prefill", model, 2048, dtype=HALF), (*OURS, DYNAMIC), DYNAMIC)]
    near, far = (replace(decode, context=seen, policy="h2o(budget=1024)") for seen in (2048, 32768))
    return [*groups, flatness(near, far, OURS)]


GPU = "gpu"  # the suite that is run there, and nowhere else
SUITES = {"quick": (quick, SMALL), "table": (table, REAL), "sweep": (sweep, SMALL), GPU: (gpu, REAL)}
