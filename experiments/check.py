"""`kvtwin check`: the conformance kit on any policy, also one in a file outside the repository.

Tier `rule` runs a policy's hooks on one random layer in NumPy, torch, jax and array-api-strict; tier `model` runs it in
a random two-layer model on torch and flax against the reference.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, cast

import typer

from experiments.checks.case import tiny_spec
from experiments.checks.failure import Failure
from framework.errors import KvtwinError
from framework.eviction import layer_budgets
from framework.policy import Policy, name, policies

Tier = Literal["rule", "model", "all"]
TIERS = ("rule", "model", "all")


@dataclass(frozen=True)
class Result:
    """One check of one policy. `failure` is None where it passed, and where it was not run."""

    check: str
    seconds: float
    failure: Failure | None = None
    skipped: bool = False

    @property
    def passed(self) -> bool:
        """Ran, and found nothing."""
        return self.failure is None and not self.skipped


def run(policy: Policy, tier: Tier = "all") -> list[Result]:
    """Every check of the tier on one policy. After a failure that leaves nothing to compare, the rest is not run."""
    return list(_results(policy, tier))


def _results(policy: Policy, tier: Tier) -> Iterator[Result]:
    from experiments.checks import model as check_model
    from experiments.checks import outcome as check_outcome
    from experiments.checks import rule as check_rule

    check_outcome.libraries()  # their import is no part of a check's time
    checks: list[tuple[Any, Callable]] = []
    if tier in ("rule", "all"):
        checks += [(check, check_rule.attempt) for check in check_rule.CHECKS]
    if tier in ("model", "all"):
        checks += [(check, check_model.attempt) for check in check_model.CHECKS]
    closed = failed = False
    for check, attempt in checks:
        if closed or (failed and attempt is check_model.attempt and tier == "all"):
            yield Result(check.name, 0.0, skipped=True)
            continue
        start = time.perf_counter()
        failure = attempt(check, policy)
        yield Result(check.name, time.perf_counter() - start, failure)
        failed = failed or failure is not None
        closed = closed or (check.gate and failure is not None)


def found(text: str) -> list[Policy]:
    """The policy that is spelled, or the examples of a bare class. Raises KvtwinError."""
    if "(" in text and not text.endswith(".py"):
        policy = policies.make(text)
        if policy.budget is not None:
            layers = len(policy.budget) if isinstance(policy.budget, tuple) else 1
            layer_budgets(policy, tiny_spec(layers))
        return [policy]
    kind = policies.get(text)
    try:
        examples = kind.examples()
        wrong = not examples or any(not isinstance(each, Policy) for each in examples)
    except KvtwinError:
        raise
    except Exception as error:
        raise KvtwinError(
            f"{text}: examples() failed: {type(error).__name__}: {error}\n"
            f"expected instances of {kind.__name__}; or spell one out: {text}(budget=16)"
        ) from error
    if wrong:
        raise KvtwinError(f"{text}: examples() returned {examples!r}; expected a list of {kind.__name__}")
    return examples


def command(
    policy: Annotated[
        str,
        typer.Argument(
            help='A name, a dotted module or a file, as in my.py or "snapkv(budget=16, window=4)".'
        ),
    ],
    tier: Annotated[str, typer.Option(help="rule (seconds), model (up to a minute) or all.")] = "all",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Run the conformance kit on a policy; exit code 1 when a check fails."""
    if tier not in TIERS:
        raise KvtwinError(f"no tier is called {tier!r}; expected one of {', '.join(TIERS)}")
    every = {name(one): one for one in found(policy)}
    results: dict[str, list[Result]] = {}
    for spelling, one in every.items():
        results[spelling] = run(one, cast(Tier, tier))
        if not as_json:
            _show(spelling, results[spelling])
    if as_json:
        rows = [
            {"policy": spelling, "passed": each.passed} | asdict(each)
            for spelling, these in results.items()
            for each in these
        ]
        typer.echo(json.dumps(rows, indent=1, default=str))
    if not all(each.passed for these in results.values() for each in these):
        raise typer.Exit(1)


def _show(spelling: str, results: list[Result]) -> None:
    """The table of one policy, then what failed."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    table = Table("check", "result", "seconds", title=spelling, title_justify="left")
    for each in results:
        word = "not run" if each.skipped else "pass" if each.passed else "FAIL"
        style = {"pass": "green", "FAIL": "bold red", "not run": "dim"}[word]
        table.add_row(each.check, f"[{style}]{word}[/]", "" if each.skipped else f"{each.seconds:.2f}")
    console.print(table)
    for each in results:
        if each.failure is not None:
            console.print(report(each.check, each.failure), markup=False)
    count, total = sum(each.passed for each in results), sum(each.seconds for each in results)
    console.print(f"{count} of {len(results)} checks pass in {total:.1f} s", markup=False)


def report(check: str, failure: Failure) -> str:
    """A failure in words: what, where, and the smallest example."""
    lines = [f"{check}: {failure.what}"]
    if failure.where:
        lines.append("  where: " + ", ".join(f"{key} {value}" for key, value in failure.where.items()))
    if failure.example:
        lines.append("  smallest example:")
        lines += [f"    {key}: {value}" for key, value in failure.example.items()]
    return "\n".join(lines)
