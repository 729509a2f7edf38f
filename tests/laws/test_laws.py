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
from laconic.core.menu import Budget, Cost, Damage, Judge, Menu, Row, Search, cheapest, plan_of, total
from laconic.core.packed import Dense, Held, Product, Sum, Transposed, restore
from laconic.core.score import Across, Everywhere, NofM, PerRow, Score, Unit, keep_top
from laconic.core.site import Linear
from laconic.core.state import State
from laconic.core.statistic import Seen
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.search.allocate.uniform import Uniform
from laconic.recipe import paths

_spec = importlib.util.spec_from_file_location("laws_found", Path(__file__).with_name("found.py"))
found = importlib.util.module_from_spec(_spec)
sys.modules["laws_found"] = found
_spec.loader.exec_module(found)

TRANSFORMS = found.transforms()
NAMES = [f"{path}-{level}" for path, _, level in TRANSFORMS]
SCORES = [(path, found.instance(cls)) for path, cls in found.classes(Score)]
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
    site = found.site(12, 10)
    ids = "Lookups" in type(statistic).__name__
    x = torch.randint(0, 12, (64,)) if ids else rows(64, 10)
    grad = torch.randn(64, 10 if type(statistic).__name__ == "LookupFisher" else 12)
    reference = rows(64, 10, 5)
    mask = torch.rand(64) > 0.3

    def run(part: slice) -> object:
        return statistic.update(statistic.init(site), Seen(x=x[part], grad=grad[part], reference_x=reference[part], mask=mask[part]))

    whole = statistic.finish(run(slice(None)))
    halves = statistic.finish(statistic.merge(run(slice(0, 20)), run(slice(20, None))))
    # sums of terms of this size round by this much, however small an entry ends
    atol = 1e-6 * max(1.0, float(whole.abs().max()))
    torch.testing.assert_close(whole, halves, rtol=1e-5, atol=atol)
    # masked tokens never count
    poisoned = x.clone()
    poisoned[~mask] = 11 if ids else 1e6
    seen = Seen(x=poisoned, grad=torch.where(mask[:, None], grad, 1e6), reference_x=reference, mask=mask)
    torch.testing.assert_close(statistic.finish(statistic.update(statistic.init(site), seen)), whole, rtol=1e-5, atol=atol)
    assert torch.isfinite(statistic.finish(statistic.init(site))).all()


# ---- score


@pytest.mark.parametrize(("path", "score"), SCORES, ids=[p for p, _ in SCORES])
def test_score_permutes_with_rows_and_columns(path, score):
    w, x = weight(8, 10), rows(40, 10)
    site = found.site(8, 10)
    plain = score(Unit(site, w), found.stats_of(x, site))
    r, c = torch.randperm(8), torch.randperm(10)
    moved = score(Unit(site, w[r][:, c]), found.stats_of(x[:, c], site))
    torch.testing.assert_close(moved, plain[r][:, c], rtol=1e-4, atol=1e-6)
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
        # product = product with dense, rows = rows of dense
        x = torch.randn(7, m)
        torch.testing.assert_close(held.matmul(x), x @ dense.T, rtol=1e-4, atol=1e-4)
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
    expected = torch.nn.functional.linear(x, held.dense(), layer.bias)
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
    # every parameter gets a gradient
    (soft.dense() * torch.randn(12, 70)).sum().backward()
    for name, p in soft.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name
        with torch.no_grad():
            p.add_(torch.randn(p.shape) * 0.3)
    # wherever learning has led, what computes is what will be stored, in as many bytes
    packed = soft.harden()
    torch.testing.assert_close(soft.dense(), packed.dense(), rtol=0, atol=1e-6)
    assert packed.nbytes == held.nbytes
    assert not torch.equal(packed.dense(), held.dense())
    # of a weight that is stored the other way round, too
    turned = Transposed(held).soften(w.T)
    assert torch.equal(turned.dense(), begun.dense().T) and torch.equal(turned.harden().dense(), begun.dense().T)
    with pytest.raises(TypeError, match="harden"):
        soft.describe()


def test_algebra_of_forms():
    a, left, right = torch.randn(6, 10), torch.randn(2, 6), torch.randn(2, 10)
    form = Sum(Dense(a), Product(Dense(left), Dense(right)))
    torch.testing.assert_close(form.dense(), a + left.T @ right)
    torch.testing.assert_close(form.matmul(torch.eye(10)).T, form.dense(), rtol=1e-5, atol=1e-6)
    assert form.nbytes == 4 * (60 + 12 + 20)
    assert torch.equal(restore(form.describe(), form.tensors()).dense(), form.dense())


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


class Truth(Judge):
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


# ---- cards


@pytest.mark.parametrize("path", paths())
def test_every_method_has_a_card_and_a_real_sibling(path):
    module = importlib.import_module(f"laconic.methods.{path}")
    roles = [c for p, c in [pair for role in (*found.ROLES, State) for pair in found.classes(role)] if p == path]
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
