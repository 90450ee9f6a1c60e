"""`Recipe`: rules as a text that can be kept, shared and read back."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.checkpoint.container import looks_like_safetensors
from jaxcompress.checkpoint.file import read_recipe
from jaxcompress.errors import RecipeError
from jaxcompress.pruning.structure.stage import Shrink
from jaxcompress.recipes.document import Node, dump, parse
from jaxcompress.recipes.presets import PRESETS
from jaxcompress.rules import glob, match
from jaxcompress.specs import Chain, Spec, spec_names


@dataclasses.dataclass(frozen=True)
class Rule:
    """One entry of a recipe.

    Attributes:
      match: the patterns of paths it is for.
      spec: what is done to a leaf; None leaves it dense.
      min_ndim: it is for leaves of at least so many axes,
      min_size: and of at least so many values.
      optional: whether it may match nothing.
    """

    match: tuple[str, ...]
    spec: Spec | None
    min_ndim: int = 0
    min_size: int = 0
    optional: bool = False

    def pattern(self, path: str, leaf: Any) -> str | None:
        """The pattern that a leaf meets, or None.

        Integers, plain values and empty arrays meet none: nothing can be done to them.
        """
        shape = getattr(leaf, "shape", None)
        if shape is None or not jnp.issubdtype(leaf.dtype, jnp.floating) or 0 in shape:
            return None
        if len(shape) < self.min_ndim or math.prod(shape) < self.min_size:
            return None
        return next((p for p in self.match if glob(p).fullmatch(path)), None)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules that can be written as YAML, with conditions on the leaves they are for.

    `jc.compress(params, recipe)` takes one in place of a dict of rules. The first rule that
    matches a leaf wins, and leaves that none matches stay dense.

    ```yaml
    name: mixed
    rules:
      - match: "**/norm*/**"
        dense: true
      - match: ["**/kernel", "**/weight"]
        min_ndim: 2
        chain:
          - prune: {sparsity: 0.5, pattern: "2:4"}
          - quantize: {format: int8, group_size: 64}
      - match: "**/embedding"
        quantize: int8
    ```

    With `shrink: {keep: 0.5, budget: multiplications}` channels are removed before the rules; see
    `Shrink` for how such a recipe is given the function.

    Attributes:
      rules: in order of precedence.
      name: what it is called.
      seed: of the random key for specs that draw, or None.
      shrink: the removal of channels before the rules, or None.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> recipe = jc.Recipe.from_yaml("rules: [{match: '**/kernel', quantize: int8}]")
      >>> params = {"dense": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
      >>> small = jc.compress(params, recipe)
      >>> jax.tree.leaves(small, is_leaf=jc.is_compressed)[1], jc.nbytes(small)
      (QuantizedArray(float32[4, 4], int8), 40)
    """

    rules: tuple[Rule, ...]
    name: str = ""
    seed: int | None = None
    shrink: Shrink | None = None

    @classmethod
    def of(cls, rules: Mapping[str, Spec | None], name: str = "") -> Recipe:
        """The recipe of a dict of rules.

        Examples:
          >>> import jaxcompress as jc
          >>> print(jc.Recipe.of({"**/kernel": jc.Quantize("int4", group_size=64)}).to_yaml())
          rules:
          - match: '**/kernel'
            quantize:
              format: int4
              group_size: 64
          <BLANKLINE>
        """
        return cls(tuple(Rule((pattern,), spec) for pattern, spec in rules.items()), name)

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """A recipe that comes with the package, for the kernels and tables of any model.

        Raises:
          RecipeError: for an unknown name; lists the known ones.
        """
        if name not in PRESETS:
            raise RecipeError(f"no preset {name!r}; write one of {', '.join(PRESETS)}")
        return cls.from_yaml(PRESETS[name], source=f"preset {name}")

    @classmethod
    def from_yaml(cls, text: str, source: str = "recipe") -> Recipe:
        """Reads a recipe from YAML; nothing in it is executed, no tag makes an object.

        Args:
          text: the YAML.
          source: what to call it in errors.

        Raises:
          RecipeError: naming source, line and key.

        Examples:
          >>> import jaxcompress as jc
          >>> jc.Recipe.from_yaml("rules: [{match: '**', quantise: int8}]")
          Traceback (most recent call last):
          ...
          jaxcompress.errors.RecipeError: recipe, line 1, key 'quantise': unknown; did you mean \
'quantize'?
        """
        return _from_document(parse(text, source))

    @classmethod
    def read(cls, source: str | os.PathLike[str]) -> Recipe:
        """A preset by name, a YAML file, or the recipe inside a compressed file.

        Raises:
          RecipeError: when it is none of them.
        """
        if isinstance(source, str) and source in PRESETS:
            return cls.preset(source)
        path = Path(source)
        if not path.is_file():
            raise RecipeError(
                f"no recipe {str(source)!r}: neither a file nor a preset ({', '.join(PRESETS)})"
            )
        if looks_like_safetensors(path):
            return cls.of_file(path)
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path}: no text and so no YAML: {error}") from error
        return cls.from_yaml(text, source=str(path))

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> Recipe:
        """The recipe that made a compressed file, which `save` wrote into it.

        Raises:
          RecipeError: when there is none in the file.
        """
        text = read_recipe(path)
        if text is None:
            raise RecipeError(f"{path}: no recipe was saved in it")
        return cls.from_yaml(text, source=str(path))

    def to_yaml(self) -> str:
        """The recipe as YAML; `from_yaml` gives an equal one.

        Raises:
          RecipeError: for a spec that is not registered.
        """
        document: dict[str, Any] = {}
        if self.name:
            document["name"] = self.name
        if self.seed is not None:
            document["seed"] = self.seed
        if self.shrink is not None:
            document["shrink"] = _shrink_document(self.shrink)
        document["rules"] = [_rule_document(rule) for rule in self.rules]
        return dump(document)

    def match(self, leaves: Sequence[tuple[str, Any]]) -> list[tuple[str, Any] | None]:
        """For each leaf the pattern and spec of its rule, or None.

        Raises:
          RuleError: when a rule that is not optional matches no leaf.
        """
        met = [[rule.pattern(path, leaf) for path, leaf in leaves] for rule in self.rules]
        for rule, patterns in zip(self.rules, met):
            if not rule.optional and not any(patterns):
                self._told(rule, leaves)
        out: list[tuple[str, Any] | None] = []
        for row in range(len(leaves)):
            hits = ((found[row], rule.spec) for rule, found in zip(self.rules, met))
            out.append(next(((p, spec) for p, spec in hits if p is not None), None))
        return out

    def _told(self, rule: Rule, leaves: Sequence[tuple[str, Any]]) -> None:
        paths = [path for path, _ in leaves]
        if not any(glob(p).fullmatch(path) for p in rule.match for path in paths):
            match({rule.match[0]: rule.spec}, paths)  # the error names what is near
        raise RecipeError(
            f"rule {', '.join(map(repr, rule.match))} matches only leaves that it is not for: too "
            f"small (min_ndim {rule.min_ndim}, min_size {rule.min_size}), empty or of integers; "
            "mend it, or write optional: true"
        )

    def key(self) -> jax.Array | None:
        """The random key of the seed."""
        return None if self.seed is None else jax.random.key(self.seed)


