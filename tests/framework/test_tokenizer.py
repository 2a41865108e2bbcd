"""Tokenizers: bytes, a real byte-level BPE made here, chat templates, and streams that never cut a character."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from framework.errors import KvtwinError
from framework.tokenizer import ByteTokenizer, ForeignTokenizer, Tokenizer, tokenizer

TEXTS = ["hello world", "", " two  spaces ", "Grüße, 世界! \U0001f642\n", "e\u0301\u200d", "a\ufffdb"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained byte-level BPE of 300 tokens that begins every text with <s>."""
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(["hello world, the world says hello " * 5], trainer)
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer in the manner of Llama 2: a space goes before the text, and decoding strips it."""
    pieces = [
        "<s>",
        "</s>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"helowrd",
        "\u2581w",
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    fast = Fast(models.BPE(vocabulary, [("\u2581", "w")], unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    fast.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder = tmp_path_factory.mktemp("spaced")
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.fixture(params=["bytes", "byte-level", "spaced"])
def each(request: pytest.FixtureRequest, folder: Path, spaced: Path, tmp_path: Path) -> Tokenizer:
    return tokenizer({"bytes": tmp_path, "byte-level": folder, "spaced": spaced}[request.param])


def test_files_decide(folder: Path, tmp_path: Path) -> None:
    assert isinstance(tokenizer(folder), ForeignTokenizer)
    assert isinstance(tokenizer(tmp_path), ByteTokenizer)


def test_what_stands_behind_a_text_has_no_opening_token(folder: Path) -> None:
    made = tokenizer(folder)
    assert made.encode("hello") == [0, *made.encode("hello", opening=False)]
    assert 0 not in made.encode("hello", opening=False)
    assert ByteTokenizer().encode("hello", opening=False) == list(b"hello")


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(each: Tokenizer, text: str) -> None:
    assert each.decode(each.encode(text)) == text


def test_bytes_are_the_ids() -> None:
    assert ByteTokenizer().encode("é!") == [0xC3, 0xA9, 33]


def test_ids_above_the_bytes_have_no_text() -> None:
    assert ByteTokenizer().decode([104, 256, 105, 9999]) == "hi"
    with pytest.raises(KvtwinError, match="token -1 is not an id"):
        ByteTokenizer().decode([104, -1])


def test_foreign_ids_begin_with_the_opening_token(folder: Path) -> None:
    made = tokenizer(folder)
    ids = made.encode("hello")
    assert ids[0] == 0
    assert len(ids) < 1 + len("hello")
    assert made.decode([*ids, 1]) == "hello"


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(each: Tokenizer, text: str) -> None:
    decoder = each.decoder()
    pieces = [decoder.push(token) for token in each.encode(text)]
    assert "".join([*pieces, decoder.finish()]) == text


def test_no_piece_cuts_a_character(each: Tokenizer) -> None:
    decoder = each.decoder()
    pieces = [decoder.push(token) for token in each.encode("ü世\U0001f642x")]
    assert [piece for piece in pieces if piece] == ["ü", "世", "\U0001f642", "x"]


def test_a_character_cut_at_the_end_is_replaced_at_the_end(each: Tokenizer) -> None:
    tokens = each.encode("h世")[:-1]
    decoder = each.decoder()
    pieces = [decoder.push(token) for token in tokens]
    assert "".join(pieces) == "h"
    assert "".join(pieces) + decoder.finish() == each.decode(tokens)
    assert each.decode(tokens).endswith("\ufffd")


def test_a_finished_decoder_is_new(each: Tokenizer) -> None:
    decoder = each.decoder()
    for token in each.encode("世")[:-1]:
        decoder.push(token)
    decoder.finish()
    assert "".join(decoder.push(token) for token in each.encode("b")) == "b"


def test_chat_without_a_template_is_refused(each: Tokenizer) -> None:
    with pytest.raises(KvtwinError, match="no chat template"):
        each.chat([{"role": "user", "content": "hi"}])


@pytest.fixture
def chatting(folder: Path, tmp_path: Path) -> Path:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def test_chat_uses_the_template(chatting: Path) -> None:
    made = tokenizer(chatting)
    tokens = made.chat([{"role": "user", "content": "hello"}])
    assert made.decode(tokens) == "<|user|>hello\n<|assistant|>"
    assert tokens[0] != 0  # a template writes its own opening token, so none is added


def test_messages_that_the_template_refuses(chatting: Path) -> None:
    (chatting / "chat_template.jinja").write_text("{{ raise_exception('system first') }}")
    with pytest.raises(KvtwinError, match="refuses the messages: system first"):
        tokenizer(chatting).chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"type": "Nonsense"}}'])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(KvtwinError, match="the tokenizer of .* does not load") as caught:
        tokenizer(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
