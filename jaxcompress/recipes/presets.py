"""Recipes by name, for the kernels and tables of any model, whatever it calls them.

All leave dense what is small or has one axis (biases, norms), and norms that a scan has stacked.
"""

from __future__ import annotations

_NORMS = """
  - match: ["**/*norm*/**", "**/*norm*", "**/*Norm*/**", "**/*Norm*", "**/*_ln/**", "**/*_ln",
            "**/ln*/**", "**/bn*/**", "**/scale", "**/bias", "**/mean", "**/var"]
    optional: true
    dense: true
"""
_WEIGHTS = """
  - match: "**"
    min_ndim: 2
    min_size: 1024
    {spec}
"""
# Under a hundredth of a transformer's weights, but every token meets them.
_POSITIONS = """
  - match: ["**/*position*/**", "**/*position*", "**/*pos_emb*/**", "**/*pos_emb*", "**/wpe/**",
            "**/*token_type*/**"]
    min_ndim: 2
    min_size: 1024
    optional: true
    quantize: {format: int8, group_size: 64}
"""


def _preset(name: str, spec: str, before: str = "") -> str:
    return f"name: {name}\nrules:{_NORMS}{before}{_WEIGHTS.format(spec=spec)}"


_SPECS = {
    "int8": ("quantize: int8", ""),
    "int8-g64": ("quantize: {format: int8, group_size: 64}", ""),
    "int8-g32": ("quantize: {format: int8, group_size: 32}", ""),
    "int4-g64": ("quantize: {format: int4, group_size: 64, convention: full}", _POSITIONS),
    "int4-g32": ("quantize: {format: int4, group_size: 32, convention: full}", _POSITIONS),
    "uint4-g32": ("quantize: {format: uint4, group_size: 32, symmetric: false}", _POSITIONS),
    "codebook6": ("codebook: {bits: 6, iterations: 20}", _POSITIONS),
    "sparse50-int8": (
        "chain: [{prune: 0.5}, {quantize: {format: int8, group_size: 64}}]",
        _POSITIONS,
    ),
    "sparse2:4-int8": (
        'chain: [{prune: {sparsity: 0.5, pattern: "2:4"}}, '
        "{quantize: {format: int8, group_size: 64}}]",
        _POSITIONS,
    ),
}

# `lossless` compresses nothing: what it makes smaller is the coding of the file.
PRESETS = {"lossless": "name: lossless\nrules: []\n"} | {
    name: _preset(name, *parts) for name, parts in _SPECS.items()
}
