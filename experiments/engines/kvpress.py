"""kvpress as an engine: a prompt read and compressed by one of its presses.

kvpress 0.5.5 asks for transformers below 5.3, so that this runs in another environment than kvtwin, and imports nothing
of kvtwin but the case and the protocol. `fraction` is the share that is kept; other settings are those that the press
has by itself, which the case must name for kvtwin.
"""

import re
from typing import Any

import numpy as np

from experiments.bench_case import FLOAT, PRESSES, Case
from experiments.engines.protocol import Block, Program, serve

CLASSES = {
    "snapkv": "SnapKVPress",
    "expected_attention": "ExpectedAttentionPress",
    "keydiff": "KeyDiffPress",
    "tova": "TOVAPress",
    "window": "StreamingLLMPress",
}


class Kvpress(Program):
    """Presses at prefill."""

    def __init__(self) -> None:
        import kvpress
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.kvpress, self.torch, self.transformers = kvpress, torch, transformers
        self.model: Any = None

    def load(self, folder: str, dtype: str = FLOAT) -> None:
        self.model = self.transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(self.torch, dtype), attn_implementation="sdpa", local_files_only=True
        ).eval()

    def prepare(self, case: Case) -> Block:
        if case.kind != "prefill" or case.policy not in PRESSES:
            raise ValueError(
                f"no press is known for {case}; expected a prefill under one of {', '.join(PRESSES)}"
            )
        kept = float(re.search(r"fraction=([\d.]+)", case.policy)[1])  # type: ignore[index]
        press = getattr(self.kvpress, CLASSES[case.policy.partition("(")[0]])(compression_ratio=1 - kept)
        random = np.random.default_rng(0)
        tokens = self.torch.from_numpy(
            random.integers(0, self.model.config.vocab_size, (case.batch, case.context))
        )

        def work(cache: Any) -> Any:
            with self.torch.no_grad(), press(self.model):
                return self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

        return Block(work, self.transformers.DynamicCache)


if __name__ == "__main__":
    serve(Kvpress)
