"""All that a layer writes in a decode step, in one operation: window row, compressed entry, indexer key."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import dispatch
from ..every_layer import attribute
from ..formats.record import Record
from ..segments import StepTokens
from . import append_swa, compress
from .append_swa import SWARing
from .append_swa_fused import RawWindow, append_swa_fused, fused_operands
from .compress import IndexerKeys, Projections, Tail, addressed, compress_indexer, compress_operands
from .compressor_tail import CompressorTail


class LayerState(NamedTuple):
    """The arrays that a layer of some kind writes to, stacked over layers; None where it has none."""

    ring: SWARing
    entries: Record | None = None
    tail: Tail | None = None
    keys: IndexerKeys | None = None
    keys_tail: Tail | None = None


class LayerInputs(NamedTuple):
    """What a layer writes of the tokens of a decode step: a window row, an entry, an indexer key."""

    window: RawWindow
    compressor: Projections | None = None  # None in an SWA layer
    indexer: Projections | None = None  # None but in a CSA layer


def write_layer(
    state: LayerState,
    given: LayerInputs,
    tokens: StepTokens,
    *,
    layer: int | Array,
    eps: float,
    format: str | None = None,
    implementation: str | None = None,
) -> LayerState:
    """``append_swa_fused``, ``compress`` and ``compress_indexer`` of a decode step, in which no slot comes twice.

    An SWA layer has no compressor, an HCA layer no indexer. Stores the bits that the three operations store with the
    same implementation; on a GPU it is one launch, in which different blocks do the different parts.

    Args:
      state: the arrays to write to.
      given: the tokens' projections.
      tokens: where they go: one segment a token (``one_token_segments``), and a table but for an SWA layer.
      layer: which layer of the stacks to write; an array () int32 must be one of them.
      eps: of every RMSNorm.
      format: of the indexer keys, as for ``compress_indexer``.
      implementation: "jnp", "cpu" or "cuda"; None takes the native one where there is one.
    Returns:
      The arrays after the writes.
    Raises:
      TypeError: for a wrong dtype.
      ValueError: for a wrong shape, layer or implementation, for parts that do not fit the state, and for segments of
        several tokens.
    """
    _check(state, given, tokens)

    def one_by_one(form: str | None, state: LayerState, given: LayerInputs, tokens: StepTokens) -> LayerState:
        options: dict[str, Any] = {"layer": layer, "eps": eps, "implementation": form}
        of_keys: dict[str, Any] = {**options, "format": format}
        if given.indexer is not None and state.keys is not None and isinstance(state.keys_tail, CompressorTail):
            keys, keys_tail = compress_indexer(state.keys, state.keys_tail, given.indexer, tokens, **of_keys)
            state = state._replace(keys=keys, keys_tail=keys_tail)
        if given.compressor is not None and state.entries is not None and state.tail is not None:
            entries, tail = compress.compress(state.entries, state.tail, given.compressor, tokens, **options)
            state = state._replace(entries=entries, tail=tail)
        return state._replace(ring=append_swa_fused(state.ring, given.window, tokens, **options))

    nowhere_native = all(append_swa.native_limit(platform, state.ring) for platform in dispatch.available())
    if given.compressor is None or implementation == "jnp" or (implementation is None and nowhere_native):
        return one_by_one(implementation, state, given, tokens)
    # What the three operations check, they check here too.
    jax.eval_shape(functools.partial(one_by_one, implementation), state, given, tokens)
    return dispatch.call(
        "write_layer",
        implementation,
        lambda platform: native_limit(platform, state, given),
        functools.partial(_in_native, layer=layer, eps=eps),
        functools.partial(one_by_one, None),
        *(state, given, tokens),
    )


def native_limit(platform: str, state: LayerState, given: LayerInputs) -> str | None:
    """What keeps the native implementation for "cpu" or "cuda" from serving this layer; None if nothing does."""
    reason = append_swa.native_limit(platform, state.ring)
    parts = ((given.compressor, state.entries, state.tail), (given.indexer, state.keys, state.keys_tail))
    for part, stored, tail in parts:
        if part is not None and tail is not None:
            reason = reason or compress.native_limit(platform, stored, tail, part.weights)
    return reason


def _in_native(
    state: LayerState, given: LayerInputs, tokens: StepTokens, *, layer: int | Array, eps: float
) -> LayerState:
    if len({part.kv.dtype for part in given if part is not None}) > 1:
        given = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, given)
    assert state.tail is not None  # of layers with a compressor
    assert given.compressor is not None
    where = addressed(tokens, state.entries, state.tail, layer)
    # Each part's state, then its inputs: the operands of the three operations, one after the other.
    parts: list[tuple[Any, list[Array]]] = [
        (state.ring, fused_operands(state.ring, given.window, tokens, layer)),
        ((state.entries, state.tail), compress_operands(given.compressor, where)),
    ]
    if given.indexer is not None:
        parts.append(((state.keys, state.keys_tail), compress_operands(given.indexer, where)))
    operands: list[Array] = []
    aliases: dict[int, int] = {}
    counts: list[int] = []
    for arrays, inputs in parts:
        leaves = jax.tree.leaves(arrays)
        aliases |= {len(operands) + i: len(aliases) + i for i in range(len(leaves))}
        operands += [*leaves, *inputs]
        counts.append(len(leaves) + len(inputs))
    results = dispatch.ffi_call(
        "dsv4_write_layer",
        [jax.ShapeDtypeStruct(operands[i].shape, operands[i].dtype) for i in aliases],
        input_output_aliases=aliases,
    )(*operands, layer=attribute(layer), eps=np.float32(eps), of_entries=np.int64(counts[1]))
    return jax.tree.unflatten(jax.tree.structure(state), results)


def _check(state: LayerState, given: LayerInputs, tokens: StepTokens) -> None:
    _, compressor, indexer = given
    parts = {
        "compressor": compressor, "indexer": indexer, "state.entries": state.entries, "state.tail": state.tail,
        "state.keys": state.keys, "state.keys_tail": state.keys_tail, "table": tokens.table,
    }  # fmt: skip
    needed = set() if compressor is None and indexer is None else {"compressor", "state.entries", "state.tail", "table"}
    needed |= {"indexer", "state.keys", "state.keys_tail"} if indexer is not None else set()
    kind = "a CSA" if indexer is not None else "an HCA" if compressor is not None else "an SWA"
    for name, part in parts.items():
        if (part is None) == (name in needed):
            got, expected = ("None", "it") if part is None else ("it", "None")
            raise ValueError(f"write_layer: got {got} for {name}; expected {expected} in {kind} layer.")
    if not tokens.one_per_slot:
        most = tokens.grouped.tokens.shape[1]
        raise ValueError(
            f"write_layer: got segments of up to {most} tokens; expected one token of a slot. "
            "Where a slot brings several, use the three operations."
        )
