"""A run's work folder: every finished stage is on disk before the next begins, so the same command goes on after a kill.

.OUT.laconic/lock            held by flock for as long as the run lives, contains its process id
.OUT.laconic/run.json        identity: what the results depend on
.OUT.laconic/journal.jsonl   one line a finished stage: key, value, part file with its sha256
.OUT.laconic/parts/          tensors of the stages, one safetensors file each
.OUT.laconic/final/          the assembled result, renamed to OUT as the last act"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from laconic.core.errors import UserError
from laconic.kernels.place import here
from laconic.models import is_artifact

CHUNK = 8 * 1024 * 1024
# what a file system needs besides the bytes of the files
MARGIN = 1_000_000
FULL = {errno.ENOSPC, errno.EDQUOT}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG}
NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}


# ---- safetensors files


class Stored(NamedTuple):
    """Where one tensor lies: bytes start to stop of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def stored(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, from its header only. UserError where the file is missing, cut off or no safetensors file."""
    try:
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            head = f.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if 8 + length > size:
                raise UserError(f"{path} is cut off: {size:,} bytes do not even hold its header; copy or download it again")
            header = json.loads(f.read(length))
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = Stored(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin, 8 + length + end)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; restore it or write the folder again") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no safetensors file: its header cannot be read; copy or download it again") from None
    needed = max((entry.stop for entry in found.values()), default=8 + length)
    if needed != size:
        raise UserError(f"{path} is damaged: it has {size:,} bytes where its header promises {needed:,}; copy or download it again")
    for name, entry in found.items():
        if entry.stop - entry.start != _bytes(entry.dtype, entry.shape):
            raise UserError(
                f"{path} is damaged: tensor {name} has {entry.stop - entry.start:,} bytes, not those of its shape; copy it again"
            )
    return found


def fetch(entry: Stored) -> Tensor:
    """The tensor by pread into fresh memory: nothing stays mapped."""
    raw = torch.empty(entry.stop - entry.start, dtype=torch.uint8, device="cpu")
    view = raw.numpy().data
    with entry.file.open("rb", buffering=0) as f:
        done = 0
        while done < len(view):
            got = os.preadv(f.fileno(), [view[done : done + CHUNK]], entry.start + done)
            if got == 0:
                raise UserError(f"{entry.file} ends at byte {entry.start + done:,}, inside a tensor; copy or download it again")
            done += got
    return raw.view(entry.dtype).reshape(entry.shape)


def _bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    size = dtype.itemsize
    for n in shape:
        size *= n
    return size


def _order(kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], ranks: Mapping[str, int]) -> list[str]:
    # wide elements first, as the safetensors library does: every tensor then starts at a multiple of its element size
    return sorted(kinds, key=lambda name: (ranks.get(name, 0), -kinds[name][0].itemsize, name))


def _header(kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], ranks: Mapping[str, int]) -> bytes:
    """Length, JSON, padding to a multiple of 8, for tensors in the order of `_order`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in _order(kinds, ranks):
        dtype, shape = kinds[name]
        size = _bytes(dtype, shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class _Output:
    """A new file, hashed while it is written, on disk when closed without an exception."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self.sha = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), CHUNK):
            piece = view[start : start + CHUNK]
            self.sha.update(piece)
            self.size += len(piece)
            while len(piece):
                piece = piece[os.write(self.fd, piece) :]

    def write_tensor(self, tensor: Tensor) -> None:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            self.write(flat.view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                os.fsync(self.fd)
        finally:
            os.close(self.fd)


def _copied(source: Path, start: int, stop: int) -> Iterator[bytes]:
    """Bytes start to stop of a file, a chunk at a time."""
    with source.open("rb", buffering=0) as f:
        while start < stop:
            piece = os.pread(f.fileno(), min(CHUNK, stop - start), start)
            if not piece:
                raise UserError(f"{source} ends at byte {start:,} where {stop:,} were expected; restore it and give the same command again")
            yield piece
            start += len(piece)


def sha256_of(path: Path) -> str:
    """The file's sha256, read a chunk at a time."""
    sha = hashlib.sha256()
    for piece in _copied(path, 0, path.stat().st_size):
        sha.update(piece)
    return sha.hexdigest()


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- the work folder


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two identities, as words: `seed (0 before, 1 now)`."""
    words: list[str] = []
    for key in sorted({*before, *now}):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            words += changes(a, b, f"{prefix}{key}.")
        elif a != b or (key in before) != (key in now):
            words.append(f"{prefix}{key} ({_short(a)} before, {_short(b)} now)")
    return words


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


class _Entry(NamedTuple):
    value: dict[str, Any]
    file: str | None
    sha256: str | None


class Work:
    """The work folder of one run that writes `out`, as a context manager: locked inside, resumable ever after.

    identity: a JSON object of all that the result depends on; a folder of another identity is refused, or started anew with `overwrite`.
    An existing `out` is refused too; with `overwrite` it is replaced by `publish`, at the very end."""

    def __init__(
        self, out: Path, identity: Mapping[str, Any], *, overwrite: bool = False, log: Callable[[str], None] | None = None
    ) -> None:
        # the real path: "results/.." has no name of its own, and a link is replaced at its target
        self.out = Path(out).expanduser().resolve()
        self.folder = self.out.parent / f".{self.out.name}.laconic"
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        self._final = self.folder / "final"
        self._old = self.folder.with_name(self.folder.name + ".old")
        self.overwrite = overwrite
        self.log = log or logging.getLogger("laconic").warning
        self.resumed = False
        self._entries: dict[str, _Entry] = {}
        self._trusted: set[str] = set()
        self._assembled: dict[str, str] | None = None
        self._lock = -1
        self._journal = -1

    # -- opening and closing

    def __enter__(self) -> Self:
        try:
            with self._disk():
                self._take_lock()
                self._recover()
                self._check_out()
                self._open()
        except BaseException:
            if self._lock >= 0 and not (self.folder / "run.json").exists():
                self._remove_folder()
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        for name in ("_journal", "_lock"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)

    def _take_lock(self) -> None:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "lock"
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(fd)
                raise UserError(
                    f"another run (process {pid}) is writing {self.out}; wait for it, end it, or choose another folder with -o"
                ) from None
            except BaseException:
                os.close(fd)
                raise
            # the holder before us may have removed the folder between our open and our lock
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.stat()):
                    self._lock = fd
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                    return
            os.close(fd)

    def _recover(self) -> None:
        # killed between moving the old result aside and putting the new one in its place
        aside = self.folder / "replaced"
        if aside.exists() and not self.out.exists():
            aside.rename(self.out)
            _sync_folder(self.out.parent)
        if self._old.exists():
            shutil.rmtree(self._old)

    def _check_out(self) -> None:
        if not self.out.exists() or self._published() is not None:
            return
        if not self.overwrite:
            raise UserError(f"{self.out} exists; choose another folder with -o, or replace it with --overwrite")
        if not self.out.is_dir() or (any(self.out.iterdir()) and not is_artifact(self.out)):
            raise UserError(f"{self.out} was not written by laconic and is not replaced; choose another folder with -o")

    def _open(self) -> None:
        run = self.folder / "run.json"
        before = _json(run)
        if before is not None and before != self.identity:
            if not self.overwrite:
                changed = changes(before, self.identity)
                more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
                raise UserError(
                    f"an unfinished run for {self.out} was started with other settings: {', '.join(changed[:3])}{more}; "
                    f"give its command again to go on, or start anew with --overwrite"
                )
            before = None
        if before is None:
            # run.json goes first: without it nothing else in the folder is trusted, should this be interrupted
            with contextlib.suppress(FileNotFoundError):
                run.unlink()
            for path in self.folder.iterdir():
                if path.name not in {"lock", "replaced"}:
                    _remove(path)
        (self.folder / "parts").mkdir(exist_ok=True)
        for stray in (self.folder / "parts").glob("*.tmp"):
            stray.unlink()
        self._journal = os.open(self.folder / "journal.jsonl", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._read_journal()
        if before is None:
            self._write(run, json.dumps(self.identity, indent=1).encode())
        self.resumed = bool(self._entries)

    def _read_journal(self) -> None:
        data = (self.folder / "journal.jsonl").read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._journal, whole)
            os.fsync(self._journal)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                entry = record["entry"]
                if record["crc"] != _crc(json.dumps(entry)):
                    raise ValueError
                self._entries[entry["key"]] = _Entry(entry["value"], entry["file"], entry["sha256"])
            except (ValueError, KeyError, TypeError):
                self.log(f"line {number} of {self.folder / 'journal.jsonl'} is damaged; what it recorded is computed again")

    # -- stages

    def done(self, key: str) -> dict[str, Any] | None:
        """The value of a finished stage, or None. Its part file is read once and compared with its hash; a damaged one is not done."""
        entry = self._entries.get(key)
        if entry is None or not self._intact(key, entry):
            return None
        # a copy, so that a caller who changes it does not change what the next caller sees
        value: dict[str, Any] = json.loads(json.dumps(entry.value))
        return value

    def _intact(self, key: str, entry: _Entry) -> bool:
        if entry.file is None or key in self._trusted:
            return True
        path = self.folder / "parts" / entry.file
        try:
            whole = sha256_of(path) == entry.sha256
        except OSError:
            whole = False
        if whole:
            self._trusted.add(key)
            return True
        self.log(f"{path} is missing or damaged; stage {key} is computed again")
        del self._entries[key]
        return False

    def finish(self, key: str, value: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Record a finished stage: its tensors as a part file, then one line of the journal; both are on disk on return."""
        file, sha = None, None
        if tensors is not None:
            file, sha = f"{_slug(key)}.safetensors", self._write_part(f"{_slug(key)}.safetensors", tensors)
        entry = {"key": key, "value": dict(value), "file": file, "sha256": sha}
        text = json.dumps(entry)
        line = f'{{"crc": "{_crc(text)}", "entry": {text}}}\n'.encode()
        with self._disk(len(line)):
            end = os.fstat(self._journal).st_size
            try:
                at = end
                while line:
                    count = os.pwrite(self._journal, line, at)
                    line, at = line[count:], at + count
                os.fsync(self._journal)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._journal, end)
                raise
        self._entries[key] = _Entry(json.loads(text)["value"], file, sha)
        self._trusted.add(key)

    def _write_part(self, file: str, tensors: Mapping[str, Tensor]) -> str:
        kinds = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        path = self.folder / "parts" / file
        temporary = path.with_suffix(".tmp")
        with self._disk(sum(_bytes(*kind) for kind in kinds.values())):
            try:
                with _Output(temporary) as output:
                    output.write(_header(kinds, {}))
                    for name in _order(kinds, {}):
                        output.write_tensor(tensors[name])
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)
        return output.sha.hexdigest()

    def tensors(self, key: str) -> dict[str, Tensor]:
        """The tensors of a finished stage, read back into fresh memory."""
        entry = self._entries[key]
        return {} if entry.file is None else {name: here(fetch(at)) for name, at in stored(self.folder / "parts" / entry.file).items()}

    def discard(self) -> None:
        """Remove the work folder: for input that turned out bad before anything useful was done."""
        self._recover()
        self._remove_folder()
        self._entries.clear()
        self._close()

    def _remove_folder(self) -> None:
        # out of the way in one step, so that a kill in the middle of the removal leaves no half a work folder
        with contextlib.suppress(OSError):
            self.folder.rename(self._old)
        shutil.rmtree(self._old, ignore_errors=True)

    # -- the result

    @property
    def assembled(self) -> Path:
        """Where `assemble` puts the result until `publish` moves it to `out`; `out` itself once that has happened."""
        return self._final if self._published() is None else self.out

    def assemble(
        self,
        files: Mapping[str, bytes | Path],
        parts: Sequence[str],
        *,
        ranks: Mapping[str, int] | None = None,
        shard_bytes: int = 5_000_000_000,
    ) -> dict[str, str]:
        """Write the result into `assembled`, where it can be loaded and checked: the tensors of `parts` as model.safetensors (or shards
        with an index) and `files` (bytes, or files to copy). ranks: tensors of a higher one come later, those without one are of rank 0.
        -> sha256 by file name. Constant memory; bytes depend on content only."""
        if (before := self._published()) is not None:
            return before
        pieces = self._pieces(parts)
        size = sum(at.stop - at.start for at in pieces.values())
        size += sum(len(content) if isinstance(content, bytes) else content.stat().st_size for content in files.values())
        with self._disk(size):
            if self._final.exists():
                shutil.rmtree(self._final)
            if size + MARGIN > shutil.disk_usage(self.folder).free:
                raise self._full(size)
            self._final.mkdir()
            try:
                hashes = self._write_shards(pieces, ranks or {}, shard_bytes) | self._write_files(files)
                _sync_folder(self._final)
            except BaseException:
                shutil.rmtree(self._final, ignore_errors=True)
                raise
        self._assembled = hashes
        return dict(hashes)

    def publish(self, files: Mapping[str, bytes | Path], parts: Sequence[str] = (), *, shard_bytes: int = 5_000_000_000) -> dict[str, str]:
        """Rename the result to `out` in one step and remove the work folder. Without a call of `assemble` before, it assembles; after one,
        `files` are added to what stands there. -> sha256 by file name, of everything in `out`."""
        if (before := self._published()) is not None:
            # killed after the rename: the result stands, only the tidying is left
            self._remove_folder()
            return before
        if self._assembled is None:
            self.assemble(files, parts, shard_bytes=shard_bytes)
            files = {}
        hashes = self._assembled or {}
        with self._disk():
            hashes |= self._write_files(files)
            _sync_folder(self._final)
            hashes = dict(sorted(hashes.items()))
            self._write(self.folder / "published.json", json.dumps(hashes).encode())
            if self.out.exists():
                self.out.rename(self.folder / "replaced")
            self._final.rename(self.out)
            _sync_folder(self.out.parent)
        self._remove_folder()
        return hashes

    def _published(self) -> dict[str, str] | None:
        """The hashes of an `out` that this very run has put in its place, or None."""
        hashes = _json(self.folder / "published.json")
        same = hashes is not None and self.out.is_dir() and not self._final.exists() and _json(self.folder / "run.json") == self.identity
        return hashes if same else None

    def _pieces(self, parts: Sequence[str]) -> dict[str, Stored]:
        pieces: dict[str, Stored] = {}
        for key in parts:
            entry = self._entries.get(key)
            if entry is None or not self._intact(key, entry):
                raise UserError(f"the stored result of stage {key} is missing or damaged; give the same command again, it is computed anew")
            if entry.file is not None:
                found = stored(self.folder / "parts" / entry.file)
                if twice := pieces.keys() & found.keys():
                    raise ValueError(f"tensor {min(twice)} is in two parts, one of them {key}")
                pieces |= found
        return pieces

    def _write_shards(self, pieces: Mapping[str, Stored], ranks: Mapping[str, int], shard_bytes: int) -> dict[str, str]:
        shards: list[dict[str, Stored]] = [{}]
        filled = 0
        for name in sorted(pieces, key=lambda name: (ranks.get(name, 0), name)):
            size = pieces[name].stop - pieces[name].start
            if shards[-1] and filled + size > shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = pieces[name]
            filled += size
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        if len(shards) == 1:
            names = ["model.safetensors"]
        hashes = {}
        for file, shard in zip(names, shards, strict=True):
            kinds = {name: (at.dtype, at.shape) for name, at in shard.items()}
            with _Output(self._final / file) as output:
                output.write(_header(kinds, ranks))
                for name in _order(kinds, ranks):
                    for piece in _copied(shard[name].file, shard[name].start, shard[name].stop):
                        output.write(piece)
            hashes[file] = output.sha.hexdigest()
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(at.stop - at.start for at in pieces.values())},
                "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            hashes |= self._write_files({"model.safetensors.index.json": text.encode()})
        return hashes

    def _write_files(self, files: Mapping[str, bytes | Path]) -> dict[str, str]:
        hashes = {}
        for name in sorted(files):
            content = files[name]
            path = self._final / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with _Output(path) as output:
                if isinstance(content, bytes):
                    output.write(content)
                else:
                    for piece in _copied(content, 0, content.stat().st_size):
                        output.write(piece)
            hashes[name] = output.sha.hexdigest()
        return hashes

    # -- the disk

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(path.name + ".tmp")
        with _Output(temporary) as output:
            output.write(data)
        temporary.replace(path)
        _sync_folder(path.parent)

    @contextlib.contextmanager
    def _disk(self, needed: int = 0) -> Iterator[None]:
        """What the disk refuses becomes one sentence."""
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                raise self._full(needed) from error
            if error.errno in REFUSED:
                raise UserError(f"{self.folder} cannot be written ({error.strerror}); choose another folder with -o") from error
            raise

    def _full(self, needed: int) -> UserError:
        missing = max(needed + MARGIN - shutil.disk_usage(self.out.parent).free, MARGIN)
        return UserError(
            f"no space left on the disk of {self.out.parent}: free {missing:,} bytes or choose another folder with -o; "
            f"the finished work is kept and the same command goes on"
        )


def _json(path: Path) -> dict[str, Any] | None:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return read if isinstance(read, dict) else None


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _slug(key: str) -> str:
    # readable, and different for keys that differ only in case or in characters a file name cannot have
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', key)[:60]}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


class Below:
    """A part of a run's journal: stages of a run within the run, whose keys stand below a name."""

    def __init__(self, work: Work, name: str) -> None:
        self.work, self.name, self.folder = work, name, work.folder / name

    def done(self, key: str) -> dict[str, Any] | None:
        """As `Work.done`."""
        return self.work.done(f"{self.name}/{key}")

    def finish(self, key: str, value: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """As `Work.finish`."""
        self.work.finish(f"{self.name}/{key}", value, tensors)

    def tensors(self, key: str) -> dict[str, Tensor]:
        """As `Work.tensors`."""
        return self.work.tensors(f"{self.name}/{key}")
