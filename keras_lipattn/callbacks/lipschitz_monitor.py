"""A callback that watches and penalizes Lipschitz bounds during `fit`."""

import math
import os
import warnings
from collections.abc import Sequence
from typing import Any, cast

import keras

from keras_lipattn._seen_calls import remembered_call
from keras_lipattn.bounds.lipschitz_bound import NORMS
from keras_lipattn.callbacks._certified import LayerBound, certified_bounds, finite_or_inf
from keras_lipattn.callbacks._lower import check_sample, lower_estimates
from keras_lipattn.callbacks._neighbours import callbacks_beside, warn_of_earlier_readers
from keras_lipattn.callbacks._penalty import (
    Penalty,
    Target,
    check_penalty,
    check_target,
    coefficient_at,
    targets_of,
)
from keras_lipattn.callbacks._plot import plot_bounds
from keras_lipattn.callbacks._tracked_step import TrackedStep
from keras_lipattn.callbacks._training_data import meet_training_data
from keras_lipattn.callbacks._watched_layers import WatchedLayer, watched_layers
from keras_lipattn.certification import Certificate
from keras_lipattn.layers._arguments import require_positive_integer
from keras_lipattn.layers._strategy_scope import require_created_in_scope
from keras_lipattn.layers.lipschitz_layer import LipschitzLayer, Tracking


