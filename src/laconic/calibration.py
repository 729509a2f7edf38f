"""The walk: a model run segment by segment over a set of inputs, with one segment's weights in memory at a time.

The model's own forward runs once per batch with stand-ins for its layers, which records what each layer is handed (masks, positions);
after that each layer is filled, run over all batches, observed, and released. Forward for inputs, backward for gradients."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.packed import Held, Packed
from laconic.core.site import Anatomy, Conv, Embedding, Segment, Site, Stage
from laconic.core.statistic import Fisher, Gram, LookupFisher, Lookups, Seen, Statistic
from laconic.kernels.pairs import narrowly
from laconic.kernels.place import device, here, on

# a head with more weights than this is never held in fp32
WIDE = 64 * 1024 * 1024


class Opened(Protocol):
    """What a walk needs of a model: an original (models.Source) or a written artifact (artifact.stream)."""

    @property
    def anatomy(self) -> Anatomy: ...
    def skeleton(self) -> nn.Module: ...
    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype, *, skip: Sequence[str] = ()) -> None: ...


class Stop(Exception):
    """Ends a forward pass once all that was wanted has been seen."""


class _StandIn(nn.Module):
    """Stands where a layer was: notes what it is handed, gives back the hidden state (or the one it is told to)."""

    def __init__(self, original: nn.Module, number: int, gives: int) -> None:
        super().__init__()
        self.handed: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.answer: Tensor | None = None
        self.first = self.last = False
        self.more = tuple(_Promise(number, i) for i in range(1, gives))
        self.alone = not gives
        for name, value in vars(original).items():
            # plain attributes that the model's own loop may look at (attention_type and the like)
            if isinstance(value, (str, int, bool)) and not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.handed = (tuple(_uncached(value) for value in args), {name: _uncached(value) for name, value in kwargs.items()})
        if self.answer is not None:
            return self.answer if self.alone else (self.answer, *self.more)
        if self.first:
            raise Stop
        if self.last:
            raise Caught(hidden)
        return hidden if self.alone else (hidden, *self.more)


class _Promise:
    """Stands for what a layer gives besides the hidden state (T5's position bias), until that layer was run."""

    def __init__(self, layer: int, entry: int) -> None:
        self.layer, self.entry = layer, entry


def _kept(handed: Any, gave: Mapping[int, Any]) -> Any:
    """What a layer is handed, by place or by name, with the promises of those layers kept whose output is given."""

    def kept(value: Any) -> Any:
        return gave[value.layer][value.entry] if isinstance(value, _Promise) and value.layer in gave else value

    if isinstance(handed, dict):
        return {name: kept(value) for name, value in handed.items()}
    return tuple(kept(value) for value in handed)


def _uncached(value: Any) -> Any:
    """None for a cache of keys and values: a layer is run many times over the same tokens, which a cache would count as new ones."""
    return None if any(kind.__name__ == "Cache" for kind in type(value).__mro__) else value


class Caught(Stop):
    """Carries the hidden state out of a forward pass that was cut short."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class FewRows(nn.Module):
    """The rows of a table that a set of tokens needs, and no others, scaled as the table scales them."""

    def __init__(self, index: Tensor, rows: Tensor, scale: float) -> None:
        super().__init__()
        self.index, self.rows, self.scale = index, rows, scale

    def forward(self, ids: Tensor) -> Tensor:
        found = F.embedding(torch.searchsorted(self.index, ids), self.rows)
        return found if self.scale == 1.0 else found * self.scale


def fed(layer: nn.Module, form: Packed | None) -> None:
    """From now on a layer takes its inputs as the form does that its weight was made from: as they are, or rounded, say."""
    if (hook := layer.__dict__.pop("_fed", None)) is not None:
        hook.remove()
    feed = None if form is None or isinstance(layer, nn.Embedding) else form.feed
    if feed is not None:
        layer.__dict__["_fed"] = layer.register_forward_pre_hook(lambda layer, args: (feed(args[0].float()), *args[1:]))


def as_held(layer: nn.Module, form: Packed) -> None:
    """Until it is released, a layer computes as the held one will that takes its place, to the last bit."""
    bias = layer.bias if isinstance(getattr(layer, "bias", None), Tensor) else None
    layer.__dict__["forward"] = layer.__dict__["_held"] = Held(form, layer, bias).forward  # type: ignore[arg-type]


def release(module: nn.Module) -> None:
    """Give the memory of a module's weights back: parameters and stored buffers go to meta; computed buffers (rotary tables) stay."""
    for inner in module.modules():
        if inner.__dict__.pop("_held", None) is not None:
            del inner.__dict__["forward"]
        for name, value in inner.named_parameters(recurse=False):
            inner.register_parameter(name, nn.Parameter(value.detach().to("meta"), requires_grad=False))
        for name, buffer in inner.named_buffers(recurse=False):
            if name not in inner._non_persistent_buffers_set:
                inner.register_buffer(name, buffer.to("meta"))


def run_layer(layer: nn.Module, hidden: Tensor, handed: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """One layer's output; layers that return a tuple give its first entry."""
    out = layer(hidden, *handed[0], **handed[1])
    return out[0] if isinstance(out, tuple) else out


def answer_of(out: Any) -> Tensor:
    """The logits of whatever a model returns."""
    if isinstance(out, Tensor):
        return out
    return out.logits if hasattr(out, "logits") else out[0]  # type: ignore[no-any-return]


def joined(segments: Sequence[Segment]) -> Segment:
    """All segments as one, for a model that is in memory anyway."""
    return Segment("", tuple(stage for s in segments for stage in s.stages), tuple(tensor for s in segments for tensor in s.tensors))


def kept_tensor(tensor: Tensor) -> Tensor:
    """How a tensor that no method touches is stored: floating point as bf16."""
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


class Shelf:
    """Tensors by key, in memory up to `limit` bytes, the rest in files under `folder`."""

    def __init__(self, folder: Path, limit: int = 2 * 1024**3) -> None:
        self.folder, self.limit = folder, limit
        self.held: dict[str, Tensor] = {}
        self.filed: set[str] = set()
        self.bytes = 0

    def put(self, key: str, value: Tensor) -> None:
        """Keep a tensor, replacing what was there."""
        self.drop(key)
        value = value.cpu()
        size = value.numel() * value.element_size()
        if self.bytes + size <= self.limit:
            self.held[key] = value
            self.bytes += size
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(value, self.folder / f"{key}.pt")
            self.filed.add(key)

    def get(self, key: str) -> Tensor:
        """The tensor again."""
        if key in self.held:
            return here(self.held[key])
        return here(torch.load(self.folder / f"{key}.pt", mmap=False, weights_only=True))

    def drop(self, key: str) -> None:
        """Forget a tensor."""
        value = self.held.pop(key, None)
        if value is not None:
            self.bytes -= value.numel() * value.element_size()
        if key in self.filed:
            (self.folder / f"{key}.pt").unlink()
            self.filed.discard(key)

    def clear(self) -> None:
        """Forget everything."""
        for key in [*self.held, *self.filed]:
            self.drop(key)


@dataclass(frozen=True)
class Shelved:
    """Tensors 0 to count - 1 of a shelf under `prefix`, read in fp32 when they are needed: the targets of a lesson."""

    shelf: Shelf
    count: int
    prefix: str = ""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Tensor:
        return self.shelf.get(f"{self.prefix}{i}").float()


def rows_of(site: Site, x: Tensor, module: nn.Module) -> Tensor:
    """A module's input as rows of the site's matrix view: (t, m). Convolutions are unfolded, one row for each output position
    (with groups, one for each position and group, the groups of a position side by side)."""
    if not isinstance(site.kind, Conv):
        return x.reshape(-1, x.shape[-1])
    conv: Any = module
    kernel, stride, padding, dilation = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    if len(site.shape) == 3:
        x, kernel, stride = x.unsqueeze(2), (1, *kernel), (1, *stride)
        padding = padding if isinstance(padding, str) else (0, *padding)
        dilation = (1, *dilation)
    if isinstance(padding, str):
        # "same": what torch pads, the odd one at the end; "valid": nothing
        ends = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        x = F.pad(x, (ends[1] // 2, ends[1] - ends[1] // 2, ends[0] // 2, ends[0] - ends[0] // 2))
        padding = (0, 0)
    columns = F.unfold(x, kernel, dilation, padding, stride)
    b, _, positions = columns.shape
    width = site.matrix[1]
    return columns.reshape(b, -1, width, positions).permute(0, 3, 1, 2).reshape(-1, width)


def columns_of(site: Site, y: Tensor) -> Tensor:
    """A module's output (or its gradient) as rows (t, n)."""
    if isinstance(site.kind, Conv):
        return y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1])
    return y.reshape(-1, y.shape[-1])


class Observer:
    """Running statistics of sites, filled by hooks on their modules. Sites of one stage see the same input: what depends on the input
    alone is summed once, for the first of them."""

    def __init__(self, stages: Iterable[Stage], wants: Sequence[Statistic]) -> None:
        self.wants = tuple(wants)
        self.first = {site.name: stage.sites[0].name for stage in stages for site in stage.sites}
        self.state: dict[tuple[str, Statistic], Any] = {}
        self.finished: dict[tuple[str, Statistic], Tensor] = {}
        # rows that passed the segment: an expert's Fisher information is a mean over all of them, as what it never saw had no gradient
        self.rows: int | None = None

    def _offer(self, site: Site, needs: str, seen: Seen) -> None:
        for statistic in self.wants:
            if needs in statistic.needs and len(statistic.needs) == 1:
                table = isinstance(statistic, Lookups | LookupFisher)
                if table != (seen.routing is not None):
                    continue
                if needs == "x" and self.first[site.name] != site.name:
                    continue
                key = (site.name, statistic)
                if key not in self.state:
                    self.state[key] = statistic.init(site)
                self.state[key] = statistic.update(self.state[key], seen._replace(routing=None))

    def attach(self, site: Site, module: nn.Module, *, table: bool = False) -> list[Any]:
        """Hooks for one site's module; `table` marks the lookup use of an embedding (its head use is a product)."""
        # the routing field is free here: it only marks which of an embedding's two uses is meant
        mark = torch.empty(0) if table else None
        gradient, outputs = (any(word in statistic.needs for statistic in self.wants) for word in ("grad", "y"))

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            # tokens that were routed to an expert have no sequences any more
            sequences = x.shape[0] if x.dim() > 2 else 1
            self._offer(site, "x", Seen(x=x if table else rows_of(site, x, module), routing=mark, sequences=sequences))

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if outputs:
                self._offer(site, "y", Seen(y=columns_of(site, output.detach()), routing=mark))
            if gradient and output.requires_grad:
                output.register_hook(backward)

        def backward(grad: Tensor) -> None:
            # gradients of another device come in a thread of their own
            with on(device()):
                self._offer(site, "grad", Seen(grad=columns_of(site, grad.detach()), routing=mark))

        hooks: list[Any] = [module.register_forward_pre_hook(before)]
        return [*hooks, module.register_forward_hook(after)] if gradient or outputs else hooks

    def finish(self, site: Site) -> dict[Statistic, Tensor]:
        """All statistics of one site; what sites of a stage share is one tensor for all of them."""
        found = {}
        for statistic in self.wants:
            key = (self.first[site.name] if statistic.needs == {"x"} else site.name, statistic)
            if key in self.state:
                state = self.state.pop(key)
                if "expert" in site.context and self.rows is not None and isinstance(statistic, Fisher):
                    state = {**state, "count": torch.tensor(float(self.rows), dtype=torch.float64)}
                self.finished[key] = statistic.finish(state)
            if key in self.finished:
                found[statistic] = self.finished[key]
        return found


# inputs of one site that are kept over the passes of a segment take at most this many bytes
KEPT = 512 * 1024 * 1024


class _Memo:
    """A sub-module that gives back what its last site computes, computed from that site's kept inputs."""

    def __init__(self, walk: Walk, parent: nn.Module, leaf: str) -> None:
        self.walk, self.parent, self.leaf = walk, parent, leaf
        self.kept: dict[int, Tensor] = {}
        self.last: Tensor | None = None
        # what the parent gives back besides the site's output; None until the two were seen to be one tensor
        self.more: tuple[Any, ...] | None = None
        self.whole = True

    def hooks(self) -> list[Any]:
        """Hooks that note the site's inputs and compare its output with the parent's, then end the pass."""

        def site(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.kept[self.walk._batch], self.last = args[0], output

        def parent(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            same = first is self.last
            if not same:
                self.whole = False
            elif isinstance(output, tuple):
                self.more = output[1:]
            raise Stop

        return [self.parent.get_submodule(self.leaf).register_forward_hook(site), self.parent.register_forward_hook(parent)]

    def settle(self) -> None:
        """From now on the parent computes from the kept inputs, if it gives back nothing else."""
        self.last = None
        if not self.whole or any(value is not None for value in self.more or ()):
            self.kept.clear()
            return
        leaf = self.parent.get_submodule(self.leaf)

        def forward(*args: Any, **kwargs: Any) -> Any:
            out = leaf(self.kept[self.walk._batch])
            return out if self.more is None else (out, *self.more)

        self.parent.forward = forward

    def forget(self) -> None:
        """The parent computes by itself again."""
        self.kept.clear()
        self.parent.__dict__.pop("forward", None)


class Walk:
    """A model over inputs, segment by segment. `inputs` (count, ...) are run in batches of `batch`; compute is fp32. narrow: products of
    layers and head may be in bf16 where the processor is faster so."""

    def __init__(
        self, source: Opened, inputs: Tensor, *, batch: int = 8, shelf: Path | None = None, whole: bool = False, narrow: bool = False
    ) -> None:
        self.source = source
        self.narrow = narrow
        self.inputs = here(inputs)
        self.batches = list(self.inputs.split(batch))
        self.model = source.skeleton()
        segments = source.anatomy.segments()
        if whole:
            segments = (joined(segments),)
        self.layers = [segment for segment in segments if segment.name]
        self.rest = next(segment for segment in segments if not segment.name)
        self.whole = not self.layers
        self.shelf = Shelf(shelf) if shelf is not None else None
        # layers by stack: an encoder and a decoder, two towers
        self.stacks: list[list[int]] = []
        for number, segment in enumerate(self.layers):
            if not number or segment.name.rpartition(".")[0] != self.layers[number - 1].name.rpartition(".")[0]:
                self.stacks.append([])
            self.stacks[-1].append(number)
        self.entered = 0
        # for each stack that was gone through: its hidden states at the end
        self.through: list[list[Tensor]] = []
        self.hidden: list[Tensor] = []
        self.handed: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._stands: list[_StandIn] = []
        self._modules: dict[str, nn.Module] = {}
        self._batch = 0
        self._memos: list[_Memo] = []
        # called before a batch is run anywhere: whoever gives batches weights of their own puts them in place here
        self.ready: Callable[[int], None] = lambda i: None
        self._plain = {"use_cache": False} if "use_cache" in inspect.signature(self.model.forward).parameters else {}

    def begin(self, table: Callable[[Tensor], Tensor] | None = None) -> None:
        """Sets out: everything outside the layers is filled. `table` gives rows of the embedding by index (a compressed one, say); the
        original's rows are read when it is None. A model without layers has nothing to do here."""
        if self.whole:
            self.hidden = list(self.batches)
            return
        for number, segment in enumerate(self.layers):
            module = self.model.get_submodule(segment.name)
            self._modules[segment.name] = module
            stand = _StandIn(module, number, segment.gives)
            self._stands.append(stand)
            self._put(segment.name, stand)
        self._embed(table)
        # learned positions, projections, norms of the stem; a language model's head is wide and waits
        if self._embeds():
            self._fill_rest(skip={self.head_name()})
        else:
            # in one go, so that modules which share a tensor go on sharing it
            self.source.fill(self.model, "", torch.float32)
        self.handed = [[((), {}) for _ in self.layers] for _ in self.batches]

    def enter(self, stack: int) -> None:
        """The hidden state before the first layer of a stack, and what each of its layers is handed. Done by `take` where it was not."""
        last = self._stands[self.stacks[stack][-1]]
        last.last = True
        self.hidden = []
        for i, batch in enumerate(self.batches):
            with self._answers(i):
                self.ready(i)
                self.hidden.append(self._caught(batch))
            for number in self.stacks[stack]:
                stand = self._stands[number]
                self.handed[i][number], stand.handed = stand.handed, ((), {})
        last.last = False
        self.entered = stack + 1

    @contextlib.contextmanager
    def _answers(self, i: int | None, hidden: Tensor | None = None) -> Iterator[None]:
        """Inside, the stacks that were gone through give back what they gave for batch i; `hidden` instead for the last of all."""
        ends = [self._stands[stack[-1]] for stack in self.stacks]
        if i is not None:
            for stand, states in zip(ends, self.through, strict=False):
                stand.answer = states[i]
        if hidden is not None:
            ends[-1].answer = hidden
        try:
            yield
        finally:
            for stand in ends:
                stand.answer = None

    def _embeds(self) -> bool:
        """Whether tokens are looked up in a table that is read by rows: a language model that was opened from a folder."""
        return any(site.roles.get("part") == "embed" for site in self.rest.sites)

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        self.model.get_submodule(parent).register_module(child, module)

    def _embed(self, table: Callable[[Tensor], Tensor] | None) -> None:
        if not self._embeds():
            return
        used = torch.unique(self.inputs)
        for site in self.rest.sites:
            if site.roles.get("part") == "embed":
                module = self.model.get_submodule(site.name)
                if not hasattr(module, "weight"):
                    continue
                rows = table(used) if table is not None else self._stored_rows(site, used)
                scale = float(getattr(module, "scalar_embed_scale", getattr(module, "scale", 1.0)))
                self._put(site.name, FewRows(used, rows.float(), scale))

    def _stored_rows(self, site: Site, used: Tensor) -> Tensor:
        name = site.tensors["weight"].name
        pieces, index = [], used.tolist()
        start = 0
        # runs of neighbouring rows are read together
        while start < len(index):
            stop = start + 1
            while stop < len(index) and index[stop] - index[stop - 1] <= 4 and index[stop] - index[start] < 4096:
                stop += 1
            block = self.source.read_rows(name, index[start], index[stop - 1] + 1)  # type: ignore[attr-defined]
            pieces.append(block[torch.tensor(index[start:stop]) - index[start]].float())
            start = stop
        return torch.cat(pieces)

    def _caught(self, batch: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                self.model(batch, **self._plain)
        except Caught as caught:
            return caught.hidden
        raise RuntimeError("the model's forward never reached its last layer")

    def take(self, segment: Segment) -> nn.Module:
        """The segment's module, filled with the original's weights in fp32."""
        if not segment.name:
            self.source.fill(self.model, "", torch.float32)
            return self.model
        self.reach(segment)
        module = self._modules[segment.name]
        self.source.fill(module, segment.name, torch.float32)
        return module

    def reach(self, segment: Segment) -> None:
        """Enters the stack that a segment is of, where that was not done: its hidden states are there."""
        number = self._number(segment)
        if (stack := next(s for s, numbers in enumerate(self.stacks) if number in numbers)) >= self.entered:
            self.enter(stack)

    def outputs(self, module: nn.Module, segment: Segment) -> Iterator[Tensor]:
        """The segment's output for each batch, in order, without storing it."""
        for i in range(len(self.hidden)):
            with torch.no_grad():
                out = self._through(module, segment, i)
            yield out

    def _through(self, module: nn.Module, segment: Segment, i: int) -> Tensor:
        """Batch i through the segment."""
        self._batch = i
        self.ready(i)
        if not segment.name:
            return answer_of(module(self.hidden[i], **self._plain))
        number = self._number(segment)
        args, kwargs = self.handed[i][number]
        with narrowly(self.narrow):
            out = module(self.hidden[i], *args, **kwargs)
        if not isinstance(out, tuple):
            return out  # type: ignore[no-any-return]
        if segment.gives > 1:
            self._keep_promises(i, number, out)
        return out[0]  # type: ignore[no-any-return]

    def chained(self, modules: Sequence[tuple[Callable[..., Any], Segment]], i: int) -> Tensor:
        """Batch i through neighbouring segments, each run by what stands for its module. Gradients may flow, and the walk keeps nothing."""
        if self.whole:
            return answer_of(modules[0][0](self.hidden[i], **self._plain))
        hidden = self.hidden[i]
        gave: dict[int, Any] = {}
        for module, segment in modules:
            number = self._number(segment)
            out = module(hidden, *_kept(self.handed[i][number][0], gave), **_kept(self.handed[i][number][1], gave))
            gave[number] = out
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def passing(self, module: nn.Module, segment: Segment, site: Site) -> Iterator[tuple[Tensor, Tensor] | None]:
        """What one site's module is given and gives for each batch, None for a batch that does not reach it; passes end there."""
        found: list[tuple[Tensor, Tensor]] = []

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            found.append((args[0].detach(), output.detach()))
            raise Stop

        for i in range(len(self.hidden)):
            handle = self.site_module(module, segment, site).register_forward_hook(hook)
            try:
                with torch.no_grad(), contextlib.suppress(Stop):
                    self._through(module, segment, i)
            finally:
                handle.remove()
            yield found.pop() if found else None

    def _number(self, segment: Segment) -> int:
        return next(n for n, layer in enumerate(self.layers) if layer.name == segment.name)

    def _keep_promises(self, i: int, number: int, out: tuple[Any, ...]) -> None:
        """What a layer gave besides the hidden state goes to the layers that were handed the promise of it."""

        for later in range(number + 1, len(self.layers)):
            args, kwargs = self.handed[i][later]
            self.handed[i][later] = (_kept(args, {number: out}), _kept(kwargs, {number: out}))

    def observe(
        self, module: nn.Module, segment: Segment, sites: Sequence[Site], wants: Sequence[Statistic]
    ) -> dict[str, dict[Statistic, Tensor]]:
        """Statistics of some sites of one stage, or of stages beside one another, over all batches; a pass is cut short once what they read
        has been seen, before their own products where nothing has to be learned of these.

        What comes before a stage does not change any more once the stage is reached. Where a sub-module gives back just what its last
        site computes (attention and its output projection, say), that site's inputs are kept, and later passes over the segment start
        from them; `advance` forgets them."""
        names = {site.name for site in sites}
        observer = Observer([Stage(tuple(s for s in stage.sites if s.name in names)) for stage in segment.stages], wants)
        # what the first of a stage reads, all of it read
        first = [site for site in sites if observer.first[site.name] == site.name]
        pending: set[str] = set()
        hooks = []

        def done(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                pending.discard(name)
                if not pending:
                    raise Stop

            return hook

        for site in first:
            hooks += observer.attach(site, self.site_module(module, segment, site))
        memo = self._memo(module, segment, sites)
        if memo is not None:
            hooks += memo.hooks()
        else:
            hooks += [self.site_module(module, segment, site).register_forward_pre_hook(done(site.name)) for site in first]
        try:
            for i in range(len(self.hidden)):
                pending.update(site.name for site in first)
                with torch.no_grad(), contextlib.suppress(Stop):
                    self._through(module, segment, i)
        finally:
            for hook in hooks:
                hook.remove()
        if memo is not None:
            memo.settle()
        return {site.name: observer.finish(site) for site in sites}

    def _memo(self, module: nn.Module, segment: Segment, sites: Sequence[Site]) -> _Memo | None:
        """A memo for a stage of one site inside a sub-module, where its inputs are small enough to be kept."""
        if len(sites) != 1 or not segment.name or "expert" in sites[0].context:
            return None
        parent, _, leaf = sites[0].name[len(segment.name) + 1 :].rpartition(".")
        rows = sum(hidden.shape[0] * hidden.shape[1] for hidden in self.hidden)
        if not parent or 4 * rows * sites[0].matrix[1] > KEPT:
            return None
        memo = _Memo(self, module.get_submodule(parent), leaf)
        self._memos.append(memo)
        return memo

    def advance(self, module: nn.Module, segment: Segment, same: Sequence[int] | None = None) -> None:
        """Moves every hidden state through the segment. same[i]: the first batch that has the very states and weights of batch i (i itself
        where none has), which is run for both."""
        for i in range(len(self.hidden)):
            if same is not None and same[i] < i and segment.gives <= 1:
                self.hidden[i] = self.hidden[same[i]]
                continue
            with torch.no_grad():
                self.hidden[i] = self._through(module, segment, i)
        self.forget()
        if any(segment.name == self.layers[numbers[-1]].name for numbers in self.stacks):
            self.through.append(list(self.hidden))

    def forget(self) -> None:
        """Kept inputs of sites are given back: what computed them has changed, or the segment is done."""
        for memo in self._memos:
            memo.forget()
        self._memos.clear()

    @staticmethod
    def site_module(module: nn.Module, segment: Segment, site: Site) -> nn.Module:
        return module.get_submodule(site.name[len(segment.name) + 1 :] if segment.name else site.name)

    def logits(self, head: Callable[[Tensor], Tensor] | None = None) -> Iterator[Tensor]:
        """The model's output for each batch from the hidden states after the last layer. `head` maps normed hidden states to logits
        (a held matrix); the original's own head is used when it is None, filled on demand."""
        if self.whole:
            yield from self.hidden
            return
        self._open_tail(head)
        for i, (batch, hidden) in enumerate(zip(self.batches, self.hidden, strict=True)):
            # never across a yield: a generator left half-way would keep gradients off for everyone
            with torch.no_grad():
                out = self._tail(batch, hidden, i)
            yield out
            # not kept while the next one is made: logits over a large vocabulary are wide
            del out

    def observe_tail(self, site: Site, wants: Sequence[Statistic]) -> dict[Statistic, Tensor]:
        """Statistics of the head over all batches, from the hidden states after the last layer."""
        self._open_tail(None)
        observer = Observer([Stage((site,))], wants)
        hooks = observer.attach(site, self.model.get_submodule(self.head_name()))
        with torch.no_grad():
            for batch, hidden in zip(self.batches, self.hidden, strict=True):
                for i in range(batch.shape[0]):
                    self._tail_one(batch, hidden, i)
        for hook in hooks:
            hook.remove()
        return observer.finish(site)

    def _tail_one(self, batch: Tensor, hidden: Tensor, i: int) -> Tensor:
        """Logits of one sequence of a batch; what the layers were handed is left as it was."""
        return self._tail(batch[i : i + 1], hidden[i : i + 1])

    def observe_rest(self, after: int, sites: Sequence[Site], wants: Sequence[Statistic]) -> dict[str, dict[Statistic, Tensor]]:
        """Statistics of sites outside the layers that run once `after` stacks were gone through, before the next is entered."""
        observer = Observer([Stage((site,)) for site in sites], wants)
        hooks = [hook for site in sites for hook in observer.attach(site, self.model.get_submodule(site.name))]
        following = self._stands[self.stacks[after][0]] if after < len(self.stacks) else None
        if following is not None:
            following.first = True
        try:
            for i, batch in enumerate(self.batches):
                with torch.no_grad(), self._answers(i), contextlib.suppress(Stop):
                    self.model(batch, **self._plain)
        finally:
            if following is not None:
                following.first = False
            for hook in hooks:
                hook.remove()
        return {site.name: observer.finish(site) for site in sites}

    def _open_tail(self, head: Callable[[Tensor], Tensor] | None) -> None:
        if not self._embeds():
            return
        name = self.head_name()
        if head is None and name:
            module = self.model.get_submodule(name)
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.numel() > WIDE:
                tied: Mapping[str, str] = self.source.tied  # type: ignore[attr-defined]
                bias = None
                if getattr(module, "bias", None) is not None:
                    bias = self.source.read(tied.get(f"{name}.bias", f"{name}.bias")).float()  # type: ignore[attr-defined]
                head = self._wide_head(tied.get(f"{name}.weight", f"{name}.weight"), weight.shape[0], weight.shape[1], bias)
        if head is not None and name:
            self._put(name, Call(head))
            self._fill_rest(skip={name})
        else:
            self._fill_rest(skip=set())

    def _wide_head(self, stored: str, n: int, m: int, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """The product with a head too large to be held in fp32: its rows are read a chunk at a time."""
        step = max(1, WIDE // 4 // m)
        form = self.source.packed(stored) if hasattr(self.source, "packed") else None
        feed = None if form is None else form.feed

        def product(x: Tensor) -> Tensor:
            x = x if feed is None else feed(x)
            out = torch.empty(*x.shape[:-1], n)
            for start in range(0, n, step):
                stop = min(start + step, n)
                rows = self.source.read_rows(stored, start, stop).float()  # type: ignore[attr-defined]
                out[..., start:stop] = F.linear(x, rows)
            return out

        def differentiable(x: Tensor) -> Tensor:
            y: Tensor = _Chunked.apply(x, product, lambda grad: self._wide_back(stored, n, step, grad))  # type: ignore[no-untyped-call]
            return y if bias is None else y + bias

        return differentiable

    def _wide_back(self, stored: str, n: int, step: int, grad: Tensor) -> Tensor:
        """grad (..., n) times the head's rows -> (..., m)."""
        total: Tensor | None = None
        for start in range(0, n, step):
            stop = min(start + step, n)
            part = grad[..., start:stop] @ self.source.read_rows(stored, start, stop).float()  # type: ignore[attr-defined]
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def head_name(self) -> str:
        """The module path of the output head."""
        for site in self.rest.sites:
            if isinstance(site.kind, Embedding):
                if tied := site.roles.get("tied"):
                    return tied
            else:
                return site.name
        return ""

    def _fill_rest(self, skip: set[str]) -> None:
        """Weights outside the layers: norms, and the head unless it was given."""
        for name, module in self.model.named_modules():
            own = list(module.named_parameters(recurse=False)) + list(module.named_buffers(recurse=False))
            skipped = any(name == other or name.startswith(f"{other}.") for other in skip if other)
            if skipped or isinstance(module, (_StandIn, FewRows, Call)) or not any(p.is_meta for _, p in own):
                continue
            self.source.fill(module, name, torch.float32)

    def _tail(self, batch: Tensor, hidden: Tensor, i: int | None = None) -> Tensor:
        """The model's output from the hidden states after the last layer; `i` is the batch's number where earlier stacks answer too."""
        with self._answers(i, hidden):
            if i is not None:
                self.ready(i)
            with narrowly(self.narrow):
                return answer_of(self.model(batch, **self._plain))

    def backward(
        self, wants: Sequence[Statistic], generator: torch.Generator, log: Callable[[int, int], None]
    ) -> Iterator[tuple[Segment, nn.Module, dict[str, dict[Statistic, Tensor]]]]:
        """Forward through all segments, then back: yields each segment (last first) with its filled module and the statistics of its
        sites, gradients of the log-likelihood of labels drawn from the model itself included. Layer inputs are kept on the shelf."""
        if self.whole:
            yield self._backward_whole(wants, generator)
            return
        shelf = self.shelf or Shelf(Path())
        self.enter(0)
        total = 2 * len(self.layers) + 1
        for number, segment in enumerate(self.layers):
            for i, hidden in enumerate(self.hidden):
                shelf.put(f"{number}-{i}", hidden)
            module = self.take(segment)
            self.advance(module, segment)
            release(module)
            log(number + 1, total)
        observer = Observer([Stage((site,)) for site in self.rest.sites], wants)
        stats, grads = self._backward_tail(observer, generator)
        log(len(self.layers) + 1, total)
        for number in reversed(range(len(self.layers))):
            segment = self.layers[number]
            module = self.take(segment)
            watch = Observer(segment.stages, wants)
            watch.rows = sum(hidden.shape[0] * hidden.shape[1] for hidden in self.hidden)
            hooks = [hook for site in segment.sites for hook in watch.attach(site, self.site_module(module, segment, site))]
            for i in range(len(self.batches)):
                hidden = shelf.get(f"{number}-{i}").detach().requires_grad_(True)
                run_layer(module, hidden, self.handed[i][number]).backward(grads[i])
                grads[i] = hidden.grad  # type: ignore[assignment]
                shelf.drop(f"{number}-{i}")
            for hook in hooks:
                hook.remove()
            log(2 * len(self.layers) + 1 - number, total)
            yield segment, module, {site.name: watch.finish(site) for site in segment.sites}
            release(module)
        # the gradient at the embedding's output closes the walk
        for site in self.rest.sites:
            if isinstance(site.kind, Embedding):
                for batch, grad in zip(self.batches, grads, strict=True):
                    observer._offer(site, "x", Seen(x=batch, routing=torch.empty(0)))
                    observer._offer(site, "grad", Seen(grad=grad.reshape(-1, grad.shape[-1]), routing=torch.empty(0)))
                stats[site.name].update(observer.finish(site))
        yield self.rest, self.model, stats

    def _backward_tail(self, observer: Observer, generator: torch.Generator) -> tuple[dict[str, dict[Statistic, Tensor]], list[Tensor]]:
        self._open_tail(None)
        head = self.head_name()
        owner = next((site for site in self.rest.sites if site.name == head or site.roles.get("tied") == head), None)
        hooks = observer.attach(owner, self.model.get_submodule(head)) if owner is not None else []
        grads = []
        for batch, hidden in zip(self.batches, self.hidden, strict=True):
            # one sequence at a time: logits over a large vocabulary are the widest tensor of the walk
            rows = []
            for one, state in zip(batch, hidden, strict=True):
                state = state[None].detach().requires_grad_(True)
                logits = self._tail(one[None], state)
                drawn_loss(logits, generator).backward()
                rows.append(state.grad)
            grads.append(torch.cat(rows))  # type: ignore[arg-type]
        for hook in hooks:
            hook.remove()
        return {site.name: observer.finish(site) for site in self.rest.sites}, grads

    def _backward_whole(
        self, wants: Sequence[Statistic], generator: torch.Generator
    ) -> tuple[Segment, nn.Module, dict[str, dict[Statistic, Tensor]]]:
        module = self.take(self.rest)
        observer = Observer([Stage((site,)) for site in self.rest.sites], wants)
        hooks = []
        tables = [module.get_submodule(site.name).get_parameter("weight") for site in self.rest.sites if isinstance(site.kind, Embedding)]
        for weight in tables:
            # what depends on a table alone (the texts of a zero-shot classifier) has gradients too
            weight.requires_grad_(True)
        for site in self.rest.sites:
            table = isinstance(site.kind, Embedding)
            hooks += observer.attach(site, self.site_module(module, self.rest, site), table=table)
            # a table that is a head too is seen as one
            heads = [module.get_submodule(path) for path in site.context.get("tied", ()) if table]
            hooks += [hook for inner in heads if isinstance(inner, nn.Linear) for hook in observer.attach(site, inner)]
        for batch in self.batches:
            inputs = batch.detach()
            if inputs.is_floating_point():
                inputs.requires_grad_(True)
                drawn_loss(answer_of(module(inputs, **self._plain)), generator).backward()
            else:
                with torch.enable_grad():
                    for parameter in module.parameters():
                        parameter.requires_grad_(True)
                    drawn_loss(answer_of(module(inputs, **self._plain)), generator).backward()
                    module.zero_grad(set_to_none=True)
        for hook in hooks:
            hook.remove()
        for weight in tables:
            weight.requires_grad_(False)
            weight.grad = None
        return self.rest, module, {site.name: observer.finish(site) for site in self.rest.sites}


class _Chunked(torch.autograd.Function):
    """A linear function given as two products, so that neither direction holds the matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return product(x.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grads[0]), None, None


class Call(nn.Module):
    """A plain function where the model expects a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        # models ask for the dtype of their head's weight (Mamba)
        self.weight = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def drawn_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Summed negative log-likelihood of labels drawn from the model's own distribution: its gradient's second moment is the Fisher
    information, the curvature of KL(original || changed) at the original."""
    logits = logits.reshape(-1, logits.shape[-1]).float()
    with torch.no_grad():
        labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, labels, reduction="sum")


PRICING: tuple[Statistic, ...] = (Gram(), Fisher(), Lookups(), LookupFisher())


def observed(stats: Mapping[str, Mapping[Statistic, Tensor]], site: Site, wants: Sequence[Statistic]) -> dict[Statistic, Tensor]:
    """The wanted statistics of one site, an error naming it where one is missing; those of an expert that no token reached are zero."""
    have = stats.get(site.name, {})
    if "expert" in site.context and not have:
        return {s: s.finish(s.init(site)) for s in wants}
    missing = [type(s).__name__ for s in wants if s not in have]
    if missing:
        raise KeyError(f"{site.name} has no {', '.join(missing)}: it saw no input in calibration")
    return {s: have[s] for s in wants}


def as_if_once(stats: Mapping[str, Mapping[Statistic, Tensor]], segment: Segment, site: Site, rows: int) -> dict[Statistic, Tensor]:
    """What an expert that no token reached is priced with: as if one token out of `rows` had reached it, an average one of its layer's.
    Without it the expert would look free to damage."""
    part = site.roles["part"]
    others = [stats[s.name] for s in segment.sites if "expert" in s.context and s.roles["part"] == part and stats.get(s.name)]
    if not others:
        return {}
    gram, fisher = torch.zeros_like(others[0][Gram()]), torch.zeros_like(others[0][Fisher()])
    for found in others:
        gram += found[Gram()]
        fisher += found[Fisher()]
    return {Gram(): gram / len(others), Fisher(): fisher / (max(1, site.context["chosen"]) * rows)}
