"""Chat templates: every name that Hugging Face gives them, openings of answers, tools, options, and their files."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from seam_tokenizers import CHATML, byte_level, directory

from fastpref.data import read_prompts, read_records
from fastpref.data.chat import ChatTemplate
from fastpref.data.tokenizer import Tokenizer
from fastpref.method.errors import ChatError, DataError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
PAIR = ("prompt", "chosen", "rejected")
TOOL = {
    "type": "function",
    "function": {"name": "level", "parameters": {"type": "object", "properties": {"river": {"type": "string"}}}},
}
CALL = {"type": "function", "function": {"name": "level", "arguments": {"river": "Elbe"}}}

THINKING = (
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}<A>"
    "{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>\n"
    "{% if enable_thinking is defined and not enable_thinking %}\n</think>\n{% endif %}{% endif %}"
)
TOOLS = (
    "{% if tools is not none %}[tools] {{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.content %}{{ m.content | trim }}{% endif %}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text | trim }};{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
REASONED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.thinking is defined %}({{ m.thinking }}"
    "{{ '=' if m.thinking == m.reasoning_content }}){% endif %}{{ m.content }}{% endfor %}"
)


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more


def pairs(text: str, row: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    records, _ = read_records([row], columns=PAIR, template=ChatTemplate(text, TOKENS))
    return records[0].prompt, records[0].completions


def test_a_block_that_only_a_generation_prompt_opens_is_left_out_of_pairs() -> None:
    row = {"prompt": [user("q")], "chosen": [assistant("<think>hm</think>yes")], "rejected": [assistant("no")]}
    assert pairs(THINKING, row) == ("<U>q<A>", ("yes", "no"))
    assert ChatTemplate(THINKING, TOKENS).prompt([user("q")]) == "<U>q<A><think>\n"
    closed = row | {"chat_template_kwargs": {"enable_thinking": False}}
    assert pairs(THINKING, closed)[0] == "<U>q<A>"
    # An answer that opens the block itself keeps it in the prompt.
    kept = THINKING.replace(".split('</think>')[-1]", "")
    row = {"prompt": [user("q")], "chosen": [assistant("<think>\na")], "rejected": [assistant("<think>\nb")]}
    assert pairs(kept, row) == ("<U>q<A><think>\n", ("a", "b"))


def test_options_come_from_the_record_the_run_and_the_call() -> None:
    off = {"enable_thinking": False}
    row: dict[str, Any] = {"prompt": [user("q")]}
    end = "\n</think>\n"
    for template, more in (
        (ChatTemplate(THINKING, TOKENS), {"chat_template_kwargs": off}),
        (ChatTemplate(THINKING, TOKENS), {"chat_template_kwargs": '{"enable_thinking": false}'}),
        (ChatTemplate(THINKING, TOKENS, options=off), {}),
        (ChatTemplate(THINKING, TOKENS, options=off), {"chat_template_kwargs": {"enable_thinking": None}}),
    ):
        assert read_records([row | more], template=template)[0][0].prompt.endswith(end)
    on = ChatTemplate(THINKING, TOKENS, options=off).prompt([user("q")], options={"enable_thinking": True})
    assert not on.endswith(end)
    assert (
        ChatTemplate("{{ enable_thinking }}{{ eos_token }}", TOKENS, options={"eos_token": "x"} | off).prompt(
            [user("q")]
        )
        == "Falsex"
    )
    with pytest.raises(ChatError, match=r"must have other names than .*, but received add_generation_prompt"):
        ChatTemplate(THINKING, options={"add_generation_prompt": False})


def test_tools_and_system_stand_beside_messages() -> None:
    written = '[tools] [{"type": "function", "function": {"name": "level"'
    said = "<system>Be brief.</s>\n<user>q</s>\n<assistant>"
    for tools in ([TOOL], f"[{json.dumps(TOOL)}]"):
        row = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")], "system": "Be brief."}
        prompt, completions = pairs(TOOLS, row | {"tools": tools})
        assert prompt.startswith(written)
        assert prompt.endswith(said)
        assert completions == ("a", "b")
    for nothing in ({}, {"tools": None}, {"tools": []}, {"tools": ""}):
        assert pairs(TOOLS, row | nothing)[0] == said
    named = ChatTemplate("{{ 1 }}", TOKENS, named={"tool_use": "{{ tools | length }} tools"})
    assert named.prompt([user("q")]) == "1"
    assert named.prompt([user("q")], [TOOL]) == "1 tools"


def test_tables_bring_tools_and_calls_without_the_entries_of_other_rows() -> None:
    other = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
    rows = [
        {"prompt": [user("q"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "3"}]},
        {"prompt": [user("q"), assistant(None, tool_calls=[other]), {"role": "tool", "content": "4"}]},
    ]
    template = ChatTemplate(TOOLS, TOKENS)
    expected = '<user>q</s>\n<assistant>[level {"river": "Elbe"}]</s>\n<tool>3</s>\n<assistant>'
    for source in (rows, pa.Table.from_pylist(rows)):
        assert read_records(source, template=template)[0][0].prompt == expected


@pytest.mark.usefixtures("unchecked")
def test_templates_by_name_are_read_in_each_form_and_others_refused(tmp_path: Path) -> None:
    def read(number: int, written: Any, **options: Any) -> list[str]:
        settings = {"eos_token": "<|im_end|>", "chat_template": written}
        tokenizer = Tokenizer.load(directory(tmp_path / str(number), byte_level(), settings))
        return read_prompts([{"prompt": [user("q")]}], tokenizer, chat_template_kwargs=options)

    named = {"default": "long", "brief": "brief"}
    listed = [{"name": name, "template": text} for name, text in named.items()]
    for number, written in enumerate((named, listed)):
        assert read(number, written) == ["long"]
        assert read(number, written, chat_template="brief") == ["brief"]
    for number, odd in enumerate((5, ["long"], [{"name": "default"}], {"default": None}), 2):
        with pytest.raises(ChatError, match=r"chat_template of tokenizer_config.json must be a text, or texts by name"):
            read(number, odd)
    folder = directory(tmp_path / "letters", byte_level(), {"eos_token": "<|im_end|>"})
    (folder / "chat_template.jinja").write_bytes(b"\xe9")
    with pytest.raises(ChatError, match=r"chat_template.jinja must be UTF-8, but received"):
        read_prompts([{"prompt": [user("q")]}], Tokenizer.load(folder))


def test_messages_may_be_json_where_no_text_can_be_meant() -> None:
    template, messages = ChatTemplate(CHATML), [user("q"), assistant("a")]
    text = json.dumps(messages)
    for columns in (("prompt",), ("prompt", "completion")):
        expected = read_records([{"messages": messages}], columns=columns, template=template)
        assert read_records([{"messages": text}], columns=columns, template=template) == expected
    with pytest.raises(DataError, match=r"messages given as text must be JSON, but received an error at character"):
        read_records([{"messages": "Hello"}], template=template)
    for row in ({"prompt": text}, {"prompt": text.encode()}):
        with pytest.raises(DataError, match=r"but received messages as the text of JSON; read them with json.loads"):
            read_records([row], template=template)
    with pytest.raises(DataError, match=r"column 'rejected' must hold text or messages, but received messages as the"):
        read_records([{"prompt": "p", "chosen": "c", "rejected": text}], columns=("prompt", "chosen", "rejected"))
    for prompt in ('["role"]', '[{"role": "user"', '[] is a "role"'):
        assert read_records([prompt])[0][0].prompt == prompt


def test_content_may_be_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a "}, "b"]
    assert ChatTemplate(PARTS).prompt([user(parts)]) == "<user>a;b;<assistant>"
    assert ChatTemplate(CHATML).prompt([user(parts)]) == ChatTemplate(CHATML).prompt([user("a b")])
    table = pa.Table.from_pylist([{"prompt": [user([{"type": "text", "text": "a", "image": None}])]}])
    assert read_records(table, template=ChatTemplate(PARTS))[0][0].prompt == "<user>a;<assistant>"


def test_reasoning_has_each_of_its_names() -> None:
    for name in ("reasoning_content", "thinking", "reasoning"):
        messages = [user("q"), assistant("a", **{name: "hm"}), user("r")]
        assert ChatTemplate(REASONED).prompt(messages) == "<user>q<assistant>(hm=)a<user>r"


def test_a_begun_answer_is_continued() -> None:
    begun = [user("q"), assistant("Sure, ")]
    assert ChatTemplate(CHATML).prompt(begun).endswith("assistant\nSure, ")
    assert ChatTemplate(TOOLS, TOKENS).prompt(begun) == "<user>q</s>\n<assistant>Sure,"
    assert (
        ChatTemplate(PARTS).prompt([user("q"), assistant([{"type": "text", "text": "Su"}])]).endswith("<assistant>Su")
    )
    row = {"prompt": begun, "chosen": [assistant("yes")], "rejected": "no"}
    assert pairs(CHATML.replace("<|im_end|>", "</s>"), row) == (
        "<|im_start|>user\nq</s>\n<|im_start|>assistant\nSure, ",
        ("yes", "no"),
    )
    with pytest.raises(ChatError, match=r"must write the assistant's last message for it to be continued"):
        ChatTemplate("{{ messages[0].content }}").prompt(begun)


def test_the_end_of_an_answer_is_its_first(tmp_path: Path) -> None:
    text = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}{% endif %}"
    )
    end = byte_level().token_to_id("<|im_end|>")
    files = {"generation_config": {"eos_token_id": [end]}}
    config = {"eos_token": "<|endoftext|>", "chat_template": text}
    tokenizer = Tokenizer.load(directory(tmp_path, byte_level(), config, **files))
    assert tokenizer.turn_end_id == end
    records, _ = read_records(
        [{"messages": [user("q"), assistant("a")]}], columns=("prompt", "completion"), template=tokenizer.template
    )
    assert records[0].completions == ("a",)
    assert tokenizer.encode_records([records[0].prompt], [records[0].completions])[0][1][-1] == end


def test_named_templates_are_files_too(tmp_path: Path) -> None:
    path = directory(tmp_path / "m", byte_level(), {"eos_token": "<|im_end|>", "chat_template": "old"})
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "brief.jinja").write_text("brief")
    (path / "chat_template.jinja").write_text("long")
    tokenizer = Tokenizer.load(path)
    assert read_prompts([{"prompt": [user("q")]}], tokenizer) == ["long"]
    named = {"chat_template": "brief"}
    assert read_prompts([{"prompt": [user("q")]}], tokenizer, chat_template_kwargs=named) == ["brief"]
    assert read_prompts([{"prompt": [user("q")], "chat_template_kwargs": named}], tokenizer) == ["brief"]
    tokenizer.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.files == tokenizer.files
    assert ChatTemplate.of(again).identity == ChatTemplate.of(tokenizer).identity
    (path / "chat_template.jinja").unlink()
    with pytest.raises(ChatError, match=r"must be one of those of the checkpoint \(brief\), but received none"):
        ChatTemplate.of(Tokenizer.load(path)).prompt([user("q")])
