"""The README tells the truth: its code runs, its tree names what there is, its policy passes the kit."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments import catalogue, check, formats, run
from framework.policy import policies

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
CODE = [text for language, text in BLOCKS if language == "python"]
POLICY = next(text for text in CODE if text.startswith("# my_policy.py\n"))
GLOSSARY = (
    "spec family weights backend step token position slot capacity budget policy score memory protected sinks "
    "survivors codec mask heads kv_heads group dim head_dim ffn vocab layers drift reference question record report"
).split()


def tree():
    """Paths that the README's tree names, entries of a folder after its line being relative to it."""
    block = next(text for _, text in BLOCKS if text.startswith("README.md "))
    found, top = [], ""
    for line in block.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            top = name if name.endswith("/") else ""
        found.append(top + name if line.startswith(" ") else name)
    return found


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder outside the repository, with the README's policy in it."""
    (tmp_path / "my_policy.py").write_text(POLICY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(CODE)))
def test_a_code_block_runs(number, outside):
    space = {"__name__": "readme"}
    if CODE[number] != POLICY:
        exec(compile(CODE[number], f"README block {number}", "exec"), space)
    for name in [each for each in space if each.startswith("test_")]:
        space[name]()


def test_the_policy_is_one_of_the_blocks_and_short():
    lines = [line for line in POLICY.splitlines()[1:] if line.strip()]
    assert len(lines) <= 15


def test_the_policy_passes_the_rule_tier(outside):
    results = check.run(policies.make("my_policy.py(budget=9)"), "rule")
    assert [each.check for each in results if not each.passed] == []


@pytest.mark.parametrize("path", tree())
def test_the_tree_names_what_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("package", ["framework", "backends", "experiments"])
def test_the_tree_names_every_module(package):
    files = {
        each.relative_to(ROOT).as_posix()
        for each in (ROOT / package).rglob("*.py")
        if each.name != "__init__.py"
        and not {"__pycache__", "policies", "codecs", "questions"} & set(each.parts)
    }
    assert files - set(tree()) == set()


@pytest.mark.parametrize("word", GLOSSARY)
def test_the_glossary_has_the_word(word):
    glossary = README.partition("## Glossary")[2].partition("## Limits")[0]
    assert f"**{word}**" in glossary


def test_the_commands_exist():
    block = next(text for _, text in BLOCKS if text.startswith("kvtwin demo"))
    named = set(re.findall(r"^kvtwin (\w+)", block, re.MULTILINE))
    known = {each.name for each in run.app.registered_commands}
    assert named == known
    for name in named:
        assert CliRunner().invoke(run.app, [name, "--help"]).exit_code == 0


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make ([\w-]+)`", README))))
def test_the_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_plot_is_small():
    assert (ROOT / "docs" / "quality.png").stat().st_size <= 150_000


def test_the_table_of_policies_is_what_the_command_prints():
    assert catalogue.markdown() in README


def test_the_table_of_codecs_is_what_the_command_prints():
    assert formats.markdown() in README


def test_what_a_cache_takes_is_what_the_command_prints():
    [shown] = [text for _, text in BLOCKS if text.startswith("gemma-3-27b: ")]
    words = shlex.split(re.search(r"That is `kvtwin (memory [^`]+)`", README)[1])
    printed = CliRunner().invoke(run.app, words).output
    assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()
