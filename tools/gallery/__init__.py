"""Runs the models of `examples/gallery` from building to export and writes down what happened."""
