"""The card of a published set: what it is, whose licences, how it was accepted, what is in it.

`huggingface_hub.DatasetCard` writes it, of the template `card.md`; the statistics here are the
kit's.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from rorem_lib.data.summary import CLASS_KEYS
from rorem_lib.files import hide_paths

# Identifiers that the Hub knows; any other licence is "other" there, and named.
HUB_LICENSES = set(
    "apache-2.0 mit bsd-3-clause cc0-1.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 "
    "cc-by-nc-4.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nc-nd-4.0 cc-by-nd-4.0 openrail "
    "openrail++ creativeml-openrail-m odc-by odbl".split()
)
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
_COLUMNS = "origin license accepted_by remover round width height mask_area extra".split()


def make_card(
    splits: dict[str, list[Path]], *, title: str, repo_id: str, acceptance: str, filters: str
) -> str:
    """The text of a dataset's `README.md`; the same shards give the same text.

    Args:
        splits: {split: its Parquet files}; no image in them is read.
        title: the heading.
        repo_id: what the example loads.
        acceptance, filters: Markdown.
    """
    from datasets import DatasetInfo, Features, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCard, DatasetCardData

    rows, info = [], {}
    for split, shards in splits.items():
        found = pq.read_table(shards, columns=_COLUMNS).to_pandas(integer_object_nulls=True)
        rows.append(found.assign(split=split))
        metas = [pq.read_metadata(shard) for shard in shards]
        size = sum(
            meta.row_group(n).total_byte_size for meta in metas for n in range(meta.num_row_groups)
        )
        info[split] = SplitInfo(split, size, len(found))
    rows = pd.concat(rows, ignore_index=True)
    rows["size"] = [f"{width}x{height}" for width, height in zip(rows["width"], rows["height"])]
    rows["class"] = [_name_class(json.loads(extra)) for extra in rows["extra"]]
    areas = rows.groupby("split")["mask_area"].quantile(list(QUANTILES)).unstack()

    licenses = sorted(set(rows["license"]))
    known = sorted({text.lower() if text.lower() in HUB_LICENSES else "other" for text in licenses})
    bounds = {"n<1K": 10**3, "1K<n<10K": 10**4, "10K<n<100K": 10**5, "100K<n<1M": 10**6}
    data = DatasetCardData(
        pretty_name=title,
        license=known[0] if len(known) == 1 else known,
        license_name=", ".join(licenses) if "other" in known else None,
        task_categories=["image-to-image"],
        tags=["object-removal", "inpainting", "rorem"],
        size_categories=[next((x for x, n in bounds.items() if len(rows) < n), "1M<n<10M")],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*"} for split in splits],
            }
        ],
    )
    whole = DatasetInfo(
        features=Features.from_arrow_schema(pq.read_schema(next(iter(splits.values()))[0])),
        dataset_size=sum(split.num_bytes for split in info.values()),
        download_size=sum(path.stat().st_size for shards in splits.values() for path in shards),
        splits=SplitDict(info),
    )
    DatasetInfosDict({"default": whole}).to_dataset_card_data(data)
    card = DatasetCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md")),
        title=escape_markdown(title),
        repo_id=repo_id,
        total=len(rows),
        first=next(iter(splits)),
        splits=lay_table(
            ["split", "triplets", "shards"],
            [[name, info[name].num_examples, len(shards)] for name, shards in splits.items()],
        ),
        licenses=_count(rows, splits, {"origin": "origin", "license": "licence"}),
        acceptance=hide_paths(acceptance).strip() or "Not described.",
        filters=hide_paths(filters).strip() or "None were noted.",
        accepted=_count(
            rows, splits, {"accepted_by": "accepted by", "remover": "remover", "round": "round"}, 30
        ),
        areas=lay_table(
            ["split", *(f"{q:.0%}" for q in QUANTILES)],
            [[split, *(f"{area:.2%}" for area in areas.loc[split])] for split in splits],
        ),
        sizes=_count(rows, splits, {"size": "size"}, 10),
        classes=_count(rows[rows["class"] != ""], splits, {"class": "class"}, 20),
    )
    return f"{card}\n"


def _name_class(extra: dict) -> str:
    found = next((extra[key] for key in CLASS_KEYS if extra.get(key)), "")
    return ", ".join(map(str, found)) if isinstance(found, list) else str(found)


def _count(
    rows: pd.DataFrame, splits: Iterable[str], heads: dict[str, str], limit: int | None = None
) -> str:
    """Counts of what stands in some columns, a column a split, the most frequent ones first."""
    cells = rows[[*heads, "split"]].fillna("-").astype(str)
    counts = cells.value_counts(sort=False).unstack("split", fill_value=0)
    counts = counts.reindex(columns=list(splits), fill_value=0)
    order = counts.sum(axis=1).sort_values(ascending=False, kind="stable").index
    lines = counts.loc[order].reset_index().values.tolist()
    more = f"\n\nand {len(lines) - limit} more" if limit and len(lines) > limit else ""
    return lay_table([*heads.values(), *counts], lines[:limit]) + more if lines else ""


def lay_table(head: Sequence, rows: list[list]) -> str:
    """A Markdown table; what stands in its cells is text, whatever it holds."""
    lines = [[escape_markdown(str(cell)) for cell in line] for line in [head, *rows]]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape_markdown(text: str) -> str:
    """A text on one line that Markdown shows as it stands: no heading, link, cell or HTML of it."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
