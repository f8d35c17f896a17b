"""Replica groups in every form that HLO writes, as axes of a 2 x 4 x 2 mesh."""

import pytest

from spmd_train.inspect.collectives import count_collectives

AXES = {"data": 2, "fsdp": 4, "tensor": 2}

ONE = """HloModule one, replica_count={replicas}, num_partitions={partitions}

ENTRY %main (x: f32[64]) -> f32[64] {{
  %x = f32[64] parameter(0)
  ROOT %c = f32[64] {op}(%x){attributes}
}}
"""


def _count(attributes, *, op="all-reduce", replicas=1, partitions=16, slices=None):
    text = ONE.format(op=op, attributes=attributes, replicas=replicas, partitions=partitions)
    (collective,) = count_collectives(text, axis_sizes=AXES, slices=slices)
    return collective


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}", ("tensor",), 2),
        ("{{1,0},{3,2},{5,4},{7,6},{9,8},{11,10},{13,12},{15,14}}", ("tensor",), 2),
        ("{{0,2,4,6},{8,10,12,14},{1,3,5,7},{9,11,13,15}}", ("fsdp",), 4),
        ("[4,4]<=[8,2]T(1,0)", ("fsdp",), 4),
        ("[8,2]<=[4,4]T(1,0)", ("other",), 2),
        ("[8,2]<=[16]", ("tensor",), 2),
        ("[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",), 4),
        ("[8,2]<=[2,8]T(1,0)", ("data",), 2),
        ("[2,8]<=[16]", ("fsdp", "tensor"), 8),
        ("[2,8]<=[8,2]T(1,0)", ("data", "fsdp"), 8),
        ("[1,16]<=[16]", ("data", "fsdp", "tensor"), 16),
        ("{}", ("data", "fsdp", "tensor"), 16),
        ("{{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}", ("data", "fsdp", "tensor"), 16),
        ("mesh['data'=2,'fsdp'=4,'tensor'=2] {'tensor','data'}", ("data", "tensor"), 4),
        ("mesh['axis_0'=8,'axis_1'=1,'axis_2'=2] {'axis_0'}", ("data", "fsdp"), 8),
        ("mesh['a'=16] {'a':(2)4}", ("fsdp",), 4),
        ("mesh['a'=16] {'a':(1)2,'a':(8)2}", ("data", "tensor"), 4),
        ("mesh['a'=16] {'a':(4)4}", ("other",), 4),
        ("mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'b'}", ("data", "fsdp"), 8),
        ("mesh['a'=1,'b'=4,'c'=4], device_ids=([2,4,2]T(0,2,1)) {'c'}", ("fsdp",), 4),
        ("mesh['a'=8,'b'=2], device_ids=(0,8,1,9,2,10,3,11,4,12,5,13,6,14,7,15) {'b'}",
         ("data",), 2),
        ("{{0},{1},{2},{3},{4},{5},{6},{7},{8},{9},{10},{11},{12},{13},{14},{15}}", (), 1),
        ("{{0,1},{2},{3}}", ("other",), 2),
        ("{{0,2},{4,6},{1,3},{5,7},{8,10},{12,14},{9,11},{13,15}}", ("other",), 2),
    ],
)  # fmt: skip
def test_hlo_replica_groups_become_axes(groups, axes, size):
    found = _count(f", channel_id=1, replica_groups={groups}, use_global_device_ids=true")
    assert (found.axes, found.group_size) == (axes, size)
    assert found.wire_bytes == -(-2 * 256 * (size - 1) // size)


def test_hlo_replica_groups_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match=r"replica groups.*maximal"):
        _count(", channel_id=1, replica_groups=maximal_mesh[3], use_global_device_ids=true")


@pytest.mark.parametrize(
    ("op", "attributes", "replicas", "axes"),
    [
        # No channel: the ids are replicas, each partition for itself.
        ("all-reduce", ", replica_groups={}", 1, ()),
        ("all-reduce", ", replica_groups={{0,1}}", 2, ("data",)),
        ("all-reduce", ", replica_groups={}", 16, ("data", "fsdp", "tensor")),
        ("all-reduce", ", replica_groups=[8,2]<=[16]", 16, ("tensor",)),
        # A channel and no global ids: a reduction over replicas takes in all their partitions.
        ("all-reduce", ", channel_id=1, replica_groups={{0}}", 1, ("data", "fsdp", "tensor")),
        ("all-reduce", ", channel_id=1, replica_groups={{0},{1}}", 2, ("fsdp", "tensor")),
        # For an all-to-all the ids are then partitions, each replica for itself.
        ("all-to-all", ", channel_id=1, replica_groups=[8,2]<=[16]", 1, ("tensor",)),
        ("all-to-all", ", channel_id=1, replica_groups=[4,2]<=[8]", 2, ("tensor",)),
        ("all-to-all", ", channel_id=1, replica_groups={}", 2, ("fsdp", "tensor")),
        # Global ids: replica * partitions + partition.
        ("all-reduce", ", channel_id=1, replica_groups=[8,2]<=[2,8]T(1,0), "
         "use_global_device_ids=true", 2, ("data",)),
    ],
)  # fmt: skip
def test_hlo_group_ids_are_replicas_partitions_or_both(op, attributes, replicas, axes):
    found = _count(attributes, op=op, replicas=replicas, partitions=16 // replicas)
    assert found.axes == axes


@pytest.mark.parametrize(
    ("pairs", "axes"),
    [
        ("{{0,2},{2,4},{4,6},{6,0}}", ("fsdp",)),
        ("{{0,1},{1,0}}", ("tensor",)),
        ("{{0,1},{1,2},{2,3}}", ("fsdp", "tensor")),
        ("{{0,15}}", ("data", "fsdp", "tensor")),
        ("{{0,0},{1,1}}", ()),
    ],
)
def test_hlo_permutation_spans_the_axes_it_moves_along(pairs, axes):
    found = _count(f", channel_id=1, source_target_pairs={pairs}", op="collective-permute")
    assert found.axes == axes
    assert (found.bytes, found.wire_bytes) == (256, 256 if axes else 0)


def test_hlo_network_is_dcn_where_a_group_leaves_its_slice():
    slices = [0] * 8 + [1] * 8  # the data axis is between slices
    reduce = ", channel_id=1, replica_groups=[{}, use_global_device_ids=true"
    assert _count(reduce.format("2,8]<=[16]"), slices=slices).network == "ici"
    assert _count(reduce.format("8,2]<=[2,8]T(1,0)"), slices=slices).network == "dcn"
    assert _count(reduce.format("8,2]<=[2,8]T(1,0)")).network == "ici"
    halves = _count(reduce.format("4,4]<=[2,2,2,2]T(1,3,0,2)"), slices=slices)
    assert (halves.axes, halves.group_size, halves.slices) == (("other",), 4, 2)
    permute = ", channel_id=1, source_target_pairs={}"
    for pairs, network in (("{{0,8}}", "dcn"), ("{{0,7},{8,9}}", "ici")):
        found = _count(permute.format(pairs), op="collective-permute", slices=slices)
        assert found.network == network


def test_hlo_for_another_number_of_devices_is_refused():
    with pytest.raises(ValueError, match=r"compiled for 8 devices.*has 16"):
        _count(", replica_groups={}", partitions=8)
    with pytest.raises(ValueError, match="3 slice numbers"):
        _count(", replica_groups={}", slices=[0, 0, 1])
