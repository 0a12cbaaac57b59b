"""From a trained model to a SavedModel that carries its certificate."""

from keras_lipattn.export.export_error import ExportError
from keras_lipattn.export.export_saved_model import export_saved_model

__all__ = ["ExportError", "export_saved_model"]
