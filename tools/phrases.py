"""Finds phrases and spellings that the project does not use, and prints where they are.

    python -m tools.phrases [FILE ...]

Without files it reads all Python, Markdown and configuration files of the repository. The status is
1 if it finds anything.
"""

import pathlib
import re
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = (
    "keras_lipattn",
    "docs",
    "examples",
    "tools",
    "tests",
    "tests_backends",
    ".ci",
    ".github",
)
SUFFIXES = {".cfg", ".cff", ".md", ".py", ".toml", ".txt", ".yaml", ".yml", ""}
# Riddles and personification: each has a plain form.
PHRASES = (
    "as they run",
    "at hand",
    "beside",
    "by the clock",
    "hears",
    "in words",
    "likewise",
    "nobody",
    "none louder",
    "of ours",
    "somebody",
    "the very",
    "what comes of it",
    "what comes out",
    "whoever",
)
# Stems of British spellings.
BRITISH = (
    r"\w*(?:normal|penal|regular|optim|initial|serial|summar|symmetr|vector|general|special|quant"
    r"|recogn|minim|maxim|random|real|token|parametr|factor|local|global|stabil|util|discret|equal"
    r"|final|neutral|categor|priorit|visual|organ|synchron|linear)is(?:e[drs]?|ing|ation|ations)",
    r"\w*(?:cent|met|fib)re[ds]?",
    r"\w*(?:col|behavi|neighb|fav|hon|lab|rum)our\w*",
    r"(?:model|label|cancel|travel|signal|total|channel)l(?:ed|ing)",
    r"analys(?:e|ed|es|ing)",
    r"grey\w*",
    r"artefacts?|licence|defence|whilst|amongst|catalogue",
)
# These contain the phrases on purpose.
UNCHECKED = ("tools/phrases.py", "tests/test_phrases.py")
# Titles of papers keep their spelling.
EXCEPTIONS = ("Regularisation of neural networks",)
_FORBIDDEN = re.compile(
    rf"\b(?:{'|'.join([*(re.escape(phrase) for phrase in PHRASES), *BRITISH])})\b", re.IGNORECASE
)


def find(text: str) -> Iterator[tuple[int, str]]:
    """Line numbers and the phrases found there. A phrase may continue on the next line."""
    for title in EXCEPTIONS:
        text = text.replace(title, " " * len(title))
    # Line ends, with indents and comment signs, count as spaces. The length stays the same.
    joined = re.sub(r"\n[ \t]*(?:#[ \t])?", lambda match: " " * len(match.group()), text)
    joined = re.sub(r"  +", lambda match: " " + "\0" * (len(match.group()) - 1), joined)
    kept = [index for index, character in enumerate(joined) if character != "\0"]
    for match in _FORBIDDEN.finditer(joined.replace("\0", "")):
        yield text.count("\n", 0, kept[match.start()]) + 1, match.group()


def files() -> list[pathlib.Path]:
    """The files that are read by default."""
    found = [path for path in ROOT.iterdir() if path.name not in ("LICENSE", ".git")]
    for folder in FOLDERS:
        found += (ROOT / folder).rglob("*")
    found = [path for path in found if path.is_file() and path.suffix in SUFFIXES]
    return sorted(path for path in found if str(path.relative_to(ROOT)) not in UNCHECKED)


def main(paths: list[str]) -> int:
    count = 0
    for path in [pathlib.Path(path) for path in paths] or files():
        for line, phrase in find(path.read_text()):
            print(
                f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{line}: {phrase}"
            )
            count += 1
    if count:
        print(f"{count} phrases that tools/phrases.py lists. Write them in plain American English.")
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
