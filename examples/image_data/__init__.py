"""Small images of ten classes, from this machine's files where it has them."""

from image_data.image_data import DATASETS, ImageData, load_images

__all__ = ["DATASETS", "ImageData", "load_images"]
