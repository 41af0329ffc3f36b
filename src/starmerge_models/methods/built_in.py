"""The list of all built-in methods.

To add a method, add a line here. ``import X as X`` marks the name as public for type checkers. The
method for mergekit's recipes uses these methods and is in a higher package,
``starmerge_models.mergekit``.
"""

from starmerge_models.methods.ace import Ace as Ace
from starmerge_models.methods.auto import Auto as Auto
from starmerge_models.methods.average import Average as Average
from starmerge_models.methods.breadcrumbs import Breadcrumbs as Breadcrumbs
from starmerge_models.methods.cart import Cart as Cart
from starmerge_models.methods.covariance import Covariance as Covariance
from starmerge_models.methods.ctm import Ctm as Ctm
from starmerge_models.methods.dare import Dare as Dare
from starmerge_models.methods.dc_merge import DcMerge as DcMerge
from starmerge_models.methods.della import Della as Della
from starmerge_models.methods.denoise import Denoise as Denoise
from starmerge_models.methods.emr import Emr as Emr
from starmerge_models.methods.iso import IsoC as IsoC
from starmerge_models.methods.iso import IsoCts as IsoCts
from starmerge_models.methods.karcher import Karcher as Karcher
from starmerge_models.methods.knots import Knots as Knots
from starmerge_models.methods.linear import Linear as Linear
from starmerge_models.methods.lines import Lines as Lines
from starmerge_models.methods.metagpt import MetaGpt as MetaGpt
from starmerge_models.methods.model_stock import ModelStock as ModelStock
from starmerge_models.methods.nuslerp import NuSlerp as NuSlerp
from starmerge_models.methods.own_response import OwnResponse as OwnResponse
from starmerge_models.methods.pico import MeanNorm as MeanNorm
from starmerge_models.methods.pico import Pico as Pico
from starmerge_models.methods.regmean import RegMean as RegMean
from starmerge_models.methods.scale import Scale as Scale
from starmerge_models.methods.sce import Sce as Sce
from starmerge_models.methods.shares import Shares as Shares
from starmerge_models.methods.slerp import Slerp as Slerp
from starmerge_models.methods.star import Star as Star
from starmerge_models.methods.subspace_boosting import SubspaceBoosting as SubspaceBoosting
from starmerge_models.methods.svc import Svc as Svc
from starmerge_models.methods.tall_masks import TallMasks as TallMasks
from starmerge_models.methods.task_arithmetic import TaskArithmetic as TaskArithmetic
from starmerge_models.methods.ties import Ties as Ties
from starmerge_models.methods.trim import Trim as Trim
from starmerge_models.methods.tsv_m import TsvM as TsvM
from starmerge_models.methods.wudi import Wudi as Wudi
