"""Lower estimates of Lipschitz constants by attack. They are not certificates."""

from keras_lipattn.estimation.estimating import LipschitzEstimate, estimate_lipschitz

__all__ = ["LipschitzEstimate", "estimate_lipschitz"]
