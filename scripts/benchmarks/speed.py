"""Tokens per second of prefill and decode on this machine, beside transformers' own cached decode.

Every prompt is Python source from the standard library. Compilation is the first call minus the fastest later one.
"""

import argparse
import json
import pathlib
import platform
import subprocess
import sys
import time

import texts

HERE = pathlib.Path(__file__).resolve().parent

ROWS = {"decode": "new, decode alone", "overall": "new, with prefill", "prefill": "of the prompt, prefill"}


def run_dsv4_jax(model, options: argparse.Namespace, prompts: list[list[int]]) -> dict:
    """Seconds of one run: prefill up to the first tokens, decode of the others, all of it."""
    import dsv4_jax

    start = time.perf_counter()
    first, count = None, 0
    for chunk in dsv4_jax.stream(model, prompts, options.new_tokens, cache_dtype=options.cache):
        count += sum(map(len, chunk.tokens))
        if first is None and count:
            first = time.perf_counter()
    end = time.perf_counter()
    assert count == len(prompts) * options.new_tokens
    return {"prefill": first - start, "decode": end - first, "overall": end - start}


class Transformers:
    """transformers in another process, which answers one run at a time."""

    def __init__(self, python: str, options: argparse.Namespace):
        self.process = subprocess.Popen(
            [python, str(HERE / "transformers_speed.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        checkpoint = str(pathlib.Path(options.checkpoint).resolve())
        self.facts = self.ask({"checkpoint": checkpoint, "dtype": options.dtype, "new_tokens": options.new_tokens})

    def ask(self, request: object) -> dict:
        """Sends a line of JSON, returns the line that comes back."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"bench: the run of transformers failed with exit status {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def start_transformers(options: argparse.Namespace) -> Transformers | None:
    """None where it cannot be imported and no interpreter was named."""
    python = options.transformers_python or sys.executable
    if subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode:
        if options.transformers_python:
            sys.exit(f"bench: {python} cannot import torch and transformers")
        return None
    return Transformers(python, options)


def fastest(runs: list[dict]) -> dict:
    """The run with the least time in all."""
    return min(runs, key=lambda run: run["overall"])


def rates(seconds: dict, batch: int, prompt_tokens: int, new_tokens: int) -> dict:
    """New tokens per second of all prompts together. The first token of a prompt comes from its prefill."""
    return {
        "prefill": batch * prompt_tokens / seconds["prefill"],
        "decode": batch * (new_tokens - 1) / seconds["decode"],
        "overall": batch * new_tokens / seconds["overall"],
    }


def table(entry: dict) -> str:
    """The rates of one batch."""
    lines = [f"  {'tokens/s':24}{'dsv4_jax':>12}{'transformers':>14}{'ratio':>8}"]
    for what, name in ROWS.items():
        other = f"{entry['transformers'][what]:14.0f}{entry['ratio'][what]:8.1f}" if "ratio" in entry else f"{'-':>14}"
        lines.append(f"  {name:24}{entry['dsv4_jax'][what]:12.0f}{other}")
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="scripts/bench speed", description=__doc__)
    parser.add_argument("--checkpoint", help="folder of a checkpoint; default: the small one in the package")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="prompts together (default 1 16)")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="bytes of each prompt (default 512)")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens to add to each (default 128)")
    parser.add_argument("--cache", default="fp8", help="storage of records: fp8, fp8_ue8m0, bf16, fp32 (default fp8)")
    parser.add_argument("--dtype", default="float32", help="what both models compute in (default float32)")
    parser.add_argument("--repeat", type=int, default=3, help="timed runs, the fastest counts (default 3)")
    parser.add_argument("--transformers-python", metavar="PATH", help="interpreter that has torch and transformers")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    options = parser.parse_args()

    import jax

    import dsv4_jax
    from dsv4_jax.cli import packaged_checkpoint

    options.checkpoint = options.checkpoint or packaged_checkpoint()
    sources = texts.python_source(max(options.batch), options.prompt_tokens, options.prompt_tokens)
    prompts = {batch: [list(text) for text in sources[:batch]] for batch in options.batch}
    model = dsv4_jax.from_pretrained(options.checkpoint, dtype=options.dtype)
    other = start_transformers(options)
    facts = other and other.facts
    device = jax.devices()[0].device_kind
    print(
        f"{options.prompt_tokens}-token prompts, {options.new_tokens} new tokens, {options.dtype}, "
        f"cache {options.cache}; JAX {jax.__version__} on {device}"
        + (f"; transformers {facts['version']}, {facts['threads']} threads" if facts else "; no transformers here"),
        flush=True,
    )
    entries = []
    for batch in options.batch:
        first = run_dsv4_jax(model, options, prompts[batch])
        if other:
            other.ask(prompts[batch])
        ours, theirs = [], []
        # In turns, so that a machine that is busy for a while slows both down.
        for _ in range(options.repeat):
            ours.append(run_dsv4_jax(model, options, prompts[batch]))
            if other:
                theirs.append(other.ask(prompts[batch]))
        mine, compared = fastest(ours), theirs and fastest(theirs)
        entry = {"batch": batch, "compile_seconds": first["overall"] - mine["overall"]}
        entry["dsv4_jax"] = rates(mine, batch, options.prompt_tokens, options.new_tokens)
        if theirs:
            entry["transformers"] = rates(compared, batch, options.prompt_tokens, options.new_tokens)
            entry["ratio"] = {what: entry["dsv4_jax"][what] / entry["transformers"][what] for what in ROWS}
        entries.append(entry)
        print(f"batch {batch}: compilation of dsv4_jax {entry['compile_seconds']:.1f} s", flush=True)
        print(table(entry), flush=True)
    if other:
        other.close()
    result = {
        "machine": platform.processor() or platform.machine(),
        "device": device,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "transformers": facts,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "cache": options.cache,
        "dtype": options.dtype,
        "batches": entries,
    }
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
