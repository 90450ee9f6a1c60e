"""Pruning inside a jitted training step, against the same step with plain optax.

python benchmarks/sparsify.py [--quick]
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxcompress as jc
from jaxcompress import pruning

from common import Row, interleaved, row, show  # isort: skip

WIDTH, LAYERS, BATCH = 1024, 8, 64
RULES = {"**/kernel": "unstructured"}


def network() -> tuple[Any, jax.Array, jax.Array]:
    """Params of 8 Dense(1024), a batch, and targets."""
    keys = jax.random.split(jax.random.key(0), LAYERS + 2)
    params = {
        f"layer_{i}": {
            "kernel": jax.random.normal(k, (WIDTH, WIDTH)) * (2 / WIDTH) ** 0.5,
            "bias": jnp.zeros(WIDTH),
        }
        for i, k in enumerate(keys[2:])
    }
    return params, *(jax.random.normal(k, (BATCH, WIDTH)) for k in keys[:2])


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean squared error of the network."""
    for layer in params.values():
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return jnp.mean((x - y) ** 2)


class Loop:
    """A training loop whose state is donated from step to step."""

    def __init__(self, tx: optax.GradientTransformation, *, at: int = 0, alone: bool = False):
        params, x, y = network()

        def step(state, x, y):
            params, opt_state = state
            grads = params if alone else jax.grad(loss)(params, x, y)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        opt_state = tx.init(params)
        if isinstance(opt_state, jc.pruning.SparsifyState):
            opt_state = opt_state._replace(step=jnp.int32(at))
        self.state, self.batch = (params, opt_state), (x, y)
        self.step = jax.jit(step, donate_argnums=0).lower(self.state, x, y).compile()

    def __call__(self) -> Any:
        self.state = self.step(self.state, *self.batch)
        return self.state


def wrapped(every: int, scope: str = "local") -> optax.GradientTransformation:
    """Adam under `sparsify` at 90%, refreshed every `every` steps from the first one."""
    schedule = jc.pruning.periodic(0.9, every=every)
    return jc.sparsify(optax.adam(1e-3), jc.pruning.magnitude(scope=scope), schedule, RULES)


ALGORITHMS = {
    "magnitude": pruning.magnitude(),
    "global": pruning.magnitude(scope="global"),
    "static": pruning.random(),
    "SET": pruning.set_(),
    "RigL": pruning.rigl(),
    "AC/DC": pruning.magnitude(),
}
ACCUMULATING = {
    "movement": pruning.movement(),
    "SNFS": pruning.snfs(),
    "DSR": pruning.dsr(),
}


def algorithm(name: str, every: int) -> optax.GradientTransformation:
    """Adam under `sparsify` at 90% by one of the algorithms."""
    schedule = pruning.periodic(0.9, every=every)
    if name == "static":
        schedule = pruning.one_shot(0.9)
    if name == "AC/DC":  # a phase is `every` updates long
        schedule = pruning.cyclic_schedule(
            0.9, sparse=every, dense=every, begin=0, end=2**30 // every * every
        )
    chosen = {**ALGORITHMS, **ACCUMULATING}[name]
    return jc.sparsify(optax.adam(1e-3), chosen, schedule, RULES)


class Pass:
    """One pass over the weights: a second copy of them is brought up to date from the gradients."""

    def __init__(self) -> None:
        params, _, _ = network()
        kernels = [layer["kernel"] for layer in params.values()]

        def step(state):
            scores, grads = state
            return [0.9 * s + 0.1 * g for s, g in zip(scores, grads)], grads

        self.state = (kernels, [x + 1 for x in kernels])
        self.step = jax.jit(step, donate_argnums=0).lower(self.state).compile()

    def __call__(self) -> Any:
        self.state = self.step(self.state)
        return self.state


def of_algorithms(rounds: int) -> list[Row]:
    """The mean step of each algorithm, refreshed every 100 updates, against plain Adam."""
    rows = []
    plain = Loop(optax.adam(1e-3))
    for name in ALGORITHMS:
        # Two loops alone: between choices, and one that chooses at each step.
        seldom = Loop(algorithm(name, 2**29))
        seldom()
        loops = {"plain": plain, "between": seldom}
        if name != "static":
            loops["refresh"] = Loop(algorithm(name, 1))
        t = interleaved(loops, rounds=rounds)
        mean = (99 * t["between"] + t.get("refresh", t["between"])) / 100
        rows.append(
            row(f"mean, {name}, every 100", mean, "plain optax.adam", t["plain"], at_most=1.1)
        )
    return rows


def of_accumulation(rounds: int) -> list[Row]:
    """The optimizer alone: what is added to that of `magnitude`, against one pass."""
    loops: dict[str, Any] = {"pass": Pass(), "magnitude": never(alone=True)}
    for name in ACCUMULATING:
        loops[name] = Loop(algorithm(name, 2**29), alone=True)
        loops[name]()
    t = interleaved(loops, rounds=rounds)
    return [
        row(
            f"optimizer alone, {name}: beyond magnitude",
            max(0.0, t[name] - t["magnitude"]),
            "one pass over score and gradient",
            t["pass"],
            at_most=1,
        )
        for name in ACCUMULATING
    ]


def never(**kwargs: Any) -> Loop:
    """A loop under `sparsify` that never comes to the next refresh, masks already chosen."""
    loop = Loop(wrapped(2**30), **kwargs)
    loop()  # the refresh at step 0
    return loop


def run(quick: bool = False) -> list[Row]:
    """All rows."""
    rounds = 9 if quick else 41
    candidates = {
        "plain": Loop(optax.adam(1e-3)),
        "between": never(),
        "refresh": Loop(wrapped(1)),
        "refresh, global": Loop(wrapped(1, "global")),
        "optimizer, plain": Loop(optax.adam(1e-3), alone=True),
        "optimizer, between": never(alone=True),
        "optimizer, refresh": Loop(wrapped(1), alone=True),
    }
    t = interleaved(candidates, rounds=rounds)
    mean = lambda refresh, every: (t["between"] * (every - 1) + t[refresh]) / every
    against = functools.partial(row, peer="plain optax.adam", theirs=t["plain"])
    alone = functools.partial(row, peer="optax.adam alone", theirs=t["optimizer, plain"])
    what = f"{LAYERS} Dense({WIDTH}), batch {BATCH}"
    return [
        against(f"step without refresh, {what}", t["between"], at_most=1.05),
        against("step with refresh", t["refresh"], at_most=6),
        against("mean, refresh every 10", mean("refresh", 10), at_most=1.5),
        against("mean, refresh every 100", mean("refresh", 100)),
        against("step with refresh, global thresholds", t["refresh, global"]),
        against("mean, global, every 10", mean("refresh, global", 10)),
        alone("optimizer alone, without refresh", t["optimizer, between"]),
        alone("optimizer alone, with refresh", t["optimizer, refresh"]),
        *of_algorithms(rounds),
        *of_accumulation(rounds),
    ]


def main() -> None:
    show("sparsify", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
