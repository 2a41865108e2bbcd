"""Checkpoints by name: bundled with kvtwin, a folder on disk, or a repository of the Hugging Face hub."""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from framework.config import read_config
from framework.errors import KvtwinError
from framework.family import Family, family
from framework.spec import ModelSpec
from framework.tokenizer import Tokenizer, tokenizer
from framework.weights import read

BUNDLED = Path(__file__).parent / "models"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)

# What a checkpoint needs, and no weights in other formats. Patterns match subfolders too, so these are ignored.
WANTED = ["*.json", "model*.safetensors", "tokenizer*", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
UNWANTED = ["*/*"]


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its spec, its weights in the dtype they are stored in, each read when it is asked for, and where
    they came from."""

    spec: ModelSpec
    weights: Mapping[str, np.ndarray]
    folder: Path
    family: Family

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer, made when first asked for: Hugging Face's takes seconds to import."""
        return tokenizer(self.folder)


def bundled() -> tuple[str, ...]:
    """Names of the models that come with kvtwin."""
    return tuple(sorted(path.parent.name for path in BUNDLED.glob("*/config.json")))


def locate(name: str | os.PathLike) -> Path:
    """The folder of a checkpoint: a bundled name, a folder that exists, or `org/name` on the Hugging Face hub.

    A bundled name goes before a folder of that name (`./name` reaches the folder). A hub repository comes from
    huggingface_hub's cache, downloaded where it is not there; HF_HUB_OFFLINE=1 forbids that. Raises KvtwinError.
    """
    if str(name) in bundled():
        return BUNDLED / str(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise KvtwinError(f"{folder} is a file; expected the folder that holds config.json and safetensors")
    if isinstance(name, str) and REPOSITORY.fullmatch(name) and not name.startswith("."):
        return _from_hub(name)
    near = " or ".join(difflib.get_close_matches(str(name), bundled(), n=2))
    raise KvtwinError(
        f"no model {str(name)!r}{f'; did you mean {near}?' if near else ''}\n"
        f"expected a bundled model ({', '.join(bundled()) or 'none'}), a folder that exists, or org/name on the hub"
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except LocalEntryNotFoundError:
        reason = "it is not in the cache, and the hub is offline (HF_HUB_OFFLINE) or out of reach"
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise KvtwinError(
        f"no folder {name!r}, and the hub's repository of that name does not come: {reason}\n"
        f"expected a bundled model ({', '.join(bundled()) or 'none'}), a folder that exists, or org/name on the hub"
    )


def open_checkpoint(name: str | os.PathLike) -> Checkpoint:
    """The checkpoint called `name`, as `locate` finds it, read. Raises KvtwinError."""
    folder = locate(name)
    config = read_config(folder)
    kind = family(config)
    spec = kind.spec(config)
    return Checkpoint(spec, read(folder, spec, kind), folder, kind)
