"""The report page: made from realistic files, complete, self-contained, escaped, honest."""

from __future__ import annotations

import hashlib
import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from laconic import page
from laconic.core.errors import UserError
from laconic.page import Axis, Place, figure, level_words, pair_of, percent, places, render, shade, size

SHAPES = {"self_attn.q_proj": (256, 256), "self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256), "self_attn.o_proj": (256, 256),
          "mlp.gate_proj": (768, 256), "mlp.up_proj": (768, 256), "mlp.down_proj": (256, 768)}  # fmt: skip
HARM = {"q": 0.5, "k": 0.7, "v": 1.6, "o": 1.0, "gate": 0.8, "up": 1.1, "down": 2.2, "embed_tokens": 1.5}
KL = "nats per token"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sites(layers: int) -> dict[str, tuple[int, int]]:
    """Site name -> shape, in the order of the walk."""
    found = {f"model.layers.{i}.{part}": shape for i in range(layers) for part, shape in SHAPES.items()}
    return {**found, "model.embed_tokens": (4096, 256)}


def menu_of(layers: int) -> list[dict[str, Any]]:
    """Twelve grid levels by GPTQ and by rounding, three with rank, three sparse, priced as the formats count."""
    rows = []
    for at, (site, (n, m)) in enumerate(sites(layers).items()):
        part = site.rpartition(".")[2].removesuffix("_proj")
        depth = 1.0 + 1.5 * math.exp(-at / 7) + 0.7 * (at > 7 * (layers - 1))
        scale = 0.02 * HARM[part] * depth * (1 + 0.2 * math.sin(3.0 * at)) * 8 / layers

        def row(method: str, level: dict[str, Any], nbytes: float, error: float, site: str = site, scale: float = scale) -> dict[str, Any]:
            damage = {"value": scale * error, "unit": KL, "where": "output, second order"}
            return {"site": site, "covers": [f"{site}.weight"], "method": method, "level": level, "bytes": int(nbytes), "damage": damage}

        for bits in (2, 3, 4, 5, 6, 8):
            for group in (64, 128):
                grid = {"bits": bits, "group": group, "symmetric": False}
                nbytes = n * (m * bits / 8 + -(-m // group) * (2 + bits / 8))
                error = 4.0 ** (2 - bits) * (group / 64) ** 0.35
                rows.append(row("quantize.round.rtn", grid, nbytes, 1.7 * error))
                if part == "embed_tokens":
                    continue
                rows.append(row("quantize.round.gptq", grid, nbytes, error))
                if group == 128 and bits < 5:
                    rows.append(row("quantize.residual.lorc", {"first": grid, "rank": 8}, nbytes + 8 * (n + m), 0.8 * error))
                    rows.append(row("prune.cut.drop", {"keep": 0.5, "run": 4, "grid": grid}, n * m / 8 + nbytes / 2, 0.3 + error))
    return rows


def solve(menu: list[dict[str, Any]], budget: float) -> list[dict[str, Any]]:
    """The best plan on the convex hull: one price for a byte, found by halving, and the best row of each site at that price."""
    by_site: dict[str, list[dict[str, Any]]] = {}
    for row in menu:
        by_site.setdefault(row["site"], []).append(row)
    low, high = -14.0, 0.0
    for _ in range(18):
        price = 10 ** ((low + high) / 2)
        bought = [min(rows, key=lambda r: r["damage"]["value"] + price * r["bytes"]) for rows in by_site.values()]
        low, high = (low, (low + high) / 2) if sum(r["bytes"] for r in bought) <= budget else ((low + high) / 2, high)
    return [min(rows, key=lambda r: r["damage"]["value"] + 10**high * r["bytes"]) for rows in by_site.values()]


def write_run(out: Path, *, layers: int = 8, measured: bool = True, slow: bool = True, **quality: float) -> Path:
    """A finished run's JSON files, as the pipeline writes them."""
    out.mkdir(parents=True, exist_ok=True)
    menu = menu_of(layers)
    parameters = sum(n * m for n, m in sites(layers).values()) + (2 * layers + 1) * 256
    fixed = (2 * layers + 1) * 512
    pareto = []
    for bits in [2.3 + 0.25 * i for i in range(22)] if layers <= 8 else [2.5, 6]:
        chosen = solve(menu, parameters * bits / 8 - fixed)
        total = fixed + sum(r["bytes"] for r in chosen)
        pareto.append({"bytes": total, "bits_per_weight": 8 * total / parameters, "damage": sum(r["damage"]["value"] for r in chosen)})
    choices = solve(menu, parameters * 4.25 / 8 - fixed)
    total = fixed + sum(r["bytes"] for r in choices)
    damage = sum(r["damage"]["value"] for r in choices)
    kl = damage * 1.12
    kept = [{"tensor": f"model.layers.{i}.{name}_layernorm.weight", "bytes": 512, "why": "one-dimensional, kept in bf16"}
            for i in range(layers) for name in ("input", "post_attention")]  # fmt: skip
    kept += [{"tensor": "model.norm.weight", "bytes": 512, "why": "one-dimensional, kept in bf16"}]
    record = {
        "kind": "standard library modules", "python": "3.11.2", "seed": 0, "length": 512,
        **{part: {"documents": docs, "rows": rows, "tokens": rows * 512, "sha256": digest(part)}
           for part, docs, rows in (("calibrate", 42, 128), ("search", 21, 32), ("certify", 20, 64))},
    }  # fmt: skip
    recipe = {"name": "auto", "steps": [{"method": "quantize.round.gptq", "where": "*", "level": "solve"}]}
    hashes = {"model.safetensors": digest("weights"), "config.json": digest("config")}
    plan = {
        "format": 1, "laconic": "0.1.0", "recipe": recipe, "seed": 0, "data": record,
        "model": {"spec": "", "parameters": parameters, "bytes": 2 * parameters, "bf16_bytes": 2 * parameters, "hashes": hashes},
        "budget": {"words": ["bits=4.25"], "bytes": int(parameters * 4.25 / 8)},
        "choices": choices, "kept": kept, "menu": menu, "pareto": pareto,
        "notes": ["lm_head.weight is tied to model.embed_tokens.weight and is counted once.",
                  "The embedded texts were used; your own text is better: --data FILE."],
        "predicted": {"bytes": total, "bits_per_weight": 8 * total / parameters, "damage": damage, "peak_memory_bytes": 912_000_000},
        "judged": [{"plan": "solved", "bytes": total, "kl": damage * 1.08},
                   {"plan": "uniform", "bytes": int(total * 0.995), "kl": damage * 2.3}],
    }  # fmt: skip
    numbers = {
        "perplexity": 4.631, "perplexity_original": 4.512, "perplexity_p_value": 0.00021, "kl_mean": kl,
        "kl_mean_low": kl * 0.93,
        "kl_mean_high": kl * 1.08, "kl_median": kl * 0.31, "kl_p95": kl * 4.1, "kl_p99": kl * 11.8, "kl_p999": kl * 40.2,
        "top1_agreement": 0.9312,
        "bytes": total, "bytes_original": 2 * parameters, "bits_per_weight": 8 * total / parameters, **quality,
    }  # fmt: skip
    certificate = {
        "format": 1, "model": "nano", "budget": plan["budget"], "recipe": recipe, "seed": 0, "data": record, "quality": numbers,
        "details": {"kl_mean": {"unit": KL, "n": 64, "low": kl * 0.93, "high": kl * 1.08, "spread": kl * 0.07},
                    "top1_agreement": {"unit": "fraction", "n": 32704, "low": 0.928, "high": 0.934, "spread": 0.003},
                    "perplexity": {"unit": "1 per token", "n": 32704, "low": 4.41, "high": 4.86, "spread": 0.2}},
        "bytes": total, "bytes_original": 2 * parameters, "bits_per_weight": 8 * total / parameters,
        "files": {**hashes, "tokenizer.json": digest("tokenizer"), "plan.json": digest("plan")}, "plan_sha256": digest("plan"),
        "reload": {"ok": True, "difference": 0.0},
        "replay": f"laconic compress --budget bits=4.25 --seed 0 --plan plan.json --overwrite -o {out.name}",
        "versions": {"laconic": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0", "threads": 2},
    }  # fmt: skip
    factor = 0.62 if slow else 1.35

    def speeds(decode: float, prefill: float) -> dict[str, Any]:
        details = {key: {"unit": "tokens/s", "n": 7, "low": 0.93 * v, "high": 1.05 * v, "spread": 0.06 * v}
                   for key, v in (("decode_tokens_per_s", decode), ("prefill_tokens_per_s", prefill))}  # fmt: skip
        return {"decode_tokens_per_s": decode, "prefill_tokens_per_s": prefill, "details": details}

    measurements = {
        **speeds(318.4 * factor, 9120.0 * 0.97), "original": speeds(318.4, 9120.0), "peak_memory_bytes": 402_000_000,
        "seconds": {"price": 71.2, "apply": 22.9}, "hardware": {"cpu": "2 x 2.9 GHz", "threads": 2, "memory": "24 GB"},
    }  # fmt: skip
    (out / "plan.json").write_text(json.dumps(plan))
    (out / "certificate.json").write_text(json.dumps(certificate))
    forms = {f"{name}.weight": {"form": "quantize.grid.grouped.Grouped", "shape": list(shape)} for name, shape in sites(layers).items()}
    (out / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "laconic", "format": 1, "forms": forms}}))
    if measured:
        (out / "measurements.json").write_text(json.dumps(measurements))
    return out


