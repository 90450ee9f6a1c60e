"""Students that become teachers, and teachers chosen by how well their students do."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from jaxcompress.arrays.base import is_compressed
from jaxcompress.drivers.rounds_folder import RoundsFolder, fingerprint
from jaxcompress.drivers.trees import as_jax, checked, copied
from jaxcompress.errors import SpecError
from jaxcompress.progress import progress_bar


class ChainRound(NamedTuple):
    """What a training is told.

    Attributes:
      number: 0 to the number of students less one.
      last: whether it is the last student.
    """

    number: int
    last: bool


class DistilledRound(NamedTuple):
    """One student of a chain.

    Attributes:
      number: 0 to the number of students less one.
      params: trained. The driver teaches the next with them: copy what is to be donated.
    """

    number: int
    params: Any


class ChosenTeacher(NamedTuple):
    """What `choose_teacher` found.

    Attributes:
      number: the place of the best teacher.
      params: of its student, trained.
      scores: of the students of all teachers.
    """

    number: int
    params: Any
    scores: tuple[float, ...]


def distil_chain(
    train: Callable[[Any, tuple[Any, ...], ChainRound], Any],
    students: Sequence[Any],
    *,
    teacher: Any = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Iterator[DistilledRound]:
    """Trains students one after the other, each with those before it as teachers.

    - Born-again networks: students of one size and different random weights. The last one, or the
      mean of all (`jaxcompress.distillation.teacher_ensemble`), is the result.
    - Teacher assistants: students in descending order of size, so that no step is too large.
    - A trained model and students that are ever more compressed: trees of `jaxcompress.compress`.

    Args:
      train: `train(params, teachers, round) -> params`: the user's own training. `teachers` has the
        given teacher, if any, and all students before this one, the newest last; it is empty for
        a first student that learns from labels alone. It returns the params in their structure.
      students: a tree for each, before training; they may differ in structure and shapes, and
        hold compressed leaves.
      teacher: the params of a trained teacher; None: the first student has none.
      folder: where each student is kept once it is trained. A run that was killed is begun again by
        the same call: it reads the students up to the first that is not there, trains the others,
        and yields the same bits, if `train` gives the same ones.
      progress: show a progress bar on standard error.

    Yields:
      Each student when it is trained, or read from the folder.

    Raises:
      SpecError: for no students, a training that returns another tree, and with a folder for a leaf
        that cannot be kept.
      FileError: for a folder with rounds of other params, a link, or a damaged file.

    References:
      Furlanello et al., *Born-Again Neural Networks*, 2018; Mirzadeh et al., *Improved Knowledge
      Distillation via Teacher Assistant*, 2020.

    Examples:
      >>> import jax.numpy as jnp
      >>> train = lambda params, teachers, round: params + sum(jnp.sum(t) for t in teachers)
      >>> for done in distil_chain(train, [jnp.ones(2), jnp.zeros(1)], teacher=jnp.ones(3)):
      ...     print(done.number, done.params)
      0 [4. 4.]
      1 [11.]
    """
    students = _students(students)
    stores: list[RoundsFolder | None] = [None] * len(students)
    if folder is not None:
        settings = {
            "driver": "distil_chain",
            "params": list(map(fingerprint, [teacher, *students])),
        }
        stores = [RoundsFolder(folder, settings, params) for params in students]
    return _chain(train, students, teacher, stores, progress)


def _chain(
    train: Callable[..., Any],
    students: list[Any],
    teacher: Any,
    stores: list[RoundsFolder | None],
    progress: bool,
) -> Iterator[DistilledRound]:
    teachers = () if teacher is None else (teacher,)
    with progress_bar(progress, "training", len(students)) as advance:
        for number, (params, store) in enumerate(zip(students, stores)):
            told = ChainRound(number, number == len(students) - 1)
            trained = _trained(train, params, teachers, told, store)
            teachers = (*teachers, trained)
            advance(f"student {number}")
            yield DistilledRound(number, trained)


def choose_teacher(
    train: Callable[[Any, Any, ChainRound], Any],
    student: Any,
    teachers: Sequence[Any],
    validate: Callable[[Any], Any],
    *,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> ChosenTeacher:
    """Trains a student with each of several teachers, and keeps the one that does best.

    The best teacher of a small student is often not the most accurate one: snapshots of one
    training that was stopped early, or models of different sizes, are tried in turn.

    Args:
      train: `train(params, teacher, round) -> params`: the user's own training.
      student: a tree, before training; it may hold compressed leaves.
      teachers: what `train` is given, one after the other.
      validate: `validate(params) -> number`, larger for a better student, such as its accuracy on
        examples that it has not seen. NaN is never the best.
      folder: where each student is kept once it is trained, as for `distil_chain`; those that are
        read are validated again.
      progress: show a progress bar on standard error.

    Returns:
      The best student, of equals the first, the place of its teacher, and the scores of all.

    Raises:
      SpecError: for no teachers, a training that returns another tree, scores that are all NaN, and
        with a folder for a leaf that cannot be kept.
      FileError: for a folder with rounds of other params, a link, or a damaged file.

    References:
      Cho and Hariharan, *On the Efficacy of Knowledge Distillation*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> train = lambda params, teacher, round: params + teacher
      >>> validate = lambda params: 1 - abs(params - 3.0)
      >>> choose_teacher(train, jnp.float32(1.0), [jnp.float32(t) for t in (0, 2, 4)], validate)
      ChosenTeacher(number=1, params=Array(3., dtype=float32), scores=(-1.0, 1.0, -1.0))
    """
    teachers = list(teachers)
    if not teachers:
        raise SpecError("teachers=[]: give at least one")
    (student,) = _students([student])
    store = None
    if folder is not None:
        settings = {
            "driver": "choose_teacher",
            "params": list(map(fingerprint, [student, *teachers])),
        }
        store = RoundsFolder(folder, settings, student)
    best, scores = -1, []
    with progress_bar(progress, "training", len(teachers)) as advance:
        for number, teacher in enumerate(teachers):
            told = ChainRound(number, number == len(teachers) - 1)
            trained = _trained(train, student, teacher, told, store)
            scores.append(float(validate(trained)))
            if not math.isnan(scores[-1]) and (best < 0 or scores[-1] > scores[best]):
                best, params = number, trained
            advance(f"teacher {number}: {scores[-1]:.4g}")
    if best < 0:
        raise SpecError("validate returned NaN for each student; it is to return a number")
    return ChosenTeacher(best, params, tuple(scores))


def _students(students: Sequence[Any]) -> list[Any]:
    students = [as_jax(params) for params in students]
    if not students:
        raise SpecError("students=[]: give the params of at least one, before training")
    return students


def _trained(
    train: Callable[[Any, Any, ChainRound], Any],
    params: Any,
    teacher: Any,
    told: ChainRound,
    store: RoundsFolder | None,
) -> Any:
    """The params of a student, out of its folder or trained and kept."""
    kept = None if store is None else store.read(told.number)
    if kept is not None:
        return kept[0]
    trained = checked(train(copied(params), teacher, told), params, told.number)
    if store is not None:
        nothing = jax.tree.map(lambda _: None, trained, is_leaf=is_compressed)
        store.write(told.number, trained, nothing, None)
    return trained
