"""The authors' own trainer, `train_RORem.py`, run on this machine beside ours.

    python tests/benchmarks/upstream.py CHECKOUT TIMES.jsonl --its_options …

CHECKOUT is a clone of github.com/leeruibin/RORem at `COMMIT` (`fetch_upstream` makes one); nothing
of it is kept here. One line of TIMES.jsonl is written an optimizer step: its number, the clock (s)
and the loss. Two more words go before its options: `--data-path` reads and encodes batches and
trains nothing, `--no-checkpointing` switches its gradient checkpointing off, which it cannot do
itself.

Mended is its crash alone: it names its columns in the wrong order, so that the prompt is opened as
an image. Everything else that is changed fits it to this machine and to the small model, and takes
no work off it that its training needs:

- torchvision and einops are not installed here: five transforms that it uses have stand-ins.
- The built-in model's VAE is an `AutoencoderTiny`, which has no posterior to sample from, and makes
  latents of a fourth of the image's side, where the trainer has an eighth written out.
- Its validation (512 px, images from its working folder) is left out: ours validates not, either.
- Its demand for xformers is an option, switched off on the command line of the benchmark.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.machinery
import json
import re
import subprocess
import sys
import time
import types
from pathlib import Path

REPOSITORY = "https://github.com/leeruibin/RORem.git"
COMMIT = "b5f2e0ab568b4d62c65602fd28d8bfefd3cd757a"
TRAINER_SHA256 = "66fa50b89a7aa76d097f3409025a3df9845afc5a605c4f340a8749381d912ef1"


def fetch_upstream(folder: Path) -> Path:
    """Clone the authors' repository at the pinned commit into `folder`."""
    folder.mkdir(parents=True)
    for command in (
        ["init", "-q"],
        ["fetch", "-q", "--depth", "1", REPOSITORY, COMMIT],
        ["checkout", "-q", "FETCH_HEAD"],
    ):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    return folder


def read_trainer(folder: Path) -> str:
    """The trainer's source.

    Raises:
        ValueError: it is not the one of `COMMIT`.
    """
    data = (folder / "train_RORem.py").read_bytes()
    if hashlib.sha256(data).hexdigest() != TRAINER_SHA256:
        raise ValueError(f"{folder}/train_RORem.py is not the one of commit {COMMIT[:7]}")
    return data.decode()


def replace_once(source: str, pattern: str, replacement: str) -> str:
    source, count = re.subn(pattern, replacement, source)
    if count != 1:
        raise ValueError(f"{pattern!r} matches {count} times in the trainer, not once")
    return source


def _add_module(name: str, **contents) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(contents)
    sys.modules[name] = module
    return module


def add_missing_modules() -> None:
    """Stand-ins for torchvision and einops; call it once the libraries that look for them are in.

    The transforms do what torchvision's do to a tensor [..., H, W] that has the crop's size.
    """
    import torch

    class Compose:
        def __init__(self, steps):
            self.steps = steps

        def __call__(self, x):
            for step in self.steps:
                x = step(x)
            return x

    class Crop:
        def __init__(self, size):
            self.size = size

        def __call__(self, x):
            assert x.shape[-2:] == (self.size, self.size)
            return x

    class RandomHorizontalFlip:
        def __call__(self, x):
            return x.flip(-1) if torch.rand(1) < 0.5 else x

    transforms = _add_module(
        "torchvision.transforms",
        Compose=Compose,
        CenterCrop=Crop,
        RandomCrop=Crop,
        RandomHorizontalFlip=RandomHorizontalFlip,
        Lambda=lambda function: function,
        ToTensor=object,
        ToPILImage=object,
    )
    _add_module("torchvision", transforms=transforms)
    _add_module("einops", rearrange=None)


class _Posterior:
    def __init__(self, latents):
        self.latents = latents

    def sample(self):
        return self.latents


class TinyAutoencoder:
    """What the trainer opens as `AutoencoderKL`: an `AutoencoderTiny` with a posterior."""

    opened = None  # the one that the trainer has

    @classmethod
    def from_pretrained(cls, path, *, subfolder, revision=None, variant=None):
        from diffusers import AutoencoderTiny

        vae = AutoencoderTiny.from_pretrained(path, subfolder=subfolder)
        encode = vae.encode
        vae.encode = lambda x: types.SimpleNamespace(latent_dist=_Posterior(encode(x).latents))
        cls.opened = vae
        return vae


