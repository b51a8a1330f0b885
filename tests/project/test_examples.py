"""The examples run, and do what they say."""

import importlib.util
import pathlib
from collections import defaultdict

import numpy as np
from flax import nnx

import dsv4_jax

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "examples"


def _load(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_here():
    tests = [name.removeprefix("test_the_") for name in globals() if name.startswith("test_the_")]
    assert {path.stem for path in FOLDER.glob("*.py")} == {name.split("_example_")[0] for name in tests}


def test_the_own_attention_example_is_attention_over_all_it_should_see():
    example = _load("own_attention")
    x = np.random.default_rng(0).normal(size=(1, 260, example.HIDDEN)).astype(np.float32)
    outputs, manager = example.decode(x, "fp32")
    assert len(manager.blocks(0)["hca"]) == 2
    w = {name: np.asarray(value, np.float64) for name, value in example.make_weights().items()}
    x, dim = x[0].astype(np.float64), example.DIM
    windows = [slice(0, 128), slice(128, 256)]
    entries = []
    for window in windows:  # per channel softmax over the tokens, weighted sum, RMS norm
        gate = np.exp(x[window] @ w["cgate"])
        pooled = (gate * (x[window] @ w["ckv"])).sum(0) / gate.sum(0)
        entries.append(pooled / np.sqrt((pooled**2).mean() + 1e-6))
    for position in (0, 126, 127, 128, 200, 255, 259):
        kv = np.concatenate(
            [x[max(position - 127, 0) : position + 1] @ w["kv"], np.reshape(entries, (2, -1))[: (position + 1) // 128]]
        )
        q = (x[position] @ w["q"]).reshape(example.HEADS, dim)
        scores = np.exp(q @ kv.T * dim**-0.5)
        expected = ((scores / scores.sum(-1, keepdims=True)) @ kv).reshape(-1) @ w["out"]
        np.testing.assert_allclose(outputs[0, position], expected, atol=1e-5)


def test_the_flax_model_example_updates_in_place_and_requests_do_not_meet():
    example = _load("flax_model")
    model = example.Model(nnx.Rngs(0))
    step = example.make_step(model)
    prompts = [[1, 2, 3], [7]]
    together, manager = example.generate(model, step, prompts, 140)
    assert [text[: len(prompt)] for text, prompt in zip(together, prompts, strict=True)] == prompts
    assert {len(text) for text in together} == {140}
    manager.check()
    swapped, _ = example.generate(model, step, prompts[::-1], 140)
    assert swapped == together[::-1]
    plan = manager.plan_step([0, 1], [139, 139])
    compiled = step.lower(nnx.state(model), manager.cache, plan, np.zeros(2, np.int32)).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == manager.memory_bytes()


def test_the_streaming_example_gives_every_prompt_its_own_text(one_layer, capsys):
    example = _load("streaming")
    example.main(one_layer, new_tokens=4)
    texts = defaultdict(list)
    for line in capsys.readouterr().out.removesuffix("\n").split("\n"):
        index, text = line.split(" | ", 1)
        texts[int(index)].append(text)
    model = dsv4_jax.from_pretrained(one_layer)
    prompts = [list(prompt.encode()) for prompt in example.PROMPTS]
    expected = dsv4_jax.generate(model, prompts, 4)
    for i, new in enumerate(expected):
        assert "\n".join(texts[i]) == example.PROMPTS[i] + bytes(new).decode("latin-1")


def test_the_planning_example_prints_what_the_caches_take(capsys):
    _load("planning").main()
    out = capsys.readouterr().out
    assert "Flash: 15.2 MiB a request and 3,514 bytes a token" in out
    assert "8 concurrent requests, one of them with 4,096 tokens" in out
    taken = int(out.split("took ")[1].split(":")[0].replace(",", ""))
    assert taken <= 9 << 20


def test_the_two_processes_example_gives_what_one_process_gives(one_layer, capsys):
    example = _load("two_processes")
    example.main(str(one_layer), new_tokens=8)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("[Gloo]")]
    model = dsv4_jax.from_pretrained(one_layer)
    assert len(lines) == 4
    for process, prompts in enumerate(example.PROMPTS):
        expected = dsv4_jax.generate(model, [list(p.encode()) for p in prompts], 8, cache_dtype="fp32")
        for prompt, tokens in zip(prompts, expected, strict=True):
            assert f"{process}: {prompt!r} {bytes(tokens)!r}" in lines