def _shrink_document(shrink: Shrink) -> Any:
    values = {
        field.name: getattr(shrink, field.name)
        for field in dataclasses.fields(shrink)
        if field.name == "keep" or getattr(shrink, field.name) != field.default
    }
    if isinstance(shrink.keep, tuple):
        values["keep"] = dict(shrink.keep)
    return values["keep"] if set(values) == {"keep"} and shrink.keep == values["keep"] else values


def _rule_document(rule: Rule) -> dict[str, Any]:
    document: dict[str, Any] = {"match": rule.match[0] if len(rule.match) == 1 else [*rule.match]}
    for name in ("min_ndim", "min_size", "optional"):
        if getattr(rule, name):
            document[name] = getattr(rule, name)
    if rule.spec is None:
        return document | {"dense": True}
    if isinstance(rule.spec, Chain) and len(rule.spec.specs) == 1:
        return document | _spec_document(rule.spec.specs[0])
    if isinstance(rule.spec, Chain):
        return document | {"chain": [_spec_document(spec) for spec in rule.spec.specs]}
    return document | _spec_document(rule.spec)


def _spec_document(spec: Spec) -> dict[str, Any]:
    name = next((name for name, cls in spec_names().items() if cls is type(spec)), None)
    if name is None:
        raise RecipeError(f"{spec!r} has no name for recipes; register it with jc.register_spec")
    values = {}
    for field in dataclasses.fields(spec):  # type: ignore[arg-type]
        value = getattr(spec, field.name)
        if value != field.default:
            values[field.name] = [*value] if isinstance(value, tuple) else value
    first = dataclasses.fields(spec)[0].name  # type: ignore[arg-type]
    if set(values) == {first}:
        return {name: values[first]}
    return {name: values}


