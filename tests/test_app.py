"""`rorem app` without a browser: its HTTP API, its errors, the Space's folder."""

import os
import re
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import yaml
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image, ImageCms

from rorem_lib.app import app, marks, service
from rorem_lib.app.space import find_modules, main, write_space
from rorem_lib.builtin.scenes import render_scene
from rorem_lib.data.pictures import load_image
from rorem_lib.files import ROOT
from rorem_lib.models.inpainting import ObjectRemover

STEPS = 2


@pytest.fixture(scope="module")
def remover():
    return ObjectRemover.from_pretrained("builtin", device="cpu")


@pytest.fixture(scope="module")
def scene():
    return render_scene([4, 3], role="pool")


@pytest.fixture(scope="module")
def files(scene, tmp_path_factory):
    """A photo with profile and EXIF, its mask, and what is neither."""
    folder = tmp_path_factory.mktemp("photos")
    exif = Image.Exif()
    exif[0x010E] = "a scene"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = Image.fromarray(scene.image)
    photo.save(folder / "photo.png", exif=exif, icc_profile=profile)
    Image.fromarray(scene.mask).save(folder / "mask.png")
    Image.fromarray(np.zeros_like(scene.mask)).save(folder / "empty.png")
    Image.fromarray(scene.mask[:, :40]).save(folder / "narrow.png")
    Image.new("RGB", (1200, 1000), "white").save(folder / "large.png")
    photo.save(folder / "film.gif", save_all=True, append_images=[Image.fromarray(scene.truth)])
    (folder / "text.png").write_text("no image")
    (folder / "heavy.bin").write_bytes(os.urandom(3_000_000))
    return folder


@pytest.fixture(scope="module")
def address(remover):
    """A running app of at most one megapixel and 2 MB."""
    ui = app.build(service.Service(remover, megapixels=1))
    try:
        yield app.launch(ui, prevent_thread_lock=True, quiet=True, max_file_size=2 * 10**6)[1]
    finally:
        ui.close()


@pytest.fixture(scope="module")
def client(address, tmp_path_factory):
    return Client(address, verbose=False, download_files=tmp_path_factory.mktemp("down"))


def test_the_endpoint_gives_what_the_class_gives(client, files, scene, remover):
    answer = client.predict(
        image=handle_file(files / "photo.png"),
        mask=handle_file(files / "mask.png"),
        steps=STEPS,
        seed=7,
        api_name="/remove",
    )
    expected = remover.remove(
        str(files / "photo.png"), scene.mask, num_inference_steps=STEPS, seed=7
    )
    found = load_image(answer)
    np.testing.assert_array_equal(found, np.asarray(expected.image.convert("RGB")))
    outside = expected.effect == 0
    assert outside.mean() > 0.1
    np.testing.assert_array_equal(found[outside], scene.image[outside])
    assert (found[scene.mask > 0] != scene.image[scene.mask > 0]).any()
    with Image.open(answer) as result, Image.open(files / "photo.png") as photo:
        assert result.format == "PNG" and result.getexif()[0x010E] == "a scene"
        assert result.info["icc_profile"] == photo.info["icc_profile"]
    assert answer.endswith("photo_removed.png")


@pytest.mark.parametrize("kind", ["turned.jpg", "layered.png", "deep.png"])
def test_photos_of_other_kinds_come_back_as_they_are(client, files, scene, remover, kind):
    wide = np.hstack([scene.image, scene.image[:, ::-1]])
    mask = np.hstack([scene.mask, scene.mask * 0])
    photo, options = Image.fromarray(wide), {}
    if kind == "turned.jpg":
        photo, exif = photo.rotate(90, expand=True), Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees to the right
        options = {"exif": exif, "quality": 95}
    elif kind == "layered.png":
        photo.putalpha(Image.fromarray(np.tile(np.arange(128, dtype=np.uint8), (64, 1)) + 100))
    else:
        photo = Image.fromarray(wide[..., 1].astype(np.uint16) * 200 + 7)
    photo.save(files / kind, **options)
    Image.fromarray(mask).save(files / "wide.png")
    answer = client.predict(
        image=handle_file(files / kind),
        mask=handle_file(files / "wide.png"),
        steps=STEPS,
        api_name="/remove",
    )
    expected = remover.remove(str(files / kind), mask, num_inference_steps=STEPS)
    with Image.open(answer) as result:
        assert result.size == (128, 64) and result.getexif().get(0x0112, 1) == 1
        assert result.mode == expected.image.mode and result.format == "PNG"
        np.testing.assert_array_equal(np.asarray(result), np.asarray(expected.image))
        if kind == "turned.jpg":
            return
        kept = expected.effect == 0
        np.testing.assert_array_equal(np.asarray(result)[kept], np.asarray(photo)[kept])


