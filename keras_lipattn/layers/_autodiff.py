"""Vector-Jacobian products on every backend of Keras."""

import contextlib

import keras

from keras_lipattn.layers._fused_attention import plain_attention


def vector_jacobian(function, point, cotangent, *, differentiable=True):
    """The product `J^T cotangent`, where `J` is the Jacobian of `function` at `point`.

    Args:
        function: Function of one tensor that returns a tensor.
        point: Tensor.
        cotangent: Tensor of the shape of `function(point)`.
        differentiable: Whether the product can be differentiated again. If so, attention runs
            without its fused kernel, which has first derivatives only.

    Returns:
        Tensor of the shape of `point`.

    Raises:
        RuntimeError: If the backend of Keras has no automatic differentiation.
    """
    with plain_attention() if differentiable else contextlib.nullcontext():
        return _vector_jacobian(function, point, cotangent)


def _vector_jacobian(function, point, cotangent):
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(point)
            value = function(point)
        zero = tf.UnconnectedGradients.ZERO
        return tape.gradient(value, point, [cotangent], unconnected_gradients=zero)
    if backend == "jax":
        import jax  # pyright: ignore[reportMissingImports]

        _, pull = jax.vjp(function, point)
        return pull(cotangent)[0]
    if backend == "torch":
        import torch  # pyright: ignore[reportMissingImports]

        # The graph of the derivative is kept only if gradients are being recorded.
        recording = torch.is_grad_enabled()
        with torch.enable_grad():
            watched = point if point.requires_grad else point.detach().requires_grad_()
            value = function(watched)
            if not value.requires_grad:
                # The value depends neither on the point nor on a weight: its derivative is 0.
                return torch.zeros_like(point)
            (product,) = torch.autograd.grad(
                value,
                watched,
                cotangent,
                create_graph=recording,
                allow_unused=True,
                materialize_grads=True,
            )
        return product
    raise RuntimeError(
        "Derivatives need the TensorFlow, JAX or PyTorch backend of Keras. "
        f"Received: keras.backend.backend()={backend!r}"
    )
