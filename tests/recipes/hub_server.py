"""As much of the hub's HTTP interface as an upload needs: it keeps what it is sent."""

from __future__ import annotations

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

SHA = "f" * 40


@contextmanager
def hub_server(*, status: int = 200):
    """Yields address, requests, the body of the repository's creation, and its files by path.

    Args:
        status: of the answer to the creation.
    """
    seen = SimpleNamespace(requests=[], created=None, files={}, tokens=set())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.requests.append(self.path)
            return self.answer({"id": "me/model", "private": True, "sha": SHA, "siblings": []})

        def do_POST(self):
            seen.requests.append(self.path)
            seen.tokens.add(self.headers.get("Authorization"))
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.endswith("/repos/create"):
                seen.created = json.loads(body)
                return self.answer({"url": f"{seen.address}/me/model"}, status=status)
            if self.path.endswith("/validate-yaml"):
                return self.answer({"warnings": [], "errors": []})
            if "/preupload/" in self.path:
                files = json.loads(body)["files"]
                modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
                return self.answer({"files": modes})
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        seen.files[value["path"]] = base64.b64decode(value["content"])
                return self.answer({"commitUrl": f"{seen.address}/me/model/commit/{SHA}", "commitOid": SHA})
            return self.answer({"error": "no such path"}, status=404)

        def answer(self, value, status: int = 200):
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    seen.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
