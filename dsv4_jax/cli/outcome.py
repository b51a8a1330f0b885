"""What a run took: tokens, seconds, compilation apart."""

import time
from dataclasses import dataclass, field
from typing import Any

from .sizes import show_bytes
from .terminal import show_seconds


class CompileClock:
    """Seconds that JAX spends on tracing, lowering and compiling while the clock is entered."""

    def __init__(self):
        self._spans: list[tuple[float, float]] = []

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            self._spans.append((now - duration_secs, now))

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
    stats: Any = None  # `dsv4_jax.decode.Stats` of the run
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


def summary(outcome: Outcome, cache: str) -> str:
    """Two lines for people."""
    rates = {
        k: f"{show_seconds(outcome.seconds[k])}" + (f", {r:.0f} tokens/s" if r else "")
        for k, r in outcome.rates.items()
    }
    batch = f" in {len(outcome.prompts)} prompts" if len(outcome.prompts) > 1 else ""
    drafts = ""
    if outcome.stats and outcome.stats.drafted_tokens:
        drafted, accepted = outcome.stats.drafted_tokens, outcome.stats.accepted_tokens
        drafts = f", {accepted} of {drafted} drafts accepted ({outcome.stats.acceptance:.0%})"
    return (
        f"{outcome.prompt_tokens} prompt tokens{batch} ({rates['prefill']}), "
        f"{outcome.new_tokens} new tokens ({rates['decode']}){drafts}\n"
        f"compilation {show_seconds(outcome.seconds['compile'])}, loading {show_seconds(outcome.seconds['load'])}, "
        f"cache {show_bytes(outcome.cache_bytes)} ({cache})"
    )
