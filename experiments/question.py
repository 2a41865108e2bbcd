"""What is asked of a model under a policy and a codec: a question draws its cases by seed and measures what came.

A question is a frozen dataclass in a file of `experiments/questions`; its spelling, `passkey(length=512)`, names it on
the command line, in results and in reports.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from framework.backend import Model
from framework.registry import Registry


@dataclass(frozen=True)
class Measure:
    """A number that a question reports for each seed. `better` None: neither more nor less is better."""

    name: str
    better: Literal["higher", "lower"] | None
    unit: str = ""


@dataclass(frozen=True)
class Held:
    """What a cache held for one row once the context was compressed, and what it was to hold.

    `context`: tokens read before the compression. `requested`: tokens per kv head, the mean over layers and heads; None
    where no budget holds. `kept_min`, `kept_max`, `kept`: fewest, most and mean tokens of a kv head. Bytes are those of
    one row: `payload` with scales of the kept tokens, `allocated` all arrays, `full` the payload of a full cache under
    the same codec's uncoded dtype. `flags`: `never_fired` (a budget, and nothing evicted), `missed_budget` (a head kept
    another number than was asked for), `masked` (tokens were evicted, and the arrays are not smaller than without).
    """

    context: int
    requested: float | None
    kept_min: int
    kept_max: int
    kept: float
    payload: int
    allocated: int
    full: int
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What came for one seed: the question's measures by name, what the model wrote, where it wrote, and the cache."""

    seed: int
    measures: dict[str, float]
    held: Held | None = None
    said: str = ""
    wanted: str = ""


@dataclass(frozen=True)
class Setting:
    """What a question is asked of: a model, a policy and a codec in their spelling.

    `other`: the same checkpoint and dtype on another backend, by name. `shared`: what questions keep for the next cells
    of this process, as the logits under the full cache; `once` reads and fills it.
    """

    model: Model
    policy: str
    codec: str
    other: Callable[[str], Model]
    shared: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for this key."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


class Question(ABC):
    """Asked of one setting, for several seeds as one batch; the same seeds give every setting the same cases.

    `measures`: what each answer holds, the main one first. `seeded` False: one answer stands for all seeds, and the
    question is asked with seed 0 alone.
    """

    measures: ClassVar[tuple[Measure, ...]]
    seeded: ClassVar[bool] = True

    @abstractmethod
    def ask(self, setting: Setting, seeds: Sequence[int]) -> list[Answer]:
        """One answer for each seed, in order."""


questions: Registry[Question] = Registry("question", "experiments.questions", Question)
