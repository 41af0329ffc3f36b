"""The merging methods: one paper, one file."""

from starmerge.methods.average import Average
from starmerge.methods.method import METHODS, Merged, Method, TensorContext, make_method
from starmerge.methods.star import Star
from starmerge.methods.task_arithmetic import TaskArithmetic

__all__ = [
    "METHODS",
    "Average",
    "Merged",
    "Method",
    "Star",
    "TaskArithmetic",
    "TensorContext",
    "make_method",
]
