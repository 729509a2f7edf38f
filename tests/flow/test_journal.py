"""The work folder under kills, interrupts, damage, a second run and a full disk: finished stages stay finished, bytes stay the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from laconic.core.errors import UserError
from laconic.journal import Work
from laconic.models import is_artifact

IDENTITY = {"model": {"model.safetensors": "abc"}, "recipe": "rtn", "seed": 0, "threads": 2}
ARTIFACT = {"config.json": b'{"quantization_config": {"quant_method": "laconic", "format": 1, "forms": {}}}'}
KEYS = [f"model.layers.{i}" for i in range(14)]

# one process that imports torch once and forks the runs that are killed; `computed` counts what each run computed
RUNS = textwrap.dedent("""
    import json, os, random, signal, sys, time
    import torch
    from pathlib import Path
    from laconic.core.errors import UserError
    from laconic.journal import Work

    torch.set_num_threads(1)
    folder, keys, identity, files = Path(sys.argv[1]), *json.loads(sys.argv[2])

    def run(pause):
        with Work(folder / "out", identity) as work:
            for i, key in enumerate(keys):
                if work.done(key) is None:
                    generator = torch.Generator().manual_seed(i)
                    tensors = {f"{key}.weight": torch.randn(300, 401, generator=generator), f"{key}.bias": torch.ones(i + 1)}
                    time.sleep(pause)
                    work.finish(key, {"i": i, "damage": 0.1 + i / 3}, tensors)
                    with open(folder / "computed", "a") as f:
                        f.write(key + "\\n")
            values = [work.done(key) for key in keys]
            hashes = work.publish({name: text.encode() for name, text in files.items()}, keys)
        (folder / "result.json").write_text(json.dumps([values, hashes], sort_keys=True))

    def forked(pause):
        pid = os.fork()
        if pid == 0:
            # a suite that was started in the background hands an ignored SIGINT down
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                run(pause)
                os._exit(0)
            except KeyboardInterrupt:
                os._exit(130)
            except UserError as error:
                (folder / "error").write_text(str(error))
                os._exit(2)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
        return pid

    def code(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
""")


def runs(folder: Path, body: str, timeout: float = 50) -> str:
    """Run `body` after RUNS in a process of its own; -> what it printed."""
    folder.mkdir(exist_ok=True)
    arguments = [str(folder), json.dumps([KEYS, IDENTITY, {name: data.decode() for name, data in ARTIFACT.items()}])]
    script = RUNS + textwrap.dedent(body)
    ended = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=timeout, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def parts() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(12, dtype=torch.float32).reshape(3, 4), "q": torch.tensor([1, 2, 3], dtype=torch.uint8)}


def test_kills_and_interrupts_lose_nothing_and_change_nothing(tmp_path: Path) -> None:
    runs(tmp_path / "calm", "assert code(forked(0.0)) == 0")
    printed = runs(
        tmp_path / "killed",
        """
        codes = []
        while len(codes) < 5:
            pid = forked(0.05)
            # from before the lock to the third stage: the six runs together cannot reach the end
            time.sleep(random.uniform(0.0, 0.12))
            os.kill(pid, signal.SIGKILL)
            codes.append(code(pid))
        pid = forked(0.05)
        time.sleep(0.08)
        os.kill(pid, signal.SIGINT)
        codes.append(code(pid))
        codes.append(code(forked(0.0)))
        print(json.dumps(codes))
        """,
    )
    assert json.loads(printed) == [-signal.SIGKILL] * 5 + [130, 0]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert (killed / "result.json").read_text() == (calm / "result.json").read_text()
    hashes = json.loads((killed / "result.json").read_text())[1]
    for name, sha in hashes.items():
        assert hashlib.sha256((killed / "out" / name).read_bytes()).hexdigest() == sha
    # a kill between the journal line and the count loses a count, never adds one
    counts = [(killed / "computed").read_text().split().count(key) for key in KEYS]
    assert max(counts) == 1
    assert sorted(p.name for p in killed.iterdir() if p.name.startswith(".")) == []


def test_killed_after_the_rename_is_finished(tmp_path: Path) -> None:
    printed = runs(
        tmp_path / "run",
        """
        # a kill right after the rename: the removal of the work folder never happens
        Work._remove_folder = lambda self: os.kill(os.getpid(), signal.SIGKILL)
        first = forked(0.0)
        print(code(first), (folder / "out").is_dir(), (folder / ".out.laconic").is_dir())
        before = (folder / "out/model.safetensors").stat().st_mtime_ns
        import importlib, laconic.journal
        importlib.reload(laconic.journal)
        Work = laconic.journal.Work
        print(code(forked(0.0)), before == (folder / "out/model.safetensors").stat().st_mtime_ns, (folder / ".out.laconic").is_dir())
        """,
    )
    assert printed.splitlines() == ["-9 True True", "0 True False"]


def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    printed = runs(
        tmp_path / "two",
        """
        first = forked(0.5)
        while not (folder / ".out.laconic/run.json").exists():
            time.sleep(0.01)
        second = forked(0.0)
        print(code(second), f"process {first}" in (folder / "error").read_text())
        os.kill(first, signal.SIGKILL)
        code(first)
        # the lock went with its holder
        print(code(forked(0.0)))
        """,
    )
    assert printed.split() == ["2", "True", "0"]


def test_lock_is_released_on_any_way_out(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), Work(tmp_path / "out", IDENTITY) as work:
        work.finish("a", {"x": 1}, parts())
        with pytest.raises(UserError, match=f"process {os.getpid()}"), Work(tmp_path / "out", IDENTITY):
            pass
        raise KeyboardInterrupt
    with Work(tmp_path / "out", IDENTITY) as work:
        assert work.resumed
        assert work.done("a") == {"x": 1}


def test_values_and_tensors_come_back_exactly(tmp_path: Path) -> None:
    values = {"damage": 0.1 + 0.2, "tiny": 5e-324, "many": [1 / 3, 1e300], "words": "ü"}
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int64, torch.bool, torch.float64]
    tensors = {f"t{i}": torch.arange(i + 1).to(kind) for i, kind in enumerate(kinds)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "strided": torch.arange(6.0).reshape(2, 3).T}
    with Work(tmp_path / "out", IDENTITY) as work:
        assert work.done("a") is None
        assert not work.resumed
        work.finish("a", values, tensors)
    with Work(tmp_path / "out", IDENTITY) as work:
        assert work.done("a") == values
        read = work.tensors("a")
        work.publish(ARTIFACT, ["a"])
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        for other in (read[name], written[name]):
            assert other.dtype == tensor.dtype
            assert other.shape == tensor.shape
            assert torch.equal(other, tensor)


def test_torn_and_damaged_lines(tmp_path: Path) -> None:
    said: list[str] = []
    with Work(tmp_path / "out", IDENTITY) as work:
        for key in "abc":
            work.finish(key, {"x": key})
    journal = tmp_path / ".out.laconic" / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole.replace(b'"x": "b"', b'"x": "d"')[:-5])
    with Work(tmp_path / "out", IDENTITY, log=said.append) as work:
        assert work.done("a") == {"x": "a"}
        assert work.done("b") is None
        assert work.done("c") is None
        assert len(said) == 1
        assert "line 2" in said[0]
        work.finish("c", {"x": "again"})
    with Work(tmp_path / "out", IDENTITY, log=said.append) as work:
        assert work.done("c") == {"x": "again"}


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damaged_part_is_named_and_not_done(tmp_path: Path, damage: str) -> None:
    said: list[str] = []
    with Work(tmp_path / "out", IDENTITY) as work:
        work.finish("a", {}, parts())
        work.finish("b", {}, {"other": torch.ones(3)})
    part = next((tmp_path / ".out.laconic" / "parts").glob("a-*.safetensors"))
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    if damage == "gone":
        part.unlink()
    else:
        part.write_bytes(data if damage == "flip" else data[:-4])
    with Work(tmp_path / "out", IDENTITY, log=said.append) as work:
        with pytest.raises(UserError, match="stage a is missing or damaged"):
            work.publish(ARTIFACT, ["a", "b"])
        assert work.done("a") is None
        assert work.done("b") == {}
        assert len(said) == 1
        assert part.name in said[0]
        work.finish("a", {}, parts())
        work.publish(ARTIFACT, ["a", "b"])
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {"w", "q", "other"}


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    with Work(tmp_path / "out", IDENTITY) as work:
        work.finish("a", {})
    other = {**IDENTITY, "seed": 1, "model": {"model.safetensors": "def"}}
    with pytest.raises(UserError, match=r'model\.model\.safetensors \("abc" before, "def" now\), seed \(0 before, 1 now\).*--overwrite'):
        Work(tmp_path / "out", other).__enter__()
    with Work(tmp_path / "out", IDENTITY, overwrite=True) as work:
        assert work.done("a") == {}
    with Work(tmp_path / "out", other, overwrite=True) as work:
        assert work.done("a") is None
        assert not work.resumed


def test_existing_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Work(out, IDENTITY) as work:
        work.finish("a", {}, parts())
        first = work.publish(ARTIFACT, ["a"])
    assert is_artifact(out)
    with pytest.raises(UserError, match="exists; choose another folder"):
        Work(out, IDENTITY).__enter__()
    with Work(out, IDENTITY, overwrite=True) as work:
        work.finish("b", {}, {"n": torch.ones(2)})
        assert set(load_file(out / "model.safetensors")) == {"w", "q"}
        second = work.publish(ARTIFACT, ["b"])
    assert set(load_file(out / "model.safetensors")) == {"n"}
    assert first != second
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not written by laconic"):
        Work(tmp_path / "mine", IDENTITY, overwrite=True).__enter__()
    assert not (tmp_path / ".mine.laconic").exists()


def test_old_result_comes_back_when_killed_between_the_renames(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Work(out, IDENTITY) as work:
        work.finish("a", {}, parts())
        work.publish(ARTIFACT, ["a"])
    with Work(out, IDENTITY, overwrite=True) as work:
        work.finish("a", {}, parts())
    out.rename(tmp_path / ".out.laconic" / "replaced")
    with Work(out, IDENTITY, overwrite=True) as work:
        assert work.resumed
        assert is_artifact(out)


def test_shards_and_two_steps(tmp_path: Path) -> None:
    extra = tmp_path / "tokenizer.json"
    extra.write_text("{}")
    with Work(tmp_path / "out", IDENTITY) as work:
        work.finish("a", {}, {f"t{i}": torch.full((5, 5), float(i)) for i in range(3)})
        work.finish("b", {}, {"t3": torch.ones(40)})
        hashes = work.assemble(ARTIFACT | {"tokenizer.json": extra}, ["b", "a"], shard_bytes=200)
        assert work.assembled.is_dir()
        assert not (tmp_path / "out").exists()
        final = work.publish({"certificate.json": json.dumps(hashes).encode()})
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 3 * 100 + 160
    assert len(set(index["weight_map"].values())) == 3
    assert set(final) == set(hashes) | {"certificate.json"} == {p.name for p in (tmp_path / "out").iterdir()}
    assert torch.equal(load_file(tmp_path / "out" / index["weight_map"]["t2"])["t2"], torch.full((5, 5), 2.0))


def test_discard(tmp_path: Path) -> None:
    with Work(tmp_path / "out", IDENTITY) as work:
        work.finish("a", {})
        work.discard()
    assert list(tmp_path.iterdir()) == []


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder with -o"):
        Work(tmp_path / "file" / "out", IDENTITY).__enter__()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill_with_lines(work: Work) -> int:
    """Journal lines until the disk is full; -> the number of the first that did not fit."""
    for i in range(1000):
        with contextlib.suppress(UserError):
            work.finish(f"line {i}", {"x": "y" * 100})
        if work.done(f"line {i}") is None:
            return i
    raise AssertionError("the disk never filled")


def test_full_disk(small_disk: Path) -> None:
    out = small_disk / "out"
    megabyte = torch.zeros(250_000)
    with Work(out, IDENTITY) as work:
        work.finish("a", {}, {"a": megabyte})
        work.finish("b", {}, {"b": megabyte})
        with pytest.raises(UserError, match=r"no space left .* free [\d,]+ bytes .*finished work is kept"):
            work.finish("c", {}, {"c": torch.zeros(1_000_000)})
        with pytest.raises(UserError, match="no space left"):
            work.publish(ARTIFACT, ["a", "b"])
    assert [p.name for p in small_disk.iterdir()] == [".out.laconic"]
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as f:
        while True:
            f.write(bytes(4096))
    with Work(out, IDENTITY) as work:
        assert work.done("a") == {}
        assert work.done("c") is None
        last = fill_with_lines(work)
        with pytest.raises(UserError, match="no space left"):
            work.finish("line", {"x": "y" * 100})
    with pytest.raises(UserError, match="no space left"):
        Work(small_disk / "second", IDENTITY).__enter__()
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    with Work(out, IDENTITY) as work:
        assert work.done("b") == {}
        assert work.done(f"line {last}") is None
        work.finish("c", {}, {"c": torch.zeros(1_000_000)})
        work.publish(ARTIFACT, ["a", "b", "c"])
    assert sorted(p.name for p in small_disk.iterdir()) == ["out"]


def test_publishing_needs_no_memory_for_the_weights(tmp_path: Path) -> None:
    printed = runs(
        tmp_path / "big",
        """
        import resource
        with Work(folder / "out", identity) as work:
            for i in range(12):
                work.finish(str(i), {}, {f"t{i}": torch.zeros(8_000_000, dtype=torch.uint8)})
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            work.publish({}, [str(i) for i in range(12)])
            print((folder / "out/model.safetensors").stat().st_size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """,
    )
    size, grown = map(int, printed.split())
    # grown is in kB: a chunk or two of 8 MB, of 96 MB that went through
    assert size > 96_000_000
    assert grown < 30_000