def test_settings_reach_the_model(client, files, scene, remover):
    options = {"mode": "exact", "seed": 1, "dilate": 9, "guidance": 2}
    Image.fromarray(255 - scene.mask).save(files / "inverted.png")
    answer = client.predict(
        image=handle_file(files / "photo.png"),
        mask=handle_file(files / "inverted.png"),
        invert_mask=True,
        steps=STEPS,
        **options,
        api_name="/remove",
    )
    options["guidance_scale"] = options.pop("guidance")
    expected = remover.remove(
        str(files / "photo.png"), scene.mask, num_inference_steps=STEPS, **options
    )
    np.testing.assert_array_equal(load_image(answer), np.asarray(expected.image.convert("RGB")))


@pytest.mark.parametrize(
    "image, mask, words",
    [
        ("photo.png", "empty.png", ["marked"]),
        ("photo.png", "narrow.png", ["narrow.png", "40x64", "64x64"]),
        ("photo.png", None, ["mask"]),
        (None, "mask.png", ["image"]),
        ("text.png", "mask.png", ["text.png", "no image"]),
        ("film.gif", "mask.png", ["film.gif", "2 frames"]),
        ("large.png", "mask.png", ["large.png", "1.2 megapixels", "limit", "1:"]),
    ],
)
def test_errors_say_what_to_do(client, files, image, mask, words):
    given = {
        key: handle_file(files / name) if name else None
        for key, name in (("image", image), ("mask", mask))
    }
    with pytest.raises(AppError) as caught:
        client.predict(**given, steps=STEPS, api_name="/remove")
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "/tmp" not in message and str(files) not in message, "the server's folders are its own"


def test_options_that_make_no_sense_are_named(client, files):
    given = {"image": handle_file(files / "photo.png"), "mask": handle_file(files / "mask.png")}
    with pytest.raises(AppError, match="dilate"):
        client.predict(**given, steps=STEPS, dilate=-1, api_name="/remove")
    with pytest.raises(AppError, match="mode|choices"):
        client.predict(**given, steps=STEPS, mode="magic", api_name="/remove")


def test_a_file_above_the_limit_is_refused(client, files):
    with pytest.raises(Exception, match="2000000|413|size"):
        client.predict(
            image=handle_file(files / "heavy.bin"),
            mask=handle_file(files / "mask.png"),
            api_name="/remove",
        )


