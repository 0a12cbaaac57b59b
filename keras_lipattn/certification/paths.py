"""Names of layers on the way from a model to a call, one for each layer."""

import keras


def sibling_names(parent: keras.layers.Layer) -> dict[int, str]:
    """Names of the layers directly inside a model or layer, by `id`, all different.

    A subclassed model may hold several layers of one name: from the second one on, in the order in
    which Keras lists them, they get "#2" and so on.

    Args:
        parent: a model or layer.

    Returns:
        A dictionary from `id(layer)` to a name.
    """
    names: dict[int, str] = {}
    taken: set[str] = set()
    for layer in parent._flatten_layers(include_self=False, recursive=False):
        name, count = str(layer.name), 1
        while name in taken:
            count += 1
            name = f"{layer.name}#{count}"
        taken.add(name)
        names[id(layer)] = name
    return names
