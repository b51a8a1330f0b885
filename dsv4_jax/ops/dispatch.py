"""Finds, loads and registers the native libraries, once."""

import ctypes
import functools
import logging
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.backend import backends

_LOG = logging.getLogger(__name__)

LIBRARY_DIR_VARIABLE = "DSV4_JAX_LIB_DIR"
"""Environment variable naming a folder to take the libraries from instead of the package's own ``_lib``."""

# For each library the handlers in it: name of the custom call -> symbol.
_HANDLERS = {
    "cpu": {
        "dsv4_append_swa": "Dsv4AppendSwa",
        "dsv4_append_swa_fused": "Dsv4AppendSwaFused",
        "dsv4_attend": "Dsv4Attend",
        "dsv4_compress": "Dsv4Compress",
        "dsv4_compress_indexer": "Dsv4CompressIndexer",
        "dsv4_experts": "Dsv4Experts",
        "dsv4_project": "Dsv4Project",
        "dsv4_read_entries": "Dsv4ReadEntries",
        "dsv4_read_keys": "Dsv4ReadKeys",
        "dsv4_read_window": "Dsv4ReadWindow",
        "dsv4_select": "Dsv4Select",
        "dsv4_set_rows": "Dsv4SetRows",
        "dsv4_sinkhorn": "Dsv4Sinkhorn",
        "dsv4_write_layer": "Dsv4WriteLayer",
    },
    "cuda": {
        "dsv4_append_swa": "Dsv4AppendSwa",
        "dsv4_append_swa_fused": "Dsv4AppendSwaFused",
        "dsv4_attend": "Dsv4Attend",
        "dsv4_compress": "Dsv4Compress",
        "dsv4_compress_indexer": "Dsv4CompressIndexer",
        "dsv4_dense": "Dsv4Dense",
        "dsv4_experts": "Dsv4Experts",
        "dsv4_hyper_connect": "Dsv4HyperConnect",
        "dsv4_project": "Dsv4Project",
        "dsv4_read_entries": "Dsv4ReadEntries",
        "dsv4_read_keys": "Dsv4ReadKeys",
        "dsv4_read_window": "Dsv4ReadWindow",
        "dsv4_route": "Dsv4Route",
        "dsv4_select": "Dsv4Select",
        "dsv4_sinkhorn": "Dsv4Sinkhorn",
        "dsv4_write_layer": "Dsv4WriteLayer",
    },
}
#: Under `jax.vmap` a native call runs once for each element of the batch.
ffi_call: Callable[..., Any] = functools.partial(jax.ffi.ffi_call, vmap_method="sequential")

_XLA_PLATFORMS = {"cpu": "cpu", "cuda": "CUDA"}


@functools.cache
def available() -> frozenset[str]:
    """Which native implementations this process has, a subset of {"cpu", "cuda"}; the first call loads them."""
    found = frozenset(platform for platform in _HANDLERS if _register(platform))
    wanted = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if wanted not in found:
        hint = ""
        if LIBRARY_DIR_VARIABLE not in os.environ and (others := _installations()):
            hint = f" It is a checkout in the way of the installation in {others[0].parent}, whose code differs: run "
            hint += "elsewhere, or install again."
        _LOG.warning(
            "dsv4_jax runs in plain jax.numpy: no native library for %s in %s.%s",
            wanted,
            " or ".join(str(folder) for folder in library_dirs()),
            hint,
        )
    return found


