"""What the benchmarks share as programs: flags, and how a report comes about."""

import pathlib
from collections.abc import Callable

import keras
from absl import app, flags, logging

from tools.benchmark._report import FOLDER, Report, Row, machine

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 15, "Number of rounds a median is taken over.", lower_bound=1)
flags.DEFINE_bool("quick", False, "Leave out the cases that take long.")
flags.DEFINE_integer("threads", None, "Threads of TensorFlow; one per core by default.", 1)
flags.DEFINE_string("output", str(FOLDER), "Folder the JSON file is written to.")


def run(name: str, claim: str, measure: Callable[[], list[Row]]) -> None:
    """Runs `measure` as a program that publishes its rows as `NAME.json` and as a table."""

    def main(arguments):
        if len(arguments) > 1:
            raise app.UsageError(f"There are no arguments but flags. Received: {arguments[1:]}")
        if FLAGS.threads is not None:
            if keras.backend.backend() != "tensorflow":
                raise app.UsageError(
                    f"`threads` is for TensorFlow. Received: {keras.backend.backend()!r}"
                )
            import tensorflow as tf

            tf.config.threading.set_intra_op_parallelism_threads(FLAGS.threads)
            tf.config.threading.set_inter_op_parallelism_threads(FLAGS.threads)
        # Exports announce every step otherwise.
        logging.set_verbosity(logging.WARNING)
        surroundings = machine()
        report = Report(name, claim, measure(), FLAGS.rounds, surroundings)
        report.publish(pathlib.Path(FLAGS.output))

    app.run(main)
