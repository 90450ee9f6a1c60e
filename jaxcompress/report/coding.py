"""What the indices, masks and gaps of a tree take under three entropy coders."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxcompress.arrays.base import is_compressed
from jaxcompress.arrays.bits import period
from jaxcompress.arrays.layout import Fields, Layout, Mask
from jaxcompress.checkpoint.encoder import Encoder
from jaxcompress.checkpoint.entropy import categorical
from jaxcompress.checkpoint.streams import encode_array, unpack_fields
from jaxcompress.errors import CompressError
from jaxcompress.rules import flatten
from jaxcompress.tables import Tabular, size_text

if TYPE_CHECKING:  # rich is imported when a table is drawn, not with the package
    from rich.table import Table

CODERS = ("huffman", "range", "ans")


class Stream(NamedTuple):
    """Symbols as a coder has them.

    Attributes:
      words: uint32, the codes.
      bits: how many of their bits are codes; the others fill the last word.
      table: uint8, one entry a symbol of the alphabet: the length of its code for `huffman`, else
        its frequency, `1 + 8 log2(count)`, 0 for none.
    """

    words: np.ndarray
    bits: int
    table: np.ndarray

    @property
    def total(self) -> int:
        """The bits of codes and table."""
        return self.bits + 8 * self.table.size


def encode_symbols(symbols: Any, alphabet: int, coder: str) -> Stream:
    """Codes a sequence of symbols under their own frequencies.

    Args:
      symbols: whole numbers from 0 to `alphabet - 1`.
      alphabet: how many different ones there may be.
      coder: `huffman`, `range` or `ans`, all of `constriction`.

    Returns:
      The `Stream`. A sequence of one symbol, or none, takes no codes.

    Raises:
      CompressError: for an unknown coder, or symbols outside of the alphabet.

    References:
      Huffman, *A Method for the Construction of Minimum-Redundancy Codes*, 1952; Martin, *Range
      encoding: an algorithm for removing redundancy from a digitised message*, 1979; Duda,
      *Asymmetric numeral systems*, 2013; Bamler, *Understanding Entropy Coding With Asymmetric
      Numeral Systems (ANS): a Statistician's Perspective*, 2022.

    Examples:
      >>> stream = encode_symbols([0, 1, 0, 2, 0, 0, 1, 0], 3, "huffman")
      >>> stream.bits, stream.table.tolist()
      (11, [1, 2, 2])
    """
    symbols = np.asarray(symbols).reshape(-1)
    if not symbols.size:
        symbols = symbols.astype(np.int32)  # an empty list is one of floats to numpy
    if coder not in CODERS:
        raise CompressError(f"coder={coder!r}: write one of {', '.join(CODERS)}")
    if symbols.size and not 0 <= symbols.min() <= symbols.max() < alphabet:
        raise CompressError(f"symbols lie outside of 0 to {alphabet - 1}")
    counts = np.bincount(symbols, minlength=alphabet)
    table = _lengths(counts) if coder == "huffman" else _levels(counts)
    if np.count_nonzero(counts) < 2:
        return Stream(np.zeros(0, np.uint32), 0, table)
    wide = symbols.astype(np.int32)
    words = _huffman(wide, counts) if coder == "huffman" else _arithmetic(wide, table, coder)
    bits = int(np.dot(counts, table)) if coder == "huffman" else 32 * words.size
    return Stream(words, bits, table)


def decode_symbols(stream: Stream, counts: Any, n: int, coder: str) -> np.ndarray:
    """Undoes `encode_symbols`.

    Args:
      stream: what it gave.
      counts: how often each symbol occurs, for `huffman`, whose tree is built of them; a file would
        have the canonical tree of the lengths. Not looked at by the others.
      n: how many symbols there are.
      coder: as there.

    Returns:
      int64 `[n]`.

    Examples:
      >>> stream = encode_symbols([2, 0, 1, 1, 1], 3, "ans")
      >>> decode_symbols(stream, None, 5, "ans").tolist()
      [2, 0, 1, 1, 1]
    """
    import constriction

    used = np.flatnonzero(stream.table)
    if used.size < 2:
        return np.full(n, used[0] if used.size else 0, np.int64)
    if coder == "huffman":
        weights = np.asarray(counts)[used].astype(np.float64)
        tree = constriction.symbol.huffman.DecoderHuffmanTree(weights)
        decoder = constriction.symbol.QueueDecoder(stream.words)
        found = np.array([decoder.decode_symbol(tree) for _ in range(n)], np.int64)
    elif coder == "range":
        found = constriction.stream.queue.RangeDecoder(stream.words).decode(_model(stream.table), n)
    else:
        found = constriction.stream.stack.AnsCoder(stream.words).decode(_model(stream.table), n)
    return used[np.asarray(found, np.int64)]


def _levels(counts: np.ndarray) -> np.ndarray:
    """Counts on a grid of eighths of an octave, as in a file; 0 for none."""
    octaves = np.log2(np.maximum(counts, 1))
    octaves = np.maximum(0, octaves - max(0.0, octaves.max(initial=0) - 31))
    return np.where(counts > 0, 1 + np.rint(8 * octaves), 0).astype(np.uint8)


def _model(table: np.ndarray) -> Any:
    return categorical(2.0 ** ((table[table > 0].astype(np.float64) - 1) / 8))


def _ranked(symbols: np.ndarray, used: np.ndarray, alphabet: int) -> np.ndarray:
    """The number of each symbol among those that are used."""
    rank = np.zeros(alphabet, np.int32)
    rank[used] = np.arange(used.size, dtype=np.int32)
    return rank[symbols]


def _arithmetic(symbols: np.ndarray, table: np.ndarray, coder: str) -> np.ndarray:
    import constriction

    ranked = _ranked(symbols, np.flatnonzero(table), table.size)
    if coder == "range":
        encoder = constriction.stream.queue.RangeEncoder()
        encoder.encode(ranked, _model(table))
    else:
        encoder = constriction.stream.stack.AnsCoder()
        encoder.encode_reverse(ranked, _model(table))
    return np.asarray(encoder.get_compressed(), np.uint32)


def _tree(counts: np.ndarray) -> tuple[np.ndarray, Any]:
    import constriction

    used = np.flatnonzero(counts)
    weights = counts[used].astype(np.float64)
    return used, constriction.symbol.huffman.EncoderHuffmanTree(weights)


def _huffman(symbols: np.ndarray, counts: np.ndarray) -> np.ndarray:
    import constriction

    used, tree = _tree(counts)
    encoder = constriction.symbol.QueueEncoder()
    for symbol in _ranked(symbols, used, counts.size).tolist():
        encoder.encode_symbol(symbol, tree)
    return np.asarray(encoder.get_compressed()[0], np.uint32)


def _lengths(counts: np.ndarray) -> np.ndarray:
    """The bits of each symbol's code; 0 for symbols that do not occur, 1 for a lone one."""
    import constriction

    out = np.zeros(counts.size, np.uint8)
    if np.count_nonzero(counts) < 2:
        return (counts > 0).astype(np.uint8)
    used, tree = _tree(counts)
    for i, symbol in enumerate(used):
        encoder = constriction.symbol.QueueEncoder()
        encoder.encode_symbol(i, tree)
        out[symbol] = encoder.get_compressed_and_bitrate()[1]
    return out


