"""Text to token ids and back: bytes where a folder has no tokenizer, Hugging Face's where it has one."""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from framework.errors import KvtwinError

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


class Decoder(ABC):
    """Text of a growing sequence of tokens, in pieces that never cut a character."""

    @abstractmethod
    def push(self, token: int) -> str:
        """The text that is certain now that `token` came, often empty."""

    @abstractmethod
    def finish(self) -> str:
        """What was held back, with U+FFFD for characters that stay incomplete. The decoder is then new again."""


class Tokenizer(ABC):
    """Text to token ids and back."""

    @property
    @abstractmethod
    def opening(self) -> int | None:
        """The token that stands for the beginning of a text; None where the tokenizer has none."""

    @abstractmethod
    def encode(self, text: str, opening: bool = True) -> list[int]:
        """Token ids, with the tokenizer's own opening token where it has one, or without it, to stand behind others."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text, special tokens left out, with U+FFFD for characters that are incomplete."""

    @abstractmethod
    def decoder(self) -> Decoder:
        """For streaming: the pieces of one decoder, `finish` included, join to what `decode` gives.

        Only after bytes that are no UTF-8 may they differ: some tokenizers then replace valid neighbours as well, of
        which a stream has already given the text.
        """

    @abstractmethod
    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of `[{"role": ..., "content": ...}, ...]` up to where the answer begins.

        Raises KvtwinError where the folder has no chat template.
        """


def tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint: Hugging Face's where the folder has its files, else bytes."""
    if any((folder / name).exists() for name in FILES):
        return ForeignTokenizer(folder)
    return ByteTokenizer()


@final
class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8; higher ids are special and have no text."""

    @property
    def opening(self) -> int | None:
        """None: bytes have no such token."""
        return None

    def encode(self, text: str, opening: bool = True) -> list[int]:
        """The bytes of `text`."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the bytes among `tokens`."""
        return _bytes(tokens).decode(errors="replace")

    def decoder(self) -> Decoder:
        """A decoder of bytes."""
        return _ByteDecoder()

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Refused: bytes have no template."""
        raise KvtwinError("this model has no tokenizer files and no chat template; pass plain text")


@final
class _ByteDecoder(Decoder):
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(_bytes([token]))

    def finish(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _bytes(tokens: Iterable[int]) -> bytes:
    found = [int(token) for token in tokens]
    if any(token < 0 for token in found):
        raise KvtwinError(f"token {min(found)} is not an id; expected 0 or more")
    return bytes(token for token in found if token < 256)


@final
class ForeignTokenizer(Tokenizer):
    """Hugging Face's AutoTokenizer on a folder. Only this class imports transformers, and with it torch."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.folder = folder
        try:
            self._made: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # any: transformers raises whatever its parsers raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise KvtwinError(f"the tokenizer of {folder} does not load: {reason[0]}") from None

    @property
    def opening(self) -> int | None:
        """The tokenizer's `bos_token`, whether or not `encode` puts it before a text."""
        return None if self._made.bos_token_id is None else int(self._made.bos_token_id)

    def encode(self, text: str, opening: bool = True) -> list[int]:
        """Token ids, with the tokenizer's opening token, or without any special token."""
        return list(self._made(text, add_special_tokens=opening)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, special tokens left out."""
        ids = [int(token) for token in tokens]
        return str(self._made.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def decoder(self) -> Decoder:
        """A decoder over `decode`."""
        return _ForeignDecoder(self)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids by the folder's chat template, which may refuse the messages."""
        if not self._made.chat_template:
            raise KvtwinError(f"{self.folder} has a tokenizer but no chat template; pass plain text")
        try:
            text = self._made.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # any: templates raise what they like
            raise KvtwinError(f"the chat template of {self.folder} refuses the messages: {error}") from None
        return list(self._made(text, add_special_tokens=False)["input_ids"])


@final
class _ForeignDecoder(Decoder):
    """Decodes again from a token before the last piece, since a token's text may depend on its predecessor."""

    def __init__(self, tokenizer: ForeignTokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = self._read = 0  # decode from start; text up to read has been given out

    def push(self, token: int) -> str:
        self._tokens.append(token)
        before, after = self._texts()
        # A trailing replacement character is a character whose other bytes may still come.
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return after[len(before) :]

    def finish(self) -> str:
        before, after = self._texts()
        self._tokens, self._start, self._read = [], 0, 0
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        return decode(self._tokens[self._start : self._read]), decode(self._tokens[self._start :])
