"""Checkpoints of quantised weights, as checkpoints of plain ones that are computed when read.

A quantised weight is stored as several tensors: integer codes, and what turns them into numbers. A
format's file here says which these are, and computes the weight in float32, exactly as the
format's own library does. The arithmetic is a few lines a format, and ours: the libraries want a
GPU, or take longer to import than a merge takes, and none reads a tensor at a time.
"""

from starmerge_models.checkpoints.quantised.formats import QUANTISATION as QUANTISATION
from starmerge_models.checkpoints.quantised.formats import Dequantised as Dequantised
from starmerge_models.checkpoints.quantised.formats import dequantised as dequantised
from starmerge_models.checkpoints.quantised.formats import settings_of as settings_of