@dataclasses.dataclass(frozen=True)
class CodedSizes(Tabular):
    """A table of what the integers of a tree take; prints in a terminal, shows in a notebook.

    Attributes:
      rows: one dict an array: `path` with its child, as in a file; `symbols`, how many; `alphabet`,
        how many different ones there may be; and in bits `stored` as it is in memory, `entropy`,
        `huffman`, `range` and `ans` with their tables, and `file`, what `save(coded=True)` takes.
    """

    rows: list[dict[str, Any]]

    def total(self, name: str) -> int | float:
        """The sum of one column."""
        return sum(row[name] for row in self.rows)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        names = ("stored", "entropy", *CODERS, "file")
        table = Table(title="coded")
        table.add_column("array", overflow="fold")
        for name in ("symbols", *names):
            table.add_column(name, justify="right")
        size = lambda bits: size_text(math.ceil(bits / 8))
        for row in self.rows:
            sizes = [size(row[name]) for name in names]
            table.add_row(Text(row["path"]), f"{row['symbols']} of {row['alphabet']}", *sizes)
        table.add_section()
        table.add_row("total", "", *(size(self.total(name)) for name in names), style="bold")
        return table

    def __repr__(self) -> str:
        stored, file = (size_text(math.ceil(self.total(x) / 8)) for x in ("stored", "file"))
        return f"CodedSizes({len(self.rows)} arrays, {stored} -> {file})"


