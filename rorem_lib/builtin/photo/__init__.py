"""The photograph that ships, for a first removal: `PHOTO` and `MASK`, which marks the spoon."""

from pathlib import Path

PHOTO = Path(__file__).with_name("coffee.jpg")  # 600x400 px, CC0; see README.md beside it
MASK = Path(__file__).with_name("coffee-mask.png")  # the spoon, with a margin of 2 px
