"""What an experiment found, as rows of data: one JSON object a line, written whole or not at all."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from framework.errors import KvtwinError


@dataclass(frozen=True)
class Row:
    """One policy at one budget on one model and one backend.

    Tokens are per kv head of one sequence; bytes are those of the whole batch. `requested_tokens` and
    `requested_bytes` follow from the budget (None: no budget), the rest is measured on the cache after the last given
    token. `kept_layers`: fewest and most tokens of a head in each layer. `kl`: mean divergence, in nats, of the next
    token from that under the full cache; `kl_first`: at the first step only, where nothing but the prompt was
    compressed. `recall`: share of planted values recalled, and `as_predicted` the share that does what the closed form
    says of this kept set; None for text. `tokens_per_second`: of all rows together, None where too few steps ran.
    `flags`: `never_fired`, `missed_budget`. `equal`, `verdict`, `drift`: the comparison of the two backends, the same
    in both rows.
    """

    model: str
    policy: str
    backend: str
    codec: str
    dtype: str
    prompts: tuple[int, ...]
    steps: int
    requested_tokens: int | None
    kept_min: int
    kept_max: int
    kept_layers: tuple[tuple[int, int], ...]
    requested_bytes: int | None
    payload_bytes: int
    allocated_bytes: int
    memory_bytes: int
    queries_bytes: int
    positions_bytes: int
    padding_bytes: int
    kl: float
    kl_first: float
    top1: float
    recall: float | None
    as_predicted: float | None
    tokens_per_second: float | None
    flags: tuple[str, ...]
    equal: bool
    verdict: str
    drift: float
    swaps: int
    versions: dict[str, str] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Versions of kvtwin and of what computes; "uninstalled" where kvtwin runs from its folder."""
    found = {}
    for name in ("kvtwin", "torch", "jax", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "uninstalled"
    return found


def folder(path: str | os.PathLike) -> Path:
    """The folder, made if need be; raises where nothing can be written into it."""
    place = Path(path)
    probe = place / f".probe.{os.getpid()}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise KvtwinError(
            f"cannot write into the folder {place}: {error.strerror or error}\n"
            "expected a folder that exists or can be made; name another with --out"
        ) from error
    return place


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it at the end; after an error nothing is left but what was there."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise KvtwinError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write(rows: Sequence[Row], path: Path) -> None:
    """One JSON object a line."""
    with whole(path) as temporary:
        temporary.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
