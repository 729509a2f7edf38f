"""A file of vectors made shorter under a floor for recall: an embedding whose first numbers are an embedding, cut when it is loaded.

The vectors are turned by one square matrix that a lesson learns, so that near things stay near with their first numbers alone. What is
written (`model.safetensors`): `columns` (m, n) in fp16, one number of all vectors after another, and `projection` (m, d), which does the
same to vectors that come later; the first rows of both are a shorter embedding, and no other byte of them is read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.budget import Floor, vector_budget
from laconic.core.errors import BrokenPromise, UserError
from laconic.core.packed import Joined
from laconic.core.transform import Lesson
from laconic.job import versions
from laconic.journal import Work, sha256_of
from laconic.kernels.divergence import bootstrap_mean
from laconic.kernels.retrieval import funnel, nearest, overlap
from laconic.models import header, read_stored
from laconic.recipe import Recipe, Vectors, build
from laconic.tuning import tune

SUFFIXES = (".npy", ".npz", ".safetensors")
FILE, ABOUT = "model.safetensors", "laconic.json"
# held-out vectors whose neighbours are looked for
QUERIES = 1000
# the shortest embedding that learns by default
LEAST = 8

Progress = Callable[[str, int, int, str], None]


# ---- files


def is_file(spec: Any) -> bool:
    """Whether a spec names a file of vectors."""
    return isinstance(spec, (str, Path)) and Path(spec).suffix in SUFFIXES and not Path(spec).is_dir()


def is_result(path: Any) -> bool:
    """Whether a folder holds vectors that laconic made shorter."""
    if not isinstance(path, (str, Path)) or not (file := Path(path).expanduser() / ABOUT).is_file():
        return False
    try:
        return "vectors" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def opened(path: str | Path) -> Tensor:
    """(n, d) fp32, each of length 1. Of several arrays in a file, the one that is named `vectors`. UserError for anything else."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"no such file of vectors: {file}; give a .npy, .npz or .safetensors file")
    try:
        arrays = _arrays(file)
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise UserError(
            f"{file} cannot be read ({str(error).splitlines()[0]}); give an undamaged .npy, .npz or .safetensors file"
        ) from None
    tables = {name: value for name, value in arrays.items() if value.dim() == 2 and value.is_floating_point()}
    found = tables.get("vectors", next(iter(tables.values())) if len(tables) == 1 else None)
    if found is None:
        raise UserError(f"{file} holds {len(tables)} tables of numbers ({', '.join(tables) or 'none'}); name the right one `vectors`")
    found = found.float()
    if not bool(torch.isfinite(found).all()):
        raise UserError(f"{file} holds numbers that are not finite; take these vectors out")
    return F.normalize(found, dim=1)


