"""A stand-in for the Hub on the loopback interface: serves one data set of parquet files to the real client.

It counts requests and can misbehave: answer 429 or 503, cut a body short, stall. Not a test itself.

    with HubStandIn(folder) as hub: ...   # folder/data/train-00000-of-00005.parquet, ...; repository org/faces
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn:
    """Serves `folder` as the data set `org/faces`, whose branch main is at `COMMIT`.

    Attributes:
        requests: (method, path) of everything that was asked.
        ranges: (file, first byte, last byte) of every part of a parquet file that was sent whole.
        trouble: What to do with the next parts of parquet files, one entry each: "429", "503", "cut", "stall"
            or "ok". A last entry that ends with "*" stays.
        open_requests: Parts of parquet files asked for, trouble included.
        status_of_info: An error status for questions about the repository; None: they are answered.
    """

    def __init__(self, folder: Path, stall_s: float = 1.0):
        self.folder, self.stall_s = folder, stall_s
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[tuple[str, int, int]] = []
        self.trouble: list[str] = []
        self.open_requests = 0
        self.status_of_info: int | None = None
        self.lock = threading.Lock()
        stand_in = self

        class Handler(_Handler):
            hub = stand_in

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubStandIn:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self) -> dict[str, Path]:
        return {p.relative_to(self.folder).as_posix(): p for p in sorted(self.folder.rglob("*")) if p.is_file()}

    def next_trouble(self) -> str:
        with self.lock:
            self.open_requests += 1
            if not self.trouble:
                return "ok"
            return self.trouble[0][:-1] if self.trouble[0].endswith("*") else self.trouble.pop(0)


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self._answer(
            urllib.parse.parse_qs(body).get("paths") or (json.loads(body) if body[:1] == "{" else {}).get("paths")
        )

    def _answer(self, wanted: list[str] | None = None) -> None:
        url = urllib.parse.urlsplit(urllib.parse.unquote(self.path))
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path))
        files = self.hub.files()
        if match := re.fullmatch(r"/datasets/org/faces/resolve/[^/]+/(.+)", url.path):
            return self._send_file(match[1], files)
        if not url.path.startswith("/api/datasets/org/faces"):
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if self.hub.status_of_info is not None:
            return self._send(self.hub.status_of_info, b"")
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
        what, part = self.hub.next_trouble(), data[first : last + 1]
        if what in ("429", "503"):
            return self._send(int(what), b"", {"Retry-After": "0"} if what == "429" else {})
        if what == "stall":
            time.sleep(self.hub.stall_s)
            self.close_connection = True
            return None
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        if what == "cut":
            self._send(206, part[: len(part) // 2], headers, length=len(part))
            self.close_connection = True
            return None
        with self.hub.lock:
            self.hub.ranges.append((name, first, last))
        return self._send(206, part, headers)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

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
