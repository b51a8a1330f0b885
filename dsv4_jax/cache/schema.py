"""Geometry of the cache of one layer, and how many blocks a load needs."""

from dataclasses import dataclass
from typing import Any

from ..ops.write.running_tail import running_rows
from .counts import count
from .formats import DEFAULT_INDEXER_FORMAT, check_dimensions, check_indexer_format, record_format

BLOCK_SIZE_ORIGINAL_TOKENS = 128
"""Tokens a paged block of the released models covers: the least common multiple of their ratios 4 and 128."""

KINDS = ("swa", "csa", "hca")
"""The kinds of layers, as the cache names its stacks."""

HCA_TAILS = ("full", "running")
"""What an HCA layer keeps of tokens that wait for their window to fill: the tokens, or the sums of their softmax."""


@dataclass(frozen=True)
class CacheSchema:
    """What one layer's cache looks like; layers of one kind share it.

    The ring holds `swa_window_size` tokens, the tails what a compressor still needs of tokens it has not compressed,
    a block one entry per `compress_ratio` of its `block_size` tokens. With `max_rollback` r, ring and tails have r rows
    more, so that the last r tokens can be forgotten; tails have one more at least, so that a decode step that closes a
    window can run again. A running HCA tail holds the softmax's sums after each of the last
    r + 1 tokens (at least 2) instead of 127 + r tokens (at least 128).
    """

    kind: str  # "swa" | "csa" | "hca"
    compress_ratio: int  # tokens per entry, 0 for SWA
    head_dim: int
    rope_dim: int
    swa_window_size: int
    index_head_dim: int
    cache_dtype: str = "fp8"
    indexer_dtype: str = "nvfp4"
    max_rollback: int = 0
    block_size: int = BLOCK_SIZE_ORIGINAL_TOKENS  # tokens a block covers, the same in all layers
    hca_tail: str = "full"  # "full" | "running"

    @property
    def entry_head_dim(self) -> int:
        """Dimensions of an entry (= head_dim)."""
        return self.head_dim

    @property
    def nope_dim(self) -> int:
        """Dimensions without position, the part an FP8 record quantises."""
        return self.head_dim - self.rope_dim

    @property
    def overlap(self) -> bool:
        """Whether an entry also looks at the window before its own (CSA)."""
        return self.kind == "csa"

    @property
    def entries_per_block(self) -> int:
        """Entries of one block: 32 for CSA, 1 for HCA in the released models, 0 for SWA."""
        return self.block_size // self.compress_ratio if self.compress_ratio else 0

    @property
    def indexer_entries_per_block(self) -> int:
        """Indexer keys of one block: as many as entries for CSA, 0 otherwise."""
        return self.entries_per_block if self.kind == "csa" else 0

    @property
    def tail_buffer_size(self) -> int:
        """Most tokens that wait for their window to fill: ratio - 1."""
        return max(self.compress_ratio - 1, 0)

    @property
    def ring_rows(self) -> int:
        """Rows of the window ring."""
        return self.swa_window_size + self.max_rollback

    @property
    def tail_rows(self) -> int:
        """Rows of the tail of a window's own lane."""
        return self.tail_buffer_size + max(self.max_rollback, 1) if self.compress_ratio else 0

    @property
    def running_tail(self) -> bool:
        """Whether the tail holds running sums instead of tokens."""
        return self.kind == "hca" and self.hca_tail == "running"

    @property
    def running_tail_rows(self) -> int:
        """Rows of a running tail."""
        return running_rows(self.max_rollback)

    @property
    def overlap_tail_rows(self) -> int:
        """Rows of the tail of lane a: with overlap it also keeps the window before."""
        return self.tail_rows + (self.compress_ratio if self.overlap else 0)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks a request of `num_tokens` tokens owns: as many as its entries touch."""
        if not self.compress_ratio:
            return 0
        return -(-(num_tokens // self.compress_ratio) // self.entries_per_block)


def build_schema(
    config: Any,
    spec: Any,
    *,
    cache_dtype: str = "fp8",
    indexer_dtype: str | None = None,
    max_rollback: int = 0,
    hca_tail: str = "full",
) -> CacheSchema:
    """What one layer of a model caches.

    Args:
      config: the model: a DSV4Config or a CacheGeometry.
      spec: the layer: a LayerSpec or LayerKind of its schedule.
      cache_dtype: of records: "fp8" | "fp8_ue8m0" | "bf16" | "fp32".
      indexer_dtype: of indexer keys: "nvfp4" | "mxfp4" | "bf16" | "fp32"; by default what goes with cache_dtype.
      max_rollback: tokens that a request can forget at most.
      hca_tail: "full" keeps the float32 rows of up to 127 + max_rollback tokens in an HCA layer, "running" the sums of
        their softmax after each of the last max_rollback + 1 (at least 2): the same entries within 1e-6.

    Returns:
      The schema.

    Raises:
      ValueError: an unknown name, dimensions that the form cannot store, a ratio that does not divide the block, or a
        negative max_rollback.
    """
    kind = spec.attn.name.lower()
    if kind not in KINDS:
        raise ValueError(f"layer {spec.layer_idx}: attention {spec.attn!r} has no cache: expected one of SWA, CSA, HCA")
    ratio = {"swa": 0, "csa": config.csa_ratio, "hca": config.hca_ratio}[kind]
    if ratio and config.block_size % ratio:
        raise ValueError(
            f"layer {spec.layer_idx}: compress ratio {ratio} does not divide a block of {config.block_size}"
        )
    max_rollback = count("max_rollback", max_rollback)
    if hca_tail not in HCA_TAILS:
        raise ValueError(f"hca_tail {hca_tail!r} is not known: expected one of {', '.join(HCA_TAILS)}")
    cache_dtype = record_format(cache_dtype).name
    indexer_dtype = check_indexer_format(indexer_dtype or DEFAULT_INDEXER_FORMAT[cache_dtype])
    check_dimensions(
        cache_dtype, config.head_dim - config.rope_dim, indexer_dtype, config.index_head_dim if kind == "csa" else None
    )
    return CacheSchema(
        kind=kind,
        compress_ratio=ratio,
        head_dim=config.head_dim,
        rope_dim=config.rope_dim,
        swa_window_size=config.sliding_window,
        index_head_dim=config.index_head_dim,
        cache_dtype=cache_dtype,
        indexer_dtype=indexer_dtype,
        max_rollback=max_rollback,
        block_size=config.block_size,
        hca_tail=hca_tail,
    )


def compute_block_budget(
    config: Any, schedule: Any, max_context_len: int, max_concurrent_requests: int
) -> dict[str, int]:
    """Blocks that each layer of a kind needs for requests of full length at once.

    A block is needed as soon as its first entry exists.

    Args:
      config: the model: a DSV4Config or a CacheGeometry.
      schedule: its layers, `build_schedule(config)`.
      max_context_len: tokens of each request.
      max_concurrent_requests: requests.

    Returns:
      {"csa": n, "hca": n}.

    Raises:
      ValueError: a negative context, or no request.
    """
    max_context_len = count("max_context_len", max_context_len)
    max_concurrent_requests = count("max_concurrent_requests", max_concurrent_requests, least=1)
    budget = {"csa": 0, "hca": 0}
    for spec in schedule:
        # Formats change no number of blocks, and the exact ones store any width.
        schema = build_schema(config, spec, cache_dtype="fp32")
        if schema.kind in budget:
            budget[schema.kind] = max_concurrent_requests * schema.blocks_for(max_context_len)
    return budget
