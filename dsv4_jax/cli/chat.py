"""`dsv4-jax chat`: a conversation in the terminal."""

import pathlib
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..files.untrusted_json import read_json_object
from .chat_format import BEGIN, END, format_messages, parse_reply
from .errors import InputError
from .generation_config import end_tokens, sampling_options
from .loading import keep_programs, load_model
from .options import CacheDtype, Dtype, KeepPrograms, packaged_checkpoint
from .prompts import MAX_FILE_BYTES, TokenizerCodec, make_codec
from .terminal import TextOutput, in_background, make_console, status


def chat(
    checkpoint: Annotated[
        str | None, typer.Option(metavar="PATH", help="Folder of a chat model; default: the small one in the package.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let the model think before it answers.")] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="Tokens of a reply at most.")
    ] = 1024,
    context: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of the whole conversation at most.")] = 8192,
    temperature: Annotated[float | None, typer.Option(metavar="T", min=0.0, help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(metavar="P", help="Draw from the most likely P of all.")] = None,
    top_k: Annotated[int | None, typer.Option(metavar="K", min=0, help="Draw from the K most likely.")] = None,
    min_p: Annotated[
        float | None, typer.Option(metavar="P", help="Leave out what is less likely than P of the best.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Seed of the draws.")] = 0,
    cache: Annotated[CacheDtype, typer.Option(help="Storage of key-value records.")] = CacheDtype.fp8,
    dtype: Annotated[Dtype, typer.Option(help="What the model computes in.")] = Dtype.float32,
    keep: KeepPrograms = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks.")] = False,
) -> None:
    """Talks with a chat model: a line is a message, an empty one or the end of input ends the conversation.

    The cache keeps the conversation between turns: a turn reads what is new. The prompt is that of DeepSeek-V4's
    release, or of the checkpoint's chat_template.jinja where there is one. The checkpoint in the package is no chat
    model: it continues bytes of Python.
    """
    from ..cache.host.prefix import PrefixPolicy
    from ..decode import DecodeLoop, make_manager

    console = make_console(quiet)
    folder = pathlib.Path(checkpoint) if checkpoint is not None else packaged_checkpoint()
    template = load_template(folder)
    keep_programs(keep)
    model = load_model(folder, console, dtype.value)
    config = model.config
    codec = make_codec(folder, config.vocab_size)
    if not isinstance(codec, TokenizerCodec):
        console.print(
            f"{folder} has no tokenizer.json: it is no chat model, and what follows are bytes that look like text",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    options = sampling_options(folder, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    stops = end_tokens(folder, config.eos_token_ids, config.vocab_size)
    context = min(context, config.max_position_embeddings)
    manager = make_manager(model, 1, context, cache_dtype=cache.value, prefix=PrefixPolicy("full"))
    loop = DecodeLoop(model, manager)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    output = TextOutput()
    while (line := _read_line()) is not None:
        messages.append({"role": "user", "content": line})
        ids = codec.encode(template(messages, thinking).encode())
        room = context - len(ids)
        if room < 1:
            raise InputError(f"the conversation has {len(ids)} tokens: expected less than --context {context}")
        number = loop.submit(ids, min(max_new_tokens, room), seed=seed, stop_tokens=stops, **options)
        reply = _stream(loop, number, codec.decoder(ids), set(stops), output, console)
        output.end_line()
        messages.append(parse_reply(reply, thinking=thinking))
    found = loop.stats.hit_tokens - loop.stats.recomputed_tokens
    console.print(
        f"{loop.stats.prefilled_tokens} prompt tokens computed, {found} found in the cache",
        style="dim", markup=False, soft_wrap=True,
    )  # fmt: skip


def _stream(
    loop: Any, number: int, decode: Callable[..., str], stops: set[int], output: TextOutput, console: Any
) -> str:
    """Writes a reply as it comes -> its text, without the token that ends it."""
    text = ""
    waiting = status(console, "reading")
    waiting.start()
    try:
        for event in in_background(lambda: iter(loop)):
            new = [token for token in event.tokens if token not in stops]
            piece = decode(new, event.finished is not None)
            if piece:
                waiting.stop()  # one of the two may move the cursor
                output.write(piece)
                text += piece
    finally:
        waiting.stop()
    return text


def _read_line() -> str | None:
    """The next message; None for an empty line and at the end of input."""
    try:
        line = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
    except EOFError:
        return None
    return line.strip() or None


def load_template(folder: pathlib.Path) -> Callable[[list[dict[str, Any]], bool], str]:
    """(messages, thinking) -> prompt: by the folder's chat_template.jinja where there is one, else as released."""
    path = folder / "chat_template.jinja"
    if not path.is_file():
        return lambda messages, thinking: format_messages(messages, thinking=thinking)
    try:
        from jinja2 import TemplateError  # type: ignore[import-not-found, unused-ignore]
        from jinja2.sandbox import (  # type: ignore[import-not-found, unused-ignore]
            ImmutableSandboxedEnvironment,
        )
    except ImportError:
        raise InputError(f"{path} needs jinja2: pip install 'dsv4_jax[chat]'") from None

    def refuse(message: str) -> None:
        raise InputError(f"{path}: {message}")

    named = path.with_name("tokenizer_config.json")
    tokens = read_json_object(named, max_bytes=MAX_FILE_BYTES) if named.is_file() else {}

    def token(name: str, default: str) -> str:
        value = tokens.get(name, default)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else ""

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        template = environment.from_string(path.read_text(encoding="utf-8"))
    except (TemplateError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a template: {error}") from None

    def render(messages: list[dict[str, Any]], thinking: bool) -> str:
        try:
            return template.render(
                messages=messages, add_generation_prompt=True, thinking=thinking, enable_thinking=thinking,
                bos_token=token("bos_token", BEGIN), eos_token=token("eos_token", END),
            )  # fmt: skip
        except TemplateError as error:
            raise InputError(f"{path}: {error}") from None

    return render
