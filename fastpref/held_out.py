"""Held-out evaluation during a run."""

from fastpref.config import ConfigError, TrainConfig
from fastpref.evaluation import win_rate
from fastpref.generation import Written, write
from fastpref.judging import Judge
from fastpref.models import LanguageModel


class HeldOut:
    """Held-out comparisons with the reference, whose completions are written once."""

    def __init__(self, ref: LanguageModel, prompts: list[str], judge: Judge, config: TrainConfig) -> None:
        if config.eval_every and len(prompts) < 2:
            raise ConfigError(
                f"eval_every={config.eval_every} needs at least 2 eval_prompts, but received {len(prompts)}. "
                "Pass held-out prompts, or set eval_every=0."
            )
        self.ref, self.prompts, self.judge, self.config = ref, prompts, judge, config
        self._baseline: list[str] | None = None

    def _write(self, model: LanguageModel, seed: int) -> Written:
        return write(
            model,
            self.prompts,
            ref=self.ref,
            seed=seed,
            max_new_tokens=self.config.max_new_tokens,
            max_prompt_tokens=self.config.max_prompt_tokens,
            temperature=self.config.temperature,
            batch_size=2 * self.config.batch_size,
        )

    def measure(self, policy: LanguageModel) -> dict[str, float]:
        """Metrics of the policy as it is now, under `eval/`."""
        if self._baseline is None:
            self._baseline = [text for (text,) in self._write(self.ref, 1).texts]
        written = self._write(policy, 0)
        compared = win_rate(self.prompts, [text for (text,) in written.texts], self._baseline, self.judge)
        return {
            "eval/win_rate": compared.value,
            "eval/win_rate_low": compared.low,
            "eval/win_rate_high": compared.high,
            "eval/kl": float((written.policy_logps - written.ref_logps).mean()),
            "eval/mean_length": float(written.lengths.mean()),
        }
