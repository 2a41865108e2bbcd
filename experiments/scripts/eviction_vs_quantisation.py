"""Question: a cache may hold so many bytes. Few tokens in 16 bits, or more tokens in fewer bits?

Each size is that of so many tokens in float16. Every other codec gets the budget that takes the same bytes by the
formula of `kvtwin memory`, and what was really held is measured and printed beside the score. All codecs are asked on
the same prompts, so that their differences are paired.

    python -m experiments.scripts.eviction_vs_quantisation

Expected: as in arXiv 2412.12706, four times as many tokens in 4 bits recall more than as many in 16, at every size but
those where 16 bits already recall all; and 2 bits, with eight times as many tokens, recall less than 4.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.held import ITEMSIZE
from framework.checkpoint import open_checkpoint
from framework.codec import codecs as known
from framework.footprint import per_token
from framework.spec import ModelSpec

if TYPE_CHECKING:
    from pandas import DataFrame

BASE = "fp16()"
CODECS = (BASE, "int8()", "ggml_q4_0()", "turboquant(bits=2)")


def budget(spec: ModelSpec, codec: str, tokens: int, dtype: str = "float32") -> int:
    """Tokens that take no more bytes in this codec than so many take in 16 bits."""
    one, base = (per_token(spec, known.make(each), ITEMSIZE[dtype]).kv for each in (codec, BASE))
    return int(tokens * base / one)


def main(
    model: str = "probe",
    question: str = "passkey(length=512)",
    policy: str = "snapkv()",
    tokens: Sequence[int] = (16, 32, 64),
    codecs: Sequence[str] = CODECS,
    seeds: int = 20,
    backend: str = "torch",
    out: str = "results/eviction_vs_quantisation.sqlite",
) -> "DataFrame":
    """One row for each size, codec and seed; `size` is the tokens in 16 bits that take as many bytes."""
    import pandas

    from experiments.interval import interval
    from experiments.sweep import sweep

    spec, parts = open_checkpoint(model).spec, []
    for size in tokens:
        for codec in codecs:
            part = sweep(
                questions=[question],
                model=model,
                policies=[policy],
                budgets=[budget(spec, codec, size)],
                codecs=[codec],
                backends=[backend],
                seeds=range(seeds),
                out=out,
            )
            parts.append(part.assign(size=size))
    frame = pandas.concat(parts, ignore_index=True)
    score = next(name for name in frame.columns if name.startswith("measure."))
    base = frame[frame["codec"] == BASE].set_index(["size", "seed"])[score]
    for (size, codec), rows in frame.groupby(["size", "codec"], sort=False):
        mean, low, high = interval(rows[score])
        line = f"{size} tokens in 16 bits, {codec}: kept {rows['kept'].mean():.0f}, "
        line += f"{rows['payload'].mean() / 1024:.1f} KiB, {score} {mean:.2f} ({low:.2f} to {high:.2f})"
        if codec != BASE and len(base):
            paired = rows[score].to_numpy() - base.loc[[(size, seed) for seed in rows["seed"]]].to_numpy()
            line += ", paired difference {:+.2f} ({:+.2f} to {:+.2f})".format(*interval(paired))
        print(line)
    return frame


if __name__ == "__main__":
    main()
