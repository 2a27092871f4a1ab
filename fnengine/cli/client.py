"""A client of an OpenAI-style server, from the standard library: JSON calls, and streams of server-sent events."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fnengine.errors import ConfigError, FnError


class ServerError(FnError):
    """A server answered with an error, or broke off."""


@dataclass(frozen=True)
class Server:
    """Where a server is and how to be let in."""

    url: str
    key: str | None = None

    def headers(self) -> dict[str, str]:
        own = {"content-type": "application/json"}
        return own if self.key is None else {**own, "authorization": f"Bearer {self.key}"}

    def path(self, route: str) -> str:
        """The route below the URL's own path; a trailing /v1, which OpenAI clients want, may be there or not."""
        base = urlsplit(self.url).path.rstrip("/")
        return base.removesuffix("/v1") + route

    def get(self, route: str) -> Any:
        """The JSON answer of a GET. Raises ConfigError or ServerError."""
        connection, response = self._ask("GET", route, None)
        try:
            return _json(response)
        finally:
            connection.close()

    def post(self, route: str, body: dict[str, Any]) -> Any:
        """The JSON answer of a POST. Raises ConfigError or ServerError."""
        connection, response = self._ask("POST", route, body)
        try:
            return _json(response)
        finally:
            connection.close()

    def first_model(self) -> str:
        """The name the server lists first."""
        models = self.get("/v1/models")["data"]
        if not models:
            raise ServerError("the server lists no model", where=self.url)
        return models[0]["id"]

    def events(self, route: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The data of each event of a streamed POST. Closing the iterator closes the connection, which aborts it."""
        connection, response = self._ask("POST", route, {**body, "stream": True})
        try:
            if response.status != 200:
                _json(response)
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                data = line[6:].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if event.get("error"):
                    raise ServerError(event["error"]["message"], where=self.url)
                yield event
            raise ServerError("the stream broke off", where=self.url)
        except (http.client.HTTPException, OSError, json.JSONDecodeError) as e:
            raise ServerError(f"the stream broke off: {type(e).__name__}: {e}", where=self.url) from None
        finally:
            connection.close()

    def _ask(self, method: str, route: str, body: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.url!r} is no URL", where="--url", remedy="such as http://127.0.0.1:8000")
        make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = make(parts.hostname, parts.port, timeout=600)
        try:
            connection.request(method, self.path(route), None if body is None else json.dumps(body), self.headers())
            return connection, connection.getresponse()
        except (OSError, http.client.HTTPException, socket.gaierror) as e:
            connection.close()
            raise ConfigError(
                f"no server answers: {e}", where=self.url, remedy="start one with `fnengine serve`, or give its --url"
            ) from None


def _json(response: http.client.HTTPResponse) -> Any:
    """The answer's JSON. Raises ServerError with the server's own message for anything but 200."""
    text = response.read().decode(errors="replace")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if response.status == 200 and value is not None:
        return value
    error = value.get("error") if isinstance(value, dict) else None
    message = error.get("message") if isinstance(error, dict) else text[:200]
    raise ServerError(f"the server answered {response.status}: {message}")
