"""What any module is made of, by running it: for modules that have no row in laconic.architectures.

Sites are modules in order of their first execution; what falls together is found by marking channels and watching where they arrive."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from laconic.core.errors import UserError
from laconic.core.site import (
    Anatomy,
    Conv,
    Edge,
    Embedding,
    Fold,
    Group,
    IndexMap,
    Kind,
    Linear,
    Map,
    Member,
    Norm,
    Segment,
    Site,
    Stage,
    TensorId,
)

SITES: Mapping[type[nn.Module], Kind] = {nn.Linear: Linear(), nn.Conv1d: Conv(), nn.Conv2d: Conv(), nn.Embedding: Embedding()}
# modules whose stored tensors have one entry for each channel, and the axis of the channels in their input
CHANNELWISE: Mapping[type[nn.Module], int] = {
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 1,
    nn.BatchNorm3d: 1,
    nn.GroupNorm: 1,
    nn.InstanceNorm1d: 1,
    nn.InstanceNorm2d: 1,
    nn.PReLU: 1,
    nn.LayerNorm: -1,
    nn.RMSNorm: -1,
}
# how many channels are marked in one run, one for each item of a batch
LANES = 16


def stored_names(module: nn.Module) -> dict[str, str]:
    """Every name of the state dict -> the name it is stored under: the first of those that share one tensor."""
    first: dict[tuple[int, ...], str] = {}
    names: dict[str, str] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            key = (value.data_ptr(), *value.shape, *value.stride()) if value.numel() and not value.is_meta else (-1, id(value))
            names[name] = first.setdefault(key, name)
    return names


@dataclass(frozen=True)
class TracedAnatomy(Anatomy):
    """Sites of one module in order of first execution. `coupled` marks channels and watches where they arrive, through the module's own
    forward, so shortcuts, padding, flattening and concatenation need no rules. `names`: state dict name -> stored name. `layers`: those of
    all stacks in order of execution, each with its Segment.gives; `positions`: hidden states of one sample in the longest stack."""

    module: nn.Module
    example: tuple[Any, ...]
    names: Mapping[str, str]
    found: tuple[Site, ...]
    stages: tuple[Stage, ...] = ()
    layers: Mapping[str, int] = field(default_factory=dict)
    positions: int = 1
    folds: tuple[Fold, ...] = ()

    def segments(self) -> tuple[Segment, ...]:
        every = tuple(dict.fromkeys(self.names.values()))
        of = {self.names[name]: layer for layer in self.layers for name in self.names if name.startswith(f"{layer}.")}
        segments = []
        for layer in (*self.layers, ""):
            stages = tuple(stage for stage in self.stages if of.get(stage.sites[0].tensors["weight"].name, "") == layer)
            segments.append(Segment(layer, stages, tuple(n for n in every if of.get(n, "") == layer), self.layers.get(layer, 0)))
        return tuple(segments)

    def uncovered(self) -> tuple[str, ...]:
        """Stored tensors that are no site's weight: norms, biases, running statistics, and weights of unknown modules."""
        covered = {site.tensors["weight"].name for site in self.found}
        return tuple(name for name in dict.fromkeys(self.names.values()) if name not in covered)

    def edges(self) -> Iterator[Edge]:
        """Norms whose output only linear sites read, which may take the norm's scale in. What else is exact depends on operators, which a
        trace does not know."""
        for fold in self.folds:
            width = fold.norm.shape[0]
            yield Edge(f"{fold.norm.name}.scale", width, width, (), fold.readers, (fold,))

    def coupled(self, site: Site, axis: int) -> Group:
        """All slices that meet those of `site` along `axis`, norms among them. Raises UserError where a module with weights of an unknown
        kind reads them."""
        return self._channels.group(site, axis)

    @functools.cached_property
    def _channels(self) -> _Channels:
        return _Channels(self)


