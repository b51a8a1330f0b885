"""How much of their texts 50 conversations in turn find, by the room for states: host bookkeeping only, no model.

python scripts/benchmarks/prefix_trace.py [--prompts-only]

A turn brings 30 to 400 tokens of a user and 50 to 600 of a reply; half of the conversations begin with one of three
system prompts. --prompts-only: replies are not kept, only what was read.
"""

import random
import sys

import numpy as np

from dsv4_jax.cache.host.prefix import PrefixIndex, PrefixPolicy

BLOCK = 128


def run(room: int, keeps_replies: bool) -> tuple[float, float]:
    """(share of prompt tokens found, that share from second turns on) with room for so many states."""
    rng = random.Random(7)
    index = PrefixIndex(PrefixPolicy("full", max_state_bytes=room), "", BLOCK, 0)
    state = {"x": np.zeros(1, np.uint8)}
    systems = [[rng.randrange(1 << 16) for _ in range(n)] for n in (700, 1500, 2600)]
    texts = [list(rng.choice(systems)) if i % 2 else [] for i in range(50)]
    turns, blocks = [0] * 50, 0
    read = found = again = found_again = 0
    for _ in range(600):
        # Some are busier than others.
        i = min(int(rng.expovariate(1 / 12)), 49)
        texts[i] += [rng.randrange(1 << 16) for _ in range(rng.randint(30, 400))]
        ids = np.array(texts[i], np.int32)
        match = index.match(index.keys(ids[:-1], b""), ["csa"])
        start = 0 if match is None else match.start
        read, found = read + len(ids), found + start
        if turns[i]:
            again, found_again = again + len(ids), found_again + start
        turns[i] += 1
        prompt = len(texts[i])
        texts[i] += [rng.randrange(1 << 16) for _ in range(rng.randint(50, 600))]
        end = len(texts[i]) - 1 if keeps_replies else prompt
        keys = index.keys(np.array(texts[i][:end], np.int32), b"")
        for n in range(start // BLOCK + 1, len(keys) + 1):  # block after block, as the loop fills them
            new = index.add(keys[:n], {"csa": list(range(blocks, blocks + n))})
            blocks += n if new["csa"] else 0
            if index.lacks_state(keys[n - 1], n * BLOCK):
                index.keep_state(keys[n - 1], state)
    return found / read, found_again / again


def main() -> None:
    """Prints a table."""
    keeps_replies = "--prompts-only" not in sys.argv
    print("states  of all prompt tokens found  of second and later turns'")
    for room in (25, 50, 100, 200, 400, 100_000):
        share, later = run(room, keeps_replies)
        print(f"{room:6}  {share:26.1%}  {later:26.1%}")


if __name__ == "__main__":
    main()
