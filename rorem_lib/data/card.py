"""The card of a published set: what it is, whose licences, how it was accepted, what is in it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import numpy as np

HUB_LICENSES = {  # identifiers that the Hub knows; any other licence is "other" there, and named
    "apache-2.0",
    "mit",
    "bsd-3-clause",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0",
    "cc-by-nd-4.0",
    "cc-by-3.0",
    "cc-by-sa-3.0",
    "cc-by-nc-sa-3.0",
    "openrail",
    "openrail++",
    "creativeml-openrail-m",
    "odc-by",
    "odbl",
}
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)

_CARD = """---
{yaml}
---

# {title}

{total} triplets for object removal: `source` is a picture with an object, white in `mask` (at
least 128) is what is to be removed, `GT` is the picture without it (empty in a pool that has none).
The files are embedded as they are. `group` names the scene, video or picture that a triplet came
from: never split one. `extra` is a JSON object with the record's other keys.

{splits}

## Licences

Each triplet keeps the licence of its source (`license`); the strictest binds the whole.

{licenses}

## How the GTs were made

{acceptance}

{accepted}

## Filters

{filters}

## Statistics

Share of the picture that the mask covers:

{areas}

{sizes}

{classes}

## Use

```python
from datasets import load_dataset

data = load_dataset("{repo_id}", split="{first}", streaming=True)
triplet = next(iter(data))  # source, mask and GT are Pillow images
```

## Citation

The method is that of RORem:

```bibtex
@inproceedings{{li2025rorem,
  title     = {{{{RORem}}: Training a Robust Object Remover with Human-in-the-Loop}},
  author    = {{Li, Ruibin and Yang, Tao and Guo, Song and Zhang, Lei}},
  booktitle = {{Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition}},
  pages     = {{14024--14035}},
  year      = {{2025}}
}}
```
"""


def make_card(
    splits: dict[str, dict], features, *, title: str, repo_id: str, acceptance: str, filters: str
) -> str:
    """The text of a dataset's `README.md`; the same facts give the same text.

    Args:
        splits: {split: its facts}: `rows`, `shards`, `bytes` in memory and `file_bytes`; `areas`,
            each mask's share of its picture; and counts of `sizes` ("640x480"), `classes` and
            `kinds` (JSON lists of origin, license, accepted_by, remover and round).
        features: the `datasets.Features` of its rows.
        title: the heading.
        repo_id: what the example loads.
        acceptance, filters: Markdown.
    """
    kinds = {
        split: [(json.loads(key), n) for key, n in facts["kinds"].items()]
        for split, facts in splits.items()
    }
    licenses = sorted({kind[1] for found in kinds.values() for kind, _ in found})

    def count_kinds(pick: Callable) -> dict[str, Counter]:
        counts = {split: Counter() for split in splits}
        for split, found in kinds.items():
            for kind, n in found:
                counts[split][pick(kind)] += n
        return counts

    def count_names(key: str) -> dict[str, Counter]:
        return {
            split: Counter({(text,): n for text, n in facts[key].items() if text})
            for split, facts in splits.items()
        }

    return _CARD.format(
        yaml=_make_header(splits, features, title, licenses).strip(),
        title=title,
        repo_id=repo_id,
        total=sum(facts["rows"] for facts in splits.values()),
        first=next(iter(splits)),
        splits=_lay_table(
            ["split", "triplets", "shards"],
            [[split, facts["rows"], facts["shards"]] for split, facts in splits.items()],
        ),
        licenses=_count_table(["origin", "licence"], count_kinds(lambda k: (k[0], k[1]))),
        acceptance=acceptance.strip() or "Not described.",
        filters=filters.strip() or "None were noted.",
        accepted=_count_table(
            ["accepted by", "remover", "round"], count_kinds(lambda k: tuple(k[2:])), 30
        ),
        areas=_lay_table(
            ["split", *(f"{q:.0%}" for q in QUANTILES)],
            [
                [split, *(f"{share:.2%}" for share in np.quantile(facts["areas"], QUANTILES))]
                for split, facts in splits.items()
            ],
        ),
        sizes=_count_table(["size"], count_names("sizes"), 10),
        classes=_count_table(["class"], count_names("classes"), 20),
    )


def _make_header(splits: dict[str, dict], features, title: str, licenses: list[str]) -> str:
    from datasets import DatasetInfo, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    total = sum(facts["rows"] for facts in splits.values())
    bounds = {"n<1K": 10**3, "1K<n<10K": 10**4, "10K<n<100K": 10**5, "100K<n<1M": 10**6}
    known = sorted({text.lower() if text.lower() in HUB_LICENSES else "other" for text in licenses})
    data = DatasetCardData(
        pretty_name=title,
        license=known[0] if len(known) == 1 else known,
        license_name=", ".join(licenses) if "other" in known else None,
        task_categories=["image-to-image"],
        tags=["object-removal", "inpainting", "rorem"],
        size_categories=[next((text for text, n in bounds.items() if total < n), "1M<n<10M")],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*"} for split in splits],
            }
        ],
    )
    info = DatasetInfo(
        features=features,
        dataset_size=sum(facts["bytes"] for facts in splits.values()),
        download_size=sum(facts["file_bytes"] for facts in splits.values()),
        splits=SplitDict(
            {
                split: SplitInfo(split, facts["bytes"], facts["rows"])
                for split, facts in splits.items()
            }
        ),
    )
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    return data.to_yaml()


def _count_table(head: list[str], counts: dict[str, Counter], limit: int | None = None) -> str:
    """Counts as a table, a column a split, the most frequent first; empty without counts."""
    total = sum(counts.values(), Counter())
    order = sorted(total, key=lambda key: (-total[key], str(key)))
    rows = [
        [
            *("-" if cell is None else cell for cell in key),
            *(count[key] for count in counts.values()),
        ]
        for key in order[:limit]
    ]
    more = f"\n\nand {len(order) - len(rows)} more" if len(order) > len(rows) else ""
    return _lay_table([*head, *counts], rows) + more if rows else ""


def _lay_table(head: list, rows: list[list]) -> str:
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |"
        for line in [head, ["---"] * len(head), *rows]
    )
