"""Training on several machines with TensorFlow: what Keras alone does not do yet."""

from keras_lipattn.distribution.finished_worker import FinishedWorker
from keras_lipattn.distribution.is_chief import is_chief
from keras_lipattn.distribution.multi_worker import multi_worker
from keras_lipattn.distribution.run_workers import run_workers
from keras_lipattn.distribution.shared_backup import SharedBackup

__all__ = ["FinishedWorker", "SharedBackup", "is_chief", "multi_worker", "run_workers"]
