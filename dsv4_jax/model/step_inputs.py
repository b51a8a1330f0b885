"""What a step of the model is given, checked before anything is traced."""

from typing import Any

import jax.numpy as jnp

from ..cache.kv_cache import KVCache
from ..cache.plan import StepPlan
from ..cache.schema import build_schema
from .config import DSV4Config


def check_cache(config: DSV4Config, cache: Any) -> None:
    """ValueError unless the cache is made for this configuration: another's window or layers would answer wrongly."""
    if not isinstance(cache, KVCache):
        raise ValueError(f"cache is a {type(cache).__name__}: expected the KVCache that manager.cache holds")
    schedule = config.schedule
    if len(cache.schemas) != len(schedule):
        raise ValueError(
            f"the cache has {len(cache.schemas)} layers, the model {len(schedule)}: make the manager with model.config"
        )
    for spec, found in zip(schedule, cache.schemas, strict=True):
        expected = build_schema(
            config, spec, cache_dtype=found.cache_dtype, indexer_dtype=found.indexer_dtype,
            max_rollback=found.max_rollback, hca_tail=found.hca_tail,
        )  # fmt: skip
        for name in ("kind", "compress_ratio", "head_dim", "rope_dim", "swa_window_size", "index_head_dim"):
            got, wanted = getattr(found, name), getattr(expected, name)
            if got != wanted:
                raise ValueError(
                    f"layer {spec.layer_idx} of the cache has {name} = {got!r}, that of the model {wanted!r}: make the "
                    "manager with model.config"
                )


def check_step(config: DSV4Config, token_ids: Any, cache: Any, plan: Any) -> None:
    """ValueError unless token_ids (T,), the plan of T tokens and the cache fit together and the model."""
    if not isinstance(plan, StepPlan):
        raise ValueError(f"plan is a {type(plan).__name__}: expected the StepPlan that manager.plan_step returned")
    check_cache(config, cache)
    shape, dtype = getattr(token_ids, "shape", None), getattr(token_ids, "dtype", None)
    if shape is None or dtype is None:
        raise ValueError(f"token_ids is a {type(token_ids).__name__}: expected an array {plan.slots.shape} of integers")
    if shape != plan.slots.shape or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"token_ids is {dtype}{shape}: expected integers {plan.slots.shape}, one for each token of the plan"
        )
