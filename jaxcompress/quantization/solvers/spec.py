"""`GPTQ`, `AdaRound` and `SignRound` on the leaves of a tree, and what such specs share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax

from jaxcompress.arrays.affine import int_format
from jaxcompress.errors import SpecError
from jaxcompress.layerwise.folding import Folding
from jaxcompress.layerwise.hessian import Solution
from jaxcompress.layerwise.leaf import SolverSpec, quantized_leaf
from jaxcompress.quantization.solvers.adaround import Learning
from jaxcompress.quantization.solvers.adaround import solve as learn
from jaxcompress.quantization.solvers.gptq import Options, check_tries, solve
from jaxcompress.quantization.spec import Quantize, check_quantize
from jaxcompress.specs import LeafContext, is_count, is_number, register_spec


@dataclasses.dataclass(frozen=True, repr=False)
class LayerSpec(SolverSpec, Quantize):
    """A `Quantize` whose codes are chosen by the Gram matrix of the inputs that meet the leaf."""

    looked_up: ClassVar[str] = "nothing can make up for its rounding; write Quantize instead"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_quantize(self.plain(), type(self).__name__)

    def plain(self) -> Quantize:
        """The format alone, as the solvers take it."""
        names = [field.name for field in dataclasses.fields(Quantize)]
        return Quantize(**{name: getattr(self, name) for name in names})


@functools.partial(jax.jit, static_argnums=(2, 3))
def codes_alone(w: jax.Array, gram: jax.Array, options: Options, run: int) -> Solution:
    """`solve` without the error, which takes as long as a fifth of the rest."""
    return solve(w, gram, options, run)._replace(error=None)


@register_spec("gptq")
@dataclasses.dataclass(frozen=True, repr=False)
class GPTQ(LayerSpec):
    """Codes that later weights have made up for, so that the outputs of the layer change little.

    The solver is `jaxcompress.quantization.solvers.gptq`, on the Gram matrix of the inputs that
    `observe` saw meet the leaf. The outcome is the `QuantizedArray` that `Quantize` stores.

    Args:
      format: as in `Quantize`, like all that follow up to `scale_group_size`.
      group_size: weights that share a scale along the last input axis.
      axis: must be None: scales are shared along the inputs.
      symmetric: whether zero is the middle of the range.
      scale_dtype: the dtype of scales.
      convention: how the symmetric scale follows from the range.
      estimator: how the range follows from the weights.
      rounding: must be `nearest`.
      scale_format: must be None, like the next.
      scale_group_size: see `scale_format`.
      act_order: whether inputs are taken by decreasing diagonal of the Gram matrix.
      tries: how many narrower ranges are tried for each group.
      block_size: inputs in a block; a matter of speed.
      damping: the share of the mean diagonal that is added to the Gram matrix.

    Raises:
      SpecError: for values that cannot be; when it is called without statistics that fit.

    References:
      Frantar, Ashkboos, Hoefler and Alistarh, *GPTQ: Accurate Post-Training Quantization for
      Generative Pre-trained Transformers*, 2023.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.quantization.solvers import GPTQ
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> batches = [jax.random.normal(jax.random.key(1), (64, 16))]
      >>> stats = jc.observe(fn, params, batches, ("gram",))
      >>> jc.compress(params, {"kernel": GPTQ("int4", group_size=8)}, stats=stats)
      {'kernel': QuantizedArray(float32[16, 8], int4/8)}
    """

    _: dataclasses.KW_ONLY
    act_order: bool = False
    tries: int = 0
    block_size: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.options()

    def options(self) -> Options:
        """What the solver is asked for."""
        return Options(self.plain(), self.act_order, self.block_size, self.damping, self.tries)

    def solved(self, w: jax.Array, gram: jax.Array, how: Folding, context: LeafContext) -> Any:
        """The leaf of the codes."""
        found = codes_alone(w, gram, self.options(), how.inputs[-1])
        return quantized_leaf(found, how, self.plain())


@dataclasses.dataclass(frozen=True, repr=False)
class _Learned(LayerSpec):
    _: dataclasses.KW_ONLY
    tries: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        int_format(self.format)
        self.learning()
        check_tries(self.tries)

    def learning(self) -> Learning:
        """How it is learned."""
        raise NotImplementedError

    def solved(self, w: jax.Array, gram: jax.Array, how: Folding, context: LeafContext) -> Any:
        """The leaf of the codes."""
        options = Options(self.plain(), tries=self.tries)
        found = learn(w, gram, options, self.learning(), how.inputs[-1])
        return quantized_leaf(found, how, self.plain())


@register_spec("adaround")
@dataclasses.dataclass(frozen=True, repr=False)
class AdaRound(_Learned):
    """Learns to round up or down so that the outputs of the layer change little.

    The solver is `jaxcompress.quantization.solvers.adaround`, on the Gram matrix of the inputs that
    `observe` saw meet the leaf. The outcome is the `QuantizedArray` that `Quantize` stores.

    Args:
      format: an integer format; as in `Quantize`, like all that follow up to `scale_group_size`.
      group_size: weights that share a scale along the last input axis.
      axis: must be None: scales are shared along the inputs.
      symmetric: whether zero is the middle of the range.
      scale_dtype: the dtype of scales.
      convention: how the symmetric scale follows from the range.
      estimator: how the range follows from the weights.
      rounding: must be `nearest`.
      scale_format: must be None, like the next.
      scale_group_size: see `scale_format`.
      tries: how many narrower ranges are tried for each group.
      steps: of Adam.
      learning_rate: of Adam.
      strength: of the regularizer.

    Raises:
      SpecError: for values that cannot be; when it is called without statistics that fit.

    References:
      Nagel et al., *Up or Down? Adaptive Rounding for Post-Training Quantization*, 2020.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.quantization.solvers import AdaRound
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> batches = [jax.random.normal(jax.random.key(1), (64, 16))]
      >>> stats = jc.observe(fn, params, batches, ("gram",))
      >>> jc.compress(params, {"kernel": AdaRound("int4", steps=100)}, stats=stats)
      {'kernel': QuantizedArray(float32[16, 8], int4)}
    """

    _: dataclasses.KW_ONLY
    steps: int = 1000
    learning_rate: float = 0.03
    strength: float = 3.0

    def learning(self) -> Learning:
        """How it is learned."""
        if not is_number(self.strength, 0):
            raise SpecError(f"strength={self.strength!r}: write a number of at least 0")
        return Learning("adaround", self.steps, self.learning_rate, self.strength)


@register_spec("signround")
@dataclasses.dataclass(frozen=True, repr=False)
class SignRound(_Learned):
    """Learns an offset before rounding by signs of gradients, in the metric of the outputs.

    The solver is `jaxcompress.quantization.solvers.signround`; all else is as in `AdaRound`.

    Args:
      format: an integer format; as in `AdaRound`, like all that follow.
      group_size: weights that share a scale along the last input axis.
      axis: must be None.
      symmetric: whether zero is the middle of the range.
      scale_dtype: the dtype of scales.
      convention: how the symmetric scale follows from the range.
      estimator: how the range follows from the weights.
      rounding: must be `nearest`.
      scale_format: must be None, like the next.
      scale_group_size: see `scale_format`.
      tries: how many narrower ranges are tried for each group.
      steps: how many.
      learning_rate: the first rate; None: `1 / steps`.

    Raises:
      SpecError: as `AdaRound`.

    References:
      Cheng et al., *Optimize Weight Rounding via Signed Gradient Descent for the Quantization of
      LLMs*, 2023.

    Examples:
      >>> import jaxcompress as jc
      >>> from jaxcompress.quantization.solvers import SignRound
      >>> SignRound("int4", group_size=32, steps=100)
      SignRound('int4', group_size=32, steps=100)
    """

    _: dataclasses.KW_ONLY
    steps: int = 200
    learning_rate: float | None = None

    def learning(self) -> Learning:
        """How it is learned."""
        fits = is_count(self.steps, 1)
        rate = self.learning_rate if self.learning_rate is not None or not fits else 1 / self.steps
        return Learning("signround", self.steps, rate, 0.0)  # type: ignore[arg-type]
