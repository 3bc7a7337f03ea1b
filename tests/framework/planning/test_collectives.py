"""Test parsing collectives in the text of compiled programs."""

import pytest

from shampax.framework.planning.collectives import Collective, find

PERMUTE = "  %p = bf16[8,128]{1,0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3}}"
STARTED = "  %s = (f32[4]{0}, f32[4]{0}, u32[]) collective-permute-start(%x), channel_id=2, source_target_pairs={{0,1}}"
GATHER = "  %g = f32[8,4]{1,0} all-gather(%x), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}"
DIVIDED = "  %d = f32[8,4]{1,0} all-gather(%x), channel_id=4, replica_groups=[2,8]<=[16], dimensions={0}"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (PERMUTE, Collective("collective-permute", 2 * 8 * 128, 2)),
        (STARTED, Collective("collective-permute", 16, 2)),
        (GATHER, Collective("all-gather", 128, 4)),
        (DIVIDED, Collective("all-gather", 128, 8)),
    ],
)
def test_collectives_are_parsed(line, found):
    """Fault: planning fails for a program with a permutation, which has pairs instead of groups."""
    assert find("\n".join(["ENTRY %main (x: f32[2,4]) -> f32[8,4] {", line, "}"])) == [found]
