"""What the programs of this folder share: flags, result files, tables and plots."""

import argparse
import json
import pathlib
import re
import sys
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAGE = "README.md"
WIDTH, HEIGHT = 7.0, 4.2


def arguments(
    documentation: str | None,
    argv: list[str] | None = None,
    corpus: tuple[str, ...] = (),
) -> argparse.Namespace:
    """The flags which every program has.

    Args:
        documentation: Documentation of the program, whose first line heads the help.
        argv: Arguments, those of the process by default.
        corpus: For programs which read a text, the names of the texts to choose from.

    Returns:
        A namespace with `full`, `redraw` and `folder`; with texts also `corpus`, `None` if none is
        chosen.
    """
    parser = argparse.ArgumentParser(description=(documentation or "").partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="run the full setting, not the small")
    parser.add_argument(
        "--redraw", action="store_true", help="draw tables and plots from the result file in FOLDER"
    )
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        default=pathlib.Path("build/papers"),
        help="where the result file, tables and plots are (default: %(default)s)",
    )
    if corpus:
        parser.add_argument("--corpus", choices=corpus, help="text to learn")
    return parser.parse_args(argv)


def produce(name: str, options: argparse.Namespace, compute, draw) -> dict:
    """Computes and keeps results, or loads kept ones, and draws them.

    Args:
        name: Name of the result file, without suffix.
        options: What `arguments` returned.
        compute: Function of `full` that returns the results, a dictionary fit for JSON.
        draw: Function `(results, folder)` that makes tables and plots.

    Returns:
        The results.

    Raises:
        FileNotFoundError: If there is no result file to redraw.
    """
    path = options.folder / f"{name}.json"
    if options.redraw:
        if not path.is_file():
            raise FileNotFoundError(
                f"There are no results to redraw: run without --redraw first. Received: {path}"
            )
        results = json.loads(path.read_text())
    else:
        start = time.monotonic()
        results = compute(options.full)
        flags = " --full" * options.full
        if getattr(options, "corpus", None):
            flags += f" --corpus {options.corpus}"
        results["command"] = f"python examples/papers/{name}.py{flags} --folder {options.folder}"
        # A program that goes on after an interruption knows better how long it took.
        results.setdefault("seconds", round(time.monotonic() - start, 1))
        options.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(_as_text(results))
    draw(results, options.folder)
    return results


def table(name: str, folder: pathlib.Path, header: list[str], rows: list[list[str]]) -> str:
    """Prints a table, and puts it at its place in the page of `folder` if there is one.

    The place is what stands between `<!-- table NAME -->` and `<!-- end NAME -->`.

    Args:
        name: Name of the table.
        folder: Where the page is.
        header: Titles of the columns.
        rows: Cells, as many a row as there are titles.

    Returns:
        The table in Markdown.

    Raises:
        ValueError: If there is a page without a place for the table.
    """
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    sys.stdout.write(f"{text}\n")
    page = folder / PAGE
    if page.is_file():
        begin, end = f"<!-- table {name} -->\n", f"<!-- end {name} -->"
        place = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        content, count = place.subn(lambda _: f"{begin}\n{text}\n\n{end}", page.read_text())
        if count != 1:
            raise ValueError(
                f"The page needs one place for the table {name!r}, between {begin!r} and {end!r}. "
                f"Received: {page} with {count}"
            )
        page.write_text(content)
    return text


def _as_text(results):
    """JSON with one line for each key, and six digits."""
    lines = [f"{json.dumps(key)}: {json.dumps(_rounded(value))}" for key, value in results.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def figure(columns: int = 1):
    """A figure with some plots side by side: the figure and a list of axes."""
    fig, axes = plt.subplots(
        1, columns, figsize=(WIDTH if columns == 1 else 5.2 * columns, HEIGHT), squeeze=False
    )
    for axis in axes[0]:
        axis.grid(True, which="major", color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return fig, list(axes[0])


def save(fig, folder: pathlib.Path, name: str) -> pathlib.Path:
    """Writes a figure as PNG, the same bytes for the same results."""
    path = folder / f"{name}.png"
    fig.tight_layout()
    fig.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(fig)
    return path
