"""Checks a built site without network: links, anchors, images and public names.

    python -m tools.check_site build/docs

Every link within the site must lead to a file and to an anchor in it. Nothing may be loaded from
another host. Every public name of the package must be on a page. The status is 1 if anything is
missing.
"""

import argparse
import html.parser
import importlib
import pathlib
import sys
import types
import urllib.parse
import zlib

import keras_lipattn

# What a browser loads by itself. Links to other sites are not followed.
_LOADED = {"script": "src", "img": "src", "link": "href", "source": "src", "iframe": "src"}
_NAMED_ONLY = {"canonical", "author", "search", "index", "next", "prev", "help"}


class _Page(html.parser.HTMLParser):
    """The links, the loaded files and the anchors of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {anchor for name in ("id", "name") if (anchor := values.get(name))}
        if tag == "a" and (link := values.get("href")):
            self.links.append(link)
        target = values.get(_LOADED.get(tag, ""))
        if target and not (tag == "link" and values.get("rel") in _NAMED_ONLY):
            self.loaded.append(target)


def broken_links(folder: pathlib.Path) -> list[str]:
    """One line for each link to nothing, and for each file of another host that a page loads."""
    pages = {path: _Page(path.read_text()) for path in sorted(folder.rglob("*.html"))}
    problems = []
    for path, page in pages.items():
        name = path.relative_to(folder)
        for target in (*page.links, *page.loaded):
            parts = urllib.parse.urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loaded and parts.scheme != "data":
                    problems.append(f"{name}: loads {target}")
                continue
            linked = path.parent / urllib.parse.unquote(parts.path) if parts.path else path
            linked = linked.resolve()
            if not linked.exists():
                problems.append(f"{name}: no file {target}")
            elif parts.fragment and linked in pages:
                if urllib.parse.unquote(parts.fragment) not in pages[linked].anchors:
                    problems.append(f"{name}: no anchor {target}")
    return problems


def documented_names(folder: pathlib.Path) -> set[str]:
    """Names of Python objects on the pages, from the inventory of the site."""
    content = (folder / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = zlib.decompress(content).decode().splitlines()
    return {line.split(" ")[0] for line in lines if " py:" in line}


def public_names() -> dict[str, tuple[str, ...]]:
    """Each public name with the places that may document it, from `__all__`."""
    values = {name: getattr(keras_lipattn, name) for name in keras_lipattn.__all__}
    namespaces = [name for name, value in values.items() if isinstance(value, types.ModuleType)]
    places = {}
    for namespace in [*namespaces, "export"]:
        module = importlib.import_module(f"keras_lipattn.{namespace}")
        places |= {name: (f"{module.__name__}.{name}",) for name in module.__all__}
    for name in values:
        if name not in (*namespaces, "__version__"):
            places[name] = (*places.get(name, ()), f"keras_lipattn.{name}")
    return places


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args(argv).folder.resolve()
    problems = broken_links(folder)
    documented, names = documented_names(folder), public_names()
    problems += [
        f"no page describes {name}" for name, places in names.items() if not documented & {*places}
    ]
    print("\n".join(problems))
    texts = [path.read_text() for path in folder.rglob("*.html")]
    cells = [text.count('class="cell_input') for text in texts]
    print(
        f"{len(texts)} pages, {sum(count > 0 for count in cells)} of them notebooks with "
        f"{sum(cells)} executed blocks; {len(names)} public names; {len(problems)} problems"
    )
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