GENERATIONS: list[dict[str, Any]] = [
    {"prompt": "def fibonacci(n):\n", "original": ["    if", " n", " <", " 2", ":\n", "        return", " n", "\n", "    return",
                  " fibonacci", "(n", " -", " 1", ")"],
     "compressed": ["    if", " n", " <", "=", " 1", ":\n", "        return", " 1", "\n", "    return", " fibonacci", "(n", ")"]},
    {"prompt": "<script>alert('prompt')</script>", "original": "<b>bold</b> & more", "compressed": "<b>bold</b> & more"},
]  # fmt: skip


class Outline(HTMLParser):
    """Start tags with attributes, and whether every element was closed."""

    VOID = frozenset({"meta", "input", "link", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(out: Path, **kwargs: Any) -> str:
    return render(out, **kwargs).read_text(encoding="utf-8")


def test_page_is_whole_and_self_contained(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "out"), generations=GENERATIONS)
    assert len(page.encode()) < 5_000_000
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    for tag, attributes in outline.seen:
        assert tag not in ("link", "img", "iframe", "image", "use")
        for key in ("src", "href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith("#")
    assert "@import" not in page
    assert "url(" not in page
    ids = [attributes["id"] for _, attributes in outline.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [str(a["href"])[1:] for t, a in outline.seen if t == "a"]
    assert links
    assert set(links) <= set(ids)
    assert all(a.get("aria-label") or a.get("aria-hidden") for t, a in outline.seen if t == "svg")


def test_headline_says_what_was_measured(tmp_path: Path) -> None:
    page = unescape(page_of(write_run(tmp_path / "out"))).replace("\u00a0", " ")
    for words in (
        "14.7 MB → 3.89 MB",
        "bits per weight",
        "4.51 → 4.63",
        "+2.6 % per token, p < 0.001 (paired)",
        "93.12 %",
        "bits=4.25",
        "passed",
    ):
        assert words in page, words
    assert "0.62×" in page
    assert "slower than the original" in page
    assert "Prefill is slower than the original" in page


def test_faster_is_not_called_slower(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "out", slow=False))
    assert "Decode runs at 1.35 times" in page
    assert "Decode is slower" not in page


def test_collapsed_is_said_and_not_compared(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "out", top1_agreement=0.11))
    assert "Collapsed." in page
    assert "→ 4.63" not in page


def test_failed_reload_hides_speed(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out")
    certificate = json.loads((out / "certificate.json").read_text())
    certificate["reload"] = {"ok": False, "difference": 0.31}
    (out / "certificate.json").write_text(json.dumps(certificate))
    page = page_of(out)
    assert "The reload check failed." in page
    assert "tokens/s" not in page
    assert "Withheld" in page


def test_without_measurements_it_names_the_command(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "out", measured=False))
    assert "not measured yet" in page
    assert "laconic bench out" in page


def test_every_kept_tensor_is_named(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "out"))
    assert all(f"<code>model.layers.{i}.input_layernorm.weight</code>" in page for i in range(8))
    assert "<code>model.norm.weight</code>" in page