def _arrays(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return {name: read_stored(file.parent, info) for name, info in header(file).items()}
    import numpy as np

    loaded = np.load(file, allow_pickle=False)
    named = {"vectors": loaded} if file.suffix == ".npy" else {name: loaded[name] for name in loaded.files}
    return {name: torch.from_numpy(value) for name, value in named.items() if value.dtype.kind == "f"}


# ---- what is learned


def halves(width: int, least: int = LEAST) -> tuple[int, ...]:
    """Nested sizes: the width, its half, and so on down to `least`."""
    found = [width]
    while found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return tuple(reversed(found))


def rotation(vectors: Tensor) -> Tensor:
    """(n, d) -> (d, d), the directions of most energy first: with it, a prefix is the truncation of an SVD (PCA without a mean)."""
    _, directions = torch.linalg.eigh(vectors.double().T @ vectors.double())
    return directions.flip(1).T.float().contiguous()


def learned(vectors: Tensor, start: Tensor, sizes: Sequence[int], lesson: Lesson, *, seed: int, progress: Progress) -> Tensor:
    """The square matrix after its lesson, (d, d): vectors (n, d) in batches, each to be met by what its prefixes say."""
    steps = [b - a for a, b in zip((0, *sizes[:-1]), sizes, strict=True)]
    form = Joined.of(start, steps, 0)
    if (soft := lesson.soften(form, start)) is None:
        raise UserError(f"{type(lesson).__name__} learns no matrix of numbers; take nest.vector.mrl")
    generator = torch.Generator().manual_seed(seed)
    passes = -(-lesson.steps * lesson.batch // len(vectors))
    order = torch.cat([torch.randperm(len(vectors), generator=generator) for _ in range(passes)])
    batches = [vectors[rows] for rows in order[: lesson.steps * lesson.batch].split(lesson.batch)]
    tune(
        lambda i, weights: batches[i] @ weights["projection"].T, batches, {"projection": soft}, lesson, generator=generator,
        progress=lambda done, total: progress("learning", done, total, "an embedding whose first numbers are one"),
    )  # fmt: skip
    return soft.harden().dense()


# ---- what is found again


class Part(NamedTuple):
    """Rows of the table: to learn from, and queries for search and certify."""

    learn: Tensor
    search: Tensor
    certify: Tensor


def parted(count: int, seed: int) -> Part:
    """Half of the rows learn, a quarter each are queries, QUERIES of them at most; all of the table is searched."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    half, third = count // 2, count // 2 + count // 4
    return Part(order[:half], order[half:third][:QUERIES], order[third:][:QUERIES])


class Curve:
    """Recall at k of a turned table by how many numbers are kept, on some of its rows as queries; each size is measured once."""

    def __init__(self, table: Tensor, turned: Tensor, queries: Tensor, k: int) -> None:
        self.turned, self.queries, self.k = turned, queries, k
        self.wanted = nearest(table[queries], table, k, queries)
        self.known: dict[int, Tensor] = {}

    def at(self, size: int) -> Tensor:
        """(q,) recall of each query with the first `size` numbers."""
        if size not in self.known:
            short = self.turned[:, :size]
            self.known[size] = overlap(nearest(short[self.queries], short, self.k, self.queries), self.wanted)
        return self.known[size]

    def ends(self, size: int, seed: int) -> tuple[float, float, float]:
        """Mean, and the ends of its 95 % interval by bootstrap over queries."""
        low, high = bootstrap_mean(self.at(size), seed=seed)
        return float(self.at(size).mean()), low, high

    def least(self, floor: float, seed: int) -> int:
        """The fewest numbers whose recall is at or above the floor with its whole interval, by halving; all of them where none is."""
        low, high = 1, self.turned.shape[1]
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.ends(middle, seed)[1] >= floor else (middle + 1, high)
        return low


def stored(matrix: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(projection (m, d), vectors (m, n)) as they are stored."""
    return matrix.half(), (vectors @ matrix.half().float().T).T.contiguous().half()


# ---- the job


def compress(
    path: str | Path,
    *,
    budget: Sequence[str],
    recipe: Recipe,
    out: Path,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress,
    log: Callable[[str], None],
    command: str,
) -> dict[str, Any]:
    """Writes the shortest embedding within the budget and returns its certificate. Raises UserError (nothing is left half-written), or
    BrokenPromise where held-out queries find less than the floor beyond doubt (the work stays)."""
    assert recipe.vectors is not None
    started, asks = time.monotonic(), recipe.vectors
    table = opened(path)
    (n, d), k = table.shape, asks.k
    bound = vector_budget(budget, 2 * n * d)
    if n < 4 * (k + 1):
        raise UserError(
            f"{path} holds {n} vectors, too few to measure recall at {k}; give {4 * (k + 1)} or more, or a recipe of a smaller k"
        )
    most = most_of(bound, n, d)
    sizes = asks.sizes or halves(d)
    if list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] > d:
        raise UserError(f"recipe {recipe.name}: sizes {list(sizes)} do not rise from 1 to at most the vectors' {d} numbers; correct them")
    sizes = sizes if sizes[-1] == d else (*sizes, d)
    identity = {
        "vectors": sha256_of(Path(path).expanduser()), "recipe": recipe.resolved(), "budget": list(budget), "seed": seed,
        "threads": torch.get_num_threads(), "versions": versions(),
    }  # fmt: skip
    with Work(out, identity, overwrite=overwrite, log=log) as work:
        try:
            value = _made(table, asks, sizes, bound, most, seed, work, progress, log)
        except UserError:
            work.discard()
            raise
        about = {"format": 1, "vectors": {"dims": value["dims"], "count": n, "width": d, "k": k}}
        hashes = work.assemble(
            {ABOUT: _json(about), "recipe.yaml": yaml.safe_dump(recipe.resolved(), sort_keys=False).encode()}, ["vectors"]
        )
        written = load(work.assembled)
        tensors = work.tensors("vectors")
        if not all(torch.equal(getattr(written, name), tensors[name]) for name in ("projection", "columns")):
            raise BrokenPromise(f"what was written differs from what was made; {work.assembled} is kept")
        progress("measuring", 0, 1, "held-out queries")
        quality = _quality(table, written, parted(n, seed).certify, k, sizes, seed)
        if bound.recall is not None and quality["recall_high"] < bound.recall:
            raise BrokenPromise(
                f"held-out queries find {quality['recall']:.4f} of their neighbours (at most {quality['recall_high']:.4f}) where recall="
                f"{bound.recall:g} was asked for; {work.assembled} is kept"
            )
        certificate = {
            "format": 1,
            "model": {"spec": str(path), "count": n, "width": d, "hashes": {Path(path).name: identity["vectors"]}},
            "budget": {"words": list(budget)},
            "recipe": recipe.resolved(),
            "seed": seed,
            "dims": value["dims"],
            "made_by": value["made_by"],
            "bytes": written.nbytes,
            "bytes_original": 2 * n * d,
            "quality": quality,
            "files": dict(sorted(hashes.items())),
            "reload": {"ok": True, "difference": 0.0},
            "notes": value["notes"],
            "replay": command,
            "versions": versions(),
        }
        measurements = {"seconds": {"total": round(time.monotonic() - started, 3)}}
        work.publish({"certificate.json": _json(certificate), "measurements.json": _json(measurements)})
    return certificate | {"measurements": measurements}


def most_of(bound: Floor, count: int, width: int) -> int:
    """How many numbers of each vector the budget has room for. UserError where it has none."""
    most = width
    if bound.bytes is not None:
        each = 2 * (count + width)
        if (most := min(width, bound.bytes // each)) < 1:
            raise UserError(f"the budget of {bound.bytes:,} bytes is below one number of each vector: the least is {each:,} bytes")
    if bound.dims is not None:
        if bound.dims > width:
            raise UserError(f"dims={bound.dims} is more than the vectors' {width} numbers; ask for {width} or fewer")
        most = min(most, bound.dims)
    return most


def _made(
    table: Tensor, asks: Vectors, sizes: tuple[int, ...], bound: Floor, most: int, seed: int, work: Work, progress: Progress,
    log: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """The stage `vectors`: the lesson's matrix or the rotation that it began with, whichever is shorter (or better) on search queries."""
    if (done := work.done("vectors")) is not None:
        return done
    rows = parted(len(table), seed)
    if work.done("learned") is None:
        start = rotation(table[rows.learn])
        matrix = learned(table[rows.learn], start, sizes, build(asks.lesson), seed=seed, progress=progress)
        work.finish("learned", {}, {"rotation": start, "learned": matrix})
    matrices = work.tensors("learned")
    found: dict[str, tuple[int, float]] = {}
    for name in ("learned", "rotation"):
        progress("searching", 0, 1, f"{name}: recall by size")
        curve = Curve(table, stored(matrices[name], table)[1].T.float(), rows.search, asks.k)
        dims = most if bound.recall is None else curve.least(bound.recall, seed)
        mean, low, _ = curve.ends(min(dims, most), seed)
        if bound.recall is not None and (dims > most or low < bound.recall):
            # what there is room for falls short of the floor
            dims = table.shape[1] + 1
        found[name] = dims, -mean
    name = min(found, key=found.__getitem__)
    dims, lost = found[name]
    if dims > table.shape[1]:
        raise UserError(
            f"recall={bound.recall:g} is not reached with {most} of {table.shape[1]} numbers (at best {-lost:.4f} on the search queries); "
            "ask for less recall or for more room"
        )
    notes = [] if name == "learned" else ["what was learned did no better on the search queries than the rotation it began with"]
    for note in notes:
        log(note)
    projection, columns = stored(matrices[name][:dims], table)
    value = {"dims": dims, "made_by": name, "notes": notes}
    work.finish("vectors", value, {"projection": projection, "columns": columns})
    return value


def _quality(table: Tensor, made: ShortVectors, queries: Tensor, k: int, sizes: Sequence[int], seed: int) -> dict[str, Any]:
    """Recall at k on queries, and at smaller sizes."""
    curve = Curve(table, made.columns.T.float(), queries, k)
    mean, low, high = curve.ends(made.dims, seed)
    entry = {"unit": "share", "n": len(queries), "low": low, "high": high, "interval": "95 % bootstrap over queries"}
    below = []
    for size in sorted({*(size for size in sizes if size < made.dims), made.dims}):
        one = curve.ends(size, seed)
        below.append({"dims": size, "bytes": 2 * size * (len(table) + table.shape[1]), "recall": one[0], "low": one[1], "high": one[2]})
    return {"recall": mean, "recall_low": low, "recall_high": high, "k": k, "sizes": below, "details": {"recall": entry}}


def measure(path: str | Path, against: str | Path | None, budget: Sequence[str]) -> dict[str, Any]:
    """Recall of a result, or of some of its numbers, on the certificate's held-out queries; flat keys."""
    certificate = _certificate(path)
    spec = against or certificate["model"]["spec"]
    table = opened(spec)
    if sha256_of(Path(spec).expanduser()) not in certificate["model"]["hashes"].values():
        raise UserError(f"{spec} is not the file of the certificate (its hash differs); name that one with --against")
    made = load(path, budget)
    found = _quality(table, made, parted(len(table), certificate["seed"]).certify, certificate["quality"]["k"], (), certificate["seed"])
    found.pop("sizes")
    return {"dims": made.dims, "bytes": made.nbytes, "bytes_original": certificate["bytes_original"], **found}


# ---- what a user loads


class ShortVectors(nn.Module):
    """Vectors with their first numbers only. Called with vectors (b, d) of the kind it was made from, it gives them as short, of length 1;
    `search` looks for the nearest of those it holds. columns (m, n) and projection (m, d), in fp16."""

    projection: Tensor
    columns: Tensor

    def __init__(self, projection: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.register_buffer("projection", projection)
        self.register_buffer("columns", columns)

    @property
    def dims(self) -> int:
        """How many numbers a vector has."""
        return self.columns.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of both tables."""
        return 2 * (self.columns.numel() + self.projection.numel())

    @property
    def vectors(self) -> Tensor:
        """(n, m), of length 1."""
        return F.normalize(self.columns.T.float(), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(F.normalize(x.float(), dim=-1) @ self.projection.float().T, dim=-1)

    def search(self, x: Tensor, k: int = 10, *, first: int | None = None, shortlist: int = 200) -> Tensor:
        """x (b, d) -> (b, k) indices of the nearest, best first. first: so many numbers make a shortlist, which all of them rank anew
        (funnel retrieval); None: all of them at once."""
        if first is not None and not 1 <= first <= self.dims:
            raise UserError(f"first={first}: these vectors have {self.dims} numbers; ask for 1 to {self.dims}")
        k = min(k, self.columns.shape[1])
        sizes, keep = ([self.dims], [k]) if first is None else ([first, self.dims], [max(k, shortlist), k])
        return funnel(F.normalize(x.float(), dim=-1) @ self.projection.float().T, self.columns.T, sizes, keep)


def load(path: str | Path, budget: Sequence[str] = ()) -> ShortVectors:
    """A result, or the first numbers of it that a budget asks for: dims=64, size=10% of the given vectors, or recall=0.9, the fewest of the
    certificate's sizes that reached it. Only the bytes of these are read."""
    folder = Path(path).expanduser()
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["vectors"]
    infos = header(folder / FILE)
    have, dims = infos["columns"].shape[0], infos["columns"].shape[0]
    if budget:
        bound = vector_budget(budget, 2 * about["count"] * about["width"])
        dims = most_of(bound._replace(dims=None if bound.dims is None else min(bound.dims, about["width"])), about["count"], about["width"])
        if bound.dims is not None and bound.dims > have:
            raise UserError(f"{path} holds {have} numbers of each vector, not {bound.dims}; ask for {have} or fewer, or compress again")
        dims = min(dims, have)
        if bound.recall is not None:
            reached = [one["dims"] for one in _certificate(folder)["quality"]["sizes"] if one["recall"] >= bound.recall]
            if not reached or min(reached) > dims:
                best = _certificate(folder)["quality"]["recall"]
                raise UserError(
                    f"{path} reaches no recall of {bound.recall:g} in this budget (whole: {best:.4f}); ask for less, or compress again"
                )
            dims = min(reached)
    return ShortVectors(**{name: read_stored(folder, infos[name], slice(dims)) for name in ("projection", "columns")}).eval()


def _certificate(path: str | Path) -> dict[str, Any]:
    try:
        return dict(json.loads((Path(path).expanduser() / "certificate.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} has no certificate that can be read ({error}); compress the vectors again") from None


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
