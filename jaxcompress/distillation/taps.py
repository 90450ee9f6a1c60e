"""`tap(fn, names)`: values from inside a function, as further outputs of a walk over its jaxpr."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress import compat
from jaxcompress.arguments import apart
from jaxcompress.distillation.held_modules import hold, unbound
from jaxcompress.distillation.tags import Tag, tag_p, tagging
from jaxcompress.errors import CompressError, RuleError
from jaxcompress.interpret import CONTROL_FLOW, Control, evaluate
from jaxcompress.rules import glob


def tap(
    fn: Callable[..., Any], names: str | Sequence[str]
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Makes `fn` return some of its intermediate values beside its output.

    The function and its model stay as they are. A name is

    - the path of a Flax module, `"encoder/layer_0/attention"`: what its `__call__` returned; with
      the name of another method after it, `"encoder/layer_0/project"`, what that returned;
    - or that of a value in any function, given by `jax.ad_checkpoint.checkpoint_name(x, "name")`.

    Globs as in rules (`*` within one key, `**` across keys) name several at once. Linen modules are
    found whatever calls them. NNX modules have their paths from the outermost one that is called:
    `fn` may be a module, take modules, or make them by `nnx.merge`; what it changes in modules and
    `nnx.Rngs` in its arguments (running means, random counters) is changed in them.

    The values are outputs like any other: they may be differentiated, and `fn` may be jitted. From
    a `scan` they come stacked, `[length, ...]`, from a `while` as they were at its last turn; from
    a loop without a turn or a branch that was not taken as zeros; from a `vmap` with the mapped
    axis first (with a `checkpoint_name`: where it lies). Layers of equal form that `nn.jit` wraps
    one by one are one program, and all have the name of the first. Goes together with
    `jc.compressed` in either order. Outside of `jit` the function is traced at each call, so wrap
    the outermost one.

    Args:
      fn: a function of pytrees, such as `module.apply`, an NNX module, or one of its methods.
      names: names or globs of what to return.

    Returns:
      A function of the same arguments, which returns `(output, {name: value})`. What occurs several
      times, such as a module that is called twice, comes as a tuple in the order of the calls.

    Raises:
      RuleError: when the result is called, for a name that nothing has; it lists what there is.
      CompressError: likewise, for a name inside of what a walk cannot enter: the body of a
        `custom_vjp` function, a `shard_map`, or the test of a `while`.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
      >>> x = jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)
      >>> logits, found = jax.jit(tap(model.apply, "layers_*"))(params, x)
      >>> {name: value.shape for name, value in found.items()}
      {'layers_0': (4, 8), 'layers_2': (4, 2)}
    """
    patterns = (names,) if isinstance(names, str) else tuple(names)
    if not patterns or not all(isinstance(name, str) for name in patterns):
        raise RuleError(f"names={names!r}: write one or more, such as 'encoder/layer_*'")
    fn, *bound = unbound(fn)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        held, args, kwargs = hold((*bound, *args), kwargs)
        arrays, full = apart((args, kwargs), compat.is_traceable)

        def flat(*arrays: Any) -> Any:
            args, kwargs = full(arrays)
            return held.run(fn, args, kwargs)

        operands = list(map(jnp.asarray, arrays))
        with tagging() as depth:
            closed, shape = jax.make_jaxpr(flat, return_shape=True)(*operands)
        walk = _Taps(depth, closed.jaxpr, patterns)
        with walk.frame() as found:
            outs = evaluate(closed.jaxpr, closed.consts, operands, walk)
        out, changed = jax.tree.unflatten(jax.tree.structure(shape), list(map(jnp.asarray, outs)))
        held.update(changed)
        return out, walk.results(found)

    return wrapped


@functools.partial(compat.register_node, data=("arrays",), static=("tag",))
class _Found:
    """One value; `tag` says how to put its arrays together, None: it is one array."""

    def __init__(self, arrays: Any, tag: Tag | None) -> None:
        self.arrays, self.tag = arrays, tag

    @property
    def value(self) -> Any:
        return self.arrays[0] if self.tag is None else self.tag.restored(self.arrays)


Frame = dict[str, list[_Found]]


