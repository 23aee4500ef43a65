"""LLM-as-a-judge: a language model behind an OpenAI-compatible server says which of two completions is better.

    judge = fastpref.HttpJudge("http://localhost:8000/v1", "Qwen/Qwen3-32B", max_calls=20_000)
    fastpref.train(policy, prompts, judge, run_dir="runs/judged")

Each pair is asked about in both orders, so that a taste for the first place cancels: p(y ≻ y') = (a + 1 − b) / 2 with
a the answer for (y, y') and b that for (y', y). An answer is p("1") / (p("1") + p("2")) by the log-probs of the token
that answers, where the server gives them; else the share of sampled votes. The log of a run keeps answers by content: a
question that was answered once is asked at no later step.
"""

import asyncio
import math
import os
import random
import re
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

import numpy as np
import orjson
import xxhash
from jaxtyping import Float

from fastpref._lazy import need
from fastpref.data.rendered import Rendered, is_finished
from fastpref.method.errors import JudgeError

if TYPE_CHECKING:
    import httpx

TEMPLATE = (
    "Two answers to the same request are given. Decide which of them serves the person who asks better: by what they "
    "say, whether it is right, and how well it keeps to the request; not by length, and not by which comes first.\n\n"
    "[Request]\n{prompt}\n\n[Answer 1]\n{first}\n\n[Answer 2]\n{second}\n\n"
    "Reply with the number of the better answer, 1 or 2, and nothing else."
)
"""The default question."""

CUT = "\n(This answer was cut off here, at its longest length.)"
"""The default note behind an answer that did not end by itself."""

FIELDS = re.compile(r"(\{prompt\}|\{first\}|\{second\})")
MARKS = " \t\r\n*_`\"'.:()[]#\u2581\u0120"
"""What may stand around an answer."""

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses that another try may mend."""

NO_LOGPROBS = (400, 403, 404, 422, 501)
"""Statuses by which servers refuse log-probs, with a word about them."""

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds before the second try, doubled for each further one with a random share; and the most that is waited."""

TOP_LOGPROBS = 5


