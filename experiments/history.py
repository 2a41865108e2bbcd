"""Every eviction of a run: recorded on one backend, saved, replayed on another, and explained.

`kvtwin explain MODEL TEXT --policy ... --layer 2 --head 1 --position 17` says when and why a token went.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from experiments.compare import Trace, run
from framework.backend import Model, read_tokens
from framework.cache import Decision
from framework.compare import TOLERANCE, KeptAgreement, kept_agreement
from framework.errors import KvtwinError

FORMAT = "kvtwin-history-1"
FIELDS = ("positions", "scores", "protected", "kept", "budget")


@dataclass(frozen=True)
class Eviction:
    """One token that went. `call` 0 is the prompt, `call` n the n-th token after it.

    `threshold` is the lowest score among the tokens that stayed without protection, `margin` what the token's own
    score lacked of it; both are None where none such stayed, and where no later query would have seen the token.
    """

    call: int
    layer: int
    row: int
    head: int
    position: int
    score: float
    threshold: float | None
    reason: Literal["score", "protected", "window"]

    @property
    def margin(self) -> float | None:
        """How far the score was below the threshold."""
        return None if self.threshold is None else self.threshold - self.score

    def __str__(self) -> str:
        when = (
            "at the end of the prompt"
            if self.call == 0
            else f"after {self.call} more token{'s' * (self.call > 1)}"
        )
        why = {
            "window": "no later query sees it through the layer's sliding window",
            "protected": "protected tokens filled the budget",
            "score": f"its score {self.score:.6g} was {self.margin or 0:.3g} below {self.threshold or 0:.6g}, "
            "the lowest that stayed",
        }[self.reason]
        return f"layer {self.layer}, head {self.head}: position {self.position} went {when}: {why}"


@dataclass(frozen=True)
class History:
    """What a run decided: `decisions[call][...]`, with the tokens that it was led along, and the layers' windows."""

    policy: str
    prompt: np.ndarray
    fed: np.ndarray
    decisions: list[list[Decision]]
    windows: tuple[int | None, ...]

    def evictions(self) -> Iterator[Eviction]:
        """Every token that went, in the order of calls, layers, rows, heads and positions."""
        for call, taken in enumerate(self.decisions):
            for one in taken:
                for row, head in np.ndindex(one.positions.shape[:2]):
                    yield from self._of(call, one, row, head)

    def _of(self, call: int, one: Decision, row: int, head: int) -> Iterator[Eviction]:
        held, kept = one.positions[row, head], set(one.kept[row, head].tolist())
        score = dict(zip(held.tolist(), one.scores[row, head].tolist(), strict=True))
        guarded = set(held[one.protected[row, head]].tolist())
        bar = min((score[p] for p in kept - guarded - {-1}), default=None)
        window, after = self.windows[one.layer], int(held.max(initial=-1)) + 1
        for position in sorted(set(held.tolist()) - kept - {-1}):
            dead = window is not None and position <= after - window
            reason: Literal["score", "protected", "window"]
            reason = "window" if dead else "protected" if bar is None else "score"
            yield Eviction(
                call,
                one.layer,
                row,
                head,
                position,
                score[position],
                bar if reason == "score" else None,
                reason,
            )

    def why(self, position: int, layer: int, head: int, row: int = 0) -> str:
        """When and why the token at a position went, in words; or that it stayed, or never came."""
        total = int((self.prompt[row] >= 0).sum()) + self.fed.shape[1]
        if not 0 <= position < total:
            raise KvtwinError(f"row {row} has no position {position}; expected 0 to {total - 1}")
        heads = {one.layer: one.positions.shape[1] for taken in self.decisions for one in taken}
        if not 0 <= head < heads.get(layer, 0):
            known = (
                ", ".join(f"layer {each} with {count} heads" for each, count in sorted(heads.items()))
                or "none"
            )
            raise KvtwinError(
                f"nothing was decided in layer {layer}, head {head}; decisions there are: {known}"
            )
        for each in self.evictions():
            if (each.layer, each.row, each.head, each.position) == (layer, row, head, position):
                return str(each)
        return f"layer {layer}, head {head}: position {position} stayed to the end"

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, or leave what was there."""
        arrays = {"prompt": self.prompt, "fed": self.fed}
        shape = [[one.layer for one in taken] for taken in self.decisions]
        for call, taken in enumerate(self.decisions):
            for number, one in enumerate(taken):
                arrays |= {f"{call}.{number}.{field}": getattr(one, field) for field in FIELDS}
        facts = {"format": FORMAT, "policy": self.policy, "windows": self.windows, "layers": shape}
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            contiguous = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
            save_file(contiguous, temporary, metadata={"kvtwin": json.dumps(facts)})
            os.replace(temporary, target)
        except (OSError, SafetensorError) as error:
            raise KvtwinError(f"cannot save the history to {target}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "History":
        """Read a file that `save` wrote."""
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {}).get("kvtwin", "{}"))
                if not isinstance(facts, dict) or facts.get("format") != FORMAT:
                    raise KvtwinError(f"{path} is not a history of the format {FORMAT}")
                decisions = [
                    [
                        Decision(layer, *(file.get_tensor(f"{call}.{number}.{field}") for field in FIELDS))
                        for number, layer in enumerate(layers)
                    ]
                    for call, layers in enumerate(facts["layers"])
                ]
                prompt, fed = file.get_tensor("prompt"), file.get_tensor("fed")
                policy, windows = facts["policy"], tuple(facts["windows"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise KvtwinError(f"{path} is not a readable history: {error}") from error
        return cls(policy, prompt, fed, decisions, windows)


def record(model: Model, prompts: Sequence[Sequence[int]] | np.ndarray, policy: str, steps: int) -> History:
    """Read the prompts, go on greedily for some tokens, and keep every decision."""
    trace = run(model, read_tokens(prompts, model.spec, None), policy, steps, watch=False)
    windows = tuple(layer.window for layer in model.spec.layers)
    return History(policy, trace.prompt, trace.fed, trace.decisions, windows)


def replay(model: Model, history: History) -> KeptAgreement:
    """Lead a model along a history, its kept sets forced, and compare what the model itself would have kept."""
    along = Trace(history.prompt, history.fed, decisions=history.decisions)
    found = run(model, history.prompt, history.policy, history.fed.shape[1], along=along, watch=False)
    return kept_agreement(found.decisions, history.decisions, TOLERANCE.get(model.dtype, 0.0))


def command(
    model: Annotated[str, typer.Argument(help="A bundled name, a folder on disk, or org/name.")],
    text: Annotated[str, typer.Argument(help="The prompt.")],
    policy: Annotated[str, typer.Option(help='As in "h2o(budget=16)".')],
    layer: Annotated[int, typer.Option(help="Layer of the token.")],
    head: Annotated[int, typer.Option(help="Its kv head.")],
    position: Annotated[int | None, typer.Option(help="Its position; all that went, if not given.")] = None,
    steps: Annotated[int, typer.Option(help="Tokens to write after the prompt.", min=0)] = 32,
    backend: Annotated[str, typer.Option(help="reference, torch or flax.")] = "torch",
    save: Annotated[Path | None, typer.Option(help="Keep the history in this file.")] = None,
) -> None:
    """Say when and why a token was evicted."""
    from backends import backends

    loaded = backends.get(backend).load(model)
    ids = loaded.tokenizer.encode(text)
    history = record(loaded, [ids], policy, steps)
    if save is not None:
        history.save(save)
    if position is not None:
        typer.echo(history.why(position, layer, head))
        return
    history.why(0, layer, head)  # refuses a layer or head that is not there
    for each in history.evictions():
        if (each.layer, each.head) == (layer, head):
            typer.echo(str(each))
