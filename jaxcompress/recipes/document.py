"""YAML with the place of everything kept, so that an error can name its line and key."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import yaml

from jaxcompress.errors import CompressError, RecipeError

T = TypeVar("T")
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}


class Node:
    """A place in a YAML text, under some key."""

    def __init__(self, node: yaml.Node, source: str, key: str = "") -> None:
        self._node = node
        self._source = source
        self._key = key

    def fail(self, text: str) -> NoReturn:
        """Raises an error that names source, line and key."""
        where = f"{self._source}, line {self._node.start_mark.line + 1}"
        raise RecipeError(f"{where}{f', key {self._key!r}' if self._key else ''}: {text}")

    def is_mapping(self) -> bool:
        """Whether it is a mapping."""
        return isinstance(self._node, yaml.MappingNode)

    def mapping(self, expected: str) -> dict[str, Node]:
        """Its values by their keys, which are texts and each there once."""
        self._standard("tag:yaml.org,2002:map", yaml.MappingNode, expected)
        out: dict[str, Node] = {}
        for key, value in self._node.value:
            if not isinstance(key, yaml.ScalarNode):
                Node(key, self._source).fail("a key is a plain word")
            if key.value in out:
                Node(key, self._source, key.value).fail("comes twice; which one counts?")
            out[key.value] = Node(value, self._source, key.value)
            out[key.value].line_of_key = key
        return out

    line_of_key: yaml.Node | None = None

    def only(self, fields: Mapping[str, Node], known: Sequence[str]) -> None:
        """Refuses other keys, and names the one that was perhaps meant."""
        for name, value in fields.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"write one of {', '.join(known)}"
                Node(value.line_of_key or value._node, self._source, name).fail(f"unknown; {hint}")

    def items(self, expected: str) -> list[Node]:
        """Its items."""
        self._standard("tag:yaml.org,2002:seq", yaml.SequenceNode, expected)
        plain = lambda item: isinstance(item, yaml.ScalarNode)
        return [Node(x, self._source, self._key if plain(x) else "") for x in self._node.value]

    def one_or_more(self) -> list[Node]:
        """Its items, or itself as the only one."""
        if not isinstance(self._node, yaml.SequenceNode):
            return [self]
        return self.items("") or self.fail("an empty list matches nothing; write a pattern")

    def _standard(self, tag: str, kind: type[yaml.Node], expected: str) -> None:
        if not isinstance(self._node, kind):
            self.fail(expected)
        if self._node.tag != tag:
            self.fail(f"the tag {self._node.tag!r} would make an object; write plain values")

    def plain(self) -> Any:
        """Its value: a number, a text, true or false, null, or a list of such, as a tuple."""
        if isinstance(self._node, yaml.SequenceNode):
            return tuple(item._scalar() for item in self.items(""))
        return self._scalar()

    def _scalar(self) -> Any:
        if not isinstance(self._node, yaml.ScalarNode):
            self.fail("write a plain value here, a number or a word")
        if self._node.tag not in _PLAIN:
            self.fail(f"the tag {self._node.tag!r} would make an object; write a plain value")
        try:
            return yaml.constructor.SafeConstructor().construct_object(self._node)
        except (yaml.YAMLError, ValueError) as error:
            self.fail(f"no plain value: {error}")

    def text(self) -> str:
        """Its text."""
        value = self._scalar()
        return value if isinstance(value, str) else self.fail(f"write a text, not {value!r}")

    def flag(self) -> bool:
        """Its truth."""
        value = self._scalar()
        return value if isinstance(value, bool) else self.fail(f"write true or false, not {value}")

    def whole(self, least: int, most: int | None = None) -> int:
        """Its whole number."""
        value = self._scalar()
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.fail(f"write a whole number of at least {least}, not {value!r}")
        if most is not None and value > most:
            self.fail(f"write a whole number of at most {most}")
        return value

    def tried(self, make: Callable[[], T], fields: Mapping[str, Node] | None = None) -> T:
        """What `make` gives; its complaint is placed at the key that it names first."""
        try:
            return make()
        except (CompressError, TypeError) as error:
            told = str(error)
            found = [(told.find(name), name) for name in fields or {} if name in told]
            place = (fields or {})[min(found)[1]] if found else self
            place.fail(told)


def parse(text: str, source: str) -> Node:
    """The one document of a YAML text.

    Raises:
      RecipeError: when it is no YAML, or empty.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{source}{line}: no YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{source}: no YAML: {error or 'nested too deeply'}") from error
    if node is None:
        raise RecipeError(f"{source}: empty; write the key 'rules' with a list of rules")
    return Node(node, source)


def dump(document: Mapping[str, Any]) -> str:
    """Plain YAML, keys in their order."""
    text = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True, width=100)
    if yaml.safe_load(text) == document:
        return text
    # Some line ends of Unicode would be read as spaces.
    return yaml.safe_dump(dict(document), sort_keys=False, width=100)
