"""Makes one of canary.cpp's mistakes, or none, in a sanitized build: python canary.py fine|read|overflow."""

import sys

import torch

from moetrain.ops.native import OPS

INDEX = {"fine": 9, "read": 10, "overflow": 9}  # of ten
VALUE = {"fine": 21, "read": 21, "overflow": 2**31 - 1}

what = sys.argv[1]
assert OPS.canary_read(torch.arange(10.0), INDEX[what]) == 9
assert OPS.canary_double(VALUE[what]) == 42
