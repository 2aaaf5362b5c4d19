"""What the medians say, as tables in Markdown. Knows nothing of how they were measured."""
from .rows import BULK, CPU_ROWS, KIB, MOONCAKE_TOTAL, NAMES, STREAMS, TOTAL, UNDISTURBED, baselines, row_name, show_size

# What a row must reach: a share of the raw figure, a share of the own figure in one piece, or a multiple of raw TCP's ping-pong.
RAW_SHARE, SCATTERED_SHARE = 0.95, {32 * KIB: 0.85, 4 * KIB: 0.9}
SMALL_SHARE = 1.15
# Percent of a core that an engine with 1,000 idle connections may use; microseconds behind a large transfer, inside a frame and over the channels.
IDLE_PERCENT, BEHIND_INLINE, BEHIND = 0.3, 100, 5000


class Table:
    """What one congestion control's medians say."""

    def __init__(self, results):
        self.results, self.misses = results, []

    def get(self, system, key, figure="gbytes_per_s"):
        return self.results.get(system, {}).get(key, {}).get(figure)

    def ceiling(self):
        rates = [(self.get("raw", f"streams {s}"), s) for s in STREAMS if self.get("raw", f"streams {s}")]
        return max(rates) if rates else (None, None)

    def other(self, system, op, total, block):
        smaller = MOONCAKE_TOTAL.get(block, total) if system == "mooncake" and total > block else total
        return self.results.get(system, {}).get(f"{op} {smaller} {block}", {})

    def verdict(self, name, good):
        if good is None:
            return "-"
        if good:
            return "met"
        self.misses.append(name)
        return "**missed**"

    def bulk(self):
        raw, streams = self.ceiling()
        others = baselines(self.results)
        lines = ["| row | ours | raw TCP, best | ours/raw | ours/own 64 MiB | to reach | |" + "".join(f" {NAMES[p]} | ours/{NAMES[p]} |" for p in others)]
        lines.append("|" + "---|" * (7 + 2 * len(others)))
        cell = lambda v, form="{:.2f}": form.format(v) if v is not None else "-"
        ratio = lambda a, b: a / b if a is not None and b else None
        wanted = [(op, total, block, "") for op, total, block in BULK]
        wanted += [(*row, variant) for variant in (" waiting", " own choice") for row in BULK[:2]]
        for op, total, block, suffix in wanted:
            ours = self.get("ours", f"{op} {total} {block}{suffix}")
            own = self.get("ours", f"{op} {TOTAL} {TOTAL}")
            name = row_name(op, total, block) + {"": "", " waiting": ", uccl_engine_wait", " own choice": ", the same, congestion control not named"}[suffix]
            if suffix == " own choice":
                bar, good = "", None  # it may be another one than the raw streams'
            elif block in SCATTERED_SHARE:
                bar, reached = f">= {SCATTERED_SHARE[block]} x own", ratio(ours, own)
                good = None if reached is None else reached >= SCATTERED_SHARE[block]
            else:
                bar, reached = f">= {RAW_SHARE} x raw", ratio(ours, raw)
                good = None if reached is None else reached >= RAW_SHARE
            line = f"| {name} | {cell(ours)} | {cell(raw)} ({streams} streams) | {cell(ratio(ours, raw))} | {cell(ratio(ours, own))} | {bar} | {self.verdict(name, good)} |"
            for p in others:
                theirs = self.other(p, op, total, block)
                rate = theirs.get("gbytes_per_s")
                note = f" ({show_size(theirs['total_bytes'])})" if theirs and theirs["total_bytes"] != total else ""
                line += f" {cell(rate)}{note} | {cell(ratio(ours, rate))} |"
            lines.append(line)
        return lines

    def small(self):
        lines = ["| row, us | p50 | p99 | to reach | |", "|---|---|---|---|---|"]
        for key, name in (("pingpong spin 1", "raw TCP, 4 KiB and 16 bytes back, both poll"), ("pingpong sleep 1", "raw TCP, the same, both sleep")):
            row = self.results.get("raw", {}).get(key)
            if row:
                lines.append(f"| {name} | {row['p50_us']:.1f} | {row['p99_us']:.1f} | | |")
        for key, what in (("write 4096 4096", "4 KiB WRITE"), ("read 4096 4096", "4 KiB READ"), ("notify", "notification and its answer")):
            for system in ("ours", "nixl", "mooncake"):
                row = self.results.get(system, {}).get(key)
                if not row:
                    continue
                bar, verdict = "", ""
                raw = self.results.get("raw", {}).get("pingpong spin 1")
                if system == "ours" and key != "notify":
                    bar = f"p50 <= {SMALL_SHARE} x raw"
                    verdict = self.verdict(what, row["p50_us"] <= SMALL_SHARE * raw["p50_us"] if raw else None)
                lines.append(f"| {what}: {NAMES[system]} | {row['p50_us']:.1f} | {row['p99_us']:.1f} | {bar} | {verdict} |")
        return lines

    def cpu(self):
        _, streams = self.ceiling()
        lines = ["| CPU seconds per GiB, both processes | raw TCP, best rate | ours | NIXL + UCX | Mooncake |", "|---|---|---|---|---|"]
        cell = lambda v: f"{v:.2f}" if v is not None else "-"
        for op, total, block in CPU_ROWS:
            raw = self.get("raw", f"streams {streams}", "cpu_s_per_gib") if block == total else None
            figures = [raw] + [self.other(s, op, total, block).get("cpu_s_per_gib") for s in ("ours", "nixl", "mooncake")]
            lines.append(f"| {row_name(op, total, block)} | " + " | ".join(map(cell, figures)) + " |")
        return lines


