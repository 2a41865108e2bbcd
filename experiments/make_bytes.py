"""Make `framework/models/bytes`: a byte-level Llama trained on the source text of the Python standard library.

    python -m experiments.make_bytes

One thread, about half an hour on a free core; 1.7 million parameters, 3.3 MB on disk. The last line printed is the
held-out byte perplexity of the float16 weights at context 512; expect 2.8.

The tokens are the bytes, so there is no tokenizer. The training text is every .py file of the running Python's
standard library but the tests, tables and the held-out files (experiments/text.py). The held-out text is
committed, since the library differs from one Python to the next; it is written only where it is missing. The same seed
on the same machine and versions gives the same weights. An interrupted run goes on from its checkpoint. Training sees
windows of up to 1024 bytes: beyond that position the model grows worse.
"""

import math
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from experiments.text import library

MODELS = Path(__file__).resolve().parent.parent / "framework" / "models"
TOKENS = 4096  # a training step
WARMUP, PEAK, DECAY, LONG = 100, 4e-3, 0.4, 0.3  # steps, learning rate, last share decaying, last share long


def causal(module, query, key, value, mask, scaling, **_):
    """Plain causal attention, about twice as fast as the fused one at these sizes on a CPU."""
    batch, heads, tokens, head_dim = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1).flatten(0, 1) for x in (key, value))
    hidden = torch.full((tokens, tokens), -torch.inf, dtype=query.dtype).triu(1)
    scores = torch.baddbmm(hidden, query.flatten(0, 1), key.transpose(1, 2), alpha=scaling)
    out = torch.softmax(scores, dim=-1) @ value
    return out.view(batch, heads, tokens, head_dim).transpose(1, 2).contiguous(), None


def build() -> LlamaForCausalLM:
    """The untrained model."""
    AttentionInterface.register("causal", causal)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="causal",
    )
    return LlamaForCausalLM(config)


def draw(text: np.ndarray, step: int, context: int, seed: int) -> torch.Tensor:
    """The windows of a step [rows, context + 1]: each pass over the text cuts it elsewhere and shuffles the pieces."""
    rows = TOKENS // context
    pieces = (len(text) - context - 1) // context
    windows = []
    for index in range(step * rows, (step + 1) * rows):
        rng = np.random.default_rng([seed, context, index // pieces])
        shift, order = rng.integers(context), rng.permutation(pieces)
        start = shift + context * order[index % pieces]
        windows.append(text[start : start + context + 1])
    return torch.from_numpy(np.stack(windows).astype(np.int64))


def loss_of(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean nats a byte over all predicted bytes."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, text: bytes, context: int = 512) -> float:
    """exp of the mean nats a byte over whole windows of `context` bytes, each begun without a past."""
    codes = np.frombuffer(text, np.uint8)
    starts = range(0, len(codes) - context, context)
    windows = torch.from_numpy(np.stack([codes[s : s + context + 1] for s in starts]).astype(np.int64))
    return math.exp(np.mean([loss_of(model, part[None]).item() for part in windows]))


def main(
    steps: Annotated[int, typer.Option(help="training steps of 4096 bytes")] = 3600,
    seed: Annotated[int, typer.Option(help="of the initial weights and the order of the text")] = 0,
    out: Annotated[Path, typer.Option(help="folder for config.json and model.safetensors")] = MODELS
    / "bytes",
    checkpoint: Annotated[Path, typer.Option(help="file to go on from; removed at the end")] = Path(
        "bytes.pt"
    ),
):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    train, held_out = library()
    committed = MODELS / "text" / "held_out.txt"
    if not committed.exists():
        committed.parent.mkdir(parents=True, exist_ok=True)
        committed.write_bytes(held_out)
    text, held_out = np.frombuffer(train, np.uint8), committed.read_bytes()
    model = build()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), fused=True)
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters, {len(text)} bytes to train on", flush=True
    )
    began = time.monotonic()
    for step in range(first, steps):
        # until the decay begins nothing depends on `steps`, so a checkpoint may be finished with fewer
        rate = PEAK * min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # short windows learn most per second; the long ones, every third longer still, teach the far positions
        context = 256 if step < (1 - LONG) * steps else 1024 if step % 3 == 0 else 512
        windows = draw(text, step, context, seed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1} loss {loss.item():.3f} seconds {time.monotonic() - began:.0f}", flush=True
            )
        if (step + 1) % 250 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(checkpoint)
            print(f"step {step + 1} held-out perplexity {perplexity(model, held_out):.3f}", flush=True)
    model.half().save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    kept = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="causal")
    checkpoint.unlink(missing_ok=True)
    print(f"held-out byte perplexity {perplexity(kept, held_out):.3f}")


if __name__ == "__main__":
    typer.run(main)