def test_text_is_escaped_everywhere(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out")
    evil = "<script>alert(1)</script>\"'&"
    plan = json.loads((out / "plan.json").read_text())
    plan["notes"], plan["budget"]["words"], plan["model"]["spec"] = [evil], [evil], evil
    plan["kept"][0]["tensor"] = plan["kept"][0]["why"] = evil
    plan["choices"][0]["site"] = plan["menu"][0]["site"] = plan["menu"][0]["method"] = evil
    plan["menu"][0]["damage"]["unit"] = plan["choices"][0]["damage"]["unit"] = evil
    (out / "plan.json").write_text(json.dumps(plan))
    certificate = json.loads((out / "certificate.json").read_text())
    certificate["replay"], certificate["versions"][evil], certificate["recipe"][evil] = evil, evil, evil
    (out / "certificate.json").write_text(json.dumps(certificate))
    page = page_of(out, against=evil, generations=[{"prompt": evil, "original": evil, "compressed": [evil]}])
    assert page.count("<script>") == 1
    assert "alert(1)</script>" not in page


def test_generations_mark_the_first_difference() -> None:
    pair = pair_of(GENERATIONS[0])
    assert pair.original[:2] == ("    if n <", " 2")
    assert pair.compressed[1] == "="
    assert pair.says == "first 3 tokens equal"
    assert pair_of(GENERATIONS[1]).says.startswith("identical")
    assert pair_of({"prompt": "", "original": "a b", "compressed": "a b c"}).compressed == ("a b", " c", "")


def test_many_layers_stay_small(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "out", layers=80))
    assert len(page.encode()) < 5_000_000


