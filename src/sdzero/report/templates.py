"""Jinja templates of the report: a whole page, or a part of it embedded in a notebook."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


def render_template(template: str, **context: Any) -> str:
    """Render a template that extends base.html. Equal contexts give equal bytes."""
    return _environment().get_template(template).render(**_assets(), **context)


def embed(part: str, height: int, **context: Any) -> str:
    """Render a part of the page as a frame that a notebook shows, with the page's style and script."""
    source = f'{{% extends "base.html" %}}{{% block body %}}{{% include "{part}" %}}{{% endblock %}}'
    document = _environment().from_string(source).render(**_assets(), name=part, **context)
    return f'<iframe srcdoc="{escape(document)}" style="width:100%;height:{height}px;border:0"></iframe>'


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sdzero.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":"), "allow_nan": False}
    environment.filters["shorten"] = shorten
    return environment


@cache
def _assets() -> dict[str, str]:
    """Style and script of the page; its security policy allows only the script with this hash."""
    environment = _environment()
    assert environment.loader is not None
    style, script = (environment.loader.get_source(environment, name)[0] for name in ("page.css", "token_viewer.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"style": Markup(style), "script": Markup(script), "script_digest": digest}


def shorten(value: str) -> str:
    """Return the first twelve digits of a SHA-256; any other value as it is."""
    return value[:12] if re.fullmatch(r"[0-9a-f]{64}", value) else value
