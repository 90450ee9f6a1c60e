"""Compress some layers, train what is left and what was found, compress the next: iPQ."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress.arrays.base import is_compressed
from jaxcompress.compress import Stats, compress
from jaxcompress.drivers.rounds_folder import RoundsFolder, fingerprint
from jaxcompress.drivers.trees import as_jax, checked, copied
from jaxcompress.errors import SpecError
from jaxcompress.progress import progress_bar
from jaxcompress.rules import KernelAxes, escape, flatten, match
from jaxcompress.specs import Spec


class LayerRound(NamedTuple):
    """What a training is told.

    Attributes:
      number: 1 to the number of rounds.
      paths: of the leaves that have just been compressed.
      last: whether all are.
    """

    number: int
    paths: tuple[str, ...]
    last: bool


class CompressedRound(NamedTuple):
    """One round.

    Attributes:
      number: 1 to the number of rounds.
      paths: of the leaves that were compressed in it.
      params: after the training that followed.
    """

    number: int
    paths: tuple[str, ...]
    params: Any


Train = Callable[[Any, LayerRound], Any]


def layer_by_layer(
    train: Train,
    params: Any,
    *,
    rules: Sequence[Mapping[str, Spec | None]],
    observe: Callable[[Any], Stats] | None = None,
    key: jax.Array | None = None,
    axes: Mapping[str, KernelAxes] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Iterator[CompressedRound]:
    """Compresses some leaves in each round, and trains all that can be trained before the next.

    With `ProductQuantize` this is iPQ: the centroids of what is done and the weights of what is not
    done yet make up for the last step together. In each round the leaves that its rules match are
    compressed as they are by then; `train` goes on with what `jc.partition` says is trainable.

    Args:
      train: `train(params, round) -> params`: the user's own training, of a tree with compressed
        leaves, which `jc.compressed` runs. It returns the tree in its structure.
      params: a tree of dense arrays, trained.
      rules: for each round `{glob: spec or None}`; no leaf may have a spec in two rounds.
      observe: `observe(params) -> stats` for specs that look at inputs, called before each round
        with the params as they are by then, compressed leaves among them: the inputs of a layer
        are those that the layers before it give now.
      key: a random key, for specs that draw.
      axes: as for `compress`.
      folder: where each round is kept once it is trained. A run that was killed is begun again by
        the same call: it reads the rounds that are there, trains the others, and yields the same
        bits, if `train` and `observe` give the same ones.
      progress: show a progress bar on standard error.

    Yields:
      Each round when it is trained, or read from the folder; a list's last is the result.

    Raises:
      SpecError: for no rounds, a leaf with two specs, a training that returns another tree; as
        `compress`.
      RuleError: for a rule that matches nothing.
      FileError: for a folder with rounds of other settings or other params, or a damaged file.

    References:
      Stock et al., *And the Bit Goes Down: Revisiting the Quantization of Neural Networks*, 2020;
      Fan et al., *Training with Quantization Noise for Extreme Model Compression*, 2021 (iPQ).

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> params = {"first": jnp.eye(4), "second": jnp.eye(4)}
      >>> rules = [{"first": jc.Codebook(1)}, {"second": jc.Codebook(1)}]
      >>> train = lambda params, round: params
      >>> for done in layer_by_layer(train, params, rules=rules):
      ...     print(done.paths, jc.nbytes(done.params))
      ('first',) 76
      ('second',) 24
    """
    if isinstance(rules, Mapping) or not all(isinstance(each, Mapping) for each in rules):
        raise SpecError("rules are a list with a dict for each round: write [{...}, {...}]")
    if folder is not None and any(is_compressed(x) for _, x in flatten(params)[0]):
        raise SpecError("params hold compressed leaves already, which a folder does not keep")
    rules = [dict(each) for each in rules]
    plan = _plan(params, rules)
    params = as_jax(params)
    store = None
    if folder is not None:
        settings = {
            "rules": [[[glob, repr(spec)] for glob, spec in each.items()] for each in rules],
            "key": None if key is None else np.asarray(jax.random.key_data(key)).tolist(),
            "axes": sorted([path, *map(list, at)] for path, at in (axes or {}).items()),
            "observed": observe is not None,
            "params": fingerprint(params),
        }
        store = RoundsFolder(folder, settings, params)
    return _rounds(train, params, plan, observe, key, axes, store, progress)


def _plan(params: Any, rules: Sequence[Mapping[str, Spec | None]]) -> list[dict[str, Spec]]:
    """The specs of each round by path."""
    if not rules:
        raise SpecError("rules=[]: write a dict of globs and specs for each round")
    paths = [path for path, _ in flatten(params)[0]]
    rounds: list[dict[str, Spec]] = []
    for number, each in enumerate(rules, 1):
        hits = match(each, paths)
        found = {path: hit[1] for path, hit in zip(paths, hits) if hit and hit[1] is not None}
        if not found:
            raise SpecError(f"round {number} compresses no leaf: {each!r}")
        for earlier, other in enumerate(rounds, 1):
            for path in found.keys() & other.keys():
                raise SpecError(
                    f"{path}: has a spec in rounds {earlier} and {number}; write None for it in one"
                )
        rounds.append(found)
    return rounds


def _rounds(
    train: Train,
    params: Any,
    plan: list[dict[str, Spec]],
    observe: Callable[[Any], Stats] | None,
    key: jax.Array | None,
    axes: Mapping[str, KernelAxes] | None,
    store: RoundsFolder | None,
    progress: bool,
) -> Iterator[CompressedRound]:
    nothing = jax.tree.map(lambda _: None, params)
    with progress_bar(progress, "training", len(plan)) as advance:
        for number, specs in enumerate(plan, 1):
            kept = None if store is None else store.read(number)
            if kept is not None:
                params = kept[0]
            else:
                mine = None if key is None else jax.random.fold_in(key, number)
                stats = None if observe is None else observe(params)
                exact = {escape(path): spec for path, spec in specs.items()}
                small = compress(params, exact, key=mine, axes=axes, stats=stats)
                told = LayerRound(number, tuple(specs), number == len(plan))
                params = checked(train(copied(small), told), small, number)
                if store is not None:
                    store.write(number, params, nothing, None)
            advance(", ".join(specs))
            yield CompressedRound(number, tuple(specs), params)
