"""The two splits that a run knows: what it trains on, and what it is judged by."""

from typing import Literal

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
