"""The policy oracle_future and `kvtwin oracle`: sums and kept sets by loops; what `kvtwin regret` keeps."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from experiments import oracle, regret
from experiments.compare import Trace, run
from experiments.run import app
from framework.calibration import write_arrays
from framework.errors import KvtwinError
from tests.twins import WINDOW, hybrid, hybrid_spec, texts

SPEC, PROMPT, STEPS = hybrid_spec(), 20, 13
TEXT = texts()[1, : PROMPT + STEPS]
BACKENDS = ("reference", "torch", "flax")


def recorded(folder: Path, backend: str = "reference") -> str:
    """A recording of TEXT, as a policy's path."""
    made = oracle.recording_of(hybrid(backend), texts()[1].tolist(), PROMPT, STEPS)
    write_arrays(folder / "recording", "recordings", made, SPEC)
    return repr(str(folder / "recording"))


def given(layer: int, head: int) -> np.ndarray:
    """What each query of TEXT gives to each token: softmax by loops, mean over the group."""
    taps: dict[str, np.ndarray] = {}
    hybrid("reference").step(TEXT[None], logits=None, taps=taps)
    queries, keys = (taps[f"layers.{layer}.attention.{one}_rotated"][0] for one in ("query", "key"))
    found = np.zeros((len(TEXT), len(TEXT)))
    for query in range(len(TEXT)):
        first = max(0, query - WINDOW + 1) if layer == 1 else 0
        for one in range(3):
            products = [
                np.exp(queries[query, 3 * head + one] @ keys[key, head] * 8**-0.5)
                for key in range(first, query + 1)
            ]
            found[query, first : query + 1] += np.array(products) / sum(products) / 3
    return found


