"""`dsv4-jax generate`: continues prompts."""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import typer
from rich.progress import Progress

import dsv4_jax

from .errors import InputError
from .generation_config import end_tokens, sampling_options
from .loading import keep_programs, load_model
from .options import CacheDtype, Dtype, HcaTail, IndexerDtype, KeepPrograms, default_indexer, packaged_checkpoint
from .outcome import CompileClock, Outcome, summary
from .prompts import ByteCodec, StopCutter, check_prompts, make_codec, parse_tokens, read_prompt_file
from .terminal import TextOutput, in_background, make_console, make_progress


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to continue.")] = None,
    tokens: Annotated[
        list[str] | None, typer.Option(metavar="1,2,3", help="A prompt as token ids; may be repeated.")
    ] = None,
    file: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="A prompt from a file, - for stdin; may be repeated.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="PATH", help="Folder of a checkpoint; default: the small one in the package.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", metavar="N", min=0, help="Tokens to add.")
    ] = 128,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", min=0.0, help="0 takes the most likely token.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", min=0.0, max=1.0, help="Draw from the fewest tokens that have P together."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(metavar="K", min=0, help="Draw from the K most likely; 0: all.")] = None,
    min_p: Annotated[
        float | None, typer.Option(metavar="P", min=0.0, max=1.0, help="Draw from those P times as likely as the best.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")
    ] = None,
    log_probs: Annotated[
        int | None,
        typer.Option(metavar="K", min=0, max=100, help="With --json: log-probabilities of tokens and of the K best."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Seed of the draws.")] = 0,
    samples: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=4096,
            help="Continuations of each prompt, which is read once; the j-th draws with seed + j.",
        ),
    ] = 1,
    draft: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Guess up to N tokens from the text so far, verify them in one step. The same text with exact caches; "
            "with quantised ones a near tie may go the other way.",
        ),
    ] = 0,
    cache: Annotated[CacheDtype, typer.Option(help="Storage of key-value records.")] = CacheDtype.fp8,
    indexer: Annotated[
        IndexerDtype | None, typer.Option(help="Storage of indexer keys; default: what goes with the records.")
    ] = None,
    hca_tail: Annotated[
        HcaTail, typer.Option(help="Of an HCA layer's open window keep its tokens (full) or running sums (smaller).")
    ] = HcaTail.full,
    dtype: Annotated[Dtype, typer.Option(help="What the model computes in.")] = Dtype.float32,
    devices: Annotated[
        int, typer.Option(metavar="N", min=1, help="Spread prompts and experts over the first N devices.")
    ] = 1,
    model_devices: Annotated[
        int,
        typer.Option(
            metavar="M",
            min=1,
            help="Of these so many divide the heads of the same prompts, and each has their cache.",
        ),
    ] = 1,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Write the prompt before its continuation.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object and nothing else to stdout.")] = False,
    keep: KeepPrograms = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")] = False,
) -> None:
    """Continues one prompt, or several as a batch, and says how fast.

    Text is bytes where the checkpoint has no tokenizer.json and a vocabulary of 256. Progress and the summary go to
    stderr. Where temperature, --top-k, --top-p and --min-p are not given, the checkpoint's generation_config.json says.

    Example: dsv4-jax generate 'def read(path' -n 64 --temperature 0.7
    """
    console = make_console(quiet)
    prompts = prompts or []
    if not prompts and not tokens and not file:
        raise InputError("there is no prompt: give a text, --tokens or --file")
    ids = [parse_tokens(text) for text in tokens or ()]  # refused before anything is loaded
    texts = [*(os.fsencode(text) for text in prompts), *(read_prompt_file(path) for path in file or ())]

    progress = make_progress(console, "tokens")
    start = time.perf_counter()
    folder = pathlib.Path(checkpoint) if checkpoint is not None else packaged_checkpoint()
    keep_programs(keep)
    model = load_model(folder, console, dtype.value, devices, model_devices)
    codec = make_codec(folder, model.config.vocab_size)
    sampling = sampling_options(folder, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ids = check_prompts([*(codec.encode(text) for text in texts), *ids], model.config, max_new_tokens)
    rows = [prompt for prompt in ids for _ in range(samples)]
    outcome = Outcome(prompts=ids, tokens=[[] for _ in rows])
    outcome.seconds["load"] = time.perf_counter() - start
    stops = () if ignore_eos else end_tokens(folder, model.config.eos_token_ids, model.config.vocab_size)
    if stop and codec.decode_all is None:
        raise InputError("--stop needs text: this checkpoint has no tokenizer.json")
    probs: list[list[Any]] = [[] for _ in rows]

    def chunks() -> Iterator[Any]:
        return dsv4_jax.stream(
            model, ids, max_new_tokens, cache_dtype=cache.value, indexer_dtype=indexer and indexer.value,
            hca_tail=hca_tail.value, seed=seed, stop_tokens=stops, num_samples=samples, draft_tokens=draft,
            stop_texts=stop or (), decode=codec.decode_all, log_probs=log_probs if as_json else None, **sampling,
        )  # fmt: skip

    decoders, cutters = [codec.decoder(prompt) for prompt in rows], [StopCutter(stop or ()) for _ in rows]
    new_texts = ["" for _ in rows]
    output = TextOutput()
    streams = not as_json and len(rows) == 1
    if streams and echo:
        output.write(_prompt_text(codec, ids[0]))

    def on_chunk(chunk: Any) -> None:
        for b, new in enumerate(chunk.tokens):
            text = cutters[b](decoders[b](new))
            new_texts[b] += text
            if new and chunk.log_probs is not None and chunk.log_probs[b] is not None:
                probs[b] += _log_probs(chunk.log_probs[b])
            if streams and text:
                progress.stop()  # one of the two may move the cursor
                output.write(text)

    with progress:
        _walk(outcome, chunks, on_chunk, progress)
    for b, decode in enumerate(decoders):
        rest = cutters[b](decode([], True), True)
        new_texts[b] += rest
        if streams:
            output.write(rest)

    indexer_name = indexer.value if indexer else default_indexer(cache.value)
    if as_json:
        settings = Settings(str(folder), str(dtype), devices, model_devices, str(cache), indexer_name)
        answers = list(map(Answer, rows, outcome.tokens, new_texts, probs))
        print(json.dumps(_report(outcome, settings, answers, stops)))
        sys.stdout.flush()
    elif not streams:
        for b, text in enumerate(new_texts):
            output.end_line()
            name = f"prompt {b // samples + 1}" + (f", sample {b % samples + 1}" if samples > 1 else "")
            output.write(f"--- {name}\n{_prompt_text(codec, rows[b]) if echo else ''}{text}")
    if not as_json:
        output.end_line()
    formats = f"{cache.value} records, {indexer_name} indexer keys"
    console.print(summary(outcome, formats), style="dim", markup=False, soft_wrap=True)


def _prompt_text(codec: Any, prompt: list[int]) -> str:
    decode = codec.decoder([])
    return decode(prompt) + ("" if isinstance(codec, ByteCodec) else decode([], True))


def _log_probs(probs: Any) -> list[dict[str, Any]]:
    """Of each token, and of the most likely ones as pairs [token, log-probability]."""
    return [
        {
            "token": round(float(chosen), 5),
            "best": [[int(t), round(float(p), 5)] for t, p in zip(tokens, best, strict=True)],
        }
        for chosen, tokens, best in zip(*probs, strict=True)
    ]


def _walk(
    outcome: Outcome, batches: Callable[[], Iterator[Any]], on_chunk: Callable[[Any], None], progress: Progress
) -> None:
    """Walks the stream, keeps the times, shows the progress and hands every chunk on."""
    task = progress.add_task("compiling prefill and decode", total=outcome.prompt_tokens)
    first_token = False
    with CompileClock() as clock:
        start = time.perf_counter()
        for chunk in in_background(batches):
            now = time.perf_counter()
            compiling = clock.seconds(start, now)
            outcome.seconds["compile"] += compiling
            outcome.seconds["decode" if first_token else "prefill"] += max(now - start - compiling, 0.0)
            outcome.cache_bytes, outcome.stats = chunk.cache_bytes, chunk.stats
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


class Settings(NamedTuple):
    """What a run was made with."""

    checkpoint: str
    dtype: str
    devices: int
    model_devices: int
    records: str
    indexer: str


class Answer(NamedTuple):
    """One continuation of a prompt."""

    prompt: list[int]
    tokens: list[int]
    text: str
    log_probs: list[Any]


def _report(outcome: Outcome, settings: Settings, answers: Sequence[Answer], stops: Sequence[int]) -> dict[str, Any]:
    """The object of --json. Seconds and rates leave compilation out; "stopped" says that an end-of-text token came."""
    return {
        "checkpoint": settings.checkpoint,
        "dtype": settings.dtype,
        "devices": settings.devices,
        "model_devices": settings.model_devices,
        "cache": {"records": settings.records, "indexer": settings.indexer, "bytes": outcome.cache_bytes},
        "prompt_tokens": outcome.prompt_tokens,
        "new_tokens": outcome.new_tokens,
        "drafts": outcome.stats
        and {"drafted": outcome.stats.drafted_tokens, "accepted": outcome.stats.accepted_tokens},
        "seconds": {name: round(value, 4) for name, value in outcome.seconds.items()},
        "tokens_per_second": {k: r and round(r, 2) for k, r in outcome.rates.items()},
        "results": [
            {
                "prompt": prompt,
                "tokens": new,
                "text": text,
                "stopped": bool(new) and new[-1] in stops,
                **({"log_probs": log_probs} if log_probs else {}),
            }
            for prompt, new, text, log_probs in answers
        ],
    }
