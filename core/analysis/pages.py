"""Pages of one HTML file that need nothing else: what they share, and how their templates are read."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{% block title %}{% endblock %}</title>
<link rel="icon" href="data:,">
<style>
{% block style %}{% endblock %}
</style>
</head>
<body>
{% block body %}{% endblock %}
</body>
</html>
"""


def page_template(file: Path, **functions: Any) -> Any:
    """A Jinja2 template that begins with ``{% extends "page" %}`` and fills its title, style and body.

    What it is given is escaped; ``base64`` turns the bytes of a picture into those of a data URI, and nothing else may
    be loaded. ``functions``: what the template calls besides, as filters or by name.
    """
    from jinja2 import DictLoader, Environment

    page = Environment(loader=DictLoader({"page": _PAGE}), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"base64": lambda png: base64.b64encode(png).decode(), **functions}
    page.globals |= functions
    return page.from_string(file.read_text())
