"""Quantised checkpoints, presented as checkpoints of plain weights that are computed lazily.

A quantised weight is stored as several tensors: integer codes, and scales or tables to decode them.
Each module reads one format and computes the weight in float32, exactly like the format's own
library. The arithmetic is a few lines per format and written here, because the libraries require a
GPU or take longer to import than a merge takes, and none reads single tensors.
"""

from starmerge_models.checkpoints.quantised.formats import QUANTISATION as QUANTISATION
from starmerge_models.checkpoints.quantised.formats import Dequantised as Dequantised
from starmerge_models.checkpoints.quantised.formats import dequantised as dequantised
from starmerge_models.checkpoints.quantised.formats import settings_of as settings_of
