"""Test parsing collectives in the text of compiled programs."""

import pytest

from shampax.framework.planning import hlo
from shampax.framework.planning.collectives import Collective, find, groups_of, in_computations

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


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups={}", []),
    ],
)
def test_groups_of_devices(text, groups):
    """Fault: devices of other slices seem to take part, or none of them."""
    assert groups_of(text) == groups


SEND = (
    "  %s = (f32[4,8]{1,0}, u32[], token[]) send(%x, %t), channel_id=10, is_host_transfer=true, "
    'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
)


@pytest.mark.parametrize(
    ("line", "sent", "crossing"),
    [
        (GATHER.replace("{{0,1,2,3}}", "{{0,1,2,3,4,5,6,7}}"), 128 * 7 / 8, 128 / 4 / 2),
        (GATHER, 128 * 3 / 4, 0),
        (PERMUTE, 2_048, 0),
        (PERMUTE.replace("{1,2}", "{3,4}"), 2_048, 2_048),
        (SEND, 128, 128),
    ],
)
def test_what_leaves_a_slice(line, sent, crossing):
    """Faults: every device seems to send all to the other slice; the transfers of TPUs' runtime are not seen."""
    module = hlo.parse("\n".join(["ENTRY %main (x: f32[2,4]) -> f32[8,4] {", line, "}"]))
    ((_, found),) = in_computations(module, ["main"], [0, 0, 0, 0, 1, 1, 1, 1])
    assert (found.sent, found.crossing) == (sent, crossing)
