"""An independent check of exports, which shares only the theorems with the rest of the package."""

from keras_lipattn.checker.verifying import Verification, verify_export

__all__ = ["Verification", "verify_export"]
