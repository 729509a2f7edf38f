"""Rows of the quality table, which of them counts at a budget point, and the page that a human reads. No torch here.

A row is a dict: panel, tool, setting, command and, where it ran, bytes, bits, bytes_stored, bits_stored and the measured keys; where it
could not, `reason`. bits: of the block linears (panel a) or of the file (panel b), counted in the peer's favour: see `least_bytes`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

POINTS = (4.25, 3.25, 2.25)
# how far above a point a row may lie and still count there, in bits
TOLERANCE = 0.02
PANELS = {
    "a": "bits over the block linears; embedding, head and norms stay bf16 in every tool",
    "b": "bits over all parameters, by the bytes of the weight file; everything quantized that the tool can",
}
TITLES = {
    "laconic auto": "laconic `auto`",
    "laconic gptq": "laconic `gptq`",
    "laconic rtn": "laconic `rtn` (round to nearest)",
    "hqq": "HQQ",
    "autoround": "AutoRound",
    "gptqmodel": "GPTQModel",
    "llamacpp": "llama.cpp, importance matrix",
}
BASELINE = "laconic rtn"

Row = dict[str, Any]


def is_ours(tool: str) -> bool:
    """Whether a row's tool is one of our recipes."""
    return tool.startswith("laconic")


def title(tool: str) -> str:
    """How a tool is named on the page."""
    return TITLES.get(tool, tool)


