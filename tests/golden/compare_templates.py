"""Compare the texts that chat templates write here with those of transformers, template by template.

    python compare_templates.py FOLDER     (a Python that has fastpref and transformers; FOLDER holds *.jinja)

Nine conversations are written by each template: as a prompt and, where that is possible, with an answer. Two texts are
the same, or both sides refuse. Contents that are parts of text are left out: where a template does not read parts, they
are joined here, and transformers writes their Python form, drops them, or refuses.
"""

import sys
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers.utils import chat_template_utils

from fastpref.data.chat import ChatTemplate
from fastpref.data.messages import messages_of
from fastpref.data.rendered import Conversation
from fastpref.method.errors import ChatError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TODAY = datetime.now().strftime("%Y-%m-%d")
ANSWER = {"role": "assistant", "content": "By the river."}


def says(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


LEVEL = {
    "name": "river_level",
    "description": "Level of a river.",
    "parameters": {"type": "object", "properties": {"river": {"type": "string", "description": "Its name."}}},
}
TOOLS = [{"type": "function", "function": LEVEL}]
CALLS = [{"type": "function", "function": {"name": "river_level", "arguments": {"river": "Elbe"}}}]
REPLY = says("tool", "3 feet", name="river_level")
WHERE, WHICH = says("user", "Where is the mill?"), says("user", "Which one? <b>é</b> 🙂")

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[Any] | None, dict[str, Any]]] = {
    "one question": ([WHERE], None, {}),
    "a system text": ([says("system", "Be brief."), WHERE], None, {}),
    "turns": ([WHERE, ANSWER, WHICH], None, {}),
    "tools": ([WHERE], TOOLS, {}),
    "no thinking": ([WHERE], None, {"enable_thinking": False}),
    "calls": ([WHERE, says("assistant", "", tool_calls=CALLS), REPLY, WHICH], TOOLS, {}),
    "calls without content": ([WHERE, says("assistant", None, tool_calls=CALLS), REPLY], TOOLS, {}),
    "reasoning": ([WHERE, says("assistant", "By the river.", reasoning_content="Let me see."), WHICH], None, {}),
    "an answer that has begun": ([WHERE, says("assistant", "By the ")], None, {}),
}


def theirs(text: str, messages: Any, tools: Any, options: Any, **how: Any) -> str | None:
    """What transformers writes, or None where it refuses."""
    try:
        plain = [chat_template_utils._normalize_chat_messages(messages)]
        written, _ = chat_template_utils.render_jinja_template(
            plain, tools=tools, chat_template=text, **how, **TOKENS, **options
        )
    except Exception:
        return None
    return str(written[0])


def ours(template: ChatTemplate, messages: Any, tools: Any, options: Any, *, answered: bool) -> str | None:
    """What is written here: the prompt, or prompt and answer; None where it is refused."""
    try:
        if not answered:
            return str(template.prompt(messages, tools, options))
        prompt, (answer,) = template.answered(Conversation(messages_of(messages), tools, options), [[ANSWER]])
    except ChatError:
        return None
    return str(prompt) + str(answer)


def main(folder: Path) -> int:
    """Print how many texts are the same; the exit status is the number of those that differ."""
    counts: Counter[str] = Counter()
    for path in sorted(folder.glob("*.jinja")):
        text = path.read_text()
        template = ChatTemplate(text, TOKENS, options={"strftime_now": TODAY})
        for name, (messages, tools, options) in CONVERSATIONS.items():
            begun = messages[-1]["role"] == "assistant"
            how = {"continue_final_message": True} if begun else {"add_generation_prompt": True}
            pairs = [
                (
                    ours(template, messages, tools, options, answered=False),
                    theirs(text, messages, tools, options, **how),
                )
            ]
            if not begun:
                whole = theirs(text, [*messages, ANSWER], tools, options)
                answer = ours(template, messages, tools, options, answered=True)
                # Here the tokens that close an answer are no part of its text.
                closed = (
                    answer is not None
                    and whole is not None
                    and not whole.removeprefix(answer).replace("</s>", "").strip()
                )
                pairs.append((answer, answer if closed else whole))
            for mine, true in pairs:
                kind = "different" if mine != true else "both refuse" if mine is None else "same"
                counts[kind] += 1
                if kind == "different":
                    print(path.stem, name, repr(mine)[-300:], repr(true)[-300:], sep=" | ")
    print(dict(counts))
    return counts["different"]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