def load_trainer(folder: Path, *, factor: int, checkpointing: bool = True) -> types.ModuleType:
    """The trainer as a module, ready for `main()`.

    Args:
        folder: the checkout.
        factor: how many times smaller than the image the model's latents are.
        checkpointing: False switches its gradient checkpointing off: no longer the authors'
            trainer, but it shows what that costs.
    """
    # these look for torchvision when they are imported, and must not meet the stand-in
    import datasets  # noqa: F401
    import diffusers
    import transformers  # noqa: F401

    assert diffusers.StableDiffusionXLInpaintPipeline  # it is imported when first asked for

    source = read_trainer(folder)
    source = replace_once(
        source,
        r"dataset_columns = \(.*?\)",
        'dataset_columns = ("input_image", "edit_prompt", "edited_image")',
    )
    source = replace_once(source, r"(latent_size = .*//) ?8", rf"\1 {factor}")
    if not checkpointing:
        source = replace_once(source, r"(if args\.gradient_checkpointing)(?=:)", r"\1 and False")
    add_missing_modules()
    sys.path.insert(0, str(folder))
    trainer = types.ModuleType("train_RORem")
    trainer.__file__ = str(folder / "train_RORem.py")
    exec(compile(source, trainer.__file__, "exec"), trainer.__dict__)
    trainer.AutoencoderKL = TinyAutoencoder
    trainer.log_validation = lambda *args, **kwargs: None
    trainer.StableDiffusionXLInpaintPipeline = types.SimpleNamespace(
        from_pretrained=lambda *args, **kwargs: None
    )
    return trainer


class Record:
    """Writes a line with the clock, at once."""

    def __init__(self, path: Path):
        self._stream = open(path, "w", encoding="utf-8", buffering=1)

    def add(self, step: int, **values) -> None:
        self._stream.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")


def train(trainer: types.ModuleType, record: Record) -> None:
    """The trainer as it is; a line where it logs, at the end of every optimizer step."""

    class Accelerator(trainer.Accelerator):
        def log(self, values, step=None, **kwargs):
            record.add(step, loss=values["train_loss"])
            super().log(values, step=step, **kwargs)

    trainer.Accelerator = Accelerator
    trainer.main()


class _Prepared(Exception):
    """Carries the loader out of the trainer before it trains."""


def read_data(trainer: types.ModuleType, record: Record, *, factor: int) -> None:
    """One epoch of the trainer's own loader, and what it computes from a batch before its UNet:
    two encodings, the mask at the latents' size, noise."""
    import torch

    class Accelerator(trainer.Accelerator):
        def prepare(self, unet, optimizer, loader, scheduler):
            raise _Prepared(super().prepare(loader))

    trainer.Accelerator = Accelerator
    try:
        trainer.main()
    except _Prepared as prepared:
        loader, vae = prepared.args[0], TinyAutoencoder.opened
    for step, batch in enumerate(loader, 1):
        mask = batch["mask_pixel_values"]
        latents = vae.encode(batch["edited_pixel_values"]).latent_dist.sample()
        vae.encode(batch["original_pixel_values"] * (mask < 0.5)).latent_dist.sample()
        torch.nn.functional.interpolate(mask, scale_factor=1 / factor)
        torch.randn_like(latents)
        record.add(step)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("times", type=Path)
    parser.add_argument("--factor", type=int, default=4, help="of the model's VAE")
    parser.add_argument("--data-path", action="store_true")
    parser.add_argument("--no-checkpointing", action="store_true")
    ours, theirs = parser.parse_known_args()
    trainer = load_trainer(
        ours.checkout, factor=ours.factor, checkpointing=not ours.no_checkpointing
    )
    sys.argv = ["train_RORem.py", *theirs]
    if ours.data_path:
        read_data(trainer, Record(ours.times), factor=ours.factor)
    else:
        train(trainer, Record(ours.times))


if __name__ == "__main__":
    main()
