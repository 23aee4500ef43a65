"""Conversations: every layout they come in gives the same text, and what fits none is named or counted."""

from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
from small import tokenizer as small_tokenizer
from tokenizers import models, pre_tokenizers, processors

from fastpref.data import DropReport, Record, read_prompts, read_records, tokenize_completions, tokenize_prompts
from fastpref.data.chat import ChatTemplate
from fastpref.data.tokenizer import Rendered, Tokenizer
from fastpref.method.errors import ChatError, DataError

CHATML = """{{ bos_token }}{% for message in messages %}
<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<assistant>{% endif %}"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATE = ChatTemplate(CHATML, TOKENS)


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


USER, YES, NO = says("user", "q"), says("assistant", "yes"), says("assistant", "no")
PAIR = ("prompt", "chosen", "rejected")
WRITTEN = "<s><user>q</s>\n<assistant>"

PAIRS: list[dict[str, Any]] = [
    {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    {"prompt": (USER,), "chosen": [YES], "rejected": "no"},
    {"prompt": "q", "chosen": [YES], "rejected": [NO]},
    {"chosen": [USER, YES], "rejected": [USER, NO]},
    {"prompt": "q", "chosen": [USER, YES], "rejected": [USER, NO], "messages": [USER, YES]},
    {"prompt": [says("user", "q", name=None)], "chosen": [YES | {"tool_calls": None}], "rejected": [NO]},
    {"prompt": [says(b"user", b"q")], "chosen": [says("assistant", b"yes")], "rejected": [NO]},
]


@pytest.mark.parametrize("row", PAIRS, ids=range(len(PAIRS)))
def test_every_layout_of_a_pair_gives_the_same_text(row: dict[str, Any]) -> None:
    records, report = read_records([row], columns=PAIR, template=TEMPLATE)
    assert (records, report) == ([Record(0, WRITTEN, ("yes", "no"), 1.0)], DropReport(1, 1))
    assert isinstance(records[0].prompt, Rendered)


def test_prompts_and_examples_come_from_messages_too() -> None:
    supervised = ("prompt", "completion")
    for row in ({"prompt": [USER], "completion": [YES]}, {"messages": [USER, YES]}, {"completion": [USER, YES]}):
        records, _ = read_records([row], columns=supervised, template=TEMPLATE)
        assert records == [Record(0, WRITTEN, ("yes",))]
    for row in ({"prompt": [USER]}, {"messages": [USER]}, {"messages": [USER, YES]}, {"messages": [USER, YES, NO]}):
        assert read_records([row], template=TEMPLATE)[0] == [Record(0, WRITTEN)]
    turns = [says("system", "s"), USER, YES, USER]
    text = "<s><system>s</s>\n<user>q</s>\n<assistant>yes</s>\n<user>q</s>\n<assistant>"
    assert read_records([{"messages": [*turns, NO]}], template=TEMPLATE)[0][0].prompt == text
    # A whole turn of several messages is one completion.
    several = [{"prompt": [USER], "completion": [YES, NO]}]
    assert read_records(several, columns=supervised, template=TEMPLATE)[0][0].completions == ("yes</s>\n<assistant>no",)
    # Text is left alone, with and without a template.
    texts = read_records(["a", {"prompt": "b"}], template=TEMPLATE)[0]
    assert texts == [Record(0, "a"), Record(1, "b")]
    assert not any(isinstance(record.prompt, Rendered) for record in texts)


LAYOUT = "bad conversation"
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": []}, LAYOUT, r"must be a list of messages, but received \[\]"),
    ({"chosen": []}, LAYOUT, r"must be a list of messages, but received \[\]"),
    ({"rejected": 3}, LAYOUT, "must be a list of messages, but received 3"),
    ({"prompt": ["q"]}, LAYOUT, "must map role and content to text, but received 'q'"),
    ({"prompt": [says("user", None)]}, LAYOUT, "must map role and content to text, but received content None"),
    ({"prompt": [{"content": "q"}]}, LAYOUT, "must map role and content to text, but received role None"),
    ({"prompt": [says("user", [{"type": "image", "url": "x"}])]}, LAYOUT, "must be of type 'text', but received"),
    ({"tools": ["f"]}, LAYOUT, r"tools must be a list of JSON schemas, but received \['f'\]"),
    ({"tools": "{"}, LAYOUT, "tools given as text must be JSON, but received an error at character"),
    ({"chat_template_kwargs": 3}, LAYOUT, "chat_template_kwargs must be a mapping, but received 3"),
    ({"chat_template_kwargs": {"messages": []}}, LAYOUT, "must have other names than .*, but received messages"),
    ({"chat_template_kwargs": {"strftime_now": "now"}}, LAYOUT, "strftime_now must be a day such as .*received 'now'"),
    (
        {"chat_template_kwargs": {"chat_template": "t"}},
        LAYOUT,
        r"must be one of those .* \(default\), but received 't'",
    ),
    ({"system": 3}, LAYOUT, "system must be text, but received 3"),
    ({"prompt": [says("system", "a"), USER], "system": "b"}, LAYOUT, "must have one system text, but received 'b'"),
    ({"chosen": [USER, YES], "rejected": [says("user", "r"), NO]}, LAYOUT, "must share all but the assistant's last"),
    ({"chosen": [USER, YES], "rejected": [USER]}, LAYOUT, "must hold at least one message of the assistant"),
    ({"rejected": [YES]}, "identical completions", "chosen and rejected must differ"),
    ({"rejected": [says("assistant", " ")]}, "empty completion", "must hold more than white space"),
    ({"prompt": [says("user", "\ud800")]}, "bad UTF-8", "must hold valid UTF-8"),
    ({"prompt": [says("user", b"\xff")]}, "bad UTF-8", "must hold valid UTF-8"),
]


@pytest.mark.parametrize(("change", "reason", "detail"), BAD, ids=range(len(BAD)))
def test_a_bad_conversation_is_named_or_counted(change: dict[str, Any], reason: str, detail: str) -> None:
    rows = [PAIRS[0], PAIRS[0] | change, PAIRS[1]]
    with pytest.raises(DataError, match=rf"records, record 1: .*{detail}.*\[{reason}\]"):
        read_records(rows, columns=PAIR, template=TEMPLATE)
    records, report = read_records(rows, columns=PAIR, template=TEMPLATE, on_bad_record="skip")
    assert [record.id for record in records] == [0, 2]
    assert report == DropReport(3, 2, {reason: 1})


def test_missing_messages_are_named() -> None:
    for row, received in (
        ({"prompt": [USER], "chosen": [YES]}, "prompt, chosen"),
        ({"messages": [USER, YES]}, "messages"),
    ):
        with pytest.raises(
            DataError, match=rf"a conversational record must hold prompt, chosen, rejected, but received {received}"
        ):
            read_records([row], columns=PAIR, template=TEMPLATE)


def test_messages_without_a_template_say_what_is_missing() -> None:
    with pytest.raises(DataError, match=r"must hold text, but received list; conversations need a chat template"):
        read_records(PAIRS[:1], columns=PAIR)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_files_hold_conversations(kind: str, tmp_path: Path) -> None:
    rows = [PAIRS[0], {"prompt": [USER], "chosen": [says("assistant", "é", name="n")], "rejected": [NO]}]
    path = tmp_path / f"pairs.{kind}"
    table = pa.Table.from_pylist(rows)
    if kind == "jsonl":
        path.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        large = pa.large_list(pa.struct([(name, pa.large_string()) for name in ("role", "content")]))
        table = table.set_column(0, "prompt", table.column("prompt").cast(large))
        with pyarrow.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    records, _ = read_records(path, columns=PAIR, template=TEMPLATE)
    assert [record.completions for record in records] == [("yes", "no"), ("é", "no")]
    assert {record.prompt for record in records} == {WRITTEN}


def test_bad_utf8_within_messages_spoils_that_row_alone() -> None:
    content = pa.array([b"q", b"\xff", b"r"]).view(pa.string())
    messages = pa.StructArray.from_arrays([pa.array(["user"] * 3), content], ["role", "content"])
    table = pa.table({"prompt": pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), messages)})
    records, report = read_records(table, template=TEMPLATE, on_bad_record="skip")
    assert [record.prompt for record in records] == [WRITTEN, WRITTEN.replace("q", "r")]
    assert report.dropped == {"bad UTF-8": 1}


def test_templates_run_as_they_do_elsewhere() -> None:
    def rendered(text: str, **tokens: str) -> str:
        return ChatTemplate(text, tokens).prompt([says("user", "<é>")])

    assert rendered("{% for m in messages %}\n    {{ m.content }}\n  {% endfor %}\n") == "    <é>\n"
    assert rendered("{{ messages | tojson }}") == '[{"role": "user", "content": "<é>"}]'
    assert rendered("{{ messages | tojson(ensure_ascii=True, indent=1) }}").count("\\u00e9") == 1
    assert rendered("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert rendered("{% generation %}{{ bos_token }}{% endgeneration %}{{ nothing }}", bos_token="<s>") == "<s>"
    # The same data gives the same tokens on every day.
    assert rendered("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"
    today = ChatTemplate("{{ strftime_now('%d %b %Y') }}", options={"strftime_now": "2026-11-25"})
    assert today.prompt([says("user", "x")]) == "25 Nov 2026"
    assert rendered("{{ tools is none }}{{ documents is none }}{{ bos_token is defined }}") == "TrueTrueFalse"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            "refuses .*: TemplateError: roles must alternate",
        ),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation: SecurityError"),
        ("{{ messages.append(1) }}", "refuses the conversation: SecurityError"),
        ("{{ 1 / 0 }}", "refuses the conversation: ZeroDivisionError"),
        ("{{ messages | length }}", "must write a prompt alike with and without its answer"),
    ],
)
def test_a_template_that_refuses_costs_its_record(text: str, message: str) -> None:
    template = ChatTemplate(text)
    with pytest.raises(DataError, match=rf"record 0: .*{message}.*\[bad conversation\]"):
        read_records(PAIRS[:1], columns=PAIR, template=template)


def words(files: dict[str, bytes], *, bos: bool = True) -> Tokenizer:
    vocabulary = ["</s>", "<s>", "<user>", "<assistant>", "q", "yes", "no", "<unk>"]
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    backend.add_special_tokens(vocabulary[:4])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend, eos_id=0, files={"tokenizer.json": backend.to_str().encode()} | files)


@pytest.mark.filterwarnings("ignore:prompts.* columns not used")
def test_rendered_prompts_get_no_second_special_tokens() -> None:
    config = orjson.dumps({"chat_template": CHATML, "bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    tokenizer = words({"tokenizer_config.json": config})
    template = ChatTemplate.of(tokenizer)
    assert template.tokens == TOKENS
    numbered = words({"tokenizer_config.json": orjson.dumps({"chat_template": CHATML})})
    assert ChatTemplate.of(numbered).tokens["eos_token"] == "</s>"
    rows = [PAIRS[0], {"prompt": "q", "chosen": " yes", "rejected": " no"}]
    records, _ = read_records(rows, columns=PAIR, template=template)
    tokens, report = tokenize_completions(records, tokenizer, max_prompt_tokens=9, max_completion_tokens=9)
    assert [tokens.prompts[at].tolist() for at in (0, 1)] == [[1, 2, 4, 0, 3], [1, 4]]
    # One EOS, though the template writes its own, with a line end behind it.
    assert [[tokens.completions[k][at].tolist() for k in (0, 1)] for at in (0, 1)] == [[[5, 0], [6, 0]]] * 2
    assert report == DropReport(2, 2)
    assert tokenize_prompts(records, tokenizer, max_tokens=9)[0].prompts[0].tolist() == [1, 2, 4, 0, 3]

    texts = read_prompts(rows, tokenizer)
    assert texts == [WRITTEN, "q"]
    assert tokenizer.encode_prompts(texts[::-1]) == [[1, 4], [1, 2, 4, 0, 3]]
    # The mark is lost with the text around it; what begins with BOS is recognised again.
    assert tokenizer.encode_prompts(["" + texts[0] + " q"])[0][:3] == [1, 2, 4]


def test_the_template_of_a_directory_is_found() -> None:
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    config = orjson.dumps({"chat_template": several})
    assert ChatTemplate.of(words({"tokenizer_config.json": config})).text == "d"
    both = {"tokenizer_config.json": config, "chat_template.jinja": b"j"}
    assert ChatTemplate.of(words(both)).text == "j"
    with pytest.raises(ChatError, match=r"a tokenizer must bring a chat template .*but received none"):
        ChatTemplate.of(small_tokenizer())
    unnamed = ChatTemplate.of(words({"tokenizer_config.json": orjson.dumps({"chat_template": several[:1]})}))
    with pytest.raises(ChatError, match=r"must be one of those of the checkpoint \(tools\), but received none"):
        unnamed.prompt([USER])
    assert unnamed.prompt([USER], options={"chat_template": "tools"}) == "t"
    with pytest.raises(
        ChatError, match=r"a chat template must be Jinja, but received one that does not compile: .*Copy it again"
    ):
        ChatTemplate("{% for %}")


def test_fingerprints_tell_tokenizers_apart() -> None:
    one, same, other = words({}), words({}), words({}, bos=False)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert len(one.fingerprint) == 16
    assert Tokenizer(one.backend, eos_id=1).fingerprint != one.fingerprint
