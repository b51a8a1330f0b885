"""`dsv4-jax plan`: what the cache of a model costs, and what fits."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from ..files.written_whole import written_whole
from .errors import InputError
from .options import CacheDtype, HcaTail, IndexerDtype, default_indexer
from .sizes import parse_bytes
from .terminal import make_console, status

NAMED = ("flash", "pro")
DEFAULT_CONTEXT = 131072
PICTURES = (".png", ".svg", ".pdf")
MOST = 2**31 - 1
"""Of requests and of tokens: slots and positions are int32."""


def plan(
    memory: Annotated[str, typer.Option(metavar="BYTES", help="Memory of a device: 80GiB, 80GB or plain bytes.")],
    config: Annotated[
        str | None,
        typer.Option(
            metavar="flash|pro|PATH",
            help="A released model by name, a config.json, or a folder with one; default: what --weights names.",
        ),
    ] = None,
    reserve: Annotated[
        str, typer.Option(metavar="BYTES", help="Part of it kept for temporaries, and for weights not given: 40GiB.")
    ] = "0",
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="flash|pro|PATH", help="Weights beside the cache: as released by name, or a checkpoint's folder."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Tokens of every request; default: 131072, or as many as the model takes."
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(metavar="N", min=1, max=MOST, help="Requests at once, on all devices together.")
    ] = 1,
    devices: Annotated[
        int,
        typer.Option(metavar="N", min=1, max=4096, help="Devices: each has its share of requests and routed experts."),
    ] = 1,
    model_devices: Annotated[
        int,
        typer.Option(
            metavar="M",
            min=1,
            max=4096,
            help="Of these so many divide the heads of the same requests, and each has their cache.",
        ),
    ] = 1,
    cache: Annotated[CacheDtype, typer.Option(help="Storage of key-value records.")] = CacheDtype.fp8,
    indexer: Annotated[
        IndexerDtype | None, typer.Option(help="Storage of indexer keys; default: what goes with the records.")
    ] = None,
    hca_tail: Annotated[
        HcaTail, typer.Option(help="Of an HCA layer's open window keep its tokens (full) or running sums (smaller).")
    ] = HcaTail.full,
    max_rollback: Annotated[
        int, typer.Option(metavar="N", min=0, max=MOST, help="Tokens a request can be rolled back, for drafts.")
    ] = 0,
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Also draw memory against context: .png, .svg or .pdf; needs matplotlib."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object and nothing else to stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Says what the KV cache takes and whether it fits: per request, per token, per kind of layer, per record format.

    The numbers are those of the arrays that would be allocated, to the byte. With --weights they are the model's too,
    held as they are stored; without, they are the cache alone. With --devices they are those of each device, which has
    its share of the requests and of the routed experts, and a copy of all other weights; with --model-devices too, the
    mesh axis "model", a part of those that belong to heads. --reserve keeps room for the
    temporaries of a step. Nothing is allocated and no device is touched. The exit status is 0 where all of it fits and
    1 where it does not.

    Example: dsv4-jax plan --config flash --weights flash --memory 192GB --context 131072 --concurrency 16
    """
    console = make_console(quiet)
    total, reserved = parse_bytes(memory, "--memory"), parse_bytes(reserve, "--reserve")
    if not total:
        raise InputError(f"--memory {memory}: expected at least one byte")
    if reserved >= total:
        raise InputError(f"--reserve {reserve} leaves nothing of --memory {memory}")
    if plot is not None:
        _check_picture(plot)
    config = weights if config is None else config
    if config is None:
        raise InputError("there is no model: give --config or --weights")
    with status(console, f"planning {config}"):
        model = _read_config(config)
        limit = model.max_position_embeddings
        if context is not None and context > limit:
            raise InputError(f"--context is {context}: the model has {limit} positions")
        found = _weights(weights, model, devices, model_devices)
        shards = devices // model_devices
        held = 0 if weights is None else found["held_bytes"]
        report = make_report(
            model, max(total - reserved - held, 0),
            min(DEFAULT_CONTEXT, limit) if context is None else context, -(-concurrency // shards), cache.value,
            indexer.value if indexer else default_indexer(cache.value), max_rollback=max_rollback,
            hca_tail=hca_tail.value,
        )  # fmt: skip
        report["weights"] = found | {"given": weights, "fit": found["held_bytes"] <= total - reserved}
        if held > total - reserved:
            report["fits"] = False
            report["missing_bytes"] = report["total_bytes"] + held - (total - reserved)
        report = {"config": config, "device_bytes": total, "reserved_bytes": reserved, **report}
        report |= {"devices": devices, "model_devices": model_devices, "cache_tokens": _cache_tokens(report) * shards}
        if plot is not None:
            from .plan_plot import draw

            with written_whole(plot) as temporary:
                draw(report, make_lines(model, report), temporary)
    if as_json:
        print(json.dumps(report))
    else:
        from .plan_table import show

        show(report)
    return 0 if report["fits"] else 1


def make_report(
    config: Any, memory: int, context: int, requests: int, cache_dtype: str, indexer_dtype: str, **options: Any
) -> dict[str, Any]:
    """All that the command says, as the object of --json.

    memory: bytes for the cache. options: max_rollback, hca_tail.
    """
    from ..cache.formats import key_bytes, record_format

    limit = config.max_position_embeddings
    costs = _costs(config, cache_dtype, indexer_dtype, **options)
    cost = costs[cache_dtype, indexer_dtype]
    size = cost.size(requests, context)
    formats = []
    for (records, keys), other in costs.items():
        total = other.size(requests, context).total_bytes
        entry = {
            "records": records,
            "indexer": keys,
            "record_bytes": record_format(records).record_bytes(config.nope_dim, config.rope_dim),
            "key_bytes": key_bytes(keys, config.index_head_dim),
            "bytes_per_request": other.per_request,
            "bytes_per_token": other.per_token,
            "total_bytes": total,
            "fits": total <= memory,
            "largest_context": other.largest_context(memory, requests, limit),
            "largest_concurrency": other.largest_concurrency(memory, context),
        }
        formats.append(entry)
    kinds = [
        {
            "kind": kind.kind,
            "layers": kind.layers,
            "ring_bytes_per_request": kind.ring,
            "tail_bytes_per_request": kind.tails,
            "bytes_per_token": kind.per_token,
            "bytes_per_block": kind.block,
            "blocks": size.num_blocks.get(kind.kind, 0),
            "pool_bytes": size.num_blocks.get(kind.kind, 0) * kind.block,
        }
        for kind in cost.kinds
    ]
    return {
        "records": cache_dtype,
        "indexer": indexer_dtype,
        **options,
        "context": context,
        "concurrency": requests,
        "context_limit": limit,
        "block_tokens": config.block_size,
        "kinds": kinds,
        "bytes_per_request": cost.per_request,
        "bytes_per_token": cost.per_token,
        "state_bytes": requests * cost.per_request,
        "table_bytes": cost.table_bytes(requests, context),
        "total_bytes": size.total_bytes,
        "memory_bytes": memory,
        "fits": size.total_bytes <= memory,
        "missing_bytes": max(size.total_bytes - memory, 0),
        "largest_context": cost.largest_context(memory, requests, limit),
        "largest_concurrency": cost.largest_concurrency(memory, context),
        "largest_context_alone": cost.largest_context(memory, 1, limit),
        "smallest_bytes": cost.size(1, 1).total_bytes,
        "formats": formats,
    }


def make_lines(config: Any, report: dict[str, Any]) -> dict[str, list[tuple[int, int]]]:
    """For every record format (context, bytes) of the planned concurrency, up to the model's longest context."""
    limit = report["context_limit"]
    contexts = sorted({min(round(2 ** (step / 4)), limit) for step in range(40, 4 * limit.bit_length() + 1)} | {limit})
    chosen = report["records"], report["indexer"]
    options = {name: report[name] for name in ("max_rollback", "hca_tail")}
    return {
        f"{records} + {keys}": [(n, cost.size(report["concurrency"], n).total_bytes) for n in contexts]
        for (records, keys), cost in _costs(config, *chosen, **options).items()
        if (records, keys) == chosen or keys == default_indexer(records)
    }


def _costs(config: Any, cache_dtype: str, indexer_dtype: str, **options: Any) -> dict[tuple[str, str], Any]:
    """The pairs of formats worth comparing: every record format with keys of its own kind, and what was asked for."""
    from ..cache.cost import cache_cost
    from ..cache.formats import RECORD_FORMATS
    from ..ops.formats.fp4 import GROUP_SIZE

    def cost(records: str, keys: str) -> Any:
        return cache_cost(config, config.schedule, cache_dtype=records, indexer_dtype=keys, **options)

    chosen = cost(cache_dtype, indexer_dtype)  # a ValueError is the user's to see
    costs = {}
    for records in RECORD_FORMATS:
        default = default_indexer(records)
        for keys in GROUP_SIZE if default in GROUP_SIZE else [default]:
            with contextlib.suppress(ValueError):  # a format that cannot store these dimensions
                costs[records, keys] = cost(records, keys)
    return {**costs, (cache_dtype, indexer_dtype): chosen}


def _read_config(name: str) -> Any:
    from ..model.config import DSV4Config

    if name in NAMED:
        return getattr(DSV4Config, name)()
    if not os.path.exists(name):
        raise InputError(f"--config {name!r}: no such file; expected {', '.join(NAMED)}, a config.json or its folder")
    return DSV4Config.from_hf(name)


def _cache_tokens(report: dict[str, Any]) -> int:
    """Tokens that a device's cache holds at most, in as many requests as were asked for."""
    left = report["memory_bytes"] - report["state_bytes"] - report["table_bytes"]
    return max(int(left // report["bytes_per_token"]), 0) if report["bytes_per_token"] else 0


def _weights(given: str | None, config: Any, devices: int, model_devices: int) -> dict[str, int]:
    """Bytes of the weights in files, and as each device holds them: of `config` as released, or of what was given."""
    from ..model.files.checkpoint import held_as_stored, held_bytes
    from ..model.files.released_form import released_bytes
    from ..model.files.tensor_match import match_tensors

    if given is not None and given not in NAMED:
        from ..files.safetensors_file import open_checkpoint
        from ..model.config import DSV4Config

        if not os.path.isdir(given):
            raise InputError(f"--weights {given!r}: no such folder; expected {', '.join(NAMED)} or a checkpoint's")
        config, checkpoint = DSV4Config.from_hf(given), open_checkpoint(given)
        _check_devices(config, devices, model_devices)
        matched = match_tensors(checkpoint, config)
        stored = sum(checkpoint.info(name).nbytes for name in matched.stored.values())
        held = held_as_stored(checkpoint, matched, config)
        with _of_devices(model_devices):
            return {"stored_bytes": stored, "held_bytes": held_bytes(config, held, devices, model_devices)}
    config = config if given is None else _read_config(given)
    _check_devices(config, devices, model_devices)
    with _of_devices(model_devices):
        sizes = released_bytes(config, devices, model_devices)
    return {"stored_bytes": sizes.stored, "held_bytes": sizes.held}


def _check_devices(config: Any, devices: int, model_devices: int) -> None:
    if config.n_routed_experts % devices:
        raise InputError(f"--devices is {devices}: expected a number that divides {config.n_routed_experts} experts")
    if devices % model_devices or config.o_groups % model_devices:
        raise InputError(
            f"--model-devices is {model_devices}: expected a number that divides {devices} devices and "
            f"{config.o_groups} output groups"
        )


@contextlib.contextmanager
def _of_devices(model_devices: int) -> Iterator[None]:
    """What --model-devices do not divide, as a sentence about the option."""
    try:
        yield
    except ValueError as error:
        if model_devices == 1:
            raise
        raise InputError(f"--model-devices is {model_devices}: {error}") from None


def _check_picture(path: str) -> None:
    if pathlib.Path(path).suffix.lower() not in PICTURES:
        raise InputError(f"--plot {path}: expected a name that ends in {', '.join(PICTURES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
