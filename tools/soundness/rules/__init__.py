"""Attacks on every rule of `certify`, in every way that Keras lets a layer be called."""
