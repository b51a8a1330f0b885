"""A decode loop with streaming: more prompts than slots, every token given out as it comes, slots taken over.

python examples/streaming.py [checkpoint]
"""

import pathlib
import sys
from collections import deque
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dsv4_jax

PROMPTS = ["class Stack:\n    def __init__(self", "import os\nimport ", "def read(path):\n    with open("]


def serve(model, prompts: list[list[int]], new_tokens: int, slots: int = 2) -> Iterator[tuple[int, int]]:
    """Yields (index of the prompt, token) until every prompt has `new_tokens` more.

    One jitted call is one token of every running request; a request's prompt is fed the same way. (`dsv4_jax.stream`
    prefills in chunks and decodes many tokens in a call: quicker, but more to read.)
    """
    graphdef, weights = nnx.split(model)
    longest = max(map(len, prompts)) + new_tokens
    manager = dsv4_jax.KVCacheManager.from_memory(
        model.config, 256 << 20, max_concurrent_requests=slots, max_context_len=longest
    )

    @partial(jax.jit, donate_argnums=1)
    def step(weights, cache, plan, tokens):
        logits, cache = nnx.merge(graphdef, weights)(tokens, cache.with_blocks(plan.new_blocks), plan)
        return jnp.argmax(logits, axis=-1), cache

    waiting = deque(enumerate(prompts))
    running: dict[int, tuple[int, list[int]]] = {}  # slot -> index of the prompt, its tokens so far
    while waiting or running:
        while waiting and len(running) < slots:
            index, prompt = waiting.popleft()
            running[manager.admit_request()] = index, list(prompt)
        # Always `slots` tokens, so that there is one compiled program; slot -1 is padding and writes nothing.
        slot_ids, tokens, positions = (np.full(slots, fill, np.int32) for fill in (-1, 0, 0))
        for row, (slot, (_, text)) in enumerate(running.items()):
            position = manager.length(slot)
            slot_ids[row], tokens[row], positions[row] = slot, text[position], position
        plan = manager.plan_step(slot_ids, positions)
        chosen, manager.cache = step(weights, manager.cache, plan, tokens)
        for slot, token in zip(list(running), np.asarray(chosen).tolist(), strict=False):
            index, text = running[slot]
            if manager.length(slot) < len(text):
                continue  # still in its prompt
            text.append(token)
            yield index, token
            if len(text) == len(prompts[index]) + new_tokens:
                manager.release_request(slot)  # its blocks and its slot are free for the next prompt
                del running[slot]


def main(checkpoint: str | pathlib.Path, new_tokens: int = 40) -> None:
    """Streams text of a checkpoint whose tokens are bytes: a line of a prompt's text as soon as it is complete."""
    model = dsv4_jax.from_pretrained(checkpoint)
    lines = dict(enumerate(PROMPTS))
    left = dict.fromkeys(lines, new_tokens)
    for index, token in serve(model, [list(p.encode()) for p in PROMPTS], new_tokens):
        lines[index] += chr(token)
        left[index] -= 1
        *complete, rest = lines[index].split("\n")
        for line in complete if left[index] else [*complete, rest]:
            print(f"{index} | {line}", flush=True)
        lines[index] = rest


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else dsv4_jax.packaged_checkpoint())
