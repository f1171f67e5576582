"""ACIL: ridge regression on a fixed random ReLU expansion of fixed features.

Source: Zhuang et al. 2022 (arXiv 2205.14922). The recursion over steps there has the result of the sums here.
"""

from avcil_dist.config.method_options import AcilOptions
from avcil_dist.methods.sums_head import RidgeHead


class Acil(RidgeHead):
    """Ridge regression on relu(φR) and a constant 1, R random and fixed."""

    Options = AcilOptions


METHOD = Acil
