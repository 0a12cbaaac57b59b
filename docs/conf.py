"""Configuration of the site, which `make docs` builds from the pages of this folder."""

import hashlib
import inspect
import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# For this process and for the kernels that run the notebooks.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_lipattn
from tools import layer_table
from tools.check_site import public_names

project = "keras-lipattn"
author = "The keras-lipattn developers"
version = release = keras_lipattn.__version__
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_*"]
highlight_language = "none"
nitpicky = True
# Names of Keras, NumPy and Python: their sites cannot be asked without network.
nitpick_ignore_regex = [("py:.*", r"(?!keras_lipattn\b).*")]

# Pages -------------------------------------------------------------------------------------------

myst_enable_extensions = ["colon_fence", "dollarmath", "smartquotes"]
myst_heading_anchors = 4
# Formulas: a fence that GitHub draws as well.
myst_fence_as_directive = ["math"]
myst_links_external_new_tab = False
# A notebook runs again when its code changes, or any code of the package.
_sources = sorted((ROOT / "keras_lipattn").rglob("*.py"))
_version = hashlib.sha256(b"".join(path.read_bytes() for path in _sources)).hexdigest()[:16]
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "build" / "docs_cache" / _version)
nb_execution_raise_on_error = True
nb_execution_timeout = 600
# What TensorFlow logs when it starts.
nb_output_stderr = "remove"

# Appearance --------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"keras-lipattn {release}"
html_copy_source = False
html_show_sourcelink = False
# MathJax, as one file, next to the packages of the environment.
html_static_path = ["_static", f"{sys.prefix}/share/mathjax"]
html_css_files = ["site.css"]
mathjax_path = "tex-svg.js"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# Docstrings --------------------------------------------------------------------------------------

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Call arguments", "params_style"), ("Reference", "notes_style")]

# Where the site documents each public name.
_PUBLIC = {name: places[0] for name, places in public_names().items()}
_STATEMENT = re.compile(
    r"^(?:\*\*|#+ )(?:Theorem|Lemma|Statement|Corollary) (\d[\w.]*\w|\d)\b", re.M
)
_STATEMENTS = set(_STATEMENT.findall((ROOT / "docs" / "theory.md").read_text()))


def _anchor(number: str) -> str:
    return "theorem-" + number.lower().replace(".", "-")


# A link to a file of the repository that is no page, as in `docs/gallery.md`.
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:examples|tests|tools|SECURITY\.md)[^)]*\)")


def complete_pages(app, docname, source):
    """Gives theorems their anchors and the layer table its rows; names files without a link."""
    source[0] = _OUTSIDE.sub(r"`\1`", source[0])
    if docname == "theory":
        source[0] = _STATEMENT.sub(lambda m: f"({_anchor(m[1])})=\n{m[0]}", source[0])
    if docname == "layer_table":
        table = layer_table.page(link_theorems)
        source[0] = source[0].replace("<!-- layer table -->", table)


def link_theorems(text: str) -> str:
    """Markdown with a link for each theorem that the theory page states."""
    return _THEOREMS.sub(lambda m: _linked(m[0], "[{0}](#{1})"), text)


# "Theorem 3.B", "Theorems 5.1 to 5.3", "Theorems 3.E and 4.1". Not those of a paper.
_THEOREMS = re.compile(
    r"(?<!ICML 2021, )(?<!Kim et al\., )(?:Theorem|Lemma)s? "
    r"\d[\w.]*(?:(?:, | to |,? and | or )\d[\w.]*)*"
)


def _linked(text: str, form: str) -> str:
    def link(match):
        number = match[0].rstrip(".")
        if number not in _STATEMENTS:
            return match[0]
        return form.format(number, _anchor(number)) + match[0][len(number) :]

    return re.sub(r"\d[\w.]*", link, text)


def from_markdown(app, what, name, obj, options, lines):
    """Turns the Markdown of the docstrings into reStructuredText, and names into links."""
    result, prose, fence, doctest = [], [], None, False
    for line in [*lines, ""]:
        opening = re.match(r"^(\s*)```(\w*)$", line)
        starts = line.lstrip().startswith(">>>")
        doctest = fence is None and (starts or (doctest and bool(line.strip())))
        if not (opening or fence is not None or doctest):
            prose.append(line)
            continue
        result += _restructured(prose, name)
        prose = []
        if opening and fence is None:
            fence = opening[1]
            result += [f"{fence}.. code-block:: {opening[2] or 'text'}", ""]
        elif opening:
            fence = None
            result.append("")
        else:
            result.append(line if fence is None else f"    {line}")
    lines[:] = result + _restructured(prose, name)


def _restructured(lines: list[str], name: str) -> list[str]:
    # reStructuredText has no code in bold text.
    text = re.sub(r"\*\*[^*]+\*\*", lambda m: m[0].replace("`", ""), "\n".join(lines))
    parts = re.split(r"(`[^`]+`)", text)
    for i in range(2, len(parts), 2):
        # Nor may a letter follow code, or a link.
        parts[i] = re.sub(r"^(?=\w)", r"\\ ", parts[i])
    return "".join(_part(part, name) for part in parts).split("\n") if lines else []


def _part(part: str, name: str) -> str:
    if part.startswith("`"):
        code = " ".join(part.strip("`").split())
        place = _PUBLIC.get(code)
        if place and place != name:
            return f":py:obj:`~{place}`"
        return f"``{code}``"
    part = _THEOREMS.sub(lambda m: _linked(m[0], ":ref:`{0} <{1}>`"), part)
    part = re.sub(r"docs/(\w+)\.md", r":doc:`\1 </\1>`", part)
    return part.replace("|", r"\|")


def skip_fields(app, what, name, obj, skip, options):
    """Leaves out the fields of named tuples, which the docstring of the class describes."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def initializer_signature(app, what, name, obj, options, signature, returns):
    """The arguments of `__init__` for layers, whose `__new__` takes anything."""
    if what != "class" or signature != "(*args, **kwargs)":
        return None
    parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
    bare = [parameter.replace(annotation=parameter.empty) for parameter in parameters]
    return str(inspect.Signature(bare)), None


def setup(app):
    app.connect("source-read", complete_pages)
    app.connect("autodoc-process-docstring", from_markdown, priority=400)
    app.connect("autodoc-process-signature", initializer_signature)
    app.connect("autodoc-skip-member", skip_fields)
