"""A callback that logs and penalizes Lipschitz bounds during `fit`."""

import math
import os
from collections.abc import Sequence
from typing import Any, cast

import keras

from keras_lipattn._arguments import require_positive_integer
from keras_lipattn._figures import save
from keras_lipattn._plots import bounds_figure
from keras_lipattn._seen_calls import remembered_call
from keras_lipattn.bounds.lipschitz_bound import NORMS
from keras_lipattn.callbacks._certified_validation import CertifiedValidation, check_radii
from keras_lipattn.callbacks._layer_bounds import (
    LayerBound,
    WatchedLayer,
    certified_bounds,
    check_lower_bound_data,
    finite_or_inf,
    lower_bounds,
    warn_of_infinite_layers,
    warn_of_infinite_total,
    watched_layers,
)
from keras_lipattn.callbacks._penalty import (
    MonitoredStep,
    Penalty,
    Target,
    check_penalty,
    check_target,
    coefficient_at,
    sees_inputs_first,
    targets_of,
)
from keras_lipattn.certification import Certificate, fingerprint_of
from keras_lipattn.layers._backend import require_created_in_scope
from keras_lipattn.layers.lipschitz_layer import LipschitzLayer, Tracking


class LipschitzMonitor(keras.callbacks.Callback):
    """Logs certified Lipschitz bounds after every epoch, and penalizes them if asked to.

    **Put it first in `callbacks`.** Keras passes one dictionary of logs through the callbacks in
    order, so a callback before the monitor does not see its keys: `CSVLogger` and `TensorBoard` do
    not record them there, and `EarlyStopping`, `ModelCheckpoint` and `ReduceLROnPlateau` warn that
    the key they follow is not available. After the monitor all of them see its keys. Give those
    which follow one `mode="min"`. Values are floats, `inf` where nothing finite is certified, never
    NaN:

    - `lipschitz_total`: certified bound of the whole model at inference;
    - `lipschitz_<layer>`: certified bound of each Lipschitz layer as the model calls it;
    - `running_<layer>`: with `running_freq`, its running bound;
    - `lower_total` and `lower_<layer>`: with `lower_bound_data`, lower bounds measured by a short
      attack from those inputs, as in `estimate_lipschitz`. The true constants lie between lower and
      certified bounds. 0 where nothing can be measured. `lower_total` is for the output as it is,
      including a last softmax;
    - `val_certified_accuracy_<radius>`: with `certified_accuracy_radii`, the share of validation
      examples that are classified correctly and certified for this radius, such as
      `val_certified_accuracy_0_3` for 0.3. Only after epochs with validation.

    `<layer>` is the path of the layer in the model (`"encoder/attention"`) with `_` in place of
    every character other than letters, digits and `_`. Equal names are numbered. Keys are the same
    in every epoch.

    **Penalty.** With a coefficient `c`, each layer adds
    `c * max(0, log(running bound) - log(target))` to the training loss. It is differentiable in the
    weights, and a bound above its target shrinks at a rate that does not depend on its size. The
    running bound is the formula of the certified bound, fed with norms from one power-iteration
    step per batch. The penalty does not depend on the number of replicas, and applies in `fit`
    only: the validation loss, `evaluate`, `train_on_batch` and a later `fit` without a monitor do
    not include it, even after a `fit` that ended in an exception.

    The coefficient is set at the beginning of every epoch and stored in the weights of the layers,
    hence in checkpoints. After `BackupAndRestore`, a callable of the epoch and the current
    coefficient continues from the restored one. A number is set again in any case.

    **Subclassed models** may be new: before the first batch they are built from the data of `fit`,
    which also determines the structure, shapes and dtypes that they are certified for. Two cases
    need a model that is built before `fit` for a penalty, and `inputs=` for integer inputs: other
    backends than TensorFlow, and a `train_step` that calls the model on something else than its
    inputs.

    Args:
        norm: Norm of inputs and outputs: `"l2"` (2-norm of all entries), `"token"` (largest 2-norm
            of a token) or `"linf"` (largest absolute entry).
        sequence_length: Largest number of tokens, if the inputs of the model do not determine it.
        penalty: Coefficient of the penalty: `None` for no penalty, a number, or a schedule that is
            called at the beginning of every epoch: a callable of the epoch (from 0), such as a
            `keras.optimizers.schedules.LearningRateSchedule`, or of the epoch and the current
            coefficient.
        target: Bound above which a layer is penalized: a number for all layers, or a dictionary
            from names or paths of layers to numbers. Layers that it does not name are not
            penalized.
        running_freq: If set to `k`, the running bounds are logged for every `k`-th batch and for
            the epoch.
        lower_bound_data: A small batch of inputs of the model. If given, lower bounds are measured
            from it at the end of every epoch, on the host. The model is not changed.
        certified_accuracy_radii: Radii in the norm `norm` and units of the input. The certified
            accuracy on the validation data of `fit` is counted while `fit` validates, with the
            certificate of the epoch: no example is evaluated twice. For classifiers with integer or
            one-hot targets, on TensorFlow. `certified_accuracy` gives the same numbers later.
        condense: Whether to store exact norms in the layers at the end of training, which makes
            inference exact and fast.
        **certify_options: Further arguments of `certify`, such as `assume_fixed_mask=True`.

    Attributes:
        certificate: `Certificate` of the weights at the end of the last epoch, `None` before. If
            the weights change afterwards, as with `EarlyStopping(restore_best_weights=True)`, it
            does not apply to them.
        history: Dictionary from log keys to lists with one entry per epoch of the last `fit`.
        epochs: Indices of these epochs, from 0.
        running_history: With `running_freq`, dictionary from `"epoch"`, `"batch"` and
            `running_<layer>` to lists with one entry every `k` batches.
        infinite: Maps the path of each layer without a finite bound to when and why it was lost, in
            order of occurrence, then in the order of the model. A warning says the same. Weights
            are checked once per epoch, and by then one step has spread a NaN to all layers. With
            `running_freq=1` the first entry is the layer whose bound overflowed first.

    Raises:
        ValueError: If an argument is out of range. From `fit`: if the model has no Lipschitz layer,
            if `target` names an unknown layer, if a penalized layer has no finite bound, if
            `penalty` or `running_freq` needs weights that cannot be created before the first batch,
            or if two monitors of one `fit` have `penalty` or `running_freq`.

    Example:

    >>> attention = L2MultiHeadAttention(2, 4, name="attention")
    >>> model = keras.Sequential([keras.Input((6, 8)), attention, SpectralDense(3, name="logits")])
    >>> model.compile("adam", "mse")
    >>> x = np.random.default_rng(0).normal(size=(64, 6, 8)).astype("float32")
    >>> monitor = LipschitzMonitor(penalty=0.1, target={"attention": 2.0})
    >>> logger = keras.callbacks.CSVLogger("history.csv")
    >>> history = model.fit(x, x[..., :3], epochs=2, callbacks=[monitor, logger], verbose=0)
    >>> sorted(monitor.history)
    ['lipschitz_attention', 'lipschitz_logits', 'lipschitz_total']
    >>> monitor.certificate.total == monitor.history["lipschitz_total"][-1]
    True
    """

    def __init__(
        self,
        norm: str = "l2",
        sequence_length: int | None = None,
        penalty: Penalty = None,
        target: Target = 1.0,
        running_freq: int | None = None,
        lower_bound_data: Any = None,
        certified_accuracy_radii: Sequence[float] = (),
        condense: bool = True,
        **certify_options: Any,
    ) -> None:
        if norm not in NORMS:
            raise ValueError(f"`norm` must be one of {sorted(NORMS)}. Received: norm={norm!r}")
        require_positive_integer("sequence_length", sequence_length, optional=True)
        require_positive_integer("running_freq", running_freq, optional=True)
        check_penalty(penalty)
        check_target(target)
        if lower_bound_data is not None:
            check_lower_bound_data(lower_bound_data)
        super().__init__()
        self.norm = norm
        self.sequence_length = sequence_length
        self.penalty = penalty
        self.target = target
        self.running_freq = running_freq
        self.lower_bound_data = lower_bound_data
        self.certified_accuracy_radii = check_radii(certified_accuracy_radii)
        self.condense = condense
        self.certify_options = certify_options
        # Keras may then run the batch hooks of other callbacks in a thread.
        self.async_safe = running_freq is None
        self._reset()

    def _reset(self) -> None:
        self.certificate: Certificate | None = None
        self.history: dict[str, list[float]] = {}
        self.epochs: list[int] = []
        self.running_history: dict[str, list[float]] = {}
        # Empty until the layers have weights.
        self._watched: list[WatchedLayer] = []
        self._warm: list[LipschitzLayer] = []
        self._targets: dict[str, float] = {}
        self._step: MonitoredStep | None = None
        self._validation: CertifiedValidation | None = None
        self._validated: tuple[Certificate, dict[str, LayerBound]] | None = None
        self._epoch = 0
        self._batches = 0
        self.infinite: dict[str, str] = {}

    @property
    def _trained(self) -> keras.Model:
        return cast(keras.Model, self.model)

    # Beginning and end of training ------------------------------------------------------------

    def on_train_begin(self, logs=None):
        self._reset()
        # Only TensorFlow models have this attribute.
        strategy = getattr(self._trained, "distribute_strategy", None)
        require_created_in_scope(strategy, self._trained.variables, f"Model {self._trained.name!r}")
        # Now, since callbacks after this one may restore vectors from a backup.
        self._warm = [entry.layer for entry in watched_layers(self._trained) if entry.layer.built]
        for layer in self._warm:
            layer.warm_up()
        if self.certified_accuracy_radii:
            self._validation = CertifiedValidation(
                self._trained, self.certified_accuracy_radii, self._certify_validated
            )
        if sees_inputs_first(self._trained):
            self._step = MonitoredStep.of(self._trained)
            self._step.before_first(self._begin_at_first_batch)
        else:
            self._begin(called=False)

    def on_train_end(self, logs=None):
        if self._step is not None:
            self._step.remove()
        self._validation = None
        if self.condense:
            for entry in self._watched:
                entry.layer.condense()

    def _begin_at_first_batch(self, called: bool) -> None:
        self._begin(called)
        self._set_coefficients()

    def _begin(self, called: bool) -> None:
        """Prepares for the first batch.

        Args:
            called: Whether the model was just called on inputs of `fit`, which builds it.
        """
        if self._needs_step and not called:
            self._check_built()
        if not called and (not self._trained.built or self._unbuilt_layers()):
            # Watched from the end of the first epoch on.
            return
        self._watch()
        if self.lower_bound_data is not None:
            check_lower_bound_data(self.lower_bound_data, self._trained)
        for entry in self._watched:
            if not any(entry.layer is layer for layer in self._warm):
                entry.layer.warm_up()
        if self._needs_step:
            self._step = self._step or MonitoredStep.of(self._trained)
            self._step.track(self._tracking())

    @property
    def _needs_step(self) -> bool:
        return self.penalty is not None or self.running_freq is not None

    def _unbuilt_layers(self) -> list[str]:
        return [entry.path for entry in watched_layers(self._trained) if not entry.layer.built]

    def _check_built(self) -> None:
        unbuilt = self._unbuilt_layers()
        if unbuilt or not self._trained.built:
            of_layers = f" in its layers {unbuilt}" if unbuilt else ""
            raise ValueError(
                "`penalty` and `running_freq` need the weights of the model before the first "
                "batch, and calling the model on the inputs of `fit` did not create them. Call "
                "`model.build(input_shape)`, or call the model on data, before `fit`. "
                f"Received: model {self._trained.name!r}, which is not built{of_layers}"
            )

    def _watch(self) -> None:
        # A layer that the model does not call never gets weights.
        self._watched = [entry for entry in watched_layers(self._trained) if entry.layer.built]
        if not self._watched:
            raise ValueError(
                "The model has no Lipschitz layer, such as `L2MultiHeadAttention` or "
                "`SpectralDense`. Received: model "
                f"{self._trained.name!r} with layers "
                f"{[layer.name for layer in self._trained.layers]}"
            )
        # Without a penalty too, since a misspelled name is an error.
        targets = targets_of(self.target, self._watched)
        if self.penalty is not None:
            self._targets = targets

    def _tracking(self) -> list[tuple[LipschitzLayer, Tracking]]:
        """Pairs of a layer and its `Tracking`, for the layers with a running bound."""
        _, bounds = self._certified_bounds()
        pairs = []
        for entry in self._watched:
            penalize = entry.key in self._targets
            if not penalize and self.running_freq is None:
                continue
            # The length that the layer knows, then the one that the certificate finds.
            for length in dict.fromkeys((None, bounds[entry.key].tokens)):
                bound = entry.layer.lipschitz(length, norm=self.norm)
                if bound.is_finite:
                    pairs.append((entry.layer, Tracking(self.norm, length, penalize)))
                    break
            else:
                if penalize:
                    raise ValueError(
                        f"Layer {entry.path!r} cannot be penalized: its bound is not finite. "
                        f"Received: {bound.reason}"
                    )
        return pairs

    # Epochs and batches -----------------------------------------------------------------------

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._batches = 0
        self._set_coefficients()

    def _set_coefficients(self) -> None:
        check_penalty(self.penalty)
        for entry in self._watched:
            if entry.key in self._targets:
                variable = entry.layer.penalty_coefficient
                current = float(variable.numpy())
                variable.assign(coefficient_at(self.penalty, self._epoch, current))
                entry.layer.penalty_log_target.assign(math.log(self._targets[entry.key]))

    def on_train_batch_begin(self, batch, logs=None):
        if self._step is not None:
            self._step.announce()

    def on_train_batch_end(self, batch, logs=None):
        if self.running_freq is None:
            return
        # One step may run several batches.
        before, self._batches = self._batches, batch + 1
        if self._batches // self.running_freq > before // self.running_freq:
            values = self._running_bounds()
            if logs is not None:
                logs.update(values)
            for key, value in {"epoch": self._epoch, "batch": batch, **values}.items():
                self.running_history.setdefault(key, []).append(value)
            warn_of_infinite_layers(
                self.infinite,
                [
                    (entry, values[f"running_{entry.key}"], "its running bound is not finite")
                    for entry in self._watched
                ],
                f"batch {batch + 1} of epoch {self._epoch + 1}",
            )

    def on_test_begin(self, logs=None):
        if self._validation is not None:
            self._validation.begin()

    def on_test_end(self, logs=None):
        if self._validation is not None:
            self._validation.end()

    def _certify_validated(self) -> Certificate:
        if not self._watched:
            self._watch()
        self._validated = self._certified_bounds()
        return self._validated[0]

    def on_epoch_end(self, epoch, logs=None):
        if not self._watched:
            self._watch()
        validated, self._validated = self._validated, None
        # A callback may have put other weights into the model for its validation.
        if validated is None or validated[0].fingerprint != fingerprint_of(self._trained):
            validated = self._certified_bounds()
        self.certificate, bounds = validated
        values = {"lipschitz_total": finite_or_inf(self.certificate.total)}
        values |= {f"lipschitz_{key}": finite_or_inf(b.value) for key, b in bounds.items()}
        if self.running_freq is not None:
            values |= self._running_bounds()
        if self.lower_bound_data is not None:
            found = lower_bounds(self._trained, self._watched, self.lower_bound_data, self.norm)
            values |= {f"lower_{key}": value for key, value in found.items()}
        if self._validation is not None:
            values |= self._validation.results()
        if logs is not None:
            logs.update(values)
        self.epochs.append(epoch)
        for key, value in values.items():
            self.history.setdefault(key, []).append(value)
        warn_of_infinite_layers(
            self.infinite,
            [(entry, bounds[entry.key].value, bounds[entry.key].reason) for entry in self._watched],
            f"epoch {epoch + 1}",
        )
        warn_of_infinite_total(self.infinite, self.certificate, f"epoch {epoch + 1}")

    def _certified_bounds(self) -> tuple[Certificate, dict[str, LayerBound]]:
        return certified_bounds(
            self._trained,
            self._watched,
            norm=self.norm,
            sequence_length=self.sequence_length,
            options=self._inputs() | self.certify_options,
        )

    def _inputs(self) -> dict[str, Any]:
        """Argument `inputs` of `certify` for a subclassed model."""
        seen = remembered_call(self._trained)
        return {} if seen is None else {"inputs": seen}

    def _running_bounds(self) -> dict[str, float]:
        # With JAX this property updates the variables.
        _ = self.model
        values = {}
        for entry in self._watched:
            value = math.inf
            if self._step is not None and self._step.tracks(entry.layer):
                value = finite_or_inf(entry.layer.running_bound.numpy())
            values[f"running_{entry.key}"] = value
        return values

    # Plot -------------------------------------------------------------------------------------

    def plot(self, path: str | os.PathLike) -> None:
        """Plots the bounds of the last `fit` over its epochs: 1200 by 750 pixels as a PNG.

        The model and its layers have axes of their own, both logarithmic. Targets are dashed,
        running bounds are dotted, lower bounds have triangles that point down, and `inf` is a
        triangle at the upper edge. Layers with equal bounds share a line. The names of the layers
        with the largest bounds are at the ends of their lines; all others are gray.

        Args:
            path: Path of the image. Its suffix determines the format.

        Raises:
            ValueError: If no epoch has ended yet.
            ImportError: If matplotlib is not installed.
            OSError: If the image cannot be written. An old one stays, and the bounds are still in
                `history`.
        """
        if not self.epochs:
            raise ValueError(
                "There is nothing to plot before the first epoch of a `fit` with this monitor. "
                f"Received: path={str(path)!r}"
            )
        names = {entry.key: entry.path for entry in self._watched}

        def series(prefix: str) -> dict[str, list[float]]:
            keys = {key: f"{prefix}_{key}" for key in names if f"{prefix}_{key}" in self.history}
            return {names[key]: self.history[logged] for key, logged in keys.items()}

        figure = bounds_figure(
            title=f"Certified Lipschitz bounds, {NORMS[self.norm]}",
            epochs=[epoch + 1 for epoch in self.epochs],
            total=self.history["lipschitz_total"],
            lower_total=self.history.get("lower_total"),
            layers=series("lipschitz"),
            running=series("running"),
            lower=series("lower"),
            targets={names[key]: value for key, value in self._targets.items()},
        )
        save(figure, path)
