"""Renders the marked blocks of README.md: results from files in benchmarks/results/, and the support table.

A block is the text between `<!-- block: NAME -->` and `<!-- end -->`; everything else is written by hand.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from result_files import RESULTS, ROOT, File, device_name, newest

from benchmarks.kernels import targets
from benchmarks.roofline.published import compare_decode, comparisons, median_error
from builder.planning import compatibility, compatibility_rules
from plugins.common.families import FAMILIES
from plugins.common.json_files import read_json
from plugins.common.patterns import OF_EIGHT

README = ROOT / "README.md"
SHORT_ANSWER = 16  # tokens
SMS = {75: "Turing", 80: "A100", 86: "RTX 30", 89: "L40S, RTX 40", 90: "H100, H200", 100: "B200", 120: "RTX 50"}
ACCURACY = """
Perplexity on held-out text after pruning every linear layer to 2:4 ({model}, {samples} calibration sequences of
{sequence_length} tokens, {cores} cores of an {processor}; [values]({path})):

| method | perplexity | increase |
|---|---|---|
{rows}"""
BUILD = """
`make quickstart` builds `{model}` ({parameters:.1f} million parameters) on {device}
([report]({path})):

| | dense | {format} | |
|---|---|---|---|
| perplexity, held-out text | {dense[perplexity]:.2f} | {built[perplexity]:.2f} | {perplexity_increase:+.1%}, \
95% interval {low:+.1%} to {high:+.1%} |
| weights | {dense_mb:.2f} MB | {built_mb:.2f} MB | {ratio:.2f} times smaller |
{speed}"""
SMOLLM2 = """
SmolLM2-135M-Instruct on {device} (`python -m benchmarks.pruning.smollm2`), each build compared with
the dense bfloat16 model: perplexity {own:.2f} on held-out text of the calibration text's kind, {other:.2f} on text of
another kind, {dense_mb:.0f} MB of weights, {tokens:.0f} tokens/s for 1 request
([values and intervals]({path})):

| | perplexity | on other text | weights | {columns} |
|---|---|---|---|{lines}|
{rows}"""
LLAMA_CPP = """
The same model, one request on {threads} threads, compared with llama.cpp on its GGUF file
(`python -m benchmarks.pruning.llama_cpp`, a prompt of {prompt} tokens, [values]({path})). On
another virtual machine of this kind, with faster memory, each later token took {peers} ms with llama.cpp and {ours} ms
with these builds ([values]({other})):

| | each later token | prompt | perplexity | weights |
|---|---|---|---|---|
{rows}"""
KERNELS = """
Speed-up of 2:4 FP8 kernels over the best dense FP8 kernel on {gpu}: Llama-3.1-8B's layers, weights cold,
by number of tokens ([values]({path})):

