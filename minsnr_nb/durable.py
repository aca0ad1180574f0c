"""The one place where the package writes, renames or removes files.

Everything else computes bytes and hands them over, so what a crash, a full disk or a lost power
supply can do to a run is decided, and tested, on this page. Three promises:

- `replace`, `publish`, `claim`: a reader sees the old state or the new one, never half of it;
- `Appender.line`: a line is in the log whole, or it was the last one and lacks its newline;
- every failure is one `DurableError` naming the operation, the path and the errno; temporary files
  are gone by then. A failed fsync is never repeated: Linux may call the lost pages clean.

Who writes into a directory that others may take over has a `desk` there: one hidden directory from which
every rename and every link starts, and to which everything removed goes. Whoever takes over clears the
desks of all others first. A process that was stopped between any check and the rename that follows
finds, whenever it wakes, that the rename has no source: it cannot change what is published.
"""

import errno
import hashlib
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from minsnr_nb.errors import ConfigError, MinsnrError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "Appender",
    "Busy",
    "Displaced",
    "DurableError",
    "Slab",
    "alone",
    "claim",
    "create",
    "clear_desks",
    "close_desk",
    "cut",
    "desk",
    "digest",
    "hold",
    "is_held",
    "make_dir",
    "open_desk",
    "publish",
    "publish_files",
    "put_new",
    "remove",
    "remove_empty",
    "renew",
    "replace",
    "sha256",
    "shared_desk",
    "staging",
    "unhold",
    "whole_lines",
]

Data = bytes | str | Iterable[bytes]


class DurableError(MinsnrError):
    "A file operation failed; the message names the operation, the path and the errno"

    errno: int | None = None


class Busy(DurableError):
    "Another living process holds the lock of a directory"


class Displaced(DurableError):
    "Somebody else has taken over what this process was writing; it writes nothing more"


@contextmanager
def _doing(verb: str, path):
    "Turn an `OSError` inside into the one line a user can act on"
    try:
        yield
    except OSError as e:
        if (place := _desk_of(path)) and not place.is_dir():
            gone = "was taken over by another process, or removed; this one writes nothing more"
            raise Displaced(f"{place.parent}: {gone}") from None
        code = errno.errorcode.get(e.errno or 0, type(e).__name__)
        error = DurableError(f"cannot {verb} {path}: {e.strerror or e} ({code})")
        error.errno = e.errno
        raise error from e


def _plain(path, flags: int, open=os.open) -> int:
    "Open a file of a run for reading; a link is an error, and the test's faulty `os` is not asked"
    return open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _buffers(data: Data):
    if isinstance(data, str):
        data = data.encode()
    return (data,) if isinstance(data, (bytes, bytearray, memoryview)) else data


def _write_all(fd: int, buffer) -> None:
    "A write may be short without being an error; go on until everything is down"
    view = memoryview(buffer)
    view = view.cast("B") if view.nbytes else view[:0]
    while view:
        view = view[os.write(fd, view) :]


def _fsync(path: Path) -> None:
    "Flush a file or a directory; some network file systems refuse the latter with EINVAL"
    if os.name == "nt" and path.is_dir():
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(fd)


def _write_new(path: Path, data: Data, mode: int, sync: bool) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    try:
        for buffer in _buffers(data):
            _write_all(fd, buffer)
        if sync:
            os.fsync(fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(fd)


_desks: dict[str, tuple[Path, int]] = {}  # directory -> where we stage what we write below it


def _desk_of(path) -> Path | None:
    "The desk from which a path is written, if its directory has one"
    text = os.path.abspath(path) if _desks else ""
    return next((place for root, (place, _) in _desks.items() if text.startswith(root)), None)


def _key(root) -> str:
    return os.path.join(os.path.abspath(root), "")


def open_desk(root, owner: str) -> Path:
    "Stage every write below `root` in one hidden directory, which is locked while this process lives"
    key = _key(root)
    if key in _desks and _desks[key][0].is_dir():  # a run that this process opens once more
        return _desks[key][0]
    close_desk(root)
    place = Path(root, f".desk-{owner}-{secrets.token_hex(4)}")
    with _doing("make", place):
        os.mkdir(place)
    _desks[key] = place, -1
    if fcntl:
        try:
            with _doing("open", place):  # or learn that somebody has cleared it away
                fd = os.open(place, os.O_RDONLY)
        except DurableError:
            close_desk(root)
            raise
        with suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _desks[key] = place, fd
    return place


def close_desk(root) -> None:
    "Write below `root` without a desk again"
    place, fd = _desks.pop(_key(root), (None, -1))
    if place:
        shutil.rmtree(place, ignore_errors=True)
        with suppress(OSError):
            os.close(fd)


@contextmanager
def desk(root, owner: str):
    "Have a desk for a while; a second one of the same process is the first"
    mine = _key(root) not in _desks
    try:
        yield open_desk(root, owner)
    finally:
        if mine:
            close_desk(root)


def clear_desks(root) -> None:
    "Remove the desks of all others below `root`: from here on they publish nothing there"
    mine, _ = _desks.get(_key(root), (None, -1))
    for place in Path(root).glob(".desk-*"):
        if place != mine:
            gone = place.with_name(f".gone-{secrets.token_hex(6)}")
            with _doing("clear", place), suppress(FileNotFoundError):
                os.rename(place, gone)
                _delete(gone)


def _delete(tree) -> None:
    "Delete a hidden tree; on NFS a file that somebody has open stays under another name until it is closed"
    try:
        shutil.rmtree(tree)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EBUSY):
            raise


