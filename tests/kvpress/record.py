"""Records what kvpress' presses keep at prefill, for tests/test_kvpress.py. Run by hand, in an environment of its own.

kvpress asks for transformers below 5.3, which is older than what the project runs with:

    python -m tests.kvpress.models /tmp/models          # here, in the project's environment
    python -m venv /tmp/kvpress
    /tmp/kvpress/bin/pip install kvpress==0.5.5 torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
    /tmp/kvpress/bin/python tests/kvpress/record.py /tmp/models tests/kvpress/recorded.npz

Models run in float64; Hugging Face computes norms and rope angles in float32 all the same. What a press keeps is read
off the keys that it returns, or off the indices that it masks, not off its scores. The token behind the prompt is then
read at its true position, and the first of its logits are recorded. `torch.randn` gives the sketches of models.py while
a press scores, so that random projections are the same on both sides.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import torch
import transformers

LOGITS = 64  # recorded of each next token
LARGEST = 3e38  # wrappers mark what is safe with the largest float64, which float32 does not hold
TINY = {"window_size": 8, "kernel_size": 5}  # of SnapKV and what inherits it


def snapkv(ratio: float) -> Any:
    """The inner press of most wrappers."""
    return kvpress.SnapKVPress(ratio, **TINY)


def expected(ratio: float) -> Any:
    """Expected attention without the length of the values, as CriticalKV's own warning asks for."""
    return kvpress.ExpectedAttentionPress(ratio, n_future_positions=64, use_vnorm=False)


def q_filter(ratio: float, filters: np.ndarray) -> Any:
    """The press with given filters, which it would otherwise fetch."""
    press = kvpress.QFilterPress(ratio)
    press.post_init_from_model = lambda model: None
    press.q_filters = torch.from_numpy(filters).double()
    return press


PRESSES: dict[str, Callable[[float], Any]] = {
    "knorm": kvpress.KnormPress,
    "snapkv": snapkv,
    "tova": kvpress.TOVAPress,
    "streaming_llm": kvpress.StreamingLLMPress,
    "keydiff": kvpress.KeyDiffPress,
    "block_keydiff": lambda r: kvpress.BlockPress(kvpress.KeyDiffPress(r), block_size=11),
    "lagkv": lambda r: kvpress.LagKVPress(r, lag_size=16),
    "lagkv_short": lambda r: kvpress.LagKVPress(r, lag_size=128),
    "lagkv_cross": lambda r: kvpress.LagKVPress(r, n_sink=3, lag_size=16, cross_scoring=True),
    "expected_attention": kvpress.ExpectedAttentionPress,
    "expected_attention_mean": lambda r: kvpress.ExpectedAttentionPress(r, 64, 2, use_covariance=False),
    "expected_attention_plain": expected,
    "expected_attention_epsilon": lambda r: kvpress.ExpectedAttentionPress(r, 64, epsilon=0.02),
    "observed_attention": kvpress.ObservedAttentionPress,
    "cur": kvpress.CURPress,
    "cur_global": lambda r: kvpress.CURPress(r, use_local_approximation=False),
    "cur_key": lambda r: kvpress.CURPress(r, num_sinks=2, leverage_type="key", local_window_size=7),
    "cur_value": lambda r: kvpress.CURPress(r, leverage_type="value"),
    "cur_average": lambda r: kvpress.CURPress(r, leverage_type="kv_avg"),
    "non_causal": kvpress.NonCausalAttnPress,
    "non_causal_chunks": lambda r: kvpress.NonCausalAttnPress(r, chunk_size=16),
    "leverage": kvpress.LeverageScorePress,
    "compactor": lambda r: kvpress.CompactorPress(r, chunk_size=16),
    "compactor_blend": lambda r: kvpress.CompactorPress(r, 5, 3, blending=0.35),
    "cap": kvpress.CapPress,
    "cap_near": lambda r: kvpress.CapPress(r, tau=2.0, n_future_positions=64, n_sink=2),
    "adakv_snapkv": lambda r: kvpress.AdaKVPress(snapkv(r)),
    "adakv_knorm": lambda r: kvpress.AdaKVPress(kvpress.KnormPress(r), alpha_safeguard=0.5),
    "critical_snapkv": lambda r: kvpress.CriticalKVPress(snapkv(r)),
    "critical_expected": lambda r: kvpress.CriticalKVPress(expected(r), first_stage_ratio=0.25),
    "critical_adakv": lambda r: kvpress.CriticalAdaKVPress(snapkv(r)),
    "chunk_knorm": lambda r: kvpress.ChunkPress(kvpress.KnormPress(r), chunk_length=20),
    "chunkkv_knorm": lambda r: kvpress.ChunkKVPress(kvpress.KnormPress(r), chunk_length=7),
    "chunkkv_snapkv": lambda r: kvpress.ChunkKVPress(snapkv(r), chunk_length=10),
    "chunkkv_keydiff": lambda r: kvpress.ChunkKVPress(kvpress.KeyDiffPress(r), chunk_length=10),
    "finch": lambda r: kvpress.FinchPress(r, rerotate_keys=False),
    "finch_plain": lambda r: kvpress.FinchPress(r, normalize_scores=False, rerotate_keys=False),
    "simlayer": lambda r: kvpress.SimLayerKVPress(lazy_threshold=0.4, n_recent=20),
    "rerotated_streaming_llm": lambda r: kvpress.KeyRerotationPress(kvpress.StreamingLLMPress(r)),
    "rerotated_snapkv": lambda r: kvpress.KeyRerotationPress(snapkv(r)),
    "rerotated_finch": kvpress.FinchPress,
    "merging_knorm": lambda r: kvpress.MergingPress(kvpress.KnormPress(r)),
    "merging_fraction": lambda r: kvpress.MergingPress(
        kvpress.KnormPress(r), similarity_threshold=0.3, merge_fraction=0.75
    ),
}


