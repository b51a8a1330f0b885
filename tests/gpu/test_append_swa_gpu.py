"""append_swa on the GPU beyond the shared suite (tests/ops/write/test_append_swa.py): sizes, graphs, every rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.write.append_swa import SWARing, append_swa

pytestmark = pytest.mark.gpu


def zeros(*shape):
    return SWARing(
        nope=jnp.zeros((*shape, 448), jnp.uint8),
        rope=jnp.zeros((*shape, 64), jnp.bfloat16),
        inv_scale=jnp.zeros(shape, jnp.float32),
        pos=jnp.full(shape, -1, jnp.int32),
        head=jnp.zeros(shape[:-1], jnp.int32),
    )


def append(implementation, **options):
    return jax.jit(functools.partial(append_swa, implementation=implementation, **options), donate_argnums=0)


def assert_same_bits(a, b):
    for name, x, y in zip(SWARing._fields, a, b, strict=True):
        integer = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        same = jax.lax.bitcast_convert_type(x, integer) == jax.lax.bitcast_convert_type(y, integer)
        assert bool(jnp.all(same)), name


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("ties", [False, True])
def test_thirty_million_values_are_rounded_as_in_jax_numpy(rng, dtype, ties):
    tokens = 65536
    if ties:  # integer quotients: amax is 7 * 2^k
        kv = rng.integers(-448, 449, (tokens, 512)) / 64
        kv[:, 0] = 7
        kv *= 2.0 ** rng.integers(-10, 100, (tokens, 1))
    else:
        kv = rng.standard_normal((tokens, 512), np.float32) * 10.0 ** rng.uniform(-12, 36, (tokens, 1))
    kv = jnp.asarray(kv, dtype)
    slots = jnp.asarray(rng.permutation(tokens) // 128, jnp.int32)
    positions = jnp.asarray(np.arange(tokens) % 100_003, jnp.int32)
    args = (kv, slots, positions)
    assert_same_bits(append("cuda")(zeros(512, 128), *args), append("jnp")(zeros(512, 128), *args))


def test_offsets_beyond_32_bits(rng):
    layers, slots = 43, 1024  # 2.5e9 bytes of codes
    ring = zeros(layers, slots, 128)
    assert ring.nope.size > 2**31
    kv = jnp.asarray(rng.standard_normal((2, 512)), jnp.bfloat16)
    where = jnp.array([0, slots - 1], jnp.int32), jnp.array([0, 127], jnp.int32)
    for layer in (0, layers - 1):
        ring = append("cuda", layer=layer)(ring, kv, *where)
    expected = append("jnp")(zeros(slots, 128), kv, *where)
    for layer in (0, layers - 1):
        assert_same_bits(jax.tree.map(lambda a, layer=layer: a[layer], ring), expected)
    assert int(jnp.sum(ring.pos >= 0)) == 4


@pytest.mark.parametrize("tokens", [3, 64])
def test_many_steps_in_one_call_replay_correctly(rng, tokens):
    layers, steps = 6, 9
    kv = jnp.asarray(rng.standard_normal((steps, layers, tokens, 512)), jnp.bfloat16)
    slots = jnp.asarray(rng.permutation(tokens), jnp.int32)

    def decode(implementation):
        def step(i, ring):
            for layer in range(layers):
                ring = append_swa(
                    ring,
                    kv[i, layer],
                    slots,
                    124 + i + slots,
                    layer=layer,
                    one_token_per_slot=True,
                    implementation=implementation,
                )
            return ring

        return jax.jit(lambda ring: jax.lax.fori_loop(0, steps, step, ring), donate_argnums=0)

    native, plain = decode("cuda"), decode("jnp")
    ring, expected = zeros(layers, tokens, 128), zeros(layers, tokens, 128)
    for _ in range(3):
        ring, expected = native(ring), plain(expected)
        assert_same_bits(ring, expected)
