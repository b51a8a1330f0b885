"""build_schedule: which layer is what."""

import subprocess
import sys
from collections import Counter

import pytest

from dsv4_jax.model.config import DSV4Config
from dsv4_jax.model.layer_schedule import AttentionType, FFNType, LayerSpec, RouterMode, build_schedule

SWA, CSA, HCA = AttentionType.SWA, AttentionType.CSA, AttentionType.HCA


def test_flash():
    schedule = build_schedule(DSV4Config.flash())
    assert [spec.attn for spec in schedule[:5]] == [SWA, SWA, CSA, HCA, CSA]
    assert schedule[-1].attn is CSA
    assert Counter(spec.attn for spec in schedule) == {SWA: 2, CSA: 21, HCA: 20}


def test_pro():
    schedule = build_schedule(DSV4Config.pro())
    assert [spec.attn for spec in schedule[:5]] == [HCA, HCA, CSA, HCA, CSA]
    assert schedule[-1].attn is CSA
    assert Counter(spec.attn for spec in schedule) == {CSA: 30, HCA: 31}


@pytest.mark.parametrize("config", [DSV4Config.flash(), DSV4Config.pro()])
def test_order_routers_and_ratios(config):
    schedule = build_schedule(config)
    assert [spec.layer_idx for spec in schedule] == list(range(config.num_hidden_layers))
    assert [spec.compress_ratio for spec in schedule] == list(config.compress_ratios)
    assert {spec.ffn for spec in schedule} == {FFNType.MOE}
    assert [spec.router_mode for spec in schedule[:4]] == [RouterMode.HASH] * 3 + [RouterMode.DENSE]
    assert {spec.router_mode for spec in schedule[3:]} == {RouterMode.DENSE}


def test_ratios_of_another_model():
    config = DSV4Config.flash().replace(
        num_hidden_layers=3, compress_ratios=(0, 2, 8), csa_ratio=2, hca_ratio=8, num_hash_layers=1
    )
    schedule = build_schedule(config)
    assert [spec.attn for spec in schedule] == [SWA, CSA, HCA]
    assert [spec.compress_ratio for spec in schedule] == [0, 2, 8]


def test_spec_is_a_value():
    assert LayerSpec(0, SWA, FFNType.MOE, RouterMode.HASH) == build_schedule(DSV4Config.flash())[0]
    assert len(set(build_schedule(DSV4Config.flash()))) == 43


def test_needs_no_jax():
    """Planning tools read configurations where there is no accelerator stack."""
    code = (
        "import sys; sys.modules['jax'] = None; sys.modules['flax'] = None\n"
        "import types, importlib.util, pathlib\n"
        f"root = pathlib.Path({str(_package())!r})\n"
        "package = types.ModuleType('dsv4_jax'); package.__path__ = [str(root)]\n"
        "sys.modules['dsv4_jax'] = package\n"
        "from dsv4_jax.model.config import DSV4Config\n"
        "from dsv4_jax.model.layer_schedule import build_schedule\n"
        "print(len(build_schedule(DSV4Config.flash())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("43\n", "")


def _package():
    import pathlib

    import dsv4_jax.model

    return pathlib.Path(dsv4_jax.model.__file__).parents[1]
