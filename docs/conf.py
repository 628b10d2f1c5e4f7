"""``python -m sphinx -W -b html docs DIR`` makes a page of each file of this folder and of each room of the API."""

import re

import evmamba_jax

project = "evmamba-jax"
author = "The evmamba-jax authors"
release = evmamba_jax.__version__

extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"

myst_heading_anchors = 4  # links such as training.md#evaluation

apidoc_modules = [
    {
        "path": f"../{package}",
        "destination": f"api/{package}",
        "exclude_patterns": [f"../{package}/{module}.py" for module in hidden],
        "module_first": True,
        "automodule_options": {"members", "show-inheritance"},
    }
    for package, hidden in (
        ("evmamba_jax", []),
        ("pallas_kernels", ["scan2d", "selective_scan"]),  # functions of the package hide the modules of their names
    )
]
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a field that a docstring lists is described once
suppress_warnings = ["ref.python"]  # a public name is at home in its module and in its package


def setup(app) -> None:
    """Leave of a link to a file outside this folder its words: those files are no pages here."""

    def in_words(app, page: str, source: list[str]) -> None:
        source[0] = re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", source[0])

    app.connect("source-read", in_words)