def least_bytes(stored: int, shapes: Mapping[str, Sequence[int]], skipped: Iterable[str], bits: int, group: int, symmetric: bool) -> int:
    """Bytes of block linears without padding of codes, zero points of symmetric formats and group indices: codes, a 2-byte scale a group,
    a zero of `bits` a group where there are zeros; skipped layers at 2 bytes a weight. Never more than what is stored."""
    left_out = set(skipped)
    total = 0
    for name, (n, m) in shapes.items():
        groups = n * -(-m // group)
        zeros = 0 if symmetric else groups * bits
        total += 2 * n * m if name in left_out else -(-(n * m * bits + zeros) // 8) + 2 * groups
    return min(stored, total)


def fits(row: Row, point: float, count: str = "bits") -> bool:
    """Whether a row ran and is no larger than a point allows."""
    return "kl_mean" in row and row[count] <= point + TOLERANCE


def best(rows: Iterable[Row], tool: str, panel: str, point: float, count: str = "bits") -> Row | None:
    """The row of least KL of a tool at equal or fewer bytes than the point."""
    found = [row for row in rows if row["tool"] == tool and row["panel"] == panel and fits(row, point, count)]
    return min(found, key=lambda row: row["kl_mean"], default=None)


def tools(rows: Iterable[Row], panel: str) -> list[str]:
    """Tools of a panel that have a line of their own, known ones first, in the order of the titles."""
    found = {row["tool"] for row in rows if row["panel"] == panel}
    return [tool for tool in TITLES if tool in found]


def ahead(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every point and way of counting at which a peer's best row has a lower KL than ours; collapsed rows compare nothing."""
    found = []
    for panel in PANELS:
        for count in ("bits", "bits_stored"):
            for point in POINTS:
                here = [r for tool in tools(rows, panel) if (r := best(rows, tool, panel, point, count))]
                ours = min((r["kl_mean"] for r in here if is_ours(r["tool"])), default=None)
                for row in here:
                    if is_ours(row["tool"]) or row.get("collapsed") or (ours is not None and row["kl_mean"] >= ours):
                        continue
                    found.append({"panel": panel, "point": point, "count": count, "tool": row["tool"], "setting": row["setting"],
                                  "kl_mean": row["kl_mean"], "ours": ours})  # fmt: skip
    return found


# ---- the page


def number(value: float) -> str:
    """Three figures that mean something, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def cell(row: Row | None, strong: bool) -> str:
    """KL (perplexity, top-1) at the bits of the row."""
    if row is None:
        return "none this small"
    kl = f"**{number(row['kl_mean'])}**" if strong else number(row["kl_mean"])
    fallen = ", collapsed" if row.get("collapsed") else ""
    return f"{kl} ({number(row['perplexity'])}, {row['top1_agreement']:.0%}{fallen}) at {row['bits']:.2f}"


def table(rows: Sequence[Row], panel: str, count: str = "bits") -> list[str]:
    """One line a tool, one column a point."""
    lines = ["| tool | " + " | ".join(f"{point:g} bits" for point in POINTS) + " |", "| --- |" + " --- |" * len(POINTS)]
    named = tools(rows, panel)
    chosen = {tool: [best(rows, tool, panel, point, count) for point in POINTS] for tool in named}
    leaders = [min((row["kl_mean"] for c in chosen.values() if (row := c[i])), default=None) for i in range(len(POINTS))]
    for tool in named:
        if any("kl_mean" in row for row in rows if row["tool"] == tool and row["panel"] == panel):
            shown = [{**row, "bits": row[count]} if row else None for row in chosen[tool]]
            cells = [cell(row, row is not None and row["kl_mean"] == top) for row, top in zip(shown, leaders, strict=True)]
        else:
            cells = ["could not run"] * len(POINTS)
        lines.append(f"| {title(tool)} | " + " | ".join(cells) + " |")
    return lines


def processors(rows: Sequence[Row]) -> list[str]:
    """On what rows were made, as far as they say."""
    return sorted({row["processor"] for row in rows if "processor" in row})


def listing(rows: Sequence[Row], panel: str) -> list[str]:
    """Every row that ran, by size then KL; minutes with the number of their machine where there are several."""
    machines = processors(rows)
    lines = [
        "| tool | setting | bits | bits stored | KL (95 % interval) | perplexity | same top-1 | minutes | peak MB | skipped layers |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    ran = [row for row in rows if row["panel"] == panel and "kl_mean" in row]
    for row in sorted(ran, key=lambda row: (-row["bits"], row["kl_mean"])):
        # a single test sequence has no interval
        ends = f" ({number(row['kl_mean_low'])} to {number(row['kl_mean_high'])})" if "kl_mean_low" in row else ""
        fallen = ", collapsed" if row.get("collapsed") else ""
        where = f" ({machines.index(row['processor']) + 1})" if len(machines) > 1 and "processor" in row else ""
        lines.append(
            f"| {title(row['tool'])} | {row['setting']} | {row['bits']:.3f} | {row['bits_stored']:.3f} | {number(row['kl_mean'])}{ends} "
            f"| {number(row['perplexity'])} | {row['top1_agreement']:.1%}{fallen} | {row['seconds'] / 60:.2f}{where} "
            f"| {row['peak_memory_bytes'] / 1e6:.0f} | {len(row.get('skipped_layers', ())) or ''} |"
        )
    return lines


def refusals(rows: Sequence[Row]) -> list[str]:
    """Tool, reason and the settings it holds for."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "reason" in row:
            grouped.setdefault((row["tool"], row["reason"]), []).append(f"{row['setting']} (panel {row['panel']})")
    return [f"- {title(tool)}: {reason} [{'; '.join(settings)}]" for (tool, reason), settings in grouped.items()]


def sentences(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where a peer is ahead, a line each."""
    ways = {"bits": "counted in the peers' favour", "bits_stored": "counted as stored"}
    return [
        f"- panel {one['panel']}, {one['point']:g} bits, {ways[one['count']]}: {title(one['tool'])} ({one['setting']}) reaches "
        f"{number(one['kl_mean'])} nats a token, laconic "
        + (f"{number(one['ours'])}" if one["ours"] is not None else "has nothing this small")
        for one in found
    ]


def page(result: Mapping[str, Any], why: str | None) -> str:
    """quality.md."""
    rows = result["rows"]
    model, data, machine = result["model"], result["data"], result["hardware"]
    seen = f", trained on {model['tokens_seen']:,} tokens" if model.get("tokens_seen") else ""
    threads = sorted({row["threads"] for row in rows if "threads" in row}) or [machine["threads"]]
    machines = processors(rows) or [machine["processor"]]
    numbered = ", ".join(f"({at}) {name}" for at, name in enumerate(machines, 1))
    where = f"Machine: {machines[0]}" if len(machines) == 1 else f"Machines: {numbered}"
    before = f"; perplexity of the original {number(result['perplexity_original'])}" if result.get("perplexity_original") else ""
    lines = [
        "# Quality against other tools",
        "",
        f"Model {model['name']}: {model['parameters']:,} parameters, {model['linears']:,} of them in block linears{seen}{before}.",
        f"Calibration: {data['calibrate']['rows']} x {data['length']} tokens, the same for every tool; test: {data['certify']['rows']} x "
        f"{data['length']} tokens that no tool saw, one evaluator for all (KL of the original to the compressed model in nats a token).",
        f"{where}; threads of each tool: {' or '.join(map(str, threads))}.",
        "",
        "A cell: KL (perplexity, same top-1 choice) at the bits used. At each point a tool's best row at equal or fewer bytes counts "
        f"({TOLERANCE:g} bits of tolerance); bold is the best of the column.",
    ]
    if again := result.get("confirmed"):
        lines += [
            "",
            "Code around our methods has changed since our rows were made. The present code made these again, with the same figures to the "
            f"last digit: {'; '.join(again)}.",
        ]
    if result["quick"] or data["calibrate"]["rows"] < 128:
        lines += ["", "**A reduced run: fewer rows or settings than the table asks for. These figures decide nothing.**"]
    for panel in result["panels"]:
        lines += ["", f"## Panel {panel}: {PANELS[panel]}", ""]
        if panel == "a":
            lines += [
                "Sizes are counted in the peers' favour: no padding of codes, no zero points of symmetric formats, no group indices. "
                "The same table by the bytes that each tool really stores stands below the listings.",
                "",
            ]
        lines += table(rows, panel)
    lines += ["", "## Where a peer is ahead, and why", ""]
    found = ahead(rows)
    lines += sentences(found) or ["Nowhere in these rows."]
    if why:
        lines += ["", why.strip()]
    elif found:
        lines += ["", "Why is not written down yet (`bench/results/why.md`)."]
    for panel in result["panels"]:
        lines += ["", f"## All rows of panel {panel}", "", *listing(rows, panel)]
    if "a" in result["panels"]:
        lines += ["", "## Panel a by the bytes stored", "", *table(rows, "a", "bits_stored")]
    if missing := refusals(rows):
        lines += ["", "## What could not run", "", *missing]
    lines += ["", "## Versions and commands", ""]
    lines += [f"- {name} {version}" for name, version in result["versions"].items()]
    lines += ["", "MODEL is the model's folder, TOKENS the file that `python -m bench.quality --tokens TOKENS` writes.", "", "```"]
    lines += list(dict.fromkeys(row["command"] for row in rows if row.get("command")))
    lines += ["```", ""]
    return "\n".join(lines)