def traced_anatomy(module: nn.Module, example_input: Any) -> TracedAnatomy:
    """The anatomy of any module, from one run with `example_input`: a batch, or a tuple of arguments that are batches."""
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    example = tuple(a[:1] if isinstance(a, Tensor) and a.dim() else a for a in args)
    names = stored_names(module)
    run = _Run(module)
    with run.real():
        run(example)
    owners: dict[str, list[str]] = {}
    for name in run.order:
        owners.setdefault(names[f"{name}.weight" if name else "weight"], []).append(name)
    # modules that share a tensor but never ran count as tied too
    for name, kept in names.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and kept in owners and path not in owners[kept]:
            owners[kept].append(path)
    fixed = _ends(run, example)
    watched = _Watched(run, names)
    watched.run(example)
    sites = []
    for kept, (name, *others) in owners.items():
        inner = module.get_submodule(name)
        tensors = {"weight": TensorId(kept)}
        weight: Any = inner.weight
        if getattr(inner, "bias", None) is not None:
            tensors["bias"] = TensorId(names[f"{name}.bias" if name else "bias"])
        context: dict[str, Any] = {"fixed": fixed[name], "norms": tuple(run.follows.get(name, ()))}
        if isinstance(inner, nn.Conv1d | nn.Conv2d):
            context |= {key: getattr(inner, key) for key in ("kernel_size", "stride", "padding", "dilation", "groups")}
        if others:
            context["tied"] = tuple(others)
        roles = {"tied": others[0]} if others else {}
        context["after"] = watched.after(name)
        if (positions := watched.positions_of(name)) > 1:
            context["positions"] = positions
        if watched.outside(name):
            context["outside"] = True
        if (found := watched.map_of(name)) is not None:
            context["map"] = found
        sites.append(Site(name, SITES[type(inner)], tensors, tuple(weight.shape), roles, context))
    stages, folds = watched.stages(sites), watched.folds(sites, example)
    return TracedAnatomy(module, example, names, tuple(sites), stages, watched.layers, watched.positions, folds)


@dataclass
class _Called:
    """One call of a layer or a site: when it began and ended, what it was given first and what it gave."""

    began: int
    given: Any
    version: int
    ended: int = 0
    gave: Any = None


