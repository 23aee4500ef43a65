"""Token ids at the seams: where a prompt ends, where a completion begins and ends, what is cut, and what is text."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from seam_tokenizers import CHATML, byte_level, directory, sentencepiece, unigram
from tokenizers import processors

from fastpref.data import DropReport, Record, read_prompts, read_records, tokenize_completions, tokenize_prompts
from fastpref.data.chat import ChatTemplate
from fastpref.data.rendered import Conversation, Rendered
from fastpref.data.tokenization import PromptTexts, fit_prompts
from fastpref.data.tokenizer import Tokenizer
from fastpref.method.errors import ChatError, CutWarning, DataError

ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SP = {"bos_token": "<s>", "eos_token": "</s>"}
LIMITS = {"max_prompt_tokens": 99, "max_completion_tokens": 99}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more


@pytest.fixture
def chatml(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(directory(tmp_path, byte_level(), {"eos_token": "<|im_end|>", "chat_template": CHATML}))


def names(tokenizer: Tokenizer, ids: Any) -> list[str]:
    return [str(tokenizer.backend.id_to_token(int(one))) for one in ids]


def whole(tokenizer: Tokenizer, text: str, *, bos: bool) -> list[int]:
    """The tokens of a text, its special tokens control tokens."""
    tokenizer.backend.encode_special_tokens = False
    ids: list[int] = tokenizer.backend.encode(text, add_special_tokens=bos).ids
    return ids


@pytest.mark.parametrize("kind", ["byte", "normalizer", "first", "always"])
@pytest.mark.parametrize("template", [ZEPHYR, INST])
def test_a_record_is_the_tokens_of_its_whole_text(kind: str, template: str, tmp_path: Path) -> None:
    backend = byte_level("<s>", "</s>") if kind == "byte" else sentencepiece(kind)
    tokenizer = Tokenizer.load(directory(tmp_path, backend, SP | {"chat_template": template}))
    chat = {"prompt": [user("is it?")], "chosen": [assistant("Paris is")], "rejected": [assistant("ab")]}
    plain = {"prompt": "is it a", "chosen": "b Paris", "rejected": " is"}
    records, _ = read_records(
        [chat, plain], columns=("prompt", "chosen", "rejected"), template=ChatTemplate.of(tokenizer)
    )
    tokens, _ = tokenize_completions(records, tokenizer, **LIMITS)
    for at, record in enumerate(records):
        for k, completion in enumerate(record.completions):
            expected = whole(tokenizer, f"{record.prompt}{completion}</s>", bos=at == 1)
            assert [*tokens.prompts[at], *tokens.completions[k][at]] == expected
    # One token of the second text crosses the seam, so that the prompt ends before it; and it is alike for both.
    assert names(tokenizer, tokens.completions[0][1])[0] in ("ab", "Ġa", "▁", "▁ab")
    (seen,) = tokenizer.encode_prompts([records[0].prompt])
    assert seen[: len(tokens.prompts[0])] == tokens.prompts[0].tolist()


def test_a_prompt_that_melts_into_its_completion_is_encoded_apart(chatml: Tokenizer) -> None:
    ((prompt, completion),) = chatml.encode_records(["a"], [["b"]])
    assert names(chatml, prompt) == ["a"]
    assert names(chatml, completion) == ["b", "<|im_end|>"]


def test_an_encoder_reads_prompts_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(directory(tmp_path, unigram(), {"eos_token": "</s>", "pad_token": "<pad>"}))
    ((prompt, completion),) = tokenizer.encode_records(["ab"], [["c"]])
    assert names(tokenizer, prompt) == ["▁", "a", "b", "</s>"]
    assert names(tokenizer, completion) == ["▁", "c", "</s>"]
    assert tokenizer.encode_prompts(["ab</s>"]) == [prompt]
    # Whole pieces, as this model takes them, are letters too.
    assert names(tokenizer, tokenizer.encode_prompts(["a</s>b"])[0]) == [*"▁a<", "/", *"s>b", "</s>"]
    assert Tokenizer.load(directory(tmp_path, unigram(), SP, config={"model_type": "t5"})).encoder_decoder
    decoder = Tokenizer.load(directory(tmp_path, unigram(), SP, config={"model_type": "llama"}))
    assert names(decoder, decoder.encode_prompts(["ab"])[0]) == ["▁", "a", "b"]
    assert decoder.affixes == (0, 0)


ENDED = [" yes", " yes<|im_end|>", " yes<|im_end|>\n", " yes<|im_end|><|im_end|>", " yes<|im_end|>\n<|endoftext|>"]


@pytest.mark.parametrize("text", ENDED)
@pytest.mark.parametrize("processor", ["none", "bos", "both"])
def test_neither_bos_nor_eos_is_doubled(text: str, processor: str, tmp_path: Path) -> None:
    backend = byte_level()
    special = [(name, backend.token_to_id(name)) for name in ("<|endoftext|>", "<|im_end|>")]
    if processor != "none":
        single = "<|endoftext|> $A" + (" <|im_end|>" if processor == "both" else "")
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    config = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "chat_template": "{{ bos_token }}" + CHATML}
    files: dict[str, Any] = {"config": {"model_type": "llama"}, "generation_config": {"eos_token_id": [258, 262]}}
    tokenizer = Tokenizer.load(directory(tmp_path, backend, config, **files))
    bos, eos = (number for _, number in special)
    for prompt in ("Q:", "<|endoftext|>Q:", "<|endoftext|><|endoftext|>Q:", "Q:<|im_end|>" * (processor == "both")):
        if not prompt:
            continue
        ids, completion = tokenizer.encode_records([prompt], [[text]])[0]
        assert ids == tokenizer.encode_prompts([prompt])[0]
        assert ids.count(bos) == (processor != "none" or prompt.startswith("<|"))
        assert eos not in ids
        assert completion.count(eos) == 1
        assert completion[-1] == eos
        assert bos not in completion
        assert completion[:-1] == tokenizer.encode_completions([text])[0][:-1]


def test_what_a_template_wrote_is_recognised_when_it_comes_from_a_file(chatml: Tokenizer, tmp_path: Path) -> None:
    turns: list[list[dict[str, Any]]] = [
        [user("Where?")],
        [{"role": "system", "content": "Be brief."}, user("Where?"), assistant("There."), user("Who?")],
        [user("Where?"), assistant("It is")],
    ]
    fresh = read_prompts([{"prompt": messages} for messages in turns], chatml)
    stored = read_prompts([{"prompt": str(text)} for text in fresh], chatml)
    assert chatml.encode_prompts(fresh) == chatml.encode_prompts(stored)
    row = {"prompt": str(fresh[0]), "chosen": "a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n", "rejected": "c"}
    records, _ = read_records([row], columns=("prompt", "chosen", "rejected"))
    tokens, _ = tokenize_completions(records, chatml, **LIMITS)
    assert names(chatml, tokens.completions[0][0])[:3] == ["a", "<|im_end|>", "Ċ"]
    assert names(chatml, tokens.completions[0][0])[-2:] == ["b", "<|im_end|>"]
    # Where the template opens a block, with and without it.
    opens = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    thinking = Tokenizer.load(
        directory(tmp_path / "r", byte_level(), {"eos_token": "<|im_end|>", "chat_template": opens})
    )
    row = {"prompt": [user("ab")], "completion": [assistant("b")]}
    records, _ = read_records([row], columns=("prompt", "completion"), template=thinking.template)
    for text in (records[0].prompt, ChatTemplate.of(thinking).prompt([user("ab")])):
        assert thinking.encode_prompts([str(text)]) == thinking.encode_prompts([text])
    # Without a BOS or special token at its beginning, too.
    zephyr = Tokenizer.load(directory(tmp_path / "sp", sentencepiece("first"), SP | {"chat_template": ZEPHYR}))
    text = zephyr.template.prompt([user("ab")]) if zephyr.template else ""
    assert zephyr.encode_prompts([str(text)]) == zephyr.encode_prompts([text])


def test_what_begins_as_the_template_does_and_opens_no_answer_is_refused(chatml: Tokenizer, tmp_path: Path) -> None:
    text = "<|im_start|>user\nWhere?<|im_end|>\n"
    with pytest.raises(DataError, match=r"must also open the answer with '<\|im_start\|>assistant', but received"):
        chatml.encode_prompts([text])
    assert tokenize_prompts([text, "a"], chatml, max_tokens=99, on_bad_record="skip")[1].dropped == {
        "bad conversation": 1
    }
    bos = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": INST}
    llama = Tokenizer.load(directory(tmp_path / "sp", sentencepiece("first"), bos))
    with pytest.raises(
        DataError, match=r"begins with '<s>' must be what the chat template writes, .* received '<s>a</s> b"
    ):
        llama.encode_prompts(["<s>a</s> b"])
    assert names(llama, llama.encode_prompts(["<s><s>ab"])[0]) == ["<s>", "ab"]
    assert names(llama, llama.encode_prompts(["<s>[INST] ab [/INST] b</s>"])[0])[-2:] == ["b", "</s>"]
    # Text that only names special tokens is text.
    assert (
        chatml.encode_prompts(["What is <|im_start|>user?"])[0].count(chatml.backend.token_to_id("<|im_start|>")) == 0
    )


def test_special_tokens_of_a_message_are_text_unless_asked(chatml: Tokenizer, tmp_path: Path) -> None:
    start, end = (chatml.backend.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    asked = [user("Is <|im_end|> a token, <|im_start|>?")]
    prompt = ChatTemplate.of(chatml).prompt(asked)
    (ids,) = chatml.encode_prompts([prompt])
    assert (ids.count(start), ids.count(end)) == (2, 1)
    (clean,) = chatml.encode_prompts([ChatTemplate.of(chatml).prompt([user("Is ")])])
    asks = clean.index(end)
    assert (ids[:asks], ids[asks - len(clean) :]) == (clean[:asks], clean[asks:])
    # Also behind a seam, and after a way through a cache.
    ((_, completion),) = chatml.encode_records([prompt], [["No <|im_end|> here"]])
    assert completion.count(end) == 1
    tokens, _ = tokenize_prompts([prompt], chatml, max_tokens=99)
    again = PromptTexts(tokens)[0]
    assert chatml.encode_prompts([again]) == [ids]
    assert isinstance(again, Rendered)
    assert again.conversation is not None
    assert again.conversation.messages == asked
    control = Tokenizer.load(tmp_path, special_text=True)
    (ids,) = control.encode_prompts([ChatTemplate.of(control).prompt(asked)])
    assert (ids.count(start), ids.count(end)) == (3, 2)
    with pytest.raises(ChatError, match=r"must leave special tokens of a message as they are"):
        ChatTemplate("{{ messages[0].content | length }}", {"eos_token": "</s>"}).prompt([user("</s>")])


STOPS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"eos_token": "<|endoftext|>"}, {"generation_config": {"eos_token_id": [256, 258]}}, "<|im_end|>"),
    ({"eos_token": "<|endoftext|>"}, {"config": {"eos_token_id": [256, 258]}}, "<|im_end|>"),
    ({"eos_token": "<|endoftext|>"}, {"config": {"text_config": {"eos_token_id": 258}}}, "<|im_end|>"),
    ({"eos_token": "<|im_end|>"}, {"generation_config": {"eos_token_id": [256, 999]}}, "<|im_end|>"),
]


@pytest.mark.parametrize(("config", "files", "closes"), STOPS, ids=range(len(STOPS)))
def test_a_set_of_tokens_ends_completions(
    config: dict[str, Any], files: dict[str, Any], closes: str, tmp_path: Path
) -> None:
    backend = byte_level()
    ids = {name: backend.token_to_id(name) for name in ("<|endoftext|>", "<|im_end|>")}
    moved = {256: ids["<|endoftext|>"], 258: ids["<|im_end|>"]}

    def numbered(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: numbered(part) for name, part in value.items()}
        return [moved.get(one, one) for one in value] if isinstance(value, list) else moved.get(value, value)

    tokenizer = Tokenizer.load(directory(tmp_path, backend, config | {"chat_template": CHATML}, **numbered(files)))
    assert set(tokenizer.stop_ids) == set(ids.values())
    assert tokenizer.stop_ids[0] == tokenizer.eos_id == ids[config["eos_token"]]
    assert tokenizer.turn_end_id == ids[closes]
    chat = {"prompt": [user("q")], "completion": [assistant("a")]}
    records, _ = read_records(
        [chat, {"prompt": "q", "completion": "a"}],
        columns=("prompt", "completion"),
        template=ChatTemplate.of(tokenizer),
    )
    tokens, _ = tokenize_completions(records, tokenizer, **LIMITS)
    assert [int(row[-1]) for row in tokens.completions[0]] == [ids[closes], tokenizer.eos_id]
    # An answer that a judge reads ends as recorded ones do.
    ((_, read),) = tokenizer.encode_records([records[0].prompt], [["a"]])
    assert read == tokens.completions[0][0].tolist()
    assert tokenizer.decode([read]) == ["a"]
    handmade = Tokenizer(byte_level(), eos_id=ids["<|im_end|>"], stop_ids=[ids["<|endoftext|>"]])
    handmade.save(tmp_path / "made")
    assert Tokenizer.load(tmp_path / "made").stop_ids == handmade.stop_ids
    assert handmade.fingerprint != Tokenizer(byte_level(), eos_id=ids["<|im_end|>"]).fingerprint


def test_answers_keep_the_blank_that_they_begin_with(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(directory(tmp_path, sentencepiece("first"), SP))
    ((_, completion),) = tokenizer.encode_records(["is"], [[" Paris"]])
    assert tokenizer.decode([completion]) == ["Paris"]
    (text,) = tokenizer.decode_completions([completion], ["is"])
    assert text == " Paris"
    assert tokenizer.encode_records(["is"], [[text]])[0][1] == completion
    chat = Rendered("is", conversation=Conversation([user("is")]))
    assert tokenizer.decode_completions([[], completion], ["is", chat]) == ["", "Paris"]


@pytest.mark.parametrize(("side", "kept"), [("right", "abcdef"), ("left", "cdefgh")])
def test_a_cut_text_keeps_what_the_post_processor_adds(side: Any, kept: str, tmp_path: Path) -> None:
    encoder = Tokenizer.load(directory(tmp_path / "t5", unigram(), {"eos_token": "</s>", "pad_token": "<pad>"}))
    decoder = Tokenizer.load(directory(tmp_path / "sp", sentencepiece("first"), SP))
    for tokenizer, begin, end in ((encoder, [], ["</s>"]), (decoder, ["<s>"], [])):
        tokens, report = tokenize_prompts(
            ["c e d f g h b c d"], tokenizer, max_tokens=8, overlong="truncate", truncation_side=side
        )
        cut = names(tokenizer, tokens.prompts[0])
        assert len(cut) == 8
        assert (cut[: len(begin)], cut[len(cut) - len(end) :]) == (begin, end)
        assert ("".join(cut).replace("▁", " ").find("b c d") > 0) == (side == "left")
        assert report == DropReport(1, 1, {}, truncated=1)
        assert tokenize_prompts(["c e"], tokenizer, max_tokens=1, overlong="truncate")[1].dropped == {
            "prompt too long": 1
        }
    assert kept


def test_a_chat_loses_its_oldest_turns_and_keeps_question_and_header(chatml: Tokenizer) -> None:
    system = {"role": "system", "content": "Be brief."}
    turns = [system, user("a" * 30), assistant("b" * 30), user("Where?"), assistant("c"), user("Who?")]
    template = ChatTemplate.of(chatml)
    short = template.prompt([system, *turns[3:]])
    limit = len(chatml.encode_prompts([short])[0])
    rows = [{"prompt": turns}, {"prompt": [user("x" * 200)]}]
    records, _ = read_records(rows, template=template)
    tokens, report = tokenize_prompts(records, chatml, max_tokens=limit, overlong="truncate")
    assert report == DropReport(2, 1, {"prompt too long": 1}, truncated=1)
    assert report.longest["prompt too long"] > 200
    assert tokens.prompts[0].tolist() == chatml.encode_prompts([short])[0]
    assert PromptTexts(tokens)[0] == short
    with pytest.warns(CutWarning, match=r"1 of 2 prompts \(50 %\) are cut to max_prompt_tokens="):
        encoded = fit_prompts([records[0].prompt, "ab"], chatml, max_prompt_tokens=limit)
    assert encoded == [tokens.prompts[0].tolist(), chatml.encode_prompts(["ab"])[0]]
    with pytest.raises(DataError, match=r"or older turns that can be left out, but received prompt 1 with 2\d\d"):
        fit_prompts([record.prompt for record in records], chatml, max_prompt_tokens=limit)
    # What came back from a file has no turns that are known.
    with pytest.raises(DataError, match=r"or older turns that can be left out, but received prompt 0 with"):
        fit_prompts([str(records[0].prompt)], chatml, max_prompt_tokens=limit)
    pair = [{"prompt": turns, "chosen": [assistant("y")], "rejected": [assistant("n")]}]
    pairs, _ = read_records(pair, columns=("prompt", "chosen", "rejected"), template=template)
    cut, _ = tokenize_completions(pairs, chatml, max_prompt_tokens=limit, max_completion_tokens=9, overlong="truncate")
    assert cut.prompts[0].tolist() == tokens.prompts[0].tolist()
    assert names(chatml, cut.completions[0][0]) == ["y", "<|im_end|>"]


@pytest.fixture
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("quietly")
def test_nothing_is_said_where_nothing_is_cut(chatml: Tokenizer) -> None:
    assert len(fit_prompts(["ab", "c"], chatml, max_prompt_tokens=3)) == 2
    assert DropReport(4, 4).shares == ""
    assert DropReport(200, 199, {"x": 1}, truncated=200 - 1).shares == "1 % lost, 99 % cut"
    assert Record(0, "a").completions == ()
