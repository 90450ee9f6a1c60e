"""A process that has the code of the whole model and a file: prints what the smaller one returns."""

import sys

import jax
import numpy as np
from structure_models import ResNet, array

import jaxcompress as jc
from jaxcompress.checkpoint.file import read_plan
from jaxcompress.pruning.structure import shrunk

path, out = sys.argv[1:]
run = jax.jit(jc.compressed(shrunk(ResNet().apply, read_plan(path))))
np.save(out, run(jc.load(path), array(5, 2, 4, 4, 2)))
