"""Fetches the files of one model or data set, whole and checked; or describes those of a directory.

A program of its own, for the control machine or the head: it has one argument, a JSON object (``Asked``),
and needs huggingface_hub beside Python's own library, or nothing for a directory. In the folder that it is
given, ``files`` becomes what is to lie on the storage, with a manifest and a stamp; what is there already,
right by its hash, is not fetched again, and one that broke off is continued. It says how far it is on
standard output; its last word, where it fails, is one sentence on standard error. A token is in neither.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST, STAMP = ".lockstep-files", ".lockstep-fetched"
SMALL = 8 << 20
"""Files below this many bytes travel to the head in one archive."""
CHUNK = 1 << 20
AT_ONCE = 4
"""Files that are fetched at the same time."""
ATTEMPTS = 3
INTERVAL = 10
"""Seconds between two lines that say how far it is."""
LEFT_OUT = (".git", ".cache", "__pycache__")
"""Folders of a directory that are no content."""
MB = 1_000_000


class Refused(Exception):
    """Why it cannot be fetched; one sentence."""


@dataclass(frozen=True)
class Asked:
    """What is wanted.

    name: in the cluster file, for what is said. folder: where it grows. source: as the stamp has it.
    kind, repository: on the hub at ``endpoint``; or directory, of this machine.
    revision: as declared. commit: where it is known; None has the hub resolve the revision.
    token: ``{"file": PATH}`` or ``{"variable": NAME}``. before: manifest of the files that lie on the
    storage and are right. room: bytes free there. pack: the files travel on from here.
    run: goes into the stamp. patience: seconds that the hub may take for an answer about names and lists.
    """

    name: str
    folder: str
    source: str
    run: str
    kind: str = "model"
    repository: str = ""
    directory: str = ""
    revision: str = ""
    commit: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    endpoint: str = ""
    proxy: str | None = None
    token: Mapping[str, str] | None = None
    before: str = ""
    room: int | None = None
    pack: bool = False
    patience: int = 120


@dataclass(frozen=True)
class File:
    """One file. size: bytes. blob: the hub's own name of its content (SHA-1 of git), ``-`` without a hub.

    sha256: hexadecimal; empty until it is known.
    """

    path: str
    size: int
    blob: str
    sha256: str

    def line(self) -> str:
        """Its line of the manifest."""
        return f"{self.size}\t{self.sha256}\t{self.blob}\t{self.path}\n"


def manifest(path: Path) -> dict[str, File]:
    """The files of a manifest, by path; none where there is no such file. Raises Refused for one that is damaged."""
    found = {}
    try:
        # Not splitlines: names may hold other ends of lines.
        for line in filter(None, path.read_bytes().decode().split("\n")):
            size, sha256, blob, name = line.split("\t", 3)
            found[name] = File(name, int(size), blob, sha256)
    except OSError:
        return {}
    except ValueError:
        raise Refused(
            f"{path}, which says what was fetched there, is damaged: move its directory away, or fetch it anew"
        ) from None
    return found


# ---- hashes ----------------------------------------------------------------------------------------


def checked(path: Path, file: File) -> File | None:
    """The file with its SHA-256, where its content is what the hub says; else None."""
    try:
        if path.stat().st_size != file.size:
            return None
        sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % file.size)
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                sha256.update(chunk)
                blob.update(chunk)
    except FileNotFoundError:
        return None
    right = file.sha256 or sha256.hexdigest()
    if sha256.hexdigest() != right or (
        not file.sha256 and file.blob not in ("-", blob.hexdigest())
    ):
        return None
    return File(file.path, file.size, file.blob, right)


def safe(path: str) -> str:
    """A path of the hub or of a directory, below the folder and in one line. Raises Refused."""
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise Refused(f"it holds a file named {path!r}, which cannot be kept")
    own = parts[0] == ".cache" or parts[0].startswith(".lockstep-")
    # A surrogate stands for bytes that are no UTF-8.
    if own or re.search(r"[\x00-\x1f\x7f\\\ud800-\udfff]", path):
        raise Refused(f"it holds a file named {path!r}: leave it out with 'exclude'")
    return path


def chosen(asked: Asked, path: str) -> bool:
    """Whether the patterns take it; a pattern that ends with / means all below it, as on the hub."""

    def among(patterns: Sequence[str]) -> bool:
        return any(
            fnmatch.fnmatchcase(path, f"{each}*" if each.endswith("/") else each)
            for each in patterns
        )

    return (not asked.include or among(asked.include)) and not among(asked.exclude)


# ---- a directory -----------------------------------------------------------------------------------


def of_directory(asked: Asked) -> tuple[str, list[File]]:
    """(what identifies it, its files with their hashes)."""
    top = Path(asked.directory)
    files = []
    for path, size in list(
        entries(top)
    ):  # a link that leads in a circle is told before anything is read
        if chosen(asked, path):
            file = checked(top / path, File(safe(path), size, "-", ""))
            if file is None:
                raise Refused(f"{top / path} changed while it was read: run again")
            files.append(file)
    known = manifest(top / MANIFEST)
    wrong = [
        each.path for each in files if each.path in known and known[each.path].sha256 != each.sha256
    ]
    lacking = [
        path for path in known if chosen(asked, path) and path not in {f.path for f in files}
    ]
    if wrong or lacking:
        raise Refused(f"{top} is damaged ({', '.join([*wrong, *lacking][:3])}): fetch it anew")
    return identity(top), files


def entries(top: Path) -> Iterator[tuple[str, int]]:
    """(path, bytes) of each file below a directory, links followed, in one order. Raises OSError."""

    def failed(error: OSError) -> None:
        raise error

    for name, folders, names in os.walk(top, onerror=failed, followlinks=True):
        folders[:] = sorted(each for each in folders if each not in LEFT_OUT)
        for each in sorted(names):
            path = Path(name, each)
            status = path.stat()
            if each not in (MANIFEST, STAMP) and stat.S_ISREG(status.st_mode):
                yield str(path.relative_to(top)), status.st_size


def stamp_of(top: Path) -> dict[str, Any]:
    """What the stamp in a directory says; empty where there is none."""
    try:
        found = json.loads((top / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def identity(top: Path) -> str:
    """What tells this content of a directory from another, without reading it: 40 hexadecimal digits.

    What Lockstep fetched there is named by its manifest, because one commit may have been fetched with other
    patterns; else names, sizes and times count. Raises OSError.
    """
    if named := stamp_of(top).get("manifest"):
        return str(named)[:40]
    digest = hashlib.sha256()
    for path, size in entries(top):
        digest.update(ascii((path, size, (top / path).stat().st_mtime_ns)).encode())
    return digest.hexdigest()[:40]


# ---- a hub -----------------------------------------------------------------------------------------


def token_of(asked: Asked) -> str | None:
    """The token. Raises Refused, which never shows it."""
    if not asked.token:
        return None
    if variable := asked.token.get("variable"):
        found = os.environ.get(variable, "").strip()
        if not found:
            raise Refused(
                f"the environment variable {variable}, which is to hold the token, is not set"
            )
    else:
        path = Path(asked.token["file"]).expanduser()
        try:
            with path.open(encoding="utf-8") as file:
                mode = os.fstat(file.fileno()).st_mode & 0o777
                found = file.readline().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is no text"
            raise Refused(f"the token's file {path} cannot be read: {why}") from None
        if mode & 0o077:
            raise Refused(
                f"the token's file {path} is open to others (mode {mode:04o}): chmod 600 {path}"
            )
        if not found:
            raise Refused(f"the token's file {path} is empty: its first line must be the token")
    if not found.isascii() or not found.isprintable() or " " in found:
        raise Refused("what is given as token is none: it has characters that no token has")
    return found


def prepare(asked: Asked) -> None:
    """The library's settings, which it reads when it is imported; none comes from the caller."""
    for name in [
        name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    ]:
        del os.environ[name]
    os.environ["NETRC"] = os.devnull  # passwords of the caller's, which versions before 1 send
    os.environ["HF_ENDPOINT"] = asked.endpoint
    os.environ["HF_HOME"] = f"{asked.folder}/home"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_VERBOSITY"] = "critical"
    if asked.endpoint != "https://huggingface.co":
        os.environ["HF_HUB_DISABLE_XET"] = "1"  # it would go to the hub itself, past the mirror
    if asked.proxy:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            os.environ[name] = asked.proxy
        for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
            os.environ.pop(name, None)


