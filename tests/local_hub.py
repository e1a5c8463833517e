"""A hub on this machine that answers as huggingface.co does, for tests: names, revisions, lists and files.

It can be told to refuse, to cut a file off, and to give other bytes than its list says.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

LARGE = 1000
"""Files of so many bytes are in LFS: the hub knows their SHA-256; of others, git's SHA-1."""


def blob(content: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """revisions: branch or commit to commit. commits: commit to its files. token: without it, nobody reads it."""

    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """The branch is these files from now on; its commit."""
        said = json.dumps([[path, blob(content)] for path, content in sorted(files.items())])
        name = hashlib.sha1(said.encode()).hexdigest()
        self.commits[name] = dict(files)
        self.revisions |= {branch: name, name: name}
        return name


@dataclass
class LocalHub:
    """repositories: ``models/OWNER/NAME`` or ``datasets/OWNER/NAME``.

    cut: path to the bytes after which its next answer breaks off, once. wrong: paths that come with other
    bytes of the same length. down: every answer has this status. asked: ``METHOD PATH RANGE`` so far;
    fetched: paths of the files whose content was given; tokens: that were sent.
    """

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    down: int = 0
    asked: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    def model(self, name: str, files: Mapping[str, bytes]) -> str:
        """Add a commit of that model's main branch."""
        return self.repositories.setdefault(f"models/{name}", Repository()).commit(files)

    def forget(self) -> None:
        """Nobody has asked for anything yet."""
        self.asked.clear()
        self.fetched.clear()

    def dataset(self, name: str, files: Mapping[str, bytes]) -> str:
        """The same of a data set."""
        return self.repositories.setdefault(f"datasets/{name}", Repository()).commit(files)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if sent:
            self.hub.tokens.add(sent)
        if self.hub.down:
            return self._refuse(self.hub.down, "")
        api = re.fullmatch(r"/api/(models|datasets)/(.+?)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/(datasets/)?(.+?)/resolve/([^/]+)/(.+)", path)
        if api:
            key, revision = f"{api[1]}/{api[2]}", api[4]
        elif file:
            key, revision = f"{(file[1] or 'models/')}{file[2]}", file[3]
        else:
            return self._refuse(404, "")
        repository = self.hub.repositories.get(key)
        if repository is None or (repository.token and repository.token != sent):
            return self._refuse(
                401, "GatedRepo" if repository and repository.gated else "RepoNotFound"
            )
        commit = repository.revisions.get(revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        files = repository.commits[commit]
        if file:
            return self._file(file[4], files, commit, body)
        listing = api is not None and api[3] == "tree"
        said = json.dumps(
            _tree(files)
            if listing
            else {"id": key.partition("/")[2], "sha": commit, "siblings": []}
        )
        return self._send(200, said.encode(), {"Content-Type": "application/json"}, body)

    def _file(self, path: str, files: Mapping[str, bytes], commit: str, body: bool) -> None:
        if path not in files:
            return self._refuse(404, "EntryNotFound")
        if body:
            self.hub.fetched.append(path)
        content = files[path]
        large = len(content) >= LARGE
        etag = hashlib.sha256(content).hexdigest() if large else blob(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{etag}"'}
        if path in self.hub.wrong:
            content = bytes(255 - byte for byte in content)
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if found:
            begin = int(found[1])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            return self._send(206, content[begin:], headers, body, self._cut(path, body))
        return self._send(200, content, headers, body, self._cut(path, body))

    def _cut(self, path: str, body: bool) -> int | None:
        return self.hub.cut.pop(path, None) if body else None

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code} if code else {}, body=True)

    def _send(
        self,
        status: int,
        content: bytes,
        headers: Mapping[str, str],
        body: bool,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


def _tree(files: Mapping[str, bytes]) -> list[dict[str, object]]:
    folders = {path.rpartition("/")[0] for path in files} - {""}
    found: list[dict[str, object]] = [
        {"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)
    ]
    for path, content in files.items():
        entry: dict[str, object] = {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": blob(content),
        }
        if len(content) >= LARGE:
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        found.append(entry)
    return found


@contextmanager
def local_hub(address: str = "127.0.0.1") -> Iterator[LocalHub]:
    """A hub on that address of this machine, by itself the loopback interface's, until the block ends."""
    hub = LocalHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer((address, 0), handler)
    server.daemon_threads = True
    hub.address = f"http://{address}:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
