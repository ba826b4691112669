"""A web server for a folder, in a thread, that fails as it is told to."""

import re
import threading
import time
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote


class Server:
    """Serves `folder` at `address` for a `with` block.

    faults: by path, what the next answers will be, one after the other; always: by path, what each will be.
    requests: (path, first byte asked for) of every request; the path has no slash in front.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.always: dict[str, str] = {}
        self.requests: list[tuple[str, int]] = []
        self.authorization: str | None = None  # what it must be
        self.logins: list[str | None] = []  # what came
        self.ended = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()

    def counts(self) -> Counter[str]:
        """Requests by path."""
        return Counter(path for path, _ in self.requests)

    def shards(self) -> Counter[str]:
        """The same of the tars."""
        return Counter(path for path, _ in self.requests if path.endswith(".tar"))


class Handler(BaseHTTPRequestHandler):
    """Answers one request to `web`."""

    def __init__(self, web: Server, *arguments: Any) -> None:
        self.web = web
        super().__init__(*arguments)  # which handles it

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(self.path).lstrip("/")
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(asked[1]) if asked else 0
        self.web.requests.append((path, begin))
        faults = self.web.faults.get(path)
        fault = faults.pop(0) if faults else self.web.always.get(path, "")
        file = self.web.folder / path
        if fault.isdecimal():
            return self.send_error(int(fault))
        self.web.logins.append(self.headers.get("Authorization"))
        if self.web.authorization and self.headers.get("Authorization") != self.web.authorization:
            return self.send_error(401)
        if fault.startswith("to "):
            self.send_response(302)
            self.send_header("Location", fault.removeprefix("to "))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if not file.is_file():
            return self.send_error(404)
        self.answer(file.read_bytes(), begin, fault)

    def answer(self, data: bytes, begin: int, fault: str) -> None:
        if "no range" in fault:
            begin = 0
        if begin > len(data) or (begin and begin == len(data)):
            return self.send_error(416)
        if "altered" in fault:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if "longer" in fault:
            data += b"more"
        if "truncate" in fault:
            data = data[: begin + (len(data) - begin) // 2]
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        half = begin + (len(data) - begin) // 2
        if "drop" in fault:
            self.wfile.write(data[begin:half])
            self.close_connection = True
        elif "stall" in fault:
            self.wfile.write(data[begin:half])
            self.web.ended.wait(60)
        elif "drip" in fault:
            for byte in data[begin:]:
                if self.web.ended.wait(0.02):
                    break
                self.wfile.write(bytes([byte]))
        else:
            time.sleep(0.2 if "slow" in fault else 0)
            self.wfile.write(data[begin:])

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            pass
