"""The two changes which let `fit` of Keras run on several workers.

There is a test for each that fails once Keras does without.
"""

from typing import Any

from keras import tree


def build_from_local_batches(model: Any, strategy: Any) -> None:
    """Builds `model` from the batch of this worker, not from an average over all of them."""
    build = model._maybe_symbolic_build

    def build_locally(iterator=None, data_batch=None):
        if iterator is not None:
            _, _, batches = next(iter(iterator))
            data_batch = tree.map_structure(
                lambda value: strategy.experimental_local_results(value)[0], next(batches)
            )
        build(data_batch=data_batch)

    model._maybe_symbolic_build = build_locally


def give_outputs_of_steps_an_axis(model: Any) -> None:
    """Makes vectors of length one of what a step returns, for Keras to average over their axis."""
    make = model._make_function

    def make_function(step):
        return make(lambda data: tree.map_structure(lambda value: value[None], step(data)))

    model._make_function = make_function