class _Taps(Control):
    """Collects what has a name that was asked for, and takes it out of the control flow."""

    def __init__(self, depth: int, jaxpr: compat.Jaxpr, patterns: Sequence[str]) -> None:
        self.depth = depth
        self.frames: list[Frame] = []
        self.inside: dict[int, tuple[compat.Jaxpr, dict[str, None]]] = {}
        there = self.names(jaxpr)
        self.chosen = _chosen(patterns, list(there))

    def name(self, eqn: compat.JaxprEqn) -> str | None:
        """The name that an equation gives."""
        if eqn.primitive is tag_p:
            tag = eqn.params["tag"]
            return tag.name if tag.depth == self.depth else None
        return compat.checkpoint_name(eqn)

    def names(self, jaxpr: compat.Jaxpr) -> dict[str, None]:
        """All names in a jaxpr, in order."""
        if id(jaxpr) not in self.inside:
            found: dict[str, None] = {}
            for eqn in jaxpr.eqns:
                if (name := self.name(eqn)) is not None:
                    found[name] = None
                for body in compat.sub_jaxprs(eqn):
                    found |= self.names(body)
            self.inside[id(jaxpr)] = jaxpr, found  # held, so that no other has its id
        return self.inside[id(jaxpr)][1]

    def enters(self, eqn: compat.JaxprEqn) -> bool:
        if self.name(eqn) in self.chosen:
            return True
        return any(not self.chosen.isdisjoint(self.names(x)) for x in compat.sub_jaxprs(eqn))

    def own(self, eqn: compat.JaxprEqn, operands: list[Any]) -> Any:
        name = self.name(eqn)
        if name is None:
            if eqn.primitive.name in CONTROL_FLOW:
                return NotImplemented
            within = [n for x in compat.sub_jaxprs(eqn) for n in self.names(x) if n in self.chosen]
            raise CompressError(
                f"{within[0]!r} is inside of a {eqn.primitive.name}, which cannot be entered; name "
                "what it returns instead"
            )
        tag = eqn.params.get("tag")
        self.frames[-1].setdefault(name, []).append(_Found(list(operands), tag))
        # A name stays, for the policies of `jax.checkpoint`; a tag was ours.
        return compat.bind(eqn, operands) if tag is None else list(operands)

    def results(self, found: Frame) -> dict[str, Any]:
        """What was asked for."""
        for name in self.chosen:
            if name not in found:
                raise CompressError(
                    f"{name!r} is inside of the test of a while loop, which hands nothing on; name "
                    "a value in its body instead"
                )
        values = {name: tuple(x.value for x in xs) for name, xs in found.items()}
        return {name: xs[0] if len(xs) == 1 else xs for name, xs in values.items()}

    @contextlib.contextmanager
    def frame(self) -> Iterator[Frame]:
        """What is found within, apart from what was before."""
        self.frames.append({})
        try:
            yield self.frames[-1]
        finally:
            self.frames.pop()

    def add(self, found: Frame) -> None:
        """Adds what was found in a body."""
        for name, values in found.items():
            self.frames[-1].setdefault(name, []).extend(values)

    # The control flow around them.

    def recorded(self, body: Callable[..., Any]) -> Callable[..., tuple[Any, Frame]]:
        """`body`, and what was found in it."""

        def run(*args: Any) -> tuple[Any, Frame]:
            with self.frame() as frame:
                out = body(*args)
            return out, frame

        return run

    def scan(self, step: Any, init: Any, xs: Any, **options: Any) -> Any:
        def once(carry: Any, x: Any) -> Any:
            (carry, ys), frame = self.recorded(step)(carry, x)
            return carry, (ys, frame)

        carry, (ys, frame) = lax.scan(once, init, xs, **options)
        self.add(frame)
        return carry, ys

    def while_loop(self, test: Any, step: Any, init: Any) -> Any:
        run = self.recorded(step)
        start = jax.tree.map(_zeros, jax.eval_shape(run, init)[1])

        def tested(state: Any) -> Any:
            return self.recorded(test)(state[0])[0]  # a test cannot hand anything on

        carry, last = lax.while_loop(tested, lambda state: run(state[0]), (init, start))
        self.add(last)
        return carry

    def switch(self, index: Any, branches: Sequence[Any], *operands: Any) -> Any:
        runs = [self.recorded(branch) for branch in branches]
        frames = [jax.eval_shape(run, *operands)[1] for run in runs]
        whole: Frame = {}
        for frame in frames:
            whole = _union(whole, frame)

        def complete(run: Any) -> Any:
            def all_of_it(*operands: Any) -> Any:
                out, frame = run(*operands)

                def fill(name: str, i: int, x: _Found) -> _Found:
                    if i >= len(frame.get(name, ())):
                        return jax.tree.map(_zeros, x)
                    return _Found(frame[name][i].arrays, x.tag)  # one tag for all branches

                return out, {
                    name: [fill(name, i, x) for i, x in enumerate(xs)] for name, xs in whole.items()
                }

            return all_of_it

        out, found = lax.switch(index, [complete(run) for run in runs], *operands)
        self.add(found)
        return out

    def checkpoint(self, body: Any, **options: Any) -> Any:
        def run(*args: Any) -> Any:
            out, frame = jax.checkpoint(self.recorded(body), **options)(*args)
            self.add(frame)
            return out

        return run


def _zeros(x: Any) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype)


def _union(one: Frame, other: Frame) -> Frame:
    """What two branches have: a name in both stands for one value, of either."""
    out = dict(one)
    for name, values in other.items():
        mine = out.get(name, [])
        for a, b in zip(mine, values):
            if _form(a) != _form(b):
                raise CompressError(
                    f"{name!r} is {_form(a)} in one branch of a cond and {_form(b)} in another; "
                    "give them two names"
                )
        out[name] = [*mine, *values[len(mine) :]]
    return out


def _form(x: _Found) -> str:
    """What a value is, but for its numbers."""
    types = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(x))
    tag = x.tag
    if tag is None or (jax.tree_util.treedef_is_leaf(tag.structure) and not tag.rest):
        return types
    return f"{types} of {tag.structure}" + (f" beside {tag.rest}" if tag.rest else "")


def _chosen(patterns: Sequence[str], there: list[str]) -> set[str]:
    """The names that match, in a set."""
    out: set[str] = set()
    for pattern in patterns:
        expression = glob(pattern)
        found = {name for name in there if expression.fullmatch(name)}
        if not found:
            some = ", ".join(map(repr, there[:40])) + (", ..." if len(there) > 40 else "")
            raise RuleError(
                f"no intermediate value is named {pattern!r}; "
                + (f"there are {some}" if there else "the function has none with a name: use Flax "
                   'modules, or jax.ad_checkpoint.checkpoint_name(x, "name")')
            )  # fmt: skip
        out |= found
    return out