def test_a_classifier_without_kl_or_budget_words(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out", measured=False)
    for name in ("plan.json", "certificate.json"):
        stored = json.loads((out / name).read_text().replace(KL, "squared error"))
        if name == "certificate.json":
            stored["quality"], stored["details"] = {"accuracy": 0.9113, "top1_agreement": 0.9931}, {}
        else:
            stored["pareto"], stored["judged"], stored["notes"], stored["budget"], stored["model"]["spec"] = (
                [],
                [],
                [],
                {"words": []},
                "zoo:resnet",
            )
        (out / name).write_text(json.dumps(stored))
    page = page_of(out)
    assert "91.1" in page
    assert "Perplexity" not in page
    assert "laconic bench out --against zoo:resnet" in page


def test_a_lossless_result_has_no_log_axis(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out", kl_mean=0.0, kl_mean_low=0.0, kl_mean_high=0.0)
    plan = json.loads((out / "plan.json").read_text())
    plan["pareto"], plan["judged"], plan["predicted"]["damage"] = [], [{"plan": "solved", "bytes": 10**6, "kl": 0.0}], 0.0
    (out / "plan.json").write_text(json.dumps(plan))
    assert "Size against damage" not in page_of(out)


def test_a_uniform_plan_that_was_not_priced(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out", measured=False)
    plan = json.loads((out / "plan.json").read_text())
    for row in [*plan["menu"], *plan["choices"]]:
        row["damage"] = {"value": None, "unit": "", "where": ""}
    plan["pareto"], plan["predicted"]["damage"] = [], None
    (out / "plan.json").write_text(json.dumps(plan))
    seconds = {"seconds": {"total": 91.0}, "peak_memory_bytes": 10**9, "hardware": {"memory_bytes": 24 * 10**9}, "details": {}}
    (out / "measurements.json").write_text(json.dumps(seconds))
    page = page_of(out)
    assert "not priced" in page
    assert "not measured yet" in page
    assert "24.0\u00a0GB" in page


def test_refuses_what_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a result of laconic"):
        render(tmp_path)
    out = write_run(tmp_path / "out")
    (out / "plan.json").write_text('{"format": 1,')
    with pytest.raises(UserError, match="damaged"):
        render(out)
    (out / "plan.json").write_text("[]")
    with pytest.raises(UserError, match="no JSON object"):
        render(out)


def test_same_files_same_page(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out")
    assert page_of(out) == page_of(out)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.01234, "0.0123"),
        (4.5123, "4.51"),
        (1240.4, "1,240"),
        (0, "0"),
        (4.21e-6, "4.21×10⁻⁶"),
        (99.96, "100"),
        (0.00042, "0.000420"),
        (12.0, "12.0"),
    ],
)
def test_figures(value: float, words: str) -> None:
    assert figure(value) == words


def test_units() -> None:
    assert (size(3_412_345), size(999), size(41_200), size(6_100_000_000)) == ("3.41\u00a0MB", "999\u00a0B", "41.2\u00a0kB", "6.10\u00a0GB")
    assert percent(0.123) == "12.3\u00a0%"


@pytest.mark.parametrize(
    ("level", "words"),
    [
        ({"bits": 4, "group": 128, "symmetric": False}, "4b g128"),
        ({"bits": 4, "group": 128, "symmetric": False, "scales": "bf16", "zeros": "whole"}, "4b g128"),
        ({"bits": 2, "group": 64, "symmetric": True, "scales": "log8", "zeros": "half"}, "2b g64 sym z½ s8"),
        ({"bits": 3, "group": None, "symmetric": True}, "3b row sym"),
        ({"first": {"bits": 3, "group": 64, "symmetric": False}, "rank": 8}, "3b g64 + r8"),
        ({"keep": 0.5, "run": 4, "grid": {"bits": 4, "group": 64, "symmetric": False}}, "2:4 4b g64"),
        ({"keep": 0.5, "run": None, "grid": None}, "keep 50%"),
        ({}, "as it is"),
        ({"planes": 3}, "planes 3"),
    ],
)
def test_levels_in_words(level: dict[str, Any], words: str) -> None:
    assert level_words(level) == words


def test_places_of_decoders_experts_and_residual_networks() -> None:
    found = places(["model.layers.3.self_attn.q_proj", "model.layers.10.mlp.experts.17.up_proj", "model.embed_tokens"])
    assert list(found.values()) == [Place("3", "q"), Place("10", "up"), Place("", "embed_tokens")]
    found = places(["layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0", "conv1"])
    assert list(found.values()) == [
        Place("layer1.0", "conv1"),
        Place("layer2.0", "conv1"),
        Place("layer2.0", "downsample"),
        Place("", "conv1"),
    ]


def test_axes() -> None:
    log = Axis(0.01, 1.0, 100, 0, log=True)
    assert log(0.1) == pytest.approx(50)
    assert log.ticks(5) == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
    assert Axis(2.3, 4.6, 0, 1).ticks(5) == pytest.approx([2.5, 3.0, 3.5, 4.0, 4.5])
    assert math.isfinite(Axis(1, 1, 0, 1)(1))


def test_shades_end_where_the_palette_ends() -> None:
    assert shade(0) == "#440154"
    assert shade(1) == "#fde725"
    assert shade(7) == "#fde725"
    assert re.fullmatch("#[0-9a-f]{6}", shade(0.37))


def test_ragged_single_points_are_drawn() -> None:
    only = [page.Mark("certified", "result, certified", 1000, 0.1)]
    assert "m-certified" in page.pareto_picture(350, [], only, 8000, "KL")
