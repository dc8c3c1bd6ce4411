"""Tensors in boxes: any cut is written and read back exactly, and an index that holds code is refused."""

import math
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_jq.checkpoint.folder import DamagedCheckpoint
from megatron_jq.checkpoint.shards import range_shards
from megatron_jq.checkpoint.torch_dist import Shard, ShardReader, write_shards

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


def whole(key, tensor):
    return Shard(key, tuple(tensor.shape), (0,) * tensor.dim(), tuple(tensor.shape), tensor.dtype, lambda: tensor)


@given(shapes, st.data())
def test_a_flat_range_is_cut_into_boxes_that_hold_it_in_order(shape, data):
    size = math.prod(shape)
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    tensor, found = torch.arange(size).view(shape), []
    for offset, box, first in range_shards(shape, start, stop):
        part = tensor[tuple(slice(o, o + n) for o, n in zip(offset, box, strict=True))]
        assert part.flatten()[0] == first
        found += part.flatten().tolist()
    assert found == list(range(start, stop))
    assert len(list(range_shards(shape, start, stop))) <= max(1, 2 * len(shape) - 1)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_boxes_that_were_written_are_read_back_in_any_other_cut(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    cuts = sorted(data.draw(st.sets(st.integers(1, tensor.numel()), max_size=3)) - {tensor.numel()})
    shards = []
    for start, stop in zip([0, *cuts], [*cuts, tensor.numel()], strict=True):
        for offset, box, first in range_shards(shape, start, stop):
            part = tensor.flatten()[first : first + math.prod(box)].view(box)
            shards.append(Shard("a", shape, offset, box, tensor.dtype, lambda part=part: part))
    folder = tmp_path_factory.mktemp("boxes")
    write_shards(shards, folder)
    reader = ShardReader(folder)
    assert reader.tensors == {"a": (shape, torch.float32)}
    assert sorted(reader.stored_shards("a")) == sorted((s.offset, s.shape) for s in shards)
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    box = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))
    expected = tensor[tuple(slice(o, o + n) for o, n in zip(offset, box, strict=True))]
    assert torch.equal(reader.read("a", offset, box), expected)


def test_dtypes_are_kept_and_converted_on_demand_and_rows_beyond_the_tensor_are_zero(tmp_path):
    tensor = torch.randn(3, 5).bfloat16()
    write_shards([whole("b", tensor)], tmp_path)
    reader = ShardReader(tmp_path)
    assert torch.equal(reader.read("b", (0, 0), (3, 5)), tensor)
    more = reader.read("b", (1, 0), (4, 5), torch.float32)
    assert torch.equal(more[:2], tensor[1:].float()) and not more[2:].any()


def test_tensors_are_resolved_one_at_a_time_while_they_are_written(tmp_path):
    alive, most = [0], [0]

    class Counted(torch.Tensor):
        pass

    def resolve():
        import weakref

        tensor = torch.zeros(1000)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - 1))
        return tensor

    write_shards([Shard(f"t{i}", (1000,), (0,), (1000,), torch.float32, resolve) for i in range(20)], tmp_path)
    assert most[0] <= 3


@pytest.mark.parametrize("box", [((0, 0), (2, 3)), ((1, 0), (2, 4))])
def test_boxes_that_leave_a_hole_are_refused(tmp_path, box):
    offset, shape = box
    hole = Shard("a", (3, 4), offset, shape, torch.float32, lambda: torch.zeros(shape))
    with pytest.raises(ValueError, match="a: the shards do not fill"):
        write_shards([hole], tmp_path)


def test_an_index_that_would_run_code_is_refused_unread(tmp_path):
    write_shards([whole("a", torch.zeros(2))], tmp_path)
    mark = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DamagedCheckpoint, match="mkdir, which no index holds"):
        ShardReader(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps({"a": 1})[:-3], pickle.dumps({"a": 1})])
def test_an_index_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata cannot be read"):
        ShardReader(tmp_path)


def test_a_tensor_that_is_not_there_and_a_file_that_is_cut_are_named(tmp_path):
    write_shards([whole("a", torch.arange(50_000.0))], tmp_path)
    reader = ShardReader(tmp_path)
    with pytest.raises(DamagedCheckpoint, match="no tensor b"):
        reader.read_into([whole("b", torch.zeros(2))])
    os.truncate(tmp_path / "__0_0.distcp", 1000)
    with pytest.raises(DamagedCheckpoint):
        reader.read("a", (0,), (50_000,))
