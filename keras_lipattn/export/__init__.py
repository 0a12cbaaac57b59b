"""Export of a trained model as a SavedModel that contains its certificate."""

from keras_lipattn.checker import Verification, verify_export
from keras_lipattn.export.saving import ExportedModel, export_saved_model
from keras_lipattn.export.serving_graph import ExportError

__all__ = ["ExportError", "ExportedModel", "Verification", "export_saved_model", "verify_export"]
