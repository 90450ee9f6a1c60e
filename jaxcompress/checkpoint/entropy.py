"""Bytes in close to as many bits as they have entropy: an asymmetric numeral system over a model.

The coder is `constriction`'s; what is decided here is the model. Each stream takes whichever is
the smallest of

- `RAW`: the bytes themselves;
- `CONSTANT`: one value;
- `STATIC`: the frequencies of all values, rounded to eighths of an octave, before the codes;
- `ADAPTIVE`: no frequencies; they are counted from what was decoded so far. A block is a part in 32
  of it, so that a stream of n bytes changes its model some 32 log(n) times.

All models are ratios of whole numbers, so that every machine computes the same ones. Codes come in
chunks of `CHUNK` symbols with their length before them: memory stays small, and since each chunk
takes four bytes or more, a stream cannot promise more than 65,536 times its own bytes.
`docs/file-format.md` has the layout.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxcompress.errors import FileError

# A `constriction.stream.model.Categorical`; constriction is imported when something is coded.
Model = Any

RAW, CONSTANT, STATIC, ADAPTIVE = range(4)
CHUNK = 1 << 18
# A block of the adaptive model has so many symbols, or such a part of those before it.
_FIRST, _SHARE = 16, 32
_PIECE = 1 << 16
_UNIT = 16  # how much one symbol counts against the prior
_PRIORS = tuple(itertools.product((1, 4, 16, 64), (0, 2)))  # (of every symbol, of its neighbours)
_OCTAVE = (256, 279, 304, 332, 362, 395, 431, 470)  # 256 * 2**(k/8)
_LOWEST = 2.0**-24  # the coder's least probability


def encode_bytes(symbols: np.ndarray) -> bytes:
    """The shortest of the codings of a uint8 vector; its length is not part of it.

    Examples:
      >>> import numpy as np
      >>> coded = encode_bytes(np.zeros(1000, np.uint8))
      >>> len(coded), decode_bytes(coded, 1000).tolist() == [0] * 1000
      (5, True)
    """
    symbols = np.ascontiguousarray(symbols, np.uint8)
    n = symbols.size
    if not n:
        return b""
    blocks = list(_blocks(n))
    histograms = np.stack([_histogram(symbols[start:stop]) for start, stop in blocks])
    counts = histograms.sum(axis=0)
    if np.count_nonzero(counts) == 1:
        return bytes([CONSTANT]) + bytes([int(symbols[0])]) * (4 * -(-n // CHUNK))
    levels = _levels(counts)
    table = _encode_table(levels)
    kind, prior = _smallest(n, histograms, len(table) + _nbytes(counts, _frequencies(levels)))
    if kind == RAW:
        return _raw(symbols)
    if kind == ADAPTIVE:
        models = _adaptive_models(blocks, iter(histograms), *_PRIORS[prior])
        coded = bytes([ADAPTIVE, prior]) + _encode(symbols, models)
    else:
        values, model = _static_model(levels)
        ranked = symbols
        if values is not None:
            rank = np.zeros(256, np.uint8)
            rank[values] = np.arange(values.size)
            ranked = rank[symbols]
        each = ((*chunk, model) for chunk in _chunks(n))
        coded = bytes([STATIC]) + table + _encode(ranked, each)
    return coded if len(coded) <= n else _raw(symbols)  # the sizes were estimates


def _raw(symbols: np.ndarray) -> bytes:
    return bytes([RAW]) + symbols.tobytes()


def _smallest(n: int, histograms: np.ndarray, static: float) -> tuple[int, int]:
    """The kind of the shortest coding, and the prior of an adaptive one."""
    chunks = 8 * -(-n // CHUNK)  # a count of words, and what is left of the last one
    before = np.cumsum(histograms, axis=0) - histograms
    adaptive = [1 + _adaptive_nbytes(histograms, before, *prior) for prior in _PRIORS]
    prior = int(np.argmin(adaptive))
    # Half a percent is not worth the time to decode it, nor a thousandth that of counting along.
    sizes = {RAW: 0.995 * n, STATIC: 0.999 * (static + chunks), ADAPTIVE: adaptive[prior] + chunks}
    return min(sizes, key=sizes.__getitem__), prior


def decode_bytes(data: bytes | memoryview, n: int) -> np.ndarray:
    """Undoes `encode_bytes`: n symbols, uint8.

    Raises:
      FileError: when `data` is no coding of n symbols.
    """
    reader = Bytes(data)
    out = reader.symbols(n)
    reader.finish()
    return out


class Bytes:
    """Takes coded parts off the front of some bytes."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)

    def take(self, n: int) -> memoryview:
        """The next n bytes."""
        if n > len(self._data):
            raise FileError(f"a coded stream ends {n - len(self._data)} bytes too early")
        taken, self._data = self._data[:n], self._data[n:]
        return taken

    def number(self) -> int:
        """The next four bytes as a number."""
        return int(struct.unpack("<I", self.take(4))[0])

    def words(self) -> np.ndarray:
        """The coder's words of one chunk, with their count before them."""
        return np.frombuffer(self.take(4 * self.number()), "<u4").astype(np.uint32)

    def symbols(self, n: int) -> np.ndarray:
        """The next n symbols, as `encode_bytes` wrote them."""
        if not n:
            return np.zeros(0, np.uint8)
        kind = self.take(1)[0]
        if kind == RAW:
            return np.frombuffer(self.take(n), np.uint8)
        # What the stream promises is bounded by what it holds, before anything is allocated.
        if kind not in (CONSTANT, STATIC, ADAPTIVE):
            raise FileError(f"a coded stream is of the unknown kind {kind}")
        least = 4 * -(-n // CHUNK)
        if len(self._data) < least:
            raise FileError(f"a coded stream is too short to hold {n} symbols")
        if kind == CONSTANT:
            values = self.take(least)
            if values.tobytes() != bytes(values[:1]) * least:
                raise FileError("a coded stream is damaged: its one value is not one")
            return np.full(n, values[0], np.uint8)
        if kind == STATIC:
            return self._static(n, *_static_model(_decode_table(self)))
        prior = self.take(1)[0]
        if prior >= len(_PRIORS):
            raise FileError(f"a coded stream names the unknown prior {prior}")
        return self._adaptive(n, *_PRIORS[prior])

    def _static(self, n: int, values: np.ndarray | None, model: Model) -> np.ndarray:
        out = np.empty(n, np.uint8)
        for start, stop in _chunks(n):
            coder = Decoder(self.words())
            symbols = coder.decode(model, stop - start)
            out[start:stop] = symbols if values is None else np.take(values, symbols)
            coder.finish()
        return out

    def _adaptive(self, n: int, prior: int, near: int) -> np.ndarray:
        out = np.empty(n, np.uint8)
        counts = np.zeros(256, np.int64)
        coder = None
        for start, stop in _blocks(n):
            if start % CHUNK == 0:
                if coder is not None:
                    coder.finish()
                coder = Decoder(self.words())
            assert coder is not None  # the first block starts at zero
            model = _model(_weights(counts, prior, near))
            out[start:stop] = coder.decode(model, stop - start)
            counts += _histogram(out[start:stop])
        if coder is not None:
            coder.finish()
        return out

    def finish(self) -> None:
        """Refuses what is left over."""
        if len(self._data):
            raise FileError(f"a coded stream holds {len(self._data)} bytes too many")


class Decoder:
    """`constriction`'s coder, whose complaints become `FileError`s."""

    def __init__(self, words: np.ndarray) -> None:
        import constriction

        try:
            self._coder = constriction.stream.stack.AnsCoder(words)
        except ValueError as error:
            raise FileError(f"a coded stream is damaged: {error}") from error

    def decode(self, model: Model, n: int) -> np.ndarray:
        """The next n symbols."""
        return self._coder.decode(model, n)

    def finish(self) -> None:
        """Refuses a coder that has not come back to where the encoder began."""
        if not self._coder.is_empty():
            raise FileError("a coded stream is damaged: its codes do not end where they should")


class Coded(NamedTuple):
    """Symbols and the model that codes them."""

    symbols: np.ndarray
    model: Model


def encode_words(parts: Iterable[Coded]) -> bytes:
    """One chunk: the parts in order, coded backwards, with the count of words before them."""
    import constriction

    coder = constriction.stream.stack.AnsCoder()
    wide = np.empty(_PIECE, np.int32)  # what the coder takes, as much as stays in the cache
    for symbols, model in reversed(list(parts)):
        for start in reversed(range(0, symbols.size, _PIECE)):
            piece = symbols[start : start + _PIECE]
            wide[: piece.size] = piece
            coder.encode_reverse(wide[: piece.size], model)
    words = coder.get_compressed()
    return struct.pack("<I", words.size) + words.astype("<u4").tobytes()


def _encode(symbols: np.ndarray, models: Iterable[tuple[int, int, Model]]) -> bytes:
    parts = itertools.groupby(models, key=lambda block: block[0] // CHUNK)
    return b"".join(
        encode_words([Coded(symbols[start:stop], model) for start, stop, model in blocks])
        for _, blocks in parts
    )


def _chunks(n: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n, CHUNK):
        yield start, min(n, start + CHUNK)


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    """The runs of symbols that share one adaptive model; none crosses a chunk."""
    start = 0
    while start < n:
        size = max(_FIRST, start // _SHARE)
        stop = min(n, start + size, (start // CHUNK + 1) * CHUNK)
        yield start, stop
        start = stop


def _histogram(symbols: np.ndarray) -> np.ndarray:
    """How often each symbol occurs in a block."""
    if symbols.size < 1 << 14:
        return np.bincount(symbols, minlength=256)
    # Two at a time: bincount widens its input, and half as many take half the time.
    even = symbols.size // 2 * 2
    square = np.bincount(symbols[:even].view(np.uint16), minlength=1 << 16).reshape(256, 256)
    odd = np.bincount(symbols[even:], minlength=256)
    return square.sum(axis=0) + square.sum(axis=1) + odd


def _nbytes(counts: np.ndarray, weights: np.ndarray) -> float:
    """The bytes of symbols under a model, but for what the coder adds."""
    with np.errstate(divide="ignore"):
        bits = -np.log2(np.maximum(weights / weights.sum(), _LOWEST))
    return float(np.dot(counts, bits)) / 8


def _weights(counts: np.ndarray, prior: int, near: int) -> np.ndarray:
    """Frequencies expected after some counts: neighbouring values may count as well."""
    weights = _UNIT * counts + prior
    if near:
        weights = weights + near * (np.roll(counts, 1, axis=-1) + np.roll(counts, -1, axis=-1))
    return weights


def _adaptive_nbytes(histograms: np.ndarray, before: np.ndarray, prior: int, near: int) -> float:
    """As `_nbytes`, each block under the model of all counts before it."""
    weights = _weights(before, prior, near)
    shares = np.maximum(weights / weights.sum(axis=1, keepdims=True), _LOWEST)
    return -float(np.sum(histograms * np.log2(shares))) / 8


def _adaptive_models(
    blocks: list[tuple[int, int]], histograms: Iterator[np.ndarray], prior: int, near: int
) -> Iterator[tuple[int, int, Model]]:
    counts = np.zeros(256, np.int64)
    for (start, stop), histogram in zip(blocks, histograms):
        yield start, stop, _model(_weights(counts, prior, near))
        counts = counts + histogram


def _model(weights: np.ndarray) -> Model:
    return categorical(weights.astype(np.float64))


def categorical(weights: np.ndarray) -> Model:
    """A model of float64 weights that need not add up to one; at least two of them."""
    import constriction

    try:
        return constriction.stream.model.Categorical(weights, perfect=False)
    except ValueError as error:
        raise FileError(f"a coded stream is damaged: {error}") from error


def _levels(counts: np.ndarray) -> np.ndarray:
    """Frequencies on a grid of eighths of an octave: 0 for none, `1 + 8 log2(count)` else."""
    octaves = np.log2(np.maximum(counts, 1))
    octaves = np.maximum(0, octaves - max(0.0, octaves.max() - 31))  # 31 octaves fit into a byte
    return np.where(counts > 0, 1 + np.rint(8 * octaves), 0).astype(np.uint8)


def _frequencies(levels: np.ndarray) -> np.ndarray:
    """What the levels stand for, as whole numbers."""
    octave, step = np.divmod(np.maximum(levels.astype(np.int64), 1) - 1, 8)
    return np.where(levels > 0, np.asarray(_OCTAVE)[step] << octave, 0)


def _static_model(levels: np.ndarray) -> tuple[np.ndarray | None, Model]:
    """The model of some levels, and the values that it numbers: None for all 256.

    A search among half as many values is one step shorter.
    """
    values = np.flatnonzero(levels).astype(np.uint8)
    if values.size > 128:
        return None, _model(_frequencies(levels))
    return values, _model(_frequencies(levels)[values])


def _encode_table(levels: np.ndarray) -> bytes:
    """Levels from the first to the last that is not zero: as differences, adaptively."""
    used = np.flatnonzero(levels)
    first, last = int(used[0]), int(used[-1])
    steps = np.diff(levels[first : last + 1], prepend=np.uint8(0))  # modulo 256
    blocks = list(_blocks(steps.size))
    histograms = iter([_histogram(steps[start:stop]) for start, stop in blocks])
    return bytes([first, last]) + _encode(steps, _adaptive_models(blocks, histograms, 1, 0))


def _decode_table(reader: Bytes) -> np.ndarray:
    first, last = reader.take(2)
    if first > last:
        raise FileError("a coded stream is damaged: its table of frequencies is empty")
    levels = np.zeros(256, np.uint8)
    steps = reader._adaptive(last - first + 1, 1, 0)
    levels[first : last + 1] = np.cumsum(steps, dtype=np.uint8)
    if np.count_nonzero(levels) < 2:
        raise FileError("a coded stream is damaged: its table of frequencies has no two values")
    return levels