class _Watched:
    """Finds stacks of layers: a ModuleList of modules of one type, each called once, each given what the one before it gave. Nothing of
    a config is looked at."""

    def __init__(self, run: _Run, names: Mapping[str, str]) -> None:
        self.real, self.names = run, names
        self.calls: dict[str, list[_Called]] = {}
        self.maps: list[str] = []
        self.layers: dict[str, int] = {}
        self.ends: list[int] = []
        self.positions = 1
        self.clock = 0

    def run(self, example: tuple[Any, ...]) -> None:
        """One run of the module, and the stacks that it shows."""
        lists = {name: inner for name, inner in self.real.names.items() if type(inner) is nn.ModuleList and self._alike(name, inner)}
        layers = {f"{name}.{i}": layer for name, inner in lists.items() for i, layer in enumerate(inner)}
        hooks = []

        def before(name: str) -> Callable[..., None]:
            def hook(inner: nn.Module, args: Any) -> None:
                self.clock += 1
                given = args[0] if args else None
                self.calls.setdefault(name, []).append(_Called(self.clock, given, given._version if isinstance(given, Tensor) else 0))

            return hook

        def after(name: str) -> Callable[..., None]:
            def hook(inner: nn.Module, args: Any, output: Any) -> None:
                self.clock += 1
                self.calls[name][-1].ended, self.calls[name][-1].gave = self.clock, output

            return hook

        try:
            self.maps = [name for name, inner in self.real.names.items() if type(inner) is nn.Softmax]
            for name, inner in (*layers.items(), *((n, self.real.names[n]) for n in (*self.real.order, *self.real.norms, *self.maps))):
                hooks += [inner.register_forward_pre_hook(before(name)), inner.register_forward_hook(after(name))]
            self.real(example)
        finally:
            for hook in hooks:
                hook.remove()
        for name, inner in sorted(lists.items(), key=lambda item: min((c.began for c in self.calls.get(f"{item[0]}.0", ())), default=0)):
            paths = [f"{name}.{i}" for i in range(len(inner))]
            if any(name.startswith(f"{layer}.") for layer in self.layers) or not self._chain(paths):
                continue
            for path in paths:
                gave = self.calls[path][0].gave
                self.layers[path] = len(gave) if isinstance(gave, tuple) else 0
            hidden = self.calls[paths[0]][0].given
            self.positions = max(self.positions, hidden.numel() // hidden.shape[-1])
            self.ends.append(self.calls[paths[-1]][0].ended)

    def _alike(self, name: str, layers: nn.ModuleList) -> bool:
        """Modules of one type with a site in each, and no tensor that others use too."""
        below = [f"{name}.{i}." for i in range(len(layers))]
        if len(layers) < 2 or len({type(layer) for layer in layers}) > 1:
            return False
        if not all(any(site.startswith(prefix) for site in self.real.order) for prefix in below):
            return False
        users: dict[str, set[str]] = {}
        for own, stored in self.names.items():
            users.setdefault(stored, set()).add(next((prefix for prefix in below if own.startswith(prefix)), ""))
        return all(len(found) == 1 for found in users.values() if found != {""})

    def _chain(self, paths: list[str]) -> bool:
        calls = [self.calls.get(path, []) for path in paths]
        if any(len(found) != 1 for found in calls):
            return False
        gave = None
        for (call,) in calls:
            first = call.gave[0] if isinstance(call.gave, tuple) and call.gave else call.gave
            if not isinstance(call.given, Tensor) or not isinstance(first, Tensor) or first.shape != call.given.shape:
                return False
            if gave is not None and call.given is not gave:
                return False
            gave = first
        return True

    def after(self, site: str) -> int:
        """Stacks that were through when a site first ran."""
        return sum(end < self.calls[site][0].began for end in self.ends)

    def positions_of(self, site: str) -> int:
        """Of what a linear site is given (b, t, m), t; 1 for any other input."""
        given = [call.given for call in self.calls[site]]
        alike = isinstance(self.real.names[site], nn.Linear) and len({value.shape[1:] for value in given}) == 1 and given[0].dim() == 3
        return int(given[0].shape[1]) if alike else 1

    def outside(self, site: str) -> bool:
        """Whether a site of another layer is given the very same tensor: it comes to all layers from outside their stack."""
        layer, given = self._layer_of(site), {id(call.given) for call in self.calls[site]}
        others = (call for name in self.real.order if self._layer_of(name) not in ("", layer) for call in self.calls[name])
        return layer != "" and any(id(call.given) in given for call in others)

    def _layer_of(self, site: str) -> str:
        return next((name for name in self.layers if site.startswith(f"{name}.")), "")

    def map_of(self, site: str) -> Map | None:
        """The softmax that ran once, beside a site, before it and behind all other sites of their module, where these are two or more."""
        parent = site.rpartition(".")[0]
        for name in self.maps:
            if name.rpartition(".")[0] != parent or len(self.calls.get(name, [])) != 1:
                continue
            (own,) = self.calls[name]
            beside = [(n, call) for n in self.real.order if n.rpartition(".")[0] == parent for call in self.calls[n]]
            before = [call for _, call in beside if call.ended < own.began]
            behind = [n for n, call in beside if call.began > own.ended]
            if len(before) > 1 and behind[:1] == [site]:
                return Map(name, len({id(call.given) for call in before}) > 1)
        return None

    def stages(self, sites: list[Site]) -> tuple[Stage, ...]:
        """Sites that follow one another and are given the very same tensor are one stage of a layer."""
        stages: list[list[Site]] = []
        layer = None
        for site in sites:
            own = self._layer_of(site.name)
            if stages and own and own == layer and self._same(stages[-1][0].name, site.name):
                stages[-1].append(site)
            else:
                stages.append([site])
            layer = own
        return tuple(Stage(tuple(found)) for found in stages)

    def folds(self, sites: list[Site], example: tuple[Any, ...]) -> tuple[Fold, ...]:
        """Norms over the last axis that ran once, are read by linear sites of their own, and by nothing else: with sites standing in, a
        marked output arrives nowhere but at them."""
        found = []
        for name, how in self.real.norms.items():
            calls = self.calls.get(name, [])
            if how.axis != -1 or len(calls) != 1 or "weight" not in self.real.names[name]._parameters:
                continue
            gave = calls[0].gave
            readers = [s for s in sites if any(c.given is gave for c in self.calls[s.name])]
            alone = all(isinstance(s.kind, Linear) and "tied" not in s.context and len(self.calls[s.name]) == 1 for s in readers)
            if readers and alone and self._only(name, {s.name for s in readers}, example):
                norm = _norm_site(self.real, self.names, name)
                found.append(Fold(norm, tuple(Member(s, 1, IndexMap(s.shape[1])) for s in readers)))
        return tuple(found)

    def _only(self, norm: str, readers: set[str], example: tuple[Any, ...]) -> bool:
        self.real.mark = {}
        hook = self.real.names[norm].register_forward_hook(lambda inner, args, output: torch.full_like(output, torch.nan))
        try:
            with self.real.cut():
                out = self.real(example)
        finally:
            hook.remove()
        return not _has_nan(out) and not any(_has_nan(values) for sink, values in self.real.inputs.items() if sink not in readers)

    def _same(self, a: str, b: str) -> bool:
        first, second = self.calls[a], self.calls[b]
        if len(first) != 1 or len(second) != 1:
            return False
        return first[0].given is second[0].given and first[0].version == second[0].version


def _is_site(module: nn.Module) -> bool:
    if type(module) not in SITES or "weight" not in module._parameters:
        return False
    return getattr(module, "padding_mode", "zeros") == "zeros" and getattr(module, "max_norm", None) is None


class _Scaled(NamedTuple):
    """How a norm treats channels: their axis in its input, what it adds to its stored scale, whether it takes the mean away."""

    axis: int
    plus: float = 0.0
    centred: bool = True


def _scaled(module: nn.Module) -> _Scaled | None:
    """What a norm does, None for what is none: torch's own by their type, others by what they do (every library has an RMS norm)."""
    stored = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    if not stored or any(t.dim() > 1 for t in stored):
        return None
    if type(module) in CHANNELWISE:
        return _Scaled(CHANNELWISE[type(module)], centred=not isinstance(module, nn.RMSNorm | nn.PReLU))
    if set(module._parameters) not in ({"weight"}, {"weight", "bias"}) or len(stored) != len(module._parameters):
        return None
    return _tried(module)


def _tried(module: nn.Module) -> _Scaled | None:
    """Runs a leaf module with one entry of its weight marked: a norm marks that one channel, and with its scale at zero gives zeros."""
    weight = module._parameters["weight"]
    if weight is None or weight.dim() != 1 or any(True for _ in module.children()):
        return None
    new = copy.copy(module)
    x = torch.linspace(-1, 2, 3 * len(weight)).reshape(3, -1).sin()

    def given(value: Tensor, x: Tensor = x) -> Tensor:
        new._parameters = {"weight": nn.Parameter(value, requires_grad=False)}
        if "bias" in module._parameters:
            new._parameters["bias"] = nn.Parameter(torch.zeros(len(value)), requires_grad=False)
        with torch.no_grad():
            return new(x)  # type: ignore[no-any-return]

    one = torch.ones(len(weight))
    marked = one.clone()
    marked[0] = torch.nan
    try:
        out, plain = given(marked), given(one)
        plus = next((float(p) for p in (0, 1) if not bool(given(-p * one).any())), None)
        # moved by a hundred, a mean that is taken away leaves what was there up to rounding
        centred = torch.allclose(given(one, x + 100), plain, atol=1e-2)
    except Exception:
        # any module may be asked, and some take other inputs
        return None
    alone = isinstance(out, Tensor) and out.shape == x.shape and bool(out[:, 0].isnan().all()) and not bool(out[:, 1:].isnan().any())
    return _Scaled(-1, plus, centred) if alone and plus is not None else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)


