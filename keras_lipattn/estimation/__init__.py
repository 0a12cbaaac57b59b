"""Lower estimates of Lipschitz constants, by attack: no certificates."""

from keras_lipattn.estimation.estimate_lipschitz import estimate_lipschitz
from keras_lipattn.estimation.lipschitz_estimate import LipschitzEstimate

__all__ = ["LipschitzEstimate", "estimate_lipschitz"]
