"""A small double of the Hub over HTTP: repositories in memory, behind the endpoints that pushing and loading use."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

TOKEN = "hf_double"


@dataclass
class Repository:
    private: bool = False
    # a commit is (its message, its files); a branch names one
    commits: dict[str, tuple[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    lfs_paths: set[str] = field(default_factory=set)

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{branch}{message}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = (message, dict(files))
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)][1]

    def oid(self, path: str, content: bytes) -> str:
        if path in self.lfs_paths:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubDouble:
    """`with HubDouble() as hub:` serves until the end; `hub.environment` is what a process needs to use it."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.unexpected: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, home) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            # the double speaks the LFS protocol, as a Hub mirror does
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def __enter__(self) -> "HubDouble":
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Missing(Exception):
    """Answered with 404 and the code that huggingface_hub turns into the matching error."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubDouble
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._serve()

    def do_GET(self):
        self._serve()

    def do_POST(self):
        self._serve()

    def do_PUT(self):
        self._serve()

    def _serve(self):
        body = self._body()
        path = unquote(urlsplit(self.path).path).strip("/")
        parts = path.split("/")
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "unauthorized"}, 401)
        try:
            return self._route(parts, body)
        except _Missing as missing:
            return self._answer(404, b"", {"X-Error-Code": str(missing)})

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _route(self, parts: list[str], body: bytes) -> None:
        match self.command, parts:
            case "POST", ["api", "repos", "create"]:
                self._create(json.loads(body))
            case "POST", ["api", "validate-yaml"]:
                self._validate(json.loads(body)["content"])
            case "POST", ["api", "models", owner, name, "preupload", revision]:
                self._preupload(self._repository(owner, name), revision, json.loads(body)["files"])
            case "POST", ["api", "models", owner, name, "branch", branch]:
                repository = self._repository(owner, name)
                if branch in repository.branches:
                    return self._json({"error": "exists"}, 409)
                repository.branches[branch] = repository.branches["main"]
                self._json({})
            case "POST", [owner, name, "info", "lfs", "objects", "batch"]:
                self._repository(owner, name.removesuffix(".git"))
                self._lfs_batch(json.loads(body)["objects"])
            case "PUT", ["blob", oid]:
                if hashlib.sha256(body).hexdigest() != oid:
                    return self._json({"error": "wrong content"}, 400)
                self.hub.blobs[oid] = body
                self._json({})
            case "POST", ["api", "models", owner, name, "commit", revision]:
                self._commit(f"{owner}/{name}", self._repository(owner, name), revision, body)
            case "GET", ["api", "models", owner, name]:
                self._information(f"{owner}/{name}", self._repository(owner, name), "main")
            case "GET", ["api", "models", owner, name, "revision", revision]:
                self._information(f"{owner}/{name}", self._repository(owner, name), revision)
            case "GET", ["api", "models", owner, name, "tree", revision, *folder]:
                self._tree(self._repository(owner, name), revision, "/".join(folder))
            case (("GET" | "HEAD"), [owner, name, "resolve", revision, *path]):
                self._file(self._repository(owner, name), revision, "/".join(path))
            case "GET", ["api", "agent-harnesses"]:
                self._answer(404, b"")
            case _:
                self.hub.unexpected.append(f"{self.command} {'/'.join(parts)}")
                self._answer(404, b"")

    def _repository(self, owner: str, name: str) -> Repository:
        if (repository := self.hub.repositories.get(f"{owner}/{name}")) is None:
            raise _Missing("RepoNotFound")
        return repository

    def _create(self, request: dict) -> None:
        name = f"{request.get('organization') or 'somebody'}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            return self._json({**answer, "error": "exists"}, 409)
        private = request.get("private") or request.get("visibility") == "private"
        self.hub.repositories[name] = repository = Repository(private=bool(private))
        repository.commit("main", "initial commit", {".gitattributes": b""})
        self._json(answer)

    def _validate(self, content: str) -> None:
        errors = []
        match = REGEX_YAML_BLOCK.search(content)
        data = yaml.safe_load(match.group(2)) if match else {}
        for result in [entry for index in data.get("model-index", []) for entry in index["results"]]:
            if not {"type", "name"} <= set(result["dataset"]) or not result["metrics"]:
                errors.append({"message": f"incomplete result {result}"})
        for key in ("base_model", "datasets"):
            names = data.get(key) or []
            for name in [names] if isinstance(names, str) else names:
                if name.startswith((".", "/")) or name.count("/") > 1:
                    errors.append({"message": f'"{key}" with value "{name}" is not valid'})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, repository: Repository, revision: str, files: list[dict]) -> None:
        there = repository.files(revision)
        answer = []
        for file in files:
            path = file["path"]
            mode = "lfs" if path.endswith((".safetensors", ".bin")) else "regular"
            oid = repository.oid(path, there[path]) if path in there else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    def _lfs_batch(self, objects: list[dict]) -> None:
        answer = []
        for entry in objects:
            upload = {"upload": {"href": f"{self.hub.url}/blob/{entry['oid']}"}}
            known = entry["oid"] in self.hub.blobs
            answer.append({**entry, **({} if known else {"actions": upload})})
        self._json({"transfer": "basic", "objects": answer})

    def _commit(self, name: str, repository: Repository, revision: str, body: bytes) -> None:
        message, files = "", dict(repository.files(revision))
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                    repository.lfs_paths.add(value["path"])
                case "deletedFile":
                    del files[value["path"]]
        sha = repository.commit(revision, message, files)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def _sha(self, repository: Repository, revision: str) -> str:
        if (sha := repository.resolve(revision)) is None:
            raise _Missing("RevisionNotFound")
        return sha

    def _information(self, name: str, repository: Repository, revision: str) -> None:
        sha = self._sha(repository, revision)
        files = [{"rfilename": path} for path in repository.commits[sha][1]]
        self._json({"id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": files})

    def _tree(self, repository: Repository, revision: str, folder: str) -> None:
        files = repository.commits[self._sha(repository, revision)][1]
        inside = {path: content for path, content in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise _Missing("EntryNotFound")
        entries = []
        for path, content in inside.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": repository.oid(path, content)}
            if path in repository.lfs_paths:
                entry["lfs"] = {"oid": repository.oid(path, content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def _file(self, repository: Repository, revision: str, path: str) -> None:
        sha = self._sha(repository, revision)
        headers = {"X-Repo-Commit": sha}
        files = repository.commits[sha][1]
        if path not in files:
            return self._answer(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        content = files[path]
        headers["ETag"] = f'"{repository.oid(path, content)}"'
        if path in repository.lfs_paths:
            headers["X-Linked-Etag"] = headers["ETag"]
            headers["X-Linked-Size"] = str(len(content))
        self._answer(200, content, headers)
