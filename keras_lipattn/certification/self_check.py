"""Trying to refute a certificate."""


class CertificateRefuted(RuntimeError):
    """A measurement contradicts a certificate: an error of this package, to be reported."""


def check_certificate(traced, propagation, certificate):
    """Raises unless the certificate withstands."""