def made_for(length: int, ratio: float, filters: np.ndarray) -> dict[str, Any]:
    """Presses that need more than the ratio: chunks that divide the prompt, a whole mean budget, filters."""
    chunk, whole = {61: 61, 150: 50}[length], 1 - int(length * (1 - ratio)) / length
    return {
        "non_causal_whole": kvpress.NonCausalAttnPress(ratio, chunk_size=chunk),
        "compactor_whole": kvpress.CompactorPress(ratio, 0, 0, chunk_size=chunk, blending=0.35),
        "pyramid": kvpress.PyramidKVPress(whole, **TINY),
        "pyramid_flat": kvpress.PyramidKVPress(whole, window_size=2, kernel_size=5, beta=3),
        "q_filter": q_filter(ratio, filters),
    }


EAGER = {"observed_attention"}  # presses that read the attention weights


@dataclass
class Heard:
    """What one press did, per layer."""

    kept: list[np.ndarray] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    logits: np.ndarray | None = None


def listen(press: Any, heard: Heard) -> None:
    """Wrap the press so that what it keeps and scores is written down."""
    compress, scorer = press.compress, press if hasattr(press, "score") else getattr(press, "press", None)

    def heard_compress(
        module: Any, hidden: Any, keys: torch.Tensor, values: torch.Tensor, attentions: Any, kwargs: dict
    ) -> Any:
        result = compress(module, hidden, keys, values, attentions, kwargs)
        mask = torch.zeros(keys.shape[1:3], dtype=torch.bool)
        if getattr(module, "masked_key_indices", None) is not None:
            _, heads, slots = module.masked_key_indices
            mask[heads, slots] = True
            heard.kept.append((~mask).numpy())
            return result
        same = (keys[0, :, :, None] == result[0][0, :, None]).all(-1)  # [kv_heads slots kept]
        assert (same.sum(1) == 1).all(), "a returned key is that of one slot"
        heard.kept.append(same.any(-1).numpy())
        return result

    press.compress = heard_compress
    if scorer is None:
        return
    score = scorer.score

    def heard_score(*args: Any, **kwargs: Any) -> torch.Tensor:
        scores = score(*args, **kwargs)
        heard.scores.append(scores[0].detach().clone().numpy())
        return scores

    scorer.score = heard_score


