"""The command line. Everything heavy is imported inside the command that needs it, so that help comes at once."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from laconic import __version__
from laconic.core.errors import BrokenPromise, UserError

if TYPE_CHECKING:
    from rich.table import Table

FIRST = """laconic: say the same with fewer weights.

Three first commands:
  laconic compress --budget bits=4.25 -o out      make the embedded model smaller and prove what is left
  laconic report out                              see it as one page
  laconic generate out --prompt "def main("       run it

`laconic --help` shows the rest."""

app = typer.Typer(
    name="laconic",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# ---- how a command talks


class Voice:
    """Progress and log of a command, on stderr: bars on a terminal, else plain lines; stdout is left to the answer."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._last = ("", 0.0)

    def __enter__(self) -> Voice:
        if self.live:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description:<12}"),
                BarColumn(28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bars = Progress(*columns, console=Console(stderr=True, highlight=False))
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def progress(self, stage: str, done: int, total: int, note: str) -> None:
        """One step of a stage."""
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total, note="")
            self._bars.update(self._tasks[stage], completed=done, total=total, note=note[:60])
            return
        now = time.monotonic()
        # at most a line in two seconds, but every stage's first and last
        if stage != self._last[0] or done == total or now - self._last[1] > 2:
            self._last = (stage, now)
            print(f"{stage} {done}/{total}" + (f" {note}" if note else ""), file=sys.stderr, flush=True)

    def log(self, line: str) -> None:
        """One sentence."""
        if self._bars is not None:
            self._bars.console.print(line, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)


def _end(line: str, code: int) -> NoReturn:
    print(line, file=sys.stderr, flush=True)
    raise typer.Exit(code)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Exceptions as one sentence and an exit code: 1 a broken promise or a defect, 2 the user's input, 130 interrupted."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        debug = kwargs.get("debug", False)
        try:
            command(*args, **kwargs)
        except UserError as error:
            _end(f"error: {error}", 2)
        except BrokenPromise as error:
            _end(f"broken promise: {error}", 1)
        except KeyboardInterrupt:
            again = "; the same command goes on where it stood" if command.__name__ in ("compress", "plan", "verify") else ""
            _end(f"interrupted{again}", 130)
        except (typer.Exit, BrokenPipeError):
            raise
        except MemoryError:
            if debug:
                raise
            _end("error: not enough memory; close other programs, or use a smaller model or fewer rows of data", 2)
        except Exception as error:
            if debug:
                raise
            first = str(error).split("\n")[0]
            _end(f"error: {type(error).__name__}: {first}; this is a defect in laconic, run again with --debug to see where", 1)

    return run


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def _table(title: str, *columns: str, words: int = 1) -> Table:
    """A table whose first `words` columns are words and whose others are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < words else "right", overflow="fold")
    return table


def _show(table: Table) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 120
    Console(width=width, highlight=False, markup=False).print(table)


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _next(*commands: str) -> None:
    print("Next:")
    for command in commands:
        print(f"  {command}")


def _later(flag: str, value: object) -> None:
    if value is not None:
        raise UserError(f"{flag} {value}: not yet; leave it out")


# ---- options that several commands share

ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Folder, hub id or package.module:function; nothing: the embedded model.", show_default=False),
]
FolderArgument = Annotated[str, typer.Argument(metavar="FOLDER", help="What `laconic compress` wrote.", show_default=False)]
DataOption = Annotated[
    str | None, typer.Option("--data", help="Text (.txt, .jsonl, .gz of them, a folder) or package.module:function.", show_default=False)
]
CertifyOption = Annotated[str | None, typer.Option("--data-certify", help="Separate data for the final measurement.", show_default=False)]
BudgetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--budget", "-b", help="size=25%, size=120MB (10^6), size=120MiB (2^20) or bits=4.25; several all hold.", show_default=False
    ),
]
CutOption = Annotated[
    list[str] | None,
    typer.Option("--budget", "-b", help="Cut an elastic result (recipe bitstack, matformer) to size=2MB, bits=3 ...", show_default=False),
]
InputsOption = Annotated[
    int | None,
    typer.Option("--inputs", help="8: inputs of products with codes are rounded to 8 bits; faster prompts.", show_default=False),
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="auto (default), another of the README's, or a YAML file.", show_default=False)
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of the data split and of all chance (0).", show_default=False)]
AgainstOption = Annotated[
    str | None, typer.Option("--against", help="The original; default: what the certificate names.", show_default=False)
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
JsonOption = Annotated[bool, typer.Option("--json", help="The answer as JSON on stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of a defect.", hidden=True)]
MemoryOption = Annotated[str | None, typer.Option("--max-memory", help="Not yet.", show_default=False, hidden=True)]


def _examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"laconic {__version__}")
        raise typer.Exit


@app.callback(
    invoke_without_command=True,
    epilog=_examples(
        "laconic compress --budget bits=4.25 -o out",
        "laconic compress MODEL --data my.jsonl --budget size=25% -o out",
        "laconic report out",
    ),
)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Say the same with fewer weights: the best smaller model within a budget, with proof."""
    if context.invoked_subcommand is None:
        print(FIRST)


