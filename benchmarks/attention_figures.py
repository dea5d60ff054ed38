"""The figures of attention.py: how the contestants' medians compare, and the targets of the project."""

import itertools


def ratios(rows: list[dict]) -> list[dict]:
    """Return how many times as fast attn is as each peer, per case and per implementation of attn."""
    found = []
    for case, times in by_case(rows).items():
        for one, other in itertools.product(times, times):
            if one.startswith("attn") and not other.startswith("attn"):
                named = dict(zip(("setup", "T", "mask", "mode"), case))
                found.append(named | {"ours": one, "peer": other, "times_as_fast": round(times[other] / times[one], 3)})
    return found


def by_case(rows: list[dict]) -> dict[tuple, dict[str, float]]:
    """Return {(set-up, T, mask, mode): {contestant: median}}."""
    cases = {}
    for row in rows:
        times = cases.setdefault((row["setup"], row["T"], row["mask"], row["mode"]), {})
        if "median_ms" in row:
            times[row["contestant"]] = row["median_ms"]
    return cases


def figures(sections: dict[str, list[dict]]) -> list[dict]:
    """Return the figures that have a target in this project, as far as they were measured."""
    cases, found = by_case(sections["speed"]), []

    def add(figure: str, value: float | None, target: str):
        if value is not None:
            found.append({"figure": figure, "value": round(value, 3), "target": target})

    for setup, peer, target in (
        ("one_process", "jax.nn", ">= 7"),
        ("whole_machine", "jax.nn", ">= 8"),
        ("whole_machine", "torch", ">= 1"),
    ):
        times = cases.get((setup, 4096, "causal", "forward+backward"), {})
        for ours in ("attn-auto", "attn-blockwise"):
            value = times[peer] / times[ours] if {ours, peer} <= times.keys() else None
            add(f"times as fast as {peer}: {ours}, {setup}, T 4,096, causal, forward+backward", value, target)
    slowest = slowest_when_short(cases)
    if slowest:
        add(f"attn-auto's time over jax.nn's at most, T <= 512: {slowest[1]}", slowest[0], "<= 1.05")
    for row in sections["memory"]:
        if row["T"] == 16384 and not row["contestant"].startswith(("jax", "attn-reference")):
            mib = row["temporary_bytes"] / 2**20 if "temporary_bytes" in row else None
            add(f"MiB of {row['contestant']}, one head, T 16,384, {row['mask']}, forward+backward", mib, "< 64")
    for row in sections["freedom"]:
        if row["variant"] != "no score":
            add(f"time over no score's: {row['variant']}, T {row['T']:,}, {row['mask']}", row["ratio"], "<= 1.15")
    for row in sections["skipping"]:
        limit = {"window": "<= 0.167", "causal": "<= 0.6"}.get(row["variant"].split(",")[0].split()[0])
        if limit and "prefix" not in row["variant"] and "plain" not in row["variant"] and row["T"] >= 8192:
            where = f"{row['setup']}, T {row['T']:,}, one head"
            add(f"time over full attention's: {row['variant']}, {where}", row["ratio"], limit)
    return found


def slowest_when_short(cases: dict[tuple, dict[str, float]]) -> tuple[float, str] | None:
    """Return the largest ratio of attn-auto to jax.nn up to T = 512, and its case."""
    found = []
    for (setup, T, mask, mode), times in cases.items():
        if T <= 512 and {"attn-auto", "jax.nn"} <= times.keys():
            where = f"{setup}, T {T:,}, {mask}, {mode}"
            found.append((times["attn-auto"] / times["jax.nn"], where))
    return max(found, default=None)
