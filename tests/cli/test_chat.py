"""The prompt format of the chat models, generation_config.json, and a conversation on the command line."""

import io
import json

import pytest

from dsv4_jax import cli
from dsv4_jax.cli.chat import load_template
from dsv4_jax.cli.chat_format import format_messages, parse_reply
from dsv4_jax.cli.generation_config import end_tokens, sampling_options
from dsv4_jax.cli.prompts import StopCutter, make_codec

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
TURNS = [
    *ASK,
    {"role": "assistant", "reasoning_content": "Sum.", "content": "4"},
    {"role": "user", "content": "3+3?"},
]
CALLS = [
    {"id": i, "type": "function", "function": {"name": "get", "arguments": a}}
    for i, a in (("a", '{"x": "é", "n": 2}'), ("b", {}))
]
TOOL = {"type": "function", "function": {"name": "get", "parameters": {}}}


@pytest.mark.parametrize(
    ("messages", "thinking", "expected"),
    [
        (ASK, True, "<｜begin▁of▁sentence｜>Be brief.<｜User｜>2+2?<｜Assistant｜><think>"),
        (ASK, False, "<｜begin▁of▁sentence｜>Be brief.<｜User｜>2+2?<｜Assistant｜></think>"),
        (
            TURNS,
            True,
            "<｜begin▁of▁sentence｜>Be brief.<｜User｜>2+2?<｜Assistant｜></think>4<｜end▁of▁sentence｜><｜User｜>3+3?"
            "<｜Assistant｜><think>",
        ),
    ],
)
def test_messages_as_the_release_writes_them(messages, thinking, expected):
    assert format_messages(messages, thinking=thinking) == expected


def test_tools_and_their_results():
    """Reasoning stays where there are tools; results stand in the order of the calls, beside the user's text."""
    messages = [
        *ASK,
        {"role": "assistant", "reasoning_content": "Sum.", "content": "", "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "b", "content": "B"},
        {"role": "tool", "tool_call_id": "a", "content": "A"},
        {"role": "user", "content": "And?"},
    ]
    text = format_messages(messages, thinking=True, tools=[TOOL])
    assert text.startswith("<｜begin▁of▁sentence｜>Be brief.\n\n## Tools\n\nYou have access")
    assert '### Available Tool Schemas\n\n{"name": "get", "parameters": {}}\n\nYou MUST' in text
    assert text.endswith(
        '<｜User｜>2+2?<｜Assistant｜><think>Sum.</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get">\n'
        '<｜DSML｜parameter name="x" string="true">é</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="n" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="get">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>'
        "<｜User｜><tool_result>A</tool_result>\n\n<tool_result>B</tool_result>\n\nAnd?<｜Assistant｜><think>"
    )


def test_replies_are_messages():
    assert parse_reply("a</think>b", thinking=True) == {"role": "assistant", "content": "b", "reasoning_content": "a"}
    assert parse_reply("b<｜end▁of▁sentence｜>") == {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "the last message"),
        (TURNS[:3], "the last message"),
        ([{"role": "x"}], "role 'x'"),
        ([{"role": "user"}], "content"),
    ],
)
def test_what_is_no_conversation(messages, words):
    with pytest.raises(ValueError, match=words):
        format_messages(messages)


def test_generation_config_is_heeded_and_flags_win(tmp_path):
    none = {"temperature": None, "top_k": None, "top_p": None, "min_p": None}
    greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert sampling_options(tmp_path, **none) == greedy
    assert end_tokens(tmp_path, (3,), 10) == (3,)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6, "top_p": 0.95, "eos_token_id": [1, 2]}))
    assert sampling_options(tmp_path, **none) == greedy  # without do_sample, as transformers reads it
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": [1, 2]}))
    assert sampling_options(tmp_path, **none) == greedy | {"temperature": 0.6, "top_p": 0.95}
    assert sampling_options(tmp_path, **{**none, "temperature": 0.0})["temperature"] == 0.0
    assert end_tokens(tmp_path, (3,), 10) == (1, 2)
    path.write_text(json.dumps({"do_sample": True, "top_k": "x", "eos_token_id": 10}))
    with pytest.raises(cli.InputError, match="top_k is 'x'"):
        sampling_options(tmp_path, **none)
    with pytest.raises(cli.InputError, match="eos_token_id is 10"):
        end_tokens(tmp_path, (3,), 10)


def test_stop_texts_are_cut_across_pieces():
    cut = StopCutter(["\n\n", "END"])
    assert [cut("a\n"), cut("b\nE"), cut("X"), cut("\n"), cut("\nc"), cut("d", True)] == [
        "a",
        "\nb\n",
        "EX",
        "",
        "",
        "",
    ]
    cut = StopCutter(["END"])
    assert [cut("aEN"), cut("", True)] == ["a", "EN"]


def test_a_begin_token_stands_once(tmp_path):
    """The prompt's, tokenizer.json's own and the one that add_bos_token asks for."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1}, "a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for added in (True, False):
        options = {"add_bos_token": added, "bos_token": "<s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
        codec = make_codec(tmp_path, 2)
        assert codec.encode(b"<s>a") == codec.encode(b"a") == [0, 1]


def test_a_template_of_the_checkpoint(tmp_path):
    pytest.importorskip("jinja2")
    path = tmp_path / "chat_template.jinja"
    path.write_text("{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    assert load_template(tmp_path)(ASK, False) == "<s>[system]Be brief.[user]2+2?"
    path.write_text("{{ raise_exception('no') }}")
    with pytest.raises(cli.InputError, match="no"):
        load_template(tmp_path)(ASK, False)


def test_a_conversation_keeps_its_cache(run, one_layer, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 150 + "\nmore\n\n"))
    status, out, err = run("chat", "--checkpoint", one_layer, "-n", 4, "--context", 512)
    assert status == 0
    assert out
    assert "it is no chat model" in err
    assert "128 found in the cache" in err
