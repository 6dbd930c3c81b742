"""A fake Hub server on the loopback interface, for the real client: serves one data set of parquet files, and accepts
uploads of models, which it serves in turn.

It records requests and injects faults: it answers 429 or 503, truncates a body or an upload, stalls.

    with FakeHub(folder) as hub: ...   # folder/data/train-00000-of-00005.parquet, ...; repository org/faces
    with FakeHub() as hub: ...         # models only
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "loopback" * 4  # the only one that may write


@dataclass
class Model:
    """A model repository: its main branch, its pull requests and its history."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)  # names of the files uploaded to large-file storage
    commits: list[str] = field(default_factory=list)  # their messages
    pull_requests: list[dict[str, bytes]] = field(default_factory=list)


class FakeHub:
    """Serves `folder` as the data set `org/faces`, whose branch main is at `COMMIT`.

    Attributes:
        requests: (method, path) of every request.
        ranges: (file, first byte, last byte) of every range of a parquet file that was sent completely.
        faults: Faults of the next ranges of parquet files, one entry each: "429", "503", "cut", "stall" or "ok". A last
            entry that ends with "*" applies to all further ones.
        file_requests: Number of requested ranges of parquet files, those with faults included.
        info_status: An error status for requests of the repository's metadata, or None.
        models: Pushed repositories by id.
        objects: Large files that were uploaded completely, by SHA-256.
        push_faults: Faults of the next requests of a kind ("whoami", "create", "validate", "preupload", "batch",
            "upload", "verify", "commit"), one entry each: a status such as "503", "page" (a gateway's HTML), "cut" (the
            connection closes during the request), "lost" (carried out, but the connection closes before the response)
            or "ok".
        user: The response to whoami.
    """

    def __init__(self, folder: Path | None = None, stall_s: float = 1.0):
        self.folder, self.stall_s = folder, stall_s
        self.models: dict[str, Model] = {}
        self.objects: dict[str, bytes] = {}
        self.push_faults: dict[str, list[str]] = {}
        self.user = {"name": "somebody", "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": "write"}}}
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[tuple[str, int, int]] = []
        self.faults: list[str] = []
        self.file_requests = 0
        self.info_status: int | None = None
        self.lock = threading.Lock()
        server = self

        class Handler(_Handler):
            hub = server

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self) -> dict[str, Path]:
        if self.folder is None:
            return {}
        return {p.relative_to(self.folder).as_posix(): p for p in sorted(self.folder.rglob("*")) if p.is_file()}

    def next_fault(self) -> str:
        with self.lock:
            self.file_requests += 1
            if not self.faults:
                return "ok"
            return self.faults[0][:-1] if self.faults[0].endswith("*") else self.faults.pop(0)


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._take("upload", lambda body: self._take_object(body), urllib.parse.urlsplit(self.path))

    def do_POST(self) -> None:
        url = urllib.parse.urlsplit(urllib.parse.unquote(self.path))
        for pattern, (kind, take) in _PUSHES.items():
            if match := re.fullmatch(pattern, url.path):
                return self._take(kind, lambda body, m=match, t=take: t(self, body, url.query, *m.groups()), url)
        body = self._body().decode()
        self._answer(
            urllib.parse.parse_qs(body).get("paths") or (json.loads(body) if body[:1] == "{" else {}).get("paths")
        )

    def _body(self, length: int | None = None) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)) if length is None else length)

    # ------------------------------------------------------------------ pushes

    def _take(self, kind: str, take, url: urllib.parse.SplitResult) -> None:
        """Carry out one request of a push, or its fault."""
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path))
            fault = (self.hub.push_faults.get(kind) or ["ok"]).pop(0)
        if fault == "cut":
            self._body(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            return self.connection.close()
        body = self._body()
        if fault == "page":
            return self._send(502, b"<html>Bad gateway</html>", {"Content-Type": "text/html"})
        if fault.isdigit():
            return self._send(int(fault), b"", {"Retry-After": "0"} if fault == "429" else {})
        if kind != "upload" and self.headers.get("Authorization") != f"Bearer {TOKEN}":  # storage URLs are signed
            return self._send_json({"error": "Invalid credentials in Authorization header"}, 401)
        if fault == "lost":
            self._send = lambda *_, **__: None  # carried out, never answered
            take(body)
            self.close_connection = True
            return self.connection.close()
        return take(body)

    def _create(self, body: bytes, query: str) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.models:
            return self._send_json(url, 409)
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.models[name] = Model(private)
        return self._send_json(url)

    def _validate(self, body: bytes, query: str) -> None:
        """Rejects model cards whose metadata is not YAML or holds non-finite numbers, as the Hub does."""
        block = json.loads(body)["content"].split("---\n")[1]
        broken = [word for word in (".nan", ".inf") if word in block.lower()]
        if broken:
            return self._send_json({"errors": [{"message": f"{broken} is not a number"}], "warnings": []}, 400)
        return self._send_json({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, query: str, name: str) -> None:
        files, model = json.loads(body)["files"], self.hub.models[name]
        answer = []
        for entry in files:
            large = entry["path"].endswith((".safetensors", ".png"))
            here = model.files.get(entry["path"])
            oid = None if here is None else (hashlib.sha256(here).hexdigest() if large else _blob_oid(here))
            mode = "lfs" if large else "regular"
            answer.append({"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send_json({"files": answer})

    def _batch(self, body: bytes, query: str, name: str) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            if entry["oid"] not in self.hub.objects:
                url = f"{self.hub.endpoint}/storage/{entry['oid']}?X-Signature=secret"
                verify = {"href": f"{self.hub.endpoint}/{name}.git/info/lfs/objects/verify"}
                entry = {**entry, "actions": {"upload": {"href": url, "header": {}}, "verify": verify}}
            objects.append(entry)
        self._send_json({"transfer": "basic", "objects": objects})

    def _take_object(self, body: bytes) -> None:
        oid = urllib.parse.urlsplit(self.path).path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, b"")
        self.hub.objects[oid] = body
        return self._send(200, b"")

    def _verify(self, body: bytes, query: str, name: str) -> None:
        asked = json.loads(body)
        stored = self.hub.objects.get(asked["oid"])
        self._send_json({}, 200 if stored is not None and len(stored) == asked["size"] else 404)

    def _commit(self, body: bytes, query: str, name: str) -> None:
        model = self.hub.models[name]
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(model.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
                model.lfs.add(value["path"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        answer = {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
        if "create_pr=1" in query:
            model.pull_requests.append(files)
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{len(model.pull_requests)}"
        else:
            model.files = files
            model.commits.append(lines[0]["value"]["summary"])
        self._send_json(answer)

    # ------------------------------------------------------------------ reads

    def _answer(self, wanted: list[str] | None = None) -> None:
        url = urllib.parse.urlsplit(urllib.parse.unquote(self.path))
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path))
        files = self.hub.files()
        if url.path == "/api/whoami-v2":
            with self.hub.lock:
                self.hub.requests.pop()
            return self._take("whoami", lambda _: self._send_json(self.hub.user), url)
        if match := re.fullmatch(r"/api/(?:models|spaces)/(\w+/[\w.-]+)(?:/(revision|tree)/[^/]+)?", url.path):
            return self._send_model(match[1], match[2] == "tree")
        if match := re.fullmatch(r"/(\w+/[\w.-]+)/resolve/[^/]+/(.+)", url.path):
            return self._send_model_file(match[1], match[2])
        if match := re.fullmatch(r"/datasets/org/faces/resolve/[^/]+/(.+)", url.path):
            return self._send_file(match[1], files)
        if not url.path.startswith("/api/datasets/org/faces"):
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if self.hub.info_status is not None:
            return self._send(self.hub.info_status, b"")
        rest = url.path.removeprefix("/api/datasets/org/faces").strip("/").split("/")
        if rest[0] in ("", "revision"):
            if rest[1:] and rest[1] not in ("main", "v1", COMMIT):
                return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name, "size": path.stat().st_size} for name, path in files.items()]
            info = {
                "id": "org/faces",
                "sha": COMMIT,
                "siblings": siblings,
                "private": False,
                "tags": [],
                "downloads": 0,
            }
            return self._send_json({**info, "likes": 0, "lastModified": "2024-01-01T00:00:00.000Z"})
        if rest[0] == "tree":
            under = "/".join(rest[2:])
            found = self._entries(files)
            inside = [e for e in found if e["path"].startswith(under + "/" if under else "")]
            if "recursive=true" not in url.query.lower():
                depth = under.count("/") + 1 if under else 0
                inside = [e for e in inside if e["path"].count("/") == depth]
            return self._send_json(inside) if inside else self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        if rest[0] == "paths-info":
            return self._send_json([e for e in self._entries(files) if e["path"] in (wanted or [])])
        return self._send(404, b"")

    def _send_model(self, name: str, tree: bool) -> None:
        if name not in self.hub.models:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        files = self.hub.models[name].files
        if tree:
            entries = [
                {"type": "file", "path": p, "oid": _blob_oid(data), "size": len(data)} for p, data in files.items()
            ]
            return self._send_json(entries) if entries else self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        siblings, private = [{"rfilename": path} for path in files], self.hub.models[name].private
        return self._send_json({"id": name, "sha": COMMIT, "siblings": siblings, "private": private, "tags": []})

    def _send_model_file(self, name: str, path: str) -> None:
        files = self.hub.models[name].files if name in self.hub.models else {}
        if path not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self._send(200, files[path], {"ETag": f'"{_blob_oid(files[path])}"', "X-Repo-Commit": COMMIT})

    @staticmethod
    def _entries(files: dict[str, Path]) -> list[dict]:
        folders = sorted({parent.as_posix() for name in files for parent in Path(name).parents} - {"."})
        entries = [{"type": "directory", "path": name, "oid": _oid(name), "size": 0} for name in folders]
        return entries + [
            {"type": "file", "path": name, "oid": _oid(name), "size": path.stat().st_size}
            for name, path in files.items()
        ]

    def _send_file(self, name: str, files: dict[str, Path]) -> None:
        if name not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = files[name].read_bytes()
        headers = {"ETag": f'"{_oid(name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, data, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        fault, part = self.hub.next_fault(), data[first : last + 1]
        if fault in ("429", "503"):
            return self._send(int(fault), b"", {"Retry-After": "0"} if fault == "429" else {})
        if fault == "stall":
            time.sleep(self.hub.stall_s)
            self.close_connection = True
            return None
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        if fault == "cut":
            self._send(206, part[: len(part) // 2], headers, length=len(part))
            self.close_connection = True
            return None
        with self.hub.lock:
            self.hub.ranges.append((name, first, last))
        return self._send(206, part, headers)

    def _send_json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


def _blob_oid(data: bytes) -> str:
    """Git's hash of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_NAME = r"(\w+/[\w.-]+)"
_PUSHES = {
    "/api/repos/create": ("create", _Handler._create),
    "/api/validate-yaml": ("validate", _Handler._validate),
    f"/api/(?:models|spaces)/{_NAME}/preupload/main": ("preupload", _Handler._preupload),
    rf"/(?:spaces/)?{_NAME}\.git/info/lfs/objects/batch": ("batch", _Handler._batch),
    rf"/{_NAME}\.git/info/lfs/objects/verify": ("verify", _Handler._verify),
    f"/api/(?:models|spaces)/{_NAME}/commit/main": ("commit", _Handler._commit),
}
