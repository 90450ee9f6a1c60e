"""A second reader of the files of jaxcompress, written from docs/file-format.md alone.

It shares no code with the package and is slow and short on purpose: what `read` makes of a file
shows that the page says enough. It gives the tensors by name, not the tree that they belong to.
"""

import io
import json
import math
import zlib
from pathlib import Path

import constriction
import ml_dtypes
import numpy as np

START = b'{"__metadata__":{"jaxcompress.checksum":"'
CHUNK = 2**18
OCTAVE = (256, 279, 304, 332, 362, 395, 431, 470)
PRIOR = (1, 1, 4, 4, 16, 16, 64, 64)
NEAR = (0, 2, 0, 2, 0, 2, 0, 2)
KINDS = {"BOOL": "bool", "F": "float", "BF": "bfloat", "I": "int", "U": "uint", "C": "complex"}


def read(path):
    """Return every tensor of the file by name, decoded where it is entropy-coded."""
    content = Path(path).read_bytes()
    header, offset = read_header(content)
    metadata = json.loads(header.pop("__metadata__")["jaxcompress"])
    expect(metadata["version"] == 2, "version is not 2")
    nodes, tensors = dict(arrays(metadata["tree"])), {}
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    expect(len(entries) == len(metadata["crc32"]), "not one CRC-32 for each tensor")
    for (name, entry), crc in zip(entries, metadata["crc32"]):
        start, stop = entry["data_offsets"]
        data = content[offset + start : offset + stop]
        expect(f"{zlib.crc32(data):08x}" == crc, f"CRC-32 of {name} does not match")
        tensors[name] = read_tensor(data, entry, nodes.get(name, {}))
    return tensors


def expect(condition, message):
    if not condition:
        raise ValueError(message)


def read_header(content):
    """Return the checked header and the place at which the tensors begin."""
    end, at = 8 + int.from_bytes(content[:8], "little"), len(START)
    text = content[8:end]
    checksum = f"{zlib.crc32(START + b'0' * 8 + text[at + 8 :]):08x}"
    expect(text.startswith(START + checksum.encode()), "checksum of the header does not match")
    return json.loads(text), end


def arrays(node):
    """Yield the name and the node of each tensor of the tree."""
    if node and "array" in node:
        yield node["array"], node
    elif node and "value" not in node:
        children = node.get("list") or node.get("tuple") or node.get("children", {}).values()
        for child in [*children, *(child for _, child in node.get("dict", []))]:
            yield from arrays(child)


def read_tensor(data, entry, node):
    """Return a tensor from its bytes, its entry in the header and its node in the tree."""
    letters = entry["dtype"].rstrip("0123456789")
    name = node.get("dtype", KINDS[letters] + entry["dtype"][len(letters) :])
    dtype = np.dtype(getattr(ml_dtypes, name, name)).newbyteorder("<")
    if "coded" not in node:
        return np.frombuffer(data, dtype).reshape(entry["shape"])
    decoders = {"planes": planes, "fields": fields, "columns": columns, "densities": densities}
    coded, data = dict(node["coded"]), io.BytesIO(data)
    array = decoders[coded.pop("as")](data, node["shape"], dtype, **coded)
    expect(data.read() == b"", "too many bytes")
    return array.view(dtype).reshape(node["shape"])


def number(data):
    return int.from_bytes(data.read(4), "little")


def chunks(data, n, size=CHUNK):
    """Yield the start and the coder of each chunk, which is empty after its last symbol."""
    for start in range(0, n, size):
        words = np.frombuffer(data.read(4 * number(data)), "<u4").astype(np.uint32)
        coder = constriction.stream.stack.AnsCoder(words)
        yield start, coder
        expect(coder.is_empty(), "a chunk has more than its symbols")


def decode(coder, weights, amount):
    """Decode symbols that have the same weights."""
    return coder.decode(constriction.stream.model.Categorical(weights, perfect=False), amount)


