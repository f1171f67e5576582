"""ACIL: ridge regression on a fixed random ReLU expansion of fixed features.

Source: Zhuang et al. 2022 (arXiv 2205.14922). The recursion over steps there has the result of the sums here.
"""

from pydantic import Field

from avcil_dist.methods.sums_head import RidgeHead


class Acil(RidgeHead):
    """Ridge regression on relu(φR) and a constant 1, R random and fixed."""

    class Options(RidgeHead.Options):
        """Features, expansion, and candidates for γ; the paper has one γ."""

        expansion: int = Field(8192, ge=1, le=1_000_000, description="length of the random ReLU expansion of φ")


METHOD = Acil
