"""A hub on this machine: the few questions that huggingface_hub asks of the real one, over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_thisisasecret"
USER = {
    "type": "user", "name": "me", "orgs": [{"name": "ours"}],
    "auth": {"type": "access_token", "accessToken": {"role": "write", "displayName": "t"}},
}  # fmt: skip


@dataclass
class Repository:
    """``commits``: hash -> file name -> content; ``refs``: branch or tag -> hash."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], *names: str) -> str:
        """A new state, which the branch ``main`` and ``names`` are from now on."""
        digest = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.refs.update(dict.fromkeys(("main", *names), digest))
        return digest


@dataclass
class Hub:
    """``asked``: the requests so far, as (method, path, token)."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    large: str = ".safetensors"
    role: str = "write"
    out_of_order: bool = False
    refuses_commits: bool = False

    def add(self, name: str, files: Mapping[str, bytes], **state: bool) -> Repository:
        repository = self.repositories[name] = Repository(**state)
        repository.commit(files)
        return repository

    def fetched(self) -> set[str]:
        """The names of the files whose bytes were asked for."""
        return {
            path.split("/resolve/")[1].partition("/")[2]
            for how, path, _ in self.asked
            if how == "GET" and "/resolve/" in path
        }


class _AnswerError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", url: str = "") -> None:
        self.status, self.code, self.message, self.url = status, code, message, url


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self._content()
        self.state.asked.append((self.command, path, self.token))
        try:
            if self.state.out_of_order:
                raise _AnswerError(503)
            status, found = 200, self._route(path)
            if isinstance(found, tuple):
                headers, content = found
            else:
                headers, content = {"Content-Type": "application/json"}, json.dumps(found).encode()
        except _AnswerError as error:
            status, content = error.status, json.dumps({"url": error.url}).encode()
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, path: str) -> Any:
        hub = self.state
        if path == "/api/whoami-v2":
            if self.token != TOKEN:
                raise _AnswerError(401)
            user = json.loads(json.dumps(USER))
            user["auth"]["accessToken"]["role"] = hub.role
            return user
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(self.body))
        if found := re.fullmatch(r"/blobs/([0-9a-f]{64})", path):
            hub.blobs[found[1]] = self.body
            return {}
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._repository(found[1], write=True)
            return self._batch(json.loads(self.body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            self._repository(found[1], write=True)
            return self._modes(json.loads(self.body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self._commit(found[1], self._repository(found[1], write=True))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._info(found[1], self._repository(found[1]), found[2] or "main")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+)/([^/]+)", path):
            return self._file(self._repository(found[1]), found[2], found[3])
        raise _AnswerError(404, "EntryNotFound")

    def _repository(self, name: str, write: bool = False) -> Repository:
        found = self.state.repositories.get(name)
        if self.token not in (None, TOKEN):
            raise _AnswerError(401, message="Invalid credentials in Authorization header")
        if found is None or (found.private and self.token != TOKEN):
            raise _AnswerError(404 if self.token else 401, "RepoNotFound")
        if write and self.token != TOKEN:
            raise _AnswerError(401)
        return found

    def _files(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        digest = repository.refs.get(revision, revision)
        if digest not in repository.commits:
            raise _AnswerError(404, "RevisionNotFound")
        return digest, repository.commits[digest]

    def _info(self, name: str, repository: Repository, revision: str) -> dict[str, Any]:
        digest, files = self._files(repository, revision) if repository.commits else ("0" * 40, {})
        sized = "blobs" in parse_qs(urlsplit(self.path).query)
        return {
            "id": name, "sha": digest, "private": repository.private, "tags": [],
            "siblings": [
                {"rfilename": file, **({"size": len(content)} if sized else {})}
                for file, content in files.items()
            ],
        }  # fmt: skip

    def _file(
        self, repository: Repository, revision: str, name: str
    ) -> tuple[dict[str, str], bytes]:
        if repository.gated and self.token != TOKEN:
            raise _AnswerError(401, "GatedRepo")
        digest, files = self._files(repository, revision)
        if name not in files:
            raise _AnswerError(404, "EntryNotFound")
        etag = hashlib.sha256(files[name]).hexdigest()
        return {"ETag": f'"{etag}"', "X-Repo-Commit": digest}, files[name]

    def _create(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if self.token != TOKEN:
            raise _AnswerError(401)
        name = f"{wanted['organization'] or USER['name']}/{wanted['name']}"
        if name in self.state.repositories:
            raise _AnswerError(409, url=f"{self.state.url}/{name}")
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.state.repositories[name] = Repository(private=private)
        return {"url": f"{self.state.url}/{name}", "id": name, "name": name}

    def _modes(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {
            "files": [
                {
                    "path": file["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if file["path"].endswith(self.state.large) else "regular",
                }
                for file in wanted["files"]
            ]
        }  # fmt: skip

    def _batch(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {
            "transfer": "basic",
            "objects": [
                {**one, "actions": {"upload": {"href": f"{self.state.url}/blobs/{one['oid']}"}}}
                for one in wanted["objects"]
            ],
        }

    def _commit(self, name: str, repository: Repository) -> dict[str, Any]:
        if self.state.refuses_commits:
            raise _AnswerError(403)
        files = dict(self._files(repository, "main")[1]) if repository.commits else {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        digest = repository.commit(files)
        return {
            "success": True, "commitOid": digest,
            "commitUrl": f"{self.state.url}/{name}/commit/{digest}",
        }  # fmt: skip
