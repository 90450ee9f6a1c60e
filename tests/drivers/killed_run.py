"""A run of `lottery_ticket` that can be killed: `python killed_run.py FOLDER OUT [ROUND]`."""

import os
import signal
import sys

import jax
import jax.numpy as jnp
import optax

import jaxcompress as jc
from jaxcompress.drivers import Trained, lottery_ticket
from jaxcompress.pruning.masks import apply_masks

PARAMS = {
    "a": {"kernel": jax.random.normal(jax.random.key(0), (6, 8)), "bias": jnp.zeros(8)},
    "b": {"kernel": jax.random.normal(jax.random.key(1), (8, 3), jnp.bfloat16)},
    "steps": jnp.int32(0),
}
X = jax.random.normal(jax.random.key(2), (16, 6))
Y = jax.random.normal(jax.random.key(3), (16, 3))
RULES = {"*/kernel": "unstructured"}


def loss_fn(trained, rest, masks):
    p = apply_masks(jc.combine(trained, rest), masks)
    hidden = jnp.tanh(X @ p["a"]["kernel"] + p["a"]["bias"])
    return jnp.mean((hidden @ p["b"]["kernel"].astype(jnp.float32) - Y) ** 2)


@jax.jit
def steps(params, masks):
    tx = optax.adam(0.05)

    def step(carry, _):
        (trained, rest), state = carry
        grads = jax.grad(loss_fn)(trained, rest, masks)
        updates, state = tx.update(grads, state, trained)
        return ((optax.apply_updates(trained, updates), rest), state), None

    trained, rest = jc.partition(params)
    ((trained, rest), _), _ = jax.lax.scan(step, ((trained, rest), tx.init(trained)), None, 3)
    return jc.combine(trained, rest)


def trainer(kill_in=None, calls=None):
    def train(params, masks, round):
        if round.number == kill_in:
            os.kill(os.getpid(), signal.SIGKILL)
        if calls is not None:
            calls.append(round.number)
        early = steps(params, masks)
        trained = steps(early, masks)
        return trained if round.number else Trained(trained, early)

    return train


def run(train, folder, **options):
    settings = {"sparsity": 0.8, "rounds": 3, "rules": RULES, "scope": "global"} | options
    return lottery_ticket(train, PARAMS, folder=folder, **settings)


if __name__ == "__main__":
    *_, last = run(trainer(int(sys.argv[3]) if len(sys.argv) > 3 else None), sys.argv[1])
    jc.save(sys.argv[2], {"start": last.start, "params": last.params})