def staging(final) -> Path:
    "A fresh directory in which `final` is put together before `publish`"
    place = _hidden(Path(final), "new")
    with _doing("make", place):
        os.mkdir(place)
    return place


def _hidden(path: Path, prefix: str) -> Path:
    "A fresh name on the desk, or a dot-name in the same directory: renames stay inside one file system"
    return (_desk_of(path) or path.parent) / f".{prefix}-{secrets.token_hex(6)}"


@contextmanager
def _flushed_beside(path: Path, data: Data, mode: int = 0o666):
    "`data` in a flushed temporary file next to `path`; whatever happens it is gone afterwards"
    temp = _hidden(path, "tmp")
    _write_new(temp, data, mode, sync=True)
    try:
        yield temp
    finally:
        with suppress(OSError):
            os.unlink(temp)


def create(path, data: Data, *, mode: int = 0o666) -> Path:
    "Write a new file inside a staging directory; `publish` flushes it. An existing path is an error"
    path = Path(path)
    with _doing("write", path):
        _write_new(path, data, mode, sync=False)
    return path


def replace(path, data: Data, *, mode: int = 0o666) -> Path:
    "Put a whole file in place: temporary file, fsync, rename over, directory fsync"
    path = Path(path)
    with _doing("write", path):
        with _flushed_beside(path, data, mode) as temp:
            os.replace(temp, path)
        _fsync(path.parent)
    return path


def claim(path, data: Data) -> bool:
    "Put a whole file in place only if nothing is there; False when somebody was first"
    path = Path(path)
    with _doing("claim", path):
        with _flushed_beside(path, data) as temp:
            try:
                os.link(temp, path)  # atomic and exclusive, on old NFS as well
            except FileExistsError:  # NFS may say so of a link that it has just made
                if not os.path.samefile(temp, path):
                    return False
        _fsync(path.parent)
    return True


def put_new(path, data: str | bytes) -> Path:
    "Make a file that somebody has named; what is there already stays, and is an error unless it is the same"
    if not claim(path, data) and sha256(path) != digest(data):
        raise ConfigError(f"{path}: exists already, and is never replaced; give another name")
    return Path(path)


