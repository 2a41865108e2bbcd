"""What a cache needs to know of a model: by name, of a bundled one, or from any config.json; no weights are read.

The names are in `architectures.json`: the numbers of published models in the words of their own config.json.
"""

import difflib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from framework.checkpoint import BUNDLED, bundled
from framework.config import read_json
from framework.counting import NESTED, counted
from framework.errors import KvtwinError
from framework.spec import ModelSpec

TABLE = Path(__file__).parent / "architectures.json"
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}  # bytes of the floats of a model


@dataclass(frozen=True)
class Architecture:
    """The layers of a model that keep keys and values.

    `spec` has only these layers, and 1 for what no cache depends on. `without`: how many others there are, whose state
    does not grow. `source`: where the numbers come from. `dtype`: what the config says of its weights, if anything.
    """

    name: str
    spec: ModelSpec
    without: int
    source: str
    dtype: str | None = None


@cache
def architectures() -> dict[str, dict[str, Any]]:
    """The rows of the table under each of their names."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: row for row in rows for name in row["names"]}


def open_architecture(name: str | os.PathLike) -> Architecture:
    """The architecture of a bundled model, of a published one, or of the config.json at a path, in this order.

    `./name` reaches a folder of that name. Raises KvtwinError with near names where there is none.
    """
    text, known = str(name), architectures()
    if text in bundled():
        return _read(text, read_json(BUNDLED / text / "config.json"), "bundled")
    if text.lower() in known:
        row = known[text.lower()]
        return _read(text.lower(), row["config"], row["source"])
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return _read(text, read_json(path), str(path))
    if path.suffix == ".json":
        raise KvtwinError(f"{path} does not exist; expected the config.json of a model")
    names = [*bundled(), *known]
    near = " or ".join(difflib.get_close_matches(text.lower().rpartition("/")[2], names, n=3))
    raise KvtwinError(
        f"no architecture {text!r}{f'; did you mean {near}?' if near else ''}\n"
        f"expected a config.json or a folder with one, a bundled model ({', '.join(bundled())}), or one of\n"
        f"{', '.join(known)}"
    )


def _read(name: str, config: dict[str, Any], source: str) -> Architecture:
    layers, without = counted(config, f"config.json of {name}")
    spec = ModelSpec(
        family=str(config.get("model_type") or ""),
        vocab=1,
        dim=1,
        ffn=1,
        layers=layers,
        norm_eps=0.0,
        positions=1,
    )
    places = [config, *(config[key] for key in NESTED if isinstance(config.get(key), dict))]
    said = [each.get(key) for each in places for key in ("dtype", "torch_dtype")]
    return Architecture(name, spec, without, source, next((each for each in said if each in ITEMSIZE), None))
