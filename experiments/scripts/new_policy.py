"""Question: is a long value a reason to keep a token, beside how new it is and how much it was attended to?

A new policy in one file: written, checked by the conformance kit, swept beside two known ones, and plotted.

    python -m experiments.scripts.new_policy

Expected: no check fails. What is asked for has no longer values than the rest, so that `long_values` recalls about as
much as its newest half does: less than `window` at the same budget, and less than `h2o`. The plot is
results/new_policy.png.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framework.policy import Needs, Policy, View, policies

if TYPE_CHECKING:
    from pandas import DataFrame

NEW = "experiments.scripts.new_policy"


@dataclass(frozen=True, kw_only=True)
class LongValues(Policy):
    """Keeps the newest half of the budget, and of the older tokens those with the longest values."""

    @property
    def needs(self) -> Needs:
        return Needs(values=True)

    def score(self, view: View) -> Any:
        return view.xp.sum(view.values * view.values, axis=-1)

    def protected(self, view: View) -> Any:
        return view.newest(view.budget // 2)

    def protects(self, budget: int) -> int:
        return budget // 2


def main(
    model: str = "probe",
    question: str = "passkey(length=256)",
    others: Sequence[str] = ("h2o()", "window()"),
    budgets: Sequence[float] = (0.1, 0.25, 0.5),
    seeds: int = 20,
    out: str = "results/new_policy.sqlite",
) -> "DataFrame":
    """One row for each policy, budget and seed; the plot lies beside `out`."""
    import numpy as np
    from matplotlib.figure import Figure

    from experiments import check
    from experiments.interval import interval
    from experiments.sweep import sweep

    failed = [each.check for each in check.run(policies.make(f"{NEW}(budget=9)"), "rule") if not each.passed]
    print("checks that fail:", failed or "none")
    frame = sweep(
        questions=[question],
        model=model,
        policies=[f"{NEW}()", *others],
        budgets=budgets,
        codecs=["full()"],
        backends=["torch"],
        seeds=range(seeds),
        out=out,
    )
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for policy, rows in frame.groupby("policy"):
        cells = [
            (each["kept"].mean(), *interval(each["measure.score"])) for _, each in rows.groupby("budget")
        ]
        kept, mean, low, high = np.transpose(cells)
        print(
            policy, *(f"{tokens:.0f} tokens: {value:.2f}" for tokens, value in zip(kept, mean, strict=True))
        )
        axes.errorbar(kept, mean, (mean - low, high - mean), label=policy, capsize=3)
    axes.set(xlabel="tokens kept per head", ylabel=f"score in {question}")
    axes.legend()
    figure.savefig(Path(out).with_suffix(".png"))
    return frame


if __name__ == "__main__":
    main()
