"""A teacher's outputs, written by a process that can be killed: `killed_cache.py FOLDER [BATCH]`."""

import os
import signal
import sys

import jax
import numpy as np

from jaxcompress.drivers.teacher_cache import cache_teacher

X = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float32)
PARAMS = {"kernel": np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)}


def teacher(params, x):
    return {"logits": jax.nn.relu(x @ params["kernel"]), "pair": (x[:, 0] > 0, x * 2)}


def write(folder, kill_at=None, calls=None, **options):
    def inputs(indices):
        if calls is not None:
            calls.append(indices)
        if kill_at is not None and indices[-1] >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return X[indices]

    options = {"batch_size": 3, "shard_size": 5, "examples": 23, "data": "random"} | options
    return cache_teacher(teacher, PARAMS, inputs, folder, **options)


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]))
