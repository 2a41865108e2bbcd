"""Question: how do twelve policies compare on eight questions, at four budgets?

The standard suite: 20 cases of each question, 512 tokens each, the same for every policy, and the report of it.

    python -m experiments.scripts.standard

Expected: results/standard.sqlite, which it goes on from when it is started again, and results/standard/report.html.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame

QUESTIONS = (
    "passkey()",
    "mqar()",
    "niah(haystack='text', keys=2)",
    "niah(keys=2, values_are='uuids')",
    "copy()",
    "vt()",
    "turns()",
    "perplexity()",
)
POLICIES = (
    "expected_attention()",
    "h2o()",
    "key_norm()",
    "keydiff()",
    "kvzip()",
    "lagkv()",
    "pyramid(policy=snapkv(window=16))",
    "adakv(policy=snapkv(window=16))",
    "random()",
    "snapkv(window=16)",
    "tova()",
    "window()",
)
BUDGETS = (0.1, 0.25, 0.5, 0.75)


def main(
    model: str = "probe",
    questions: Sequence[str] = QUESTIONS,
    policies: Sequence[str] = POLICIES,
    budgets: Sequence[float] = BUDGETS,
    seeds: int = 20,
    backend: str = "flax",
    jobs: int = 2,
    out: str = "results/standard.sqlite",
) -> "DataFrame":
    """One row for each question, policy, budget and seed, the full cache first; the report lies beside `out`."""
    from experiments import page
    from experiments.sweep import sweep

    frame = sweep(
        questions=questions,
        model=model,
        policies=["full()", *policies],
        budgets=budgets,
        backends=backend,
        seeds=range(seeds),
        out=out,
        jobs=jobs,
    )
    print(page.build(frame, Path(out).with_suffix(""), f"kvtwin: the standard suite on {model}"))
    return frame


if __name__ == "__main__":
    main()
