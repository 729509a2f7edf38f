"""The laws of each role, run over every method that is found in the tree."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from laconic.core.errors import UserError
from laconic.core.menu import Budget, Cost, Damage, Judges, Menu, Order, Row, Search, cheapest, plan_of, total
from laconic.core.packed import Dense, Held, Product, Scaled, Sum, Transposed, restore
from laconic.core.score import Across, Everywhere, NofM, PerRow, Score, Unit, keep_top
from laconic.core.site import Conv, Group, IndexMap, Linear, Member, Norm, Site, TensorId
from laconic.core.statistic import Gram, Seen
from laconic.core.transform import Cut
from laconic.kernels.grids import Grid
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.round.rtn import RTN
from laconic.methods.search.allocate.uniform import Uniform
from laconic.recipe import paths

_spec = importlib.util.spec_from_file_location("laws_found", Path(__file__).with_name("found.py"))
found = importlib.util.module_from_spec(_spec)
sys.modules["laws_found"] = found
_spec.loader.exec_module(found)

TRANSFORMS = found.transforms()
NAMES = [f"{path}-{level}" for path, _, level in TRANSFORMS]
SCORES = [(path, found.instance(cls)) for path, cls in found.classes(Score)]
CUTS = [(path, found.instance(cls)) for path, cls in found.classes(Cut)]
SEARCHES = [(path, found.instance(cls)) for path, cls in found.classes(Search)]


def rows(t: int, m: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(m, m, generator=g)
    x = torch.randn(t, m, generator=g) @ mix
    # a few loud channels, as transformers have them
    x[:, :: max(m // 3, 1)] *= 10
    return x


def weight(n: int, m: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed))


# ---- statistic


@pytest.mark.parametrize("statistic", found.STATISTICS, ids=lambda s: type(s).__name__)
def test_statistic_two_halves_are_one_pass(statistic):
    site = found.site(12, 10)._replace(context={"positions": 4})
    ids = "Lookups" in type(statistic).__name__
    x = torch.randint(0, 12, (64,)) if ids else rows(64, 10)
    grad = torch.randn(64, 10 if type(statistic).__name__ == "LookupFisher" else 12)
    reference = rows(64, 10, 5)
    mask = torch.rand(64) > 0.3

    def run(part: slice) -> object:
        # sequences of four tokens, which a pass does not split
        taken = x[part]
        seen = Seen(x=taken, grad=grad[part], reference_x=reference[part], mask=mask[part], sequences=len(taken) // 4)
        return statistic.update(statistic.init(site), seen)

    whole = statistic.finish(run(slice(None)))
    halves = statistic.finish(statistic.merge(run(slice(0, 20)), run(slice(20, None))))
    # sums of terms of this size round by this much, however small an entry ends
    atol = 1e-6 * max(1.0, float(whole.abs().max()))
    torch.testing.assert_close(whole, halves, rtol=1e-5, atol=atol)
    # masked tokens never count
    poisoned = x.clone()
    poisoned[~mask] = 11 if ids else 1e6
    seen = Seen(x=poisoned, grad=torch.where(mask[:, None], grad, 1e6), reference_x=reference, mask=mask, sequences=16)
    torch.testing.assert_close(statistic.finish(statistic.update(statistic.init(site), seen)), whole, rtol=1e-5, atol=atol)
    assert torch.isfinite(statistic.finish(statistic.init(site))).all()


@pytest.mark.parametrize("m", [Gram.wide, Gram.wide + 70])
def test_a_wide_gram_sums_one_half_and_gives_both(m):
    x, mask = rows(40, m), torch.rand(40, generator=torch.Generator().manual_seed(2)) > 0.3
    site = found.site(3, m)
    first, second = (Gram().update(Gram().init(site), Seen(x=x[part], mask=mask[part])) for part in (slice(0, 12), slice(12, None)))
    gram = Gram().finish(Gram().merge(first, second))
    kept = x[mask].double()
    torch.testing.assert_close(gram.double(), kept.T @ kept / len(kept), rtol=1e-5, atol=1e-6 * float(gram.abs().max()))
    assert torch.equal(gram[Gram.run :, : Gram.run], gram[: Gram.run, Gram.run :].T)


# ---- score


@pytest.mark.parametrize(("path", "score"), SCORES, ids=[p for p, _ in SCORES])
def test_score_permutes_with_rows_and_columns(path, score):
    w, x = weight(8, 10), rows(40, 10)
    site = found.site(8, 10)
    plain = score(Unit(site, w), found.stats_of(x, site))
    r, c = torch.randperm(8), torch.randperm(10)
    moved = score(Unit(site, w[r][:, c]), found.stats_of(x[:, c], site))
    # a number for each weight, or one for each example
    torch.testing.assert_close(moved, plain[r][:, c] if plain.dim() == 2 else plain[r], rtol=1e-4, atol=1e-6)
    assert keep_top(plain, 1.0, among=PerRow()).all()


@pytest.mark.parametrize("among", [Everywhere(), PerRow(), Across(0), Across(0, 2)], ids=str)
def test_keep_top_keeps_what_it_says(among):
    score = torch.rand(4, 10)
    assert keep_top(score, 1.0, among=among).all()
    assert int(keep_top(score, 0.5, among=among).sum()) == 20
    protect = torch.zeros(4, 10, dtype=torch.bool)
    protect[:, 0] = True
    assert keep_top(score, 0.5, among=among, protect=protect)[:, 0].all()
    if isinstance(among, Across):
        assert (keep_top(score, 0.3, among=among).sum(1) >= among.floor).all()


def test_keep_top_n_of_m_and_its_ragged_end():
    mask = keep_top(torch.tensor([[4.0, 3, 2, 1, 1, 2, 3, 4, 9, 1]]), 1.0, among=NofM(2, 4))
    assert mask.int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 1, 1, 0]]
    with pytest.raises(UserError, match="NaN"):
        keep_top(torch.tensor([float("nan")]), 1.0, among=Everywhere())


# ---- transform and what it holds


@pytest.mark.parametrize(("path", "transform", "level"), TRANSFORMS, ids=NAMES)
def test_transform_and_its_form(path, transform, level):
    for n, m in [(24, 64), (5, 37), (1, 130), (3, 1)]:
        site = found.site(n, m)
        w = weight(n, m)
        before = w.clone()
        change = transform(site, {"weight": w}, found.stats_of(rows(90, m), site), level)
        assert torch.equal(w, before), "a transform must not touch its input"
        (held,) = change.hold.values()
        dense = held.dense()
        assert dense.shape == w.shape
        assert torch.isfinite(dense).all()
        # bytes: stored = counted = named beforehand
        assert held.nbytes == sum(t.numel() * t.element_size() for t in held.state_dict().values()) == transform.stored(site, level)
        # product = product with dense, of inputs as the form takes them; rows = rows of dense
        x = torch.randn(7, m)
        torch.testing.assert_close(held.matmul(x), found.fed(held, x) @ dense.T, rtol=1e-4, atol=1e-4)
        # a scale may have been found beforehand, for inputs such as those that were shown
        shown = rows(90, m)
        assert float((found.fed(held, shown) - shown).norm()) <= 0.6 * float(shown.norm())
        torch.testing.assert_close(held.rows(slice(0, 1)), dense[:1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(held.rows(torch.tensor([n - 1, 0])), dense[[n - 1, 0]], rtol=1e-5, atol=1e-6)
        # exact round trip through what is stored
        again = restore(json.loads(json.dumps(held.describe())), held.tensors())
        assert torch.equal(again.dense(), dense)
        assert again.describe() == held.describe()
        # the same again
        second = transform(site, {"weight": w}, found.stats_of(rows(90, m), site), level)
        assert torch.equal(next(iter(second.hold.values())).dense(), dense)


@pytest.mark.parametrize(("path", "transform", "level"), TRANSFORMS, ids=NAMES)
def test_transform_never_gives_nan(path, transform, level):
    n, m = 6, 40
    site = found.site(n, m)
    cases = {
        "no tokens": (weight(n, m), torch.zeros(0, m)),
        "one token": (weight(n, m), rows(1, m)),
        "dead channels": (weight(n, m), rows(50, m) * (torch.arange(m) % 3 > 0)),
        "constant rows": (torch.ones(n, m) * torch.arange(n)[:, None], rows(50, m)),
        "zero weight": (torch.zeros(n, m), rows(50, m)),
        "beyond fp16": (weight(n, m) * 1e6, rows(50, m) * 1e6),
        "tiny": (weight(n, m) * 1e-20, rows(50, m) * 1e-8),
        "twice the same channel": (weight(n, m), rows(50, m)[:, torch.arange(m) // 2]),
    }
    for name, (w, x) in cases.items():
        change = transform(site, {"weight": w}, found.stats_of(x, site), level)
        (held,) = change.hold.values()
        assert torch.isfinite(held.dense()).all(), name


@pytest.mark.parametrize(("path", "transform"), list({p: t for p, t, _ in TRANSFORMS}.items()))
def test_transform_errs_less_where_it_may_store_more(path, transform):
    site, w = found.site(48, 128), weight(48, 128)
    stats = found.stats_of(rows(400, 128), site)
    gram = next(iter(stats.values()))
    errors = []
    for _, _, level in [entry for entry in TRANSFORMS if entry[0] == path]:
        delta = next(iter(transform(site, {"weight": w}, stats, level).hold.values())).dense() - w
        errors.append((transform.stored(site, level), float(((delta @ gram) * delta).sum())))
    errors.sort()
    if len(errors) > 1:
        assert errors[-1][1] < errors[0][1]


@pytest.mark.parametrize(
    ("path", "transform", "level"), TRANSFORMS[:: max(len(TRANSFORMS) // 12, 1)], ids=NAMES[:: max(len(TRANSFORMS) // 12, 1)]
)
def test_held_layers_compute_what_is_held(path, transform, level):
    if Linear not in transform.acts_on:
        pytest.skip("not for linears")
    layer = torch.nn.Linear(32, 8)
    site = found.site(8, 32)
    held = next(iter(transform(site, {"weight": layer.weight.detach()}, found.stats_of(rows(60, 32), site), level).hold.values()))
    thin = Held(held, like=layer, bias=layer.bias.detach())
    x = torch.randn(3, 5, 32)
    expected = torch.nn.functional.linear(found.fed(held, x), held.dense(), layer.bias)
    torch.testing.assert_close(thin(x), expected, rtol=1e-4, atol=1e-5)
    thin.thaw(torch.float32)
    torch.testing.assert_close(thin(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("path", "transform", "level"), TRANSFORMS, ids=NAMES)
def test_a_softened_form_begins_as_it_is_and_stores_what_it_computes(path, transform, level):
    site, w = found.site(12, 70), weight(12, 70)
    (held,) = transform(site, {"weight": w}, found.stats_of(rows(90, 70), site), level).hold.values()
    soft = held.soften(w)
    if soft is None:
        assert not any(isinstance(part, Grouped) for part in held.modules()), "codes of a grid can be learned"
        return
    begun = soft.harden()
    assert type(begun) is type(held)
    assert torch.equal(begun.dense(), held.dense())
    # every parameter gets a gradient, those of what becomes of inputs too
    x = rows(20, 70)
    ((soft.dense() * torch.randn(12, 70)).sum() + (found.fed(soft, x) * torch.randn(20, 70)).sum()).backward()
    for name, p in soft.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name
        with torch.no_grad():
            p.add_(torch.randn(p.shape) * 0.3)
    # wherever learning has led, what computes is what will be stored, in as many bytes
    packed = soft.harden()
    torch.testing.assert_close(soft.dense(), packed.dense(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.fed(soft, x), found.fed(packed, x), rtol=0, atol=1e-5)
    assert packed.nbytes == held.nbytes
    assert not torch.equal(packed.dense(), held.dense())
    # of a weight that is stored the other way round, too
    turned = Transposed(held).soften(w.T)
    assert torch.equal(turned.dense(), begun.dense().T) and torch.equal(turned.harden().dense(), begun.dense().T)
    with pytest.raises(TypeError, match="harden"):
        soft.describe()


@pytest.mark.parametrize(("path", "transform", "level"), TRANSFORMS, ids=NAMES)
def test_the_first_parts_of_a_form_are_a_form_of_the_same_tensors(path, transform, level):
    site, w = found.site(24, 64), weight(24, 64)
    (whole,) = transform(site, {"weight": w}, found.stats_of(rows(90, 64), site), level).hold.values()
    for held, dense in ((whole, w), (Transposed(whole), w.T)):
        sizes = []
        for count in range(1, held.parts + 1):
            first = held.first(count)
            assert first.parts == count and first.shape == held.shape and torch.isfinite(first.dense()).all()
            assert all(torch.equal(t, held.tensors()[key]) for key, t in first.tensors().items())
            assert torch.equal(restore(json.loads(json.dumps(first.describe())), held.tensors()).dense(), first.dense())
            sizes.append((first.nbytes, float((first.dense() - dense).norm())))
        assert sizes == sorted(sizes), "more parts, more bytes"
        assert sizes[-1][1] <= sizes[0][1], "and no more error"
        assert torch.equal(held.first(held.parts).dense(), held.dense()) and held.first(held.parts).nbytes == held.nbytes


# ---- lessons

LESSONS = found.lessons()
GRIDS = [
    Grid(8, None), Grid(4, 16), Grid(3, None), Grid(3, 16, symmetric=True), Grid(2, 7), Grid(1, None),
    Grid(2, 16, scales="log8"), Grid(2, 16, zeros="half"), Grid(3, 16, True, "log8", "half"),
    Grid(4, 16, symmetric=True, scales="e4m3"),
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("path", "lesson"), LESSONS, ids=[p for p, _ in LESSONS])
def test_a_lesson_begins_with_round_to_nearest_and_stores_as_many_bytes(path, lesson, grid):
    exceptions = importlib.import_module(f"laconic.methods.{path}").CARD.exceptions
    exact = "a soft form computes what it stores" not in exceptions
    one_sided = "weights of one sign teach every parameter" not in exceptions
    at_once = "every parameter learns at once" not in exceptions
    # every other weight lies half-way between two codes, where rounding goes to the even one
    tied = (torch.arange(12 * 36).reshape(12, 36) % 9).float() / 2
    cases = [(found.site(12, 36), weight(12, 36)), (found.conv_site(6, 4, 3), weight(6, 36)), (found.site(12, 36), tied)]
    cases += [(found.site(5, 37), torch.zeros(5, 37)), (found.site(5, 37), weight(5, 37) * 1e-20)]
    for site, w in cases:
        (held,) = RTN()(site, {"weight": w}, {}, grid).hold.values()
        soft = lesson.soften(held, w.reshape(site.shape))
        begun = soft.harden()
        assert type(begun) is type(held) and begun.describe() == held.describe()
        assert all(torch.equal(begun.tensors()[name], tensor) for name, tensor in held.tensors().items())
        turned = lesson.soften(Transposed(held), w.T).harden()
        assert torch.equal(turned.dense(), held.dense().reshape(site.matrix).T)
        summed = lesson.soften(Sum(held, Dense(w * 0.1)), (w * 1.1).reshape(site.shape))
        assert torch.equal(summed.harden().tensors()["terms.0.codes"], held.tensors()["codes"]) or w is not tied
        # every parameter that a rate names is there, and each gets a gradient
        (soft.dense() * torch.randn(site.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        parameters = dict(soft.named_parameters())
        assert {name.rpartition(".")[2] for name in parameters} <= {name for name, _ in lesson.rates}
        for name, p in parameters.items():
            assert p.grad is not None and torch.isfinite(p.grad).all(), name
            taught = bool(p.grad.abs().sum() > 0)
            assert w.abs().max() < 1e-10 or taught or (w is tied and not one_sided) or not at_once, name
            with torch.no_grad():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.5)
        packed = soft.harden()
        assert torch.isfinite(packed.dense()).all() and torch.isfinite(soft.dense()).all()
        assert packed.nbytes == held.nbytes
        if exact:
            torch.testing.assert_close(soft.dense(), packed.dense(), rtol=1e-6, atol=1e-6)
        # a penalty is a number at every stage, zero or more
        for done in (0.0, 0.3, 1.0):
            penalty = soft.penalty(done)
            assert penalty is None or (penalty.shape == () and float(penalty.detach()) >= 0)


def test_algebra_of_forms():
    a, left, right = torch.randn(6, 10), torch.randn(2, 6), torch.randn(2, 10)
    form = Sum(Dense(a), Product(Dense(left), Dense(right)))
    torch.testing.assert_close(form.dense(), a + left.T @ right)
    torch.testing.assert_close(form.matmul(torch.eye(10)).T, form.dense(), rtol=1e-5, atol=1e-6)
    assert form.nbytes == 4 * (60 + 12 + 20)
    assert torch.equal(restore(form.describe(), form.tensors()).dense(), form.dense())
    assert (form.parts, form.first(1).nbytes) == (2, 240) and torch.equal(form.first(1).dense(), a)
    scaled = Scaled(form, torch.arange(1.0, 11))
    assert torch.equal(scaled.dense(), form.dense() * torch.arange(1.0, 11))
    assert torch.equal(scaled.rows(torch.tensor([3])), scaled.dense()[[3]])
    assert scaled.nbytes == form.nbytes + 40 and scaled.first(1).nbytes == 240 + 40


# ---- cut


def coupled(width: int, table: tuple[tuple[int, ...], ...]) -> Group:
    """Two writers, one a convolution, a norm, and a reader that has two or more columns for each channel, in an order of its own."""

    def site(name, kind, shape):
        return Site(name, kind, {"weight": TensorId(f"{name}.weight")}, shape)

    plain = IndexMap(width)
    columns = sum(len(entry) for entry in table)
    return Group(
        width,
        (
            Member(site("linear", Linear(), (width, 6)), 0, plain),
            Member(site("conv", Conv(), (width, 2, 3, 3)), 0, plain),
            Member(site("norm", Norm(), (width,)), 0, plain),
            Member(site("reader", Linear(), (5, columns)), 1, IndexMap(columns, table=table)),
        ),
    )


def of_group(group: Group, seed: int = 3) -> tuple[dict, dict]:
    weights, stats = {}, {}
    for i, member in enumerate(m for m in group.members if len(m.site.shape) > 1):
        weights[member.site.name] = torch.randn(member.site.shape, generator=torch.Generator().manual_seed(seed + i))
        stats[member.site.name] = found.stats_of(rows(80, member.site.matrix[1], seed + i), member.site)
    return weights, stats


TABLE = ((0, 4), (2, 1, 7), (3,), (5, 6))


@pytest.mark.parametrize(("path", "cut"), CUTS, ids=[p for p, _ in CUTS])
def test_a_cut_that_keeps_all_changes_nothing_and_permutes_with_channels(path, cut):
    group = coupled(4, TABLE)
    weights, stats = of_group(group)
    before = {name: w.clone() for name, w in weights.items()}
    worth = cut.worth(group, weights, stats)
    assert worth.shape == (4,) and torch.isfinite(worth).all()
    order = [2, 0, 3, 1]
    moved = coupled(4, tuple(TABLE[i] for i in order))
    other = {name: w if name == "reader" else w[order] for name, w in weights.items()}
    torch.testing.assert_close(cut.worth(moved, other, stats), worth[order], rtol=1e-4, atol=1e-6)
    whole = cut(group, weights, stats, (0, 1, 2, 3))
    assert whole.cut == ((group, (0, 1, 2, 3)),)
    assert all(torch.equal(new, before["reader"]) for new in whole.fold.values())
    change = cut(group, weights, stats, (0, 3))
    ((name, new),) = change.fold.items()
    assert name.name == "reader.weight"
    assert not new[:, [1, 2, 3, 7]].any() and new[:, [0, 4, 5, 6]].any()
    assert all(torch.equal(weights[n], before[n]) for n in weights), "a cut must not touch its input"


@pytest.mark.parametrize(("path", "cut"), CUTS, ids=[p for p, _ in CUTS])
@pytest.mark.parametrize("case", ["no tokens", "one token", "dead channels", "twice the same channel", "zero weight", "huge"])
def test_a_cut_never_gives_nan(path, cut, case):
    group = coupled(4, TABLE)
    weights, stats = of_group(group)
    site = group.members[-1].site
    x = rows(80, 8)
    x = {
        "no tokens": x[:0],
        "one token": x[:1],
        "dead channels": x * (torch.arange(8) % 3 > 0),
        "twice the same channel": x[:, torch.arange(8) // 2],
        "huge": x * 1e6,
    }.get(case, x)
    stats["reader"] = found.stats_of(x, site)
    if case == "zero weight":
        weights = {name: torch.zeros_like(w) for name, w in weights.items()}
    assert torch.isfinite(cut.worth(group, weights, stats)).all()
    for kept in ((0,), (1, 2), (0, 1, 2)):
        for new in cut(group, weights, stats, kept).fold.values():
            assert torch.isfinite(new).all()


# ---- search


def menu(seed: int, sites: int = 7, choices: int = 6) -> Menu:
    g = torch.Generator().manual_seed(seed)
    made = []
    for s in range(sites):
        size = int(torch.randint(100, 900, (1,), generator=g))
        hurt = float(torch.rand(1, generator=g)) * 10
        for c in range(choices):
            noise = 0.7 + 0.6 * float(torch.rand(1, generator=g))
            damage = Damage(hurt * 4.0**-c * noise, "nats/token", "here")
            made.append(Row(frozenset({f"t{s}"}), "m", {"bits": c + 2}, Cost(size * (c + 2)), damage, f"s{s}"))
    return Menu(tuple(made), fixed=123)


class Truth(Judges):
    """What plans of a menu really lose: other damages than the menu predicts, with pairs that hurt together, seen through noise that
    fewer rows leave larger. Keeps what it was asked."""

    rows = 12

    def __init__(self, seed: int) -> None:
        self.seed, self.asked = seed, []

    def __call__(self, plans, part=None):
        part = list(range(self.rows)) if part is None else list(part)
        assert part and sorted(set(part)) == part and part[-1] < self.rows, "rows of the search data, each once"
        assert plans
        self.asked.append((list(plans), part))
        return [Damage(sum(self.seen(plan, row) for row in part) / len(part), "nats/token", "the output") for plan in plans]

    def by(self, objective):
        # another measure asks other things of the same plans
        other = Truth(self.seed + 500)
        other.asked = self.asked
        return other

    def seen(self, plan, row):
        levels = {r.site: r.level["bits"] for r in plan.rows}
        of = torch.Generator().manual_seed(self.seed + 1000)
        own = {site: float(torch.rand(1, generator=of)) * 8 for site in sorted(levels)}
        value = sum(hurt * 3.0 ** -levels[site] for site, hurt in own.items())
        value += sum(2.0 ** -(levels[f"s{i}"] + levels[f"s{i + 1}"]) for i in range(0, len(levels) - 1, 2))
        noise = torch.rand(1, generator=torch.Generator().manual_seed(hash((row, *levels.values())) % 2**31))
        return value * (0.8 + 0.4 * float(noise))


def judge_of(search, seed):
    return Truth(seed) if search.asks() is not None else None


@pytest.mark.parametrize(("path", "search"), SEARCHES, ids=[p for p, _ in SEARCHES])
@pytest.mark.parametrize("seed", range(4))
def test_search_covers_exactly_within_budget(path, search, seed):
    m = menu(seed)
    least = cheapest(m)
    for factor in (1.0, 1.2, 1.7, 2.5, 10.0):
        budget = Budget(bytes=round(least * factor))
        judge = judge_of(search, seed)
        plan = search(m, budget, judge=judge, rng=torch.Generator(), log=lambda _: None)
        assert plan.bytes <= budget.bytes
        # and every plan that was looked at is a whole one
        for one in [plan, *(p for plans, _ in (judge.asked if judge else ()) for p in plans)]:
            assert one == plan_of(m, one.rows)
            assert sorted(name for row in one.rows for name in row.covers) == sorted(m.tensors())
    with pytest.raises(UserError, match=f"{least:,}"):
        search(m, Budget(bytes=least - 1), judge=judge_of(search, seed), rng=torch.Generator(), log=lambda _: None)


JUDGED = [(path, search) for path, search in SEARCHES if search.asks() is not None]


@pytest.mark.parametrize(("path", "search"), JUDGED, ids=[p for p, _ in JUDGED])
def test_a_search_that_measures_is_never_worse_than_uniform_and_gives_the_same_again(path, search):
    for seed in range(3):
        m = menu(seed)
        budget = Budget(bytes=round(cheapest(m) * 1.7))
        uniform = Uniform()(m, budget, judge=None, rng=torch.Generator(), log=lambda _: None)
        runs = []
        for _ in range(2):
            judge = Truth(seed)
            runs.append((search(m, budget, judge=judge, rng=torch.Generator().manual_seed(5), log=lambda _: None), judge.asked))
        assert runs[0] == runs[1]
        ours, theirs = Truth(seed)([runs[0][0], uniform])
        assert ours.value <= theirs.value


def test_unlike_damages_are_not_added():
    a, b = menu(0).rows[:2]
    with pytest.raises(ValueError, match="cannot be added"):
        total([a, b._replace(damage=Damage(1.0, "nats/token", "at the layer"))])


# ---- order


@pytest.mark.parametrize(
    ("path", "order"), [(p, found.instance(c)) for p, c in found.classes(Order)], ids=[p for p, _ in found.classes(Order)]
)
@pytest.mark.parametrize("seed", range(3))
def test_an_order_names_every_part_once_and_asks_for_what_is_there(path, order, seed):
    g = torch.Generator().manual_seed(seed)
    parts = {f"t{i}": tuple(torch.randint(1, 99, (int(torch.randint(1, 6, (1,), generator=g)),), generator=g).tolist()) for i in range(7)}

    def trial(counts, names):
        assert counts.keys() == parts.keys() and set(names) <= parts.keys()
        assert all(1 <= counts[name] <= len(sizes) for name, sizes in parts.items())
        assert all(counts[name] < len(parts[name]) for name in names)
        return [Damage(hash((name, counts[name], seed)) % 97 / 97, "nats/token", "here") for name in names]

    once = list(order(parts, trial))
    assert {name: once.count(name) + 1 for name in parts} == {name: len(sizes) for name, sizes in parts.items()}
    assert list(order(parts, trial)) == once


# ---- cards


@pytest.mark.parametrize("path", paths())
def test_every_method_has_a_card_and_a_real_sibling(path):
    module = importlib.import_module(f"laconic.methods.{path}")
    roles = [c for p, c in [pair for role in found.ROLES for pair in found.classes(role)] if p == path]
    if not roles:
        assert "form" in Path(module.__file__).read_text(), "a file without a role holds a form"
        return
    card = module.CARD
    assert card.sibling in paths()
    assert card.sibling != path
    assert card.paper.year > 1980
    source = ast.parse(Path(module.__file__).read_text())
    assert ast.get_docstring(source)
    assert len(card.exceptions) == 0 or all(card.exceptions.values())
    assert all(cls.__doc__ for cls in roles)


@pytest.mark.parametrize(("path", "transform"), list({p: t for p, t, _ in TRANSFORMS}.items()))
def test_several_levels_at_once_are_the_same_as_one_by_one(path, transform):
    site, w = found.site(12, 70), weight(12, 70)
    stats = found.stats_of(rows(300, 70), site)
    levels = [level for p, _, level in TRANSFORMS if p == path]
    for level, change in zip(levels, transform.several(site, {"weight": w}, stats, levels), strict=True):
        (together,), (alone,) = change.hold.values(), transform(site, {"weight": w}, stats, level).hold.values()
        assert all(torch.equal(a, b) for a, b in zip(together.tensors().values(), alone.tensors().values(), strict=True)), level
