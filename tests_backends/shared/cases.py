"""What every backend must say alike: the same weights, data and steps, and the numbers of them."""

import functools

import keras
import numpy as np
from helpers import monitor_models
from helpers.layer_cases import CAPS, Case

import keras_lipattn as kl

NORMS = ("l2", "token", "linf")
MASKS = ("full", "causal", "any")
EPOCHS = 3


def data():
    return tuple(np.asarray(array) for array in monitor_models.data())


def with_weights(model, seed=5):
    """`model`, built, with weights that do not depend on the random numbers of a backend."""
    if not model.built:
        model(data()[0])
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        size = 0.4 if len(variable.shape) else 0.1
        variable.assign(rng.normal(size=variable.shape) * size)
    return model


def models():
    """Models by name, with weights."""
    builders = {**monitor_models.KINDS, "capped": monitor_models.capped}
    return {name: with_weights(build()) for name, build in builders.items()}


def layers():
    """Attention layers by name, with weights."""
    bounded = {"dtype": "float32", "kind": kl.BoundedMultiHeadAttention}
    return {
        "bounded": Case(**bounded).layer(),
        "bounded, shared": Case("one shared head", cap="token", **bounded).layer(),
    } | {
        name: Case(cap=cap, dtype=dtype).layer()
        for name, cap, dtype in (
            ("plain", None, "float32"),
            *((f"cap {cap}", cap, "float32") for cap in CAPS),
            ("bfloat16", "both", "mixed_bfloat16"),
        )
    }


def certificates():
    """Certified constants, by case."""
    constants = {}
    for name, model in models().items():
        for norm in NORMS:
            constants[f"model {name}, {norm}"] = kl.certify(model, norm=norm).total
    for name, layer in layers().items():
        for norm in NORMS:
            for mask in MASKS:
                bound = layer.lipschitz(norm=norm, mask=mask)
                constants[f"layer {name}, {norm}, {mask}"] = bound.value
    return constants


def estimates():
    """Lower estimates of the constants, by case."""
    x = data()[0]
    cases = [(monitor_models.functional, norm) for norm in NORMS] + [(monitor_models.capped, "l2")]
    return {
        f"{build.__name__}, {norm}": kl.estimate_lipschitz(
            with_weights(build()), x, norm, steps=8, restarts=1
        ).value
        for build, norm in cases
    }


def trained(build=monitor_models.functional, epochs=EPOCHS, **monitor_options):
    """A model after a few epochs with a penalty, and the history of its `fit`."""
    model = with_weights(build())
    model.compile(
        keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    options = {"penalty": 0.1, "target": 0.5, "running_freq": 1, **monitor_options}
    x, y = data()
    history = model.fit(
        x,
        y,
        batch_size=4,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        validation_data=(x, y),
        callbacks=[kl.LipschitzMonitor(**options)],
    ).history
    return model, {key: [float(v) for v in values] for key, values in history.items()}


def histories():
    return {
        "functional": trained()[1],
        "capped": trained(monitor_models.capped)[1],
        "no penalty": trained(penalty=None)[1],
    }


@functools.cache
def record():
    """All numbers that must not depend on the backend."""
    return {
        "certificates": certificates(),
        "estimates": estimates(),
        "histories": histories(),
    }
