"""Tables and series of the sweeps: mask ratio, batch size, resolution."""

from __future__ import annotations

import itertools

from bench import aims
from bench.tables import NOT_MEASURED, cases, gain, ms, name_of, provenance, table, verdict


def series(result: dict | None) -> dict[str, list[dict]]:
    """The encoders' cases of the mask-ratio sweep, by network, ratios ascending."""
    found: dict[str, list[dict]] = {}
    for info in cases(result, "sweep", sweep="mask ratio"):
        found.setdefault(info["net"], []).append(info)
    return {net: sorted(infos, key=lambda i: i["mask_ratio"]) for net, infos in found.items()}


def crossover(points: list[tuple[float, float]]) -> str:
    """From which mask ratio on sparse is faster: points are (mask ratio, gain), ratios ascending."""
    slower = [i for i, (_, ratio) in enumerate(points) if ratio < 1]
    if not slower:
        equal = [x for x, ratio in points if ratio < 1.02]
        return f"equal at {equal[-1]:g}, faster above" if equal else "faster at every ratio measured"
    if slower[-1] == len(points) - 1:
        return "slower at the highest ratio measured"
    (x0, y0), (x1, y1) = points[slower[-1]], points[slower[-1] + 1]
    return f"faster from {x0 + (x1 - x0) * (1 - y0) / (y1 - y0):.2f} on"


def mask_ratio(result: dict | None) -> str:
    """Gains by mask ratio, of encoders and of one 3x3 layer per side."""
    groups = list(series(result).items())
    layers: dict[str, list[dict]] = {}
    for info in cases(result, "sweep", sweep="layer mask ratio"):
        layers.setdefault(name_of(info), []).append(info)
    groups += [(net, sorted(infos, key=lambda i: i["mask_ratio"])) for net, infos in layers.items()]
    if not groups:
        return NOT_MEASURED
    ratios = sorted({i["mask_ratio"] for _, infos in groups for i in infos})
    rows = []
    for name, infos in groups:
        gains = {i["mask_ratio"]: i["ratio"]["dense"] for i in infos}
        whole = "kernel" not in infos[0]  # the aim is of encoders
        aim = verdict(gains[0.0], aims.UNMASKED) if whole and 0.0 in gains else ["", ""]
        rows.append([name, *(gain(gains.get(r)) for r in ratios), crossover(sorted(gains.items())), *aim])
    heads = [f"mask ratio {r:g}" for r in ratios]
    return table(["forward + backward", *heads, "crossover", "aim at 0", "met"], rows)


def times(result: dict | None) -> str:
    """The encoders' times behind the plot."""
    rows = []
    for net, infos in series(result).items():
        for info in infos:
            cells = [net, str(info["batch"]), f"{info['mask_ratio']:g}", ms(info["ms"]["dense"])]
            rows.append([*cells, ms(info["ms"]["dense"] * (1 - info["mask_ratio"])), ms(info["ms"]["sparse"])])
    return table(["encoder", "batch", "mask ratio", "dense (ms)", "dense x (1 - mask ratio)", "sparse (ms)"], rows)


def pixels(result: dict | None) -> str:
    """Random pixel masks: from which density downwards sparse is faster, then every case."""
    rows, sums = [], []
    found = cases(result, "pixels")
    for key in sorted({(i["channels"], i["threads"]) for i in found}):
        infos = sorted((i for i in found if (i["channels"], i["threads"]) == key), key=lambda i: i["density"])
        name = f"{key[0]} channels, {key[1]} thread{'s' if key[1] > 1 else ''}"
        sums.append(f"- {name}: {faster_below([(i['density'], i['ratio']['dense']) for i in infos])}.")
        for info in infos:
            times, sparse = info["ms"], info["ms"]["sparse"]
            rulebook = times.get("spconv with rulebook")
            cells = [name, f"{100 * info['density']:g} %", str(info["rows_in"]), ms(times["dense"]), ms(sparse)]
            cells += [gain(times["dense"] / sparse), ms(times["sparse with tables"])]
            cells += [gain(times["dense"] / times["sparse with tables"]), ms(times.get("spconv")), ms(rulebook)]
            best = min((t for t in (times.get("spconv"), rulebook) if t is not None), default=None)
            rows.append([*cells, gain(best / sparse if best else None)])
    if not rows:
        return NOT_MEASURED
    heads = ["3x3", "density", "pixels", "dense (ms)", "sparse (ms)", "gain", "sparse with tables (ms)", "gain"]
    heads += ["spconv (ms)", "spconv with rulebook (ms)", "gain over spconv"]
    return "\n".join(sums) + f"\n\n{table(heads, rows)}\n\n{provenance(result)}"


def faster_below(points: list[tuple[float, float]]) -> str:
    """From which density downwards sparse is faster: points are (density, gain), densities ascending."""
    slower = [i for i, (_, ratio) in enumerate(points) if ratio < 1]
    if not slower:
        return f"faster at every density measured, up to {points[-1][0]:.0%}"
    if slower[0] == 0:
        return f"slower at {points[0][0]:.0%} already"
    (below, ratio), (above, _) = points[slower[0] - 1 : slower[0] + 1]
    return f"faster from {below:.0%} downwards ({ratio:.2f}x there), slower at {above:.0%}"


def linear(result: dict | None) -> str:
    """Cost per active patch over batch size and resolution."""
    rows = []
    found = [i for sweep in ("batch", "resolution") for i in cases(result, "sweep", sweep=sweep)]
    for _, group in itertools.groupby(found, key=lambda i: i["sweep"]):
        infos = list(group)
        last = infos[-1]["ms"]["sparse"] / infos[-1]["active_patches"]
        for info in infos:
            each = info["ms"]["sparse"] / info["active_patches"]
            cells = [info["net"], str(info["batch"]), str(info["img_size"]), str(info["active_patches"])]
            cells += [ms(info["ms"]["sparse"]), f"{each:.2f}", f"{each / last:.2f}"]
            rows.append([*cells, ms(info["ms"]["dense"]), gain(info["ratio"]["dense"])])
    heads = ["encoder", "batch", "image (px)", "active patches", "sparse (ms)", "ms per active patch"]
    return table([*heads, "relative to the largest", "dense (ms)", "gain"], rows)
