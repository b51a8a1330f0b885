"""Planning: what a cache costs, what fits into a device's memory, and a manager that fills it.

The same from the command line: dsv4-jax plan --config flash --memory 80GiB --context 131072 --concurrency 16
"""

from dsv4_jax import DSV4Config, KVCacheManager, cache_cost

GIB = 2**30


def main(memory: int = 80 * GIB, requests: int = 16, context: int = 131072) -> None:
    """Prints what DeepSeek-V4-Flash and -Pro need."""
    for name, config in (("Flash", DSV4Config.flash()), ("Pro", DSV4Config.pro())):
        cost = cache_cost(config, config.schedule, cache_dtype="fp8", indexer_dtype="nvfp4", max_rollback=4)
        size = cost.size(requests, context)
        print(f"{name}: {cost.per_request / 2**20:.1f} MiB a request and {cost.per_token:,.0f} bytes a token")
        print(
            f"  {requests} requests of {context:,} tokens: {size.total_bytes / GIB:.2f} GiB, blocks {size.num_blocks}"
        )
        most = cost.largest_concurrency(memory, context)
        print(f"  {memory / GIB:.0f} GiB hold {most} such requests at once")

    # A manager that takes what it is given. Requests share its blocks: short ones leave room for long ones.
    config = DSV4Config.flash().replace(num_hidden_layers=3, compress_ratios=(0, 4, 128))
    manager = KVCacheManager.from_memory(config, 9 << 20, max_concurrent_requests=8, max_context_len=4096)
    print(f"asked for {9 << 20:,} bytes, took {manager.memory_bytes():,}: {manager.num_free_blocks('csa')} CSA blocks")
    slot = manager.admit_request()
    manager.plan_step([slot], [0], lookahead=1000)  # blocks for the first 1001 tokens, all of them or none
    print(f"a request of 1001 tokens took {manager.blocks(slot)['csa']}, {manager.num_free_blocks('csa')} are free")
    try:
        KVCacheManager.from_memory(config, 5 << 20, max_concurrent_requests=8, max_context_len=4096)
    except ValueError as refusal:
        print(refusal)


if __name__ == "__main__":
    main()
