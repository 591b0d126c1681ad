"""Small raw data of every source, laid out as its publisher distributes it, faults included.

The images are cut from photographs that scikit-image and scikit-learn bring along; the objects
are ellipses of other photographs, with a soft shadow where the source has shadows. Some items are
broken as downloads are: truncated files, missing masks, labels without polygons.

    .venv/bin/python tests/raw_data.py rord_960 /tmp/raw

writes one of `LAYOUTS` and prints how notebook 01 reads it.
"""

import functools
import io
import json
import pickle
import shlex
import shutil
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import skimage.data
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

SIZE = (240, 160)  # width, height
KINDS = {  # OpenImages' class: its label, the photograph, the object's box there (x0, y0, x1, y1)
    "Woman": ("/m/03bt1vf", 0, (150, 6, 306, 200)),
    "Coffee cup": ("/m/02p5f1q", 1, (74, 16, 482, 392)),
    "Cat": ("/m/01yrx", 3, (30, 0, 368, 298)),
    "Flower": ("/m/0c9ph5", 5, (166, 80, 450, 366)),
}
LAYOUTS: dict[str, Callable[[Path], dict]] = {}


def write_raw(name: str, folder: str | Path) -> dict:
    """Write the raw data of one of `LAYOUTS` into a folder, which is made.

    Returns:
        `source`, `options`: what the notebook is given. `counts`: triplets by set; `groups`: their
        groups. `rejected`: items by reason. `truth`: (set, id, source, mask, GT or None) of one
        triplet, arrays, up to compression, noise and the corners of polygons; or None.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = name if name == "open_images" else name.rpartition("_")[0]
    known = {
        "source": source if name.startswith(("rord", "mulan")) else name,
        "options": {},
        "truth": None,
    }
    found = known | LAYOUTS[name](folder)
    return {"groups": found["counts"]} | found


# ------------------------------------------------------------------------------------- images


@dataclass
class Scene:
    """[H, W, 3] `source` and `gt`, [H, W] `mask` of the object, `effect` with its shadow too."""

    kind: str
    source: np.ndarray
    mask: np.ndarray
    effect: np.ndarray
    gt: np.ndarray
    outline: np.ndarray  # [N, 2] px


@functools.cache
def load_photos() -> tuple[np.ndarray, ...]:
    found = [getattr(skimage.data, name)() for name in ("astronaut", "coffee", "rocket", "chelsea")]
    return (*found, *load_sample_images().images)


def make_view(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A photograph, or a part of one; numbers below 24 look different from each other."""
    photo, turn = Image.fromarray(load_photos()[number % 6]), number // 6
    if turn:
        width, height = photo.size
        left = width * 3 // 10 * (turn % 2)
        photo = photo.crop((left, height // 4 * (turn // 2), left + width * 7 // 10, height))
    return np.array(ImageOps.fit(photo if turn % 2 == 0 else ImageOps.mirror(photo), size))


def place_object(kind: str, size: tuple[int, int], left: float, scale: float = 0.55):
    """An object on a transparent layer [H, W, 4], and its outline [N, 2] in px.

    `left` is the share of the room that is left of it, `scale` its height's of the image's.
    """
    _, photo, (x0, y0, x1, y1) = KINDS[kind]
    width, height = size
    h = round(scale * height)
    w = round(h * (x1 - x0) / (y1 - y0))
    x, y = round(left * (width - w)), round(0.94 * height) - h
    layer = np.zeros((height, width, 4), np.uint8)
    layer[y : y + h, x : x + w, :3] = cv2.resize(
        load_photos()[photo][y0:y1, x0:x1], (w, h), interpolation=cv2.INTER_AREA
    )
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    middle, axes = np.array([x + w / 2, y + h / 2]), np.array([w / 2, h / 2])
    inner = cv2.fillPoly(
        np.zeros((height, width), np.uint8),
        [np.rint(middle + circle * (axes - 4)).astype(np.int32)],
        255,
    )
    layer[..., 3] = cv2.GaussianBlur(inner, (5, 5), 1)
    return layer, middle + circle * (axes - 1)


def make_scene(
    number: int,
    size: tuple[int, int] = SIZE,
    *,
    shadow: bool = True,
    step: int = 0,
    scale: float = 0.55,
) -> Scene:
    """An object before a view of another photograph; with every `step` it has moved on."""
    gt = make_view(number, size)
    kind = next(
        kind for kind in np.roll(list(KINDS), -number).tolist() if KINDS[kind][1] != number % 6
    )
    left = 0.2 + 0.35 * (number % 3) / 2 + 0.1 * step
    layer, outline = place_object(kind, size, left, scale)
    mask = cv2.fillPoly(np.zeros(size[::-1], np.uint8), [np.rint(outline).astype(np.int32)], 255)
    dark = np.zeros(size[::-1], np.float32)
    if shadow:
        low, (width, height) = outline.max(axis=0), np.ptp(outline, axis=0)
        middle = np.rint([low[0] - 0.35 * width, low[1] - 0.04 * height]).astype(int).tolist()
        axes = np.rint([0.6 * width, 0.12 * height]).astype(int).tolist()
        dark = cv2.ellipse(dark, middle, axes, 0, 0, 360, 0.55, cv2.FILLED)
        dark = cv2.GaussianBlur(dark, (0, 0), 0.02 * size[1])
    ground = np.rint(gt * (1 - dark[..., None])).astype(np.uint8)
    effect = np.where((mask > 0) | (dark > 0.03), 255, 0).astype(np.uint8)
    return Scene(kind, lay(ground, layer), mask, effect, gt, outline)


def lay(under: np.ndarray, *layers: np.ndarray) -> np.ndarray:
    """RGBA layers over an image, the last on top."""
    under = under.astype(float)
    for layer in layers:
        share = layer[..., 3:] / 255
        under = layer[..., :3] * share + under * (1 - share)
    return np.rint(under).astype(np.uint8)


def film(picture: np.ndarray, seed: int) -> np.ndarray:
    """What a camera makes of it: noise, and light that is never twice the same."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(rng.uniform(-2, 2), 1.5, picture.shape)
    return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)


def put(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(
        path, **({"quality": 95} if path.suffix == ".jpg" else {}), **options
    )
    return path


def cut_short(path: Path) -> None:
    """What a download that broke off leaves."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def layout(write):
    LAYOUTS[write.__name__.removeprefix("_")] = write
    return write


def _truth(place: str, name: str, scene: Scene, mask: str = "mask", gt: bool = True) -> tuple:
    return place, name, scene.source, getattr(scene, mask), scene.gt if gt else None


# ----------------------------------------------------------------------------------------- RORD


def _name_video(number: int) -> str:
    return f"I-210618_I{number + 1:05d}_W01"


def _write_label(path: Path, *polygons: tuple[str, np.ndarray], width: int = SIZE[0]) -> None:
    """Polygons are (Class_ID, [N, 2] px of the image); the label is drawn on 1920 px."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "Raw_Data_Info.": {"Raw_Data_ID": path.stem, "Resolution": "1920, 1080"},
                "Learning_Data_Info.": {
                    "Annotation": [
                        {
                            "Class_ID": kind,
                            "segmentation": np.rint(points * 1920 / width).ravel().tolist(),
                        }
                        for kind, points in polygons
                    ]
                },
            }
        ),
        encoding="utf-8",
    )


_FILMED = (240, 135)
_GROUND = np.array([[0, 100], [239, 100], [239, 134], [0, 134]])


@layout
def _rord_raw(folder):
    for number in range(7):
        video = _name_video(number)
        for step in range(3):
            scene, stem = make_scene(number, _FILMED, step=step), f"{video}_F{40 * step + 1:04d}"
            put(folder / f"S1/jpg/{video}/{stem}.jpg", film(scene.source, 10 * number + step))
            _write_label(
                folder / f"S1/M/{video}/{stem}_M.json", ("BO3", _GROUND), ("F38", scene.outline)
            )
        put(folder / f"S1/jpg/{video}/{video}_G0001.jpg", film(scene.gt, 10 * number + 9))
    middle = [folder / f"S1/M/{_name_video(n)}/{_name_video(n)}_F0041_M.json" for n in range(7)]
    middle[4].unlink()
    _write_label(middle[5], ("BO3", _GROUND), ("F38", np.array([[30, 40], [60, 80]])))
    cut_short(middle[6])
    return {
        "counts": {"labelled": 4},
        "rejected": {"no mask": 1, "no object": 1, "unreadable": 1},
        "truth": _truth(
            "labelled",
            f"S1-{_name_video(1)}-{_name_video(1)}_F0041",
            make_scene(1, _FILMED, step=1),
        ),
    }


@layout
def _rord_960(folder):
    for number in range(10):
        video, part = _name_video(number), folder / "RORD" / ("val" if number > 7 else "train")
        for step in range(3):
            scene, stem = make_scene(number, _FILMED, step=step), f"{video}_F{40 * step + 1:04d}"
            seed = 10 * number + step
            put(part / f"img/{video}/{stem}.jpg", film(scene.source, seed))
            gt = np.roll(scene.gt, 5, axis=1) if number == 6 else scene.gt  # the tripod was moved
            put(part / f"gt/{video}/{stem}.jpg", film(gt, seed + 1000))
            put(part / f"mask/{video}/{stem}_M.png", 255 - scene.effect)
            _write_label(
                part / f"label/{video}/{stem}.json", ("BO3", _GROUND), ("F38", scene.outline)
            )
        put(part / f"img/{video}/{video}_G0001.jpg", film(scene.gt, seed + 9))

    def middle(number, kind, ending):
        part, video = "val" if number > 7 else "train", _name_video(number)
        return folder / "RORD" / part / kind / video / f"{video}_F0041{ending}"

    middle(3, "gt", ".jpg").unlink()  # the plate is there
    middle(4, "label", ".json").unlink()  # the coarse mask is
    _write_label(middle(5, "label", ".json"), ("BO3", _GROUND))
    cut_short(middle(7, "img", ".jpg"))
    middle(9, "label", ".json").unlink()
    middle(9, "mask", "_M.png").unlink()
    return {
        "counts": {"labelled": 5, "test": 1},
        "rejected": {"misaligned": 1, "no mask": 1, "no object": 1, "unreadable": 1},
        "truth": _truth(
            "labelled",
            f"train-{_name_video(4)}-{_name_video(4)}_F0041",
            make_scene(4, _FILMED, step=1),
            "effect",
        ),
    }


@layout
def _rord_preprocessed(folder):
    for number in range(8):
        part = folder / ("test" if number % 5 == 4 else "train")
        for step in range(2):
            scene, name = make_scene(number, _FILMED, step=step), _name_video(number)
            name += f"_F{step + 1:04d}.png"
            put(part / "img" / name, film(scene.source, 10 * number + step))
            put(part / "gt" / name, film(scene.gt, 10 * number + step + 1000))
            put(part / "mask" / name, 255 - scene.mask)
    (folder / f"train/mask/{_name_video(5)}_F0002.png").unlink()
    (folder / f"train/gt/{_name_video(6)}_F0002.png").unlink()
    cut_short(folder / f"train/img/{_name_video(7)}_F0002.png")
    return {
        "counts": {"labelled": 11, "test": 2},
        "groups": {"labelled": 7, "test": 1},
        "options": {"frames": 1},
        "rejected": {"no GT": 1, "no mask": 1, "unreadable": 1},
        "truth": _truth("test", f"test-{_name_video(4)}_F0002", make_scene(4, _FILMED, step=1)),
    }


# ---------------------------------------------------------------------------------------- MULAN


def _make_stack(number: int, count: int) -> tuple[np.ndarray, list[np.ndarray], list[str]]:
    """A background, layers that overlap, the last on top, and their captions."""
    kinds = [
        kind for kind in np.roll(list(KINDS), -number).tolist() if KINDS[kind][1] != number % 6
    ][:count]
    layers = [
        place_object(kind, SIZE, 0.12 + 0.25 * at, 0.7 - 0.12 * at)[0]
        for at, kind in enumerate(kinds)
    ]
    for layer in layers:
        layer[layer[..., 3] == 0] = 0
    return make_view(number), layers, [f"a {kind.lower()}, cut out" for kind in kinds]


def _mulan_truth(name: str, background, layers, count: int) -> tuple:
    mask = cv2.dilate((layers[count - 1][..., 3] > 1).astype(np.uint8) * 255, np.ones((5, 5)))
    return (
        "labelled",
        name,
        lay(background, *layers[:count]),
        mask,
        lay(background, *layers[: count - 1]),
    )


def _name_picture(number: int) -> str:
    return f"{139 + number * 4711:012d}" if number % 2 else f"{number * 4711:09d}"  # COCO, LAION


@layout
def _mulan_annotations(folder):
    """Annotations and, beside them, the photographs: the layers are what these do not show."""
    for number in range(8):
        background, layers, captions = _make_stack(number, 1 + number % 3)
        name, shown = _name_picture(number), lay(background, *layers)
        photo = folder / "photographs" / ("train2017" if number % 2 else "00000") / f"{name}.jpg"
        shown = np.array(Image.open(put(photo, shown)))

        def take_apart(rgb, seen, shown=shown):
            return {
                "original_image_mask": seen,
                "inpainted_delta": rgb - shown * seen[..., None].astype(np.uint8),
            }

        over = np.cumsum([layer[..., 3] > 0 for layer in layers[::-1]], axis=0)[::-1]
        instances = {}
        for key, (layer, caption) in enumerate(zip(layers, captions)):
            own = layer[..., 3] == 255
            seen = own & (over[key] == 1)
            instances[key] = {"blip2": caption, "instance_alpha": layer[..., 3]} | take_apart(
                layer[..., :3], seen
            )
        annotation = {
            "captioning": {"llava": "13b", "blip2": "opt", "clip": "L14"},
            "background": {"llava": "N/A", "blip2": "a photograph"}
            | take_apart(background, over[0] == 0),
            "image": {"llava": "N/A", "blip2": "things"},
            "instances": instances,
        }
        if number == 5:
            annotation["instances"] = {}
        path = folder / "annotations" / f"{name}.p.zl"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(zlib.compress(pickle.dumps(annotation)))
    photo.unlink()
    cut_short(folder / "annotations" / f"{_name_picture(6)}.p.zl")
    background, layers, _ = _make_stack(2, 3)
    return {
        "options": {"images": "photographs"},
        "counts": {"labelled": 5},
        "rejected": {"no instance": 1, "no photograph": 1, "unreadable": 1},
        "truth": _mulan_truth(_name_picture(2), background, layers, 3),
    }


@layout
def _mulan_decomposed(folder):
    """What the publisher's script writes; every instance becomes a triplet."""
    rows = ["paths,blip2,llava"]
    for number in range(8):
        background, layers, captions = _make_stack(number, 1 + number % 3)
        for at, (layer, caption) in enumerate(
            zip([background, *layers], ["a photograph"] + captions)
        ):
            path = folder / "coco" / f"{_name_picture(number)}-layer_{at}.png"
            if number == 6:  # one instance: saved without its alpha
                layer = layer[..., :3]
            put(path, layer)
            rows.append(f'{path.name},"{caption}",N/A')
    (folder / "coco" / "meta_data.csv").write_text("\n".join(rows) + "\n")
    (folder / "coco" / f"{_name_picture(4)}-layer_1.png").unlink()  # of two instances
    cut_short(folder / "coco" / f"{_name_picture(3)}-layer_1.png")  # of one
    background, layers, _ = _make_stack(5, 3)
    return {
        "options": {"remove": "each"},
        "counts": {"labelled": 11},
        "groups": {"labelled": 5},
        "rejected": {"unreadable": 2, "missing file": 1},
        "truth": _mulan_truth(f"{_name_picture(5)}-2", background, layers, 2),
    }


# -------------------------------------------------------------- images with masks, without GT


@layout
def _open_images(folder):
    header = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
    rows = {"train": [header], "validation": [header]}
    for number in range(11):
        split, image = "validation" if number > 8 else "train", f"{number:x}a1b2c3d4e5f6071"
        scene = make_scene(number, (256, 171), shadow=False)
        picture = folder / split / f"{image}.jpg"
        if number == 7:  # the camera was held upright; the mask is of the image as it was shot
            exif = Image.Exif()
            exif[0x0112] = 6
            put(picture, scene.source, exif=exif.tobytes())
        else:
            put(picture, scene.source)
        label = "/m/0dzct" if number == 6 else KINDS[scene.kind][0]
        mask = f"{image}_{label[1:].replace('/', '')}_{number:08x}.png"
        path = put(
            folder / f"{split}-masks-{image[0]}" / mask,
            cv2.resize(scene.mask, (200, 134), interpolation=cv2.INTER_NEAREST),
        )
        Image.open(path).convert("1").save(path)
        (x0, y0), (x1, y1) = (
            f(axis=0) / (256, 171) for f in (scene.outline.min, scene.outline.max)
        )
        rows[split].append(
            f"{mask},{image},{label},{number:08x},{x0:.6f},{x1:.6f},{y0:.6f},"
            f"{y1:.6f},0.86864,0.5 0.6 1;0.8 0.5 0"
        )
    for split, lines in rows.items():
        name = f"{split}-annotations-object-segmentation.csv"
        (folder / name).write_text("\n".join(lines) + "\n")
    (folder / "class-descriptions.csv").write_text(
        "\n".join(
            [f"{label},{name}" for name, (label, *_) in KINDS.items()] + ["/m/0dzct,Human face"]
        )
    )
    (folder / "train/4a1b2c3d4e5f6071.jpg").unlink()  # its owner has withdrawn it
    cut_short(folder / "train/5a1b2c3d4e5f6071.jpg")
    scene = make_scene(1, (256, 171), shadow=False)
    return {
        "counts": {"pool": 5, "test": 2},
        "rejected": {"mask of another shape": 1, "missing file": 1, "unreadable": 1},
        "truth": _truth(
            "pool",
            f"1a1b2c3d4e5f6071_{KINDS[scene.kind][0][1:].replace('/', '')}_{1:08x}",
            scene,
            gt=False,
        ),
    }


@layout
def _high_resolution(folder):
    """DIV2K and Flickr2K, at a third of their size, with masks that somebody drew."""
    places = [
        "DIV2K_train_HR/0001",
        "DIV2K_train_HR/0002",
        "DIV2K_train_HR/0003",
        "DIV2K_train_HR/0004",
        "DIV2K_valid_HR/0801",
        "Flickr2K/Flickr2K_HR/000001",
        "Flickr2K/Flickr2K_HR/000002",
    ]
    for number, place in enumerate(places):
        scene = make_scene(number, (640, 427) if number != 3 else (320, 213), scale=0.35)
        put(folder / f"{place}.png", scene.source)
        stem = Path(place).name
        if number == 1:  # two objects, each removed on its own
            put(folder / f"masks/{stem}_1.png", scene.mask)
            put(folder / f"masks/{stem}_2.png", scene.mask[:, ::-1])
        elif number != 2:
            put(folder / f"masks/{stem}.png", scene.mask * (number != 6))
    put(folder / "masks/0900.png", scene.mask)
    return {
        "options": {"size": 256, "min_side": 256, "margin": 16},
        "counts": {"pool": 4, "test": 1},
        "groups": {"pool": 3, "test": 1},
        "rejected": {"empty mask": 1, "no mask": 1, "no image": 1, "small image": 1},
    }


# -------------------------------------------------------------------------------- cut-outs, sets


@layout
def _composites(folder):
    for number, kind in enumerate(KINDS):
        layer, outline = place_object(kind, (440, 400), 0.5, 0.9)
        (x0, y0), (x1, y1) = outline.min(axis=0).astype(int), outline.max(axis=0).astype(int)
        put(folder / "cutouts" / kind / f"{number:04d}.png", layer[y0 : y1 + 1, x0 : x1 + 1])
    put(folder / "cutouts/Cat/from the web.png", make_view(3))  # nobody has cut it out
    for number in (1, 2, 4, 7, 8, 10):
        put(folder / f"backgrounds/{number:04d}.jpg", make_view(number, (300, 225)))
    put(folder / "backgrounds/0013.jpg", make_view(13, (150, 100)))
    cut_short(folder / "backgrounds/0010.jpg")
    return {
        "options": {"count": 24, "size": 160, "license": "CC0-1.0"},
        "counts": {"labelled": 14},
        "groups": {"labelled": 5},
        "rejected": {"no alpha": 3, "small background": 4, "unreadable": 3},
    }


@layout
def _upstream(folder):
    """Three sets as the authors' archives have them: a list, JSON lines, and their older keys."""
    records = {"RORD": [], "Mulan": [], "discriminator": []}
    for number in range(11):
        place = list(records)[min(number // 4, 2)]
        scene, name = make_scene(number, shadow=place == "RORD"), f"{number:05d}"
        old = place == "discriminator"
        parts = (
            {"gt": "gt", "mask": "mask", "inpaint": "inpaint"}
            if old
            else {"source": "source", "mask": "mask", "GT": "GT"}
        )
        for key, picture in zip(parts, (scene.source, scene.mask, scene.gt)):
            put(folder / place / parts[key] / f"{name}.png", picture)
        record = {key: f"{part}/{name}.png" for key, part in parts.items()}
        records[place].append(record | ({"score": number % 2} if place != "Mulan" else {}))
    records["RORD"][3]["source"] = "../../secret.png"
    (folder / "Mulan/GT/00006.png").unlink()
    put(folder / "Mulan/mask/00007.png", 0 * scene.mask)
    cut_short(folder / "discriminator/inpaint/00010.png")
    for place, found in records.items():
        lines = [json.dumps(record) for record in found]
        (folder / place / "meta.json").write_text(
            "\n".join(lines) if place == "Mulan" else f"[{', '.join(lines)}]"
        )
    return {
        "counts": {"labelled": 7},
        "rejected": {"bad record": 1, "empty mask": 1, "missing file": 1, "unreadable": 1},
        "truth": _truth("labelled", "discriminator-00009", make_scene(9, shadow=False)),
    }


@layout
def _parquet(folder):
    """Published by this kit, and damaged afterwards."""
    from rorem_lib.data.publishing import publish_sets
    from rorem_lib.data.writer import TripletWriter

    sets = folder.parent / f"{folder.name}.sets"
    for place, numbers in (("labelled", range(6)), ("test", range(6, 8))):
        with TripletWriter(sets / place) as writer:
            for number in numbers:
                scene = make_scene(number)
                writer.add(
                    id=f"t{number}",
                    source=scene.source,
                    mask=scene.mask,
                    gt=scene.gt,
                    group=f"room {number // 2}",
                    origin="my photographs",
                    license="CC-BY-4.0",
                    **{"class": scene.kind},
                )
    publish_sets(
        {place.name: place for place in sorted(sets.iterdir())}, folder, repo_id="somebody/removals"
    )
    shutil.rmtree(sets)
    (folder / ".publishing.json").unlink()
    file = folder / "data/labelled-00000-of-00001.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[4]["GT"] = None
    rows[5]["source"]["bytes"] = rows[5]["source"]["bytes"][:4000]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
    return {
        "counts": {"labelled": 4, "test": 2},
        "groups": {"labelled": 2, "test": 1},
        "rejected": {"no GT": 1, "unreadable": 1},
        "truth": _truth("labelled", "t2", make_scene(2)),
    }


@layout
def _ober(folder):
    def encode(array, kind="PNG"):
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, kind, quality=95)
        return stream.getvalue()

    rows = {"train": [], "test": []}
    for number in range(9):
        scene, split = make_scene(number // 2 if number < 4 else number), "train"
        subset, path = "OBER-Cap", f"{number // 2:04d}_{number % 2 + 1}.jpg"
        if number > 5:
            split, subset, path = (
                "test",
                ("OBER-Test", "OBER-Wild", "RORD-Val-343")[number - 6],
                ("0001.jpg", "0002.jpg", f"{_name_video(8)}_F0109.jpg")[number - 6],
            )
        data = {
            "input": encode(film(scene.source, number), "JPEG"),
            "gt": encode(film(scene.gt, number + 99), "JPEG"),
            "object_mask": encode(scene.mask),
            "object_effect_mask": encode(scene.effect),
        }
        if number == 5:
            data["gt"] = data["gt"][:3000]
        row = {key: {"bytes": value, "path": path} for key, value in data.items()}
        if subset == "OBER-Wild":
            row["gt"] = None
        rows[split].append(row | {"subset": subset, "split": split})
    (folder / "data").mkdir()
    for split, found in rows.items():
        pq.write_table(
            pa.Table.from_pylist(found),
            folder / f"data/{split}-00000-of-00001.parquet",
            row_group_size=4,
        )
    return {
        "options": {"mask": "effect"},
        "counts": {"labelled": 5, "test": 2},
        "groups": {"labelled": 3, "test": 2},
        "rejected": {"no GT": 1, "unreadable": 1},
        "truth": _truth("test", f"RORD-Val-343-{_name_video(8)}_F0109", make_scene(8), "effect"),
    }


# ----------------------------------------------------------------------------- the peers' folders


@layout
def _removal_bench(folder):
    for number in range(6):
        scene = make_scene(number)
        for part, picture in (
            ("images", scene.source),
            ("gt", scene.gt),
            ("masks", scene.mask),
            ("results_omnieraser_base", scene.gt),
        ):
            put(folder / part / f"{number:04d}.png", picture)
    (folder / "masks/0004.png").unlink()
    cut_short(folder / "gt/0005.png")
    return {
        "counts": {"test": 4},
        "rejected": {"missing file": 1, "unreadable": 1},
        "truth": _truth("test", "0002", make_scene(2)),
    }


@layout
def _syn4removal(folder):
    details = {}
    for number in range(7):
        scene, name = make_scene(number, (160, 160), shadow=False), f"{number:08d}.jpg"
        for part, picture in (("paste", scene.source), ("gt", scene.gt), ("mask", scene.mask)):
            put(folder / "train" / part / name, picture)
        (x0, y0), (x1, y1) = scene.outline.min(axis=0), scene.outline.max(axis=0)
        details[name] = [scene.kind, np.rint([x0, y0, x1 - x0, y1 - y0]).tolist(), [160, 160]]
    (folder / "train/gt/00000005.jpg").unlink()
    cut_short(folder / "train/paste/00000006.jpg")
    (folder / "train/result.json").write_text(json.dumps(details))
    return {
        "counts": {"labelled": 5},
        "rejected": {"missing file": 1, "unreadable": 1},
        "truth": _truth("labelled", "train-00000003", make_scene(3, (160, 160), shadow=False)),
    }


@layout
def _omnieraser(folder):
    for number in range(7):
        scene, name = make_scene(number), f"video{number:03d}_000{number}.png"
        put(folder / "img" / name, film(scene.source, number))
        put(folder / "gt_new" / name, film(scene.gt if number != 5 else scene.gt[:120], number + 9))
        put(folder / "sam_mask" / name, scene.mask if number != 6 else scene.mask * 0 + 255)
    return {
        "counts": {"labelled": 5},
        "rejected": {"sizes differ": 1, "white mask": 1},
        "truth": _truth("labelled", "video004_0004", make_scene(4)),
    }


@layout
def _corne(folder):
    lists = {"shot": [], "mask": [], "bg": [], "mask_sam": []}
    for number in range(7):
        scene, name = make_scene(number), f"{number:06d}.png"
        for part, path, picture in (
            ("shot", f"shot/{name}", scene.source),
            ("bg", f"bg/{name}", scene.gt),
            ("mask", f"masks/mask_{name}", scene.effect),
            ("mask_sam", f"mask_sam/{name}", scene.mask),
        ):
            put(folder / path, picture)
            lists[part].append(f"/storage/corne/{path}")  # of the machine that made them
    (folder / "bg/000005.png").unlink()
    put(folder / "bg/000006.png", make_scene(6).source)  # the edit that changed nothing
    for part, lines in lists.items():
        (folder / f"{part}_list.txt").write_text("\n".join(lines) + "\n")
    return {
        "options": {"mask": "effect"},
        "counts": {"labelled": 5},
        "rejected": {"missing file": 1, "unchanged": 1},
        "truth": _truth("labelled", "000001", make_scene(1), "effect"),
    }


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in LAYOUTS:
        sys.exit(f"usage: raw_data.py LAYOUT FOLDER; layouts: {', '.join(LAYOUTS)}")
    place = Path(sys.argv[2]).absolute()
    made = write_raw(sys.argv[1], place)
    print(
        shlex.join(
            [
                ".venv/bin/papermill",
                "notebooks/01_assemble_dataset.ipynb",
                "out.ipynb",
                "-p",
                "source",
                made["source"],
                "-p",
                "input_dir",
                str(place),
                "-y",
                json.dumps({"source_options": made["options"]}),
            ]
        )
    )