class Appender:
    "An append-only text file: one write per line, and a line that failed is taken back"

    def __init__(self, path):
        self.path = Path(path)
        with _doing("open", self.path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            flags |= getattr(os, "O_NOFOLLOW", 0)  # a link would lead the line out of the run
            self._fd = os.open(self.path, flags, 0o666)

    def line(self, text: str) -> int:
        "Append `text` and a newline; the number of bytes added"
        data = (text + "\n").encode()
        done = 0
        with _doing("append to", self.path):
            try:
                while done < len(data):
                    done += os.write(self._fd, data[done:] if done else data)
            except BaseException:
                self._take_back(done)
                raise
        return done

    def _take_back(self, done: int) -> None:
        "Remove the torn start of our own line, unless somebody has written behind it"
        with suppress(OSError):
            end = os.lseek(self._fd, 0, os.SEEK_CUR)
            if done and os.fstat(self._fd).st_size == end:
                os.ftruncate(self._fd, end - done)

    def fileno(self) -> int:
        "The descriptor, for a child process whose output goes here"
        return self._fd

    def sync(self) -> None:
        "Flush what was appended to the disk"
        with _doing("flush", self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        "Close the file; a second call does nothing"
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with _doing("close", self.path):
                os.close(fd)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


class Slab:
    "A large file that is filled part by part; a process that died left parts, and the next one goes on"

    def __init__(self, path, size: int):
        self.path, self.size = Path(path), size
        self._part, self._list = (
            self.path.with_name(f".{self.path.name}.{n}") for n in ("part", "done")
        )
        with _doing("make", self.path):
            self._fd = os.open(
                self._part, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666
            )
            if os.fstat(self._fd).st_size != size:  # another one's, or a new one
                with suppress(FileNotFoundError):
                    os.unlink(self._list)
                os.ftruncate(self._fd, size)
        self._log = Appender(self._list)
        self.done = {
            start: stop for start, stop, crc in self._listed() if self._intact(start, stop, crc)
        }

    def _listed(self):
        end = whole_lines(self._list)
        with _doing("read", self._list), open(self._list, "rb") as f:
            text = f.read(end).decode("ascii", "replace")
        if end < os.stat(self._list).st_size:  # a torn line: begin the next one on its own
            self._log.line("")
        for line in text.splitlines():
            words = line.split(" ")
            if len(words) == 3 and all(w.isdigit() for w in words):
                yield tuple(map(int, words))

    def _intact(self, start: int, stop: int, crc: int) -> bool:
        if not start < stop <= self.size:
            return False
        with _doing("read", self._part):
            os.lseek(self._fd, start, os.SEEK_SET)
            return zlib.crc32(os.read(self._fd, stop - start)) == crc  # parts are a few MiB

    def put(self, start: int, data) -> None:
        "Write one part, then note that it is there: in this order, also on the disk"
        view = memoryview(data).cast("B")
        with _doing("write", self.path):
            os.lseek(self._fd, start, os.SEEK_SET)
            _write_all(self._fd, view)
            getattr(os, "fdatasync", os.fsync)(self._fd)
        self._log.line(f"{start} {start + len(view)} {zlib.crc32(view)}")

    def finish(self) -> Path:
        "Put the whole file in place"
        self.close()
        with _doing("write", self.path):
            _fsync(self._part)
            os.replace(self._part, self.path)
            with suppress(FileNotFoundError):
                os.unlink(self._list)
            _fsync(self.path.parent)
        return self.path

    def close(self) -> None:
        "Close the files; a second call does nothing"
        self._log.close()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def is_held(folder) -> bool | None:
    "Whether a living process has locked a directory; None where nobody can say"
    if fcntl is None:
        return None
    try:
        fd = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(fd)


@contextmanager
def alone(folder, wait_s: float = 60.0):
    "Wait until no other process is in here with the same directory; a death lets the next one in"
    if fcntl is None:
        yield
        return
    with _doing("open", folder):
        fd = os.open(folder, os.O_RDONLY)
    try:
        _lock(fd, folder, wait_s)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, folder, wait_s: float) -> None:
    end = time.monotonic() + wait_s
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                busy = f"another process has been writing for {wait_s:.0f} s; try again later"
                raise Busy(f"cannot lock {folder}: {busy}") from None
            time.sleep(0.02)
        except OSError:  # a file system without locks
            return None


def hold(path) -> int | None:
    "Lock a file until the descriptor is closed here and in every child that has it; None when another holds it"
    with _doing("hold", path):
        fd = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    for _ in range(5 if fcntl else 0):  # who asks `is_held` has the lock for a moment
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.002)
        except OSError:  # a file system without locks
            break
    else:
        if fcntl:
            os.close(fd)
            return None
    return fd


def unhold(fd: int) -> None:
    "Close what `hold` has opened"
    with suppress(OSError):
        os.close(fd)


