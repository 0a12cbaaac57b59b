"""Functions to time on JAX and PyTorch, each of which returns when the device is done."""

import keras
from keras import ops


def call(function, *arguments):
    """Function without arguments that calls `function`, compiled on JAX, without derivatives."""
    if keras.backend.backend() == "jax":
        return _compiled_by_jax(function, *arguments)[0]
    return _run_by_torch(lambda: function(*arguments))


def layer_step(layer, inputs, *, training):
    """A built layer's forward pass, or its training step, and the memory that takes.

    A training step is forward and backward pass of the sum of squares of the output, with respect
    to the weights and the input.

    Args:
        layer: A built layer.
        inputs: Its positional arguments, all the same tensor.
        training: Whether to train.

    Returns:
        A pair: a function without arguments, and the MiB it needs in addition to arguments and
        results, `None` where the device does not tell.
    """
    if keras.backend.backend() == "jax":
        return _layer_step_by_jax(layer, inputs, training)
    return _layer_step_by_torch(layer, inputs, training)


def _layer_step_by_jax(layer, inputs, training):
    import jax  # pyright: ignore[reportMissingImports]

    weights = [variable.value for variable in layer.trainable_variables]
    state = [variable.value for variable in layer.non_trainable_variables]

    def forward(x, weights):
        return layer.stateless_call(weights, state, *[x] * len(inputs), training=training)

    def loss(x, weights):
        output, new_state = forward(x, weights)
        return _sum_of_squares(output), new_state

    function = jax.grad(loss, argnums=(0, 1), has_aux=True) if training else forward
    run, compiled = _compiled_by_jax(function, inputs[0], weights)
    analysis = compiled.memory_analysis()
    return run, analysis and analysis.temp_size_in_bytes / 2**20


def _compiled_by_jax(function, *arguments):
    import jax  # pyright: ignore[reportMissingImports]

    compiled = jax.jit(function).lower(*arguments).compile()
    return (lambda: jax.block_until_ready(compiled(*arguments))), compiled


def _layer_step_by_torch(layer, inputs, training):
    import torch  # pyright: ignore[reportMissingImports]

    x = inputs[0].detach().requires_grad_(training)
    weights = [variable.value for variable in layer.trainable_variables]

    def step():
        output = layer(*[x] * len(inputs), training=training)
        if training:
            torch.autograd.grad(_sum_of_squares(output), [x, *weights])

    run = _run_by_torch(step, recorded=training)
    if not torch.cuda.is_available():
        return run, None
    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return run, (torch.cuda.max_memory_allocated() - before) / 2**20


def _run_by_torch(function, *, recorded=False):
    import torch  # pyright: ignore[reportMissingImports]

    def run():
        with torch.set_grad_enabled(recorded):
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def _sum_of_squares(output):
    return ops.sum(ops.square(ops.cast(output, "float32")))
