"""A process that has the code of the whole model and a file: keeps what the smaller one returns."""

import sys

import jax
import numpy as np
from structure_models import ResNet, array

import jaxcompress as jc


def main(path, out):
    run = jax.jit(jc.compressed(jc.pruning.shrunk(ResNet().apply, jc.read_plan(path))))
    np.save(out, run(jc.load(path), array(5, 2, 4, 4, 2)))


if __name__ == "__main__":
    main(*sys.argv[1:])
