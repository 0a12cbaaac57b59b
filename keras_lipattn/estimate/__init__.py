"""Lower estimates of Lipschitz constants, by attack: no certificates."""

from keras_lipattn.estimate.estimate_lipschitz import estimate_lipschitz
from keras_lipattn.estimate.lipschitz_estimate import LipschitzEstimate

__all__ = ["LipschitzEstimate", "estimate_lipschitz"]
