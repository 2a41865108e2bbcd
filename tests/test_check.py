"""experiments/check.py: sound policies pass the kit, and each kind of broken one is refused with the right reason."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import dedent
from typing import ClassVar

import numpy as np
import pytest
from typer.testing import CliRunner

from backends import backends
from experiments.check import found, report, run
from experiments.checks import model as check_model
from experiments.checks import rule as check_rule
from experiments.checks.case import tiny_spec
from experiments.run import app
from framework.errors import KvtwinError
from framework.policy import Policy, name, policies
from framework.weights import random_weights

EXAMPLES = [one for each in policies.names() for one in policies.get(each).examples()]
FIRST = [policies.get(each).examples()[0] for each in policies.names()]

# In `make test` the kit runs on these, which between them use every hook; on the others in `make test-slow`.
CORE = [one for one in FIRST if type(one).__module__.rpartition(".")[2] in (
    "adakv", "full", "gate", "h2o", "snapkv", "tova",
)]  # fmt: skip


def cases(chosen, now):
    """Those of the policies that are not among `now` wait for make test-slow."""
    return [pytest.param(one, marks=[] if one in now else [pytest.mark.slow]) for one in chosen]


# A policy of one's own: 15 lines, in a file outside the repository.
LOUD = '''
"""Value norm times recency."""
from dataclasses import dataclass
from framework.policy import Needs, Policy

@dataclass(frozen=True, kw_only=True)
class Loud(Policy):
    half_life: float = 32.0
    order_free = True
    needs = Needs(values=True)

    def score(self, view):
        norm = view.xp.sqrt(view.xp.sum(view.values * view.values, axis=-1))
        age = view.xp.astype(view.seen[:, None, None] - view.positions, norm.dtype)
        return norm * 0.5 ** (age / self.half_life)
'''

HEAD = """
from dataclasses import dataclass, field
from typing import ClassVar
import numpy as np
from framework.policy import Needs, Policy

def real(view):
    return view.xp.astype(view.positions, view.xp.float32)

