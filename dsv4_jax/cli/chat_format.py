"""Messages to the prompt of a DeepSeek-V4 chat model, and a reply back to a message.

The release has no Jinja template but an encoder with a description, `encoding/encoding_dsv4.py` and
`encoding/README.md` of https://huggingface.co/deepseek-ai/DeepSeek-V4-Pro, which vLLM ships as
`vllm/tokenizers/deepseek_v4_encoding.py`. This follows them for system, user, assistant and tool messages, with
thinking on and off; roles and tokens of the release's own search pipeline (developer, latest_reminder, tasks) are left
out.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
MARK = "｜DSML｜"
"""What the tags of a tool call begin with."""

_TOOLS = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<{mark}tool_calls>" block like the following:

<{mark}tool_calls>
<{mark}invoke name="$TOOL_NAME">
<{mark}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{mark}parameter>
...
</{mark}invoke>
<{mark}invoke name="$TOOL_NAME2">
...
</{mark}invoke>
</{mark}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> \
BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

{schemas}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
"""Part of the model's input format: it has to be these words."""


def format_messages(
    messages: Sequence[Mapping[str, Any]], *, thinking: bool = False, tools: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The prompt after which a DeepSeek-V4 chat model writes the next reply.

    Args:
      messages: the conversation, as of OpenAI's API: {"role": "system" | "user" | "assistant" | "tool", "content":
        text}; of an assistant also "reasoning_content" and "tool_calls", of a tool "tool_call_id". The last one is a
        user's or a tool's.
      thinking: whether the model thinks before it answers. Earlier turns' reasoning is left out, unless there are
        tools.
      tools: {"type": "function", "function": {"name", "description", "parameters"}} each.

    Returns:
      Text with the begin token, to be encoded without adding another.

    Raises:
      ValueError: what makes no conversation.
    """
    turns = _turns(messages, tools)
    if not turns or turns[-1][0] not in ("user", "tool"):
        raise ValueError("the last message is not a user's or a tool's: expected one to reply to")
    last_user = max(i for i, (role, _) in enumerate(turns) if role in ("user", "tool"))
    keeps_reasoning = bool(tools)
    text = BEGIN
    for i, (role, parts) in enumerate(turns):
        if role == "system":
            text += parts[0]
        elif role == "assistant":
            (message,) = parts
            if thinking and keeps_reasoning:
                text += str(message.get("reasoning_content") or "") + END_THINK
            text += str(message.get("content") or "") + _tool_calls(message.get("tool_calls") or ()) + END
        else:
            text += USER + "\n\n".join(parts)
            if i + 1 == len(turns) or turns[i + 1][0] == "assistant":
                text += ASSISTANT + (THINK if thinking and (keeps_reasoning or i >= last_user) else END_THINK)
    return text


def _turns(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """(role, parts) of each turn: a tool's results and a user's text that follow each other are one turn."""
    turns: list[tuple[str, list[Any]]] = []
    order: dict[str, int] = {}
    results: list[tuple[int, int]] = []  # (place in the last turn, order of its call)
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"message {i} has role {role!r}: expected system, user, assistant or tool")
        if role != "assistant" and not isinstance(content, str):
            raise ValueError(f"message {i} has content of type {type(content).__name__}: expected text")
        if role == "assistant":
            turns.append((role, [message]))
            order = {str(call.get("id")): n for n, call in enumerate(message.get("tool_calls") or ())}
            results = []
        elif role == "system":
            turns.append((role, [content]))
        else:
            if not turns or turns[-1][0] != "user":
                turns.append(("user", []))
                results = []
            parts = turns[-1][1]
            if role == "tool":
                results.append((len(parts), order.get(str(message.get("tool_call_id")), 0)))
                content = f"<tool_result>{content}</tool_result>"
            parts.append(content)
            # Results stand in the order of the calls, whatever the order in which they came.
            sorted_parts = [parts[at] for at, _ in sorted(results, key=lambda result: result[1])]
            for (at, _), part in zip(list(results), sorted_parts, strict=True):
                parts[at] = part
            results = [(at, n) for (at, _), n in zip(results, sorted(n for _, n in results), strict=True)]
    if tools:
        schemas = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
        block = "\n\n" + _TOOLS.format(mark=MARK, schemas=schemas)
        if turns and turns[0][0] == "system":
            turns[0][1][0] += block
        else:
            turns.insert(0, ("system", [block]))
    return turns


def _tool_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    if not calls:
        return ""
    text = f"\n\n<{MARK}tool_calls>\n"
    for call in calls:
        function = call.get("function", call)
        arguments = function.get("arguments") or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        parameters = "\n".join(_parameter(name, value) for name, value in arguments.items())
        text += f'<{MARK}invoke name="{function["name"]}">\n{parameters}\n</{MARK}invoke>\n'
    return text + f"</{MARK}tool_calls>"


def _parameter(name: str, value: Any) -> str:
    is_text = isinstance(value, str)
    shown = value if is_text else json.dumps(value, ensure_ascii=False)
    return f'<{MARK}parameter name="{name}" string="{str(is_text).lower()}">{shown}</{MARK}parameter>'


def parse_reply(text: str, *, thinking: bool = False) -> dict[str, Any]:
    """The message that a reply is: its reasoning and its content; a tool call stays part of the content."""
    text = text.removesuffix(END)
    reasoning, found, content = text.partition(END_THINK) if thinking else ("", "", text)
    if thinking and not found:
        return {"role": "assistant", "reasoning_content": reasoning, "content": ""}
    return {"role": "assistant", "content": content, **({"reasoning_content": reasoning} if thinking else {})}
