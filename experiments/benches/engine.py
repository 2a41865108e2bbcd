"""The engines of `kvtwin bench`: which there are, whether they are installed, and what they are started in."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from framework.errors import KvtwinError

ROOT = Path(__file__).parents[2]
PROBE = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""
# What would change how fast an engine is: all get the same.
DROPPED = ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")


class Failed(Exception):
    """An engine that did not answer, or said that it cannot; the text says why."""


@dataclass(frozen=True)
class Engine:
    """A program, what it is told, the packages that it needs, and the interpreter that has them.

    `sources`: folders and files of this repository whose text is part of its version, beside ASKING.
    """

    name: str
    program: str
    packages: tuple[str, ...]
    words: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    python: str = sys.executable

    @property
    def foreign(self) -> bool:
        """Whether it runs in another environment."""
        return self.python != sys.executable


# How every engine is asked.
ASKING = ("experiments/engines", "experiments/benches/case.py")
METER = Engine("meter", "experiments.engines.meter", ("torch",))


def known(kvpress_python: str | None = None) -> dict[str, Engine]:
    """All engines by name."""
    ours, theirs = "experiments.engines.kvtwin", "experiments.engines.huggingface"
    peers = ("torch", "transformers")
    found = [
        Engine(name, ours, packages, (name,), ("framework", f"backends/{name}"))
        for name, packages in (("torch", ("torch", "numpy")), ("flax", ("jax", "jaxlib", "flax", "numpy")))
    ]
    found += [Engine(f"hf-{kind}", theirs, peers, (kind,)) for kind in ("dynamic", "static", "compile")]
    python = sys.executable if kvpress_python is None else _interpreter(kvpress_python)
    found += [Engine("kvpress", "experiments.engines.kvpress", ("kvpress", *peers), python=python)]
    found += [Engine("imports", "experiments.engines.imports", ("numpy",), sources=("framework",))]
    return {each.name: each for each in found}


def _interpreter(name: str) -> str:
    """Where it lies, from wherever it is started; not what a link points to, which would leave its environment."""
    return os.path.abspath(shutil.which(name) or name)


def versions(engine: Engine) -> dict[str, str]:
    """Versions of what an engine runs on, kvtwin's as a checksum of its text. Raises Failed where one is missing."""
    try:
        words = [engine.python, "-c", PROBE, *engine.packages]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=_plain(engine))
    except (OSError, subprocess.CalledProcessError) as error:
        raise Failed(f"{engine.python} does not run: {error}") from None
    found = json.loads(done.stdout)
    if missing := [name for name, each in found.items() if each is None]:
        raise Failed(f"not installed: {', '.join(missing)}, for {engine.python}")
    return found | {"kvtwin": _checksum((*ASKING, *engine.sources))}


# What a library sees of a GPU: its name, or on a second line why there is none.
SIGHT = {
    "torch": """
import torch
there = torch.cuda.is_available()
print(torch.cuda.get_device_name() if there else "", f"torch {torch.__version__} sees no CUDA device", sep="\\n")
""",
    "jax": """
import jax
one = jax.devices()[0]
there = one.platform == "gpu"
print(one.device_kind if there else "", f"jax {jax.__version__} sees only {one.platform}", sep="\\n")
""",
}


def gpu_of(library: str) -> str:
    """The name of the GPU that a library sees. Raises Failed."""
    env = {key: value for key, value in os.environ.items() if key not in DROPPED} | WITH_GPU
    words = [sys.executable, "-c", SIGHT[library]]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    if done.returncode:
        raise Failed(
            f"no GPU: {library} does not start: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}"
        )
    name, why = done.stdout.splitlines()[-2:]
    if not name:
        raise Failed(f"no GPU: {why}")
    return name


def _checksum(sources: Sequence[str]) -> str:
    places = [ROOT / source for source in sources]
    files = sorted(file for place in places for file in ([place] if place.is_file() else place.rglob("*.py")))
    return f"{zlib.crc32(b''.join(file.read_bytes() for file in files)):08x}"


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plain(engine: Engine) -> dict[str, str]:
    """This environment, without what belongs to kvtwin's own where the engine lives in another."""
    dropped = {*DROPPED, *(("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV") if engine.foreign else ())}
    return {key: value for key, value in os.environ.items() if key not in dropped}


NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
# Several processes hold the GPU at once: none may take all of its memory beforehand.
WITH_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def environment(engine: Engine, compile_cache: Path | None = None, gpu: bool = False) -> dict[str, str]:
    """What a program is started with: every core, no network, a GPU or none; another compile cache where one is
    named."""
    found = _plain(engine) | {
        "OMP_NUM_THREADS": str(cores()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    found |= WITH_GPU if gpu else NO_GPU
    if compile_cache is not None:
        found |= {
            "JAX_COMPILATION_CACHE_DIR": str(compile_cache),
            "TORCHINDUCTOR_CACHE_DIR": str(compile_cache),
        }
    return found


@contextmanager
def foreign_place() -> Iterator[Path]:
    """A folder that shows another interpreter the package `experiments` and nothing else of this environment."""
    with tempfile.TemporaryDirectory(prefix="kvtwin-bench-") as folder:
        place = Path(folder)
        try:
            (place / "experiments").symlink_to(ROOT / "experiments")
        except OSError as error:
            raise KvtwinError(f"cannot make a link in {place}: {error.strerror or error}") from error
        yield place
