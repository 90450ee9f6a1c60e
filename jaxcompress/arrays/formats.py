"""What the codes of a quantized weight stand for: integers, small floats, powers of two, tables.

A format turns values that were divided by their scale into codes, and codes back into values; both
are arithmetic on bits, or selections, and no look-up, so that they are vector code everywhere.

Sources: Micikevicius et al., "FP8 Formats for Deep Learning" (2022); Open Compute Project, "OCP
Microscaling Formats (MX) Specification" (2023); Dettmers et al., "QLoRA" (2023), for nf4.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.errors import SpecError
from jaxcompress.numerics import exponent_of, power_of_two, stochastic_round


@dataclasses.dataclass(frozen=True)
class Format:
    """What all formats have.

    Attributes:
      name: as `code_format` reads it.
      bits: bits of a code.
      signed: whether there are negative values.
    """

    name: str
    bits: int
    signed: bool

    @property
    def extent(self) -> float:
        """The largest magnitude of a value."""
        raise NotImplementedError

    @property
    def dtype(self) -> np.dtype:
        """The dtype that holds unpacked codes."""
        return np.dtype(np.uint8)

    @property
    def has_zero(self) -> bool:
        """Whether zero is a value, so that a pruned weight stays zero."""
        return True

    def encode(self, x: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """The codes of the nearest values of float32 `x`, beyond the range the outermost.

        Halfway between two values it is the one whose code is even, and of two powers of two the
        larger. With noise, uniform in [0, 1), one of the two neighbours, such that the mean is x.
        """
        raise NotImplementedError

    def decode(self, codes: jax.Array) -> jax.Array:
        """The values of codes, float32."""
        raise NotImplementedError

    def values(self) -> np.ndarray:
        """The values of all codes that occur, rising, float32."""
        with jax.ensure_compile_time_eval():
            values = np.asarray(self.decode(jnp.arange(2**self.bits, dtype=self.dtype)))
        return np.unique(values[np.abs(values) <= self.extent])

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class IntFormat(Format):
    """Integers of `bits` bits.

    Attributes:
      narrowed: whether the least code is left out, as ternary codes have it.
      fraction: of fixed-point numbers the bits behind the point; their scale is `2**-fraction`.

    Examples:
      >>> IntFormat.of(4, True).qmin, IntFormat.of(4, True).qmax, str(IntFormat.of(8, False))
      (-8, 7, 'uint8')
    """

    narrowed: bool = False
    fraction: int | None = None

    @classmethod
    def of(cls, bits: int, signed: bool) -> IntFormat:
        """The plain integers."""
        return cls(f"{'' if signed else 'u'}int{bits}", bits, signed)

    @property
    def qmin(self) -> int:
        """The least code."""
        return self.narrowed - (2 ** (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The greatest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def extent(self) -> float:
        return float(max(-self.qmin, self.qmax))

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int8 if self.signed else np.uint8)

    def encode(self, x: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        x = jnp.clip(x, self.qmin, self.qmax)
        return round_codes(x, noise).astype(self.dtype)

    def decode(self, codes: jax.Array) -> jax.Array:
        return codes.astype(jnp.float32)

    def values(self) -> np.ndarray:
        return np.arange(self.qmin, self.qmax + 1, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class MiniFloat(Format):
    """Floating-point numbers of a sign, `exponent` and `mantissa` bits, with subnormal numbers.

    A code is sign, exponent, mantissa, from the highest bit. Without a mantissa the values are
    zero and powers of two.

    Attributes:
      exponent: bits of the exponent.
      mantissa: bits of the mantissa.
      least: the exponent of the least normal number, `1 - bias`.
      largest: the largest finite value.

    Examples:
      >>> code_format("fp4_e2m1").values().tolist()[7:]
      [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
      >>> code_format("pow2_3").values().tolist()
      [-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0]
    """

    exponent: int
    mantissa: int
    least: int
    largest: float

    @classmethod
    def of(cls, name: str, exponent: int, mantissa: int, bias: int, largest: float) -> MiniFloat:
        """A signed format with the exponent bias of its specification."""
        bits = 1 + exponent + mantissa
        return cls(name, bits, True, exponent, mantissa, 1 - bias, largest)

    @property
    def extent(self) -> float:
        return self.largest

    def encode(self, x: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        size = jnp.minimum(jnp.abs(x), self.largest)
        # The steps between values are `2**(e - mantissa)` from `2**e` to twice that, and do not
        # shrink below `2**least`.
        step = power_of_two(jnp.maximum(exponent_of(size), self.least) - self.mantissa)
        units = size / step  # exact: a power of two
        whole = jnp.round(units) if noise is None else stochastic_round(units, noise)
        size = jnp.minimum(whole * step, self.largest)
        normal = (lax.bitcast_convert_type(size, jnp.int32) >> (23 - self.mantissa)) - (
            (126 + self.least) << self.mantissa
        )
        below = (size * 2.0 ** (self.mantissa - self.least)).astype(jnp.int32)
        code = jnp.where(size < 2.0**self.least, below, normal)
        sign = (lax.bitcast_convert_type(x, jnp.uint32) >> 31).astype(jnp.int32)
        sign = jnp.where(code == 0, 0, sign)  # one zero, so that equal values have equal codes
        return (code | (sign << (self.bits - 1))).astype(jnp.uint8)

    def decode(self, codes: jax.Array) -> jax.Array:
        codes = codes.astype(jnp.int32)
        size = codes & (2 ** (self.bits - 1) - 1)
        normal = lax.bitcast_convert_type(
            (size + ((126 + self.least) << self.mantissa)) << (23 - self.mantissa), jnp.float32
        )
        below = size.astype(jnp.float32) * 2.0 ** (self.least - self.mantissa)
        value = jnp.where(size < 2**self.mantissa, below, normal)
        return jnp.where(codes >> (self.bits - 1) == 1, -value, value)


@dataclasses.dataclass(frozen=True)
class TableFormat(Format):
    """A few values, rising.

    Attributes:
      table: the values of codes 0, 1, 2 and so on.
    """

    table: tuple[float, ...]

    @property
    def extent(self) -> float:
        return max(-self.table[0], self.table[-1])

    @property
    def has_zero(self) -> bool:
        return 0.0 in self.table

    def encode(self, x: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        values = np.asarray(self.table, np.float32)
        code = jnp.zeros(x.shape, jnp.int32)
        if noise is None:
            for i, middle in enumerate((values[1:] + values[:-1]) / np.float32(2)):
                beyond = x > middle if i % 2 == 0 else x >= middle  # halfway: the even code
                code = code + beyond.astype(jnp.int32)
            return code.astype(jnp.uint8)
        x = jnp.clip(x, values[0], values[-1])
        for low, high in itertools.pairwise(values):
            code = code + (x >= low + noise * (high - low)).astype(jnp.int32) * (x > low)
        return code.astype(jnp.uint8)

    def decode(self, codes: jax.Array) -> jax.Array:
        level = [jnp.float32(v) for v in self.table]
        for bit in range(self.bits):  # a tree of selections
            odd = (codes >> bit) & 1 == 1
            level = [jnp.where(odd, b, a) for a, b in zip(level[::2], level[1::2])]
        return level[0]


# The quantiles of a normal distribution between -1 and 1, zero among them, as published.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

_NAMED: dict[str, Format] = {
    f.name: f
    for f in (
        MiniFloat.of("fp8_e4m3", 4, 3, 7, 448.0),
        MiniFloat.of("fp8_e5m2", 5, 2, 15, 57344.0),
        MiniFloat.of("fp6_e2m3", 2, 3, 1, 7.5),
        MiniFloat.of("fp6_e3m2", 3, 2, 3, 28.0),
        MiniFloat.of("fp4_e2m1", 2, 1, 1, 6.0),
        TableFormat("nf4", 4, True, _NF4),
        TableFormat("binary", 1, True, (-1.0, 1.0)),
        IntFormat("ternary", 2, True, narrowed=True),
    )
}

NAMES = "int1 to int8, uint1 to uint8, pow2_2 to pow2_8, fixed<bits>.<fraction>, " + ", ".join(
    _NAMED
)


@functools.lru_cache(maxsize=1024)
def _parsed(name: str) -> Format | None:
    if name in _NAMED:
        return _NAMED[name]
    if match := re.fullmatch(r"(u?)int([1-8])", name):
        return IntFormat.of(int(match[2]), not match[1])
    if match := re.fullmatch(r"pow2_([2-8])", name):
        bits = int(match[1])
        least = -(2 ** (bits - 1) - 2)  # so that the largest is one
        return MiniFloat(name, bits, True, bits - 1, 0, least, 1.0)
    if match := re.fullmatch(r"fixed([2-8])\.(\d{1,2})", name):
        return IntFormat(name, int(match[1]), True, fraction=int(match[2]))
    return None


def code_format(name: str | Format) -> Format:
    """The format of a name.

    - `int1` to `int8` and `uint1` to `uint8`: integers;
    - `fixed<bits>.<fraction>`, such as `fixed8.5`: integers with the scale `2**-fraction`;
    - `binary`: -1 and 1, one bit; `ternary`: -1, 0 and 1, two bits;
    - `pow2_2` to `pow2_8`: zero and powers of two, down from 1;
    - `fp8_e4m3`, `fp8_e5m2`, `fp6_e2m3`, `fp6_e3m2`, `fp4_e2m1`: small floating-point numbers;
    - `nf4`: 16 quantiles of the normal distribution.

    Raises:
      SpecError: for any other name.

    Examples:
      >>> code_format("int4").extent, code_format("fp8_e4m3").extent, code_format("nf4").bits
      (8.0, 448.0, 4)
    """
    if isinstance(name, Format):
        return name
    found = _parsed(name)
    if found is None:
        raise SpecError(f"unknown format {name!r}: write one of {NAMES}")
    return found


def int_format(name: str | Format) -> IntFormat:
    """The integer format of a name.

    Raises:
      SpecError: for a name of no integer format.

    Examples:
      >>> int_format("int4").qmax
      7
    """
    found = code_format(name)
    if not isinstance(found, IntFormat):
        raise SpecError(f"{found} has no integer codes: write one such as int4 or uint8")
    return found


def round_codes(x: jax.Array, noise: jax.Array | None = None) -> jax.Array:
    """`round(x)` modulo 256 as int32, halves to even, for `|x| < 2**22`; with noise at random.

    At `1.5 * 2**23` float32 holds just the integers, so that the addition rounds, and the low bits
    of the sum are those of the integer. XLA's own conversion to an integer checks for NaN and
    range, which took a quarter of the loop's time.
    """
    if noise is not None:
        x = stochastic_round(x, noise)
    return lax.bitcast_convert_type(x + jnp.float32(1.5 * 2**23), jnp.int32)
