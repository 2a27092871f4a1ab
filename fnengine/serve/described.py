"""What /openapi.json says of a route beside its name: path parameters, body, and the shape of errors."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

ERROR = {
    "title": "Error",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
_REF = "#/components/schemas/"


def extra(path: str, model: type[BaseModel] | None, own: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the description of a route has beside the application's own, components that it refers to).

    Args:
        own: its errors have a shape of their own.
    """
    content = {} if own else {"content": _json({"$ref": f"{_REF}Error"})}
    out: dict[str, Any] = {"responses": {"default": {"description": "An error", **content}}}
    names = re.findall(r"\{(\w+)(?::\w+)?\}", path)
    if names:
        out["parameters"] = [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names]
    if model is None:
        return out, {}
    schema = model.model_json_schema(ref_template=f"{_REF}{{model}}")
    components = schema.pop("$defs", {})
    return out | {"requestBody": {"required": True, "content": _json(schema)}}, components


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def add_components(app: FastAPI, components: dict[str, Any]) -> None:
    """Puts what the routes refer to into the application's description."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        found = plain()
        found.setdefault("components", {}).setdefault("schemas", {}).update({"Error": ERROR, **components})
        return found

    app.openapi = openapi  # type: ignore[method-assign]
