"""Tiny Shakespeare: downloads that go wrong in every way but silently."""

import hashlib
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from minimoe.core.errors import UserError
from minimoe.text import shakespeare
from minimoe.text.corpus import Corpus, load
from minimoe.text.shakespeare import download

PLAY = "".join(f"Line {n}: the quick brown fox says {n * n}.\n" for n in range(10_000)).encode()


@dataclass
class Server:
    """A server of one file on this machine, with the faults that a test asks for."""

    body: bytes = PLAY
    ranges: bool = True  # answer Range with 206
    wrong_range: bool = False  # answer Range with a range that was not asked for
    cut_after: int | None = None  # break off after so many bytes of the answer
    status: int = 200
    asked: list[str | None] = field(default_factory=list)  # the Range header of every request
    url: str = ""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A server, a cache of its own for this test, and PLAY as the file that 'shakespeare' is expected to be."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.asked.append(asked)
            if state.status != 200:
                self.send_error(state.status)
                return
            body, start = state.body, 0
            if asked and (state.ranges or state.wrong_range):
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                if start >= len(body):
                    self.send_error(416)
                    return
                if state.wrong_range:
                    start -= 1
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start:][: state.cut_after])

        def log_message(self, format: str, *args: object) -> None:
            """Tests read what was asked from ``state``; the terminal stays quiet."""

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(PLAY).hexdigest())
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_port}/input.txt"
        monkeypatch.setenv("MINIMOE_SHAKESPEARE_URL", state.url)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        http.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def leave_part(cache: Path, content: bytes) -> None:
    cache.mkdir()
    (cache / "shakespeare.txt.part").write_bytes(content)


