"""The merging methods: one paper, one file."""

from starmerge.methods.built_in import *
from starmerge.methods.method import METHODS as METHODS
from starmerge.methods.method import Deltas as Deltas
from starmerge.methods.method import Merge as Merge
from starmerge.methods.method import Method as Method
from starmerge.methods.method import PostStep as PostStep
from starmerge.methods.method import TensorContext as TensorContext
from starmerge.methods.method import Transform as Transform
from starmerge.methods.method import make_method as make_method
from starmerge.methods.pipeline import Merged as Merged
from starmerge.methods.pipeline import Pipeline as Pipeline
from starmerge.methods.pipeline import as_pipeline as as_pipeline
from starmerge.methods.pipeline import make_pipeline as make_pipeline