@dataclass(frozen=True)
class HttpJudge:
    """A `Judge` behind an OpenAI-compatible endpoint, `POST {url}/chat/completions`. Needs `fastpref[http]`.

    Prompts and completions are sent to the server. Conversations are sent as text, with the role before each message
    where there are several; the server's own chat template writes the question. A completion that was cut off at its
    longest length is sent with `cut` behind it.

    Args:
      url: of the API, such as "https://api.openai.com/v1"; without name, password or query.
      model: its name there.
      template: the question, with {prompt}, {first} and {second}, each once.
      answers: the two replies, for the first and for the second.
      cut: what stands behind a completion that was cut off; "" to tell the server nothing.
      temperature: of the reply; 1 for votes that are the model's own probabilities.
      max_tokens: longest reply; None to leave it out of the request.
      logprobs: ask for log-probs; False for votes at once.
      votes: sampled replies for each order where there are no log-probs.
      concurrency: pairs asked about at a time, one request each.
      timeout: seconds of a request.
      retries: further tries of a request that failed: no connection, no answer in time, a rate limit, a fault of the
        server, a reply that is no answer. The server's `Retry-After` is kept to.
      max_calls: requests that this object may send, failed ones included; None for any number. Where it does not
        suffice, the judge is refused, and what it had judged is kept.
      key_variable: environment variable that holds the key; without it, none is sent. The key is written nowhere.
      extra: further entries of each request, such as `{"seed": 0}`.

    Raises:
      ValueError: a setting breaks its rule.
      ImportError: httpx is not installed.
    """

    url: str
    model: str
    template: str = TEMPLATE
    answers: tuple[str, str] = ("1", "2")
    cut: str = CUT
    temperature: float = 1.0
    max_tokens: int | None = 4
    logprobs: bool = True
    votes: int = 4
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 6
    max_calls: int | None = None
    key_variable: str = "OPENAI_API_KEY"
    extra: Mapping[str, Any] = field(default_factory=dict)
    by_content: ClassVar[bool] = True
    """Answers are kept for any step; see `RecordedJudge.ask`."""
    _meter: "_Meter" = field(default_factory=lambda: _Meter(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        need("http", __name__)
        parts = urlsplit(self.url)
        plain = parts.scheme in ("http", "https") and parts.hostname and not (parts.username or parts.password)
        pieces = sorted(piece for piece in FIELDS.split(self.template) if FIELDS.fullmatch(piece))
        rules: list[tuple[bool, str, object, str]] = [
            (
                bool(plain) and not parts.query and not parts.fragment,
                "url must be http(s)://host/path, without name, password, query or fragment",
                f"one of scheme {parts.scheme!r} and host {parts.hostname!r}",
                f"Put the key into the environment variable {self.key_variable}.",
            ),
            (
                pieces == ["{first}", "{prompt}", "{second}"],
                "template must hold {prompt}, {first} and {second}, each once",
                self.template,
                "Write one such as fastpref.judging.http.TEMPLATE.",
            ),
            (
                len(self.answers) == 2 and all(map(_bare, self.answers)) and len({*map(_bare, self.answers)}) == 2,
                "answers must be two different words",
                self.answers,
                'They are ("1", "2") by default.',
            ),
            (
                min(self.votes, self.concurrency) >= 1 and self.retries >= 0,
                "votes and concurrency must be at least 1, and retries at least 0",
                (self.votes, self.concurrency, self.retries),
                "Leave them out for the defaults.",
            ),
            (
                self.timeout > 0 and self.temperature >= 0,
                "timeout must be above 0, and temperature not negative",
                (self.timeout, self.temperature),
                "Leave them out for the defaults.",
            ),
            (
                all(limit is None or limit >= 1 for limit in (self.max_tokens, self.max_calls)),
                "max_tokens and max_calls must be at least 1, or None",
                (self.max_tokens, self.max_calls),
                "None leaves them unlimited.",
            ),
        ]
        for holds, rule, received, remedy in rules:
            if not holds:
                raise ValueError(f"{rule}, but received {received!r}. {remedy}")

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the answers, for `judging.identity`; never the key."""
        names = ("url", "model", "template", "cut", "temperature", "max_tokens", "logprobs", "votes")
        own = {name: getattr(self, name) for name in names}
        return own | {"answers": list(self.answers), "orders": 2, "extra": dict(self.extra)}

    @property
    def calls(self) -> int:
        """Requests sent so far."""
        return self._meter.calls

    def __call__(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        *,
        finished: Sequence[Sequence[bool]] | None = None,
    ) -> Float[np.ndarray, " P"]:
        """p(first ≻ second | prompt), shape [P], float32; the two orders add up to 1.

        Args:
          prompts: P texts.
          first: a completion of each.
          second: what it is compared with.
          finished: for both lists, False where a completion was cut off; None for what the texts themselves say.

        Raises:
          JudgeError: the server failed, or `max_calls` does not suffice; it holds what was answered.
        """
        ends = finished or [list(map(is_finished, texts)) for texts in (first, second)]
        sent = [
            [str(text) if end else f"{text}{self.cut}" for text, end in zip(texts, flags, strict=True)]
            for texts, flags in zip((first, second), ends, strict=True)
        ]
        pairs = list(zip(map(plain_text, prompts), *sent, strict=True))
        # One canonical order, so that (y, y') and (y', y) are one question.
        questions = [(prompt, *sorted(sides)) for prompt, *sides in pairs]
        known = self._meter.answers
        keys = [_key(*question) for question in questions]
        # The same text twice is a tie, which needs no asking.
        known |= {key: 0.5 for key, (_, one, other) in zip(keys, questions, strict=True) if one == other}
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
        fault = _complete(lambda: self._ask(missing)) if missing else None
        answered = {
            at: known[key] if pair[1] <= pair[2] else 1 - known[key]
            for at, (key, pair) in enumerate(zip(keys, pairs, strict=True))
            if key in known
        }
        if fault is not None:
            text = str(fault)
            if not isinstance(fault, JudgeError):
                text = (
                    f"a judge's questions must be such as can be sent, but received {type(fault).__name__}: {fault}. "
                    "Mend the texts, or the settings of the judge."
                )
            raise JudgeError(self._hidden(text), answered) from None
        return np.array([answered[at] for at in range(len(pairs))], np.float32)

    async def _ask(self, missing: Mapping[bytes, tuple[str, ...]]) -> Exception | None:
        """Answer what is missing, into the meter; the first fault, after which no further pair is begun."""
        import httpx

        faults: list[Exception] = []
        places = asyncio.Semaphore(self.concurrency)
        key = self._secret()
        headers = {"Authorization": f"Bearer {key}"} if key else {}

        async def answer(name: bytes, prompt: str, one: str, other: str) -> None:
            async with places:
                if faults:
                    return
                promised = [0]
                try:
                    self._promise(promised, 2 * (1 if self._meter.by_logprobs and self.logprobs else self.votes))
                    forth = await self._order(client, promised, prompt, one, other)
                    back = await self._order(client, promised, prompt, other, one)
                    self._meter.answers[name] = (forth + 1 - back) / 2
                except Exception as error:
                    faults.append(error)
                finally:
                    self._meter.promised -= promised[0]

        async with httpx.AsyncClient(timeout=self.timeout, headers=headers) as client:
            await asyncio.gather(*(answer(name, *question) for name, question in missing.items()))
        return faults[0] if faults else None

    async def _order(self, client: "httpx.AsyncClient", promised: list[int], prompt: str, *sides: str) -> float:
        """p(first ≻ second) as it is answered in one order."""
        texts = dict(zip(("{prompt}", "{first}", "{second}"), (prompt, *sides), strict=True))
        # Braces in the texts themselves must stay as they are, so the template is split, not formatted.
        question = "".join(texts.get(piece, piece) for piece in FIELDS.split(self.template))
        votes: list[float] = []
        while len(votes) < self.votes:
            answer, certain = await self._reply(client, promised, question)
            if certain:
                return answer
            votes.append(answer)
        return sum(votes) / len(votes)

    async def _reply(self, client: "httpx.AsyncClient", promised: list[int], question: str) -> tuple[float, bool]:
        """One answer, and True where it is a probability by log-probs, False where it is a vote."""
        import httpx

        url = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        fault, tries = "", 0
        while tries <= self.retries:
            body: dict[str, Any] = {
                "model": self.model,
                "messages": [{"role": "user", "content": question}],
                "temperature": self.temperature,
                **({} if self.max_tokens is None else {"max_tokens": self.max_tokens}),
                **self.extra,
            }
            asks = self.logprobs and not self._meter.refuses_logprobs
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if asks else {}
            wait = min(FIRST_WAIT * 2**tries * random.uniform(1, 1.5), LONGEST_WAIT)
            self._spend(promised)
            try:
                response = await client.post(
                    url, content=orjson.dumps(body), headers={"Content-Type": "application/json"}
                )
            except (httpx.TransportError, httpx.DecodingError) as error:
                fault = f"{type(error).__name__} {error}".strip()
            else:
                status, text = response.status_code, response.text
                if status == 200:
                    try:
                        return self._answer(orjson.loads(response.content))
                    except _NoAnswer as error:
                        fault = str(error)
                    except (KeyError, IndexError, AttributeError, TypeError, ValueError, OverflowError):
                        fault = f"a reply of another form, {text!r:.200}"
                elif asks and status in NO_LOGPROBS and "logprob" in text.lower():
                    self._meter.refuses_logprobs, self._meter.by_logprobs = True, False
                    continue
                elif status in AGAIN:
                    fault = f"status {status}, {text!r:.200}"
                    wait = max(wait, _retry_after(response.headers.get("Retry-After")))
                else:
                    hint = f"Set {self.key_variable}." if status in (401, 403) else "Check url and model."
                    raise JudgeError(
                        f"the server of a judge must answer with status 200, but {url} answered {status}, "
                        f"{text!r:.200}. {hint}"
                    )
            if wait > LONGEST_WAIT:
                raise JudgeError(
                    f"the server of a judge must answer within {LONGEST_WAIT:g} seconds, but {url} asks to wait "
                    f"{wait:g} ({fault}). Start the same command again then: what was judged is kept."
                )
            tries += 1
            if tries <= self.retries:
                await asyncio.sleep(wait)
        raise JudgeError(
            f"the server of a judge must answer {_bare(self.answers[0])!r} or {_bare(self.answers[1])!r} within "
            f"{self.retries + 1} tries, but the last from {url} gave {fault}. Mend the server, or raise retries or "
            "timeout; what was judged is kept."
        )

    def _answer(self, reply: Any) -> tuple[float, bool]:
        choice = reply["choices"][0]
        content = (choice.get("logprobs") or {}).get("content") or []
        places = [
            [(_bare(each["token"]), float(each["logprob"])) for each in place.get("top_logprobs") or []]
            for place in content
        ]
        # The place where the reply answers; else the first at which it might have.
        spoken = [place for place, at in zip(places, content, strict=True) if _bare(at["token"]) in self._words]
        for place in [*spoken, *places]:
            first, second = (
                math.fsum(math.exp(logp) for token, logp in place if token == word) for word in self._words
            )
            if first + second > 0:
                return first / (first + second), True
        text = choice["message"]["content"]
        if not isinstance(text, str) or _bare(text) not in self._words:
            cut = f", cut off at max_tokens={self.max_tokens}" if choice.get("finish_reason") == "length" else ""
            raise _NoAnswer(f"the reply {text!r:.80}{cut}")
        self._meter.by_logprobs = False
        return float(_bare(text) == self._words[0]), False

    @property
    def _words(self) -> tuple[str, str]:
        return _bare(self.answers[0]), _bare(self.answers[1])

    def _promise(self, promised: list[int], count: int) -> None:
        """Set requests of the budget aside, so that a pair that is begun can be finished."""
        gone = self._meter.calls + self._meter.promised
        if self.max_calls is not None and gone + count > self.max_calls:
            raise JudgeError(
                f"the calls of a judge must keep to max_calls={self.max_calls}, but received pairs that need {count} "
                f"more where {gone} are sent or set aside. Raise max_calls and start the same command again: what was "
                "judged is kept."
            )
        promised[0] += count
        self._meter.promised += count

    def _spend(self, promised: list[int]) -> None:
        if not promised[0]:
            self._promise(promised, 1)
        promised[0] -= 1
        self._meter.promised -= 1
        self._meter.calls += 1

    def _secret(self) -> str:
        return os.environ.get(self.key_variable, "").strip()

    def _hidden(self, text: str) -> str:
        """The text without the key, which a server may echo."""
        key = self._secret()
        return text.replace(key, "***") if key else text


@dataclass
class _Meter:
    """What a judge object remembers: nothing that decides an answer."""

    calls: int = 0
    promised: int = 0
    refuses_logprobs: bool = False
    by_logprobs: bool = True
    answers: dict[bytes, float] = field(default_factory=dict)


class _NoAnswer(Exception):
    """A reply that names neither completion."""


def plain_text(prompt: str) -> str:
    """A prompt without the marks of a chat template: the content of one message, or each with its role before it."""
    if not isinstance(prompt, Rendered) or prompt.conversation is None:
        return str(prompt)
    contents = [(str(message["role"]), _content(message)) for message in prompt.conversation.messages]
    if len(contents) == 1:
        return contents[0][1]
    return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in contents)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _bare(text: str) -> str:
    return text.strip(MARKS)


def _key(*texts: str) -> bytes:
    return xxhash.xxh3_128_digest(b"".join(len(each).to_bytes(8, "little") + each for each in map(_encoded, texts)))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _retry_after(value: str | None) -> float:
    """Seconds of a `Retry-After` header: a number, or a date."""
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _complete(work: Callable[[], Coroutine[Any, Any, Exception | None]]) -> Exception | None:
    """Run to the end, in a thread of its own where this one has an event loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(work())).result()
