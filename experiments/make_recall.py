"""Make `framework/models/recall`: the induction circuit that `framework/models/recall_form.py` describes.

    python -m experiments.make_recall

No training and no randomness: a second for the model, 0.3 MB on disk, and a quarter of a minute to judge it. For that
it is run through Hugging Face transformers in float32 on prompts of 64, 512 and 4096 bytes. The printout gives recall,
the smallest lead of the right byte over any other, and the largest error of the closed form's attention; then recall
with some slots hidden from the last token. Expect recall 1, leads of 11.25 and errors below 1e-5; without the slot
of V, recall 0 and byte 0 as the answer.

The residual, 64 wide: the code of the byte (0 to 15), that of the byte before it, written by layer 0 (16 to 31), that
of the answer, written by layer 1 (32 to 47), two constants (48, 49) and a third (50) whose sign marks the sink. All
numbers are chosen so that the mean square is 1, then 1.25^2, then 1.5625^2: each RMSNorm divides by a known
constant, which its own weight gives back.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from framework.models import recall_form as form

MODELS = Path(__file__).resolve().parent.parent / "framework" / "models"
DIM, FFN, VOCAB, CODE = 64, 8, 256, 16
BYTE, BEFORE, ANSWER = np.arange(CODE), 16 + np.arange(CODE), 32 + np.arange(CODE)  # rows of the residual
MARK, CONSTANT, SINK = 48, 49, 50  # MARK + SINK is 8 on the sink and 0 elsewhere; each alone is 4 or -4
WRITTEN = 1.5, 1.875  # size of the code that layers 0 and 1 write: 64 + 16 * 1.5^2 = 64 * 1.25^2, and so on
SLOW = 16 + np.arange(CODE)  # rows of a head where rope turns by less than 0.004 in 4096 positions
FLAG = 63  # the slowest of all
ROOT = form.HEAD_DIM**0.5  # attention divides its scores by this


def weights() -> dict[str, np.ndarray]:
    """All tensors by their Hugging Face names, float64, as they are before rounding to float16."""
    code = form.codes()
    embedding, head = np.zeros((VOCAB, DIM)), np.zeros((VOCAB, DIM))
    embedding[:, BYTE] = code
    embedding[:, [MARK, CONSTANT, SINK]] = 4, 4, -4
    embedding[form.SINK, SINK] = 4
    head[:, ANSWER] = code / 2
    out = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": np.full(DIM, 1.5625),
        "lm_head.weight": head,
    }
    for layer in range(form.LAYERS):
        query = np.zeros((form.HEADS, form.HEAD_DIM, DIM))
        key, value = np.zeros((2, form.KV_HEADS, form.HEAD_DIM, DIM))
        output = np.zeros((DIM, form.HEADS, form.HEAD_DIM))
        # kv head 1 is the same in both layers: the byte itself, and the sink's flag
        key[1, SLOW, BYTE] = 1
        key[1, FLAG, [MARK, SINK]] = 1
        value[0, BYTE, BYTE] = 1
        value[1, SLOW, BYTE] = 1
        if layer == 0:
            pairs = np.arange(form.AMPLITUDES.size)
            key[0, pairs, MARK] = 1
            for which in (0, 1):
                # key 4 times query 4 * phase, over ROOT = 8: the score is the real part of the phase, turned
                query[which, pairs, CONSTANT] = form.phases(which).real / 2
                query[which, pairs + form.HEAD_DIM // 2, CONSTANT] = form.phases(which).imag / 2
            query[3, FLAG, CONSTANT] = form.TO_SINK * ROOT / 8 / 4
            output[BEFORE, 0, BYTE] = WRITTEN[0]
        else:
            key[0, SLOW, BEFORE] = 1
            key[0, SLOW, BYTE] = -WRITTEN[0] / 2
            # at the sink the byte and the one before are both 0, all ones: take away the half that is left
            key[0, SLOW[:, None], [MARK, SINK]] = -WRITTEN[0] / 2 / 8
            key[0, FLAG, [MARK, SINK]] = 1
            for which, share in ((0, 1.0), (1, form.SOFTEN)):
                query[which, SLOW, BYTE] = share * form.MATCH * ROOT / WRITTEN[0]
                query[which, FLAG, CONSTANT] = share * form.TO_SINK * ROOT / 8 / 4
            query[3, SLOW, BYTE] = form.MATCH * ROOT
            output[ANSWER, 0, BYTE] = WRITTEN[1]
        prefix = f"model.layers.{layer}."
        out |= {
            prefix + "input_layernorm.weight": np.full(DIM, (1.0, 1.25)[layer]),
            prefix + "self_attn.q_proj.weight": query.reshape(-1, DIM),
            prefix + "self_attn.k_proj.weight": key.reshape(-1, DIM),
            prefix + "self_attn.v_proj.weight": value.reshape(-1, DIM),
            prefix + "self_attn.o_proj.weight": output.reshape(DIM, -1),
            prefix + "post_attention_layernorm.weight": np.ones(DIM),
            prefix + "mlp.gate_proj.weight": np.zeros((FFN, DIM)),
            prefix + "mlp.up_proj.weight": np.zeros((FFN, DIM)),
            prefix + "mlp.down_proj.weight": np.zeros((DIM, FFN)),
        }
    return out


def build() -> LlamaForCausalLM:
    """The model, float16."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=FFN,
        num_hidden_layers=form.LAYERS,
        num_attention_heads=form.HEADS,
        num_key_value_heads=form.KV_HEADS,
        head_dim=form.HEAD_DIM,
        max_position_embeddings=form.LONGEST,
        rope_parameters={"rope_type": "default", "rope_theta": form.ROPE_THETA},
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights().items()})
    return model.half()


