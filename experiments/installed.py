"""Whether there is what the command line imports: asked before anything is imported, so that it can say what to do."""

from collections.abc import Sequence
from importlib.util import find_spec

# By the name that is imported, what an installer calls it.
NEEDED = {
    "array_api_compat": "array-api-compat",
    "jaxtyping": "jaxtyping",
    "ml_dtypes": "ml_dtypes",
    "numpy": "numpy",
    "rich": "rich",
    "safetensors": "safetensors",
    "typer": "typer",
}


def missing() -> list[str]:
    """The packages that are not there."""
    return [package for name, package in NEEDED.items() if find_spec(name) is None]


def advice(packages: Sequence[str]) -> str:
    """How to come by them."""
    names = " ".join(packages)
    return (
        f"not installed: {', '.join(packages)}; run `pip install {names}`, or where there is no network "
        f"`pip install --target FOLDER {names}` elsewhere, and put FOLDER into PYTHONPATH beside the checkout"
    )
