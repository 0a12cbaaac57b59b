"""Random changes of bytes, of JSON and of zip archives."""

import copy
import io
import json
import zipfile
from typing import Any

import numpy as np

HOSTILE: list[Any] = [
    None,
    True,
    "",
    "0.1",
    "inf",
    "nan",
    "-inf",
    "\x00",
    "../../x",
    0,
    -1,
    0.0,
    -0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    2**63,
    10**400,
    [],
    [[]],
    [None],
    {},
    {"": None},
]


def changed_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Flipped bits, cut, doubled, or overwritten bytes."""
    data = bytearray(content)
    kind = rng.integers(5)
    at = int(rng.integers(len(data))) if data else 0
    if kind == 0:
        for place in rng.integers(0, len(data), rng.integers(1, 9)) if data else ():
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        size = int(rng.integers(1, 64))
        data[at : at + size] = rng.bytes(size)
    elif kind == 3:
        del data[at : at + int(rng.integers(1, 64))]
    else:
        data[at:at] = data[at : at + int(rng.integers(1, 64))]
    return bytes(data)


def changed_json(content: Any, rng: np.random.Generator, extra: list[Any] | None = None) -> Any:
    """A copy with one to four entries replaced, removed, renamed or taken from elsewhere."""
    content = copy.deepcopy(content)
    for _ in range(rng.integers(1, 5)):
        places = list(_places(content))
        if not places:
            return content
        holder, key = places[rng.integers(len(places))]
        kind = rng.integers(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[f"{key}_"] = holder.pop(key)
        elif kind == 2:
            other, place = places[rng.integers(len(places))]
            holder[key] = copy.deepcopy(other[place])
        else:
            values = HOSTILE + (extra or [])
            holder[key] = copy.deepcopy(values[rng.integers(len(values))])
    return content


def _places(content: Any):
    """All containers of a structure with each of their keys."""
    keys = content if isinstance(content, dict) else range(len(content))
    for key in keys:
        yield content, key
        if isinstance(content[key], dict | list):
            yield from _places(content[key])


def changed_text(text: str, rng: np.random.Generator) -> str:
    """Text of JSON, changed in its structure or in its characters."""
    kind = rng.integers(8)
    if kind == 0:
        return changed_bytes(text.encode(), rng).decode(errors="replace")
    if kind == 1:
        depth = int(rng.integers(1, 200000))
        return "[" * depth + "]" * depth
    if kind == 2:
        # The last one of two equal keys counts.
        return text.replace("{", '{"total": -1, ', int(rng.integers(1, 3)))
    return json.dumps(changed_json(json.loads(text), rng))


def changed_archive(content: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """A zip archive with members swapped, removed, doubled, changed, or taken from others."""
    members = _members(content)
    names = list(members)
    other = _members(others[rng.integers(len(others))])
    kind = rng.integers(6)
    name = names[rng.integers(len(names))]
    if kind == 0:
        second = names[rng.integers(len(names))]
        members[name], members[second] = members[second], members[name]
    elif kind == 1:
        del members[name]
    elif kind == 2:
        members[name] = changed_bytes(members[name], rng)
    elif kind == 3:
        members[name] = next(v for k, v in [*other.items(), (name, b"")] if k in (name, *other))
    elif kind == 4:
        members.update({name: other[name]} if name in other else {"../evil.txt": b"x"})
    else:
        members[f"{name}/{name}"] = members[name]
    return archive(members)


def _members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def archive(members: dict[str, bytes]) -> bytes:
    """A zip archive of these members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as written:
        for name, data in members.items():
            written.writestr(name, data)
    return buffer.getvalue()


def changed_member(content: bytes, name: str, rng: np.random.Generator, extra: list[Any]) -> bytes:
    """An archive with a member of JSON changed in its structure."""
    members = _members(content)
    members[name] = json.dumps(changed_json(json.loads(members[name]), rng, extra)).encode()
    return archive(members)
