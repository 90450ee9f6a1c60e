"""Losses against torchdistill's, where it is installed (`pip install --no-deps torchdistill`).

Left out: its similarity-preserving loss divides rows by their sums where the paper divides by their
lengths; its PKT adds 1e-7 and has each example among its neighbours.
"""

import jax
import numpy as np
import pytest

from jaxcompress import distillation as d

torch = pytest.importorskip("torch")
mid_level = pytest.importorskip(
    "torchdistill.losses.mid_level", reason="pip install --no-deps torchdistill"
)

S, T = jax.random.normal(jax.random.key(0), (2, 12, 10)) * 2
MAPS = jax.random.normal(jax.random.key(1), (4, 6, 5, 5, 8))  # two layers of each, NHWC


def io(x, path="layer"):
    """What torchdistill's losses are given, channels first."""
    x = torch.tensor(np.asarray(x, np.float64))
    return {path: {"output": x.permute(0, 3, 1, 2) if x.ndim == 4 else x}}


def theirs(name, student, teacher, *args, **kwargs):
    loss = getattr(mid_level, name)(*args, **kwargs)
    return float(loss(io(student), io(teacher)))


ENDS = ("layer", "output", "layer", "output")
PAIR = {"pair": {
    "student": {"path": "layer", "io": "output"}, "teacher": {"path": "layer", "io": "output"},
}}  # fmt: skip
GAUSSIAN = {"type": "gaussian", "gamma": 0.4, "max_p": 2}
N = len(S)


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (lambda: d.forward_kl(S, T, temperature=4.0).mean(),
         lambda: theirs("KDLoss", S, T, *ENDS, temperature=4.0, alpha=0.0)),
        # It has the factor T**2, which is left to the user here.
        (lambda: 9 * d.dist(S, T, temperature=3.0).mean(),
         lambda: theirs("DISTLoss", S, T, *ENDS, tau=3.0)),
        # Its means are over all pairs and triples, those of equal examples too, which are zero.
        (lambda: d.rkd_distance(S, T).mean() * (N - 1) / N,
         lambda: theirs("RKDLoss", S, T, "layer", "layer", 1.0, 0.0, "mean")),
        (lambda: d.rkd_angle(S, T).mean() * (N - 1) * (N - 2) / N**2,
         lambda: theirs("RKDLoss", S, T, "layer", "layer", 0.0, 1.0, "mean")),
        # It takes unit vectors, and the norm where the paper has its square.
        (lambda: d.correlation_congruence(S, T, gamma=0.4, order=2).mean(),
         lambda: (theirs("CCKDLoss", unit(S), unit(T), "layer", "layer", GAUSSIAN, "sum") / N) ** 2),
        # It averages over pairs where the paper sums, and has the examples themselves among them.
        (lambda: d.attention_transfer(*MAPS[:2]).mean(),
         lambda: theirs("ATLoss", *MAPS[:2], PAIR, "paper")),
        (lambda: d.attention_transfer(*MAPS[:2], squared=True).mean() / 25,
         lambda: theirs("ATLoss", *MAPS[:2], PAIR, "code")),
        (lambda: d.activation_boundaries(*MAPS[:2], margin=0.5).mean() * 5 * 5 * 8,
         lambda: theirs("AltActTransferLoss", *MAPS[:2], PAIR, 0.5, "mean")),
    ],
    ids=["kl", "dist", "rkd-d", "rkd-a", "cc", "at", "at-squared", "ab"],
)  # fmt: skip
def test_values(ours, expected):
    # Sums of some hundred float32 terms: 1e-5 is a hundred of their roundings.
    np.testing.assert_allclose(float(ours()), expected(), rtol=1e-5)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_flow_matrices():
    at = lambda x: torch.tensor(np.asarray(x, np.float64)).permute(0, 3, 1, 2)
    found = mid_level.FSPLoss.compute_fsp_matrix(at(MAPS[0]), at(MAPS[1]))
    np.testing.assert_allclose(d.fsp_matrix(MAPS[0], MAPS[1]), found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_factor_transfer(p):
    loss = mid_level.FTLoss(p=p, reduction="sum")
    found = loss(io(MAPS[0], "translator"), io(MAPS[1], "paraphraser"))
    np.testing.assert_allclose(d.factor_transfer(*MAPS[:2], p=p).sum(), float(found), rtol=1e-5)
