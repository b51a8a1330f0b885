"""DSV4Config: every form parses to the same thing, everything else is refused by name."""

import copy
import dataclasses
import json
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.model.config import KNOWN_RATIOS, DSV4Config

DATA = Path(__file__).parents[1] / "data"
RELEASED = json.loads((DATA / "configs" / "DeepSeek-V4-Flash.json").read_text())
HUGGING_FACE = json.loads((DATA / "sharp_dsv4" / "config.json").read_text())
INFERENCE = {
    "vocab_size": 129280,
    "dim": 4096,
    "moe_inter_dim": 2048,
    "n_layers": 43,
    "n_hash_layers": 3,
    "n_mtp_layers": 1,
    "n_heads": 64,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_activated_experts": 6,
    "score_func": "sqrtsoftplus",
    "route_scale": 1.5,
    "swiglu_limit": 10.0,
    "q_lora_rank": 1024,
    "head_dim": 512,
    "rope_head_dim": 64,
    "norm_eps": 1e-06,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "window_size": 128,
    "compress_ratios": RELEASED["compress_ratios"],
    "compress_rope_theta": 160000,
    "original_seq_len": 65536,
    "rope_theta": 10000,
    "rope_factor": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-06,
    "dtype": "fp8",
    "expert_dtype": "fp4",
}


def edited(base, remove=(), **changes):
    raw = copy.deepcopy(base)
    for key in remove:
        del raw[key]
    raw.update(changes)
    return raw


@pytest.mark.parametrize("name", ["DeepSeek-V4-Flash", "DeepSeek-V4-Flash-0731"])
def test_flash_is_the_released_one(name):
    assert DSV4Config.from_hf(DATA / "configs" / f"{name}.json") == DSV4Config.flash()


def test_pro_is_the_released_one():
    assert DSV4Config.from_hf(str(DATA / "configs" / "DeepSeek-V4-Pro.json")) == DSV4Config.pro()


def test_inference_names_say_the_same():
    assert DSV4Config.from_hf(INFERENCE) == DSV4Config.flash()


def test_fields_of_flash():
    config = DSV4Config.flash()
    assert (config.head_dim, config.rope_dim, config.nope_dim) == (512, 64, 448)
    assert config.sliding_window == 128
    assert config.compress_ratios == (0, 0) + (4, 128) * 20 + (4,)
    assert (config.rope_original_max_position, config.rope_factor) == (65536, 16.0)
    assert (config.rope_theta, config.compress_rope_theta) == (10000.0, 160000.0)
    assert config.eos_token_ids == (1,)


def test_hugging_face_form():
    config = DSV4Config.from_hf(DATA / "sharp_dsv4")
    assert config == DSV4Config(
        vocab_size=192,
        hidden_size=64,
        num_hidden_layers=5,
        compress_ratios=(0, 4, 128, 4, 128),
        sliding_window=128,
        max_position_embeddings=8192,
        num_attention_heads=4,
        head_dim=512,
        rope_dim=64,
        q_lora_rank=32,
        o_lora_rank=32,
        o_groups=2,
        index_n_heads=16,
        index_head_dim=128,
        index_topk=24,
        rope_theta=10000,
        compress_rope_theta=160000,
        rope_factor=16,
        rope_original_max_position=512,
        hc_mult=4,
        hc_sinkhorn_iters=20,
        n_routed_experts=6,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        num_hash_layers=1,
        routed_scaling_factor=1.5,
        swiglu_limit=10.0,
    )


def test_nested_blocks_alone_are_enough():
    raw = edited(
        HUGGING_FACE,
        remove=("rope_theta", "compress_rope_theta", "qk_rope_head_dim", "partial_rotary_factor"),
    )
    assert DSV4Config.from_hf(raw) == DSV4Config.from_hf(HUGGING_FACE)


def test_flat_rope_parameters_are_yarn_and_the_swa_base():
    flat = {**HUGGING_FACE["rope_parameters"]["compress"], "rope_theta": 10000.0}
    raw = edited(HUGGING_FACE, remove=("rope_theta",), rope_parameters=flat)
    assert DSV4Config.from_hf(raw) == DSV4Config.from_hf(HUGGING_FACE)


def test_default_compress_rope_means_no_scaling():
    blocks = {"main": {"rope_theta": 10000}, "compress": {"rope_type": "default"}}
    config = DSV4Config.from_hf(edited(HUGGING_FACE, rope_parameters=blocks))
    assert config.rope_factor == 1.0
    assert config.rope_original_max_position == 8192


