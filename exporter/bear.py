"""As many changes of a graph as its outputs bear: all at once, or the harmless ones first."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

# what the worst output's SNR may lose: on few batches it moves by half of this either way, whatever is rounded
ALLOWED_DB = 0.5
# an error of 3 % of the output: above it SNR is spent on size and speed
AIM_DB = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Borne:
    """The changes that were chosen, and the worst output's SNR with none, with them, and with each that was tried alone."""

    chosen: tuple[str, ...]
    before_db: float
    after_db: float
    alone_db: Mapping[str, float]


def most(
    names: Sequence[str],
    snr_db: Callable[[Collection[str]], float],
    aim_db: float = AIM_DB,
    floor_db: float = -math.inf,
) -> Borne:
    """Outputs bear a worst SNR of aim_db, or one ALLOWED_DB below the graph's where that is less.

    All changes at once are tried first. Where that is too much each is tried alone; then they are taken in the order of the harm
    they do, as far as the outputs bear it: n + log2 n more evaluations.

    Args:
        names: at least one.
        snr_db: the worst output's SNR with some of the changes.
        aim_db: an SNR that is enough.
        floor_db: one that is required: a graph that has it keeps it.
    """
    before = snr_db(())
    enough = min(before - ALLOWED_DB, aim_db)
    enough = max(enough, floor_db) if before >= floor_db else enough
    after = snr_db(names)
    if after >= enough:
        return Borne(chosen=tuple(names), before_db=before, after_db=after, alone_db={})
    alone = {name: snr_db([name]) for name in names} if len(names) > 1 else {names[0]: after}
    harmless_first = sorted(names, key=lambda name: -alone[name])
    fits, fails, after = 0, len(names), before
    while fails - fits > 1:
        middle = (fits + fails) // 2
        at = alone[harmless_first[0]] if middle == 1 else snr_db(harmless_first[:middle])
        fits, after, fails = (middle, at, fails) if at >= enough else (fits, after, middle)
    return Borne(chosen=tuple(harmless_first[:fits]), before_db=before, after_db=after, alone_db=alone)