"""

# What is wrong, the body of a policy's file, the check that must fail, and words of its message.
BROKEN = {
    "wrong shape": (
        "def score(self, view): return view.positions[..., 0]",
        "shapes and finite scores",
        "score returned shape (1, 1); expected (1, 1, 4)",
    ),
    "a list": (
        "def score(self, view): return [1.0]",
        "shapes and finite scores",
        "score returned list; expected (1, 1, 4)",
    ),
    "NaN": (
        "def score(self, view): return view.xp.sqrt(1.5 - real(view))",
        "shapes and finite scores",
        "score gave nan to the token at position 2 in row 0, head 0; expected a finite number",
    ),
    "infinite": (
        "def score(self, view): return 1.0 / real(view)",
        "shapes and finite scores",
        "score gave inf to the token at position 0",
    ),
    "torch only": (
        "def score(self, view): return view.positions.float().cumsum(-1)",
        "shapes and finite scores",
        "line 12, call def score(self, view): return view.positions.float()",
    ),
    "numpy only": (
        "def score(self, view): return np.sort(view.positions, axis=-1)",
        "portable array code",
        "score returned numpy.ndarray; expected (1, 1, 4): one value per (batch, kv_heads, slots), made with view.xp",
    ),
    "outside the standard": (
        "def score(self, view): return view.xp.nan_to_num(real(view))",
        "portable array code",
        "nan_to_num",
    ),
    "not declared in needs": (
        "def score(self, view): return view.xp.sum(view.keys, axis=-1)",
        "shapes and finite scores",
        "is what it reads declared in `needs`?",
    ),
    "reads self.budget": (
        "def score(self, view): return view.positions % (self.budget or 7)",
        "no self.budget",
        "the rule reads self.budget, which a compiled step does not have; expected view.budget",
    ),
    "protects more than it says": (
        """
        def score(self, view): return view.positions
        def protected(self, view): return view.newest(3)
        def protects(self, budget): return 2
        """,
        "protected as promised",
        "protected marks 3 tokens at budget 2; protects(2) promises at most 2",
    ),
    "no budget is enough": (
        """
        def score(self, view): return view.positions
        def protects(self, budget): return budget + 1
        """,
        "budgets accepted and refused",
        "protects(budget) exceeds the budget for every budget",
    ),
    "depends on slot order": (
        """
        order_free = True
        def score(self, view): return view.xp.cumulative_sum(view.xp.ones_like(real(view)), axis=-1)
        """,
        "slot order",
        "slots in another order, which order_free promises not to matter: keeps other tokens",
    ),
    "memory by slot": (
        """
        memory = {"turn": 0.0}
        def note(self, view): return {"turn": view.xp.cumulative_sum(view.memory["turn"] + 1.0, axis=-1)}
        def score(self, view): return view.memory["turn"]
        """,
        "slot order",
        "slots in another order, which note must not depend on: remembers other numbers in 'turn'",
    ),
    "memory of another shape": (
        """
        memory = {"turn": 0.0}
        def note(self, view): return {"turn": view.memory["turn"][..., :1]}
        def score(self, view): return view.positions
        """,
        "shapes and finite scores",
        "note returned",
    ),
    "hidden state": (
        """
        calls: ClassVar[list] = []
        def score(self, view):
            self.calls.append(1)
            return (view.positions * 7919 * len(self.calls)) % 101
        """,
        "no state between sequences",
        "the same sequence a second time (hidden state between sequences, or a random generator)",
    ),
    "random generator": (
        """
        needs = Needs(keys=True)
        def score(self, view): return real(view) + float(np.random.default_rng().normal()) * view.keys[..., 0]
        """,
        "no state between sequences",
        "keeps other tokens",
    ),
    "counts empty slots": (
        """
        needs = Needs(keys=True)
        def score(self, view):
            mean = view.xp.mean(view.keys, axis=2, keepdims=True)
            return view.xp.sum(view.keys * mean, axis=-1)
        """,
        "empty slots",
        "empty slots at the end change the result",
    ),
    "looks at other rows": (
        """
        needs = Needs(keys=True)
        def score(self, view):
            first = view.xp.where(view.filled, view.keys[..., 0], 0.0)
            return view.xp.sum(first, axis=(0, 2), keepdims=True) * real(view)
        """,
        "rows alone",
        "a row depends on the rest of its batch",
    ),
    "merges by other rows": (
        """
        merges = True
        needs = Needs(keys=True, values=True)
        def head_memory(self, layer): return {"level": ()}
        def score(self, view): return real(view)
        def merge(self, view, index):
            from framework.arrays import take_slots
            level = view.xp.max(view.keys[:, :, 0, 0], axis=0)
            values = take_slots(view.xp, view.values, index)
            new = {"level": view.memory["level"] + level}
            return take_slots(view.xp, view.keys, index), values, new
        """,
        "rows alone",
        "a row depends on the rest of its batch: other numbers in 'level' after merging",
    ),
    "shared in name only": (
        """
        shared = True
        needs = Needs(keys=True)
        def score(self, view): return view.keys[..., 0]
        """,
        "one set for all heads",
        "shared promises one kept set for all heads of a layer, and they differ",
    ),
    "branches on a value": (
        """
        def score(self, view): return view.positions if view.budget[0, 0] > 5 else -view.positions
        """,
        "jax equals NumPy",
        "TracerBoolConversionError",
    ),
    "another rule in jax": (
        """
        def score(self, view):
            return -view.positions if "jax" in view.xp.__name__ else view.positions
        """,
        "jax equals NumPy",
        "jax and NumPy disagree: keeps other tokens",
    ),
    "unhashable": (
        """
        weights: list = field(default_factory=list)
        def score(self, view): return view.positions
        """,
        "frozen, hashable, spelled",
        "a policy must be hashable: unhashable type: 'list'",
    ),
    "compared without a field": (
        """
        step: int = field(default=2, compare=False)
        def score(self, view): return view.positions % self.step
        """,
        "frozen, hashable, spelled",
        "Broken is compared without its fields ['step']",
    ),
}

UNREADABLE = {
    "does not import": ("import no_such_library", "does not import as a policy"),
    "syntax": ("def :", "does not import as a policy"),
    "no policy in it": ("x = 1", "defines no policy classes"),
    "no score": (
        "from dataclasses import dataclass\nfrom framework.policy import Policy\n"
        "@dataclass(frozen=True)\nclass Mute(Policy): pass",
        "score",
    ),
    "examples fail": (
        LOUD + "    examples = classmethod(lambda cls: 1 / 0)\n",
        "examples() failed: ZeroDivisionError",
    ),
}


def written(folder: Path, body: str) -> Path:
    """A policy's file with this body."""
    text = f"{HEAD}@dataclass(frozen=True, kw_only=True)\nclass Broken(Policy):\n"
    path = folder / "broken.py"
    path.write_text(text + "".join(f"    {line}\n" for line in dedent(body).strip("\n").splitlines()))
    return path