class Hub:
    """One repository of a hub. Its methods raise Refused."""

    def __init__(self, asked: Asked) -> None:
        self._asked, self._token = asked, token_of(asked)
        prepare(asked)
        try:
            import huggingface_hub
        except ImportError:
            raise Refused(
                "this Python has no huggingface_hub: install it, or fetch on the other machine"
            ) from None
        self._library = huggingface_hub
        # False, not None: the library would look for a token of the user's own.
        self._api = huggingface_hub.HfApi(endpoint=asked.endpoint, token=self._token or False)

    def commit(self) -> str:
        """What the revision is now."""
        with self._told(), self._answered():
            found = self._api.repo_info(
                self._asked.repository, repo_type=self._asked.kind, revision=self._asked.revision
            ).sha
        if not found:
            raise Refused(
                f"{self._asked.endpoint} does not tell the commit of {self._asked.revision}"
            )
        return str(found)

    def files(self, commit: str) -> list[File]:
        """All that the patterns take."""
        tree = []
        with self._told(), self._answered():
            for each in self._api.list_repo_tree(
                self._asked.repository,
                recursive=True,
                revision=commit,
                repo_type=self._asked.kind,
            ):
                tree.append(each)
                signal.alarm(self._asked.patience)  # for the next page
        return [
            File(safe(each.path), each.size, each.blob_id, each.lfs.sha256 if each.lfs else "")
            for each in tree
            if isinstance(each, self._library.hf_api.RepoFile) and chosen(self._asked, each.path)
        ]

    def fetch(self, file: File, commit: str, files: Path) -> File:
        """Have it below ``files``; the same with its SHA-256."""
        place = files / file.path
        for attempt in range(ATTEMPTS):
            if done := checked(place, file):
                return done
            place.unlink(missing_ok=True)
            try:
                with self._told():
                    self._library.hf_hub_download(
                        self._asked.repository,
                        file.path,
                        repo_type=self._asked.kind,
                        revision=commit,
                        local_dir=files,
                        endpoint=self._asked.endpoint,
                        token=self._token or False,
                    )
            except Refused:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(1)
        if done := checked(place, file):
            return done
        place.unlink(missing_ok=True)
        raise Refused(
            f"{file.path} arrives with another content than {self._asked.endpoint} says it has: its hash is "
            "wrong; ask who runs that mirror or proxy"
        )

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Bounds what the library asks without a limit of its own. In the main thread alone."""

        def late(number: int, frame: object) -> None:
            raise Refused(
                f"{self._asked.endpoint} took the question and does not answer within {self._asked.patience} s: "
                "try again later, or name another endpoint or proxy"
            )

        signal.signal(signal.SIGALRM, late)
        signal.alarm(self._asked.patience)
        try:
            yield
        finally:
            signal.alarm(0)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """The library's many exceptions as one sentence; none of their texts, which may hold signed addresses."""
        asked = self._asked
        try:
            yield
        except Refused:
            raise
        except OSError as error:
            if type(error).__module__ == "builtins" and error.errno:
                raise  # the disk
            raise Refused(self._sentence(error)) from None
        except Exception as error:
            if type(error).__name__ == "HFValidationError":
                raise Refused(f"{asked.repository} is no name on a hub") from None
            raise Refused(self._sentence(error)) from None

    def _sentence(self, error: Exception) -> str:
        asked, errors = self._asked, self._library.errors
        what = f"{asked.source} at {asked.endpoint}"
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.GatedRepoError):
            return f"{what} is gated: accept its terms there, and give a token of that account"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{what} has no revision {asked.commit or asked.revision}"
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
            if self._token:
                return f"{what} is not there, or the token is wrong or may not read it"
            return f"{what} is not there, or it is private and needs a token"
        if status == 404:
            return f"{what} lacks a file that its list names: run again"
        if status is not None:
            return f"{asked.endpoint} answers with status {status}: try again later"
        way = f" by the proxy {asked.proxy}" if asked.proxy else ""
        return (
            f"{asked.endpoint} cannot be reached{way}, or the connection broke ({type(error).__name__}): "
            "running again goes on from there; a machine without internet takes a mirror (endpoint) or a directory"
        )


