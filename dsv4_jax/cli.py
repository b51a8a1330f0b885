"""The command line: `dsv4-jax generate`."""

import codecs
import contextlib
import importlib.metadata
import importlib.resources
import json
import logging
import os
import pathlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

app = typer.Typer(
    help="DeepSeek-V4's KV cache for JAX, and a decode loop over it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130
WORKER = "dsv4-jax-generate"


class CacheDtype(StrEnum):
    """How key-value records are stored."""

    fp8 = "fp8"
    fp8_ue8m0 = "fp8_ue8m0"
    bf16 = "bf16"
    fp32 = "fp32"


class IndexerDtype(StrEnum):
    """How indexer keys are stored."""

    nvfp4 = "nvfp4"
    mxfp4 = "mxfp4"
    bf16 = "bf16"
    fp32 = "fp32"


class Dtype(StrEnum):
    """What the model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class InputError(ValueError):
    """What was asked for cannot be done; the message is one sentence for the user."""


# Text and tokens.


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


class TokenizerCodec:
    """Text by the checkpoint's tokenizer.json."""

    def __init__(self, path: pathlib.Path):
        import tokenizers

        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise InputError(f"{path} is not a tokenizer: {_one_line(error)}") from None

    def encode(self, data: bytes) -> list[int]:
        """Token ids of a prompt."""
        try:
            return self.tokenizer.encode(data.decode()).ids
        except UnicodeDecodeError as error:
            raise InputError(f"the prompt is not UTF-8 (byte {error.start}): expected text, or token ids") from None

    def decoder(self, prompt: Sequence[int]) -> Callable[..., str]:
        """As in ByteCodec; a character comes when all of its tokens are there."""
        from tokenizers.decoders import DecodeStream

        # Special tokens are shown: one inside a text is worth seeing. A token's text can depend on those before it.
        stream, ids, sent = DecodeStream(skip_special_tokens=False), [], []
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

    def __init__(self, why: str):
        self.why = why

    def encode(self, data: bytes) -> list[int]:
        """Refuses: there is nothing to turn text into tokens."""
        raise InputError(f"{self.why}: give the prompt as token ids with --tokens")

    def decoder(self, prompt: Sequence[int]) -> Callable[..., str]:
        """As in ByteCodec, with the numbers of the tokens for text."""
        return lambda tokens, final=False: "".join(f"{token} " for token in tokens)


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
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise InputError(f"--tokens {text[:60]!r}: expected token ids such as 1,2,3") from None


def read_prompt_file(path: str) -> bytes:
    """The bytes of a file, or of standard input for "-"."""
    if path == "-":
        return sys.stdin.buffer.read()
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"--file {path}: {(error.strerror or str(error)).lower()}") from None


# Time.


class CompileClock:
    """Seconds that JAX spends on tracing, lowering and compiling while the clock is entered."""

    def __init__(self):
        self._spans: list[tuple[float, float]] = []

    def _listen(self, event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            self._spans.append((now - seconds, now))

    def __enter__(self) -> "CompileClock":
        import jax.monitoring

        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: Any) -> None:
        import jax.monitoring

        jax.monitoring.unregister_event_duration_listener(self._listen)

    def seconds(self, start: float, end: float) -> float:
        """Those between two times of `time.perf_counter`; spans that contain others count once."""
        total, reached = 0.0, start
        for first, last in sorted(self._spans):
            first, last = max(first, reached), min(last, end)
            if last > first:
                total, reached = total + last - first, last
        return total


@dataclass
class Outcome:
    """What a run brought and how long its parts took."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    cache_bytes: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("load", "compile", "prefill", "decode"), 0.0)
    )

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def new_tokens(self) -> int:
        """New tokens of all prompts."""
        return sum(map(len, self.tokens))

    @property
    def rates(self) -> dict[str, float | None]:
        """Tokens per second without compilation. The first new token of a prompt comes from its prefill."""
        counts = {"prefill": self.prompt_tokens, "decode": self.new_tokens - sum(bool(t) for t in self.tokens)}
        return {k: n / self.seconds[k] if n and self.seconds[k] > 0 else None for k, n in counts.items()}


def in_background(items: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """The items of an iterator that another thread walks, so that Ctrl-C is heard in the middle of a compilation."""
    box: queue.Queue = queue.Queue()

    def work() -> None:
        try:
            for item in items():
                box.put((item, None))
            box.put(None)
        except BaseException as error:  # handed over, whatever it is
            box.put((None, error))

    thread = threading.Thread(target=work, daemon=True, name=WORKER)
    thread.start()
    while (got := box.get()) is not None:
        item, error = got
        if error is not None:
            thread.join()
            raise error
        yield item
    thread.join()


# Output.


def _one_line(error: BaseException | str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:399] + "…"


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def summary(outcome: Outcome, cache: str) -> str:
    """Two lines for people."""
    rates = {
        k: f"{_seconds(outcome.seconds[k])}" + (f", {r:.0f} tokens/s" if r else "") for k, r in outcome.rates.items()
    }
    batch = f" in {len(outcome.prompts)} prompts" if len(outcome.prompts) > 1 else ""
    return (
        f"{outcome.prompt_tokens} prompt tokens{batch} ({rates['prefill']}), "
        f"{outcome.new_tokens} new tokens ({rates['decode']})\n"
        f"compilation {_seconds(outcome.seconds['compile'])}, loading {_seconds(outcome.seconds['load'])}, "
        f"cache {_megabytes(outcome.cache_bytes)} ({cache})"
    )


class ConsoleHandler(logging.Handler):
    """Log messages above a progress bar, on lines that are not cut."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Prints the message."""
        self._console.print(self.format(record), markup=False, soft_wrap=True)


