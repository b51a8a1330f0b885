"""Settings for every test: strict dtypes and ranks, fixed seeds, GPU tests only where there is a GPU."""

import functools
import gc
import json
import os
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from forms import form_of_operation
from jax._src import compiler
from safetensors_bytes import file_bytes, safetensors_bytes

from dsv4_jax import cli

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=30, database=None)
hypothesis.settings.load_profile("repeatable")

# Tracing makes a great many objects and few cycles: looking for these as often as Python does takes time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)

# Most of what the tests cost on CPUs is compiling: MLIR's passes over every fused loop, then LLVM's. XLA's own passes,
# and with them what a compiled step copies and updates in place, are the same with its older emitter of loops and
# without LLVM's passes. So tests go without, and the processes that they start, but those marked `optimised`, which
# compare bits or small differences of what compiled code computes.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 optimises everywhere.
BY_MARK = "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ and jax.default_backend() == "cpu"
WITHOUT = pytest.StashKey[bool]()
XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
CHEAP = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
CHOSEN: dict[str, bool | int] = {}  # compiler options of every program that has none of its own for the same


def xla_knows(options):
    """Whether this version of XLA has these compiler options."""
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@functools.wraps(compiler.get_compile_options)
def get_compile_options(*args, real=compiler.get_compile_options, env_options_overrides=None, **options):
    return real(*args, env_options_overrides={**CHOSEN, **(env_options_overrides or {})}, **options)


def pytest_sessionstart():
    compiler.get_compile_options = get_compile_options


def pytest_sessionfinish():
    compiler.get_compile_options = get_compile_options.__wrapped__


def pytest_collection_modifyitems(items):
    # The longest modules first, so that no process works on one of them at the end, alone.
    items.sort(key=lambda item: "integration" not in item.path.parts)
    # In a module those first that are not optimised: it changes over once.
    place = {path: i for i, path in enumerate(dict.fromkeys(item.path for item in items))}
    items.sort(key=lambda item: (place[item.path], item.get_closest_marker("optimised") is not None))
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="JAX has no GPU here"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadscope`, as in scripts/test, one process has all tests of loops, whose programs they share."""
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            module = super()._split_scope(nodeid)
            return "tests/decode" if module.startswith("tests/decode/") else module

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """LLVM optimises what a test marked `optimised` and its fixtures compile; other programs are forgotten."""
    without = item.get_closest_marker("optimised") is None
    if BY_MARK and item.config.stash.get(WITHOUT, False) != without:
        item.config.stash[WITHOUT] = without
        jax.config.update("jax_disable_most_optimizations", without)
        options = CHEAP if without and xla_knows(CHEAP) else {}
        CHOSEN.clear()
        CHOSEN.update(options)
        # For the processes that a test starts.
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(without))
        os.environ["XLA_FLAGS"] = " ".join(
            [XLA_FLAGS, *(f"--{name}={str(value).lower()}" for name, value in options.items())]
        ).strip()
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Every compiled program takes mappings of memory, of which a process has 65,530: before a process comes near, it
    forgets the programs it has."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def say(record_property):
    """say(text): a line that the run's summary shows, also where the test passes and runs in another process."""
    return lambda text: record_property("said", text)


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "said":
                terminalreporter.write_line(f"{report.nodeid}: {text}")


@pytest.fixture(
    params=[
        pytest.param(("jnp", "cpu"), id="jnp-cpu"),
        pytest.param(("cpu", "cpu"), id="native-cpu"),
        pytest.param(("jnp", "gpu"), id="jnp-gpu", marks=pytest.mark.gpu),
        pytest.param(("cuda", "gpu"), id="native-gpu", marks=pytest.mark.gpu),
    ]
)
def implementation(request):
    """Every form of an operation by name, with a device of its platform as the default."""
    with form_of_operation(*request.param) as name:
        yield name


@pytest.fixture
def rng():
    return np.random.default_rng(2606)


@pytest.fixture(scope="session")
def data():
    """The folder of the tests' data."""
    return Path(__file__).parent / "data"


@pytest.fixture
def run(capsys):
    """Runs the command line in this process: run("generate", ...) -> (exit status, stdout, stderr)."""

    def call(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory):
    """The folder of the packaged checkpoint's first layer: the others count as draft layers."""
    folder, tiny = tmp_path_factory.mktemp("one_layer"), cli.packaged_checkpoint()
    config = json.loads((tiny / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(tiny / "model.safetensors")
    return folder


@pytest.fixture
def to_bytes():
    """`safetensors_bytes` and `file_bytes`."""
    return safetensors_bytes, file_bytes
