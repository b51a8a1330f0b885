"""Weights on a mesh: experts spread, everything else on every device; and what does not fit."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import dsv4_jax
from dsv4_jax import DSV4Config
from dsv4_jax.cache.sharding import check_mesh
from dsv4_jax.model.files.released_form import released_bytes
from dsv4_jax.model.random_weights import random_model
from dsv4_jax.model.sharding import check_fit, local_experts


def test_every_device_holds_its_experts(mesh, model, config):
    experts = model(4).layers[1].ffn.experts
    whole = np.asarray(model(0).layers[1].ffn.experts.w1[...])
    for device, piece in enumerate(experts.w1[...].addressable_shards):
        assert piece.device == jax.devices()[device]
        np.testing.assert_array_equal(piece.data, whole[2 * device : 2 * device + 2])
    assert model(4).layers[1].attn.wkv.weight[...].sharding.is_fully_replicated
    assert model(0).mesh is None, "the model given is as it was"
    assert local_experts(config, check_mesh(mesh(4))) == frozenset(range(8))


def test_a_checkpoint_goes_onto_a_mesh(one_layer, mesh):
    """The same bytes as by loading and spreading; codes too."""
    plain = dsv4_jax.from_pretrained(one_layer)
    spread = dsv4_jax.from_pretrained(one_layer, mesh=mesh(2))
    assert spread.mesh == check_mesh(mesh(2))
    for x, y in zip(_arrays(plain), _arrays(spread), strict=True):
        np.testing.assert_array_equal(x, y)
    w1 = spread.layers[0].ffn.experts.w1[...]
    assert [piece.data.shape[0] for piece in w1.addressable_shards] == [w1.shape[0] // 2] * 2


def test_the_page_on_devices_runs(one_layer, monkeypatch):
    page = (pathlib.Path(__file__).parents[2] / "docs" / "devices.md").read_text()
    monkeypatch.setattr(dsv4_jax, "packaged_checkpoint", lambda: one_layer)
    names = {}
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "docs/devices.md", "exec"), names)
    assert names["mesh"].size == 4
    assert [len(text) for text in names["texts"]] == [4, 4]


def test_random_weights_are_made_where_they_lie(mesh, config):
    """The same on a mesh, experts and heads split."""
    config = config.replace(
        num_hidden_layers=1, compress_ratios=(0,), hidden_size=128, head_dim=256, q_lora_rank=128, o_lora_rank=128,
        moe_intermediate_size=256,
    )  # fmt: skip
    plain, spread = random_model(config), random_model(config, mesh=mesh((2, 2)))
    for x, y in zip(_arrays(plain), _arrays(spread), strict=True):
        np.testing.assert_array_equal(x, y)
    layer = spread.layers[0]
    assert layer.attn.wq_b.scale[...].sharding.spec == PartitionSpec("model")
    assert layer.attn.wo_b.weight[...].sharding.spec == PartitionSpec(None, "model")
    assert layer.ffn.experts.w1_scale[...].addressable_shards[3].index[0] == slice(6, 8)
    on_last = [x.addressable_shards[3].data.nbytes for x in jax.tree.leaves(nnx.state(spread))]
    assert sum(on_last) == released_bytes(config, devices=4, model_devices=2).held
    # Scales are of 128 rows and columns: what devices have must be whole blocks.
    with pytest.raises(ValueError, match=r"has shape \(1, 1\): the mesh has 2 devices along \"model\", expected a"):
        random_model(config.replace(head_dim=64), mesh=mesh((2, 2)))


def _arrays(model):
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(model))]


def test_the_command_line_takes_devices(run, one_layer):
    arguments = "generate", "--checkpoint", one_layer, "--tokens", "1,2,3", "-n", 1, "--cache", "fp32", "--json"
    (status, one, _), (_, two, _) = run(*arguments), run(*arguments, "--devices", 2)
    one, two = json.loads(one), json.loads(two)
    assert status == 0
    assert (one["devices"], two["devices"]) == (1, 2)
    assert one["results"] == two["results"]
    four = json.loads(run(*arguments, "--devices", 4, "--model-devices", 2)[1])
    assert (four["devices"], four["model_devices"]) == (4, 2)
    assert one["results"] == four["results"]
    status, _, err = run(*arguments, "--devices", 2, "--model-devices", 4)
    assert status == 2
    assert "--model-devices is 4: expected a number that divides 2 devices" in err
    status, _, err = run(*arguments, "--devices", 64)
    assert status == 2
    assert "--devices is 64: JAX has 4 (cpu); XLA_FLAGS=--xla_force_host_platform_device_count=64 makes" in err


class Other:
    """A device of another kind."""

    device_kind, process_index, platform = "another", 0, "another"


def test_errors(mesh, model):
    devices = np.array(jax.devices())
    for given, message in (
        (None, 'mesh is a NoneType: expected a jax.sharding.Mesh with an axis "data"'),
        (Mesh(devices, ("x",)), "the mesh has the axes ('x',): expected (\"data\",), or"),
        (Mesh(devices.reshape(2, 2), ("model", "data")), "the mesh has the axes ('model', 'data'): expected"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            dsv4_jax.model.sharding.shard_model(model(0), given)
    with pytest.raises(ValueError, match=r"^the mesh has devices of different kinds, another and cpu: expected one"):
        check_mesh(Mesh(np.array([jax.devices()[0], Other()]), ("data",)))
    with pytest.raises(ValueError, match=r"^the mesh has a device twice among 2: expected each of them once"):
        check_mesh(Mesh(devices[[0, 0]], ("data",)))
    with pytest.raises(ValueError, match=r"^the mesh has the shape \(0,\): expected one device or more along every ax"):
        check_mesh(Mesh(devices[:0], ("data",)))
    with pytest.raises(ValueError, match=r"^mesh is a int: expected"):
        dsv4_jax.generate(model(0), [[1]], 0, mesh=2)  # though there is nothing to do
    with pytest.raises(ValueError, match=r"^the mesh has 3 devices and the model 8 routed experts: expected a number"):
        dsv4_jax.model.sharding.shard_model(model(0), mesh(3))
    with pytest.raises(
        ValueError, match=r"checkpoint on 2 CPU devices, 1,024.0 GiB each: its tensors take 2,048.0 GiB"
    ):
        check_fit(1 << 40, "checkpoint", mesh(2))
    with pytest.raises(ValueError, match=r"^random weights: its tensors take .* GiB more than this machine's memory"):
        dsv4_jax.random_model(DSV4Config.pro())
    with pytest.raises(ValueError, match=r"^random weights on 4 CPU devices, .* GiB each: its tensors take"):
        dsv4_jax.random_model(DSV4Config.pro(), mesh=mesh((1, 4)))
    with pytest.raises(ValueError, match=r"^the model lies on another mesh: expected the one"):
        dsv4_jax.generate(model(2), [[1]], 1, mesh=mesh(4))