# ---- the work --------------------------------------------------------------------------------------


def work(asked: Asked) -> None:
    """Have the files, the manifest and the stamp below ``folder``. Raises Refused or OSError."""
    folder = Path(asked.folder)
    files = folder / "files"
    files.mkdir(parents=True, exist_ok=True)
    hub = None if asked.directory else Hub(asked)
    if hub:
        commit = asked.commit or hub.commit()
        wanted = hub.files(commit)
    else:
        commit, wanted = of_directory(asked)
    if not wanted:
        raise Refused(f"{asked.source} has no file that include and exclude leave: correct them")
    before = manifest(Path(asked.before)) if asked.before else {}
    kept = {each.path: before[each.path] for each in wanted if _same(before.get(each.path), each)}
    missing = [each for each in wanted if each.path not in kept]
    _clean(files, {each.path for each in missing})
    _room(asked, folder, missing, fetching=hub is not None)
    if hub:
        missing = _fetched(asked, hub, missing, commit, files)
    done = sorted([*kept.values(), *missing], key=lambda each: each.path)
    text = "".join(each.line() for each in done)
    (files / MANIFEST).write_text(text, encoding="utf-8")
    stamp = {
        "source": asked.source,
        "revision": asked.revision,
        "commit": commit,
        "include": list(asked.include),
        "exclude": list(asked.exclude),
        "files": len(done),
        "bytes": sum(each.size for each in done),
        "manifest": hashlib.sha256(text.encode()).hexdigest(),
        "run": asked.run,
    }
    (files / STAMP).write_text(json.dumps(stamp, sort_keys=True) + "\n", encoding="utf-8")
    shutil.rmtree(files / ".cache", ignore_errors=True)
    shutil.rmtree(folder / "home", ignore_errors=True)
    if asked.pack:
        _pack(folder, Path(asked.directory) if asked.directory else files, missing)
    _say(
        asked,
        f"{len(missing)} files fetched ({sum(each.size for each in missing) / MB:.1f} MB), {len(kept)} kept",
    )


