"""Chains of teachers: who teaches whom, and going on after a kill with the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.drivers.chain import choose_teacher, distil_chain


def total(tree):
    return sum(float(jnp.sum(x)) for x in jax.tree.leaves(jc.decompress(tree)))


def add_teachers(params, teachers, round):
    """A training whose result tells all that it was given."""
    return jax.tree.map(lambda x: x + sum(map(total, teachers)), params)


def sizes():
    """A chain of descending sizes and other structures."""
    return [{"a": jnp.ones(3), "b": jnp.ones(2)}, {"a": jnp.ones(2)}, [jnp.zeros(1)]]


def test_each_student_learns_from_all_before_it():
    told, seen = [], []

    def train(params, teachers, round):
        told.append(round)
        seen.append([total(t) for t in teachers])
        return add_teachers(params, teachers, round)

    done = [*distil_chain(train, sizes(), teacher=jnp.float32(1.0))]
    # 1; then 5 values of 1 + 1; then 2 of 1 + 11; then one of 0 + 35.
    assert seen == [[1.0], [1.0, 10.0], [1.0, 10.0, 24.0]]
    assert [d.number for d in done] == [0, 1, 2]
    assert float(done[-1].params[0][0]) == 35.0
    assert [(r.number, r.last) for r in told] == [(0, False), (1, False), (2, True)]
    seen.clear()
    [*distil_chain(train, sizes())]
    assert seen[0] == []


def test_a_chain_that_failed_goes_on_with_the_same_bits(tmp_path):
    calls = []

    def train(params, teachers, round, fails_at=None):
        calls.append(round.number)
        if round.number == fails_at:
            raise RuntimeError("out of power")
        return add_teachers(params, teachers, round)

    whole = [*distil_chain(train, sizes(), teacher=jnp.float32(1.0))]
    run = lambda train=train, students=None, teacher=1.0: [
        *distil_chain(train, students or sizes(), teacher=jnp.float32(teacher), folder=tmp_path)
    ]
    calls.clear()
    with pytest.raises(RuntimeError, match="out of power"):
        run(lambda *args: train(*args, fails_at=2))
    assert calls == [0, 1, 2]
    calls.clear()
    resumed = run()
    assert calls == [2]
    assert run(None)[-1].number == 2  # all are read
    for a, b in zip(whole, resumed, strict=True):
        assert a.number == b.number
        jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    others = sizes()
    others[2] = [jnp.ones(1)]
    for other in ({"students": others}, {"students": sizes()[:2]}, {"teacher": 2.0}):
        with pytest.raises(jc.FileError, match="is of a run with other params"):
            run(**other)
    with pytest.raises(jc.FileError, match="driver='distil_chain', not 'choose_teacher'"):
        choose_teacher(train, jnp.ones(2), [1.0], total, folder=tmp_path)
    # A gap ends what is read: what came of the round that is trained anew is not trusted.
    (tmp_path / "round-01.safetensors").unlink()
    calls.clear()
    run()
    assert calls == [1, 2]


def test_students_with_compressed_leaves(tmp_path):
    dense = {"kernel": jax.random.normal(jax.random.key(0), (8, 4)), "bias": jnp.zeros(4)}
    rules = [{"kernel": jc.FakeQuantize(bits)} for bits in ("int8", "int4")]
    students = [jc.compress(dense, rule) for rule in rules]

    def train(params, teachers, round):
        trainable, rest = jc.partition(params)
        return jc.combine(jax.tree.map(lambda x: x * 0.5 + total(teachers[-1]), trainable), rest)

    run = lambda train, students=students: [
        *distil_chain(train, students, teacher=dense, folder=tmp_path)
    ]
    first, again = run(train), run(None)
    for a, b in zip(first, again, strict=True):
        assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
        jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    # The same values in another form are another run.
    with pytest.raises(jc.FileError, match="other params"):
        run(train, students[::-1])


def test_the_teacher_whose_student_is_best(tmp_path):
    calls = []

    def train(params, teacher, round):
        calls.append((round.number, round.last))
        return jax.tree.map(lambda x: x + teacher, params)

    scores = {1.0: 0.3, 2.0: float("nan"), 4.0: 0.9, 8.0: 0.9}
    validate = lambda params: scores[float(params["w"][0])]
    run = lambda **options: choose_teacher(
        train, {"w": np.zeros(2, np.float32)}, [1.0, 2.0, 4.0, 8.0], validate, **options
    )
    found = run(folder=tmp_path)
    assert calls == [(0, False), (1, False), (2, False), (3, True)]
    assert found.number == 2
    assert found.params["w"].tolist() == [4.0, 4.0]
    np.testing.assert_array_equal(found.scores, [0.3, np.nan, 0.9, 0.9])
    (tmp_path / "round-03.safetensors").unlink()
    calls.clear()
    assert run(folder=tmp_path).number == 2
    assert calls == [(3, True)]
    scores.update(dict.fromkeys(scores, float("nan")))
    with pytest.raises(jc.SpecError, match="validate returned NaN"):
        run()


def test_a_training_may_donate_what_it_is_given():
    step = jax.jit(lambda params: params + 1, donate_argnums=0)
    start = jnp.ones(3)
    *_, last = distil_chain(lambda params, teachers, round: step(params), [start, start])
    assert last.params.tolist() == [2, 2, 2]
    assert choose_teacher(lambda p, t, r: step(p), start, [0, 1], total).scores == (6, 6)
    assert not start.is_deleted()


def test_what_is_refused():
    with pytest.raises(jc.SpecError, match=r"students=\[\]"):
        distil_chain(add_teachers, [])
    with pytest.raises(jc.SpecError, match=r"teachers=\[\]"):
        choose_teacher(add_teachers, jnp.ones(1), [], total)
    wrong = distil_chain(lambda params, teachers, round: params[:1], [jnp.ones(3)])
    with pytest.raises(jc.SpecError, match="another tree in round 0"):
        next(wrong)