def coded_sizes(tree: Any) -> CodedSizes:
    """What each array of whole numbers in a tree's leaves takes, coded by itself.

    Codes, indices, bit masks and gaps are read one by one, without the padding of their packing.
    `entropy` is n times the entropy of their frequencies; no code of single symbols under fixed
    frequencies is shorter. Huffman's spends up to a bit a symbol more, which is much where one is
    frequent, as in a mask. What a file takes may be less, as its models see more than frequencies.

    Args:
      tree: any pytree of arrays and leaves. An array that occurs at several places counts once.

    Returns:
      A `CodedSizes`, to print or to read row by row.

    References:
      Han, Mao and Dally, *Deep Compression*, 2016 (Huffman coding of indices and gaps); Shannon,
      *A Mathematical Theory of Communication*, 1948.

    Examples:
      >>> import jax, jaxcompress as jc
      >>> w = jax.random.normal(jax.random.key(0), (64, 64))
      >>> table = coded_sizes({"w": jc.Codebook(4)(w)})
      >>> row = table.rows[0]
      >>> row["path"], row["symbols"], row["stored"]
      ('w.indices.words', 4096, 16384)
      >>> row["entropy"] <= row["ans"] < row["huffman"] < row["stored"]
      True
    """
    dense = {path for path, leaf in flatten(tree)[0] if not is_compressed(leaf)}
    sink = _Sink([], dense)
    Encoder(sink).encode(tree)
    return CodedSizes(sink.rows)


@dataclasses.dataclass
class _Sink:
    """Takes the arrays of a tree as a file does; those of `dense` paths are no codes."""

    rows: list[dict[str, Any]]
    dense: set[str]

    def put(self, name: str, array: Any, layout: Layout | None, held: bool) -> dict[str, Any]:
        host = np.asarray(array)
        if host.dtype.kind in "iu" and name.rstrip("'") not in self.dense:
            self.rows.append(_row(name, host, layout))
        return {}


def _row(name: str, array: np.ndarray, layout: Layout | None) -> dict[str, Any]:
    symbols, alphabet = _symbols(array, layout)
    counts = np.bincount(symbols, minlength=alphabet)
    shares = counts[counts > 0] / max(1, symbols.size)
    found = encode_array(array, layout)
    sizes = {c: encode_symbols(symbols, alphabet, c).total for c in ("range", "ans")}
    # As many as are coded, without coding them one by one.
    lengths = _lengths(counts)
    several = np.count_nonzero(counts) > 1
    sizes["huffman"] = 8 * alphabet + (int(np.dot(counts, lengths)) if several else 0)
    return {
        "path": name,
        "symbols": int(symbols.size),
        "alphabet": alphabet,
        "stored": 8 * array.nbytes,
        "entropy": float(-symbols.size * np.sum(shares * np.log2(shares))) + 0.0,
        **sizes,
        "file": 8 * (array.nbytes if found is None else len(found[1])),
    }


def _symbols(array: np.ndarray, layout: Layout | None) -> tuple[np.ndarray, int]:
    """The whole numbers in an array from 0 on, and how many different ones there may be."""
    if isinstance(layout, Mask):
        bits = max(1, layout.bits)
        layout = Fields(bits, -1, layout.entries if layout.bits else layout.size, period(bits)[0])
    if isinstance(layout, Fields):
        rest = array.size // max(1, array.shape[layout.axis])
        codes = unpack_fields(array, layout).reshape(-1, max(1, rest))[: layout.length]
        return codes.reshape(-1), 2**layout.bits
    if array.dtype.itemsize == 1:
        return array.reshape(-1).view(np.uint8), 256
    values, inverse = np.unique(array, return_inverse=True)
    return inverse.reshape(-1), max(1, values.size)