class TextOutput:
    """Text on stdout as it comes."""

    def __init__(self):
        with contextlib.suppress(AttributeError, ValueError):
            sys.stdout.reconfigure(errors="replace")
        # A model may write what moves a terminal's cursor or changes its title: there, show such characters instead.
        controls = {c: 0xFFFD for c in (*range(32), *range(127, 160)) if c not in (9, 10)}
        self._shown = controls if sys.stdout.isatty() else {}
        self.at_line_start = True

    def write(self, text: str) -> None:
        """Writes and flushes."""
        if text:
            sys.stdout.write(text.translate(self._shown))
            sys.stdout.flush()
            self.at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """Ends a line that has begun."""
        if not self.at_line_start:
            self.write("\n")


def run(
    outcome: Outcome, batches: Callable[[], Iterator[Any]], on_chunk: Callable[[Any], None], progress: Progress
) -> None:
    """Walks the stream, keeps the times, shows the progress and hands every chunk on."""
    task = progress.add_task("compiling", total=outcome.prompt_tokens)
    first_token = False
    with CompileClock() as clock:
        start = time.perf_counter()
        for chunk in in_background(batches):
            now = time.perf_counter()
            compiling = clock.seconds(start, now)
            outcome.seconds["compile"] += compiling
            outcome.seconds["decode" if first_token else "prefill"] += max(now - start - compiling, 0.0)
            outcome.cache_bytes = chunk.cache_bytes
            for b, new in enumerate(chunk.tokens):
                outcome.tokens[b].extend(new)
            if not first_token and any(chunk.tokens):
                first_token = True
                progress.reset(task, description="decoding", total=None)
            progress.update(task, advance=chunk.prompt_tokens or max(map(len, chunk.tokens), default=0))
            if not first_token:
                progress.update(task, description="prefill")
            on_chunk(chunk)
            start = time.perf_counter()


def _version(wanted: bool) -> None:
    if wanted:
        try:
            print(importlib.metadata.version("dsv4_jax"))
        except importlib.metadata.PackageNotFoundError:
            raise InputError("dsv4_jax is not installed, this is its source: there is no version to show") from None
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts to continue.")] = None,
    tokens: Annotated[
        list[str] | None, typer.Option(metavar="1,2,3", help="A prompt as token ids; may be repeated.")
    ] = None,
    file: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="A prompt from a file, - for stdin; may be repeated.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="PATH", help="Folder of a checkpoint; default: the small one in the package.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=0, help="Tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the draws.")] = 0,
    cache: Annotated[CacheDtype, typer.Option(help="Storage of key-value records.")] = CacheDtype.fp8,
    indexer: Annotated[
        IndexerDtype | None, typer.Option(help="Storage of indexer keys; default: what goes with the records.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="What the model computes in.")] = Dtype.float32,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Write the prompt before its continuation.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object and nothing else to stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")] = False,
) -> None:
    """Continues one prompt, or several as a batch, and says how fast.

    Text is bytes where the checkpoint has no tokenizer.json and a vocabulary of 256. Progress and the summary go to
    stderr.
    """
    console = Console(stderr=True, quiet=quiet, highlight=False)
    logging.basicConfig(format="%(message)s", handlers=[ConsoleHandler(console)])
    prompts = prompts or []
    if not prompts and not tokens and not file:
        raise InputError("there is no prompt: give a text, --tokens or --file")
    ids = [parse_tokens(text) for text in tokens or ()]  # refused before anything is loaded
    texts = [*(os.fsencode(text) for text in prompts), *(read_prompt_file(path) for path in file or ())]

    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f} tokens"),
        TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    start = time.perf_counter()
    folder = pathlib.Path(checkpoint) if checkpoint is not None else packaged_checkpoint()
    with console.status(f"loading {folder}") if console.is_terminal else contextlib.nullcontext():
        import dsv4_jax

        model = dsv4_jax.from_pretrained(folder, dtype=dtype.value)
    vocab_size = model.config.vocab_size
    codec = make_codec(folder, vocab_size)
    ids = [*(codec.encode(text) for text in texts), *ids]
    for i, prompt in enumerate(ids):
        if not prompt:
            raise InputError(f"prompt {i + 1} is empty: expected at least one token")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise InputError(
                f"prompt {i + 1} has token ids from {min(prompt)} to {max(prompt)}: expected 0 to {vocab_size - 1}"
            )
    outcome = Outcome(prompts=ids, tokens=[[] for _ in ids])
    outcome.seconds["load"] = time.perf_counter() - start
    stops = () if ignore_eos else model.config.eos_token_ids

    def chunks() -> Iterator[Any]:
        return dsv4_jax.stream(
            model, ids, max_new_tokens, cache_dtype=cache.value, indexer_dtype=indexer and indexer.value,
            temperature=temperature, seed=seed, stop_tokens=stops,
        )  # fmt: skip

    decoders = [codec.decoder(prompt) for prompt in ids]
    new_texts = ["" for _ in ids]
    output = None if as_json else TextOutput()
    streams = output is not None and len(ids) == 1
    if streams and echo:
        output.write(_prompt_text(codec, ids[0]))

    def on_chunk(chunk: Any) -> None:
        for b, new in enumerate(chunk.tokens):
            text = decoders[b](new)
            new_texts[b] += text
            if streams and text:
                progress.stop()  # one of the two may move the cursor
                output.write(text)

    with progress:
        run(outcome, chunks, on_chunk, progress)
    for b, decode in enumerate(decoders):
        rest = decode([], True)
        new_texts[b] += rest
        if streams:
            output.write(rest)

    indexer_name = indexer.value if indexer else _default_indexer(cache.value)
    if as_json:
        print(json.dumps(_report(outcome, new_texts, folder, dtype, cache, indexer_name, stops)))
        sys.stdout.flush()
    elif not streams:
        for b, text in enumerate(new_texts):
            output.end_line()
            output.write(f"--- prompt {b + 1}\n{_prompt_text(codec, ids[b]) if echo else ''}{text}")
    if output is not None:
        output.end_line()
    formats = f"{cache.value} records, {indexer_name} indexer keys"
    console.print(summary(outcome, formats), style="dim", markup=False, soft_wrap=True)


