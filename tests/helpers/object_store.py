"""A real S3 server (moto's) in this process, with faults that a test sets."""

import logging
import threading
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


SECRETS = ("AKIDOFTHETESTS000001", "secretOfTheTests/0123456789abcdefghijkl")
GONE = b"<Error><Code>ServiceUnavailable</Code><Message>Please try again</Message></Error>"


class ObjectStore:
    """The server. A fault applies to GET and PUT requests whose line ends with a text, as often as it is listed."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.faults: dict[
            str, list[str]
        ] = {}  # by end of "GET /bucket/key": "503", "cut" or "slow", the next one first
        self.requests: list[str] = []  # "GET /bucket/key", in their order
        self.changed = threading.Condition()
        self.release = threading.Event()  # ends slow answers
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()

    def environment(self) -> dict[str, str]:
        """Return the variables by which libraries find the server."""
        key, secret = SECRETS
        names = {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
        return names | {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}

    def bucket(self) -> "Bucket":
        """Make an empty bucket, and forget earlier faults and requests."""
        self.faults.clear()
        self.requests.clear()
        self.release.clear()
        key, secret = SECRETS
        names = {"aws_access_key_id": key, "aws_secret_access_key": secret, "region_name": "us-east-1"}
        bucket = boto3.resource("s3", endpoint_url=self.url, **names).Bucket(f"clips-{uuid.uuid4().hex[:8]}")
        bucket.create()
        return Bucket(self, bucket)

    def stop(self) -> None:
        self.release.set()
        self._server.shutdown()

    def _serve(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        with self.changed:
            self.requests.append(request)
            self.changed.notify_all()
        faults = next((one for end, one in self.faults.items() if request.endswith(end)), [])
        fault = faults.pop(0) if faults and request.startswith(("GET", "PUT")) else ""
        if fault == "503":
            start_response("503 Service Unavailable", [("Content-Length", str(len(GONE)))])
            return [GONE]
        body = b"".join(self._application(environ, start_response))
        if fault == "cut":
            return self._cut(environ, body)
        return self._trickle(body) if fault == "slow" else [body]

    def _cut(self, environ: dict, body: bytes) -> Iterable[bytes]:
        yield body[: len(body) // 2]
        environ["werkzeug.socket"].shutdown(2)

    def _trickle(self, body: bytes) -> Iterable[bytes]:
        for start in range(0, len(body), max(1, len(body) // 100)):
            self.release.wait(0.05)
            yield body[start : start + max(1, len(body) // 100)]


class Bucket:
    """A bucket of the server, written and read without the code under test."""

    def __init__(self, store: ObjectStore, bucket):
        self.store, self._bucket = store, bucket
        self.name, self.url = bucket.name, f"s3://{bucket.name}"

    def put(self, key: str, content: bytes | str | Path) -> None:
        data = content.read_bytes() if isinstance(content, Path) else content
        self._bucket.put_object(Key=key, Body=data)

    def put_folder(self, folder: Path, key: str) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(f"{key}/{file.relative_to(folder).as_posix()}", file)

    def listing(self) -> list[str]:
        return sorted(one.key for one in self._bucket.objects.all())

    def get(self, key: str) -> bytes:
        return self._bucket.Object(key).get()["Body"].read()

    def delete(self, key: str) -> None:
        self._bucket.Object(key).delete()

    def wait_for(self, count: int) -> None:
        """Wait until so many files have been asked for."""
        with self.store.changed:
            assert self.store.changed.wait_for(lambda: len(self.fetched()) >= count, 10)

    def fetched(self, end: str = "") -> list[str]:
        """Return the keys that were read since the server started or was reset, of those with this end."""
        start = f"GET /{self._bucket.name}/"
        return [one.removeprefix(start) for one in self.store.requests if one.startswith(start) and one.endswith(end)]