def make_dir(path) -> list[Path]:
    "Make a directory and its missing parents; the ones that were made, outermost first"
    path = Path(path)
    missing: list[Path] = []
    place = _desk_of(path)
    for parent in (path, *path.parents):
        if parent.is_dir():
            break
        missing.insert(0, parent)
    if place and (place in missing or place.parent in missing):
        with _doing("make", path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    made: list[Path] = []
    try:
        for parent in missing:
            _make_one(parent, made)
    except DurableError:
        for parent in reversed(made):
            with suppress(OSError):
                os.rmdir(parent)
        raise
    return made


def _make_one(path: Path, made: list[Path]) -> None:
    with _doing("make", path):
        try:
            os.mkdir(path)
            made.append(path)
        except FileExistsError:  # fine when another process made the same directory
            if not path.is_dir():
                raise
        _fsync(path.parent)


def _raise(error: OSError):
    "What `os.walk` does not do by itself about a directory that it cannot list"
    raise error


def publish(staging, final) -> Path:
    "Make a staged directory visible: flush all of it, one rename, flush the parent"
    staging, final = Path(staging), Path(final)
    with _doing("publish", final):
        for folder, _, files in os.walk(staging, topdown=False, onerror=_raise):
            for name in files:
                _fsync(Path(folder, name))
            _fsync(Path(folder))
        # rename(2) refuses a file and a filled directory by itself; this adds the empty directory
        if os.path.lexists(final):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(staging, final)
        try:
            _fsync(final.parent)
        except OSError:
            os.rename(final, staging)  # not durable: better not there at all
            raise
    return final


def publish_files(final, files: Mapping[str, Data]) -> Path:
    "Make a directory of files visible at once, or leave nothing; a name ending in / is a directory"
    final = Path(final)
    make_dir(final.parent)
    with shared_desk(final.parent):
        staging = _hidden(final, "new")
        try:
            for name, data in files.items():
                make_dir(staging / name if name.endswith("/") else (staging / name).parent)
                if not name.endswith("/"):
                    create(staging / name, data)
            return publish(staging, final)
        finally:
            remove(staging)


@contextmanager
def shared_desk(folder):
    "Have a desk in a directory of many writers, and remove the desks of those that died there"
    folder = Path(folder)
    if _desk_of(folder / "anything"):
        yield
        return
    with alone(folder):  # so that a desk is locked when another process looks at it
        for place in folder.glob(".desk-publish-*"):
            if is_held(place) is False:
                shutil.rmtree(place, ignore_errors=True)
        open_desk(folder, "publish")
    try:
        yield
    finally:
        close_desk(folder)


def remove(path) -> None:
    "Remove a file or a directory tree, which is hidden first so that nobody meets half of it"
    path = Path(path)
    with _doing("remove", path):
        if path.is_dir() and not path.is_symlink():
            gone = path if path.name.startswith(".") else _hidden(path, "gone")
            if gone != path:
                os.rename(path, gone)
            _delete(gone)
        elif os.path.lexists(path):
            gone = path
            if _desk_of(path):  # taken to the desk first: without a desk nothing is removed
                os.replace(path, gone := _hidden(path, "gone"))
            os.unlink(gone)
        else:
            return
        _fsync(path.parent)


def remove_empty(path) -> None:
    "Remove a directory that holds nothing; one that is in use stays, and that is no error"
    path = Path(path)
    with _doing("remove", path):
        try:
            os.rmdir(path)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise


def whole_lines(path) -> int:
    "Length in bytes of a log without a torn last line"
    with _doing("read", path), open(path, "rb", opener=_plain) as f:
        end = f.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            f.seek(start)
            newline = f.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def cut(path, size: int, keep_to) -> int:
    "Make a log end after `size` bytes, once its tail is kept in `keep_to`; the bytes cut off"
    path, keep_to = Path(path), Path(keep_to)
    with _doing("read", path), open(path, "rb", opener=_plain) as f:
        if f.seek(0, os.SEEK_END) < size:
            raise OSError(errno.EINVAL, f"shorter than the {size} bytes to keep")
        f.seek(size)
        tail = f.read()
    if tail:
        make_dir(keep_to.parent)
        replace(_free_or_equal(keep_to, tail), tail)
        renew(path, size)
    return len(tail)


def renew(path, size: int) -> None:
    "Put the first `size` bytes of a log in its place as a new file: who has the old one open appends to nothing"
    with _doing("read", path), open(path, "rb") as f:
        replace(path, iter(lambda: f.read(min(1 << 20, size - f.tell())), b""))


def _free_or_equal(path: Path, data: bytes) -> Path:
    "`path`, or the first numbered name beside it that is free; the same bytes are kept once"
    candidate, n = path, 0
    while os.path.lexists(candidate) and _content(candidate) != data:
        n += 1
        candidate = path.with_stem(f"{path.stem}-{n}")
    return candidate


def _content(path: Path) -> bytes | None:
    "What is in a plain file; None when it is something else"
    with suppress(OSError), open(path, "rb", opener=_plain) as f:
        return f.read()
    return None


def digest(data: str | bytes) -> str:
    "Hex digest of what is in memory"
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def sha256(path) -> str:
    "Hex digest of a file's content"
    with _doing("read", path), open(path, "rb", opener=_plain) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
