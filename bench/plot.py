"""The plot of time against mask ratio, as an SVG that is the same for the same results."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from bench.sweeps import series


def digest(result: dict | None) -> str:
    """Names the data of a plot, so that a check needs no matplotlib."""
    data = {net: [(i["mask_ratio"], i["ms"]) for i in infos] for net, infos in series(result).items()}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def draw(result: dict, path: Path) -> None:
    """Dense, sparse and the ideal line, one panel per network."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style = {"svg.hashsalt": "spark_fast", "svg.fonttype": "none", "font.size": 10}
    with plt.rc_context(style):
        found = series(result)
        figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.4), squeeze=False)
        for axis, (net, infos) in zip(axes[0], found.items(), strict=True):
            ratios = [i["mask_ratio"] for i in infos]
            dense, sparse = ([i["ms"][side] for i in infos] for side in ("dense", "sparse"))
            axis.plot(ratios, dense, "o-", color="#888888", label="dense")
            axis.plot(ratios, sparse, "o-", color="#c23b22", label="sparse")
            ideal = [t * (1 - r) for t, r in zip(dense, ratios, strict=True)]
            axis.plot(ratios, ideal, "--", color="#888888", label="dense x (1 - mask ratio)")
            axis.set(title=f"{net}, batch {infos[0]['batch']}", xlabel="mask ratio", ylim=(0, None))
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][0].set_ylabel("encoder, forward + backward (ms)")
        axes[0][0].legend(frameon=False)
        figure.tight_layout()
        figure.savefig(path, format="svg", metadata={"Date": None, "Description": f"data {digest(result)}"})
        plt.close(figure)
