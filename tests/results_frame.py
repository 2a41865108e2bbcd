"""A frame of results as experiments.sweeps.results.read gives it, made up: every axis of a different size, with flags,
failures, a question that is gone, and policies without a budget.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

QUESTIONS = ("passkey(length=256)", "mqar(length=128, pairs=4)", "gone(length=9)")
POLICIES = ("full()", "h2o()", "window(sinks=4)", "snapkv(window=16)", "oracle_future()")
BUDGETS = (0.1, 0.25, 0.5, 48.0)
CODECS = ("full()", "int8()")
SEEDS = 7
FLAGS = ("missed_budget", "never_fired", "masked")
HOSTILE = "it broke: </script><script>alert('x')</script> & <b>so</b>"
PROVENANCE = {"kvtwin": "0.1.0", "torch": "2.13.0", "machine": "a cpu, 2 cores", "git": "d5c08d6"}


def results(
    questions: Sequence[str] = QUESTIONS,
    policies: Sequence[str] = POLICIES,
    budgets: Sequence[float] = BUDGETS,
    codecs: Sequence[str] = CODECS,
    backends: Sequence[str] = ("torch", "flax"),
    seeds: int = SEEDS,
    seed: int = 0,
    flags: float = 0.05,
    failures: float = 0.02,
) -> pd.DataFrame:
    """Rows of the whole grid, in random order; `flags` and `failures` are the shares of rows that have some."""
    random = np.random.default_rng(seed)
    rows = []
    for question, policy, codec, backend in product(questions, policies, codecs, backends):
        for budget in [np.nan] if policy.startswith("full") else budgets:
            rows += [
                _row(random, question, policy, float(budget), codec, backend, each, flags, failures)
                for each in range(seeds)
            ]
    frame = pd.DataFrame(rows)
    return frame.sample(frac=1, random_state=seed).reset_index(drop=True)


def _row(
    random: np.random.Generator,
    question: str,
    policy: str,
    budget: float,
    codec: str,
    backend: str,
    seed: int,
    flags: float,
    failures: float,
) -> dict[str, Any]:
    key = {
        "question": question,
        "task": question.partition("(")[0],
        "model": "probe",
        "weights": "0f3c",
        "policy": policy,
        "method": policy.partition("(")[0],
        "budget": budget,
        "codec": codec,
        "backend": backend,
        "dtype": "float32",
        "seed": seed,
    }
    facts = {f"provenance.{name}": value for name, value in PROVENANCE.items()} | {"seconds": 0.25}
    context = int(random.integers(200, 230))
    if random.random() < failures:
        return key | facts | {"error": HOSTILE, "flags": (), "said": "", "wanted": ""}
    requested = budget if budget >= 1 else np.ceil(budget * context)
    kept = context if np.isnan(budget) else min(requested, context)
    share, width = kept / context, 0.3 if codec == "int8()" else 1.0
    skill = {"full": 0.99, "oracle_future": 0.97, "h2o": 0.7, "snapkv": 0.8, "window": 0.55}.get(
        key["method"], 0.6
    )
    score = float(np.clip(skill * share**0.3 + random.normal(0, 0.08), 0, 1))
    raised = tuple(flag for flag in FLAGS if random.random() < flags) if not np.isnan(budget) else ()
    return (
        key
        | facts
        | {
            "measure.score": score,
            "measure.loss": 1.0 - score,
            "context": context,
            "requested": requested,
            "kept_min": kept - ("missed_budget" in raised),
            "kept_max": kept,
            "kept": float(kept),
            "payload": int(1024 * width * kept),
            "allocated": int(1100 * width * kept) + 4096,
            "full": 1024 * context,
            "flags": raised,
            "said": f" {seed}",
            "wanted": f" {seed}",
            "error": "",
        }
    )