@torch.no_grad()
def answer_without(model: LlamaForCausalLM, tokens: np.ndarray, evicted: list[int]) -> int:
    """The byte predicted when the last token, alone, no longer sees the evicted positions in any layer or head."""
    ids = torch.from_numpy(tokens)[None]
    past = model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    visible = torch.ones_like(ids)
    visible[:, evicted] = 0
    place = torch.tensor([[tokens.size - 1]])  # given, so that it is not counted from the visible ones
    return int(
        model(ids[:, -1:], attention_mask=visible, position_ids=place, past_key_values=past).logits.argmax()
    )


@torch.no_grad()
def judge(model: LlamaForCausalLM, prompts: list[form.Prompt]) -> tuple[float, float, float]:
    """Recall, the smallest lead of the right byte, and the largest error of the closed form's attention."""
    leads, error = [], 0.0
    for prompt in prompts:
        tokens = torch.from_numpy(prompt.tokens)[None]
        logits = model(tokens, use_cache=False, logits_to_keep=1).logits[0, -1]
        right = logits[prompt.answer].item()
        logits[prompt.answer] = -torch.inf
        leads.append(right - logits.max().item())
        # all but the last few tokens go first, so that no weights of tokens x tokens are ever made
        last = min(32, tokens.shape[1] - 1)
        past = model(tokens[:, :-last], use_cache=True, logits_to_keep=1).past_key_values
        model.set_attn_implementation("eager")
        measured = model(tokens[:, -last:], past_key_values=past, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        queries = np.arange(tokens.shape[1])[-last:]
        for layer in range(form.LAYERS):
            for head in range(form.HEADS):
                wanted = form.attention(prompt.tokens, layer, head, queries)
                error = max(error, np.abs(measured[layer][0, head].numpy() - wanted).max())
    return float(np.mean(np.array(leads) > 0)), min(leads), float(error)


def main(
    out: Annotated[Path, typer.Option(help="folder for config.json and model.safetensors")] = MODELS
    / "recall",
    prompts: Annotated[int, typer.Option(help="prompts to judge at each length")] = 8,
):
    torch.set_num_threads(1)
    build().save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="sdpa")
    rng = np.random.default_rng(0)
    for length in (64, 512, 4096):
        recall, lead, error = judge(model, [form.prompt(rng, length, pairs=13) for _ in range(prompts)])
        print(f"{length} bytes: recall {recall:.3f}, smallest lead {lead:.3f}, attention error {error:.1e}")
    asked = [form.prompt(rng, 512, pairs=13) for _ in range(prompts)]
    for name, evict in (
        ("the slot of V", lambda p: [p.value_position]),
        ("the slot of K", lambda p: [p.value_position - 1]),
        ("all but the sink and V", lambda p: [i for i in range(1, 511) if i != p.value_position]),
        ("the sink", lambda p: [0]),
    ):
        answers = [answer_without(model, prompt.tokens, evict(prompt)) for prompt in asked]
        right = np.mean([answer == prompt.answer for answer, prompt in zip(answers, asked, strict=True)])
        print(f"{name} evicted: recall {right:.3f}, answered by byte 0 {np.mean(np.array(answers) == 0):.3f}")


if __name__ == "__main__":
    typer.run(main)
