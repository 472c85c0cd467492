"""A hub on 127.0.0.1: as much of the Hugging Face hub's interface as huggingface_hub asks for here."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from ssmprune_cli.checkpoint import hub as hub_module


@dataclass
class Hub:
    """Repositories: commits, the newest last, each a mapping of files to contents. `asked` has all requests."""

    address: str = ""
    repositories: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def put(self, repository: str, files: dict[str, bytes]) -> str:
        """A new commit with these files and those from before; its name."""
        commits = self.repositories.setdefault(repository, [])
        commits.append({**(commits[-1] if commits else {}), **files})
        return self.commit(repository, "main")

    def commit(self, repository: str, revision: str) -> str:
        """Raises KeyError for an unknown one."""
        names = [
            hashlib.sha1(f"{repository} {number}".encode()).hexdigest()
            for number in range(len(self.repositories[repository]))
        ]
        return {**dict(zip(names, names, strict=True)), "main": names[-1]}[revision]

    def files(self, repository: str, commit: str) -> dict[str, bytes]:
        return next(
            files
            for number, files in enumerate(self.repositories[repository])
            if hashlib.sha1(f"{repository} {number}".encode()).hexdigest() == commit
        )


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")

    def _send(self, content: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, values: Any) -> None:
        self._send(json.dumps(values).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
            repository, revision, file = "/".join(parts[2:4]), parts[5], ""
        else:
            repository, revision, file = (
                "/".join(parts[:2]),
                parts[3] if len(parts) > 3 else "main",
                "/".join(parts[4:]),
            )
        if repository in self.hub.gated:
            return self._send(status=403, X_Error_Code="GatedRepo")
        try:
            commit = self.hub.commit(repository, revision)
        except KeyError:
            known = repository in self.hub.repositories
            return self._send(status=404, X_Error_Code="RevisionNotFound" if known else "RepoNotFound")
        files = self.hub.files(repository, commit)
        if not file:
            return self._json([{"type": "file", "path": name, "oid": "0", "size": 1} for name in files])
        if file not in files:
            return self._send(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = files[file]
        return self._send(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.repositories.setdefault(name, [{}])
            return self._json({"url": f"{self.hub.address}/{name}", "name": name, "id": name})
        if parts == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        repository = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = [{"path": each["path"], "uploadMode": "regular"} for each in json.loads(body)["files"]]
            return self._json({"files": [{**each, "shouldIgnore": False, "oid": None} for each in files]})
        assert parts[4] == "commit"
        lines = [json.loads(line) for line in body.decode().splitlines()]
        sent = {each["value"]["path"]: each["value"]["content"] for each in lines if each["key"] == "file"}
        commit = self.hub.put(repository, {name: base64.b64decode(text) for name, text in sent.items()})
        address = f"{self.hub.address}/{repository}/commit/{commit}"
        return self._json({"success": True, "commitOid": commit, "commitUrl": address})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Is asked in the place of the real one, with an empty cache, by this process and those that it starts."""
    import huggingface_hub.constants as constants

    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": state}))
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", state.address)
    template = f"{state.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", state.address)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    hub_module.fetched.cache_clear()
    yield state
    hub_module.fetched.cache_clear()
    server.shutdown()
    server.server_close()
    thread.join()
