"""The merging methods: one paper, one file."""

from starmerge_models.methods.built_in import *
from starmerge_models.methods.method import METHODS as METHODS
from starmerge_models.methods.method import Deltas as Deltas
from starmerge_models.methods.method import Merge as Merge
from starmerge_models.methods.method import Method as Method
from starmerge_models.methods.method import PostStep as PostStep
from starmerge_models.methods.method import TensorContext as TensorContext
from starmerge_models.methods.method import Transform as Transform
from starmerge_models.methods.method import make_method as make_method
from starmerge_models.methods.pipeline import Merged as Merged
from starmerge_models.methods.pipeline import Pipeline as Pipeline
from starmerge_models.methods.pipeline import as_pipeline as as_pipeline
from starmerge_models.methods.pipeline import make_pipeline as make_pipeline
