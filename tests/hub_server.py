"""A small hub: the real client pushes to it and fetches from it, over HTTP on this machine."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

TOKEN = "hf_of_a_test"


@dataclass
class Hub:
    """What the server holds, and what it was asked.

    Args:
        url: Where it listens.
        commits: By repository, oldest first: hash and files of each.
        closed: Repositories that no one may see, or read: an error code of the hub.
    """

    url: str
    commits: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    visibility: dict[str, str | None] = field(default_factory=dict)
    closed: dict[str, str] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        """Put files beside those that a repository holds; returns the commit's hash."""
        commits = self.commits.setdefault(name, [])
        files = {**(commits[-1][1] if commits else {}), **files}
        commits.append((sha1(f"{name} {len(commits)}".encode()).hexdigest(), files))
        return commits[-1][0]

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of that hash, or the last."""
        known = dict(self.commits[name])
        sha = self.commits[name][-1][0] if revision == "main" else revision
        return (sha, known[sha]) if sha in known else None

    @property
    def fetched(self) -> set[str]:
        """Paths of all files that were asked for."""
        return {path.split("/", 5)[5] for _, path in self.asked if "/resolve/" in path}


def respond(hub: Hub, method: str, path: str, body: bytes, token: str) -> Any:
    """An answer: JSON values; a status, an error code, any values; or a commit and a file of it."""
    parts = path.strip("/").split("/")
    if method == "PUT":
        hub.large[parts[-1]] = body
        return {}
    if path == "/api/validate-yaml":
        return {"errors": [], "warnings": []}
    if method == "POST" and token != TOKEN:
        return 401, ""
    if path == "/api/repos/create":
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        hub.visibility.setdefault(name, asked.get("visibility"))
        known = name in hub.commits
        hub.commits.setdefault(name, [])
        made = {"url": f"{hub.url}/{name}"}
        return (409, "", made) if known else made
    name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
    if name not in hub.commits or hub.closed.get(name) == "RepoNotFound":
        return 401, "RepoNotFound"
    if path.endswith("/objects/batch"):
        wanted = [{"oid": o["oid"], "size": o["size"]} for o in json.loads(body)["objects"]]
        put = {"upload": {"href": ""}}
        return {
            "objects": [
                {**o, "actions": put | {"upload": {"href": f"{hub.url}/put/{o['oid']}"}}}
                for o in wanted
            ]
        }
    if parts[0] == "api" and len(parts) == 4:
        files = hub.commits[name][-1][1] if hub.commits[name] else {}
        private = hub.visibility.get(name) == "private"
        siblings = [{"rfilename": path} for path in files]
        return {"id": name, "private": private, "siblings": siblings}
    if parts[0] == "api" and parts[4] == "preupload":
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
        return {
            "files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]
        }
    if parts[0] == "api" and parts[4] == "commit":
        sha = hub.commit(name, dict(committed(hub, body)))
        return {"commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha}
    found = hub.find(name, unquote(parts[5] if parts[0] == "api" else parts[3]))
    if found is None:
        return 404, "RevisionNotFound"
    sha, files = found
    if parts[0] == "api" and parts[4] == "revision":
        return {"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in files]}
    if parts[0] == "api" and parts[4] == "tree":
        return [
            {"type": "file", "path": path, "size": len(data), "oid": sha1(data).hexdigest()}
            for path, data in files.items()
        ]
    if hub.closed.get(name) == "GatedRepo":
        return 403, "GatedRepo"
    file = unquote("/".join(parts[4:]))
    return (sha, files[file]) if file in files else (404, "EntryNotFound")


def committed(hub: Hub, body: bytes) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of a commit's files, large ones as they were put before."""
    for line in body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "file":
            yield value["path"], base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            data = hub.large[value["oid"]]
            assert sha256(data).hexdigest() == value["oid"]
            yield value["path"], data


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    """A handler of requests to that hub."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            path = urlsplit(self.path).path
            hub.asked.append((self.command, path))
            body = self._body()
            token = self.headers.get("authorization", "").removeprefix("Bearer ")
            found = respond(hub, self.command, path, body, token)
            if isinstance(found, tuple) and isinstance(found[0], int):
                said = json.dumps(found[2] if found[2:] else {}).encode()
                self._send(found[0], said, {"X-Error-Code": found[1]} if found[1] else {})
            elif isinstance(found, tuple):
                etag = f'"{sha1(found[1]).hexdigest()}"'
                self._send(200, found[1], {"X-Repo-Commit": found[0], "ETag": etag})
            else:
                self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def _body(self) -> bytes:
            if self.headers.get("transfer-encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("content-length", 0)))
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def served(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub that this process's client talks to, with an empty cache and a token.

    Args:
        monkeypatch: Puts the client's settings back.
        cache: Where the client keeps what it downloads.
    """
    hub = Hub("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    # The client reads its environment once, when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose storage is no such server
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(cache / "agents.json"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    close_session()
    try:
        yield hub
    finally:
        close_session()
        server.shutdown()
        server.server_close()
        thread.join()
