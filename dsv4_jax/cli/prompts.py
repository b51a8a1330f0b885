"""Prompts: text to tokens and back."""

import codecs
import contextlib
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..files.untrusted_json import read_json_object, shorten
from .errors import InputError, one_line

MAX_FILE_BYTES = 1 << 26
"""Of a prompt or a tokenizer: ten times the longest there are."""


class ByteCodec:
    """Text of a vocabulary of 256: a token is a byte."""

    def encode(self, data: bytes) -> list[int]:
        """Token ids of a prompt."""
        return list(data)

    def decoder(self, prompt: Sequence[int]) -> Callable[..., str]:
        """`decode(tokens, final=False) -> text` for what follows the prompt; bytes that are not UTF-8 become U+FFFD."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        decode(bytes(prompt))  # a character that the prompt begins may end in what follows
        return lambda tokens, final=False: decode(bytes(tokens), final)

    @staticmethod
    def decode_all(tokens: list[int]) -> str:
        """Text of tokens in the middle of a text."""
        return bytes(tokens).decode(errors="replace")


class TokenizerCodec:
    """Text by the checkpoint's tokenizer.json; a tokenizer_config.json beside it may ask for a token at the start."""

    def __init__(self, path: pathlib.Path):
        import tokenizers

        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: expected a tokenizer of at most {MAX_FILE_BYTES >> 20} MiB, got more")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise InputError(f"{path} is not a tokenizer: {one_line(error)}") from None
        self.tokenizer.no_truncation()  # a file may ask for both; a prompt is what was given
        self.tokenizer.no_padding()
        self.begin: int | None = None  # the begin token, whether or not texts get one by themselves
        self.start = self._start(path.with_name("tokenizer_config.json"))

    def _start(self, path: pathlib.Path) -> list[int]:
        """The token that every text begins with where `add_bos_token` says so, as in transformers."""
        options = read_json_object(path, max_bytes=MAX_FILE_BYTES) if path.is_file() else {}
        token = options.get("bos_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = self.begin = self.tokenizer.token_to_id(token) if isinstance(token, str) else None
        if options.get("add_bos_token") is not True or token is None:
            return []
        if number is None:
            raise InputError(f"{path}: bos_token is {shorten(token)}: expected a token of tokenizer.json")
        return [number]

    def encode(self, data: bytes) -> list[int]:
        """Token ids of a prompt; none for an empty one. The begin token stands there once, whoever adds it."""
        try:
            ids = self.tokenizer.encode(data.decode()).ids
        except UnicodeDecodeError as error:
            raise InputError(f"the prompt is not UTF-8 (byte {error.start}): expected text, or token ids") from None
        while self.begin is not None and ids[:2] == [self.begin] * 2:  # of the prompt and of tokenizer.json
            del ids[0]
        return ids if ids[:1] == self.start or not ids else [*self.start, *ids]

    def decode_all(self, tokens: list[int]) -> str:
        """Text of tokens in the middle of a text."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def decoder(self, prompt: Sequence[int]) -> Callable[..., str]:
        """As in ByteCodec; a character comes when all of its tokens are there."""
        from tokenizers.decoders import DecodeStream

        # Special tokens are shown: one inside a text is worth seeing. A token's text can depend on those before it.
        stream = DecodeStream(skip_special_tokens=False)
        ids: list[int] = []
        sent: list[str] = []
        for token in prompt:
            stream.step(self.tokenizer, token)

        def decode(tokens: Sequence[int], final: bool = False) -> str:
            text = "".join(stream.step(self.tokenizer, token) or "" for token in tokens)
            ids.extend(tokens)
            sent.append(text)
            if final:  # what still waits for its end
                whole = self.tokenizer.decode([*prompt, *ids], skip_special_tokens=False)
                before = self.tokenizer.decode(list(prompt), skip_special_tokens=False)
                done = before + "".join(sent)
                text += whole[len(done) :] if whole.startswith(done) else ""
            return text

        return decode


class NoCodec:
    """A vocabulary without a tokenizer: token ids are written as numbers."""

    decode_all = None

    def __init__(self, why: str):
        self.why = why

    def encode(self, data: bytes) -> list[int]:
        """Refuses: there is nothing to turn text into tokens."""
        raise InputError(f"{self.why}: give the prompt as token ids with --tokens")

    def decoder(self, prompt: Sequence[int]) -> Callable[..., str]:
        """As in ByteCodec, with the numbers of the tokens for text."""
        return lambda tokens, final=False: "".join(f"{token} " for token in tokens)


class StopCutter:
    """Text as it comes, up to the first of some stop texts; what may begin one is held back until it is known."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self._held, self._done = [stop for stop in stops if stop], "", False

    def __call__(self, text: str, final: bool = False) -> str:
        """The part of the text so far that can be shown now."""
        if self._done:
            return ""
        text = self._held + text
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self._done, self._held = True, ""
            return text[: min(ends)]
        keep = 0 if final else max(
            (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )  # fmt: skip
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def make_codec(checkpoint: pathlib.Path, vocab_size: int) -> ByteCodec | TokenizerCodec | NoCodec:
    """How text and tokens of this checkpoint turn into each other."""
    path = checkpoint / "tokenizer.json"
    if path.is_file():
        return TokenizerCodec(path)
    if vocab_size == 256:
        return ByteCodec()
    return NoCodec(f"{checkpoint} has no tokenizer.json and a vocabulary of {vocab_size}")


def parse_tokens(text: str) -> list[int]:
    """Token ids from "1,2,3" (commas or spaces)."""
    parts = text.replace(",", " ").split()
    if not all(re.fullmatch("[0-9]{1,10}", part) for part in parts):
        raise InputError(f"--tokens {text[:60]!r}: expected token ids such as 1,2,3")
    return [int(part) for part in parts]


def check_prompts(prompts: list[list[int]], config: Any, max_new_tokens: int = 0) -> list[list[int]]:
    """The prompts; ValueError for one that is empty, has tokens outside the vocabulary, or is too long with its end."""
    from ..decode.request import check_prompt

    for i, prompt in enumerate(prompts, 1):
        if not prompt:
            raise InputError(f"prompt {i} is empty: expected at least one token")
        check_prompt(config, prompt, max_new_tokens, f"prompt {i}")
    return prompts


def read_prompt_file(path: str) -> bytes:
    """The bytes of a file, or of standard input for "-"."""
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"--file {path}: {(error.strerror or str(error)).lower()}") from None
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"--file {path}: expected a prompt of at most {MAX_FILE_BYTES >> 20} MiB, got more")
    return data
