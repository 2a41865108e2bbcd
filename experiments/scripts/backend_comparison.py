"""Question: do PyTorch and JAX do the same as the specification, whatever the policy: tokens kept, logits, text?

The reference, NumPy in float64, reads two prompts of different length and decodes greedily. Each backend is led along
its tokens with its kept sets forced, while its own choice is compared at every step, and runs once freely.

    python -m experiments.scripts.backend_comparison

Expected: every line ends with `same`. Logits drift by less than 1e-5 of the largest, all kept sets are equal or differ
by tokens whose scores are equal up to rounding, and both backends write the reference's text.

Run time: two minutes on two cores, most of it the reference and compilation.
"""

from collections.abc import Sequence

from backends import backends as known
from experiments.compare import Verdict, cast, examine, prompts, run
from framework.checkpoint import open_checkpoint

POLICIES = ("full()", "window(budget=48)", "h2o(budget=48)", "snapkv(budget=48, window=16)")


def main(
    model: str = "bytes",
    policies: Sequence[str] = POLICIES,
    backends: Sequence[str] = ("torch", "flax"),
    dtype: str = "float32",
    tokens: int = 96,
    steps: int = 32,
) -> dict[tuple[str, str], Verdict]:
    """The verdict on each policy and backend, printed as it comes; `failures` says what is outside tolerance."""
    checkpoint = open_checkpoint(model)
    reference = known.get("reference").build(checkpoint.spec, cast(checkpoint.weights, dtype), "float64")
    tested = {name: known.get(name).build(checkpoint.spec, checkpoint.weights, dtype) for name in backends}
    verdicts = {}
    for policy in policies:
        expected = run(reference, prompts(checkpoint, tokens), policy, steps)
        for name, built in tested.items():
            verdict = examine(name, built, expected, policy, dtype)
            kept = f"{verdict.kept.equal} of {verdict.kept.decisions}" if verdict.kept else "all"
            told = "; ".join(verdict.failures) or "same"
            print(f"{policy} on {name}: logits drift {verdict.logits:.1e}, kept sets equal: {kept}, {told}")
            verdicts[policy, name] = verdict
    return verdicts


if __name__ == "__main__":
    main()