# ---- the main job


@app.command(
    epilog=_examples(
        "laconic compress --budget bits=4.25 -o out",
        "laconic compress ./my-model --data texts.jsonl --budget size=25% -o out",
        "laconic compress ./my-model --budget bits=4.5 --recipe rtn -o out",
        "laconic compress --plan plan.json -o out",
        "laconic compress my.module:resnet --data my.module:images --budget bits=4 -o out",
    )
)
@guarded
def compress(
    model: ModelArgument = None,
    budget: BudgetOption = None,
    plan: Annotated[
        str | None, typer.Option("--plan", help="A plan.json of `laconic plan`, in place of --budget.", show_default=False)
    ] = None,
    recipe: RecipeOption = None,
    data: DataOption = None,
    data_certify: CertifyOption = None,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write.")] = "out",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder, once the new result is finished.")] = False,
    seed: SeedOption = None,
    device: DeviceOption = "cpu",
    max_memory: MemoryOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a model smaller within a budget, with proof."""
    _later("--max-memory", max_memory)
    if not budget and plan is None and recipe is None:
        raise UserError("no budget given; add --budget size=25% (or size=120MB, or bits=4.25), or --plan plan.json")
    from laconic import api

    with Voice() as voice:
        made = api.compress(
            model,
            data,
            budget=budget,
            plan=plan,
            recipe=recipe,
            out=out,
            data_certify=data_certify,
            seed=seed,
            overwrite=overwrite,
            device=device,
            progress=voice.progress,
            log=voice.log,
        )
    if as_json:
        _print_json({"out": str(made.path), "certificate": made.certificate, "measurements": made.measurements})
        return
    if "dims" in made.certificate:
        _show(vectors_table(out, made.certificate))
        _next(f"laconic measure {out} --json")
        return
    _show(result_table(out, made.certificate, made.measurements))
    run = f"laconic generate {out} --prompt ..." if "perplexity" in made.certificate["quality"] else f"laconic verify {out}"
    _next(f"laconic report {out}", run, f"laconic measure {out} --json")


@app.command(
    epilog=_examples(
        "laconic select pool.jsonl --like mine.jsonl --budget examples=1000 -o chosen.jsonl",
        "laconic select texts/ --like mine.txt --budget size=2MB -o chosen.jsonl",
        "laconic compress ./my-model --data chosen.jsonl --budget size=25% -o out",
    )
)
@guarded
def select(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Text to choose from (.txt, .jsonl, .gz of them, a folder).")],
    like: Annotated[str, typer.Option("--like", help="A sample of what is wanted, in the same forms.")],
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", "-b", help="examples=1000, size=2MB or size=10% of the pool; several all hold.", show_default=False),
    ] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="File to write.")] = "selected.jsonl",
    score: Annotated[str, typer.Option("--score", help="What a document is worth.")] = "select.score.dsir",
    search: Annotated[str, typer.Option("--search", help="How documents are bought.")] = "search.sample.gumbel",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Choose documents of a pool that read like a sample of what is wanted."""
    from laconic import api

    with Voice() as voice:
        found = api.select(
            pool, like, budget=budget or (), out=out, score=score, search=search, seed=seed or 0, overwrite=overwrite,
            progress=voice.progress, log=voice.log,
        )  # fmt: skip
    if as_json:
        _print_json({"out": out} | found)
        return
    table = _table(f"{out}: {pool} like {like}", "", "pool", "chosen")
    table.add_row("documents", f"{found['documents']:,}", f"{found['chosen']:,}")
    table.add_row("text", _bytes(found["bytes_pool"]), _bytes(found["bytes"]))
    table.add_row("KL of the sample to it, nats/feature", f"{found['kl_pool']:.3f}", f"{found['kl_chosen']:.3f}")
    _show(table)
    _next(f"laconic compress MODEL --data {out} --budget size=25% -o out")