def _same(there: File | None, wanted: File) -> bool:
    """Whether what lies on the storage is that file."""
    if there is None or there.size != wanted.size:
        return False
    return there.sha256 == wanted.sha256 if wanted.sha256 else there.blob == wanted.blob


def _clean(files: Path, wanted: set[str]) -> None:
    """Take away what an earlier attempt at something else left, but what the library continues."""
    for path in sorted(files.rglob("*"), reverse=True):
        name = str(path.relative_to(files))
        if name.split("/")[0] == ".cache":
            continue
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif name not in wanted:
            path.unlink()


def _room(asked: Asked, folder: Path, missing: Sequence[File], fetching: bool) -> None:
    """Raises Refused before the first byte where the disk is too small."""
    size = sum(each.size for each in missing)
    here = sum(path.stat().st_size for path in (folder / "files").rglob("*") if path.is_file())
    places = [(asked.room, "the shared storage")] if asked.room is not None else []
    if fetching:
        places.append((shutil.disk_usage(folder).free + here, asked.folder))
    for room, place in places:
        if size > room:
            raise Refused(
                f"{asked.source} needs {size / MB:.1f} MB and {place} has {room / MB:.1f} MB free: make room, or "
                "fetch less of it with include and exclude"
            )


def _fetched(
    asked: Asked, hub: Hub, missing: Sequence[File], commit: str, files: Path
) -> list[File]:
    over = threading.Event()
    teller = threading.Thread(target=_tell, args=(asked, missing, files, over), daemon=True)
    teller.start()
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        running = [pool.submit(hub.fetch, each, commit, files) for each in missing]
        for each in as_completed(running):
            each.result()  # the first that fails ends it
        return [each.result() for each in running]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        over.set()


def _tell(asked: Asked, missing: Sequence[File], files: Path, over: threading.Event) -> None:
    """Now and then, how far it is."""
    total = sum(each.size for each in missing)
    began, first = time.monotonic(), _there(files)
    while not over.wait(INTERVAL):
        now = _there(files)
        speed = (now - first) / (time.monotonic() - began)
        left = f"{(total - now) / speed:.0f} s left" if speed > 0 else "standing still"
        share = 100 * now // max(total, 1)
        _say(asked, f"{now // MB} of {total // MB} MB ({share} %), {speed / MB:.1f} MB/s, {left}")


def _there(files: Path) -> int:
    """Bytes below the folder, with those of what is incomplete."""
    size = 0
    for path in files.rglob("*"):
        try:
            size += path.stat().st_size if path.is_file() else 0
        except OSError:  # renamed meanwhile
            continue
    return size


def _pack(folder: Path, base: Path, missing: Sequence[File]) -> None:
    """``small.tar`` and ``plan.json``: how the files travel on."""
    archive = folder / "small.tar"
    with tarfile.open(archive, "w") as tar:
        for name in (MANIFEST, STAMP):
            tar.add(folder / "files" / name, name)
        for each in missing:
            if each.size < SMALL:
                tar.add(os.path.realpath(base / each.path), each.path)
    with archive.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    large = [
        [each.path, str(base / each.path), each.sha256] for each in missing if each.size >= SMALL
    ]
    plan = {"small": digest.hexdigest(), "large": large}
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")


def _say(asked: Asked, line: str) -> None:
    print(f"{asked.name}: {line}", flush=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While no other run fetches into the folder. Raises Refused."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(
                f"another run fetches into {folder} at this moment: wait for it"
            ) from None
        except OSError:
            pass  # a storage without locks
        yield


def main(arguments: Sequence[str]) -> int:
    """Do what the JSON object asks; 1 and one sentence on standard error where it cannot be done."""
    os.umask(0o022)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    values: dict[str, Any] = json.loads(arguments[0])
    asked = Asked(**values)
    try:
        with alone(Path(asked.folder)):
            work(asked)
    except Refused as error:
        print(f"{asked.name}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = error.filename or asked.folder
        print(f"{asked.name}: {where}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no thread that still fetches holds it up
