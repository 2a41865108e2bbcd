"""The checks of the first tier that run the rule in every array library, each of which keeps what NumPy keeps."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from experiments.checks.case import Case, Step, failure_at
from experiments.checks.failure import Failure, broken
from experiments.checks.outcome import (
    ARRAYS,
    MAPS,
    STATIC,
    STRICT,
    Outcome,
    decide,
    decided,
    difference,
    libraries,
    moved,
    moved_block,
    outcome_of,
)
from framework.policy import Block, Policy, View


def check_runs(policy: Policy, case: Case) -> Failure | None:
    """Runs in NumPy at every budget: right shapes, finite scores."""
    return _running(policy, "NumPy", lambda: case.record(policy))


def check_portable(policy: Policy, case: Case) -> Failure | None:
    """Runs in array-api-strict, which has the array API standard and nothing else."""
    return _running(policy, STRICT, lambda: _on(libraries()[STRICT], case.record(policy), policy))


def _running(policy: Policy, library: str, what: Callable[[], Any]) -> Failure | None:
    try:
        what()
    except Exception as error:
        return broken(policy, error, library)
    return None


def check_torch(policy: Policy, case: Case) -> Failure | None:
    """torch keeps what NumPy keeps."""
    return _like_numpy(policy, case, "torch", lambda steps: _on(libraries()["torch"], steps, policy))


def check_strict(policy: Policy, case: Case) -> Failure | None:
    """array-api-strict keeps what NumPy keeps."""
    return _like_numpy(policy, case, STRICT, lambda steps: _on(libraries()[STRICT], steps, policy))


def check_jax(policy: Policy, case: Case) -> Failure | None:
    """jax, compiled, keeps what NumPy keeps."""
    return _like_numpy(policy, case, "jax", lambda steps: _compiled(policy, steps)[0])


def _like_numpy(
    policy: Policy, case: Case, library: str, run: Callable[[list[Step]], list[Outcome]]
) -> Failure | None:
    steps = case.record(policy)
    try:
        outcomes = run(steps)
    except Exception as error:
        return broken(policy, error, library)
    for step, outcome in zip(steps, outcomes, strict=True):
        found = difference(step.outcome, outcome, step.budget)
        failure = failure_at(step, found, f"{library} and NumPy disagree", library=library)
        if failure:
            return failure
    return None


def _on(xp: Any, steps: list[Step], policy: Policy) -> list[Outcome]:
    static = replace(policy, budget=None)
    return [decided(static, moved(step.view, xp), moved_block(step.block, xp)) for step in steps]


def _compiled(policy: Policy, steps: list[Step]) -> tuple[list[Outcome], int]:
    """Outcomes of one compiled function over all steps, and how often it was traced."""
    import jax

    function, traces = _jitted()
    before = len(traces)
    outcomes = []
    with jax.enable_x64(True):
        for step in steps:
            view = step.view
            static = tuple(getattr(view, key) for key in STATIC)
            arrays = {key: getattr(view, key) for key in ARRAYS} | {
                key: dict(getattr(view, key)) for key in MAPS
            }
            fresh = replace(policy, budget=None)  # an equal instance, not the same one
            block = step.block and tuple(vars(step.block).values())
            outcomes.append(outcome_of(view.positions, function(fresh, static, arrays, block)))
    return outcomes, len(traces) - before


@functools.cache
def _jitted() -> tuple[Callable, list]:
    """The compiled decision, and a list that grows by one whenever it is traced."""
    import jax

    traces: list[Any] = []

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def function(policy: Policy, static: tuple, arrays: dict, block: tuple | None) -> Any:
        traces.append(static)
        view = View(xp=libraries()["jax"], **dict(zip(STATIC, static, strict=True)), **arrays)
        return decide(policy, view, Block(*block) if block else None)

    return function, traces


def check_compiles(policy: Policy, case: Case) -> Failure | None:
    """Neither another step nor another budget compiles anew in jax."""
    steps = case.record(policy)
    _compiled(policy, steps)
    try:
        _, traces = _compiled(policy, steps)
    except Exception as error:
        return broken(policy, error, "jax")
    if traces:
        return Failure(
            f"{traces} of {len(steps)} calls compiled anew for an equal policy; expected none: __eq__ and __hash__ "
            "must depend on the fields alone",
            {"library": "jax"},
        )
    return None