_RULE_KEYS = ("match", "min_ndim", "min_size", "optional", "dense", "chain")


def _from_document(node: Node) -> Recipe:
    fields = node.mapping("a recipe is a mapping with the key 'rules'")
    node.only(fields, ("version", "name", "description", "seed", "shrink", "rules"))
    if "version" in fields and fields["version"].whole(1) != 1:
        fields["version"].fail("a recipe of a newer version; update jaxcompress")
    if "rules" not in fields:
        node.fail("write the key 'rules' with a list of rules, perhaps an empty one: rules: []")
    if "description" in fields:
        fields["description"].text()
    return Recipe(
        tuple(_rule(item) for item in fields["rules"].items("write a list of rules")),
        fields["name"].text() if "name" in fields else "",
        fields["seed"].whole(0, 2**32 - 1) if "seed" in fields else None,
        _shrink(fields["shrink"]) if "shrink" in fields else None,
    )


def _shrink(node: Node) -> Shrink:
    if not node.is_mapping():
        return node.tried(lambda: Shrink(node.plain()))
    fields = node.mapping("")
    node.only(fields, tuple(field.name for field in dataclasses.fields(Shrink)))
    values = {name: value.plain() for name, value in fields.items() if not value.is_mapping()}
    if "keep" in fields and fields["keep"].is_mapping():
        shares = fields["keep"].mapping("")
        for pattern, value in shares.items():
            value.tried(functools.partial(glob, pattern))
        values["keep"] = tuple((pattern, value.plain()) for pattern, value in shares.items())
    return node.tried(lambda: Shrink(**values), fields)


def _rule(node: Node) -> Rule:
    fields = node.mapping("a rule is a mapping with the keys 'match' and, say, 'quantize'")
    specs = spec_names()
    node.only(fields, (*_RULE_KEYS, *specs))
    if "match" not in fields:
        node.fail("a rule needs the key 'match' with a pattern such as '**/kernel'")
    patterns = tuple(item.text() for item in fields["match"].one_or_more())
    for pattern in patterns:
        fields["match"].tried(functools.partial(glob, pattern))
    does = [name for name in fields if name in specs or name in ("dense", "chain")]
    if len(does) != 1:
        node.fail(
            f"a rule does one thing, this one {', '.join(does) or 'nothing'}; write one of dense, "
            f"chain, {', '.join(specs)}"
        )
    (action,) = does
    spec: Spec | None = None
    if action == "chain":
        links = fields["chain"].items("write a list of specs")
        parts = [_link(link) for link in links]
        if len(parts) < 2:
            fields["chain"].fail("a chain has two specs or more")
        spec = Chain(tuple(parts))
    elif action != "dense":
        spec = _spec(fields[action], specs[action])
    elif not fields["dense"].flag():
        fields["dense"].fail("write dense: true, or what to do instead")
    return Rule(
        patterns,
        spec,
        fields["min_ndim"].whole(0) if "min_ndim" in fields else 0,
        fields["min_size"].whole(0) if "min_size" in fields else 0,
        fields["optional"].flag() if "optional" in fields else False,
    )


def _link(node: Node) -> Spec:
    fields = node.mapping("a link of a chain is a mapping such as quantize: int8")
    specs = spec_names()
    node.only(fields, tuple(specs))
    if len(fields) != 1:
        node.fail("a link of a chain is one spec; begin each with a dash")
    ((name, value),) = fields.items()
    return _spec(value, specs[name])


def _spec(node: Node, cls: type[Spec]) -> Spec:
    known = dataclasses.fields(cls)  # type: ignore[arg-type]
    if not node.is_mapping():
        first = known[0].name
        return node.tried(lambda: cls(**{first: node.plain()}))
    fields = node.mapping("")
    node.only(fields, tuple(field.name for field in known))
    missing = [
        f.name for f in known
        if f.default is dataclasses.MISSING and f.name not in fields
    ]  # fmt: skip
    if missing:
        node.fail(f"{cls.__name__} needs the key {missing[0]!r}")
    values = {name: value.plain() for name, value in fields.items()}
    return node.tried(lambda: cls(**values), fields)
