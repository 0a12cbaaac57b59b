"""Kills trainings at random moments, runs them again, and compares the end with a whole one.

    python -m tools.chaos --kills=20 --seed=0 --minutes=15

A program that trains on handwritten digits is killed by SIGKILL while it starts, trains, certifies
or writes, and run again until it ends. This is repeated up to the number of kills. After each kill
every file must be whole and no epoch lost. At the end the history, weights, running vectors,
penalty coefficient, optimizer state and random number state must equal, bit for bit, those of an
uninterrupted training. A table lists the phase of each kill.

--program=exports kills exports instead, while another process exports to the same folder. Every
version must be complete, files of other programs unchanged, and nothing left after the last export.

Exit codes: 0 if all of that holds, 1 if not, or if time is up before the last kill.
--whose=keras does the same with the callbacks of Keras, which do not pass. --whose=managed backs up
with `tf.train.CheckpointManager`, --whose=orbax with `keras.callbacks.OrbaxCheckpoint`, which needs
`pip install orbax-checkpoint jax`.
"""

import os

from absl import app, flags

from keras_lipattn._temporary_names import temporary_folder
from tools.chaos.attack import attack
from tools.chaos.exports import attack_exports

_KILLS = flags.DEFINE_integer("kills", 20, "Number of kills.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", None, "Seed of the moments; by default a new one.")
_MINUTES = flags.DEFINE_float("minutes", 15.0, "Give up after this time.", lower_bound=0.0)
_EPOCHS = flags.DEFINE_integer("epochs", 6, "Epochs of a training.", lower_bound=1)
_PROGRAM = flags.DEFINE_enum("program", "trainings", ["trainings", "exports"], "What is killed.")
_WHOSE = flags.DEFINE_enum(
    "whose", "durable", ["durable", "keras", "managed", "orbax"], "Whose callbacks write."
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    seed = _SEED.value if _SEED.value is not None else int.from_bytes(os.urandom(4), "big")
    with temporary_folder("chaos") as folder:
        if _PROGRAM.value == "exports":
            return attack_exports(folder, kills=_KILLS.value, seed=seed, minutes=_MINUTES.value)
        return attack(
            folder,
            kills=_KILLS.value,
            seed=seed,
            minutes=_MINUTES.value,
            epochs=_EPOCHS.value,
            whose=_WHOSE.value,
        )


if __name__ == "__main__":
    app.run(main)
