"""Hugging Face transformers as an engine: `python -m experiments.engines.huggingface dynamic|static|compile`.

The same weights from the same folder, attention by sdpa, on a GPU where the program may see one. Tokens are chosen by a
bare greedy loop over the model's forward, under `torch.no_grad` as in `generate`, whose own work for each token is left
out. `static` holds exactly the tokens of the case; `compile` is that with `torch.compile` on the forward of a decode
step, on a GPU in the mode that records CUDA graphs. Nothing is evicted or coded: a policy or a codec is refused.
"""

import sys
from typing import Any

import numpy as np

from experiments.benches.case import FLOAT, FULL, Case
from experiments.engines.protocol import Block, Program, serve
from experiments.engines.settling import settle_torch

KINDS = ("dynamic", "static", "compile")


class HuggingFace(Program):
    """One kind of cache."""

    def __init__(self, kind: str):
        import torch
        import transformers

        if kind not in KINDS:
            raise ValueError(f"no kind of cache {kind!r}; expected one of {', '.join(KINDS)}")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.kind, self.torch, self.transformers = kind, torch, transformers
        self.on_gpu = torch.cuda.is_available()
        self.place: Any = {"device": "cuda" if self.on_gpu else "cpu"}
        self.model: Any = None

    def load(self, folder: str, dtype: str = FLOAT) -> None:
        kind = getattr(self.torch, dtype)
        model = self.transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=kind, attn_implementation="sdpa", local_files_only=True
        )
        self.model = model.eval().to(**self.place)
        settle_torch()

    def prepare(self, case: Case) -> Block:
        if (case.policy, case.codec) != (FULL, FULL):
            raise ValueError(f"transformers knows neither {case.policy} nor {case.codec}")
        return {"decode": self._decode, "prefill": self._prefill, "start": self._start}[case.kind](case)

    def _tokens(self, case: Case) -> Any:
        random = np.random.default_rng(0)
        return self.torch.from_numpy(
            random.integers(0, self.model.config.vocab_size, (case.batch, case.context))
        ).to(**self.place)

    def _cache(self, room: int) -> Any:
        if self.kind == "dynamic":
            return self.transformers.DynamicCache(config=self.model.config)
        return self.transformers.StaticCache(config=self.model.config, max_cache_len=room)

    def _forward(self, forward: Any, tokens: Any, cache: Any) -> Any:
        """The next token of each row."""
        out = forward(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1)

    def _decode(self, case: Case) -> Block:
        config, cache = self.model.config, self._cache(case.context + case.steps)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (case.batch, config.num_key_value_heads, case.context, head_dim)
        for index in range(config.num_hidden_layers):
            kind = {"dtype": self.model.dtype, **self.place}
            cache.update(self.torch.randn(shape, **kind), self.torch.randn(shape, **kind), index)
        held = [(layer.keys, layer.values) for layer in cache.layers]
        forward = self.model.forward
        if self.kind == "compile":
            mode = "reduce-overhead" if self.on_gpu else None
            forward = self.torch.compile(forward, dynamic=False, mode=mode)

        def fresh() -> Any:
            for layer, (keys, values) in zip(cache.layers, held, strict=True):
                if self.kind == "dynamic":
                    layer.keys, layer.values = keys, values
                else:
                    layer.cumulative_length.fill_(case.context)
            return self.torch.zeros(case.batch, 1, dtype=self.torch.long, **self.place)

        def work(token: Any) -> Any:
            with self.torch.no_grad():
                for _ in range(case.steps):
                    if self.kind == "compile" and self.on_gpu:
                        self.torch.compiler.cudagraph_mark_step_begin()
                    token = self._forward(forward, token, cache)
            return cache

        size = sum(each.nbytes for pair in held for each in pair)
        return Block(work, fresh, {"cache_bytes": size}, settle_torch)

    def _prefill(self, case: Case) -> Block:
        tokens = self._tokens(case)

        def work(cache: Any) -> Any:
            with self.torch.no_grad():
                return self._forward(self.model, tokens, cache)

        return Block(work, lambda: self._cache(case.context), settle=settle_torch)

    def _start(self, case: Case) -> Block:
        tokens = self._tokens(case)

        def work(_: Any) -> None:
            cache = self._cache(case.context + 1)
            with self.torch.no_grad():
                self._forward(self.model, self._forward(self.model, tokens, cache), cache)

        return Block(work, settle=settle_torch)


if __name__ == "__main__":
    serve(lambda: HuggingFace(sys.argv[1]))