def test_a_recording_is_the_attention_still_to_come() -> None:
    made = oracle.recording_of(hybrid("reference"), texts()[1].tolist(), PROMPT, STEPS)
    assert made["text"].tolist() == TEXT.tolist()
    assert {key: one.shape for key, one in made.items() if key != "text"} == {
        f"layers.{index}": (2, STEPS, PROMPT + STEPS) for index in (0, 1)
    }
    for layer, head in np.ndindex(2, 2):
        weights = given(layer, head)
        for query in range(STEPS):
            right = [sum(weights[q, token] for q in range(PROMPT + query, len(TEXT))) for token in range(33)]
            np.testing.assert_allclose(made[f"layers.{layer}"][head, query], right, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_still_attended_to_stays_whatever_the_row(backend: str, tmp_path: Path) -> None:
    """Ragged rows of the text: before the first recorded query, within the recording, at its end and beyond it."""
    lengths, budget, model = (9, 24, 17), 4, hybrid(backend)
    spelled = f"oracle_future(budget={budget}, path={recorded(tmp_path)})"
    sums = load_file(tmp_path / "recording")
    prompt = np.where(np.arange(24) < np.array(lengths)[:, None], texts()[1, :24], -1)
    _, cache = model.step(prompt, model.cache(spelled, batch=3))
    held = [[[list(range(length)) for _ in range(2)] for _ in range(2)] for length in lengths]
    for call in range(14):
        for row, layer, head in np.ndindex(3, 2, 2):
            seen, known = lengths[row] + call, held[row][layer][head]
            if layer == 1:
                known = [token for token in known if token > seen - WINDOW]
            worth = sums[f"layers.{layer}"][head, min(max(seen, PROMPT), len(TEXT) - 1) - PROMPT]
            if seen >= len(TEXT):
                worth = np.zeros(seen)
            known = sorted(sorted(known, key=lambda token: (worth[token], token))[-budget:])
            kept = cache.kept[layer][row, head]
            assert kept[kept >= 0].tolist() == known
            held[row][layer][head] = [*known, seen]
        fed = texts()[1, np.array(lengths) + call][:, None]
        _, cache = model.step(fed, cache, logits=None)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("interval", [1, 3])
def test_it_keeps_what_the_oracle_of_regret_keeps(backend: str, interval: int, tmp_path: Path) -> None:
    model, path = hybrid(backend), recorded(tmp_path, backend)
    spelled = f"oracle_future(budget=5, interval={interval}, path={path})"
    fed = TEXT[None, PROMPT:]
    along = Trace(TEXT[None, :PROMPT], fed, decisions=[[]] * (STEPS + 1))
    trace = run(model, along.prompt, spelled, STEPS, along=along, watch=False)
    attention = regret.attention_of(model, TEXT, PROMPT)
    ours = regret.kept_of(trace, model, PROMPT)
    assert set(ours) == {0, 1}
    for layer, kept in ours.items():
        assert kept.sum(-1).min() == 5
        assert (kept == regret.oracle_future(attention[layer], kept.sum(-1), PROMPT)).all()
    found = regret.regrets(model, TEXT, spelled, PROMPT)
    assert [each.regret for each in found] == [0.0] * 4
    blind = regret.regrets(model, TEXT, f"key_norm(budget=5, interval={interval})", PROMPT)
    assert min(each.regret for each in blind) > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_text_leaves_the_newest_for_as_long_as_it_is_held(backend: str, tmp_path: Path) -> None:
    """The second row is another text in one token, until the fourth one after it has pushed that out."""
    model, spelled = hybrid(backend), f"oracle_future(budget=4, path={recorded(tmp_path)})"
    sums = load_file(tmp_path / "recording")["layers.0"]
    both = np.stack([TEXT, np.where(np.arange(33) == 22, 0, TEXT)])
    assert TEXT[22] != 0
    _, cache = model.step(both[:, :22], model.cache(spelled, batch=2))
    for call in range(22, 30):
        before = cache.kept[0]
        _, cache = model.step(both[:, call : call + 1], cache, logits=None)
        for row, head in np.ndindex(2, 2):
            held = [*before[row, head], call]
            newest, worthiest = held[1:], sorted(held, key=lambda token: sums[head, call + 1 - PROMPT, token])
            strayed = row == 1 and call <= 26
            assert cache.kept[0][row, head].tolist() == (newest if strayed else sorted(worthiest[1:]))
    assert (before[0] != before[1]).any()


def test_it_stands_inside_wrappers(tmp_path: Path) -> None:
    """Where heads share alike; and beside another policy, where its constants have other names."""
    path = recorded(tmp_path)
    alone, wrapped, split = (
        hybrid("torch").step(TEXT[None, :25], hybrid("torch").cache(spelled))[1].kept
        for spelled in (
            f"oracle_future(budget=6, path={path})",
            f"adakv(budget=6, floor=1, policy=oracle_future(path={path}))",
            f"prefill_decode(budget=6, prefill=oracle_future(path={path}), decode=h2o())",
        )
    )
    for one, other, third in zip(alone, wrapped, split, strict=True):
        assert (one == other).all()
        assert (one == third).all()


def spoiled(folder: Path, kind: str) -> str:
    """A file that is not right, as a policy's path."""
    made = oracle.recording_of(hybrid("torch"), TEXT.tolist(), PROMPT, STEPS)
    spec, what = SPEC, "recordings"
    if kind == "model":
        spec = hybrid_spec(ffn=29)
    elif kind == "filters":
        what = "filters"
    elif kind == "queries":
        made["layers.1"] = made["layers.1"][:, 1:]
    elif kind == "heads":
        made = {key: one[:1] if key != "text" else one for key, one in made.items()}
    elif kind == "untold":
        del made["text"]
    elif kind == "layer":
        del made["layers.0"]
    elif kind == "flat":
        made = {key: one.reshape(-1) for key, one in made.items()}
    elif kind == "more":
        made |= {f"layers.{index}": np.ones((2, 40, 33)) for index in (0, 1)}
    write_arrays(folder / "f", what, made, spec)
    return repr(str(folder / "f"))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("model", "holds the recordings of another model"),
        ("filters", "is not a file of recordings"),
        ("queries", "layers.1 has shape"),
        ("heads", "layers.0 has shape"),
        ("untold", "has shape"),
        ("layer", "layers.0 has shape None"),
        ("flat", "layers.0 has shape"),
        ("more", "layers.0 has shape"),
    ],
)
def test_a_recording_that_is_not_right_is_refused(kind: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(KvtwinError, match=words):
        hybrid("torch").cache(f"oracle_future(budget=6, path={spoiled(tmp_path, kind)})")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", "oracle_future has no path; expected the file that `kvtwin oracle"),
        ("path='nowhere'", "no recordings at 'nowhere'"),
        ("path='random:x'", "names no file and no seed"),
        ("path={path}, digest='0123456789abcdef'", "has the digest"),
    ],
)
def test_other_refusals(options: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(KvtwinError, match=words):
        hybrid("torch").cache(f"oracle_future(budget=6, {options.format(path=recorded(tmp_path))})")


@pytest.mark.parametrize(
    ("prompt", "steps", "words"),
    [
        (20, 14, "the text has 33 tokens; expected at least 34, 20 of the prompt and 14 steps"),
        (5, 28, "a recording of 28 queries over 33 tokens takes 0 MiB; expected at most 0: take fewer"),
    ],
)
def test_a_text_of_a_wrong_length_is_refused(
    prompt: int, steps: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "LARGEST", 4 * 4 * 27 * 33)
    with pytest.raises(KvtwinError, match=words):
        oracle.recording_of(hybrid("torch"), TEXT.tolist(), prompt, steps)
    assert oracle.recording_of(hybrid("torch"), TEXT.tolist(), 6, 27)["text"].size == 33


def test_the_commands_together(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog " * 3)
    text, sizes = str(tmp_path / "text"), ["--prompt", "60", "--steps", "20"]
    made = CliRunner().invoke(app, ["oracle", "bytes", text, "--out", str(tmp_path / "made"), *sizes])
    assert made.exit_code == 0
    policy = made.output.splitlines()[-1].replace("(", "(budget=8, ")
    result = CliRunner().invoke(app, ["regret", "bytes", text, *sizes, "--policy", policy])
    assert result.exit_code == 0
    assert "mean regret 0.0000 over 8 heads" in result.output
    with pytest.raises(KvtwinError, match="cannot read the text nothere"):
        CliRunner().invoke(app, ["oracle", "bytes", "nothere", "--out", "x"], catch_exceptions=False)