@contextmanager
def sketched(sketches: list[np.ndarray]) -> Iterator[None]:
    """Each call of `torch.randn` gives the next of these, with a batch axis."""
    drawn, left = torch.randn, iter(sketches)

    def given(*shape: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
        sketch = torch.tensor(next(left))[None].to(device=device, dtype=dtype)
        assert tuple(sketch.shape) == shape, (sketch.shape, shape)
        return sketch

    torch.randn = given
    try:
        yield
    finally:
        torch.randn = drawn


def run(folder: Path, name: str, length: int, press: Any, eager: bool, question: int) -> Heard:
    """One prompt through one press; where the press asks for it, with a delimiter before the last tokens of it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / name, dtype=torch.float64, attn_implementation="eager" if eager else "sdpa"
    ).eval()
    data, heard = np.load(folder / f"{name}.npz"), Heard()
    tokens = torch.from_numpy(data[f"text{length}"].astype(np.int64))
    sketches = [data[f"sketch{index}"] for index in range(model.config.num_hidden_layers)]
    cache = transformers.DynamicCache()
    rotated = isinstance(press, kvpress.KeyRerotationPress) or getattr(press, "rerotate_keys", False)
    if isinstance(press, kvpress.FinchPress):
        press.delimiter_token_id = int(data[f"delimiter{length}"])
        mark = torch.tensor([[press.delimiter_token_id]])
        tokens = torch.cat([tokens[:, : length - question], mark, tokens[:, length - question :]], dim=1)
    if not rotated:  # re-rotated keys are not those of the prompt
        listen(press, heard)
    with torch.no_grad():
        with sketched(sketches), press(model):
            model(tokens[:, :-1], past_key_values=cache)
        where = cache.get_seq_length() if rotated else length
        out = model(tokens[:, -1:], past_key_values=cache, position_ids=torch.tensor([[where]]))
    heard.logits = out.logits[0, -1, :LOGITS].numpy()
    return heard


def main(folder: Path, path: Path) -> None:
    """Record every press on every case."""
    transformers.utils.logging.disable_progress_bar()
    told = json.loads((folder / "cases.json").read_text())
    out: dict[str, np.ndarray] = {}
    for name, length, ratio in told["cases"]:
        filters = np.load(folder / f"{name}.npz")["filters"]
        made = {what: make(ratio) for what, make in PRESSES.items()} | made_for(length, ratio, filters)
        for what, press in made.items():
            key = f"{name}-{length}-{what}"
            try:
                heard = run(folder, name, length, press, what in EAGER, told["question"])
            except (AssertionError, RuntimeError, ValueError) as error:
                out[f"{key}-error"] = np.array(f"{type(error).__name__}: {error}")
                print(key, out[f"{key}-error"])
                continue
            for index, kept in enumerate(heard.kept):
                out[f"{key}-kept-{index}"] = np.packbits(kept, axis=-1)
            if heard.kept and len(heard.scores) == len(heard.kept):
                out[f"{key}-scores"] = np.clip(np.stack(heard.scores), -LARGEST, LARGEST).astype(np.float32)
            out[f"{key}-logits"] = heard.logits.astype(np.float32)
    versions = {one: version(one) for one in ("kvpress", "torch", "transformers")}
    out["versions"] = np.array(json.dumps(versions))
    out["prints"] = np.array(json.dumps(told["prints"]))
    np.savez_compressed(path, **out)
    print(f"{len(out)} arrays, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
