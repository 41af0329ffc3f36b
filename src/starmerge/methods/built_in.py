"""The methods that come with starmerge: the one list of them.

A new method is a line here. ``import X as X`` tells type checkers that the name is public. The
method of mergekit's recipes rests on these and stands in a room above, ``starmerge.mergekit``.
"""

from starmerge.methods.ace import Ace as Ace
from starmerge.methods.auto import Auto as Auto
from starmerge.methods.average import Average as Average
from starmerge.methods.breadcrumbs import Breadcrumbs as Breadcrumbs
from starmerge.methods.cart import Cart as Cart
from starmerge.methods.covariance import Covariance as Covariance
from starmerge.methods.ctm import Ctm as Ctm
from starmerge.methods.dare import Dare as Dare
from starmerge.methods.dc_merge import DcMerge as DcMerge
from starmerge.methods.della import Della as Della
from starmerge.methods.denoise import Denoise as Denoise
from starmerge.methods.emr import Emr as Emr
from starmerge.methods.iso import IsoC as IsoC
from starmerge.methods.iso import IsoCts as IsoCts
from starmerge.methods.karcher import Karcher as Karcher
from starmerge.methods.knots import Knots as Knots
from starmerge.methods.linear import Linear as Linear
from starmerge.methods.lines import Lines as Lines
from starmerge.methods.metagpt import MetaGpt as MetaGpt
from starmerge.methods.model_stock import ModelStock as ModelStock
from starmerge.methods.nuslerp import NuSlerp as NuSlerp
from starmerge.methods.own_response import OwnResponse as OwnResponse
from starmerge.methods.pico import MeanNorm as MeanNorm
from starmerge.methods.pico import Pico as Pico
from starmerge.methods.regmean import RegMean as RegMean
from starmerge.methods.scale import Scale as Scale
from starmerge.methods.sce import Sce as Sce
from starmerge.methods.shares import Shares as Shares
from starmerge.methods.slerp import Slerp as Slerp
from starmerge.methods.star import Star as Star
from starmerge.methods.subspace_boosting import SubspaceBoosting as SubspaceBoosting
from starmerge.methods.svc import Svc as Svc
from starmerge.methods.tall_masks import TallMasks as TallMasks
from starmerge.methods.task_arithmetic import TaskArithmetic as TaskArithmetic
from starmerge.methods.ties import Ties as Ties
from starmerge.methods.trim import Trim as Trim
from starmerge.methods.tsv_m import TsvM as TsvM
from starmerge.methods.wudi import Wudi as Wudi
