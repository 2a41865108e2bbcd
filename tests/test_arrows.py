"""The arrows between the packages: what each may import, shown in a fresh interpreter for each package."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Forbidden by the module's name; the longest prefix counts.
FORBIDDEN = {
    "framework": {"torch", "jax", "flax", "backends", "experiments"},
    "backends": {
        "torch",
        "jax",
        "flax",
        "experiments",
    },  # the door alone: a backend loads when it is asked for
    "backends.torch": {"jax", "flax", "backends.flax", "experiments"},
    "backends.flax": {"torch", "backends.torch", "experiments"},
    "experiments": set(),
}

IMPORT_EACH_AND_TELL = """
import importlib, sys
forbidden = sys.argv[1].split(",")
for name in sys.argv[2:]:
    importlib.import_module(name)
    landed = [each for each in forbidden if each in sys.modules]
    if landed:
        sys.exit(f"{name} brings in {', '.join(landed)}")
"""


def modules(root, package):
    """Dotted names of the Python files below a package, those of its members included."""
    files = sorted((root / package.replace(".", "/")).rglob("*.py"))
    names = [".".join(each.relative_to(root).with_suffix("").parts) for each in files]
    return [each.removesuffix(".__init__") for each in names if not each.endswith("__main__")]


def owner(module):
    """The entry of FORBIDDEN that a module falls under."""
    return max((each for each in FORBIDDEN if f"{module}.".startswith(f"{each}.")), key=len)


def trespass(root, names, forbidden):
    """What a fresh interpreter says after importing these modules in turn; empty where no arrow is broken."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH_AND_TELL, ",".join(sorted(forbidden)), *names],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stderr.strip() if result.returncode else ""


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_module_brings_in_a_forbidden_library(package):
    top = package.split(".")[0]
    names = [each for each in modules(ROOT, top) if owner(each) == package]
    assert names
    assert trespass(ROOT, names, FORBIDDEN[package]) == ""


@pytest.fixture
def house(tmp_path):
    """A small tree with one broken arrow, two folders down, behind an import of its own."""
    deep = tmp_path / "annex" / "members"
    deep.mkdir(parents=True)
    (tmp_path / "annex" / "clean.py").write_text("import json\n")
    (tmp_path / "annex" / "middle.py").write_text("import forbidden_library\n")
    (deep / "guilty.py").write_text("from annex import middle\n")
    (tmp_path / "forbidden_library.py").write_text("")
    return tmp_path


def test_a_broken_arrow_is_found(house):
    found = modules(house, "annex")
    assert found == ["annex.clean", "annex.members.guilty", "annex.middle"]
    assert trespass(house, found[:1], {"forbidden_library"}) == ""
    told = trespass(house, found, {"forbidden_library"})
    assert told == "annex.members.guilty brings in forbidden_library"


def test_a_module_that_does_not_import_is_found(house):
    (house / "annex" / "clean.py").write_text("1 / 0\n")
    assert "ZeroDivisionError" in trespass(house, ["annex.clean"], {"forbidden_library"})


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("framework", "framework"),
        ("framework.policies.h2o", "framework"),
        ("backends", "backends"),
        ("backends.flax.model", "backends.flax"),
        ("backends.torch", "backends.torch"),
        ("experiments.questions.recall", "experiments"),
    ],
)
def test_every_module_has_one_owner(module, package):
    assert owner(module) == package
