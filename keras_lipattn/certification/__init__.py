"""Certificates of Keras models: `certify`, and the maps that rules for layers are made of."""

from keras_lipattn.certification.certificate import Certificate, CertificateRow
from keras_lipattn.certification.certified_radii import certified_radius
from keras_lipattn.certification.certifying import certify
from keras_lipattn.certification.fingerprint import fingerprint_of
from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import (
    Affine,
    CenterValue,
    Combination,
    Composite,
    Concatenation,
    Elementwise,
    LipschitzMap,
    TokenMixing,
    chain,
    unbounded,
)
from keras_lipattn.certification.reasons import Cause, Reason
from keras_lipattn.certification.registry import register_rule
from keras_lipattn.certification.self_check import CertificateRefuted
from keras_lipattn.certification.tensor_state import Kind, TensorState
from keras_lipattn.certification.threat_model import ThreatModel
from keras_lipattn.certification.token_range import TokenRange

__all__ = [
    "Affine",
    "Cause",
    "CenterValue",
    "Certificate",
    "CertificateRefuted",
    "CertificateRow",
    "Combination",
    "Composite",
    "Concatenation",
    "Elementwise",
    "Kind",
    "LayerCall",
    "LipschitzMap",
    "Reason",
    "TensorState",
    "ThreatModel",
    "TokenMixing",
    "TokenRange",
    "certified_radius",
    "certify",
    "chain",
    "fingerprint_of",
    "register_rule",
    "unbounded",
]