def stream(content, n):
    """Return the n symbols of a stream."""
    data, symbols = io.BytesIO(content), np.zeros(n, np.uint8)
    kind = data.read(1)[0] if n else 0
    if kind == 0:
        expect(data.readinto(symbols) == n, "a stream has less than its symbols")
    elif kind == 1:
        (symbols[:],) = set(data.read(4 * -(-n // CHUNK)))  # a ValueError for two of them
    elif kind == 2:
        static(data, symbols)
    else:
        adaptive(data, symbols, data.read(1)[0])
    expect(not data.read(), "a stream has more than its symbols")
    return symbols


def static(data, symbols):
    """Fill in symbols that have the weights of a table."""
    first, last = data.read(2)
    steps, levels = np.zeros(last - first + 1, np.uint8), np.zeros(256, np.uint8)
    adaptive(data, steps, 0)
    levels[first : last + 1] = np.cumsum(steps)
    weights = [OCTAVE[(q - 1) % 8] * 2.0 ** ((q - 1) // 8) if q else 0.0 for q in levels.tolist()]
    names = np.flatnonzero(levels) if np.count_nonzero(levels) <= 128 else np.arange(256)
    for t, coder in chunks(data, len(symbols)):
        chunk = symbols[t : t + CHUNK]
        chunk[:] = names[decode(coder, np.array(weights)[names], len(chunk))]


def adaptive(data, symbols, prior):
    """Fill in symbols that have the weights of what came before."""
    counts = np.zeros(256)
    for t, coder in chunks(data, len(symbols)):
        end = min(t + CHUNK, len(symbols))
        while t < end:
            block = symbols[t : min(end, t + max(16, t // 32), t + CHUNK)]
            near = NEAR[prior] * (np.roll(counts, 1) + np.roll(counts, -1))
            block[:] = decode(coder, 16 * counts + PRIOR[prior] + near, len(block))
            counts += np.bincount(block, minlength=256)
            t += len(block)


def planes(data, shape, dtype):
    """Return an array from a stream for each byte of an item."""
    n, size = math.prod(shape), dtype.itemsize
    if size == 1:
        return stream(data.read(), n)
    items = np.stack([stream(data.read(number(data)), n) for _ in range(size)], axis=1)
    if "float" in dtype.name:
        items = items.view(f"<u{size}")
        items = (items >> items.dtype.type(1)) | (items << items.dtype.type(8 * size - 1))
    return items


def fields(data, shape, dtype, bits, axis, length, block):
    """Return packed codes from a stream of the codes."""
    p, q = 8 // math.gcd(bits, 8), bits // math.gcd(bits, 8)
    others = np.delete(shape, axis)
    codes = stream(data.read(), math.prod(shape) // q * p).reshape(-1, *others)
    words = []
    for start in range(0, len(codes), block):
        code = codes[start : start + block].reshape(p, 1, -1, *others)
        word = np.unpackbits(code, axis=1, count=bits, bitorder="little").reshape(q, 8, -1, *others)
        words.append(np.packbits(word, axis=1, bitorder="little").reshape(-1, *others))
    return np.moveaxis(np.concatenate(words), 0, axis)


def columns(data, shape, dtype, width, size, bits, entries):
    """Return a stored mask from a stream of its bits, column by column."""
    n = math.prod(shape[:-1]) * size
    mask = np.unpackbits(stream(data.read(), -(-n // 8)), count=n, bitorder="little")
    return stored(mask.reshape(width, -1).T, size, bits, entries)


def densities(data, shape, dtype, width, size, bits, entries):
    """Return a stored mask from the density of its rows and columns."""
    rows, step = math.prod(shape[:-1]) * size // width, max(1, CHUNK // width)
    lengths = number(data), number(data)
    of_row, of_column = (stream(data.read(m), n) for m, n in zip(lengths, (rows, width)))
    share = np.frombuffer(data.read(64), "<u2").astype(np.float64)
    mask, bit = np.zeros((rows, width), np.uint8), np.arange(256)[:, None] >> np.arange(8) & 1
    for row, coder in chunks(data, rows, step):
        classes = of_row[row : row + step, None] + of_column
        for k in np.unique(classes):
            weights, n = np.ones(256), np.count_nonzero(classes == k)
            for ones in bit.T:
                weights = weights * np.where(ones, share[k], 65536 - share[k]) / 65536
            symbols = decode(coder, weights, -(-n // 8)).astype(np.uint8)
            part = np.unpackbits(symbols, count=n, bitorder="little")
            mask[row : row + step][classes == k] = part
    return stored(mask, size, bits, entries)


def stored(mask, size, bits, entries):
    """Return the bytes of the mask of each weight of a stack, as bits or as gaps."""
    mask, escape = mask.reshape(-1, size), 2**bits - 1
    if bits:
        codes = np.full((len(mask), entries), escape)
        for row, kept in zip(codes, mask):
            zeros = np.diff(np.flatnonzero(kept), prepend=-1) - 1
            row[np.cumsum(zeros // escape + 1) - 1] = zeros % escape
        mask = (codes[:, :, None] >> np.arange(bits) & 1).reshape(len(mask), -1).astype(np.uint8)
    return np.packbits(mask, axis=1, bitorder="little")