def failures(policy: Policy, tier: str) -> list[str]:
    """The failures in words; a check that was not run is one."""
    return [
        report(each.check, each.failure) if each.failure else f"{each.check} was not run"
        for each in run(policy, tier)
        if not each.passed
    ]


@pytest.mark.parametrize("policy", cases(FIRST, CORE), ids=name)
def test_bundled_policies_pass_the_model_tier(policy):
    assert failures(policy, "model") == []


@pytest.mark.parametrize("policy", cases(EXAMPLES, CORE), ids=name)
def test_bundled_policies_pass_the_rule_tier(policy):
    assert failures(policy, "rule") == []


# Every fourth one, for the time that compiling takes; `kvtwin check POLICY` runs any of them.
@pytest.mark.slow
@pytest.mark.parametrize("policy", [one for one in EXAMPLES if one not in FIRST][::8], ids=name)
def test_other_examples_pass_the_model_tier(policy):
    assert failures(policy, "model") == []


def test_every_check_runs_in_the_tier_all(monkeypatch):
    for tier in (check_rule, check_model):
        monkeypatch.setattr(tier, "attempt", lambda check, policy: None)
    results = run(policies.make("tova"), "all")
    assert [each.check for each in results] == [
        each.name for each in (*check_rule.CHECKS, *check_model.CHECKS)
    ]


def test_a_file_outside_the_repository_passes_at_the_command_line(tmp_path):
    (tmp_path / "loud.py").write_text(LOUD)
    outside = subprocess.run(
        [sys.executable, "-m", "experiments.run", "check", str(tmp_path / "loud.py"), "--tier", "rule"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert outside.returncode == 0, outside.stdout + outside.stderr
    assert f"{len(check_rule.CHECKS)} of {len(check_rule.CHECKS)} checks pass" in outside.stdout


def test_a_file_outside_the_repository_passes_the_model_tier(tmp_path):
    (tmp_path / "loud.py").write_text(LOUD)
    assert failures(policies.make(f"{tmp_path / 'loud.py'}(half_life=3.0)"), "model") == []


@pytest.mark.parametrize("case", BROKEN)
def test_broken_policies_are_refused(case, tmp_path):
    body, check, words = BROKEN[case]
    policy = policies.make(f"{written(tmp_path, body)}(budget=9)")
    every = ((each.name, check_rule.attempt(each, policy)) for each in check_rule.CHECKS)
    first, failure = next((which, failure) for which, failure in every if failure is not None)
    assert first == check
    assert words in report(first, failure)


def test_a_failure_at_the_command_line_has_its_reason_and_exit_code_1(tmp_path):
    path = written(tmp_path, BROKEN["NaN"][0])
    result = CliRunner().invoke(app, ["check", str(path), "--tier", "all"])
    assert result.exit_code == 1
    assert "score gave nan to the token at position 2" in result.stdout
    assert "smallest example" in result.stdout
    assert (
        "positions: [0, 1, 2, -1, -1, -1]" in result.stdout.replace("\n", " ")
        or "positions:" in result.stdout
    )
    assert "not run" in result.stdout


def test_json_holds_every_result(tmp_path):
    path = written(tmp_path, BROKEN["a list"][0])
    result = CliRunner().invoke(app, ["check", str(path), "--tier", "rule", "--json"])
    rows = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [row["check"] for row in rows] == [each.name for each in check_rule.CHECKS]
    assert [row["check"] for row in rows if row["failure"]] == ["shapes and finite scores"]


@pytest.mark.parametrize("case", UNREADABLE)
def test_files_that_hold_no_policy_are_bad_input(case, tmp_path):
    text, words = UNREADABLE[case]
    path = tmp_path / "policy.py"
    path.write_text(text)
    with pytest.raises(KvtwinError) as error:
        found(str(path))
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("snapkw", "near: snapkv"),
        ("snapkv(budget=16)", "expected at least 32"),
        ("window(budget=0)", "expected at least 4"),
        ("nowhere/at_all.py", "no Python file is at"),
        ("tova(budget=9", "does not spell a policy"),
    ],
)
def test_bad_input_exits_with_code_2(text, words):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", "check", text],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@dataclass(frozen=True, kw_only=True)
class NotANumber(Policy):
    """NaN for the token at position 3."""

    def score(self, view):
        return view.xp.where(
            view.positions == 3, view.xp.nan, view.xp.astype(view.positions, view.xp.float32)
        )


