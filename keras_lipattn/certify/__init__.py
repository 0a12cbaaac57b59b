"""From a model to a certificate: rules for layers, a walk over the graph, a value to keep."""

from keras_lipattn.certify.call import Call
from keras_lipattn.certify.certificate import Certificate
from keras_lipattn.certify.certificate_row import CertificateRow
from keras_lipattn.certify.certify import certify
from keras_lipattn.certify.fingerprint import fingerprint_of
from keras_lipattn.certify.local_radius import local_radius
from keras_lipattn.certify.registry import register_rule
from keras_lipattn.certify.step import Step
from keras_lipattn.certify.threat_model import ThreatModel

__all__ = [
    "Call",
    "Certificate",
    "CertificateRow",
    "Step",
    "ThreatModel",
    "certify",
    "fingerprint_of",
    "local_radius",
    "register_rule",
]
