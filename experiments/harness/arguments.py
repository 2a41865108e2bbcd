"""What lm-evaluation-harness passes to a model as text and numbers: how to load it, and how to write with it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from framework.decode import Sampling
from framework.errors import KvtwinError

ROOM = 256  # tokens to write where a task names no number, as in the harness's own models
ROOMS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Of `--model_args`; `batch_size` of `--batch_size`.

    `path`: a bundled name, a folder, or org/name. `max_length`: tokens that one request may have (None: what the model
    was made for). `add_bos_token`: the opening token before every context (None: as the tokenizer has it).
    `prefix_token_id`: stands for an empty context (None: the opening token, else the first stop token). `chunk`: tokens
    a call where a text is followed without a prompt. `seed`: of sampling.
    """

    path: str
    policy: str = "full()"
    codec: str = "full()"
    backend: str = "torch"
    dtype: str = "float32"
    batch_size: int = 8
    max_length: int | None = None
    add_bos_token: bool | None = None
    prefix_token_id: int | None = None
    chunk: int = 1
    seed: int = 0


# What the harness passes to every model, asked for or not: the backend's library chooses its device itself.
OTHERS = ("device", "max_batch_size")
WHOLE = ("batch_size", "max_length", "prefix_token_id", "chunk", "seed")
HINT = (
    "a spelling that was cut at its commas can have semicolons, as in policy=snapkv(budget=64;window=16), "
    "or all of it can be JSON"
)


def arguments(given: Mapping[str, Any]) -> Arguments:
    """The arguments, checked. Semicolons in a policy or codec stand for commas, at which the harness cuts."""
    given = {key: value for key, value in given.items() if value is not None and key not in OTHERS}
    known = [each.name for each in fields(Arguments)]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise KvtwinError(f"no model argument {unknown[0]!r}; expected some of {', '.join(known)}\n{HINT}")
    if "path" not in given:
        raise KvtwinError("no model is named; expected path=NAME in --model_args")
    found = dict(given) | {"path": str(given["path"])}
    for key in ("policy", "codec"):
        if key in found:
            found[key] = str(found[key]).replace(";", ",")
            if found[key].count("(") != found[key].count(")"):
                raise KvtwinError(f"{key}={given[key]!r} has brackets that do not close\n{HINT}")
    for key in WHOLE:
        if key in found:
            found[key] = _whole(key, found[key])
    if found.get("batch_size", 1) < 1 or found.get("max_length", 1) < 1:
        raise KvtwinError(
            f"batch_size={found.get('batch_size')}, max_length={found.get('max_length')}; expected 1 or more"
        )
    return Arguments(**found)


def _whole(key: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise KvtwinError(f"{key} is {value!r}; expected a whole number") from None


@dataclass(frozen=True)
class Writing:
    """How a request is answered: it ends before one of `stops`, or after `room` tokens."""

    stops: tuple[str, ...]
    room: int
    sampling: Sampling


def writing(given: Mapping[str, Any], seed: int = 0) -> Writing:
    """What a task's `generation_kwargs` ask for; what kvtwin does not do is refused.

    `do_sample` False is greedy whatever the temperature; None samples where there is a temperature above 0; True
    without a temperature has 1.
    """
    asked = {key: value for key, value in given.items() if value is not None}
    until = asked.pop("until", [])
    rooms = [asked.pop(key) for key in ROOMS if key in asked]
    sampled = asked.pop("do_sample", None)
    temperature = asked.pop("temperature", 1.0 if sampled else 0.0)
    knobs = {key: asked.pop(key) for key in ("top_k", "top_p", "min_p") if key in asked}
    if asked:
        raise KvtwinError(
            f"no generation argument {next(iter(asked))!r} in kvtwin; expected some of until, max_gen_toks, do_sample, "
            "temperature, top_k, top_p, min_p"
        )
    stops = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(stop, str) for stop in stops):
        raise KvtwinError(f"until is {until!r}; expected a text or a list of texts")
    room = _whole(ROOMS[0], rooms[0]) if rooms else ROOM
    if sampled is False:
        temperature = 0.0
    return Writing(stops, room, Sampling(temperature=temperature, seed=seed, **knobs))


def fitted(context: list[int], continuation: list[int], most: int) -> tuple[list[int], int]:
    """The end of the context that fits, with the continuation, into `most` positions, and how many tokens were dropped.

    The last token of a continuation needs no position, since nothing comes after it.
    """
    if len(continuation) > most:
        raise KvtwinError(
            f"a continuation has {len(continuation)} tokens; expected at most max_length={most}"
        )
    over = max(0, len(context) + len(continuation) - (most + 1))
    return context[over:], over