def same(found: object, expected: object) -> bool:
    """A plain answer: pytest may compare all 10,000 lines with each other to say how they differ, for many minutes."""
    return found == expected


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_download_once_then_from_the_cache(server: Server, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = download(progress=False)
    assert path == cache / "shakespeare.txt"
    assert same(path.read_bytes(), PLAY)
    assert names_in(cache) == ["shakespeare.txt"]
    assert capfd.readouterr() == ("", "")
    assert download() == path
    assert same(load("shakespeare"), Corpus("shakespeare", {"shakespeare": PLAY.decode()}))
    assert server.asked == [None]


def test_download_shows_its_progress_on_standard_error(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    load("shakespeare")
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "shakespeare.txt" in shown.err
    assert "100%" in shown.err


def test_progress_counts_what_was_there_before(server: Server, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    leave_part(cache, PLAY[: len(PLAY) // 2])
    download()
    assert "100%" in capfd.readouterr().err


def test_arguments_come_before_the_environment(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMOE_SHAKESPEARE_URL", "http://127.0.0.1:1/nowhere")
    path = download(url=server.url, cache_dir=cache.parent / "other", progress=False)
    assert path == cache.parent / "other" / "shakespeare.txt"
    assert not cache.exists()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("USERPROFILE", "/home/ada")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MINIMOE_CACHE", raising=False)
    assert shakespeare._cache_folder() == Path("/home/ada/.cache/minimoe")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    assert shakespeare._cache_folder() == Path("/var/xdg/minimoe")
    monkeypatch.setenv("MINIMOE_CACHE", "/var/own")
    assert shakespeare._cache_folder() == Path("/var/own")


def test_a_cached_file_that_was_damaged_is_fetched_again(server: Server, cache: Path) -> None:
    cache.mkdir()
    (cache / "shakespeare.txt").write_bytes(PLAY[:-1])
    assert same(download(progress=False).read_bytes(), PLAY)
    assert server.asked == [None]


def test_resume_asks_only_for_the_rest(server: Server, cache: Path) -> None:
    leave_part(cache, PLAY[:1000])
    assert same(download(progress=False).read_bytes(), PLAY)
    assert server.asked == ["bytes=1000-"]
    assert names_in(cache) == ["shakespeare.txt"]


def test_a_broken_connection_keeps_what_arrived_and_goes_on_from_there(server: Server, cache: Path) -> None:
    server.cut_after = 12_345
    with pytest.raises(UserError, match=f"closed after 12,345 of {len(PLAY):,} bytes.*run again.*--text PATH"):
        download(progress=False)
    assert same((cache / "shakespeare.txt.part").read_bytes(), PLAY[:12_345])
    assert names_in(cache) == ["shakespeare.txt.part"]
    server.cut_after = None
    assert same(download(progress=False).read_bytes(), PLAY)
    assert server.asked == [None, "bytes=12345-"]


def test_a_server_that_ignores_ranges_sends_everything(server: Server, cache: Path) -> None:
    server.ranges = False
    leave_part(cache, PLAY[:1000])
    assert same(download(progress=False).read_bytes(), PLAY)
    assert server.asked == ["bytes=1000-"]


def test_a_server_that_sends_another_range_is_asked_for_everything(server: Server, cache: Path) -> None:
    server.wrong_range = True
    leave_part(cache, PLAY[:1000])
    assert same(download(progress=False).read_bytes(), PLAY)
    assert server.asked == ["bytes=1000-", None]


def test_a_complete_part_needs_no_network(server: Server, cache: Path) -> None:
    leave_part(cache, PLAY)
    assert same(download(progress=False).read_bytes(), PLAY)
    assert server.asked == []


@pytest.mark.parametrize("part", [b"?" * 1000, b"?" * len(PLAY), PLAY + b"more"])
def test_a_part_that_is_wrong_or_too_long_is_thrown_away(server: Server, cache: Path, part: bytes) -> None:
    leave_part(cache, part)
    assert same(download(progress=False).read_bytes(), PLAY)
    assert server.asked == [f"bytes={len(part)}-", None]
    assert names_in(cache) == ["shakespeare.txt"]


@pytest.mark.parametrize("part", [None, PLAY[:1000]])
def test_a_corrupted_file_is_not_kept(server: Server, cache: Path, part: bytes | None) -> None:
    server.body = PLAY[:-1] + b"!"
    if part:
        leave_part(cache, part)
    with pytest.raises(UserError) as caught:
        download(progress=False)
    message = str(caught.value)
    assert f"expected SHA-256 {hashlib.sha256(PLAY).hexdigest()}" in message
    assert f"got {hashlib.sha256(server.body).hexdigest()}" in message
    assert "--text PATH" in message
    assert names_in(cache) == []
    assert server.asked == (["bytes=1000-", None] if part else [None])


@pytest.mark.parametrize("status", [404, 416, 500])
def test_a_server_that_refuses(server: Server, cache: Path, status: int) -> None:
    server.status = status
    with pytest.raises(UserError, match=f"{re.escape(server.url)} failed .*{status}.*--text PATH"):
        download(progress=False)
    assert names_in(cache) == []


def test_a_server_that_refuses_for_now_leaves_the_part_alone(server: Server, cache: Path) -> None:
    server.status = 503
    leave_part(cache, PLAY[:1000])
    with pytest.raises(UserError, match="503"):
        download(progress=False)
    assert (cache / "shakespeare.txt.part").read_bytes() == PLAY[:1000]


def test_a_server_that_falls_silent(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(shakespeare, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(UserError, match="timed out"):
            download(url=url, cache_dir=cache, progress=False)


def test_a_download_that_stalls_keeps_what_arrived(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(shakespeare, "TIMEOUT", 0.2)
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as stalling:

        def begin() -> None:
            connection, _ = stalling.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"x" * 1000)
                done.wait(10)

        thread = threading.Thread(target=begin)
        thread.start()
        with pytest.raises(UserError, match="timed out"):
            download(url=f"http://127.0.0.1:{stalling.getsockname()[1]}/", cache_dir=cache, progress=False)
        done.set()
        thread.join()
    assert (cache / "shakespeare.txt.part").read_bytes() == b"x" * 1000


def test_a_server_that_speaks_something_else(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as other:

        def greet() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"220 mail.example ready\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(UserError, match="BadStatusLine"):
            download(url=f"http://127.0.0.1:{other.getsockname()[1]}/", cache_dir=cache, progress=False)
        thread.join()


def test_no_server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as closing:
        port = closing.getsockname()[1]
    with pytest.raises(UserError, match=r"failed \(.*refused.*--text PATH"):
        download(url=f"http://127.0.0.1:{port}/", cache_dir=cache, progress=False)


def test_offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unresolved(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("MINIMOE_SHAKESPEARE_URL", raising=False)
    monkeypatch.setenv("MINIMOE_CACHE", str(cache))
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    with pytest.raises(UserError, match="name resolution.*--text PATH") as caught:
        load("shakespeare")
    assert shakespeare.URL in str(caught.value)


@pytest.mark.parametrize("url", ["nonsense", "http://", "http://exa mple/", "gopher://example.org/"])
def test_urls_that_are_none(cache: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UserError, match=f"from {url} failed"):
        download(url=url, cache_dir=cache, progress=False)


def test_a_cache_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot be used.*MINIMOE_CACHE"):
        download(cache_dir=tmp_path / "file", progress=False)
