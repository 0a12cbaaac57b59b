"""Whether variables belong to the strategy that runs."""

from collections.abc import Iterable
from typing import Any

import keras


def require_created_in_scope(strategy: Any, variables: Iterable[keras.Variable], owner: str):
    """Raises unless all of `variables` were created under `strategy`.

    TensorFlow would fail later, with an assertion that says nothing.

    Args:
        strategy: A `tf.distribute.Strategy`; `None` for the one in force.
        variables: Variables of Keras.
        owner: Whose they are, for the error.

    Raises:
        ValueError: If a variable was created outside of the scope of `strategy`.
    """
    if keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    strategy = strategy or tf.distribute.get_strategy()
    # What is in force without a strategy is none of these, and takes any variable.
    if not isinstance(strategy, tf.distribute.Strategy):
        return
    for variable in variables:
        value: Any = variable.value
        # A stateless scope may have put a tensor in its place.
        if not isinstance(value, tf.Variable):
            continue
        if not strategy.extended.variable_created_in_scope(value):
            raise ValueError(
                f"{owner} has variables which were created outside of the strategy it runs under: "
                f"build the model within `strategy.scope()`. Received: variable {variable.path!r} "
                f"under {type(strategy).__name__}"
            )
