"""A look-alike of the Hub on loopback: as much of its HTTP interface as pushing and pulling a model needs.

Commits are all or nothing, as on the Hub. `cut` breaks the connection in the middle of the next requests of a kind.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import pytest_socket
from huggingface_hub import constants
from huggingface_hub.utils import close_session

TOKEN = "hf_goodtoken"
USER = "ada"


@dataclass
class Commit:
    files: dict[str, bytes]
    parent: str | None
    title: str
    description: str = ""


@dataclass
class Repo:
    private: bool
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], parent: str | None, title: str, description: str = "") -> str:
        oid = hashlib.sha1(repr((sorted(files.items()), parent, title, len(self.commits))).encode()).hexdigest()
        self.commits[oid] = Commit(files, parent, title, description)
        return oid

    def find(self, revision: str) -> str | None:
        known = {**self.branches, **self.tags, **{oid: oid for oid in self.commits}}
        return known.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        oid = self.find(revision)
        assert oid is not None
        return self.commits[oid].files


class Hub:
    """The state, and the server over it."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.cut: dict[str, int] = {}  # "lfs" or "commit" -> how many more requests to break
        self.before_commit: Any = None
        self.copied: list[str] = []  # files that went from one repository to another
        self.no_copies = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def create(self, name: str, private: bool = False, files: dict[str, bytes] | None = None) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.branches["main"] = repo.commit({".gitattributes": b"", **(files or {})}, None, "initial commit")
        return repo


