"""Early-bird tickets against the published procedure, as a queue of masks in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.drivers import early_bird, mask_distance


def queue(stream, window, epsilon):
    """Whether each mask of a stream draws the ticket, by a first-in-first-out queue."""
    recent, out = [], []
    for mask in stream:
        recent = [*recent, mask][-window:]
        full = len(recent) == window
        far = [np.mean(recent[-1] != other) for other in recent[:-1]]
        out.append((full and max(far) <= epsilon, max(far) if full else 1.0))
    return out


@pytest.mark.parametrize(("window", "epsilon"), [(5, 0.1), (2, 0.25)])
def test_a_stream_that_settles_in_one_scan(window, epsilon):
    rng = np.random.default_rng(0)
    stream, mask = [], rng.random(40) < 0.5
    for n in range(30):  # ever fewer flips, and once more many
        flips = rng.random(40) < (0.6 if n in (0, 1, 2, 20) else 0.01)
        mask = mask ^ flips
        stream.append(mask)
    bird = early_bird(window, epsilon)
    masks = [
        {"w": jnp.asarray(m[:30]).reshape(5, 6), "v": m[30:], "b": optax.MaskedNode()}
        for m in stream
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *masks)

    def step(state, masks):
        state = bird.update(masks, state)
        return state, (state.drawn, state.distance)

    _, (drawn, distance) = jax.jit(lambda m: jax.lax.scan(step, bird.init(masks[0]), m))(stacked)
    expected = queue(stream, window, epsilon)
    assert drawn.tolist() == [d for d, _ in expected]
    np.testing.assert_allclose(distance, [x for _, x in expected], rtol=1e-6)
    assert True in drawn.tolist()
    assert drawn.tolist().index(True) >= window - 1
    assert not drawn[20]


bits = st.lists(st.booleans(), min_size=12, max_size=12).map(np.array)


@settings(max_examples=20)
@given(bits, bits, bits)
def test_the_distance_is_a_metric(a, b, c):
    far = lambda x, y: float(mask_distance({"w": x[:8], "v": x[8:]}, {"w": y[:8], "v": y[8:]}))
    assert far(a, a) == 0
    assert far(a, b) == far(b, a) == pytest.approx(np.mean(a != b), rel=1e-6)
    assert far(a, c) <= far(a, b) + far(b, c) + 1e-6
    assert far(a, ~a) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("masks", [{}, {"w": optax.MaskedNode()}])
def test_trees_without_masks_are_at_no_distance(masks):
    bird = early_bird(2)
    state = bird.update(masks, bird.init(masks))
    assert (float(state.distance), bool(state.drawn)) == (1, False)  # not full
    state = bird.update(masks, state)
    assert (float(state.distance), bool(state.drawn)) == (0, True)


def test_errors():
    with pytest.raises(jc.SpecError, match="window=1: write"):
        early_bird(1)
    with pytest.raises(jc.SpecError, match="epsilon=2: write"):
        early_bird(3, 2)
    with pytest.raises(jc.SpecError, match="of different trees"):
        mask_distance({"w": jnp.ones(3, bool)}, {"w": jnp.ones(4, bool)})
    assert float(mask_distance({"w": optax.MaskedNode()}, {"w": optax.MaskedNode()})) == 0
