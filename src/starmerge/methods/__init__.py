"""The merging methods: one paper, one file."""

from starmerge.methods.ace import Ace
from starmerge.methods.auto import Auto
from starmerge.methods.average import Average
from starmerge.methods.breadcrumbs import Breadcrumbs
from starmerge.methods.cart import Cart
from starmerge.methods.covariance import Covariance
from starmerge.methods.ctm import Ctm
from starmerge.methods.dare import Dare
from starmerge.methods.dc_merge import DcMerge
from starmerge.methods.della import Della
from starmerge.methods.denoise import Denoise
from starmerge.methods.emr import Emr
from starmerge.methods.iso import IsoC, IsoCts
from starmerge.methods.karcher import Karcher
from starmerge.methods.knots import Knots
from starmerge.methods.linear import Linear
from starmerge.methods.lines import Lines
from starmerge.methods.mergekit import Mergekit
from starmerge.methods.metagpt import MetaGpt
from starmerge.methods.method import (
    METHODS,
    Deltas,
    Merge,
    Method,
    PostStep,
    TensorContext,
    Transform,
    make_method,
)
from starmerge.methods.model_stock import ModelStock
from starmerge.methods.nuslerp import NuSlerp
from starmerge.methods.own_response import OwnResponse
from starmerge.methods.pico import MeanNorm, Pico
from starmerge.methods.pipeline import Merged, Pipeline, as_pipeline, make_pipeline
from starmerge.methods.regmean import RegMean
from starmerge.methods.scale import Scale
from starmerge.methods.sce import Sce
from starmerge.methods.shares import Shares
from starmerge.methods.slerp import Slerp
from starmerge.methods.star import Star
from starmerge.methods.subspace_boosting import SubspaceBoosting
from starmerge.methods.svc import Svc
from starmerge.methods.tall_masks import TallMasks
from starmerge.methods.task_arithmetic import TaskArithmetic
from starmerge.methods.ties import Ties
from starmerge.methods.trim import Trim
from starmerge.methods.tsv_m import TsvM
from starmerge.methods.wudi import Wudi

__all__ = [
    "METHODS",
    "Ace",
    "Auto",
    "Average",
    "Breadcrumbs",
    "Cart",
    "Covariance",
    "Ctm",
    "Dare",
    "DcMerge",
    "Della",
    "Deltas",
    "Denoise",
    "Emr",
    "IsoC",
    "IsoCts",
    "Karcher",
    "Knots",
    "Linear",
    "Lines",
    "MeanNorm",
    "Merge",
    "Merged",
    "Mergekit",
    "MetaGpt",
    "Method",
    "ModelStock",
    "NuSlerp",
    "OwnResponse",
    "Pico",
    "Pipeline",
    "PostStep",
    "RegMean",
    "Scale",
    "Sce",
    "Shares",
    "Slerp",
    "Star",
    "SubspaceBoosting",
    "Svc",
    "TallMasks",
    "TaskArithmetic",
    "TensorContext",
    "Ties",
    "Transform",
    "Trim",
    "TsvM",
    "Wudi",
    "as_pipeline",
    "make_method",
    "make_pipeline",
]
