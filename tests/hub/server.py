"""A Hub on this machine, stock library only: enough of the Hub's HTTP interface for huggingface_hub to talk to.

Repositories with branches and commits, LFS uploads with verification, downloads by range and over a second host as
the Hub's CDN is one, tokens, private and gated repositories. ``fail`` makes requests fail as they do in real life.
"""

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
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_secretOfAcme"
READ_TOKEN = "hf_secretOfReader"
LARGE = (".safetensors", ".st", ".pkl", ".bin")
LICENSES = ("apache-2.0", "cc-by-4.0", "mit", "other")


@dataclass
class Commit:
    """A commit: its message, its parent, and every file's bytes."""

    message: str
    parent: str | None
    files: dict[str, bytes]


@dataclass
class Repository:
    """A repository: who may read it, its branches, its commits."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: Mapping[str, bytes]) -> str:
        """Put a commit with exactly these files on a branch."""
        parent = self.branches.get(branch)
        text = json.dumps([message, parent, {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = Commit(message, parent, dict(files))
        self.branches[branch] = oid
        return oid

    def head(self, branch: str = "main") -> dict[str, bytes]:
        """Return the files of a branch."""
        return self.commits[self.branches[branch]].files

    def find(self, revision: str) -> str | None:
        """Return the commit of a branch or commit id."""
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Failure:
    """What goes wrong: requests whose method and path match, so many times."""

    pattern: str
    status: int = 0
    times: int = 1_000_000
    cut: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = ""


class Hub(ThreadingHTTPServer):
    """The server and what it holds."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.cdn_tokens: list[str] = []
        self.sent_bytes = 0
        self.tells_sizes = True
        self.lock = threading.RLock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def make(self, name: str, files: Mapping[str, bytes], **settings: bool) -> Repository:
        """Make a repository with one commit."""
        self.repositories[name] = Repository(**settings)
        self.repositories[name].commit("main", "made by hand", {".gitattributes": b"*.st filter=lfs\n", **files})
        return self.repositories[name]

    def fail(self, pattern: str, **settings: Any) -> None:
        """Make requests whose "METHOD /path" matches fail."""
        self.failures.append(Failure(pattern, **settings))

    def failure(self, request: str) -> Failure | None:
        with self.lock:
            self.requests.append(request)
            for failure in self.failures:
                if failure.times and re.search(failure.pattern, request):
                    failure.times -= 1
                    return failure
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        """Find out who asks for what, fail where told to, else do it."""
        asked = urlsplit(self.path)
        self.path, self.query = unquote(asked.path), parse_qs(asked.query)
        failure = self.server.failure(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length") or 0)
        if failure is not None and failure.cut is not None and self.command == "PUT":
            self.rfile.read(failure.cut)
            self.hang_up()
            return
        self.body = self.rfile.read(length) if length else self.read_chunks()
        self.cut = failure.cut if failure is not None else None
        if failure is not None and failure.status:
            self.refuse(failure.status, failure.message or "told to fail", **failure.headers)
            return
        with self.server.lock:
            for pattern, method in ROUTES:
                found = re.fullmatch(pattern, f"{self.command} {self.path}")
                if found:
                    getattr(self, method)(**found.groupdict())
                    return
        self.refuse(404, f"no such route: {self.command} {self.path}")

    def read_chunks(self) -> bytes:
        body = b""
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        return body

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    # Answers.

    def send(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        part = data if self.cut is None else data[: self.cut]
        self.server.sent_bytes += len(part)
        self.wfile.write(part)
        if len(part) < len(data):
            self.wfile.flush()
            self.hang_up()

    def json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, message: str, **headers: str) -> None:
        self.send(status, json.dumps({"error": message}).encode(), X_Error_Message=message, **headers)

    # Who asks.

    @property
    def token(self) -> str:
        return str(self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def may_write(self) -> bool:
        if self.token == TOKEN:
            return True
        if self.token == READ_TOKEN:
            self.refuse(403, f"You don't have the rights; your token {self.token} can only read")
        else:
            self.refuse(401, "Invalid username or password.")
        return False

    def repository(self, name: str) -> Repository | None:
        """Return a repository that the token may read; answer otherwise."""
        found = self.server.repositories.get(name)
        if self.token and self.token not in (TOKEN, READ_TOKEN):
            self.refuse(401, "Invalid credentials in Authorization header")
            return None
        if found is None or (found.private and self.token != TOKEN):
            self.refuse(404 if self.token else 401, "Repository not found", X_Error_Code="RepoNotFound")
            return None
        if found.gated and self.token != TOKEN:
            self.refuse(403, "Access to this model is restricted", X_Error_Code="GatedRepo")
            return None
        return found

    def revision(self, name: str, revision: str | None) -> tuple[Repository, str] | None:
        found = self.repository(name)
        if found is None:
            return None
        oid = found.find(revision or "main")
        if oid is None:
            self.refuse(404, "Invalid rev id", X_Error_Code="RevisionNotFound")
            return None
        return found, oid

    # Reading.

    def info(self, repo: str, rev: str | None = None) -> None:
        found = self.revision(repo, rev)
        if found is not None:
            repository, oid = found
            siblings = [{"rfilename": f["path"], "size": f["size"]} for f in files_of(repository.commits[oid])]
            if not self.server.tells_sizes:
                siblings = [{"rfilename": sibling["rfilename"]} for sibling in siblings]
            self.json({"id": repo, "sha": oid, "private": repository.private, "tags": [], "siblings": siblings})

    def commits(self, repo: str, rev: str) -> None:
        found = self.revision(repo, rev)
        if found is None:
            return
        repository, oid = found
        listed: list[dict[str, Any]] = []
        while oid:
            commit = repository.commits[oid]
            date = "2026-01-01T00:00:00.000Z"
            listed.append({"id": oid, "title": commit.message, "message": "", "date": date, "authors": []})
            oid = commit.parent or ""
        self.json(listed)

    def data_info(self, repo: str, rev: str | None = None) -> None:
        """As the Hub does, tell everyone what a gated data set holds; its files are not for everyone."""
        known = self.server.repositories.get(repo)
        if known is None or not known.gated:
            self.info(repo, rev)
            return
        oid = known.branches["main"]
        self.json({"id": repo, "sha": oid, "gated": "manual", "siblings": []})

    def tree(self, repo: str, rev: str, folder: str) -> None:
        found = self.revision(repo, rev)
        if found is None:
            return
        inside = f"{folder}/" if folder else ""
        listed = [entry for entry in entries_of(found[0].commits[found[1]]) if entry["path"].startswith(inside)]
        if self.query.get("recursive", ["false"])[0].lower() == "false":
            listed = [entry for entry in listed if "/" not in entry["path"].removeprefix(inside)]
        if listed:
            self.json(listed)
        else:
            self.refuse(404, f"{folder} does not exist", X_Error_Code="EntryNotFound")

    def paths_info(self, repo: str, rev: str) -> None:
        found = self.revision(repo, rev)
        if found is not None:
            asked = parse_qs(self.body.decode())["paths"]
            self.json([entry for entry in entries_of(found[0].commits[found[1]]) if entry["path"] in asked])

    def allowed(self, repo: str) -> None:
        if self.repository(repo) is not None:
            self.json({})

    def resolve(self, repo: str, rev: str, file: str) -> None:
        found = self.revision(repo, rev)
        if found is None:
            return
        data = found[0].commits[found[1]].files.get(file)
        if data is None:
            self.refuse(404, "Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=found[1])
            return
        sha256 = hashlib.sha256(data).hexdigest()
        if not file.endswith(LARGE):
            self.part(data, ETag=f'"{sha256}"', X_Repo_Commit=found[1])
            return
        self.server.objects[sha256] = data
        # Another host by name, so that clients must not send their token there.
        self.send(
            302,
            Location=f"http://localhost:{self.server.server_port}/cdn/{sha256}",
            X_Repo_Commit=found[1],
            X_Linked_Size=str(len(data)),
            X_Linked_ETag=f'"{sha256}"',
        )

    def cdn(self, oid: str) -> None:
        if self.token:
            self.server.cdn_tokens.append(self.token)
        self.part(self.server.objects[oid], ETag=f'"{oid}"')

    def part(self, data: bytes, **headers: str) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self.send(200, data, Accept_Ranges="bytes", **headers)
            return
        start = int(wanted[1])
        stop = min(int(wanted[2]) + 1 if wanted[2] else len(data), len(data))
        self.send(206, data[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(data)}", **headers)

    # Writing.

    def whoami(self) -> None:
        if self.may_write():
            self.json({"type": "user", "name": "acme", "orgs": []})

    def create(self) -> None:
        if not self.may_write():
            return
        asked = json.loads(self.body)
        name = f"{asked['organization'] or 'acme'}/{asked['name']}"
        if not name.startswith("acme/"):
            self.refuse(403, f"You don't have the rights to create a model under {name.split('/')[0]}")
        elif name in self.server.repositories:
            url = f"{self.server.endpoint}/{name}"
            self.json({"error": "You already created this model repo", "url": url}, 409)
        else:
            self.server.make(name, {}, private=asked.get("visibility") == "private" or bool(asked.get("private")))
            self.json({"url": f"{self.server.endpoint}/{name}", "name": name})

    def branch(self, repo: str, rev: str) -> None:
        if not self.may_write():
            return
        branches = self.server.repositories[repo].branches
        if rev in branches:
            self.refuse(409, "Reference already exists")
            return
        branches[rev] = branches["main"]
        self.json({})

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        license = re.search(r"^license: (.*)$", front[1], re.MULTILINE) if front else None
        if license is None or license[1] not in LICENSES:
            self.json({"errors": [{"message": '"license" must be one of the list'}], "warnings": []}, 400)
        else:
            self.json({"errors": [], "warnings": []})

    def preupload(self, repo: str, rev: str) -> None:
        if not self.may_write():
            return
        found = self.revision(repo, rev)
        if found is None:
            return
        now = {file["path"]: file for file in files_of(found[0].commits[found[1]])}
        answer = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            known = now.get(file["path"])
            oid = known and (known["lfs"]["oid"] if mode == "lfs" else known["oid"])
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": answer})

    def batch(self, repo: str) -> None:
        if not self.may_write():
            return
        objects = []
        for item in json.loads(self.body)["objects"]:
            oid, size = item["oid"], item["size"]
            upload = {"href": f"{self.server.endpoint}/lfs/{oid}"}
            verify = {"href": f"{self.server.endpoint}/{repo}.git/info/lfs/objects/verify"}
            actions = {} if oid in self.server.objects else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": oid, "size": size, **actions})
        self.json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.refuse(400, "these are other bytes")
            return
        self.server.objects[oid] = self.body
        self.send(200)

    def verify(self, repo: str) -> None:
        del repo
        known = json.loads(self.body)["oid"] in self.server.objects
        self.json({}, 200 if known else 404)

    def commit(self, repo: str, rev: str) -> None:
        if not self.may_write():
            return
        repository = self.server.repositories[repo]
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.branches[rev]):
            self.refuse(412, "A commit has happened since")
            return
        files = dict(repository.head(rev))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        oid = repository.commit(rev, header["summary"], files)
        self.json({"commitUrl": f"{self.server.endpoint}/{repo}/commit/{oid}", "commitOid": oid})


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = (
    (rf"GET /api/models/{REPO}", "info"),
    (rf"GET /api/models/{REPO}/revision/(?P<rev>.+)", "info"),
    (rf"GET /api/datasets/{REPO}", "data_info"),
    (rf"GET /api/datasets/{REPO}/revision/(?P<rev>.+)", "data_info"),
    (rf"GET /api/datasets/{REPO}/auth-check", "allowed"),
    (rf"GET /api/models/{REPO}/commits/(?P<rev>.+)", "commits"),
    (rf"GET /api/(?:models|datasets)/{REPO}/tree/(?P<rev>[^/]+)/?(?P<folder>.*)", "tree"),
    (rf"POST /api/datasets/{REPO}/paths-info/(?P<rev>[^/]+)", "paths_info"),
    (rf"(?:GET|HEAD) (?:/datasets)?/{REPO}/resolve/(?P<rev>[^/]+)/(?P<file>.+)", "resolve"),
    (r"(?:GET|HEAD) /cdn/(?P<oid>\w+)", "cdn"),
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"POST /api/models/{REPO}/branch/(?P<rev>.+)", "branch"),
    (rf"POST /api/models/{REPO}/preupload/(?P<rev>.+)", "preupload"),
    (rf"POST /api/models/{REPO}/commit/(?P<rev>.+)", "commit"),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", "batch"),
    (rf"POST /{REPO}\.git/info/lfs/objects/verify", "verify"),
    (r"PUT /lfs/(?P<oid>\w+)", "upload"),
)


def entries_of(commit: Commit) -> list[dict[str, Any]]:
    """Return a commit's folders and files as the Hub lists them."""
    folders = {str(folder) for name in commit.files for folder in PurePosixPath(name).parents} - {"."}
    return [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)] + files_of(commit)


def files_of(commit: Commit) -> list[dict[str, Any]]:
    """Return a commit's files as the Hub lists them."""
    listed = []
    for name, data in sorted(commit.files.items()):
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        file: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": oid}
        if name.endswith(LARGE):
            file["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        listed.append(file)
    return listed


@contextmanager
def running() -> Iterator[Hub]:
    """Run a Hub for the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