class LipschitzMonitor(keras.callbacks.Callback):
    """Writes certified Lipschitz bounds to the logs every epoch, and penalizes them when asked.

    Put it first in `callbacks`: one dictionary of logs goes through them in order, and those before
    the monitor do not see its keys. With them, `History`, `CSVLogger` and `TensorBoard` record
    bounds; `EarlyStopping`, `ModelCheckpoint` and `ReduceLROnPlateau` follow one when given
    `mode="min"`. Values are floats, `inf` where nothing finite is certified, never NaN:

    - `lipschitz_total`: certified bound of the whole model at inference;
    - `lipschitz_<layer>`: certified bound of each layer of ours as the model calls it;
    - `running_<layer>`: with `running_every`, its running bound;
    - `lower_total` and `lower_<layer>`: with `lower`, what an attack from those inputs finds, as
      `estimate_lipschitz` does, in a few steps. The true constants lie in between; 0 where nothing
      could be measured. That of the total is taken of the output as it is, a last softmax included.

    `<layer>` is the path of the layer in the model (`"encoder/attention"`), every character but
    letters, digits and `_` replaced by `_`; layers whose names coincide then are numbered. Keys are
    the same in every epoch.

    **Penalty.** With a coefficient `c` the training loss gains, for each layer,
    `c * max(0, log(running bound) - log(target))`, differentiable in the weights, so that a bound
    above its target shrinks at a rate which does not depend on how large it is. The running bound
    is the formula of the certified one, fed with norms from one power-iteration step per batch.
    The penalty is the same for any number of replicas, and acts in `fit` alone: the validation
    loss, `evaluate`, `train_on_batch` and a later `fit` without a monitor are free of it, also when
    the `fit` ended in an exception.

    The coefficient is set at the beginning of every epoch and lives in the weights of the layers,
    hence in checkpoints: after `BackupAndRestore` a callable of the epoch and of the current
    coefficient goes on from the restored one. A number is set again whatever was restored.

    **Subclassed models** may be new: their weights are created, and their certificates are for
    inputs of the structure, shapes and dtypes, as the data of `fit` says when it begins. On other
    backends than TensorFlow, and where `train_step` calls the model on something else than the
    inputs, they need weights before `fit` for a penalty, and `inputs=` to be certified for
    integers.

    Args:
        norm: Norm of inputs and outputs: `"l2"` (2-norm of all entries), `"token"` (largest 2-norm
            of a token) or `"linf"` (largest absolute entry).
        sequence_length: Largest number of tokens, where the inputs of the model leave it open.
        penalty: Coefficient of the penalty: `None` for none, a number, or a schedule called at the
            beginning of every epoch: a callable of the epoch (from 0), such as a
            `keras.optimizers.schedules.LearningRateSchedule`, or of the epoch and the current
            coefficient.
        target: What the penalty aims at: a number for all layers, or a dictionary from names or
            paths of layers to numbers, which leaves other layers free.
        running_every: If set to `k`, writes the running bounds to the logs of every `k`-th batch,
            and to those of the epoch.
        lower: If given, a batch of inputs of the model; a few will do. At the end of every epoch
            lower estimates are measured from them, on the host, with the model left as it is.
        condense: Whether to let the layers remember exact norms at the end of training, so that
            their inference is exact and fast.
        **certify_options: Further arguments of `certify`, such as `assume_fixed_mask=True`.

    Attributes:
        certificate: `Certificate` of the weights at the end of the last epoch, `None` before.
            Weights changed since, as by `EarlyStopping(restore_best_weights=True)`, need a new one.
        history: Dictionary from log keys to lists, one entry an epoch, of the last `fit`.
        epochs: The epochs of these entries, from 0.
        running_history: With `running_every`, dictionary from `"epoch"`, `"batch"` and
            `running_<layer>` to lists, one entry every `k` batches.
        infinite: Dictionary from paths of layers without a finite bound to since when and why, in
            the order in which they lost it; those which lost it at once, in that of the model. A
            warning says the same. Weights are looked at once an epoch, where one step with a NaN
            has spread it to all layers: with `running_every=1` the layer is found in whose bound
            a step overflowed first.

    Raises:
        ValueError: If an argument is out of range. From `fit`: if the model has no layer of ours,
            if `target` names an unknown one, if a penalized layer has no finite bound, if the
            weights cannot be created before the first batch though `penalty` or `running_every`
            needs them, or if two monitors of one `fit` have any of the two.

    Example:

    ```python
    monitor = LipschitzMonitor(penalty=0.1, target={"encoder/attention": 2.0})
    logger = keras.callbacks.CSVLogger("history.csv")
    model.fit(x, y, epochs=10, callbacks=[monitor, logger])
    print(monitor.certificate)
    monitor.plot("bounds.png")
    ```
    """

    def __init__(
        self,
        norm: str = "l2",
        sequence_length: int | None = None,
        penalty: Penalty = None,
        target: Target = 1.0,
        running_every: int | None = None,
        lower: Any = None,
        condense: bool = True,
        **certify_options: Any,
    ) -> None:
        if norm not in NORMS:
            raise ValueError(f"`norm` must be one of {sorted(NORMS)}. Received: norm={norm!r}")
        require_positive_integer("sequence_length", sequence_length, optional=True)
        require_positive_integer("running_every", running_every, optional=True)
        check_penalty(penalty)
        check_target(target)
        if lower is not None:
            check_sample(lower)
        super().__init__()
        self.norm = norm
        self.sequence_length = sequence_length
        self.penalty = penalty
        self.target = target
        self.running_every = running_every
        self.lower = lower
        self.condense = condense
        self.certify_options = certify_options
        # Keras may run the batch hooks of other callbacks beside the training then.
        self.async_safe = running_every is None
        self._reset()

    def _reset(self) -> None:
        self.certificate: Certificate | None = None
        self.history: dict[str, list[float]] = {}
        self.epochs: list[int] = []
        self.running_history: dict[str, list[float]] = {}
        # Empty until the layers have weights.
        self._watched: list[WatchedLayer] = []
        self._targets: dict[str, float] = {}
        self._step: TrackedStep | None = None
        self._epoch = 0
        self._batches = 0
        self.infinite: dict[str, str] = {}

    @property
    def _trained(self) -> keras.Model:
        return cast(keras.Model, self.model)

    # Beginning and end of training ------------------------------------------------------------

    def on_train_begin(self, logs=None):
        self._reset()
        beside = callbacks_beside(self)
        warn_of_earlier_readers(self, beside)
        # Keras knows this strategy with TensorFlow only.
        strategy = getattr(self._trained, "distribute_strategy", None)
        require_created_in_scope(strategy, self._trained.variables, f"Model {self._trained.name!r}")
        if self._needs_step:
            self._check_alone(beside)
        met = meet_training_data(self._trained)
        if self._needs_step and not met:
            self._check_built()
        # A model that is still not built is looked at after its first epoch.
        if met or (self._trained.built and not self._unbuilt_layers()):
            self._watch()
            if self.lower is not None:
                check_sample(self.lower, self._trained)
            for entry in self._watched:
                entry.layer.warm_up()
            if self._needs_step:
                self._step = TrackedStep(self._trained, self._tracking())

    def on_train_end(self, logs=None):
        if self._step is not None:
            self._step.remove()
        if self.condense:
            for entry in self._watched:
                entry.layer.condense()

    @property
    def _needs_step(self) -> bool:
        return self.penalty is not None or self.running_every is not None

    def _check_alone(self, beside: list[keras.callbacks.Callback]) -> None:
        for other in beside:
            if isinstance(other, LipschitzMonitor) and other is not self and other._needs_step:
                raise ValueError(
                    "Of the monitors of one `fit` only one may have `penalty` or `running_every`: "
                    "a layer follows one running bound. Received: two of them"
                )

    def _unbuilt_layers(self) -> list[str]:
        return [entry.path for entry in watched_layers(self._trained) if not entry.layer.built]

    def _check_built(self) -> None:
        unbuilt = self._unbuilt_layers()
        if unbuilt or not self._trained.built:
            of_layers = f" in its layers {unbuilt}" if unbuilt else ""
            raise ValueError(
                "`penalty` and `running_every` need the weights of the model before the first "
                "batch, and calling the model on the inputs of `fit` did not create them: call "
                "`model.build(input_shape)`, or the model on some data, before `fit`. "
                f"Received: model {self._trained.name!r}, which is not built{of_layers}"
            )

    def _watch(self) -> None:
        # A layer which the model does not call never gets weights.
        self._watched = [entry for entry in watched_layers(self._trained) if entry.layer.built]
        if not self._watched:
            raise ValueError(
                "The model has no layer whose Lipschitz constant can be watched, such as "
                "`L2MultiHeadAttention` or `SpectralDense`. Received: model "
                f"{self._trained.name!r} with layers "
                f"{[layer.name for layer in self._trained.layers]}"
            )
        # Looked up without a penalty too: a misspelt name is an error, and plots show targets.
        targets = targets_of(self.target, self._watched)
        if self.penalty is not None:
            self._targets = targets

    def _tracking(self) -> list[tuple[LipschitzLayer, Tracking]]:
        """Pairs of a layer and its `Tracking`, for the layers with a running bound."""
        _, bounds = self._certified_bounds()
        pairs = []
        for entry in self._watched:
            penalize = entry.key in self._targets
            if not penalize and self.running_every is None:
                continue
            # The length a layer knows itself, then the one that the certificate finds in the graph.
            for length in dict.fromkeys((None, bounds[entry.key].tokens)):
                bound = entry.layer.lipschitz(length, norm=self.norm)
                if bound.is_finite:
                    pairs.append((entry.layer, Tracking(self.norm, length, penalize)))
                    break
            else:
                if penalize:
                    raise ValueError(
                        f"Layer {entry.path!r} cannot be penalized, its bound is not finite. "
                        f"Received: {bound.reason}"
                    )
        return pairs

    # Epochs and batches -----------------------------------------------------------------------

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._batches = 0
        if self._step is not None and self.penalty is not None:
            self._set_coefficients(epoch)

    def _set_coefficients(self, epoch: int) -> None:
        check_penalty(self.penalty)
        penalized = [entry for entry in self._watched if entry.key in self._targets]
        for entry in penalized:
            variable = entry.layer.penalty_coefficient
            current = float(variable.numpy())
            variable.assign(coefficient_at(self.penalty, epoch, current))
            entry.layer.penalty_log_target.assign(math.log(self._targets[entry.key]))

    def on_train_batch_begin(self, batch, logs=None):
        if self._step is not None:
            self._step.announce()

    def on_train_batch_end(self, batch, logs=None):
        if self.running_every is None:
            return
        # One call may stand for several batches.
        before, self._batches = self._batches, batch + 1
        if self._batches // self.running_every > before // self.running_every:
            values = self._running_bounds()
            if logs is not None:
                logs.update(values)
            for key, value in {"epoch": self._epoch, "batch": batch, **values}.items():
                self.running_history.setdefault(key, []).append(value)
            self._warn_of_infinite_layers(
                [
                    (entry, values[f"running_{entry.key}"], "its running bound is not a number")
                    for entry in self._watched
                ],
                f"batch {batch + 1} of epoch {self._epoch + 1}",
            )

    def on_epoch_end(self, epoch, logs=None):
        if not self._watched:
            self._watch()
        self.certificate, bounds = self._certified_bounds()
        values = {"lipschitz_total": finite_or_inf(self.certificate.total)}
        values |= {f"lipschitz_{key}": finite_or_inf(b.value) for key, b in bounds.items()}
        if self.running_every is not None:
            values |= self._running_bounds()
        if self.lower is not None:
            found = lower_estimates(self._trained, self._watched, self.lower, self.norm)
            values |= {f"lower_{key}": value for key, value in found.items()}
        if logs is not None:
            logs.update(values)
        self.epochs.append(epoch)
        for key, value in values.items():
            self.history.setdefault(key, []).append(value)
        self._warn_of_infinite_layers(
            [(entry, bounds[entry.key].value, bounds[entry.key].reason) for entry in self._watched],
            f"epoch {epoch + 1}",
        )
        self._warn_of_infinite_total(self.certificate, f"epoch {epoch + 1}")

    def _certified_bounds(self) -> tuple[Certificate, dict[str, LayerBound]]:
        return certified_bounds(
            self._trained,
            self._watched,
            norm=self.norm,
            sequence_length=self.sequence_length,
            options=self._inputs() | self.certify_options,
        )

    def _inputs(self) -> dict[str, Any]:
        """The argument `inputs` of `certify`: what a subclassed model is called on."""
        seen = remembered_call(self._trained)
        return {} if seen is None else {"inputs": seen}

    def _running_bounds(self) -> dict[str, float]:
        # Asking for the model brings its variables up to date where a backend keeps them elsewhere.
        _ = self.model
        values = {}
        for entry in self._watched:
            value = math.inf
            if self._step is not None and self._step.tracks(entry.layer):
                value = finite_or_inf(entry.layer.running_bound.numpy())
            values[f"running_{entry.key}"] = value
        return values

    def _warn_of_infinite_layers(
        self, bounds: Sequence[tuple[WatchedLayer, float, str]], when: str
    ) -> None:
        """Warns of layers, given with bound and reason, which lose their finite bound only now."""
        lost = [
            (entry.path, reason)
            for entry, value, reason in bounds
            if math.isinf(value) and entry.path not in self.infinite
        ]
        if not lost:
            return
        self.infinite |= {path: f"from {when} on: {reason}" for path, reason in lost}
        (first, reason), *others = lost
        also = f"; likewise {', '.join(path for path, _ in others)}" if others else ""
        warnings.warn(
            f"Layer {first!r} has no finite Lipschitz bound from {when} on{also}: {reason}",
            stacklevel=2,
        )

    def _warn_of_infinite_total(self, certificate: Certificate, when: str) -> None:
        # Where a layer of ours is the cause, it was named.
        if certificate.is_finite or self.infinite:
            return
        reasons = {row.path: row.reason for row in certificate.rows if not row.is_finite}
        # Finite constants may multiply to more than there are floats.
        reasons = reasons or {certificate.model: "; ".join(certificate.reasons)}
        self.infinite = {path: f"from {when} on: {reason}" for path, reason in reasons.items()}
        warnings.warn(
            f"The model has no finite certified Lipschitz bound from {when} on: "
            f"{'; '.join(certificate.reasons)}",
            stacklevel=2,
        )

    # Plot -------------------------------------------------------------------------------------

    def plot(self, path: str | os.PathLike) -> None:
        """Draws the bounds of the last `fit` over its epochs: 1200 by 750 pixels as a PNG.

        The total is black, targets are dashed, running bounds dotted; `inf` is a triangle at the
        upper edge. The scale is logarithmic where values span more than a factor of 30.

        Args:
            path: Where to write the image; the ending of the name chooses the format.

        Raises:
            ValueError: If no epoch was watched yet.
            ImportError: If matplotlib is not installed.
            OSError: If the image cannot be written; an old one stays, and nothing is lost: the
                bounds are in `history`, to be drawn elsewhere.
        """
        if not self.epochs:
            raise ValueError(
                "There is nothing to draw before the first epoch of a `fit` with this monitor. "
                f"Received: path={str(path)!r}"
            )
        names = {entry.key: entry.path for entry in self._watched}
        plot_bounds(
            path,
            title=f"Certified Lipschitz bounds, {NORMS[self.norm]}",
            epochs=[epoch + 1 for epoch in self.epochs],
            total=self.history["lipschitz_total"],
            layers={name: self.history[f"lipschitz_{key}"] for key, name in names.items()},
            running={
                name: self.history[f"running_{key}"]
                for key, name in names.items()
                if f"running_{key}" in self.history
            },
            targets={names[key]: value for key, value in self._targets.items()},
        )
