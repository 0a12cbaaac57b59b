"""Attacks on the certificates of random models."""
