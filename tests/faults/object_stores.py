"""Object stores on this machine: moto's server for s3://, gcp-storage-emulator for gs://, with faults on request.

The extra test_stores installs both.

The emulator of Google's store lacks what locks and TensorStore need, which is added here: an upload only if there is no
such object or if it has a generation, and the generation in the header of a download.
"""

import contextlib
import functools
import http.server
import io
import itertools
import logging
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator

import requests

PACKAGES = {"s3": "moto", "gs": "gcp_storage_emulator"}  # by scheme
# Of a request: its method and path; returns seconds to wait, or a status to answer with, or None.
Fault = Callable[[str, str], float | int | None]


class Store:
    """A running store, with a bucket for each test or case."""

    def __init__(self, scheme: str, url: str, environment: dict[str, str]):
        self.scheme, self.url, self.environment = scheme, url, environment
        self.fault: Fault | None = None
        self.requests: list[tuple[str, str]] = []
        self._numbers = itertools.count(1)
        self.address = ""

    def new_bucket(self) -> None:
        bucket = f"bucket{next(self._numbers)}"
        self.fault = None
        if self.scheme == "s3":
            requests.put(f"{self.url}/{bucket}", timeout=60).raise_for_status()
        else:
            path = f"{self.url}/storage/v1/b?project=test"
            requests.post(path, json={"name": bucket}, timeout=60).raise_for_status()
        self.requests.clear()
        self.address = f"{self.scheme}://{bucket}"

    def failing(self, method: str, path: str) -> int | None:
        """Notes a request; waits, or returns the status of an error, as the fault says."""
        self.requests.append((method, path))
        fault = self.fault and self.fault(method, path)
        if isinstance(fault, float):
            time.sleep(fault)
            return None
        return fault or None


@contextlib.contextmanager
def s3() -> Iterator[Store]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = DomainDispatcherApplication(create_backend_app)
    store = Store("s3", "", {})

    def faulty(environ, start_response):
        status = store.failing(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if status is None:
            return app(environ, start_response)
        code = {403: "AccessDenied", 503: "SlowDown"}.get(status, "InternalError")
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(
            f"{status} {code}",
            [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))],
        )
        return [body.encode()]

    server = make_server("127.0.0.1", 0, faulty, threaded=True)
    store.url = f"http://127.0.0.1:{server.server_port}"
    store.environment = {
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "of-the-test",
        "AWS_SECRET_ACCESS_KEY": "hush-hush-of-the-test",  # pragma: allowlist secret
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with _serving(server):
        yield store


@contextlib.contextmanager
def gs() -> Iterator[Store]:
    from gcp_storage_emulator import server as emulator
    from gcp_storage_emulator.storage import Storage

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    logging.getLogger("api.object").setLevel(logging.CRITICAL)
    storage = Storage(use_memory_fs=True)
    store = Store("gs", "", {})
    changing = threading.Lock()

    class Handler(emulator.RequestHandler):
        protocol_version = "HTTP/1.0"
        generation: str | None = None

        def _handle(self, method: str) -> None:
            self._status_of_fault = store.failing(
                method, urllib.parse.unquote(self.path.partition("?")[0])
            )
            if self._status_of_fault is not None:
                self._answer(self._status_of_fault)
                return
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if len(body) < length:
                return  # the client was killed; a store writes no half of an object
            # The emulator reads a last "\r" of an object as part of the end of line that gcsfs writes behind it.
            body = re.sub(rb"\r\n(--==0==--)\Z", rb"\r\r\n\1", body)
            del self.headers["Content-Length"]
            self.headers["Content-Length"] = str(len(body))
            self.rfile = io.BytesIO(body)
            with changing:
                bucket, name, query = self._object(body)
                current = self._generation_of(bucket, name)
                if (wanted := query.get("ifGenerationMatch")) and wanted != [current]:
                    self._answer(412)
                    return
                unchanged = query.get("ifGenerationNotMatch") == [current]
                if unchanged and method == "GET":
                    self._answer(304)
                    return
                self.generation = current if "media" in query.get("alt", []) else None
                emulator.Router(self).handle(method)

        def _object(self, body: bytes):
            path, _, text = self.path.partition("?")
            query = urllib.parse.parse_qs(text)
            match = re.fullmatch(r".*/b/([^/]+)/o(?:/(.*))?", path)
            bucket = match[1] if match else ""
            name = urllib.parse.unquote((match and match[2]) or query.get("name", [""])[0])
            if not name and (named := re.search(rb'"name": *"([^"]*)"', body[:2000])):
                name = named[1].decode()  # of an upload in parts
            return bucket, name, query

        def _generation_of(self, bucket: str, name: str) -> str:
            try:
                return str(storage.get_file_obj(bucket, name)["generation"])
            except Exception:  # no such object or bucket
                return "0"

        def _answer(self, status: int) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = f'{{"error": {{"code": {status}, "message": "status {status}"}}}}'.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body) if status != 304 else 0))
            self.end_headers()
            if status != 304:
                self.wfile.write(body)

        def end_headers(self) -> None:
            if self.generation is not None:
                self.send_header("X-Goog-Generation", self.generation)
                self.generation = None
            super().end_headers()

        do_GET = functools.partialmethod(_handle, "GET")  # noqa: N815 (names of http.server)
        do_POST = functools.partialmethod(_handle, "POST")  # noqa: N815
        do_PUT = functools.partialmethod(_handle, "PUT")  # noqa: N815
        do_PATCH = functools.partialmethod(_handle, "PATCH")  # noqa: N815
        do_DELETE = functools.partialmethod(_handle, "DELETE")  # noqa: N815

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request, client_address) -> None:
            if not isinstance(
                sys.exc_info()[1], ConnectionError
            ):  # a client need not read to the end
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", 0), functools.partial(Handler, storage))
    store.url = f"http://127.0.0.1:{server.server_port}"
    store.environment = {
        "STORAGE_EMULATOR_HOST": store.url,
        "TENSORSTORE_GCS_HTTP_URL": store.url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "hush-hush-of-the-test",
        "NO_GCE_CHECK": "true",
        "GCE_METADATA_ROOT": "127.0.0.1:1",
    }
    with _serving(server):
        yield store


@contextlib.contextmanager
def _serving(server) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