@contextmanager
def reachable(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A look-alike of the Hub that huggingface_hub takes for the real one, with its downloads going to `cache`."""
    pytest_socket.enable_socket()
    pytest_socket.socket_allow_hosts(["127.0.0.1"])
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the look-alike has plain LFS only
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's retries
        yield server
    close_session()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", **details: str) -> None:
        self.status, self.code, self.message, self.details = status, code, message, details


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._serve(_GET)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            self._serve(_POST)

        def do_PUT(self) -> None:
            oid = self.path.rpartition("/")[2]
            if self._cut("lfs"):
                return
            body = self._body()
            assert hashlib.sha256(body).hexdigest() == oid
            hub.lfs[oid] = body
            hub.uploads.append(oid)
            self._answer(200, {})

        def _cut(self, kind: str) -> bool:
            if not hub.cut.get(kind):
                return False
            hub.cut[kind] -= 1
            self.rfile.read(min(100, int(self.headers["Content-Length"]) // 2))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return True

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _serve(self, routes: dict[str, Any]) -> None:
            where = urlsplit(self.path)
            hub.requests.append(f"{self.command} {where.path}")
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            hub.tokens.add(token)
            for form, serve in routes.items():
                if match := re.fullmatch(form, where.path):
                    if "/commit/" in where.path and self._cut("commit"):
                        return
                    self._run(serve, [unquote(group) for group in match.groups()], token, parse_qs(where.query))
                    return
            self._body()
            self._answer(404, {"error": "no such route"})

        def _run(self, serve: Any, groups: list[str], token: str, query: dict[str, list[str]]) -> None:
            body = self._body()
            try:
                answer = serve(hub, *groups, body=body, user=USER if token == TOKEN else None, query=query)
            except _Refused as refused:
                headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
                self._answer(refused.status, {"error": refused.message, **refused.details}, headers)
                return
            if isinstance(answer, tuple):
                self._answer(200, *answer)
            else:
                self._answer(200, answer)

        def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", "application/octet-stream" if content is data else "application/json")
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler


def _readable(hub: Hub, name: str, user: str | None) -> Repo:
    repo = hub.repos.get(name)
    if repo is None or (repo.private and user is None):
        raise _Refused(404 if user else 401, "RepoNotFound", "Repository not found")
    if repo.gated:
        raise _Refused(403, "GatedRepo", "Access to this model is restricted")
    return repo


def _writable(hub: Hub, name: str, user: str | None) -> Repo:
    repo = _readable(hub, name, user)
    if user is None or name.partition("/")[0] != user:
        raise _Refused(403, "", "You do not have the rights")
    return repo


def _found(repo: Repo, revision: str) -> str:
    oid = repo.find(revision)
    if oid is None:
        raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return oid


def _create(hub: Hub, body: bytes, user: str | None, **_: Any) -> Any:
    wanted = json.loads(body)
    if user is None:
        raise _Refused(401, "", "Invalid username or password.")
    name = f"{wanted.get('organization') or user}/{wanted['name']}"
    if name.partition("/")[0] != user:
        raise _Refused(403, "", "You don't have the rights to create a model under this namespace")
    if name in hub.repos:
        raise _Refused(409, "", "You already created this model repo", url=f"{hub.url}/{name}")
    hub.create(name, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
    return {"url": f"{hub.url}/{name}", "name": name, "id": name}


def _info(hub: Hub, name: str, revision: str = "main", *, user: str | None, **_: Any) -> Any:
    repo = _readable(hub, name, user)
    oid = _found(repo, revision)
    siblings = [{"rfilename": path} for path in repo.commits[oid].files]
    return {"id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []}


def _tree(hub: Hub, name: str, revision: str, *, user: str | None, **_: Any) -> Any:
    repo = _readable(hub, name, user)
    return [
        {"type": "file", "path": path, "size": len(data), "oid": _etag(data), **_lfs_fields(path, data)}
        for path, data in repo.commits[_found(repo, revision)].files.items()
    ]


def _paths_info(hub: Hub, name: str, revision: str, *, body: bytes, user: str | None, **_: Any) -> Any:
    repo = _readable(hub, name, user)
    files, wanted = repo.commits[_found(repo, revision)].files, parse_qs(body.decode())["paths"]
    return [
        {"type": "file", "path": path, "size": len(files[path]), "oid": _etag(files[path])}
        | {"xetHash": _etag(files[path]), **_lfs_fields(path, files[path])}
        for path in wanted
        if path in files
    ]


def _duplicate(hub: Hub, name: str, *, body: bytes, user: str | None, **_: Any) -> Any:
    """Large files of one repository for another, which the server has already."""
    asked = json.loads(body)
    _writable(hub, asked["target"]["name"], user)
    if hub.no_copies:
        return {"failed": [{"sha256": file["sha256"], "error": "another region"} for file in asked["files"]]}
    files = _readable(hub, name, user).files()
    for file in asked["files"]:
        hub.lfs[file["sha256"]] = files[file["filename"]]
        hub.copied.append(file["filename"])
    return {"failed": []}


def _lfs_fields(path: str, data: bytes) -> dict[str, Any]:
    if not path.endswith(".safetensors"):
        return {}
    return {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}


def _etag(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _refs(hub: Hub, name: str, *, user: str | None, **_: Any) -> Any:
    repo = _readable(hub, name, user)
    listed = {
        kind: [{"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": oid} for ref, oid in refs.items()]
        for kind, folder, refs in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
    }
    return {**listed, "converts": [], "pullRequests": []}


def _resolve(hub: Hub, name: str, revision: str, path: str, *, user: str | None, **_: Any) -> Any:
    repo = _readable(hub, name, user)
    oid = _found(repo, revision)
    data = repo.commits[oid].files.get(path)
    if data is None:
        raise _Refused(404, "EntryNotFound", "Entry not found")
    return data, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": oid}


def _preupload(hub: Hub, name: str, revision: str, *, body: bytes, user: str | None, query: Any) -> Any:
    repo = _readable(hub, name, user) if query.get("create_pr") else _writable(hub, name, user)
    there = repo.commits[_found(repo, revision)].files
    answers = []
    for file in json.loads(body)["files"]:
        path, large = file["path"], file["path"].endswith(".safetensors")
        old = there.get(path)
        oid = None if old is None else hashlib.sha256(old).hexdigest() if large else _etag(old)
        answers.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
    return {"files": answers}


def _batch(hub: Hub, name: str, *, body: bytes, user: str | None, **_: Any) -> Any:
    _readable(hub, name, user)
    objects = []
    for wanted in json.loads(body)["objects"]:
        upload = {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}
        objects.append(wanted if wanted["oid"] in hub.lfs else {**wanted, "actions": upload})
    return {"transfer": "basic", "objects": objects}


def _commit(hub: Hub, name: str, revision: str, *, body: bytes, user: str | None, query: Any) -> Any:
    pull = bool(query.get("create_pr"))
    repo = _readable(hub, name, user) if pull else _writable(hub, name, user)
    if hub.before_commit:
        hub.before_commit(repo)
    if revision not in repo.branches:
        raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    head = repo.branches[revision]
    lines = [json.loads(line) for line in body.splitlines()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    if not pull and header.get("parentCommit") not in (None, head):
        raise _Refused(412, "", "A commit has happened since. Please refresh and try again.")
    files = dict(repo.commits[head].files)
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.lfs[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    oid = repo.commit(files, head, header["summary"], header["description"])
    answer = {"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid}
    if pull:
        repo.pulls.append(oid)
        return {**answer, "pullRequestUrl": f"{hub.url}/{name}/discussions/{len(repo.pulls)}"}
    repo.branches[revision] = oid
    return answer


def _branch(hub: Hub, name: str, branch: str, *, user: str | None, **_: Any) -> Any:
    repo = _writable(hub, name, user)
    if branch in repo.branches:
        raise _Refused(409, "", "Reference already exists")
    repo.branches[branch] = repo.branches["main"]
    return {}


def _tag(hub: Hub, name: str, revision: str, *, body: bytes, user: str | None, **_: Any) -> Any:
    repo = _writable(hub, name, user)
    tag = json.loads(body)["tag"]
    if tag in repo.tags:
        raise _Refused(409, "", "Tag reference exists already")
    repo.tags[tag] = _found(repo, revision)
    return {}


def _whoami(hub: Hub, user: str | None, **_: Any) -> Any:
    if user is None:
        raise _Refused(401, "", "Invalid username or password.")
    return {"type": "user", "name": user, "orgs": []}


_REPO = "([^/]+/[^/]+)"
_GET = {
    "/api/whoami-v2": _whoami,
    f"/api/models/{_REPO}": _info,
    f"/api/models/{_REPO}/revision/([^/]+)": _info,
    f"/api/models/{_REPO}/tree/([^/]+)": _tree,
    f"/api/models/{_REPO}/refs": _refs,
    f"/{_REPO}/resolve/([^/]+)/(.+)": _resolve,
}
_POST = {
    "/api/repos/create": _create,
    "/api/validate-yaml": lambda hub, **_: {"errors": [], "warnings": []},
    f"/api/models/{_REPO}/preupload/([^/]+)": _preupload,
    f"/api/models/{_REPO}/commit/([^/]+)": _commit,
    f"/api/models/{_REPO}/branch/([^/]+)": _branch,
    f"/api/models/{_REPO}/tag/([^/]+)": _tag,
    f"/api/models/{_REPO}/paths-info/([^/]+)": _paths_info,
    f"/api/models/{_REPO}/lfs-files/duplicate": _duplicate,
    rf"/{_REPO}\.git/info/lfs/objects/batch": _batch,
}
