"""A judge whose answers are kept: asked once, answered from the file ever after."""

import warnings
from collections.abc import Sequence
from functools import cached_property, partial
from typing import cast

import numpy as np
from jaxtyping import Float

from fastpref.judging.identity import Identity, identity
from fastpref.judging.judgements import Judgements
from fastpref.judging.protocol import Judge, Rewarder, ask, finished, rate
from fastpref.method.errors import JudgeWarning
from fastpref.runs import terminal


class RecordedJudge:
    """A judge, who it is, and where its answers are kept.

    Args:
      judge: of pairs, or a reward model.
      log: answers what it holds, and writes down what it does not before it is used; None to ask about everything.
      timeout: seconds that a call of the judge may take; None for any number.
    """

    def __init__(self, judge: Judge | Rewarder, log: Judgements | None = None, *, timeout: float | None = None) -> None:
        self.judge, self._log, self._timeout = judge, log, timeout
        if log is not None and self.identity.unknown is not None:
            warnings.warn(
                f"the judge {self.identity.name} must be told from others by its content to have its answers used "
                f"again, but {self.identity.unknown}. They are written down, and asked for again when the run goes on. "
                "Give it an attribute `identity`, a text that names it.",
                JudgeWarning,
                stacklevel=2,
            )

    @cached_property
    def identity(self) -> Identity:
        """Who the judge is."""
        return identity(self.judge)

    def ask(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], *, purpose: str, step: int
    ) -> Float[np.ndarray, " P"]:
        """p(first ≻ second) of P prompts; see `protocol.ask`.

        The same question for the same step has one answer; of a judge with a true attribute `by_content`, the same
        question of any step and purpose.
        """

        def answer(positions: Sequence[int]) -> Float[np.ndarray, " M"]:
            texts = ([column[at] for at in positions] for column in (prompts, first, second))
            with terminal.doing("judging"):
                return ask(cast(Judge, self.judge), *texts, timeout=self._timeout)

        if self._log is None:
            return answer(range(len(prompts)))
        told = finished(self.judge, first, second)
        return self._log.answers(
            self.identity,
            purpose,
            step,
            prompts,
            first,
            second,
            finished=told,
            by_content=bool(getattr(self.judge, "by_content", False)),
            answer=answer,
        )

    def rate(
        self, prompts: Sequence[str], completions: Sequence[str], *, purpose: str, step: int
    ) -> Float[np.ndarray, " P"]:
        """Rewards of P completions; see `protocol.rate`. The same question for the same step has one answer."""

        def answer(positions: Sequence[int]) -> Float[np.ndarray, " M"]:
            texts = ([column[at] for at in positions] for column in (prompts, completions))
            with terminal.doing("judging"):
                return rate(cast(Rewarder, self.judge), *texts, timeout=self._timeout)

        if self._log is None:
            return answer(range(len(prompts)))
        told = finished(self.judge, completions)
        return self._log.answers(self.identity, purpose, step, prompts, completions, finished=told, answer=answer)

    def at(self, purpose: str, step: int) -> Judge:
        """The judge of pairs for a purpose at a step."""
        return partial(self.ask, purpose=purpose, step=step)
