"""The page of ``transcnn demo``: other hosts, other pages, floods, and what a checkpoint says about data."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transcnn.checkpoints.loading import Loaded, load
from transcnn.commands.demo import _until_signal, demo
from transcnn.demo.guard import Guard, Limits, Names, WithoutCors, check_address, sweep
from transcnn.errors import UserError
from transcnn.weights import PACKAGED

LIMITS = Limits(file_bytes=1000, stored_bytes=3000, stored_files=5, seconds=0.2, uploads=2, keep_seconds=100)


class App:
    """Stands for gradio: reads the body, and answers."""

    def __init__(self) -> None:
        self.read: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError("the client went away")
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.read.append(body)
        headers = [(b"access-control-allow-origin", b"*"), (b"Access-Control-Allow-Credentials", b"true")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"fine"})


def scope(method: str = "GET", path: str = "/", **headers: str) -> dict[str, Any]:
    pairs = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http", "method": method, "path": path, "headers": pairs}


async def ask(app: Any, scope: dict[str, Any], chunks: list[bytes] | None = None, pause: float = 0.0) -> Any:
    """Status, headers and body of the answer."""
    waiting = list(chunks or [b""])
    sent: list[Any] = []

    async def receive() -> Any:
        if not waiting:
            await asyncio.sleep(60)
        await asyncio.sleep(pause)
        chunk = waiting.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(waiting)}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"].decode()


def status(tmp_path: Path, names: Names, *arguments: Any, **headers: str) -> int:
    return asyncio.run(ask(Guard(App(), names, LIMITS, tmp_path), scope(*arguments, **headers)))[0]


LOCAL = Names.of("127.0.0.1")
EVERYWHERE = Names.of("0.0.0.0")
ONE = Names.of("192.168.1.5")
PROXY = Names.of("127.0.0.1", ["pictures.example.org"])


@pytest.mark.parametrize(
    ("names", "host", "right"),
    [
        (LOCAL, "127.0.0.1:7860", True),
        (LOCAL, "localhost:7860", True),
        (LOCAL, "LOCALHOST", True),
        (LOCAL, "[::1]:7860", True),
        (LOCAL, "evil.example:7860", False),  # a name that its owner lets point to 127.0.0.1
        (LOCAL, "127.0.0.1.evil.example", False),
        (LOCAL, "localhost.evil.example:7860", False),
        (LOCAL, "192.168.1.5:7860", False),
        (LOCAL, "evil.example@127.0.0.1", False),
        (LOCAL, "", False),
        (EVERYWHERE, "192.168.1.5:7860", True),
        (EVERYWHERE, "[fe80::1]:7860", True),
        (EVERYWHERE, "evil.example:7860", False),
        (ONE, "192.168.1.5:7860", True),
        (ONE, "localhost", False),
        (PROXY, "pictures.example.org", True),
        (PROXY, "pictures.example.org.evil.example", False),
    ],
)
def test_a_page_is_served_under_its_own_names_alone(tmp_path: Path, names: Names, host: str, right: bool) -> None:
    assert status(tmp_path, names, host=host) == (200 if right else 421)


def test_no_host_or_two_are_refused(tmp_path: Path) -> None:
    assert status(tmp_path, LOCAL) == 421
    twice = scope(host="localhost")
    twice["headers"].append((b"host", b"evil.example"))
    assert asyncio.run(ask(Guard(App(), LOCAL, LIMITS, tmp_path), twice))[0] == 421


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/queue/join"])
@pytest.mark.parametrize(
    ("headers", "right"),
    [
        ({"origin": "http://localhost:7860"}, True),
        ({}, True),  # no browser
        ({"sec_fetch_site": "same-origin"}, True),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "http://localhost:3000"}, False),  # another page of the same machine
        ({"origin": "null"}, False),
        ({"origin": "http://["}, False),
        ({"origin": "http://[localhost:7860"}, False),
        ({"origin": "file://localhost:7860"}, False),
        ({"origin": "http://localhost:7860.evil.example"}, False),
        ({"sec_fetch_site": "cross-site"}, False),
        ({"sec_fetch_site": "same-site"}, False),
    ],
)
def test_other_pages_can_send_nothing(tmp_path: Path, path: str, headers: dict[str, str], right: bool) -> None:
    assert status(tmp_path, LOCAL, "POST", path, host="localhost:7860", **headers) == (200 if right else 403)


def test_a_proxy_in_front_is_the_page_too(tmp_path: Path) -> None:
    """It passes its own name on, or the one that it calls the page by."""
    for host in ("pictures.example.org", "127.0.0.1:7860"):
        headers = {"host": host, "origin": "https://pictures.example.org"}
        assert status(tmp_path, PROXY, "POST", "/gradio_api/upload", **headers) == 200
        assert status(tmp_path, LOCAL, "POST", "/gradio_api/upload", **headers) in (403, 421)


def test_no_cors_header_leaves(tmp_path: Path) -> None:
    app = WithoutCors(Guard(App(), LOCAL, LIMITS, tmp_path))
    code, headers, _ = asyncio.run(ask(app, scope(host="localhost")))
    assert code == 200
    assert not [name for name in headers if name.lower().startswith(b"access-control")]
    assert b"content-security-policy" in headers
    asked = scope("OPTIONS", "/gradio_api/upload", host="localhost", origin="http://evil.example")
    code, headers, _ = asyncio.run(ask(app, asked))
    assert code == 403
    assert not [name for name in headers if name.lower().startswith(b"access-control")]


@pytest.mark.parametrize("path", ["/gradio_api/proxy=https://x.hf.space/", "/gradio_api/vibe-edit/", "/monitoring"])
def test_what_the_page_does_not_use_is_not_there(tmp_path: Path, path: str) -> None:
    assert status(tmp_path, LOCAL, "GET", path, host="localhost") == 404


# --- floods ---------------------------------------------------------------------------------------------------------


def upload(**headers: str) -> dict[str, Any]:
    return scope("POST", "/gradio_api/upload", host="localhost", **headers)


def test_large_uploads_are_refused_before_or_while_they_are_read(tmp_path: Path) -> None:
    app = App()
    guard = Guard(app, LOCAL, LIMITS, tmp_path)
    assert asyncio.run(ask(guard, upload(content_length="1000000")))[0] == 413
    assert asyncio.run(ask(guard, upload(content_length="-1")))[0] == 413
    code, _, words = asyncio.run(ask(guard, upload(), [bytes(20_000)] * 10))  # says no length, or lies
    assert code == 413
    assert words.count("\n") == 0
    assert app.read == []
    assert asyncio.run(ask(guard, upload(content_length="900"), [bytes(900)]))[0] == 200
    assert guard.running == 0


def test_half_open_uploads_end(tmp_path: Path) -> None:
    guard = Guard(App(), LOCAL, LIMITS, tmp_path)
    began = time.monotonic()
    code, _, words = asyncio.run(ask(guard, upload(), [b"a", b"b"], pause=0.15))  # a byte now and then
    assert code == 408
    assert "took more than" in words
    assert time.monotonic() - began < 5
    assert guard.running == 0


def test_uploads_at_once_are_bounded(tmp_path: Path) -> None:
    guard = Guard(App(), LOCAL, LIMITS, tmp_path)

    async def many() -> list[int]:
        asked = [ask(guard, upload(), [b"a", b"b"], pause=0.05) for _ in range(5)]
        return [answer[0] for answer in await asyncio.gather(*asked)]

    assert sorted(asyncio.run(many())) == [200, 200, 503, 503, 503]
    assert status(tmp_path, LOCAL, host="localhost") == 200


def test_what_is_stored_is_bounded(tmp_path: Path) -> None:
    """The oldest files go, the examples stay, however old; in all, in number and in age."""
    example = tmp_path / "examples" / "0.png"
    example.parent.mkdir()
    example.write_bytes(bytes(9000))
    os.utime(example, (0, 0))
    for number in range(4):
        (tmp_path / f"{number}").write_bytes(bytes(900))
        time.sleep(0.02)
    os.utime(tmp_path / "3", (0, 0))  # a copy of an old file is new
    sweep(tmp_path, LIMITS, {example})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "examples"]
    for number in range(20):
        (tmp_path / f"small-{number}").write_bytes(b"")
    sweep(tmp_path, LIMITS, {example})
    assert len(list(tmp_path.iterdir())) == LIMITS.stored_files + 1
    time.sleep(0.05)
    sweep(tmp_path, replace(LIMITS, keep_seconds=0.01), {example})
    assert [path.name for path in tmp_path.iterdir()] == ["examples"]
    assert example.exists()


def test_an_upload_that_fails_inside_leaves_the_guard_usable(tmp_path: Path) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("inside")

    guard = Guard(broken, LOCAL, LIMITS, tmp_path)
    with pytest.raises(RuntimeError):
        asyncio.run(ask(guard, upload()))
    assert guard.running == 0


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["300.1.1.1", "1.2.3", "1.2.3.4.5", "::zz", "203.0.113.7", "no such host", "", " "])
def test_a_wrong_address_is_told_at_once(host: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        check_address(host, 7860)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 5
    check_address("127.0.0.1", None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("again", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_with_everything_removed(number: int, again: int) -> None:
    """A second one, as a terminal that is closed sends, comes while files are being removed, and ends nothing."""
    removed = []
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        before = signal.getsignal(number)
        with _until_signal():
            try:
                os.kill(os.getpid(), number)
                time.sleep(5)
            finally:
                os.kill(os.getpid(), again)
                time.sleep(0.01)
                removed.append(True)
        assert removed
        assert signal.getsignal(number) is before
    finally:
        signal.signal(signal.SIGINT, outside)


def test_folders_of_files_that_are_gone_go_too(tmp_path: Path) -> None:
    """A folder stays of each upload: thousands of them are walked at the next one."""
    for name in ("old", "new", "kept"):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / "kept" / "inner" / "a.png").write_bytes(b"a")
    now = time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: now + 50)
        (tmp_path / "new" / "inner" / "late").mkdir()
        sweep(tmp_path, replace(LIMITS, seconds=60))
        assert len(list(tmp_path.rglob("*"))) == 8
        for _ in range(3):
            sweep(tmp_path, replace(LIMITS, seconds=30))
    assert {path.name for path in tmp_path.rglob("*")} == {"kept", "inner", "a.png"}


def test_nohup_is_obeyed() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _until_signal():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_strangers_checkpoint_chooses_no_pictures(tmp_path: Path) -> None:
    """A file of weights that names somebody's pictures as its data: they don't become examples."""
    gradio = pytest.importorskip("gradio")
    from transcnn.demo.server import find_examples

    private = tmp_path / "private"
    for label in ("a", "b"):
        (private / label).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (32, 32), (200, number, 7)).save(private / label / f"{number}.png")
    settings = {"data": str(private), "val_fraction": 0.5, "seed": 0}
    loaded = Loaded(load(PACKAGED).model, "classify", ["a", "b"], {}, "x.safetensors", {"settings": settings})
    assert gradio
    assert not [file for file in find_examples(loaded, None, tmp_path / "shown") if str(tmp_path) in file]
    assert not (tmp_path / "shown").exists()
    assert len(find_examples(loaded, None, tmp_path / "shown", tmp_path / "my-run")) > 0


def test_a_fault_inside_is_one_plain_line(caplog: pytest.LogCaptureFixture) -> None:
    gradio = pytest.importorskip("gradio")
    from transcnn.demo.page import FAULT, plainly

    @plainly
    def broken(event: int) -> None:
        raise ZeroDivisionError("secret path /home/user")

    with pytest.raises(gradio.Error) as caught:
        broken(1)
    assert caught.value.message == FAULT
    assert "secret" not in FAULT
    assert "ZeroDivisionError" in caplog.text  # for whoever runs the page


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("closed_loops")
def test_the_real_page_is_guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gradio's own server, over a real connection: host, other pages, CORS, size."""
    pytest.importorskip("gradio")
    import http.client

    from transcnn.demo.server import serve

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with serve(load(PACKAGED), limits=Limits(file_bytes=2000, head_seconds=1, connections=20)) as address:
        host, _, port = address.removeprefix("http://").rpartition(":")

        def answer(method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, bytes]:
            connection = http.client.HTTPConnection(host, int(port), timeout=20)
            connection.putrequest(method, path, skip_host=True)
            given = {"Host": f"{host}:{port}", **{name.replace("_", "-"): value for name, value in headers.items()}}
            if body is not None:
                given["Content-Length"] = str(len(body))
            for name, value in given.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            content = response.read()
            connection.close()
            return response.status, response.headers, content

        assert answer("GET", "/")[0] == 200
        assert answer("GET", "/", Host="evil.example")[0] == 421
        code, headers, _ = answer("GET", "/config", Origin="http://evil.example")
        assert code == 403
        assert headers["Access-Control-Allow-Origin"] is None
        code, headers, _ = answer(
            "OPTIONS", "/gradio_api/upload", Origin="http://x.org", Access_Control_Request_Method="POST"
        )
        assert code == 403
        assert headers["Access-Control-Allow-Origin"] is None
        assert headers["Access-Control-Allow-Credentials"] is None
        form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%s\r\n--x--\r\n'
        kind = {"Content_Type": "multipart/form-data; boundary=x"}
        code, *_ = answer("POST", "/gradio_api/upload", form % b"hello", **kind)
        assert code == 200
        assert answer("POST", "/gradio_api/upload", form % b"hello", Origin="http://x.org", **kind)[0] == 403
        assert answer("POST", "/gradio_api/upload", form % bytes(100_000), **kind)[0] == 413
        stored = list(tmp_path.rglob("a.png"))
        assert len(stored) == 1
        shown = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "a.png"]
        assert len(shown) >= 4  # the examples stay, which the next visitor clicks
        config = json.loads(answer("GET", "/config")[2])
        photo = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "image")
        opened = next(event for event in config["dependencies"] if [photo, "input"] in event["targets"])
        Image.new("RGB", (16, 16), (200, 3, 7)).save(tmp_path / "private.png")

        def shown(payload: Any, session: str) -> bool:
            """Whether a request made by hand has an image opened."""
            data = {"data": [payload, 0, "mean of all heads"], "fn_index": opened["id"], "session_hash": session}
            code, *_ = answer(
                "POST", "/gradio_api/queue/join", json.dumps(data).encode(), Content_Type="application/json"
            )
            said = answer("GET", f"/gradio_api/queue/data?session_hash={session}")[2].decode()
            assert code == 200
            assert '"msg":"process_completed"' in said
            return '"success":true' in said

        mark = {"meta": {"_type": "gradio.FileData"}}
        shutil.copy(tmp_path / "private.png", stored[0])
        assert shown({"path": str(stored[0]), **mark}, "uploaded")
        asked: list[Any] = []
        monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_get", asked.append)
        for number, file in enumerate(
            (
                str(tmp_path / "private.png"),  # a file of the machine
                f"{stored[0].parent}/../../private.png",
                f"file://{tmp_path}/private.png",
                "https://example.org/a.png",  # an address that the server would fetch for a visitor
                [str(tmp_path / "private.png")],
                "\0",
            )
        ):
            assert not shown({"path": file}, f"bare{number}"), file
            assert not shown({"path": file, **mark}, f"marked{number}"), file
            assert not shown([{"path": file, **mark}], f"listed{number}"), file
        assert not asked
        (tmp_path / "private.png").unlink()
        assert half_open(host, int(port), 30)
        assert answer("GET", "/")[0] == 200
    assert list(tmp_path.iterdir()) == []