| layer | {tokens} |
|---|{lines}|
{rows}"""
DECODE = """
A decode step of the torch engine on the same GPU, Llama-3.1-8B's shapes with random weights, context {context}, each
model with its fastest kernels ([values]({path}); [earlier runs](docs/kernels.md#what-has-run) gave 1.26x and 1.37x
over FP8 at 1 request, 1.18x and 1.21x at 8):

| requests at a time | bf16 | FP8 | FP8 + 2:4 | over FP8 | over bf16 |
|---|---|---|---|---|---|
{rows}"""
PREDICTED = """
**Predicted**, not measured: decoding Llama-3.1-8B on an H100, batch 8, context 1024, with 2:4 on all layers of the
blocks is at most {fp8:.2f}x as fast as dense FP8 and {bf16:.2f}x as fast as bf16. These limits exceed published
end-to-end speed-ups by {error:.0%} in the median ([comparison](docs/predictions.md)).
"""


FASTER_MEMORY = RESULTS / "llama_cpp-amd-epyc-2cores-2026-11-27-first.json"
PUBLISHED = {"build/smollm2": "SmolLM2-135M-Instruct"}  # what examples/smollm2/make_model.py writes


def page() -> str:
    return fill(README, BLOCKS)


def fill(path: Path, blocks: dict[str, Callable[[], str]]) -> str:
    """The page with its marked blocks rendered again."""
    text = path.read_text(encoding="utf8")
    for name, render in blocks.items():
        begin, end = f"<!-- block: {name} -->\n", "<!-- end -->"
        before, marker, rest = text.partition(begin)
        assert marker, f"{path.name} lacks the line '{begin.strip()}'"
        text = before + begin + render() + end + rest.partition(end)[2]
    return text


def results() -> str:
    parts = [
        *map(_smollm2, newest("smollm2", lambda result: result["model"]).values()),
        *map(_llama_cpp, newest("llama_cpp", lambda result: "one request").values()),
        *map(_accuracy, newest("accuracy_peers", lambda result: result["settings"]["model"]).values()),
        *map(_build, newest("quickstart", lambda report: report["model"]).values()),
        *map(_kernels, newest("gpu", device_name).values()),
        *map(_decode, newest("gpu_part", device_name).values()),
        _predicted(),
    ]
    return "".join(parts).lstrip("\n")


def support() -> str:
    families = ", ".join(name.removesuffix("ForCausalLM") for name in FAMILIES)
    head = "| weights, 2:4 or dense | " + " | ".join(f"`{name}`" for name in compatibility_rules.BACKENDS) + " |\n"
    rows = [
        f"| {label} | " + " | ".join(_range(number_format, name) for name in compatibility_rules.BACKENDS) + " |\n"
        for number_format, label in (("bf16", "bf16, fp16"), ("fp8", "FP8 (e4m3)"), ("int8", "INT8 (SmoothQuant W8A8)"))
    ]
    of_eight = " | ".join(_range("int8", name, OF_EIGHT) for name in compatibility_rules.BACKENDS)
    rows.append(f"| any of these, {', '.join(OF_EIGHT)} | {of_eight} |\n")
    return f"Model families: {families}.\n\n{head}|---|{'---|' * len(compatibility_rules.BACKENDS)}\n{''.join(rows)}"


BLOCKS: dict[str, Callable[[], str]] = {"results": results, "support": support}


def _accuracy(file: File) -> str:
    result, path = file
    methods, shown = result["methods"], result["settings"] | result["environment"]
    rows = [f"| dense | {next(iter(methods.values()))['dense']['perplexity']:.2f} | |\n"] + [
        f"| {method} | {values['built']['perplexity']:.2f} | {values['perplexity_increase']:+.1%} |\n"
        for method, values in methods.items()
        if method != "dense"
    ]
    shown["model"] = PUBLISHED.get(shown["model"], shown["model"])
    return ACCURACY.format(**shown, path=path, rows="".join(rows))


def _build(file: File) -> str:
    report, path = file
    accuracy, size, device = report["accuracy"], report["size"], report["device"]
    low, high = accuracy["perplexity_increase_interval"]
    return BUILD.format(
        model=report["model"],
        parameters=size["dense_bytes"] / 2e6,
        device=f"{device['cores']} cores of an {device['name']}" if device["type"] == "cpu" else device["name"],
        path=path,
        format=f"{report['recipe']['quantization']['format'].upper()} + 2:4",
        **accuracy,
        low=low,
        high=high,
        dense_mb=size["dense_bytes"] / 1e6,
        built_mb=size["built_bytes"] / 1e6,
        ratio=size["dense_bytes"] / size["built_bytes"],
        speed="".join(map(_speed, report["performance"])),
    )


def _smollm2(file: File) -> str:
    result, path = file
    device, variants = result["device"], result["variants"]
    first = next(iter(variants.values()))
    columns = [column for number in range(len(first["performance"])) for column in _columns(first, number)]
    paired = any(values.get("over_first") for values in variants.values())
    titles = [title for title, *_ in columns] + [f"each later token, over {next(iter(variants))}"] * paired
    rows = [
        f"| {name} | {values['accuracy']['perplexity_increase']:+.1%} "
        f"| {values['other_text']['perplexity_increase']:+.1%} "
        f"| {values['size']['built_bytes'] / 1e6:.0f} MB "
        + "".join(f"| {values['performance'][at]['speedup'][metric]['ratio']:.2f}x " for _, at, metric in columns)
        + (f"| {_over(values['over_first'])} |\n" if paired else "|\n")
        for name, values in variants.items()
    ]
    return SMOLLM2.format(
        device=f"{device['cores']} cores of an {device['name']}",
        own=first["accuracy"]["dense"]["perplexity"],
        other=first["other_text"]["dense"]["perplexity"],
        dense_mb=first["size"]["dense_bytes"] / 1e6,
        tokens=first["performance"][0]["dense"]["output_token_throughput"]["mean"],
        path=path,
        columns=" | ".join(titles),
        lines="|".join(["---"] * len(titles)),
        rows="".join(rows),
    )


def _over(points: list[dict[str, Any]]) -> str:
    """A build against the first variant's, at one request, in one run."""
    if not points:
        return ""
    ratio = points[0]["speedup"]["inter_token_latency"]
    low, high = ratio["interval"]
    return f"{ratio['ratio']:.2f}x [{low:.2f}, {high:.2f}]"


def _columns(variant: dict[str, Any], number: int) -> list[tuple[str, int, str]]:
    """Title, number and metric of the columns of a measured point; with a short answer, only the first token counts."""
    workload, concurrency = (variant["performance"][number][key] for key in ("workload", "concurrency"))
    if workload["output_tokens"] < SHORT_ANSWER:
        return [(f"first token at {workload['input_tokens']}", number, "time_to_first_token")]
    if concurrency > 1:
        return [(f"{concurrency} requests", number, "output_token_throughput")]
    later = ("each later token", number, "inter_token_latency")
    return [later, ("tokens/s, 1 request", number, "output_token_throughput")]


def _llama_cpp(file: File) -> str:
    result, path = file
    rows = [
        f"| {name} | {row['decode_ms']:.1f} ms | {row['prefill_ms']:.0f} ms | {row['perplexity']:.2f} "
        f"| {row['bytes'] / 1e6:.0f} MB |\n"
        for name, row in result["contenders"].items()
    ]
    faster = read_json(FASTER_MEMORY)["contenders"]
    times = {name: f"{row['decode_ms']:.1f}" for name, row in faster.items()}
    return LLAMA_CPP.format(
        **result["settings"],
        path=path,
        other=FASTER_MEMORY.relative_to(ROOT).as_posix(),
        peers=" and ".join(dict.fromkeys(ms for name, ms in times.items() if "llama.cpp" in name)),
        ours=" and ".join(dict.fromkeys(ms for name, ms in times.items() if "llama.cpp" not in name)),
        rows="".join(rows),
    )


def _speed(point: dict[str, Any]) -> str:
    dense, built, ratio = (point[side]["output_token_throughput"] for side in ("dense", "built", "speedup"))
    interval = ratio["interval"]
    spread = f", 95% interval {interval[0]:.2f} to {interval[1]:.2f}" if interval else ""
    concurrency = point["concurrency"]
    load = "1 request" if concurrency == 1 else f"{concurrency} requests at a time"
    return f"| output tokens/s, {load} | {dense['mean']:.0f} | {built['mean']:.0f} | {ratio['ratio']:.2f}x{spread} |\n"


def _kernels(file: File) -> str:
    result, path = file
    fp8 = [
        row
        for row in targets.rows(result)
        if row.get("model") == "llama-3.1-8b" and row["format"] == "fp8" and row.get("ratio")
    ]
    if not fp8:
        return ""
    tokens = sorted({row["tokens"] for row in fp8})
    ratio = {(row["layer"], row["tokens"]): f"{row['ratio']:.2f}x" for row in fp8}
    lines = [
        f"| {layer} | " + " | ".join(ratio.get((layer, count), "") for count in tokens) + " |\n"
        for layer in dict.fromkeys(row["layer"] for row in fp8)
    ]
    return KERNELS.format(
        gpu=device_name(result).replace("NVIDIA", "an NVIDIA"),
        path=path,
        tokens=" | ".join("1 token" if count == 1 else f"{count}" for count in tokens),
        lines="|".join(["---"] * len(tokens)),
        rows="".join(lines),
    )


def _decode(file: File) -> str:
    engine = file.content["steps"].get("engine", {}).get("result", {})
    times = {name: result["decode_us"] for name, result in engine.get("results", {}).items()}
    if not {"bf16", "fp8", "fp8-2of4"} <= times.keys():
        return ""
    rows = [
        f"| {batch} | {times['bf16'][batch] / 1000:.2f} ms | {times['fp8'][batch] / 1000:.2f} ms | {us / 1000:.2f} ms "
        f"| {times['fp8'][batch] / us:.2f}x | {times['bf16'][batch] / us:.2f}x |\n"
        for batch, us in times["fp8-2of4"].items()
    ]
    return DECODE.format(context=engine["context"], path=file.path, rows="".join(rows))


def _predicted() -> str:
    fp8, bf16 = (
        compare_decode("H100", base, 1, model="llama-3.1-8b", batch=8, input=1024).predicted for base in ("fp8", "bf16")
    )
    whole = [row for row in comparisons() if row.kind == "end to end"]
    return PREDICTED.format(fp8=fp8, bf16=bf16, error=median_error(whole, signed=True))


def _range(number_format: str, backend: str, features: Sequence[str] = ()) -> str:
    """The GPUs that the compatibility table allows for sparse weights, and whether a CPU works."""
    works = [sm for sm in SMS if compatibility.check(number_format, True, backend, sm, features=features).ok]
    if not works:
        return "any CPU" if compatibility.check(number_format, True, backend, features=features).ok else "no"
    last = "and later" if works[-1] == max(SMS) else f"to SM{works[-1]} ({SMS[works[-1]]})"
    cpu = "; any CPU" if backend == "torch" else ""
    return f"SM{works[0]} ({SMS[works[0]]}) {last}{cpu}"