@app.command(
    epilog=_examples("laconic advise", "laconic advise ./my-model --data mine.jsonl --also wiki.txt --also code.jsonl --budget bits=3.25")
)
@guarded
def advise(
    model: ModelArgument = None,
    data: DataOption = None,
    also: Annotated[
        list[str] | None,
        typer.Option("--also", help="Other data to calibrate on, to compare with; may be given again.", show_default=False),
    ] = None,
    budget: BudgetOption = None,
    recipe: Annotated[str, typer.Option("--recipe", help="What is tried: a recipe that rounds.")] = "gptq",
    seed: SeedOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """What to calibrate on: how much, how long, whose.

    One plan carried out with fewer rows, shorter rows, other data and none, each measured on held-out text of --data."""
    from laconic import advice, api

    with Voice() as voice:
        found = api.advise(
            model, data, also=also or (), budget=budget or "bits=4.25", recipe=recipe, seed=seed or 0, device=device,
            progress=voice.progress, log=voice.log,
        )  # fmt: skip
    if as_json:
        _print_json(found)
        return
    title = f"{found['recipe']}, {' '.join(found['budget'])}: KL on held-out text, nats a prediction"
    table = _table(title, "data", "rows", "tokens a row", "KL", "more than all of yours")
    for one in found["tried"]:
        more = f"{one['more']:+.4f} ({one['more_low']:+.4f} to {one['more_high']:+.4f})" if one is not found["tried"][0] else ""
        table.add_row(
            advice.called(one["data"]), f"{one['rows']:,}", f"{one['length']:,}" if one["length"] else "", f"{one['kl']:.4g}", more
        )
    _show(table)
    for sentence in found["advice"]:
        print(sentence)
    _next("laconic compress MODEL --data FILE --budget size=25% -o out")


def vectors_table(out: str, certificate: Mapping[str, Any]) -> Table:
    """What became of a file of vectors."""
    quality, model = certificate["quality"], certificate["model"]
    table = _table(f"{out}: {model['spec']}, {' '.join(certificate['budget']['words'])}", "", "before", "after")
    table.add_row("numbers of each vector", f"{model['width']:,}", f"{certificate['dims']:,}")
    table.add_row("stored bytes (16 bits a number)", _bytes(certificate["bytes_original"]), _bytes(certificate["bytes"]))
    low, high = quality["recall_low"], quality["recall_high"]
    table.add_row(f"recall at {quality['k']}, held-out queries", "1", f"{quality['recall']:.4f} (95 %: {low:.4f} to {high:.4f})")
    for one in quality["sizes"][:-1]:
        table.add_row(f"cut to {one['dims']} when it is loaded", "", f"{one['recall']:.4f}, {_bytes(one['bytes'])}")
    return table


def _load_words(load: Mapping[str, Any]) -> str:
    """Expected and worst cost of what depends on the input."""
    mean, most = load["expected"] / load["dense"], load["worst"] / load["dense"]
    return f"{load['expected']:,.0f} on average ({mean:.1%}), {load['worst']:,.0f} at most ({most:.1%})"


def result_table(out: str, certificate: Mapping[str, Any], measurements: Mapping[str, Any]) -> Table:
    """What came out, before and after."""
    quality, parameters = certificate["quality"], certificate["model"]["parameters"]
    name, words = certificate["model"].get("spec") or "the embedded model", " ".join(certificate["budget"]["words"])
    table = _table(f"{out}: {name}, {words}", "", "before", "after")
    before, after = certificate["bytes_original"], certificate["bytes"]
    table.add_row("stored bytes", f"{before:,} ({_bytes(before)})", f"{after:,} ({_bytes(after)})")
    table.add_row("bits per weight", f"{before * 8 / parameters:.3f}", f"{certificate['bits_per_weight']:.3f}")
    kl = f"{quality['kl_mean']:.5f}"
    if "kl_mean_low" in quality:
        kl += f" (95 %: {quality['kl_mean_low']:.5f} to {quality['kl_mean_high']:.5f})"
    table.add_row("KL to the original, " + ("nats/token" if "perplexity" in quality else "nats/sample"), "0", kl)
    if "perplexity" in quality:
        table.add_row("perplexity", f"{quality['perplexity_original']:.4f}", f"{quality['perplexity']:.4f}")
    if "accuracy" in quality:
        table.add_row("accuracy", f"{quality['accuracy_original']:.2%}", f"{quality['accuracy']:.2%}")
    table.add_row("same first choice", "100 %", f"{quality['top1_agreement']:.2%}" + (" (collapsed)" if quality.get("collapsed") else ""))
    if (load := certificate.get("multiplications")) is not None:
        table.add_row(load["unit"], f"{load['dense']:,.0f}", _load_words(load))
    reload = certificate["reload"]
    table.add_row("read back and compared", "", f"{'same' if reload['ok'] else 'DIFFERS'} (difference {reload['difference']:.1e})")
    seconds = measurements.get("seconds", {}).get("total")
    if seconds is not None:
        table.add_row("time and peak memory", "", f"{seconds:.0f} s, {_bytes(measurements['peak_memory_bytes'])}")
    return table


@app.command(
    epilog=_examples("laconic plan --budget bits=4.25 -o plan.json", "laconic plan ./my-model --data texts.jsonl --budget size=25% --json")
)
@guarded
def plan(
    model: ModelArgument = None,
    budget: BudgetOption = None,
    recipe: RecipeOption = None,
    data: DataOption = None,
    data_certify: CertifyOption = None,
    out: Annotated[str, typer.Option("--out", "-o", help="File to write.")] = "plan.json",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    seed: SeedOption = None,
    device: DeviceOption = "cpu",
    max_memory: MemoryOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Preflight and price list only.

    What would be done where, at which price; `compress --plan` takes the file."""
    _later("--max-memory", max_memory)
    if not budget and recipe is None:
        raise UserError("no budget given; add --budget size=25% (or size=120MB, or bits=4.25)")
    from laconic import api

    with Voice() as voice:
        made = api.plan(
            model,
            data,
            budget=budget,
            recipe=recipe,
            data_certify=data_certify,
            seed=seed,
            out=out,
            overwrite=overwrite,
            device=device,
            progress=voice.progress,
            log=voice.log,
        )
    if as_json:
        _print_json(made)
        return
    table = _table(
        f"{out}: {len(made['choices'])} choices from a list of {len(made['menu'])}", "where", "how", "level", "bytes", "damage", words=3
    )
    for choice in made["choices"]:
        damage = choice["damage"]["value"]
        level = " ".join(f"{key}={value}" for key, value in choice["level"].items())
        table.add_row(choice["site"], choice["method"], level, f"{choice['bytes']:,}", "" if damage is None else f"{damage:.3g}")
    if made["choices"]:
        _show(table)
    for group in made.get("cut", {}).get("groups", ()):
        print(f"cut: {group['group']} keeps {group['kept']} of {group['channels']} channels, in {', '.join(group['members'])}")
    for group in made.get("cut", {}).get("left", ()):
        print(f"not cut: {group['group']}: {group['why']}")
    for kept in made["kept"]:
        if kept["why"] == "learned in the same bytes":
            print(f"learned: {kept['tensor']}, {kept['bytes']:,} bytes, in the same bytes")
        elif "before" in kept:
            print(f"learned: {kept['tensor']}, {kept['bytes']:,} bytes in place of {kept['before']:,}, in a form of the routed part")
        elif kept["why"] != "one-dimensional":
            print(f"kept as it is: {kept['tensor']}, {kept['bytes']:,} bytes, {kept['why']}")
    for note in made["notes"]:
        print(note)
    for entry in made.get("placed", ()):
        print(f"placed: {entry['part']}, {entry['bytes']:,} bytes, by {entry['by']}")
    if (load := made.get("routed")) is not None:
        print(f"foreseen: {load['dense']:,.0f} {load['unit']} become {_load_words(load)}")
    predicted = made["predicted"]
    print(
        f"predicted: {predicted['bytes']:,} bytes, {predicted['bits_per_weight']:.3f} bits a weight,"
        f" peak memory {_bytes(predicted['peak_memory_bytes'])}"
    )
    _next(f"laconic compress --plan {out} -o out")


@app.command(
    epilog=_examples(
        "laconic measure out --json", "laconic measure out --against ./my-model --data texts.jsonl", "laconic measure out --budget size=2MB"
    )
)
@guarded
def measure(
    folder: FolderArgument,
    against: AgainstOption = None,
    data: DataOption = None,
    data_certify: CertifyOption = None,
    budget: CutOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the data split and of the intervals.")] = 0,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure speed as well.")] = True,
    inputs: InputsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Quality, bytes, speed, memory against the original.

    Each number with unit, count and spread."""
    from laconic import api

    with Voice() as voice:
        found = api.measure(
            folder,
            against,
            data,
            data_certify=data_certify,
            budget=budget,
            seed=seed,
            speed=speed,
            inputs=inputs,
            progress=voice.progress,
            log=voice.log,
        )
    if as_json:
        _print_json(found)
        return
    _show(numbers_table(f"{folder}", found))


def numbers_table(title: str, found: Mapping[str, Any]) -> Table:
    """Flat numbers with what their details say."""
    table = _table(title, "", "value", "unit", "n", "low", "high")
    details = found.get("details", {})
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        one = details.get(key, {})
        ends = [f"{one[end]:,.6g}" if isinstance(one.get(end), (int, float)) else "" for end in ("low", "high")]
        table.add_row(
            key,
            f"{value:,}" if isinstance(value, int) else f"{value:,.6g}",
            str(one.get("unit", "")),
            f"{one['n']:,}" if "n" in one else "",
            *ends,
        )
    return table


@app.command(
    epilog=_examples(
        "laconic bench out --json", "laconic bench out --prompt-tokens 512 --new-tokens 64 --record", "laconic bench out --explain"
    )
)
@guarded
def bench(
    folder: FolderArgument,
    against: AgainstOption = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of the prompt (prefill).")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "--max-tokens", help="Tokens to write (decode).")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", help="Turns of each model; the median counts.")] = 7,
    record: Annotated[bool, typer.Option("--record", help="Write the speeds into the folder's measurements.json too.")] = False,
    inputs: InputsOption = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say where the time of a token and of a prompt goes.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Prefill and decode speed, and memory.

    The result and its original take turns."""
    from laconic import api

    with Voice() as voice:
        found = api.bench(
            folder, against, prompt=prompt_tokens, new=new_tokens, repeats=repeats, record=record, inputs=inputs,
            explain=explain, progress=voice.progress, log=voice.log,
        )  # fmt: skip
    if as_json:
        _print_json(found)
        return
    table = _table(
        f"{folder}: speed on {found['hardware']['processor']}, {found['hardware']['threads']} threads", "", "original", "result", "ratio"
    )
    if "drafts_accepted" in found:
        print(drafting_line(found))
    for phase in ("prefill", "decode"):
        key = f"{phase}_tokens_per_s"
        both = []
        for value, name in ((found["original"][key], f"{key}_original"), (found[key], key)):
            one = found["details"][name]
            both.append(f"{value:,.1f} tokens/s ({one['low']:,.1f} to {one['high']:,.1f}, {one['dtype']})")
        table.add_row(phase, *both, f"{found['details'][key]['ratio']:.2f}x")
    _show(table)
    slower = [p for p in ("prefill", "decode") if found["details"][f"{p}_tokens_per_s"]["ratio"] < 1]
    if slower:
        print(f"The result is slower than the original in {' and '.join(slower)} on this machine.")
    print(f"peak memory with both models: {_bytes(found['peak_memory_bytes'])}")
    for phase, rows in found.get("steps", {}).items():
        total = sum(row["ms"] for row in rows)
        unit = "token" if phase == "decode" else f"prompt of {prompt_tokens} tokens"
        table = _table(f"{phase}: {total:,.2f} ms for a {unit}", "", "by", "times", "ms", "share", "GB/s")
        for row in rows:
            rate = f"{row['nbytes'] / row['ms'] / 1e6:,.1f}" if row["nbytes"] else ""
            table.add_row(row["what"], row["by"], str(row["times"]), f"{row['ms']:.3f}", f"{row['ms'] / total:.0%}", rate)
        _show(table)
    if explain and "steps" not in found:
        print(found["details"]["steps"]["what"])
    if found.get("picks"):
        title = "products with codes on this machine: by a kernel up to so many rows of inputs, then over dense rows"
        table = _table(title, "", "rows", "1 row: kernel, dense", "128 rows: kernel, dense")
        for way in found["picks"]:
            times = [f"{ms[0]:.3f}, {ms[1]:.3f} ms" if (ms := way["ms"].get(rows)) else "" for rows in ("1", "128")]
            table.add_row(way["product"], "all" if way["rows"] is None else str(way["rows"]), *times)
        _show(table)
    elif explain:
        print("How products with codes go was not measured here; numbers found on other processors are taken.")


def drafting_line(found: Mapping[str, Any]) -> str:
    """What a result's decoder does, in one sentence."""
    drafted, plain = found["details"]["drafted_tokens_per_s"], found["details"]["drafted_tokens_per_s_plain"]
    return (
        f"drafting, {plain['n']} held-out prompts: {found['drafts_accepted']:.1%} of drafted tokens stand, "
        f"{found['tokens_per_pass']:.2f} tokens a pass, {found['layer_passes_per_token']:.2f} layer passes a token, "
        f"{drafted['ratio']:.2f}x the speed of one by one ({found['drafted_tokens_per_s']:,.1f} tokens/s), "
        f"the same tokens in {found['drafted_same_as_plain']:.1%} of prompts"
    )


@app.command(
    epilog=_examples('laconic generate --prompt "def quicksort("', 'laconic generate out --prompt "..." --max-tokens 200 --temperature 0.8')
)
@guarded
def generate(
    model: ModelArgument = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to go on from.")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "--new-tokens", "--max-new-tokens", help="Most new tokens.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the drawing.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Leave the tokenizer's chat template out.")] = False,
    budget: CutOption = None,
    cache: Annotated[
        str | None, typer.Option("--cache", help="How the past is held: kivi:2 or cache.store.kivi(bits=2).", show_default=False)
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option("--attention", help="Which blocks of a long prompt are attended to: xattention(tau=0.9).", show_default=False),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option("--decoder", help="How tokens are drawn; decode.sample.ancestral: one by one.", show_default=False),
    ] = None,
    inputs: InputsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a result or an original: text token by token."""
    from laconic import api

    stream = api.generate(
        model, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, raw=raw, budget=budget, cache=cache, decoder=decoder,
        inputs=inputs, attention=attention, log=Voice().log,
    )  # fmt: skip
    if as_json:
        _print_json({"prompt": prompt, "text": "".join(stream)})
        return
    for piece in stream:
        print(piece, end="", flush=True)
    print()


@app.command(epilog=_examples("laconic report out", "laconic report out --plain"))
@guarded
def report(
    folder: FolderArgument,
    against: AgainstOption = None,
    plain: Annotated[bool, typer.Option("--plain", help="Only what is recorded: no speeds and generations are made now.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """One self-contained HTML page with pictures."""
    from laconic import api

    with Voice() as voice:
        page = api.report(folder, against=against, extras=not plain, progress=voice.progress, log=voice.log)
    if as_json:
        _print_json({"report": str(page)})
        return
    print(f"report: {page}")


# ---- the catalogue


@app.command("list", epilog=_examples("laconic list", "laconic list --family quantize", "laconic list --role Score --json"))
@guarded
def list_(
    family: Annotated[str | None, typer.Option("--family", help="quantize, prune, search ...", show_default=False)] = None,
    role: Annotated[str | None, typer.Option("--role", help="Transform, Score, Search ...", show_default=False)] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """The catalogue of methods, read from the code."""
    from laconic import catalogue

    found = catalogue.select(family, role)
    if as_json:
        _print_json([entry.row() for entry in found])
        return
    table = _table(f"{len(found)} methods", "name", "role", "paper", "claims", words=4)
    for entry in found:
        table.add_row(
            entry.name,
            entry.role,
            f"{entry.paper.authors} {entry.paper.year}, {entry.paper.link}",
            ", ".join(v["result"] for v in entry.verdicts),
        )
    _show(table)


@app.command(epilog=_examples("laconic show quantize.round.gptq", "laconic show prune.score.wanda --json"))
@guarded
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A method, as `laconic list` names it.", show_default=False)],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """One method: paper, formula, claims, verdicts."""
    from laconic import catalogue

    entry = catalogue.find(name)
    claims = catalogue.claims(entry.name)
    if as_json:
        _print_json({**entry.row(), "doc": entry.doc, "claims": claims, "verdicts": entry.verdicts, "exceptions": dict(entry.exceptions)})
        return
    print(f"{entry.name} ({entry.role})\n\n{entry.doc}\n\npaper: {entry.paper}\nsibling: {entry.sibling}")
    if entry.catalogue:
        print(f"catalogue: {entry.catalogue}")
    for law, reason in entry.exceptions.items():
        print(f"exception: {law}, {reason}")
    recorded = {verdict["says"]: verdict for verdict in entry.verdicts}
    for number, says in enumerate(claims, 1):
        print(f"claim {number}: {says} [{_standing(name, recorded.get(says))}]")
    if not claims:
        print("claim: none written yet")


def _standing(name: str, verdict: Mapping[str, Any] | None) -> str:
    from laconic import catalogue

    if verdict is None:
        return "no verdict recorded yet"
    stands = verdict.get("ground") == catalogue.ground(catalogue.find(name).name, verdict["scale"])
    return verdict["result"] + ("" if stands else ", found with earlier code or another model")


@app.command(epilog=_examples("laconic verify quantize.round.gptq", "laconic verify --family prune --full", "laconic verify out"))
@guarded
def verify(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME|FOLDER", help="A method, or a folder of `compress`.", show_default=False)
    ] = None,
    family: Annotated[
        str | None, typer.Option("--family", help="All methods of a family; quick, in ten minutes.", show_default=False)
    ] = None,
    full: Annotated[bool, typer.Option("--full/--quick", help="At full scale; each verdict is recorded, a stopped run goes on.")] = False,
    again: Annotated[bool, typer.Option("--again", help="With --full: also claims whose recorded verdict still stands.")] = False,
    confirm: Annotated[bool, typer.Option("--confirm", help="Recorded verdicts by their quick forms, where code has changed.")] = False,
    claim: Annotated[int | None, typer.Option("--claim", help="One claim of a method, by its number.", show_default=False)] = None,
    lab: Annotated[str | None, typer.Option("--lab", help="Folder of real data for claims (../shared/data).", show_default=False)] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check a paper's claim, or a certificate again.

    Exit code 1 where a claim fails or a certificate is not reproduced."""
    from laconic import api

    with Voice() as voice:
        found = api.verify(
            name, family=family, full=full, again=again, confirm=confirm, claim=claim, lab=lab, progress=voice.progress, log=voice.log
        )
    if as_json:
        _print_json(found)
    elif "folder" in found:
        print(f"{found['folder']}: {'reproduced' if found['reproduced'] else 'not reproduced'}, {len(found['compared'])} figures compared")
        for one in found["differences"]:
            print(f"  {one['key']}: certificate {one['recorded']:.6g}, measured {one['measured']:.6g}")
    else:
        _show_verdicts(found["methods"])
    if not found["ok"]:
        raise typer.Exit(1)


def _show_verdicts(methods: Sequence[Mapping[str, Any]]) -> None:
    for method in methods:
        for claim in method["claims"]:
            print(f"{method['name']}: {claim['result']}" + (f" ({claim['reason']})" if claim["reason"] else ""))
            print(f"  {claim['says']}")
            for key, one in claim["numbers"].items():
                print(f"  {key}: {one['value']:.6g} {one['unit']} (n = {one['n']})")
            print(f"  broken stand-in: {claim['broken']['result']}")
        for says in method["left"]:
            print(f"{method['name']}: not checked, as ten minutes were over")
            print(f"  {says}")


def main() -> None:
    """The console script."""
    if not Path.cwd().is_dir():
        print("error: the working directory does not exist any more; change to another", file=sys.stderr)
        sys.exit(2)
    app()