def test_files_of_the_server_are_not_read(client, files):
    inside = {"path": str(files / "photo.png"), "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(Exception):  # noqa: B017 - the client's or the server's refusal
        client.predict(image=inside, mask=inside, steps=STEPS, api_name="/remove")


def test_the_api_has_one_endpoint_and_its_defaults_are_the_models(client):
    (endpoint,) = client.view_api(return_format="dict")["named_endpoints"].items()
    name, described = endpoint
    assert name == "/remove"
    defaults = {p["parameter_name"]: p.get("parameter_default") for p in described["parameters"]}
    assert list(defaults)[:2] == ["image", "mask"]
    assert defaults["mode"] == "effect" and defaults["seed"] == 0 and defaults["dilate"] == 0


def test_the_notes_example_runs(address, files, tmp_path, monkeypatch):
    text = (ROOT / "papers" / "app.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for name in ("photo.png", "mask.png"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    example = example.replace("http://127.0.0.1:7860", address).replace("steps=20", "steps=2")
    names = {}
    exec(compile(example, "papers/app.md", "exec"), names)
    assert load_image(names["removed"]).shape == (64, 64, 3)


def test_steps_default_to_what_the_model_was_released_with(remover):
    fast = SimpleNamespace(num_inference_steps=4, guidance_scale=1.0)
    wrapped = SimpleNamespace(remove=remover.remove, settings=fast, pipe=remover.pipe)
    assert app.Page(service.Service(wrapped)).steps == 4


# --------------------------------------------------------------------------------- the canvas


def test_marks_survive_the_way_to_the_canvas_and_back(scene):
    canvas = marks.make_canvas(scene.image, scene.mask)
    np.testing.assert_array_equal(marks.read_marks(canvas, scene.mask.shape), scene.mask)
    shown = canvas["composite"]
    np.testing.assert_array_equal(shown[scene.mask == 0], scene.image[scene.mask == 0])
    assert (shown[scene.mask > 0] != scene.image[scene.mask > 0]).any()
    assert not marks.read_marks(None, (4, 5)).any()


def test_a_large_photo_is_marked_on_a_small_canvas():
    photo = np.zeros((1500, 4000, 3), np.uint8)
    preview = marks.shrink(photo)
    assert preview.shape == (384, 1024, 3)
    drawn = np.zeros(preview.shape[:2], np.uint8)
    drawn[100:200, 300:500] = 255
    mask = marks.enlarge(drawn, photo.shape[:2])
    assert mask.shape == (1500, 4000) and set(np.unique(mask)) == {0, 255}
    scale = 4000 / 1024
    assert mask.sum() / 255 == pytest.approx(100 * 200 * scale**2, rel=0.02)
    assert mask[round(150 * scale), round(400 * scale)] == 255


def open_session(page, path):
    """What opening a photo leaves of a visitor."""
    return page.open_photo(str(path), None)[0]


def test_boxes_by_two_clicks_and_by_numbers(remover, files):
    page = app.Page(service.Service(remover))
    session = open_session(page, files / "photo.png")
    page.switch_tool("Box", None, session)
    click = [SimpleNamespace(index=index) for index in ([30, 40], [10, 20])]
    assert "opposite" in page.click(session, click[0])[1]["label"]
    assert not session["marks"].any()
    page.click(session, click[1])
    expected = np.zeros((64, 64), np.uint8)
    expected[20:41, 10:31] = 255
    np.testing.assert_array_equal(session["marks"], expected)
    page.mark_box("40, 0, 50 10", session)
    expected[0:10, 40:50] = 255
    np.testing.assert_array_equal(session["marks"], expected)
    with pytest.raises(gr.Error, match="64x64"):
        page.mark_box("70, 70, 90, 90", session)
    canvas = page.switch_tool("Brush", None, session)[1]["value"]
    np.testing.assert_array_equal(marks.read_marks(canvas, (64, 64)), expected)
    page.clear(session)
    assert not session["marks"].any()
    app.forget(session)
    with pytest.raises(gr.Error, match="upload"):
        page.clear(None)


def test_a_click_marks_an_object_where_a_sam_is_configured(remover, files, tmp_path):
    save_tiny_sam(tmp_path / "sam")
    options = app.build_parser().parse_args(["--device", "cpu", "--sam", str(tmp_path / "sam")])
    opened = app.open_service(options)
    page = app.Page(opened)
    session = open_session(page, files / "photo.png")
    page.switch_tool("Click on the object", None, session)
    page.click(session, SimpleNamespace(index=[43, 30]))
    expected = opened.segmenter(load_image(files / "photo.png"), (43, 30))
    assert expected.shape == (64, 64) and set(np.unique(expected)) == {0, 255}
    np.testing.assert_array_equal(session["marks"], expected)
    other = opened.segmenter(load_image(files / "photo.png"), (3, 60))
    assert (other != expected).any(), "the mask depends on the click"
    app.forget(session)


def save_tiny_sam(folder):
    """A SAM with random weights as transformers saves it."""
    import torch
    from transformers import SamConfig, SamModel, SamProcessor
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    vision = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "mlp_dim": 64}
    vision |= {"num_attention_heads": 2, "image_size": 64, "patch_size": 8, "window_size": 4}
    vision |= {"global_attn_indexes": [1], "num_pos_feats": 16}
    prompt = {"hidden_size": 32, "image_size": 64, "patch_size": 8, "image_embedding_size": 8}
    prompt |= {"mask_input_channels": 4}
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder |= {"iou_head_hidden_dim": 32}
    config = SamConfig(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    torch.manual_seed(0)
    SamModel(config).save_pretrained(folder)
    sides = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    sides |= {"mask_size": {"longest_edge": 16}, "mask_pad_size": {"height": 16, "width": 16}}
    SamProcessor(SamImageProcessorPil(**sides)).save_pretrained(folder)


def test_variants_differ_and_the_picked_one_is_offered(remover, files, scene):
    page = app.Page(service.Service(remover))
    session = open_session(page, files / "photo.png")
    canvas = marks.make_canvas(scene.image, scene.mask)
    asked = (canvas, session, list(app.MODE_NAMES)[0], 3, STEPS, 1, 5, 0)
    _, gallery, _, slider, png, jpg, text = page.make(*asked)
    assert len(gallery["value"]) == 3 and "bit for bit" in text
    alone = remover.remove(
        str(files / "photo.png"), scene.mask, num_inference_steps=STEPS, seed=5
    ).image
    np.testing.assert_array_equal(load_image(png), np.asarray(alone.convert("RGB")))
    np.testing.assert_array_equal(slider[1], load_image(png))
    _, _, other, jpg, _ = page.pick(session, SimpleNamespace(index=2))
    assert (load_image(other) != load_image(png)).any()
    with Image.open(jpg) as result:
        assert result.format == "JPEG" and result.size == (64, 64)
        assert result.getexif()[0x010E] == "a scene" and result.info["icc_profile"]
    app.forget(session)
    assert not os.path.exists(other)


# ---------------------------------------------------------------------------- command and Space


def test_the_command_is_part_of_rorem(capsys, monkeypatch):
    from rorem_lib.runner import cli

    with pytest.raises(SystemExit) as stop:
        cli.main(["app", "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "--model" in shown and "ROREM_MODEL" in shown
    monkeypatch.setenv("ROREM_MODEL", "somebody/remover")
    assert app.build_parser().parse_args([]).model == "somebody/remover"
    assert app.build_parser().parse_args(["--model", "builtin"]).model == "builtin"
    assert cli.main(["app", "--model", "./nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


ZEROGPU = """
import sys
assert "torch" not in sys.modules, "spaces comes first"
def GPU(duration):
    def lend(call):
        def use(*args, **options):
            print("a GPU is lent", flush=True)
            return call(*args, **options)
        return use
    return lend
"""


@pytest.mark.slow
def test_the_space_runs_with_only_what_it_holds(files, scene, remover, tmp_path):
    folder = write_space(tmp_path / "space")
    card = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    pins = dict(line.split("==") for line in (folder / "requirements.txt").read_text().split())
    core = (ROOT / "requirements" / "core.txt").read_text().splitlines()
    assert card["sdk"] == "gradio" and card["sdk_version"] == pins["gradio"]
    assert card["app_file"] == "app.py" and len(card["short_description"]) <= 60
    assert {f"{name}=={version}" for name, version in pins.items()} <= set(core)
    assert {"torch", "diffusers", "peft", "transformers", "accelerate"} <= pins.keys()
    assert "jupyterlab" not in pins and not (folder / "rorem_lib" / "runner").exists()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ROREM")}
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "spaces.py").write_text(ZEROGPU)
    paths = f"{folder}{os.pathsep}{tmp_path / 'zero'}"
    environment |= {"PYTHONPATH": paths, "GRADIO_SERVER_PORT": str(port)}
    environment |= {"ROREM_MODEL": "builtin", "ROREM_DEVICE": "cpu"}
    environment |= {"GRADIO_TEMP_DIR": str(tmp_path / "cache")}
    where = [sys.executable, "-c", "import rorem_lib; print(rorem_lib.__file__)"]
    found = subprocess.run(where, cwd=folder, env=environment, capture_output=True, text=True)
    assert found.stdout.startswith(str(folder)), "the library is the folder's"
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=environment, stdout=log, stderr=log
        )
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if server.poll() is not None or not probe.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.1)
        assert server.poll() is None, (tmp_path / "log").read_text()
        client = Client(f"http://127.0.0.1:{port}", verbose=False, download_files=tmp_path / "down")
        answer = client.predict(
            image=handle_file(files / "photo.png"),
            mask=handle_file(files / "mask.png"),
            steps=STEPS,
            seed=7,
            api_name="/remove",
        )
    finally:
        server.terminate()
        server.wait(20)
    assert (tmp_path / "log").read_text().count("a GPU is lent") == 1, "one removal, one loan"
    expected = remover(str(files / "photo.png"), scene.mask, num_inference_steps=STEPS, seed=7)
    np.testing.assert_array_equal(load_image(answer), np.asarray(expected.convert("RGB")))


def test_the_spaces_folder_is_not_written_over(tmp_path, capsys):
    folder = tmp_path / "space"
    folder.mkdir()
    (folder / "app.py").write_text("mine")
    assert main([str(folder)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["app.py"]
    assert (folder / "app.py").read_text() == "mine"
    (folder / "notes.txt").write_text("mine")
    assert main([str(folder), "--overwrite"]) == 0
    assert (folder / "notes.txt").read_text() == "mine"
    original = (ROOT / "rorem_lib" / "app" / "app.py").read_text()
    assert (folder / "app.py").read_text() == original


def test_the_space_takes_every_module_that_the_app_reaches():
    modules, imported = find_modules()
    assert {"rorem_lib", "rorem_lib.models", "rorem_lib.models.segmenter"} <= modules.keys()
    assert not [name for name in modules if name.startswith("rorem_lib.runner")]
    assert {"torch", "gradio", "cv2", "PIL", "numpy"} <= imported
