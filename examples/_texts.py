"""English text without labels: lists of words, a list for each document, paragraph or page."""

from __future__ import annotations

import bz2
import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

from assets import fetch

Text = list[list[str]]

# What is no prose in the source of an article: comments, references, formulas, tables.
_NO_PROSE = re.compile(
    r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<math.*?</math>|\{\|.*?\|\}", re.DOTALL
)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_OUTSIDE = re.compile(r"\[\S+ ?([^\]]*)\]")
_MARKS = re.compile(r"<[^>]*>|'{2,}")


def news() -> Text:
    """The 300 Lee background documents: news, like the test documents, but others."""
    text = (fetch("similarity") / "lee_background.cor").read_text("latin-1")
    return [line.split() for line in text.splitlines()]


def brown(length: int = 100) -> Text:
    """The Brown corpus in runs of words, without its tags."""
    files = sorted(fetch("brown").glob("c???"))
    words = [word.rpartition("/")[0] for file in files for word in file.read_text().split()]
    words = [{"``": '"', "''": '"'}.get(word, word) for word in words if word]
    return [words[i : i + length] for i in range(0, len(words), length)]


def wikipedia(least: int = 20) -> Text:
    """Paragraphs of a hundred articles of Wikipedia of 2012, those of `least` words or more."""
    (file,) = fetch("similarity").glob("enwiki*.bz2")
    with bz2.open(file) as source:
        lines = (line for article in _articles(source) for line in _prose(article).splitlines())
        texts = [html.unescape(line).split() for line in lines if line[:1].isalpha()]
    return [words for words in texts if len(words) >= least]


def _articles(source: bz2.BZ2File) -> Iterator[str]:
    for _, element in ElementTree.iterparse(source):
        text = element.text or ""
        if element.tag.endswith("}text") and not text.upper().startswith("#REDIRECT"):
            yield text


def _prose(article: str) -> str:
    """An article without its markup, as far as training on it asks for."""
    text, found = _NO_PROSE.sub("", article), 1
    while found:  # Templates hold templates.
        text, found = _TEMPLATE.subn("", text)
    return _MARKS.sub("", _OUTSIDE.sub(r"\1", _LINK.sub(r"\1", text)))
