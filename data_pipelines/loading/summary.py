"""What each source offers, and a warning where much of it is dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.packing.lengths import Lengths
from data_pipelines.sources.source import Source

WARN_ABOVE = 0.05  # share of the samples that are dropped
_UNJOINED = "no_joined_caption"


def summarize(name: str, source: Source, lengths: Lengths, refused: Mapping[str, int]) -> dict[str, Any]:
    """What a source offers.

    Args:
      name: in the config.
      lengths: of the source's samples.
      refused: samples that do not fit in any row, by reason.

    Returns:
      "source": its name; "samples": number in its shards; "usable": samples that are read, counted as often as they are
      offered; "dropped": by reason; "dropped_share": share of the samples, 0..1, including unjoined but not filtered
      ones; "filtered": by filter. With captions also "captions": number in the files, "joined": samples with a caption,
      "unjoined": samples without, "unused": captions that belong to no sample.
    """
    filtered = source.filtered()
    dropped = Counter({reason: n for reason, n in source.dropped().items() if reason not in filtered})
    unjoined = dropped.pop(_UNJOINED, 0)
    dropped.update(lengths.bad)
    dropped.update(refused)
    counts = source.counts()
    lost = sum(dropped.values()) + unjoined
    usable = len(source) - sum(lengths.bad.values()) - sum(refused.values())
    result = {
        "source": name,
        "samples": counts.get("samples", len(source)),
        "usable": usable,
        "dropped": dict(dropped.most_common()),
        "dropped_share": lost / max(1, lost + usable + sum(filtered.values())),
        "filtered": dict(filtered),
    }
    if "captions" in counts:
        joined = {"joined": len(source), "unjoined": unjoined, "unused": counts["unused"]}
        result |= {"captions": counts["captions"], **joined}
    return result


def summary_lines(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Console lines for ``PackedData.sources_summary``: one per source, and one more where much is dropped."""
    lines = []
    for each in summaries:
        parts = [f"{each['usable']} of {each['samples']} samples usable"]
        parts += [f"dropped: {_counts(each['dropped'])}"] if each["dropped"] else []
        parts += [f"filtered: {_counts(each['filtered'])}"] if each["filtered"] else []
        if "captions" in each:
            parts.append(
                f"captions: {each['joined']} joined, {each['unjoined']} samples without, "
                f"{each['unused']} of {each['captions']} unused"
            )
        lines.append(f"source {each['source']}: {'; '.join(parts)}")
        if each["dropped_share"] > WARN_ABOVE:
            share = f"{100 * each['dropped_share']:.0f} %"
            lines.append(
                f"warning: source {each['source']}: {share} of its samples are dropped; see the reasons above, and "
                "python -m data_pipelines.check"
            )
    return lines


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in counts.items())
