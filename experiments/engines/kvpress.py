"""kvpress as an engine: a prompt read and compressed by one of its presses.

kvpress 0.5.5 asks for transformers below 5.3, so that this runs in another environment than kvtwin, and imports nothing
of kvtwin but the cases and the engines. `fraction` is the share that is kept; other settings are those that the press
has by itself, which the case must name for kvtwin.
"""

from typing import Any

from experiments.benches.case import KEPT, PRESSES, Case
from experiments.engines.huggingface import HuggingFace
from experiments.engines.protocol import Block, serve

CLASSES = {
    "snapkv": "SnapKVPress",
    "expected_attention": "ExpectedAttentionPress",
    "keydiff": "KeyDiffPress",
    "tova": "TOVAPress",
    "window": "StreamingLLMPress",
}


class Kvpress(HuggingFace):
    """Presses at prefill, on a dynamic cache."""

    def __init__(self) -> None:
        import kvpress

        super().__init__("dynamic")
        self.kvpress = kvpress

    def prepare(self, case: Case) -> Block:
        if case.kind != "prefill" or case.policy not in PRESSES:
            raise ValueError(
                f"no press is known for {case}; expected a prefill under one of {', '.join(PRESSES)}"
            )
        press = getattr(self.kvpress, CLASSES[case.policy.partition("(")[0]])(compression_ratio=1 - KEPT)
        tokens = self._tokens(case)

        def work(cache: Any) -> Any:
            with self.torch.no_grad(), press(self.model):
                return self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

        return Block(work, self.transformers.DynamicCache)


if __name__ == "__main__":
    serve(Kvpress)
