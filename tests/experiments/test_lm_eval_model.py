"""kvtwin in lm-evaluation-harness, beside the harness's own `hf` model on the same folder. A group of its own:
`pip install -c constraints.txt '.[lm-eval]'`, then `python -m pytest -m lm_eval`.
"""

import json
import os
import subprocess
import sys
from functools import cache as once
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from framework.errors import KvtwinError

pytestmark = pytest.mark.lm_eval

TEXT = (Path(__file__).parents[2] / "framework" / "models" / "text" / "held_out.txt").read_text()[:6000]
POSITIONS = 80
POLICY = "snapkv(budget=9, window=3, kernel=3)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with 80 positions, and a byte-level BPE that begins every text with <s>."""
    place = tmp_path_factory.mktemp("model") / "llama"
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=36,
        intermediate_size=44,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(7)
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=1.0 if "embed" in name else 2.0 / weight.shape[1] ** 0.5)
    model.save_pretrained(place)
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([TEXT], trainer)
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast.save(str(place / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return place


@once
def theirs(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)


@once
def ours(folder: Path, backend: str = "torch", policy: str = "full()", **given: Any) -> Any:
    from experiments.harness.model import Kvtwin

    return Kvtwin(path=str(folder), backend=backend, policy=policy, batch_size=3, **given)


def asked(kind: str, every: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(every)]


SHARED = TEXT[100:180]
PAIRS = [
    (SHARED, " return"),
    ("def main(", "args):\n"),
    ("", "import os"),
    (SHARED, " self.x = 3"),
    ("a trailing space ", "word"),
    ("<s>def main(", "args)"),
    (TEXT[900:1400], " and no more"),
    (SHARED, "("),
]
both = pytest.mark.parametrize("backend", ["torch", "flax"])


@both
def test_log_probabilities_are_those_of_hf(folder: Path, backend: str) -> None:
    expected = theirs(folder).loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    found = ours(folder, backend).loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    np.testing.assert_allclose([nats for nats, _ in found], [nats for nats, _ in expected], atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({round(nats, 2) for nats, _ in found}) == len(PAIRS)


TEXTS = [(TEXT[300:330],), (TEXT[1500:2100],), ("<s>" + TEXT[10:60],), (TEXT[700:960],)]


@both
def test_texts_are_as_probable_as_in_hf(folder: Path, backend: str) -> None:
    """Some are longer than 80 tokens. hf puts two opening tokens before a text unless it is told not to."""
    expected = plain(folder).loglikelihood_rolling(asked("loglikelihood_rolling", TEXTS), disable_tqdm=True)
    model = ours(folder, backend, chunk=16)
    found = model.loglikelihood_rolling(asked("loglikelihood_rolling", TEXTS), disable_tqdm=True)
    assert len(model.tok_encode(TEXTS[1][0])) > 2 * POSITIONS
    np.testing.assert_allclose(found[:2] + found[3:], expected[:2] + expected[3:], rtol=1e-5)


def plain(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3, add_bos_token=False)


WRITTEN = [
    (SHARED, {"until": ["\n"], "max_gen_toks": 20}),
    ("def main(", {"until": [], "max_gen_toks": 12, "do_sample": False}),
    (TEXT[900:1400], {"until": ["e", "("], "max_gen_toks": 20, "temperature": 0.0}),
    ("import", {"until": ["\n"], "max_gen_toks": 20}),
]


@both
def test_what_is_written_is_what_hf_writes(folder: Path, backend: str) -> None:
    expected = theirs(folder).generate_until(asked("generate_until", WRITTEN), disable_tqdm=True)
    found = ours(folder, backend).generate_until(asked("generate_until", WRITTEN), disable_tqdm=True)
    assert found == expected
    assert len(set(found)) == len(WRITTEN)


def test_a_policy_is_in_force(folder: Path) -> None:
    """By hand, through steps: all but the last token of the context is compressed."""
    model = ours(folder, policy=POLICY)
    found = model.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    full = ours(folder).loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    built = model.setting.model
    for (context, after), (nats, greedy) in zip(PAIRS[:2], found, strict=False):
        ids = built.tokenizer.encode(context)
        wanted = built.tokenizer.encode(context + after)[len(ids) :]
        _, cache = built.step([ids[:-1]], built.cache(POLICY))
        logits, _ = built.step([[ids[-1], *wanted[:-1]]], cache, logits="all")
        each = torch.log_softmax(torch.tensor(logits[0], dtype=torch.float64), -1)
        assert nats == pytest.approx(
            sum(float(each[place, token]) for place, token in enumerate(wanted)), rel=1e-5
        )
        assert greedy == (each.argmax(-1).tolist() == wanted)
    assert abs(found[0][0] - full[0][0]) > 1e-3
    held = model.get_model_info()["kvtwin"]["held"]
    assert held["contexts"] == 4  # different ones of more than one token
    assert held["kept"][2] == 9
    assert held["requested"] == 9.0
    short = [
        tokens
        for tokens in map(built.tokenizer.encode, ("def main(", "a trailing space"))
        if len(tokens) <= 10
    ]
    assert held["flags"]["never_fired"] == len(short) > 0
    assert "missed_budget" not in held["flags"]


def test_a_context_without_an_opening_token(folder: Path) -> None:
    ids = ours(folder).tok_encode("def main(")
    assert ids[0] == 0
    assert 0 not in ids[1:]
    assert ours(folder).tok_encode("<s>def main(") == ids
    assert ours(folder, add_bos_token=False).tok_encode("def main(") == ids[1:]
    assert ours(folder, add_bos_token=True).tok_encode("def main(") == ids
    assert ours(folder, add_bos_token=False).tok_encode("<s>def main(") == ids


def test_a_model_of_bytes_has_nothing_for_an_empty_context() -> None:
    from experiments.harness.model import Kvtwin

    requests = asked("loglikelihood", [("", "import")])
    with pytest.raises(KvtwinError, match="prefix_token_id=NUMBER"):
        Kvtwin(path="bytes").loglikelihood(requests, disable_tqdm=True)
    [(nats, _)] = Kvtwin(path="bytes", prefix_token_id=10).loglikelihood(requests, disable_tqdm=True)
    assert -30 < nats < 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "snapkv(budget=8, window=16)"}, "budget"),
        ({"codec": "int9()"}, "no codec is called 'int9'"),
        ({"backend": "tensor"}, "no backend 'tensor'"),
    ],
)
def test_bad_arguments_are_refused_at_once(folder: Path, given: dict[str, Any], message: str) -> None:
    from experiments.harness.model import Kvtwin

    with pytest.raises(KvtwinError, match=message):
        Kvtwin(path=str(folder), **given)


