"""Figures 1 and 2 of the IPO paper: IPO and DPO trained on a handful of recorded preferences between three actions.

A softmax policy of three logits, 18000 steps of Adam at 0.01 on batches of 9 drawn with replacement, 10 seeds, the mean
and its 95 % interval (section 5.4). The paper's text does not say which τ: 0.1, 0.5 and 1 are ours.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int

from fastpref.data import files
from fastpref.learning.optimizers import apply, initial_state
from fastpref.method.losses import Loss, dpo, ipo
from fastpref.reproduce import figures

TAUS = (0.1, 0.5, 1.0)
LOSSES: dict[str, Loss] = {"IPO": ipo, "DPO": dpo}
SEEDS, STEPS, BATCH, LEARNING_RATE, EVERY = 10, 18000, 9, 0.01, 180
STUDENT_T = 2.262
"""97.5 % quantile of Student's t with 9 degrees of freedom: half of a 95 % interval of the mean of 10."""

ORDER = ((0, 1), (1, 2), (0, 2))
"""D1: a beats b, b beats c, a beats c."""
PRINTED = ((0, 1), (1, 0))
"""D3 as printed. No pair has c, so that nothing moves its logit."""
NEVER_WINS = ((0, 1), (1, 0), (1, 2))
"""What the paper says of D3 asks for a loss of c: here it loses to b once, and a and c still never meet."""


@partial(jax.jit, static_argnames="loss")
def train(key: Array, pairs: Int[Array, "N 2"], tau: Float[Array, ""], *, loss: Loss) -> Float[Array, "T A"]:
    """Probabilities of the three actions every `EVERY` steps, the first before any."""
    optimiser = optax.adam(LEARNING_RATE)

    def mean_loss(logits: Array, batch: Array) -> Array:
        # The reference is uniform: its part of the log-ratio is 0.
        ratios = logits[batch[:, 0]] - logits[batch[:, 1]]
        return loss(ratios, jnp.ones_like(ratios), tau=tau).mean()

    def step(number: Array | int, state: tuple[Array, optax.OptState, Array]) -> tuple[Array, optax.OptState, Array]:
        logits, moments, start = state
        drawn = jax.random.randint(jax.random.fold_in(key, start + number), (BATCH,), 0, len(pairs))
        logits, moments = apply(optimiser, jax.grad(mean_loss)(logits, pairs[drawn]), moments, logits)
        return logits, moments, start

    def keep(state: tuple[Array, optax.OptState], start: Array) -> tuple[tuple[Array, optax.OptState], Array]:
        logits, moments, _ = jax.lax.fori_loop(0, EVERY, step, (*state, start))
        return (logits, moments), jax.nn.softmax(logits)

    first = jnp.zeros(3)
    _, kept = jax.lax.scan(keep, (first, initial_state(optimiser, first)), jnp.arange(0, STEPS, EVERY))
    path: Array = jnp.concatenate([jax.nn.softmax(first)[None], kept])
    return path


def curves(pairs: tuple[tuple[int, int], ...], loss: Loss, tau: float) -> Float[np.ndarray, "S T A"]:
    """The learning curves of all seeds."""
    keys = jax.random.split(jax.random.key(0), SEEDS)
    each = jax.vmap(partial(train, loss=loss), in_axes=(0, None, None))
    return np.asarray(each(keys, jnp.asarray(pairs), jnp.float32(tau)))


def optimum(pairs: tuple[tuple[int, int], ...], tau: float) -> Float[np.ndarray, " A"]:
    """Where IPO's loss on these pairs is smallest: logits that are ½/τ apart by least squares, the shortest such."""
    winners, losers = np.array(pairs).T
    logits = np.linalg.pinv(np.eye(3)[winners] - np.eye(3)[losers]) @ np.full(len(pairs), 1 / (2 * tau))
    weights: Float[np.ndarray, " A"] = np.exp(logits) / np.exp(logits).sum()
    return weights


def figure_1(out: Path) -> list[Path]:
    """Write `ipo-figure-1.png` and `.csv` into the folder; returns them."""
    return _figure(out, "ipo-figure-1", "IPO and DPO on D1: a beats b, b beats c, a beats c", {"": ORDER})


def figure_2(out: Path) -> list[Path]:
    """Write `ipo-figure-2.png` and `.csv` into the folder; returns them."""
    data = {"D3 as printed": PRINTED, "D3 and b ≻ c": NEVER_WINS}
    return _figure(out, "ipo-figure-2", "IPO and DPO on D3: a beats b, b beats a, c never wins", data)


def _figure(out: Path, name: str, title: str, data: dict[str, tuple[tuple[int, int], ...]]) -> list[Path]:
    steps, rows = np.arange(0, STEPS + 1, EVERY), []
    cells: list[list[Any]] = []
    for label, pairs in data.items():
        for method, loss in LOSSES.items():
            panels = []
            for tau in TAUS:
                found = curves(pairs, loss, tau)
                mean = found.mean(0)
                reach = STUDENT_T * found.std(0, ddof=1) / SEEDS**0.5
                lines = optimum(pairs, tau) if method == "IPO" else None
                panels.append(figures.BandPanel(f"{method}, τ = {tau:g}", steps, mean, reach, lines))
                for step, values in zip(steps, np.stack([mean, mean - reach, mean + reach], -1), strict=True):
                    for action, numbers in zip("abc", values, strict=True):
                        texts = [f"{number:.5f}" for number in numbers]
                        cells.append([label or "D1", method, tau, step, action, *texts])
            rows.append((label, panels))
    table = files.write_csv(
        out / f"{name}.csv", ["data", "loss", "tau", "step", "action", "mean", "low", "high"], cells
    )
    image = figures.bands(out / f"{name}.png", title, rows, ("$y_a$", "$y_b$", "$y_c$"))
    return [image, table]
