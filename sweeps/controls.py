"""Controls: the trials beside the layouts that say what a layout is to be compared with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from fffsweep.kernels.shape import parse_layout
from fffsweep.pipeline.settings import parse_count

ControlKind = Literal["reference_dense", "none", "unchanged", "dense_active", "random_routing"]

_FORMS = {
    "reference_dense": "reference_dense(WIDTH)",
    "none": "none",
    "unchanged": "unchanged",
    "dense_active": "dense_active or dense_active(LAYOUT)",
    "random_routing": "random_routing or random_routing(LAYOUT)",
}


@dataclass(frozen=True)
class Control:
    """One entry of a config's `controls`.

    reference_dense: dense layer of `width`, against which relative times are taken. none: no feedforward layer. unchanged: the
    encoder of stage convert as it is.
    dense_active: dense layer of a layout's active width. random_routing: a layout whose path is a hash of the token.
    `layout` is None where the control is meant for every layout of the sweep.
    """

    kind: ControlKind
    width: int | None = None
    layout: str | None = None

    @property
    def text(self) -> str:
        """As `parse_control` reads it."""
        argument = self.width if self.layout is None else self.layout
        return self.kind if argument is None else f"{self.kind}({argument})"

    def over(self, layouts: list[str]) -> list[Control]:
        """This control for one layout each."""
        if self.kind in ("reference_dense", "none", "unchanged") or self.layout is not None:
            return [self]
        return [Control(self.kind, layout=layout) for layout in layouts]


def parse_control(text: str) -> Control:
    """Control of `reference_dense(512)`, `none`, `dense_active`, `dense_active(1x8)` and the like. Raises ValueError."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(\s*([^()]*?)\s*\))?\s*", str(text))
    kind, argument = match.groups() if match else (None, None)
    if kind == "reference_dense" and argument:
        width = parse_count(argument)
        if isinstance(width, int) and width >= 1:
            return Control("reference_dense", width=width)
    elif kind in ("none", "unchanged") and argument is None:
        return Control(kind)  # type: ignore[arg-type]
    elif kind in ("dense_active", "random_routing") and argument != "":
        try:
            return Control(kind, layout=None if argument is None else parse_layout(argument).layout)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"control {text!r}: {error}") from None
    allowed = _FORMS[kind] if kind in _FORMS else ", ".join(_FORMS.values())
    raise ValueError(f"control {text!r}: expected {allowed}")