def _prompt_text(codec: Any, prompt: list[int]) -> str:
    decode = codec.decoder([])
    return decode(prompt) + ("" if isinstance(codec, ByteCodec) else decode([], True))


def _default_indexer(cache_dtype: str) -> str:
    from dsv4_jax.cache.records import DEFAULT_INDEXER_FORMAT

    return DEFAULT_INDEXER_FORMAT[cache_dtype]


def _report(
    outcome: Outcome, texts: list[str], folder: pathlib.Path, dtype: str, cache: str, indexer: str, stops: Sequence[int]
) -> dict[str, Any]:
    """The object of --json. Seconds and rates leave compilation out; "stopped" says that an end-of-text token came."""
    results = zip(outcome.prompts, outcome.tokens, texts, strict=True)
    return {
        "checkpoint": str(folder),
        "dtype": str(dtype),
        "cache": {"records": str(cache), "indexer": indexer, "bytes": outcome.cache_bytes},
        "prompt_tokens": outcome.prompt_tokens,
        "new_tokens": outcome.new_tokens,
        "seconds": {name: round(value, 4) for name, value in outcome.seconds.items()},
        "tokens_per_second": {k: r and round(r, 2) for k, r in outcome.rates.items()},
        "results": [
            {"prompt": prompt, "tokens": new, "text": text, "stopped": bool(new) and new[-1] in stops}
            for prompt, new, text in results
        ],
    }


def packaged_checkpoint() -> pathlib.Path:
    """The small checkpoint that comes with the package."""
    return pathlib.Path(str(importlib.resources.files("dsv4_jax") / "data" / "tiny_dsv4"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. Exit status: 0, 1 for a failure, 2 for bad usage or input, 130 after Ctrl-C."""
    try:
        status = app(arguments, prog_name="dsv4-jax", standalone_mode=False)
        sys.stdout.flush()
        status = status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except (BrokenPipeError, SystemExit):
        # Whoever read the text has gone (typer turns that into SystemExit): Python must not complain at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
        status = 1
    except Exception as error:
        message, status = _describe(error)
        print(f"dsv4-jax: {message}", file=sys.stderr)
    if any(thread.name == WORKER for thread in threading.enumerate()):
        # The run was left in the middle: a thread inside JAX would abort an interpreter that shuts down around it.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _describe(error: Exception) -> tuple[str, int]:
    """One sentence and the exit status."""
    if hasattr(error, "format_message"):  # the parser's own errors
        return f"{_one_line(error.format_message()).rstrip('.')} (see dsv4-jax --help)", error.exit_code
    if isinstance(error, (ValueError, FileNotFoundError, NotADirectoryError, PermissionError)):
        return _one_line(error), 2
    if isinstance(error, MemoryError):
        return "out of memory: fewer or shorter prompts need less", 1
    if isinstance(error, (RuntimeError, OSError)):
        return _one_line(error), 1
    return f"{type(error).__name__}: {_one_line(error)}", 1


if __name__ == "__main__":
    main()