def test_own_field_names_round_trip():
    for config in (DSV4Config.flash(), DSV4Config.from_hf(HUGGING_FACE)):
        assert DSV4Config.from_hf(dataclasses.asdict(config)) == config


def test_frozen_hashable_and_normal():
    config = DSV4Config.flash()
    assert len({config, DSV4Config.flash(), DSV4Config.pro()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1
    listed = config.replace(compress_ratios=list(config.compress_ratios), rope_theta=10000)
    assert hash(listed) == hash(config)
    assert type(listed.rope_theta) is float


def test_several_or_no_end_tokens():
    config = DSV4Config.from_hf(edited(RELEASED, eos_token_id=[1, 7], bos_token_id=None))
    assert config.eos_token_ids == (1, 7)
    assert config.bos_token_id is None
    assert config.replace(eos_token_id=None).eos_token_ids == ()
    assert DSV4Config.from_hf(edited(RELEASED, remove=("eos_token_id",))).eos_token_ids == (1,)


def test_replace():
    config = DSV4Config.flash().replace(index_topk=24)
    assert config.index_topk == 24
    assert config.replace(index_topk=512) == DSV4Config.flash()
    with pytest.raises(ValueError, match=r"'index_top' is no field of DSV4Config.*index_topk"):
        config.replace(index_top=3)
    with pytest.raises(ValueError, match="index_topk is 0: expected an integer from 1"):
        config.replace(index_topk=0)
    with pytest.raises(ValueError, match="has 43 entries: expected exactly num_hidden_layers = 4"):
        config.replace(num_hidden_layers=4)


REQUIRED = [f.name for f in dataclasses.fields(DSV4Config) if f.default is dataclasses.MISSING]


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_field_is_named(name):
    raw = dataclasses.asdict(DSV4Config.flash())
    del raw[name]
    with pytest.raises(ValueError, match=f"^{name} is missing: expected the key .*{name}$"):
        DSV4Config.from_hf(raw)


BAD_NUMBERS = [-1, True, 10**40, 1 << 5000, math.nan, math.inf, "12", 2.5, [1], {"a": 1}]
INTEGERS = [f.name for f in dataclasses.fields(DSV4Config) if f.type == "int" and f.name not in ("num_hash_layers",)]
REALS = [f.name for f in dataclasses.fields(DSV4Config) if f.type == "float"]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [*BAD_NUMBERS, 0], ids=lambda v: repr(v)[:12])
def test_absurd_integers_are_refused(name, value):
    raw = dataclasses.asdict(DSV4Config.flash())
    raw[name] = value
    with pytest.raises(ValueError, match=rf"^{name} is .*: expected") as error:
        DSV4Config.from_hf(raw)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize("value", [v for v in BAD_NUMBERS if v != 2.5] + [0], ids=lambda v: repr(v)[:12])
def test_absurd_reals_are_refused(name, value):
    raw = dataclasses.asdict(DSV4Config.flash())
    raw[name] = value
    with pytest.raises(ValueError, match=rf"^{name} is .*: expected") as error:
        DSV4Config.from_hf(raw)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (RELEASED, {"compress_ratios": [0, 0, 8] + [4, 128] * 20}, r"compress_ratios\[2\] is 8: .*128; the keys csa_"),
        (RELEASED, {"compress_ratios": [0, 1.0] + [4] * 41}, r"compress_ratios\[1\] is 1.0"),
        (RELEASED, {"compress_ratios": [False] * 43}, r"compress_ratios\[0\] is False"),
        (RELEASED, {"compress_ratios": [0] * 42}, "compress_ratios has 42 entries: .*= 43"),
        (RELEASED, {"compress_ratios": "0,0,4"}, "compress_ratios is '0,0,4': expected a list"),
        (RELEASED, {"compress_ratios": [0] * 9000}, "compress_ratios has 9000 entries"),
        (RELEASED, {"n_layers": 42}, "n_layers says 42 but num_hidden_layers says 43"),
        (RELEASED, {"window_size": 64}, "window_size says 64 but sliding_window says 128"),
        (RELEASED, {"model_type": "llama"}, "model_type is 'llama': expected 'deepseek_v4'"),
        (RELEASED, {"num_key_value_heads": 8}, "num_key_value_heads is 8: expected 1"),
        (RELEASED, {"attention_bias": True}, "attention_bias is True: expected False"),
        (RELEASED, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (RELEASED, {"norm_topk_prob": False}, "norm_topk_prob is False: expected True"),
        (RELEASED, {"norm_topk_prob": 1}, "norm_topk_prob is 1: expected True"),
        (RELEASED, {"tie_word_embeddings": 0}, "tie_word_embeddings is 0: expected true or false"),
        (RELEASED, {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid': .*sqrtsoftplus"),
        (RELEASED, {"n_shared_experts": 2}, "n_shared_experts is 2: expected 1"),
        (RELEASED, {"qk_rope_head_dim": 63}, "rope_dim is 63: expected an even number"),
        (RELEASED, {"qk_rope_head_dim": 512}, "rope_dim is 512: .* head_dim is 512"),
        (RELEASED, {"index_head_dim": 32}, "rope_dim is 64: .* index_head_dim is 32"),
        (RELEASED, {"o_groups": 7}, "o_groups is 7: expected a divisor of num_attention_heads"),
        (RELEASED, {"num_experts_per_tok": 257}, "num_experts_per_tok is 257: .*256"),
        (RELEASED, {"num_hash_layers": 44}, "num_hash_layers is 44: .*43"),
        (RELEASED, {"eos_token_id": 129280}, "eos_token_id is 129280: .*vocab_size"),
        (RELEASED, {"eos_token_id": [1, -4]}, r"eos_token_id\[1\] is -4"),
        (RELEASED, {"bos_token_id": "<s>"}, "bos_token_id is '<s>': expected an integer"),
        (
            RELEASED,
            {"rope_scaling": {**RELEASED["rope_scaling"], "beta_slow": 33}},
            "rope_beta_fast is 32: expected at least rope_beta_slow = 33",
        ),
        (RELEASED, {"rope_scaling": None}, "rope_factor is missing: expected the key rope_scaling.factor or rope_par"),
        (RELEASED, {"compress_ratios": None}, "compress_ratios is missing: expected the key layer_types or compress_"),
        (RELEASED, {"rope_scaling": "yarn"}, "rope_scaling is 'yarn': expected an object"),
        (RELEASED, {"rope_scaling": {"type": "linear"}}, "rope_scaling.type is 'linear'"),
        (RELEASED, {"rope_factor": 8}, "rope_factor says 8.0 but rope_scaling.factor says 16.0"),
        (HUGGING_FACE, {"layer_types": ["full_attention"] * 5}, r"layer_types\[0\] is 'full"),
        (HUGGING_FACE, {"layer_types": ["sliding_attention"] * 4}, "layer_types has 4 entries"),
        (HUGGING_FACE, {"compress_ratios": [0, 4, 4, 4, 4]}, "compress_ratios says .* layer_types"),
        (HUGGING_FACE, {"mlp_layer_types": ["moe"] * 4}, "mlp_layer_types has 4 entries"),
        (HUGGING_FACE, {"mlp_layer_types": ["mlp"] * 5}, r"mlp_layer_types\[0\] is 'mlp'"),
        (HUGGING_FACE, {"mlp_layer_types": ["moe"] * 4 + ["hash_moe"]}, "hash_moe after moe"),
        (HUGGING_FACE, {"num_hash_layers": 2}, "num_hash_layers says 2 but mlp_layer_types says 1"),
        (
            HUGGING_FACE,
            {"compress_rates": {"compressed_sparse_attention": 1}},
            "compress_rates.compressed_sparse_attention is 1: expected an integer from 2",
        ),
        (
            HUGGING_FACE,
            {"compress_rates": {"compressed_sparse_attention": 128}},
            "csa_ratio and hca_ratio are both 128",
        ),
        (HUGGING_FACE, {"compress_rates": {"compressed_sparse_attention": 65535}}, "csa_ratio is 65535 .*: expected r"),
        (
            {**HUGGING_FACE, "compress_ratios": [0, 4, 128, 4, 128]},
            {"compress_rates": {"compressed_sparse_attention": 8}},
            "compress_ratios says .* but layer_types says",
        ),
        (RELEASED, {"csa_ratio": 8}, r"compress_ratios\[2\] is 4: expected one of the known ratios 0, 8, 128"),
        (HUGGING_FACE, {"compress_rates": {"new_attention": 4}}, "compress_rates has 'new_att"),
        (HUGGING_FACE, {"rope_theta": 5e5}, "rope_theta says 500000.0 but rope_parameters.main"),
        (HUGGING_FACE, {"partial_rotary_factor": 0.25}, "rope_dim says 128 but|says 64 but .*128"),
        (
            HUGGING_FACE,
            {"partial_rotary_factor": 0.3},
            "partial_rotary_factor is 0.3: expected a w",
        ),
        (
            HUGGING_FACE,
            {"rope_parameters": {"compress": {"attention_factor": 1.27}}},
            "rope_parameters.compress.attention_factor is 1.27: expected 1",
        ),
    ],
)
def test_contradictions_are_named(base, changes, message):
    DSV4Config.from_hf(base)
    with pytest.raises(ValueError, match=message):
        DSV4Config.from_hf(edited(base, **changes))


def test_ratios_are_data():
    rates = {"compressed_sparse_attention": 2, "heavily_compressed_attention": 8}
    config = DSV4Config.from_hf(edited(HUGGING_FACE, compress_rates=rates))
    assert (config.csa_ratio, config.hca_ratio, config.block_size) == (2, 8, 8)
    assert config.compress_ratios == (0, 2, 8, 2, 8)
    assert set(config.attention_of_ratio.values()) == set(KNOWN_RATIOS.values())
    assert config.replace(csa_ratio=4, hca_ratio=6, compress_ratios=(0, 4, 6, 4, 6)).block_size == 12
    assert DSV4Config.flash().block_size == DSV4Config.pro().block_size == 128


def test_no_layer_kinds_at_all():
    with pytest.raises(ValueError, match="compress_ratios is missing"):
        DSV4Config.from_hf(edited(HUGGING_FACE, remove=("layer_types",)))


def test_missing_paths(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", str(tmp_path / "config.json")):
        with pytest.raises(FileNotFoundError, match=r"no such file; expected a config.json") as error:
            DSV4Config.from_hf(path)
        assert str(tmp_path) in str(error.value)
    with pytest.raises(ValueError, match="from_hf got 3: expected a path or a mapping"):
        DSV4Config.from_hf(3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "expected a JSON object"),
        (b'"text"', "expected a JSON object"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is given twice"),
        (b'{"a": ' + b"[" * 100_000, "nested 100001 deep"),
        (b'{"a": "' + b"[" * 100_000 + b'"}', "num_hidden_layers is missing"),
        (b'{"a": "\\"' + b"[" * 100 + b'"}', "num_hidden_layers is missing"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "not valid JSON"),
        (b'{"a": "' + b"x" * (1 << 20) + b'"}', "larger than 1048576 bytes"),
        (b'{"num_hidden_layers": NaN}', "num_hidden_layers is nan: expected an integer"),
        (b'{"num_hidden_layers": 1e999}', "num_hidden_layers is inf: expected an integer"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        DSV4Config.from_hf(tmp_path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 250


def test_many_containers_are_refused_before_parsing():
    from dsv4_jax.files.untrusted_json import parse_json_object

    with pytest.raises(ValueError, match="holds 2000002 lists and objects"):
        parse_json_object(b'{"a":[' + b"[]," * 2_000_000, "file")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
KEYS = sorted({*RELEASED, *HUGGING_FACE, *INFERENCE})


@settings(max_examples=500, deadline=None)
@given(
    base=st.sampled_from([RELEASED, HUGGING_FACE, INFERENCE]),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3),
)
def test_fuzz_values(base, changes):
    """500 inputs: one to three keys of a good file replaced by anything JSON can hold."""
    try:
        config = DSV4Config.from_hf({**base, **changes})
    except ValueError as error:
        assert "expected" in str(error)  # noqa: PT017 (either outcome is right)
    else:
        assert len(config.compress_ratios) == config.num_hidden_layers
        assert set(config.compress_ratios) <= {0, config.csa_ratio, config.hca_ratio}
        hash(config)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_fuzz_bytes(data):
    """300 inputs: a good file with up to four bytes replaced and cut anywhere."""
    raw = bytearray(json.dumps(HUGGING_FACE).encode())
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(raw)) | st.integers(0, len(raw)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_bytes(raw[:cut])
        try:
            config = DSV4Config.from_hf(path)
        except ValueError as error:
            assert str(error).startswith(str(path))  # noqa: PT017 (either outcome is right)
        else:
            assert len(config.compress_ratios) == config.num_hidden_layers