class _Run:
    """Runs a module in eval mode without gradients and watches its parts. In a cut run every site gives back its recorded output, so
    what is marked at one site's output arrives at the next sites unmixed."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.names = dict(module.named_modules())
        self.sites = {name: inner for name, inner in self.names.items() if _is_site(inner)}
        self.norms = {name: found for name, inner in self.names.items() if (found := _scaled(inner)) is not None}
        self.order: list[str] = []
        self.follows: dict[str, list[str]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self.inputs: dict[str, list[Tensor]] = {}
        # names of sites whose output is marked, and how: output of one call -> marked output
        self.mark: dict[str, Callable[[Tensor], Tensor]] = {}
        self.lanes = 1

    def __call__(self, example: tuple[Any, ...]) -> Any:
        """One run of the module."""
        training = {name: inner.training for name, inner in self.names.items()}
        self.module.eval()
        try:
            with torch.no_grad():
                return self.module(*example)
        except UserError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:160]
            raise UserError(
                f"the module does not run on its example input ({type(error).__name__}: {text}): give a batch that fits it"
            ) from error
        finally:
            for name, was in training.items():
                self.names[name].training = was

    def _watch(self, name: str) -> Callable[..., None]:
        def hook(inner: nn.Module, args: Any, output: Any = None) -> None:
            self.inputs.setdefault(name, []).extend(a for a in args if isinstance(a, Tensor))

        return hook

    @contextlib.contextmanager
    def real(self) -> Iterator[None]:
        """Notes the order of the sites, their outputs, and the norms that read a site's output as it is."""
        made: dict[int, str] = {}
        kept: list[Tensor] = []
        hooks = []

        def ran(name: str) -> Callable[..., None]:
            def hook(inner: nn.Module, args: Any, output: Tensor) -> None:
                if name not in self.order:
                    self.order.append(name)
                # the next operator may work in place
                self.outputs.setdefault(name, []).append(self._lane(output.detach()).clone())
                made[id(output)] = name
                kept.append(output)

            return hook

        def read(name: str) -> Callable[..., None]:
            def hook(inner: nn.Module, args: Any) -> None:
                if args and id(args[0]) in made:
                    self.follows.setdefault(made[id(args[0])], []).append(name)

            return hook

        self.outputs.clear()
        for name, inner in self.names.items():
            if name in self.sites:
                hooks.append(inner.register_forward_hook(ran(name)))
            elif type(inner) in CHANNELWISE or name in self.norms:
                hooks.append(inner.register_forward_pre_hook(read(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _lane(self, value: Tensor) -> Tensor:
        """The part of the first lane; refused where the lanes of a repeated example are not equal parts of the first axis."""
        if self.lanes == 1:
            return value
        if not value.dim() or value.shape[0] % self.lanes:
            raise _UnlikeError
        parts = value.reshape(self.lanes, -1, *value.shape[1:])
        if not torch.allclose(parts[0], parts[-1], rtol=1e-3, atol=1e-4):
            raise _UnlikeError
        return parts[0]

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Sites give back what was recorded, marked where `mark` says so; inputs of all modules with weights are noted."""
        calls: dict[str, int] = {}
        hooks = []

        def stand_in(name: str) -> Callable[..., Tensor]:
            def forward(*args: Any, **kwargs: Any) -> Tensor:
                self.inputs.setdefault(name, []).append(args[0])
                call = calls.get(name, 0)
                calls[name] = call + 1
                recorded = self.outputs[name]
                one = recorded[call % len(recorded)]
                value = one.repeat(self.lanes, *[1] * (one.dim() - 1))
                return self.mark[name](value) if name in self.mark else value

            return forward

        self.inputs.clear()
        try:
            for name in self.order:
                self.sites[name].forward = stand_in(name)  # type: ignore[method-assign]
            for name, inner in self.names.items():
                if name not in self.order and _owns(inner):
                    hooks.append(inner.register_forward_pre_hook(self._watch(name)))
            yield
        finally:
            for name in self.order:
                self.sites[name].__dict__.pop("forward", None)
            for hook in hooks:
                hook.remove()


def _norm_width(inner: nn.Module) -> int:
    return max(t.numel() for t in (*inner._parameters.values(), *inner._buffers.values()) if t is not None)


def _norm_site(run: _Run, names: Mapping[str, str], name: str) -> Site:
    """A norm as a site; a running mean and variance have roles of their own."""
    inner = run.names[name]
    leaves = [n for n, t in (*inner._parameters.items(), *inner._buffers.items()) if t is not None and t.dim()]
    tensors = {leaf: TensorId(names[f"{name}.{leaf}" if name else leaf]) for leaf in leaves}
    found = run.norms[name]
    return Site(name, Norm(), tensors, (_norm_width(inner),), {}, {"plus": found.plus, "centred": found.centred})


class _UnlikeError(Exception):
    """A repeated example does not give repeated activations."""


def _owns(module: nn.Module) -> bool:
    stored = [n for n, b in module._buffers.items() if b is not None and n not in module._non_persistent_buffers_set]
    return bool(stored) or any(p is not None for p in module._parameters.values())


def _has_nan(value: Any) -> bool:
    return any(bool(torch.isnan(t).any()) for t in _tensors(value) if t.is_floating_point())


def _ends(run: _Run, example: tuple[Any, ...]) -> dict[str, tuple[int, ...]]:
    """Axes of each site that are the module's own output or input: they have a fixed width."""
    fixed: dict[str, tuple[int, ...]] = dict.fromkeys(run.order, ())

    def out(name: str) -> int:
        return 1 if isinstance(run.sites[name], nn.Embedding) else 0

    for name in run.order:
        run.mark = {name: lambda value: torch.full_like(value, torch.nan)}
        with run.cut():
            if _has_nan(run(example)):
                fixed[name] += (out(name),)
    run.mark = {}
    marked = tuple(torch.full_like(a, torch.nan) if isinstance(a, Tensor) and a.is_floating_point() else a for a in example)
    with run.cut():
        run(marked)
        for name in run.order:
            if isinstance(run.sites[name], nn.Embedding):
                fixed[name] += (0,)
            elif _has_nan(run.inputs.get(name, [])):
                fixed[name] += (1,)
    return fixed


class _Channels:
    """Which channels meet. Every channel of every site (out and in) and of every norm is a node; marking one output channel with NaN and
    seeing where NaN arrives joins nodes. NaN passes dead rectifiers and zero scales, which a small change would not."""

    def __init__(self, anatomy: TracedAnatomy) -> None:
        self.sites = {site.name: site for site in anatomy.found}
        self.base: dict[tuple[str, str], int] = {}
        self.parent: list[int] = []
        self.unknown: dict[int, str] = {}
        self.marked = ""
        self.names = anatomy.names
        run = self._recorded(anatomy)
        self.run = run
        # modules that share one tensor are one site
        self.site_of = {path: site.name for site in anatomy.found for path in (site.name, *site.context.get("tied", ()))}
        self.norm_names = list(run.norms)
        for site in anatomy.found:
            n, m = self._widths(site)
            self._add((site.name, "out"), n)
            self._add((site.name, "in"), m)
        for name in self.norm_names:
            self._add((name, "norm"), self._norm_width(name))
        for site in anatomy.found:
            self._join_grouped(site)
        for name in run.order:
            if name in self.site_of:
                self._trace(name, anatomy.example)
        # tensors that lie in no module of their own, and the channels that they act on
        self.alone: dict[int, str] = {}
        for name, inner in run.names.items():
            if name not in self.site_of and name not in self.norm_names and any(True for _ in inner.children()):
                self._trace_alone(name, inner, anatomy.example)

    def _recorded(self, anatomy: TracedAnatomy) -> _Run:
        for lanes in (LANES, 1):
            run = _Run(anatomy.module)
            run.lanes = lanes
            try:
                with run.real():
                    run(self._repeated(anatomy.example, lanes))
                return run
            except (_UnlikeError, UserError):
                if lanes == 1:
                    raise
        raise AssertionError

    @staticmethod
    def _repeated(example: tuple[Any, ...], lanes: int) -> tuple[Any, ...]:
        return tuple(a.repeat(lanes, *[1] * (a.dim() - 1)) if isinstance(a, Tensor) and a.dim() else a for a in example)

    def _first_tensor(self, name: str, inner: nn.Module) -> str:
        leaf = next(n for n in (*inner._parameters, *inner._buffers) if getattr(inner, n) is not None)
        return f"{name}.{leaf}" if name else leaf

    def _widths(self, site: Site) -> tuple[int, int]:
        """Channels that come out of and go into a site; a table of rows takes none."""
        if isinstance(site.kind, Embedding):
            return site.shape[1], 0
        return site.shape[0], site.shape[1] * int(site.context.get("groups", 1))

    def _norm_width(self, name: str) -> int:
        return _norm_width(self.run.names[name])

    def _add(self, key: tuple[str, str], count: int) -> None:
        self.base[key] = len(self.parent)
        self.parent.extend(range(len(self.parent), len(self.parent) + count))

    def _root(self, node: int) -> int:
        while self.parent[node] != node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def _join(self, a: int, b: int) -> None:
        a, b = self._root(a), self._root(b)
        if a != b:
            self.parent[max(a, b)] = min(a, b)

    def _join_grouped(self, site: Site) -> None:
        """Inputs and outputs of one group of a grouped convolution stand or fall together."""
        groups = int(site.context.get("groups", 1))
        if groups == 1:
            return
        n, m = self._widths(site)
        out, into = self.base[site.name, "out"], self.base[site.name, "in"]
        for g in range(groups):
            first = out + g * (n // groups)
            for i in range(n // groups):
                self._join(first, out + g * (n // groups) + i)
            for j in range(m // groups):
                self._join(first, into + g * (m // groups) + j)

    def _trace(self, name: str, example: tuple[Any, ...]) -> None:
        """Marks the output channels of the module `name`, a lane each, and joins them with the channels where the marks arrive."""
        run, lanes = self.run, self.run.lanes
        inner = run.sites[name]
        site = self.sites[self.site_of[name]]
        # a tied head's outputs are the table's rows, not its columns
        if isinstance(site.kind, Embedding) != isinstance(inner, nn.Embedding):
            return
        width = self._widths(site)[0]
        axis = 1 if isinstance(inner, nn.Conv1d | nn.Conv2d) else -1
        repeated = self._repeated(example, lanes)
        base = self.base[site.name, "out"]
        for start in range(0, width, lanes):
            count = min(lanes, width - start)

            def mark(value: Tensor, start: int = start, count: int = count) -> Tensor:
                rows = value.reshape(lanes, -1, *value.shape[1:])
                for lane in range(count):
                    rows[lane].select(axis, start + lane).fill_(torch.nan)
                return rows.reshape(value.shape)

            run.mark = {name: mark}
            with run.cut():
                run(repeated)
            for sink, values in run.inputs.items():
                for value in values:
                    if value.is_floating_point():
                        self._arrived(sink, value, base + start, count)
        run.mark = {}

    def _arrived(self, sink: str, value: Tensor, first: int | None, count: int) -> None:
        """Joins the channels where NaN arrived with those that were marked, from node `first` on, a lane each; None: with self.marked."""
        inner = self.run.names[sink]
        lanes = self.run.lanes
        value = value.reshape(lanes, -1, *value.shape[1:])[:count]
        last = value.dim() - 1
        if sink in self.site_of:
            site = self.sites[self.site_of[sink]]
            if isinstance(site.kind, Embedding):
                # a tied head reads the table's columns, which are the table's out channels
                base, axis = self.base[site.name, "out"], last
            else:
                base = self.base[site.name, "in"]
                axis = 2 if isinstance(inner, nn.Conv1d | nn.Conv2d) else last
        elif sink in self.norm_names:
            if self._norm_width(sink) == 1:
                # one scale for all channels goes with none of them
                return
            base = self.base[sink, "norm"]
            axis = 2 if self.run.norms[sink].axis == 1 else last
        else:
            for lane in value.flatten(1).sum(1).isnan().nonzero()[:, 0].tolist() if first is not None else ():
                self.unknown[first + lane] = self._first_tensor(sink, inner)
            return
        # one NaN makes the sum of its channel NaN
        sums = value.sum(tuple(i for i in range(1, last + 1) if i != axis))
        for lane, channel in sums.isnan().nonzero().tolist():
            if first is None:
                self.alone[base + channel] = self.marked
            else:
                self._join(first + lane, base + channel)

    def _trace_alone(self, name: str, inner: nn.Module, example: tuple[Any, ...]) -> None:
        """Marks each tensor that a module with children owns, as a whole: which of its axes are channels is not known."""
        for held in (inner._parameters, inner._buffers):
            for leaf, value in list(held.items()):
                if value is None or not value.is_floating_point() or leaf in inner._non_persistent_buffers_set:
                    continue
                self.marked = f"{name}.{leaf}" if name else leaf
                self.run.mark = {}
                marked = torch.full_like(value, torch.nan)
                held[leaf] = nn.Parameter(marked, requires_grad=False) if isinstance(value, nn.Parameter) else marked  # type: ignore[assignment]
                try:
                    with self.run.cut():
                        out = self.run(self._repeated(example, self.run.lanes))
                finally:
                    held[leaf] = value  # type: ignore[assignment]
                for sink, values in self.run.inputs.items():
                    for arrived in values:
                        if arrived.is_floating_point():
                            self._arrived(sink, arrived, None, self.run.lanes)
                if _has_nan(out):
                    for site in self.sites.values():
                        if 0 in site.context["fixed"]:
                            start = self.base[site.name, "out"]
                            self.alone |= dict.fromkeys(range(start, start + self._widths(site)[0]), self.marked)

    @functools.cached_property
    def _axes(self) -> dict[tuple[str, str], list[int]]:
        """Component of each channel of each axis."""
        return {key: [self._root(node) for node in range(self.base[key], self.base[key] + self._size(key))] for key in self.base}

    def _size(self, key: tuple[str, str]) -> int:
        name, side = key
        if side == "norm":
            return self._norm_width(name)
        n, m = self._widths(self.sites[name])
        return n if side == "out" else m

    def _side(self, site: Site, axis: int) -> str:
        if isinstance(site.kind, Norm):
            return "norm"
        if isinstance(site.kind, Embedding):
            return "out" if axis == 1 else ""
        return "out" if axis == 0 else "in"

    def group(self, site: Site, axis: int) -> Group:
        """The group of a site's axis."""
        side = self._side(site, axis)
        if not side:
            # the rows of a table are ids, which meet nothing that a trace can see
            return Group(site.shape[0], (Member(site, axis, IndexMap(site.shape[0])),), fixed=True)
        keys = [(site.name, side)]
        components = set(self._axes[keys[0]])
        grown = True
        while grown:
            grown = False
            for key, roots in self._axes.items():
                if key not in keys and components.intersection(roots):
                    keys.append(key)
                    components.update(roots)
                    grown = True
        for node, name in self.unknown.items():
            if self._root(node) in components:
                raise UserError(
                    f"{name} reads the channels of {site.name}, and its kind is unknown: structured methods leave {site.name} out"
                )
        for node, name in self.alone.items():
            if self._root(node) in components:
                raise UserError(
                    f"{name} acts on the channels of {site.name} and lies in no module of its own: structured methods leave {site.name} out"
                )
        order = self._order(keys, components)
        members = []
        fixed = False
        for key in sorted(keys, key=lambda key: self.base[key]):
            name, way = key
            index = self._fit(key, order)
            if way == "norm":
                members.append(Member(_norm_site(self.run, self.names, name), 0, index))
                continue
            found = self.sites[name]
            if way == "in" and int(found.context.get("groups", 1)) > 1:
                # the input slices of a grouped convolution go with its output rows
                continue
            at = 1 if way == "in" or isinstance(found.kind, Embedding) else 0
            fixed |= at in found.context["fixed"]
            members.append(Member(found, at, index))
        return Group(len(order), tuple(members), fixed)

    def _order(self, keys: list[tuple[str, str]], components: set[int]) -> dict[int, int]:
        """Component -> canonical index, in the order of the axis that meets most of them."""
        widest = max(keys, key=lambda key: (len(set(self._axes[key])), -self.base[key]))
        order: dict[int, int] = {}
        for key in (widest, *keys):
            for root in self._axes[key]:
                order.setdefault(root, len(order))
        return order

    def _fit(self, key: tuple[str, str], order: Mapping[int, int]) -> IndexMap:
        """The IndexMap of one axis: runs of equal length, one after another, from some canonical index on, or a table."""
        at = [order[root] for root in self._axes[key]]
        block = at.count(at[0])
        if at == [at[0] + j // block for j in range(len(at))]:
            return IndexMap(len(at), offset=-at[0] * block, block=block)
        table: list[list[int]] = [[] for _ in order]
        for j, i in enumerate(at):
            table[i].append(j)
        return IndexMap(len(at), table=tuple(tuple(found) for found in table))