def test_too_much_to_write(folder: Path) -> None:
    with pytest.raises(KvtwinError, match="80 tokens are to be written, and a request may have 80"):
        ours(folder).generate_until(asked("generate_until", [("a", {"max_gen_toks": 80})]), disable_tqdm=True)


# The whole harness, offline, on tasks that are defined here.

TASKS = {
    "choice": """
task: kv_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "writing": """
task: kv_writing
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - metric: exact_match
""",
    "rolling": """
task: kv_rolling
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{context}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks on eight lines of JSON."""
    place = tmp_path_factory.mktemp("tasks")
    random = np.random.default_rng(5)
    lines = []
    for _ in range(8):
        start, length = int(random.integers(5000)), int(random.integers(30, 120))
        choices = [TEXT[at : at + 4] for at in random.integers(0, 5000, 3)]
        row = {"context": TEXT[start : start + length], "choices": choices, "answer": int(random.integers(3))}
        lines.append(json.dumps(row))
    data = place / "data.jsonl"
    data.write_text("\n".join(lines) + "\n")
    for name, text in TASKS.items():
        (place / f"{name}.yaml").write_text(text.format(data=data))
    return place


def run(tasks: Path, out: Path, model: str, arguments: str, *more: str) -> dict[str, Any]:
    """What the harness's own command line writes."""
    words = ["--model", model, "--model_args", arguments, "--tasks", "kv_choice,kv_writing,kv_rolling"]
    words += [
        "--include_path",
        str(tasks),
        "--output_path",
        str(out),
        "--batch_size",
        "4",
        "--log_samples",
        *more,
    ]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tasks / "hf")}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.lm_eval", *words],
        env=os.environ | offline | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [found] = out.rglob("results_*.json")
    return json.loads(found.read_text()) | {"log": done.stderr, "table": done.stdout}


def values(found: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {name}": value
        for task, each in found["results"].items()
        for name, value in each.items()
        if isinstance(value, float) and "stderr" not in name
    }


def test_the_command_line_beside_hf(folder: Path, tasks: Path, tmp_path: Path) -> None:
    expected = values(
        run(tasks, tmp_path / "hf", "hf", f"pretrained={folder},dtype=float32,add_bos_token=False")
    )
    found = run(tasks, tmp_path / "kv", "kvtwin", f"path={folder},chunk=8,add_bos_token=False")
    assert set(values(found)) == set(expected)
    assert len(expected) >= 5
    for name, value in values(found).items():
        assert value == pytest.approx(expected[name], rel=1e-4), name


def test_the_command_line_under_a_policy(folder: Path, tasks: Path, tmp_path: Path) -> None:
    """A spelling with commas comes through the harness, as it is or with semicolons, and by JSON."""
    spelled = "snapkv(budget=9, window=3, kernel=3)"
    commas = run(tasks, tmp_path / "a", "kvtwin", f"path={folder},policy={spelled},codec=int8(),backend=flax")
    given = {"path": str(folder), "policy": spelled.replace(",", ";"), "codec": "int8()", "backend": "torch"}
    objects = run(tasks, tmp_path / "b", "kvtwin", json.dumps(given))
    told = commas["config"]["kvtwin"]
    assert (told["policy"], told["codec"], told["backend"]) == (spelled, "int8()", "flax")
    assert objects["config"]["kvtwin"]["policy"] == spelled
    assert told["held"]["kept"][2] == 9
    assert told["held"]["payload"] < told["held"]["full"] / 4
    for name, value in values(commas).items():
        assert value == pytest.approx(values(objects)[name], rel=1e-3), name
    assert "kvtwin" in commas["table"]
    assert "under snapkv(budget=9, window=3, kernel=3) and int8()" in commas["log"]


def test_the_command_line_refuses(folder: Path, tasks: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.lm_eval", "--model", "kvtwin", "--tasks", "kv_choice",
         "--include_path", str(tasks), "--model_args", f"path={folder},polcy=full()"],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2].startswith(
        "kvtwin: no model argument 'polcy'; expected some of path, policy"
    )


def test_the_entry_point_names_the_model() -> None:
    """Releases of the harness that look for entry points find the same class."""
    import tomllib
    from importlib.metadata import EntryPoint

    from experiments.harness.model import Kvtwin

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    [(name, value)] = project["entry-points"]["lm_eval.models"].items()
    assert EntryPoint(name, value, "lm_eval.models").load() is Kvtwin
    assert name == "kvtwin"
