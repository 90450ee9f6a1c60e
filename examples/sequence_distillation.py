"""Distils a character model of the King James Bible: word by word, and on what the student writes.

    python examples/sequence_distillation.py
    python examples/sequence_distillation.py --steps 2000

A teacher, a GRU of 256 units, is trained on the text, and GRUs of 48 units on the same text alone,
on the teacher's predictions for it (Kim and Rush, 2016), and then, by the reverse divergence, on
those for what they write themselves (Agarwal et al., 2024). Two figures are told for each: the bits
per character of verses that no model has seen, and the bits that the teacher takes for a character
of what the model writes, which is how odd that looks to the teacher.
"""

from __future__ import annotations

import argparse
import functools
import re
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from assets import fetch
from rich.console import Console
from rich.table import Table

from jaxcompress.distillation import (
    forced_logits,
    on_policy_tokens,
    reverse_kl,
    sample_sequences,
    soft_targets,
    word_level,
)

LENGTH, BATCH = 64, 64
Loss = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


def load() -> tuple[np.ndarray, np.ndarray, int]:
    """Characters for training, for the test, and how many there are; verses end in a newline."""
    with sqlite3.connect(fetch("kjv") / "Bible.db") as base:
        found = base.execute("select Passage1 from Bible order by rowid").fetchall()
    text = "".join(re.sub(r"^\d+:\d+ ", "", verse) + "\n" for (verse,) in found)
    characters, codes = np.unique(list(text), return_inverse=True)
    codes = codes.astype(np.int32)
    return codes[:-200_000], codes[-200_000:], len(characters)


def init(key: jax.Array, words: int, width: int) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 3)
    normal = lambda key, shape, size: jax.random.normal(key, shape) * size
    return {
        "embedding": normal(keys[0], (words, 3 * width), 0.5),
        "recurrent": normal(keys[1], (width, 3 * width), width**-0.5),
        "kernel": normal(keys[2], (width, words), width**-0.5),
        "bias": jnp.zeros(words),
    }


def step(params: Any, state: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A gated recurrent unit: the logits of the next character, and the state."""
    x, h = params["embedding"][token], state @ params["recurrent"]
    (xr, xz, xn), (hr, hz, hn) = (jnp.split(part, 3, axis=-1) for part in (x, h))
    z = jax.nn.sigmoid(xz + hz)
    state = z * state + (1 - z) * jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn)
    return state @ params["kernel"] + params["bias"], state


def run(params: Any) -> tuple[Any, Any]:
    """The step and the first state."""
    return functools.partial(step, params), jnp.zeros((BATCH, params["kernel"].shape[0]))


def windows(text: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """Runs of the text, `[count, BATCH, 1 + LENGTH]`."""
    starts = rng.integers(len(text) - LENGTH, size=(count, BATCH, 1))
    return text[starts + np.arange(1 + LENGTH)]


def entropy(params: Any, batch: jax.Array) -> jax.Array:
    """Of the characters after the first, in nats, one for each run."""
    logits = forced_logits(*run(params), batch[:, 0], batch[:, 1:])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean(-1)


def write(params: Any, start: jax.Array, key: jax.Array) -> jax.Array:
    """What a model writes after a character."""
    return sample_sequences(*run(params), start, key, length=LENGTH)


def train(params: Any, loss: Loss, text: np.ndarray, steps: int) -> Any:
    adam = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    tx = optax.chain(optax.clip_by_global_norm(1.0), adam)

    @jax.jit
    def one(params: Any, state: Any, batch: jax.Array, i: jax.Array) -> Any:
        key = jax.random.fold_in(jax.random.key(0), i)
        grads = jax.grad(lambda p: loss(p, batch, key, i / steps).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(0)
    for i in range(steps):
        params, state = one(params, state, windows(text, rng, 1)[0], jnp.int32(i))
    return params


def main(steps: int = 400, teacher_steps: int = 300) -> dict[str, tuple[int, float, float]]:
    """Trains all, and gives the params, the bits of the test and the bits of what each writes."""
    text, test, words = load()
    begin, found = time.perf_counter(), {}
    hard = lambda params, batch, key, progress: entropy(params, batch)
    teacher = train(init(jax.random.key(0), words, 256), hard, text, teacher_steps)

    def taught(own: bool, params: Any, batch: Any, key: Any, progress: Any) -> jax.Array:
        """On the data, or in the second half in part on what it writes by itself."""
        start, late = batch[:, 0], own & (progress >= 0.5)
        sample = functools.partial(write, params, start)
        tokens = on_policy_tokens(key, sample, batch[:, 1:], chosen=jnp.where(late, 0.5, 0.0))
        student, target = (forced_logits(*run(p), start, tokens) for p in (params, teacher))
        loss = lambda *logits: jnp.where(late, reverse_kl(*logits), soft_targets(*logits))
        return word_level(student, target, loss=loss)

    on_data, on_policy = (functools.partial(taught, own) for own in (False, True))
    ways = {"alone": hard, "word level": on_data, "on-policy": on_policy}
    plain = jax.jit(lambda params, batch: entropy(params, batch).mean())
    batches = windows(test, np.random.default_rng(1), 20)
    starts, keys = batches[:, :, 0], jax.random.split(jax.random.key(1), 20)

    @jax.jit
    def odd(params: Any, start: jax.Array, key: jax.Array) -> jax.Array:
        whole = jnp.concatenate([start[:, None], write(params, start, key)], axis=1)
        return entropy(teacher, whole).mean()

    table = Table("model", "parameters", "bits per character", "the teacher's")
    for name, loss in {"teacher": None, **ways}.items():
        student = init(jax.random.key(1), words, 48)
        params = teacher if loss is None else train(student, loss, text, steps)
        bits = np.mean([plain(params, x) for x in batches]) / np.log(2)
        own = np.mean([odd(params, *x) for x in zip(starts, keys)]) / np.log(2)
        found[name] = (sum(x.size for x in params.values()), float(bits), float(own))
        table.add_row(name, f"{found[name][0]:,}", f"{bits:.3f}", f"{own:.3f}")
    Console().print(table, f"{time.perf_counter() - begin:.0f} s")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of each student")
    parser.add_argument("--teacher-steps", type=int, default=300)
    main(**vars(parser.parse_args()))
