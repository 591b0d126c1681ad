"""Which key does what in the annotation widget, and what each decision is called on its button."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from rorem_lib.labels.log import PREFERENCES, REASONS

_COMMON_KEYS = {
    "skip": "s",
    "undo": "u",
    "flicker": "f",
    "mask": "m",
    "zoom": "z",
    "difference": "d",
    "pixels": "p",
    "note": "n",
}
KEYS = {
    "accept": "a",
    "reject": "x",
    **{f"reason_{place}": str(place) for place in range(1, len(REASONS) + 1)},
    **_COMMON_KEYS,
}
PREFERENCE_KEYS = {"left": "1", "same": "2", "right": "3", **_COMMON_KEYS}
_SKIP = {"action": "skip", "label": "skip", "reason": None, "text": "Skip", "kind": ""}
# Keys with a name, in lower case, as browsers call them; Tab and Escape lead out of things.
NAMED_KEYS = {
    *("enter", "backspace", "delete", "insert", "home", "end", "pageup", "pagedown"),
    *("arrowleft", "arrowright", "arrowup", "arrowdown"),
    *(f"f{number}" for number in range(1, 13)),
}


def list_decisions(is_preference: bool) -> list[dict]:
    """What may be decided, as the legend shows it: action, label, reason, text and kind."""
    if is_preference:
        texts = {"left": "Left is better", "same": "Equally good", "right": "Right is better"}
        return [{"action": x, "label": x, "reason": None, "text": texts[x], "kind": ""}
                for x in PREFERENCES] + [_SKIP]  # fmt: skip
    accept = {"action": "accept", "label": "accept", "reason": None, "text": "Accept",
              "kind": "good"}  # fmt: skip
    rejects = [{"action": "reject" if reason is None else f"reason_{place}", "label": "reject",
                "reason": reason, "text": reason or "Reject", "kind": "bad"}
               for place, reason in enumerate((None, *REASONS))]  # fmt: skip
    return [accept, *rejects, _SKIP]


def merge_keys(changed: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """All actions' keys, in lower case.

    Args:
        changed: action -> key: one character, or one of `NAMED_KEYS`.
        known: all actions' keys as they are otherwise.

    Raises:
        ValueError: an unknown action, no key, or one key for two actions.
    """
    unknown = set(changed) - set(known)
    if unknown:
        raise ValueError(
            f"no such action: {', '.join(sorted(unknown))}; there are {', '.join(known)}"
        )
    for action, key in changed.items():
        if not isinstance(key, str) or (len(key) != 1 and key.lower() not in NAMED_KEYS):
            raise ValueError(
                f"{key!r} cannot be the key for {action}: give one character (the space bar is "
                f"' ') or one of {', '.join(sorted(NAMED_KEYS))}"
            )
    keys = {action: key.lower() for action, key in {**known, **changed}.items()}
    twice = [key for key, count in Counter(keys.values()).items() if count > 1]
    if twice:
        raise ValueError(f"one key, two actions: {', '.join(map(repr, twice))}")
    return keys
