"""The models of the gallery, with the batch that each of them is run on."""

import dataclasses
import importlib
import importlib.util
import inspect
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import keras

from examples.gallery import batches

VERSIONS = ("as_written", "edited")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One model of the gallery.

    Attributes:
        name: Name of its module in each of the versions.
        batch: Returns inputs and targets.
        outputs: Shapes of its outputs, without the batch axis.
        needs: A package that it imports and this project does not install.
        assume_fixed_mask: Whether it is certified for masks that stay fixed, because the model
            computes one from its input.
        subclassed: Whether it is a subclass of `keras.Model`, which has no graph of its own.
        reload_note: Why the model as written differs after it is reloaded, if it does.
    """

    name: str
    batch: Callable[[], tuple[Any, Any]]
    outputs: tuple[tuple[int, ...], ...]
    needs: str = ""
    assume_fixed_mask: bool = False
    subclassed: bool = False
    reload_note: str = ""

    @property
    def missing(self) -> str:
        """Why it cannot run here, empty if it can."""
        if not self.needs or importlib.util.find_spec(self.needs) is not None:
            return ""
        return f"the package {self.needs} is not installed"

    def module(self, version: str) -> ModuleType:
        """The module of a version, which defines `make_model`."""
        return importlib.import_module(f"examples.gallery.{version}.{self.name}")

    def source(self, version: str) -> str:
        """The text of that module, read without importing it."""
        return (pathlib.Path(__file__).parent / version / f"{self.name}.py").read_text()

    def custom_objects(self, version: str) -> dict[str, type]:
        """The classes that the module defines, which Keras must be told of when it loads a file."""
        module = self.module(version)
        return {
            name: value
            for name, value in inspect.getmembers(module, inspect.isclass)
            if value.__module__ == module.__name__
        }

    def make(self, version: str) -> keras.Model:
        """The compiled model, with weights, from a fixed seed."""
        keras.utils.set_random_seed(0)
        model = self.module(version).make_model()
        if not model.built:
            model(self.batch()[0], training=False)
        return model


_TEXT, _WORDS = batches.TEXT_LENGTH, batches.VOCABULARY
EXAMPLES = (
    Example(name="vision_transformer", batch=batches.images, outputs=((batches.CLASSES,),)),
    Example(name="text_classification", batch=batches.texts, outputs=((2,),)),
    Example(
        name="miniature_gpt", batch=batches.next_tokens, outputs=((_TEXT, _WORDS), (_TEXT, 32))
    ),
    Example(name="timeseries_transformer", batch=batches.series, outputs=((2,),)),
    Example(
        name="video_classification",
        batch=batches.videos,
        outputs=((batches.CLASSES,),),
        assume_fixed_mask=True,
    ),
    Example(
        name="compact_convolutional_transformer",
        batch=batches.pixels,
        outputs=((batches.CLASSES,),),
        reload_note="`Dense(activation=keras.ops.gelu)` approximates GELU by tanh. Keras saves the "
        "function by its name and loads the exact `keras.activations.gelu`.",
    ),
    Example(name="tab_transformer", batch=batches.people, outputs=((1,),)),
    Example(
        name="named_entity_recognition",
        batch=batches.tagged_texts,
        outputs=((_TEXT, batches.TAGS),),
        subclassed=True,
    ),
    Example(
        name="speech_recognition",
        batch=batches.speech,
        outputs=((batches.TARGET_LENGTH, batches.CHARACTERS),),
        subclassed=True,
    ),
    Example(
        name="translation",
        batch=batches.sentences,
        outputs=((batches.SENTENCE_LENGTH, _WORDS),),
    ),
    Example(name="object_detection", batch=batches.boxes, outputs=((4,),)),
    Example(name="keras_hub_encoder", batch=batches.texts, outputs=((2,),), needs="keras_hub"),
)
