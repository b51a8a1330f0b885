"""One model over the devices of two processes, each with its own requests: how a launch on two hosts looks.

python examples/two_processes.py [checkpoint]   starts both, on two CPU devices each.

On two hosts each runs `serve` with its own number and the address of the first; on GPUs without XLA_FLAGS.
"""

import os
import socket
import subprocess
import sys

DEVICES = 2  # of a process
PROMPTS = [["import os\n", "def main():\n", "class Stack:\n"], ["for x in"]]  # of each process


def serve(process: int, address: str, checkpoint: str, new_tokens: int) -> None:
    """What each process runs: the same calls in the same order, and its own requests."""
    import jax
    import numpy as np

    import dsv4_jax

    jax.distributed.initialize(address, num_processes=len(PROMPTS), process_id=process)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))  # those of all processes
    model = dsv4_jax.from_pretrained(checkpoint, mesh=mesh)  # reads what its own devices need
    manager = dsv4_jax.ShardedKVCacheManager(
        model.config, model.config.schedule, mesh=mesh, max_concurrent_requests=2, num_blocks_per_csa_layer=4,
        num_blocks_per_hca_layer=4, cache_dtype="fp32",
    )  # fmt: skip
    loop = dsv4_jax.DecodeLoop(model, manager, prefill_chunk=16, decode_chunk=4)
    numbers = {loop.submit(list(prompt.encode()), new_tokens): prompt for prompt in PROMPTS[process]}
    texts = dict.fromkeys(numbers, b"")
    for event in loop:  # goes on until all processes have finished
        texts[event.request] += bytes(event.tokens)
    for number, prompt in numbers.items():
        print(f"{process}: {prompt!r} {texts[number]!r}", flush=True)


def main(checkpoint: str, new_tokens: int = 24) -> None:
    """Starts the processes, waits for both and prints what they say; where one fails, so does this."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}",
    }
    arguments = [address, checkpoint, str(new_tokens)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(process), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(len(PROMPTS))
    ]
    results = [process.communicate() for process in processes]
    for process, (out, err) in zip(processes, results, strict=True):
        print(out, end="")
        if process.returncode:
            raise RuntimeError(err[-2000:])


if __name__ == "__main__":
    if len(sys.argv) == 5:
        serve(int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        import dsv4_jax

        main(str(sys.argv[1] if len(sys.argv) > 1 else dsv4_jax.packaged_checkpoint()))
