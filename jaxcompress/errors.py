"""What `jaxcompress` raises: one base class, so that a caller can catch it all."""


class CompressError(ValueError):
    """Something about the input cannot be compressed, run or read; says what to write instead."""


class RuleError(CompressError):
    """A rule matches nothing, or what it matches cannot take its spec."""


class SpecError(CompressError):
    """A spec is impossible, or does not fit the leaf it was given."""


class ValuesNeededError(SpecError):
    """A spec must read the values of its leaf, which inside of jit it cannot."""


class RecipeError(RuleError):
    """A recipe is no YAML, or says something that is not known; names the line and the key."""


class FileError(CompressError):
    """A file is truncated, damaged, not ours, or needs a leaf type that is not registered."""
