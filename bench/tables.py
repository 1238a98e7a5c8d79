"""Markdown tables from saved results. Losses stay visible: a gain below 1 and a missed aim are bold."""

from __future__ import annotations

from collections.abc import Iterable

from bench import aims

NOT_MEASURED = "*Not measured yet.*"
DIRECTIONS = ("forward", "grad_input", "grad_weight", "backward")
HEADS = {"grad_input": "grad-input", "grad_weight": "grad-weight"}


def cases(result: dict | None, kind: str, **wanted) -> list[dict]:
    """extra_info of the cases of a kind whose entries are as wanted."""
    found = [case["extra_info"] for case in (result or {}).get("benchmarks", [])]
    return [i for i in found if i.get("kind") == kind and all(i.get(k) == v for k, v in wanted.items())]


def table(heads: Iterable[str], rows: list[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else NOT_MEASURED


def ms(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def gain(ratio: float | None) -> str:
    """Bold if it is a loss as shown."""
    if ratio is None:
        return ""
    text = f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"
    return f"**{text}**" if ratio < 0.995 else text


def verdict(value: float, aim: float | None, at_most: bool = False) -> list[str]:
    """Two cells: the aim, and whether it is met."""
    if aim is None:
        return ["", ""]
    met = value <= aim if at_most else value >= aim
    return [f"{'<=' if at_most else '>='} {aim:g}x", "yes" if met else "**missed**"]


def provenance(result: dict | None) -> str:
    if not result:
        return NOT_MEASURED
    machine = result["machine_info"]
    parts = [machine["cpu"], f"{machine['threads']} threads", machine["instruction_set"], f"torch {machine['torch']}"]
    parts += [f"Python {machine['python']}", result["datetime"][:10], f"commit {commit(result)}"]
    if "allocator" in machine:
        parts.append(f"allocator {machine['allocator']}")
    text = ", ".join(parts)
    if "gemm_gflops" in machine:
        text += f"; ceilings {machine['gemm_gflops']:.0f} GFLOP/s, {machine['copy_gbs']:.0f} GB/s (read + written)"
    return text + "; float32; medians of alternating rounds in one process."


def commit(result: dict) -> str:
    info = result["commit_info"]
    return info["id"] + (" with changes" if info.get("changed") else "")


def _net(info: dict, aim: float | None) -> list[str]:
    cells = [info["net"], str(info["batch"]), ms(info["ms"]["dense"]), ms(info["ms"]["sparse"])]
    return [*cells, gain(info["ratio"]["dense"]), *verdict(info["ratio"]["dense"], aim)]


NET_HEADS = ("batch", "dense (ms)", "sparse (ms)", "gain", "aim", "met")


def encoders(result: dict | None) -> str:
    rows = []
    for info in cases(result, "encoder"):
        rate = [f"{info['gflops']:.0f}" if "gflops" in info else "", share(info), _forms(info)]
        rows.append([*_net(info, aims.ENCODER.get(info["net"])), *rate])
    return table(["encoder", *NET_HEADS, "useful GFLOP/s", "of the floor", "dense forms (ms)"], rows)


def steps(result: dict | None) -> str:
    rows = [[*_net(info, aims.STEP.get(info["net"])), _forms(info)] for info in cases(result, "step")]
    return table(["step", *NET_HEADS, "dense forms (ms)"], rows)


def _forms(info: dict) -> str:
    forms = info.get("dense_forms_ms", {})
    return ", ".join(f"{name} {ms(value)}" + (" (timed)" if name == info["dense_form"] else "")
                     for name, value in forms.items())  # fmt: skip


def share(info: dict) -> str:
    return f"{100 * info['of_floor']:.0f} %" if "of_floor" in info else ""


def modules(result: dict | None) -> str:
    rows = [
        [i["op"], i["net"], str(i["batch"]), ms(i["ms"]["dense"]), ms(i["ms"]["sparse"]), gain(i["ratio"]["dense"])]
        for i in cases(result, "module")
    ]
    return table(["part", "network", *NET_HEADS[:4]], rows)


def memory(result: dict | None) -> str:
    rows = []
    for info in cases(result, "memory"):
        mib = info["mib"]
        cells = [info["net"], str(info["batch"]), f"{mib['dense']:.0f}", f"{mib['sparse']:.0f}"]
        rows.append([*cells, f"{info['share']:.2f}x", *verdict(info["share"], aims.MEMORY, at_most=True)])
    return table(["encoder", "batch", "dense (MiB)", "sparse (MiB)", "share", "aim", "met"], rows)


def spconv(result: dict | None) -> str:
    rows = []
    for info in cases(result, "spconv"):
        bare, whole = (info["ms"].get(name) for name in ("spconv", "spconv with rulebook"))
        best = min(t for t in (bare, whole) if t is not None) / info["ms"]["sparse"]
        cells = [name_of(info), ms(info["ms"]["sparse"]), ms(bare), ms(whole), gain(best)]
        rows.append([*cells, *verdict(best, aims.SPCONV), info["spconv"]])
    heads = ["layer", "sparse (ms)", "spconv (ms)", "spconv with rulebook (ms)", "gain", "aim", "met", "version"]
    return table(heads, rows)


def name_of(info: dict) -> str:
    """A layer in words."""
    if "kernel" not in info or " " in info["layer"]:
        return info["layer"]
    kind = "Linear" if info.get("linear") else f"{info['kernel']}x{info['kernel']}"
    kind += f", stride {info['stride']}" if info["stride"] > 1 else ""
    channels = f"{info['channels']} channels" if info["groups"] > 1 else f"{info['channels']} to {info['out_channels']}"
    return f"{kind}, side {info['side']}, {channels}"


def layers(result: dict | None, op: str) -> str:
    """Gains over dense of each direction and of the three together, and of gathering in plain PyTorch."""
    rows = []
    for group in by_layer(cases(result, "op", op=op)):
        first, gains = group[0], {i["direction"]: i["ratio"]["dense"] for i in group}
        sums = {side: sum(i["ms"][side] for i in group) for side in ("sparse", "dense", "gather")}
        all_of_them = sums["dense"] / sums["sparse"]
        cells = [first["net"], name_of(first), *(gain(gains.get(d)) for d in DIRECTIONS[:3])]
        cells += [ms(sums["dense"]), ms(sums["sparse"]), gain(all_of_them), *verdict(all_of_them, aims.of_layer(first))]
        rows.append([*cells, gain(sums["gather"] / sums["sparse"])])
    heads = ["network", "layer", "forward", "grad-input", "grad-weight", "dense (ms)", "sparse (ms)", "together"]
    return table([*heads, "aim", "met", "over plain gathering"], rows)


def by_layer(found: list[dict]) -> list[list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for info in found:
        groups.setdefault((info["net"], info["op"], info["layer"]), []).append(info)
    return list(groups.values())


def figures(result: dict | None, *ops: str) -> str:
    """Every case in full."""
    rows = []
    for info in (i for op in ops for i in cases(result, "op", op=op)):
        times = [ms(info["ms"].get(side)) for side in ("dense", "gather", "sparse")]
        rates = [f"{info[rate]:.3g}" if rate in info else "" for rate in ("gflops", "gbs")]
        direction = HEADS.get(info["direction"], info["direction"])
        gains = [gain(info["ratio"].get(side)) for side in ("dense", "gather")]
        form = [info.get("dense_form", "")]
        rows.append([info["net"], name_of(info), direction, *times, *gains, *rates, share(info), *form])
    heads = ["network", "case", "direction", "dense (ms)", "gather (ms)", "sparse (ms)", "gain", "over gathering"]
    return table([*heads, "GFLOP/s", "GB/s", "of the floor", "fastest dense form"], rows)


def missed(result: dict | None) -> list[str]:
    """Convolutions that do not reach their aim, the three directions together."""
    found = []
    for group in (group for op in ("conv", "depthwise") for group in by_layer(cases(result, "op", op=op))):
        reached = sum(i["ms"]["dense"] for i in group) / sum(i["ms"]["sparse"] for i in group)
        aim = aims.of_layer(group[0])
        if aim and reached < aim:
            found.append(f"{group[0]['net']} {name_of(group[0])} {reached:.2f}x for {aim}x")
    return found


def losses(result: dict | None) -> str:
    """Every convolution that misses its aim, and every case slower than dense or than plain gathering, by name."""
    lines = [f"- Aims missed: {'; '.join(missed(result)) or 'none'}."]
    for side, words in (("dense", "dense"), ("gather", "gathering in plain PyTorch")):
        slow = [i for i in cases(result, "op") if i["ratio"].get(side, 1) < 0.995]
        named = [f"{i['net']} {name_of(i)}, {HEADS.get(i['direction'], i['direction'])}" for i in slow]
        text = "; ".join(f"{name} {i['ratio'][side]:.2f}x" for name, i in zip(named, slow, strict=True))
        lines.append(f"- Slower than {words}: {text or 'none'}.")
    return "\n".join(lines) if cases(result, "op") else NOT_MEASURED