@dataclass(frozen=True, kw_only=True)
class WrongShape(Policy):
    """One score for each head."""

    def score(self, view):
        return view.positions[..., 0]


@dataclass(frozen=True, kw_only=True)
class TorchOnly(Policy):
    """A tensor's method that arrays of other libraries lack."""

    def score(self, view):
        return view.positions.unsqueeze(0)


@dataclass(frozen=True, kw_only=True)
class NumPyOnly(Policy):
    """Leaves the library of the view."""

    def score(self, view):
        return np.asarray(view.positions)


@dataclass(frozen=True, kw_only=True)
class LooseMemory(Policy):
    """Remembers a number instead of an array."""

    memory: ClassVar = {"count": 0.0}

    def note(self, view):
        return {"count": 1.0}

    def score(self, view):
        return view.positions


@dataclass(frozen=True, kw_only=True)
class CountsProtected(Policy):
    """Numbers where True and False belong."""

    def score(self, view):
        return view.positions

    def protected(self, view):
        return view.positions


RUNTIME = {
    NotANumber: "scored NaN",
    WrongShape: "score returned shape (",
    TorchOnly: "",
    NumPyOnly: "",
    LooseMemory: "note returned",
    CountsProtected: "protected returned",
}


@pytest.fixture(scope="module")
def models():
    spec = tiny_spec()
    weights = random_weights(spec, seed=5)
    dtypes = {"reference": "float64", "torch": "float32", "flax": "float32"}
    return {key: backends.get(key).build(spec, weights, dtype) for key, dtype in dtypes.items()}


@pytest.mark.parametrize("backend", ["reference", "torch", "flax"])
@pytest.mark.parametrize("kind", RUNTIME, ids=lambda kind: kind.__name__)
def test_a_broken_policy_in_a_step_is_one_clear_error(kind, backend, models):
    if (kind, backend) == (NumPyOnly, "reference"):
        kind = WrongShape  # the reference is NumPy
    model = models[backend]
    cache = model.cache(policy=kind(budget=4), batch=2)
    with pytest.raises(KvtwinError) as error:
        model.step(np.arange(14, dtype=np.int32).reshape(2, 7), cache)
    assert RUNTIME[kind] in str(error.value)
    assert name(kind(budget=4)).split("(")[0] in str(error.value)
    assert 1 <= len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_nan_at_decode_is_refused(backend, models):
    cache = models[backend].cache(policy=NotANumber(budget=5), batch=1)
    _, cache = models[backend].step([[1, 2]], cache)
    _, cache = models[backend].step([[3]], cache)
    with pytest.raises(KvtwinError, match="scored NaN"):
        models[backend].step([[4]], cache)


def test_the_model_tier_sees_another_rule(tmp_path):
    body = 'def score(self, view): return -view.positions if "torch" in view.xp.__name__ else view.positions'
    failure = check_model.check_torch(policies.make(f"{written(tmp_path, body)}(budget=9)"))
    assert failure is not None
    assert failure.what == "torch keeps other tokens than the reference"
    assert failure.where == {"library": "torch", "budget": 1, "layer": 0, "row": 0, "head": 0, "step": 0}
    assert (failure.example["expected"], failure.example["got"]) == ([6], [0])


def test_the_model_tier_sees_rows_in_another_order(tmp_path):
    body = "def score(self, view): return view.positions * (view.seen[0] - 5)"
    policy = policies.make(f"{written(tmp_path, body)}(budget=9)")
    moments = [list(check_model.play("torch", replace(policy, budget=3), check_model.prompts(policy), rows))
               for rows in ((0, 1, 2), (2, 0, 1))]  # fmt: skip
    found = [check_model.differs(*pair, 3, 0, "torch") for pair in zip(*moments, strict=True)]
    assert found[0] is not None
    assert found[0].where["row"] == 0


def test_the_model_tier_sees_a_compilation(monkeypatch):
    """Equal policies whose hashes differ compile anew; the kit's own listener must notice."""
    policy = policies.make("keep_it_odd(budget=9)")
    fresh = iter(range(10**6))
    monkeypatch.setattr(type(policy), "__hash__", lambda self: next(fresh))
    failure = check_model.check_compiles(replace(policy))
    assert failure is not None
    assert "tracings and compilations at budgets" in failure.what
