"""Results cached by the contents of arrays."""

import collections
import hashlib
import threading
import typing
import weakref

import numpy as np

Result = typing.TypeVar("Result")

_CAPACITY = 512
_results: collections.OrderedDict[tuple[str, bytes], typing.Any] = collections.OrderedDict()
# Read-only arrays by `id`: a reference to the array, and its digest or what it was computed from.
_known: dict[int, tuple[weakref.ref, bytes | tuple]] = {}
_lock = threading.RLock()


def cached_by_content(function: typing.Callable[..., Result], *args: typing.Any) -> Result:
    """`function(*args)`, cached by the contents of the arrays among `args`.

    Args:
        function: a pure function that returns an immutable object.
        *args: arrays, strings, numbers or `None`.

    Returns:
        The result of `function`. The arrays themselves are not kept.
    """
    key = function.__qualname__, _digest(args)
    with _lock:
        if key in _results:
            _results.move_to_end(key)
            return _results[key]
    value = function(*args)
    with _lock:
        _results[key] = value
        while len(_results) > _CAPACITY:
            _results.popitem(last=False)
    return value


def computed_from(array: np.ndarray, *sources: typing.Any) -> np.ndarray:
    """Makes a new array read-only and notes what it was computed from.

    Its content then counts as known by the contents of `sources`, which saves reading it.

    Args:
        array: an array that owns its memory. No other array may share it.
        *sources: arrays, strings, numbers or `None` that determine the array, the name of the
            computation among them. Without any the content is read once.

    Returns:
        The array itself.
    """
    array.setflags(write=False)
    _remember(array, sources)
    return array


def _digest(args: tuple) -> bytes:
    # Most processors have instructions for SHA-256.
    digest = hashlib.sha256()
    for arg in args:
        if isinstance(arg, np.ndarray):
            digest.update(_digest_of_array(arg))
        else:
            digest.update(f"{arg!r};".encode())
    return digest.digest()


def _digest_of_array(array: np.ndarray) -> bytes:
    kept, known = _known.get(id(array), (None, ()))
    is_known = kept is not None and kept() is array and not array.flags.writeable
    if is_known and isinstance(known, bytes):
        return known
    if is_known and known:
        found = _digest(("computed from", *known))
    else:
        digest = hashlib.sha256(f"array {array.dtype} {array.shape};".encode())
        # As bytes: bfloat16 has no buffer of its own.
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        found = digest.digest()
    if is_known:
        _remember(array, found)
    return found


def _remember(array: np.ndarray, known: bytes | tuple) -> None:
    key = id(array)

    def forget(reference):
        with _lock:
            if key in _known and _known[key][0] is reference:
                del _known[key]

    with _lock:
        _known[key] = weakref.ref(array, forget), known