def cost_table(rows):
    by = lambda name: [r for r in rows if r["row"] == name]
    lines = ["| cost | |", "|---|---|"]
    for r in by("idle"):
        lines.append(
            f"| idle engine, {r['connections']} connections of {r['channels']} channels, {r['seconds']:.0f} s | {r['initiator_percent']:.2f} % of a core at the "
            f"initiator, {r['target_percent']:.2f} % at the target (to reach: under {r['limit_percent']} %) |"
        )
    for r in by("connect"):
        lines.append(f"| connect with {r['channels']} channels, {r['repeats']} times | median {r['p50_ms']:.1f} ms, slowest {r['max_ms']:.1f} ms (to reach: under 50 ms) |")
    for r in by("memory"):
        lines.append(
            f"| resident memory of the {r['side']}, {r['state']} | {r['kib_per_connection_1_channel']:.0f} KiB a connection with 1 channel, "
            f"{r['kib_per_connection_8_channels']:.0f} KiB with 8: {r['kib_per_channel']:.0f} KiB a channel |"
        )
    for r in by("connection"):
        lines.append(f"| one of many connections, at the {r['side']} | {r['descriptors_per_connection']:.1f} descriptors, {r['kib_per_connection']:.0f} KiB after use |")
    lines += ["", "| connections of one client process | load | op | GB/s over all | p99 us | CPU s/GiB |", "|---|---|---|---|---|---|"]
    for r in by("connections"):
        lines.append(f"| {r['connections']} | {r.get('load', '-')} | {r['op'].upper()} | {r['gbytes_per_s']:.2f} | {r['p99_us']:.0f} | {r['cpu_s_per_gib']:.2f} |")
    if by("crowd"):
        lines += ["", "| idle connections beside | 4 KiB WRITE, us | p99 | a look for notifications, us | idle: initiator, target, % of a core |", "|---|---|---|---|---|"]
    for r in by("crowd"):
        initiator, target = r["idle_percent"]
        lines.append(
            f"| {r['idle_connections']} | {r['write_4k_p50_us']:.1f} | {r['write_4k_p99_us']:.0f} | {r['no_notification_us']:.2f} | "
            f"{initiator:.2f}, {target:.2f} (to reach: {IDLE_PERCENT}) |"
        )
    if by("line"):
        lines += ["", "| WRITE behind one of 1 GiB on its connection | alone, us | behind, us | p99 | to reach |", "|---|---|---|---|---|"]
    for r in by("line"):
        what = show_size(r["bytes"]) + (", inside a frame" if r["bytes"] <= 8 * KIB else "")
        lines.append(
            f"| {what} | {r['alone_p50_us']:.0f} | {r['behind_p50_us']:.0f} | {r['behind_p99_us']:.0f} | "
            f"{BEHIND_INLINE if r['bytes'] <= 8 * KIB else BEHIND} us |"
        )
    return lines


def report(document, name):
    """The whole text of a run, whose plots are called NAME-CONGESTION.svg, and the rows that missed their figure."""
    here, results = document["machine"], document["results"]
    text = [
        "<!-- Written by scripts/bench. -->",
        f"{here['cpu']}, {here['cores']} cores, {here['memory_gib']} GiB, Linux {here['kernel']}, loopback with an MTU of {here['mtu_loopback']}; "
        f"{document['date']}, revision {document['revision']}. Medians over {document['rounds']} rounds of one {document['mode']} run in which the systems took turns; GB = 1e9 bytes. "
        "Ours is verified on these runs, outside the timed region.",
    ]
    missed = []
    for congestion, found in results.items():
        table = Table(found)
        text += ["", f"### {congestion}", "", *table.bulk(), "", *table.small(), "", *table.cpu(), "", f"![GB/s over block size]({name}-{congestion}.svg)"]
        if table.misses:
            text += ["", f"Missed under {congestion}: {'; '.join(table.misses)}."]
        missed += table.misses
    if document["cost"]:
        text += ["", "### Cost", "", *cost_table(document["cost"])]
    text += [f"\nLeft out: {NAMES[n]}: {reason}" for n, reason in document["left_out"].items()]
    if document["disturbed"]:
        systems = {s for found in results.values() for s in found}
        turns = len(results) * document["rounds"] * len(systems)
        text.append(f"\nOther processes used more than {UNDISTURBED} cores during {len(document['disturbed'])} of {turns} turns.")
    return "\n".join(text) + "\n", missed
