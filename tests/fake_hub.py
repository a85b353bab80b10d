"""A hub on this machine: as much of the Hugging Face hub's protocol as fetching a snapshot needs."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def handler(models: dict[str, Path], fetched: list[str]) -> type[BaseHTTPRequestHandler]:
    """Serves folders by hub id, and writes down the files that it gave."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            listing = re.fullmatch(r"/api/models/([\w-]+/[\w.-]+)/(revision|tree)/\w+/?", path)
            file = re.fullmatch(rf"/([\w-]+/[\w.-]+)/resolve/{COMMIT}/(.+)", path)
            found = listing or file
            if found is None or found[1] not in models:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif listing:
                self.answer(200, json.dumps(self.listing(models[found[1]], listing[2])).encode())
            else:
                if self.command == "GET":
                    fetched.append(file[2])
                content = (models[found[1]] / file[2]).read_bytes()
                tag = f'"{file[2].replace("/", "-")}"'
                self.answer(200, content, {"ETag": tag, "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET  # noqa: N815

        @staticmethod
        def listing(folder: Path, kind: str) -> object:
            if kind == "revision":
                return {"id": "owner/name", "sha": COMMIT, "siblings": []}
            files = [path for path in folder.rglob("*") if path.is_file()]
            return [
                {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": path.name}
                for path in files
            ]

        def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def point_to(endpoint: str, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Makes huggingface_hub, which reads its environment when it is imported, use this endpoint and this cache."""
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))


@contextmanager
def fake_hub(models: dict[str, Path], cache: Path, patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub with these models; gives the list of the files that are fetched from it."""
    fetched: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(models, fetched))
    Thread(target=server.serve_forever, daemon=True).start()
    point_to(f"http://127.0.0.1:{server.server_address[1]}", cache, patch)
    try:
        yield fetched
    finally:
        server.shutdown()
        server.server_close()
