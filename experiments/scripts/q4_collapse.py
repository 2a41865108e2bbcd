"""Question: from which size of outlier keys on does 4-bit coding lose the text, and do other codecs lose it too?

Two channels of the keys in the first and the last layer are made s times as large, and the queries that read them as
much smaller: the model's function stays (experiments/outliers.py). Held-out text is then read one token a step, so that
every token but the newest comes from coded storage.

    python -m experiments.scripts.q4_collapse

Expected: the perplexity of `full()` does not move. That of `exl2_q4()` is 1.006 times as large at s = 1, 1.07 times at
30 and 2.5 times at 100; `exl2_q6()`, with 8 bits for keys, stays within 1.005, and so does `kivi`, with 4 bits and no
scale that channels share. Qwen2-7B, which has such keys, was published with 2.69 for Q4 and 1.003 for Q6.

Run time: under a minute on two cores.
"""

from collections.abc import Sequence

from experiments.collapse import Cell, Question, ask, encoded, stretches
from framework.checkpoint import open_checkpoint

CODECS = ("full()", "exl2_q6()", "exl2_q4()", "kivi(bits=4, residual=32)")


def main(
    model: str = "bytes",
    codecs: Sequence[str] = CODECS,
    strengths: Sequence[float] = (1, 30, 100),
    rows: int = 24,
    tokens: int = 128,
    backend: str = "torch",
) -> list[Cell]:
    """One cell for each strength and codec, printed as it comes; `rows` stretches of `tokens` tokens."""
    checkpoint = open_checkpoint(model)
    text = stretches(encoded(None, checkpoint.tokenizer), rows, tokens)
    cells = []
    for cell in ask(
        Question(model, checkpoint, text, strengths=strengths, codecs=codecs, backends=(backend,))
    ):
        told = cell.error
        if cell.perplexity is not None:
            told = f"{cell.perplexity:.3f}, {cell.ratio:.3f} times that of full(), "
            told += f"{cell.bytes_per_token:g} bytes a token"
        print(f"s = {cell.strength:g}, {cell.codec}: {told}")
        cells.append(cell)
    return cells


if __name__ == "__main__":
    main()