def half_open(host: str, port: int, many: int) -> bool:
    """Open many connections that never finish a request, however they go about it; whether the server ends them all."""
    begun = [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-a: ",
        b"GET /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n",  # answered; its body never ends
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n",
    ]
    with ExitStack() as stack:
        opened = []
        for number in range(many):
            opened.append(stack.enter_context(socket.create_connection((host, port), timeout=20)))
            with suppress(OSError):
                opened[-1].sendall(begun[number % len(begun)])
        end = time.monotonic() + 20
        while opened and time.monotonic() < end:
            time.sleep(0.1)
            opened = [connection for connection in opened if _is_open(connection)]
        return not opened


def _is_open(connection: socket.socket) -> bool:
    """Whether a connection still takes a byte."""
    connection.setblocking(False)
    try:
        connection.send(b"a")
        return bool(connection.recv(65536))
    except BlockingIOError:
        return True
    except OSError:
        return False


def test_the_flag_for_a_proxy() -> None:
    from transcnn.cli import load_command, parse

    arguments = parse("demo", load_command("demo"), ["--allowed_hosts", "pictures.example.org"])
    assert arguments["allowed_hosts"] == ["pictures.example.org"]
    with pytest.raises(UserError, match=r"300\.1\.1\.1"):
        demo(host="300.1.1.1", quiet=True)