def call(
    name: str,
    implementation: str | None,
    limit: Callable[[str], str | None],
    in_native: Callable[..., Any],
    in_jnp: Callable[..., Any],
    *operands: Any,
) -> Any:
    """Calls the implementation asked for ("jnp", "cpu", "cuda"), or for None the native one wherever there is one.

    limit(platform) says what keeps the native implementation from serving, or None. Raises ValueError for another
    name, and for a native implementation that cannot serve.
    """
    if implementation not in (None, "jnp", *_HANDLERS):
        raise ValueError(f"{name}: got implementation {implementation!r}; expected None, 'jnp', 'cpu' or 'cuda'.")
    if implementation in _HANDLERS:
        reason: str | None
        if implementation not in available():
            reason = f"the native library for {implementation!r} is not installed"
        else:
            reason = limit(implementation)
        if reason:
            raise ValueError(f"{name}: implementation {implementation!r} cannot be used: {reason}; leave it to None.")
        return in_native(*operands)
    choices = {} if implementation else {p: in_native for p in available() if limit(p) is None}
    return on_platform(*operands, default=in_jnp, **choices)


def on_platform(*operands: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """`jax.lax.platform_dependent` that traces the forms of this process's platforms only, as no other can run.

    Where all platforms have the same form, which is the rule, there is nothing to choose. A step that is exported for
    other platforms than the process has contains these forms all the same.
    """
    chosen = {platform: forms.get(platform, default) for platform in platforms()}
    first = next(iter(chosen.values()))
    if all(form is first for form in chosen.values()):
        return first(*operands)
    return jax.lax.platform_dependent(*operands, **chosen)


def native_calls() -> tuple[str, ...]:
    """Names of the native calls that a step may contain, which `jax.export` has to be told.

    `export.export(step, disabled_checks=[export.DisabledSafetyCheck.custom_call(n) for n in native_calls()])`; the
    pytrees of cache and plan are registered. Whoever reads the file needs this package, in the same version, and its
    native libraries where the writer had them.

    Returns:
      Names of custom calls, sorted.
    """
    return tuple(sorted({name for handlers in _HANDLERS.values() for name in handlers}))


@functools.cache
def platforms() -> frozenset[str]:
    """The platforms this process has devices of, by XLA's names of them: "cpu", and "cuda" beside it where it is."""
    return frozenset(backends())


@functools.cache
def on_hopper() -> bool:
    """Whether the GPUs of this process are of compute capability 9.0, for which some native forms are written."""
    return jax.default_backend() == "gpu" and all(
        getattr(device, "compute_capability", None) == "9.0" for device in jax.local_devices()
    )


def library_dirs() -> list[pathlib.Path]:
    """The folders the libraries are looked for in, in order."""
    chosen = os.environ.get(LIBRARY_DIR_VARIABLE)
    if chosen:
        return [pathlib.Path(chosen)]
    # An editable installation has two: the sources, and what was built from them.
    own = [pathlib.Path(folder) / "_lib" for folder in sys.modules[__name__.partition(".")[0]].__path__]
    if any(folder.is_dir() for folder in own):
        return own
    # A checkout, as Python finds it in the folder it runs in: an installation of the same code has what it lacks.
    return [*own, *(folder / "_lib" for folder in _installations() if _same_operations(folder, own[0].parent))]


def _installations() -> list[pathlib.Path]:
    """Folders of this package, with native libraries, that an import would find were it not for this one."""
    name = __name__.partition(".")[0]
    here = {pathlib.Path(folder).resolve() for folder in sys.modules[name].__path__}
    found = [pathlib.Path(entry or ".") / name for entry in sys.path]
    return [folder for folder in found if (folder / "_lib").is_dir() and folder.resolve() not in here]


def _same_operations(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether the operations of both call native code alike: their files are the same."""

    def files(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
        return {path.relative_to(folder): path.read_bytes() for path in (folder / "ops").rglob("*.py")}

    return files(one) == files(other)


def _register(platform: str) -> bool:
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    for folder in library_dirs():
        path = folder / f"libdsv4_jax_{platform}{suffix}"
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(str(path))
            handlers = {name: getattr(library, symbol) for name, symbol in _HANDLERS[platform].items()}
            for name, handler in handlers.items():
                jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform=_XLA_PLATFORMS[platform])
        except Exception as error:  # whatever is wrong with the library, jax.numpy still works
            _LOG.warning("dsv4_jax: %s cannot be used: %s", path, error)
            continue
        return True
    return False
