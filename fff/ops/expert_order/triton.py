"""The order of choices by expert on a GPU, cut into tiles of one expert each: a stable counting sort.

1. `_count`: each program takes BLOCK choices, finds how many before each of them in the block have its expert (its
   rank), and how many of the block each expert has: the last choice of an expert in the block knows.
2. One prefix sum over these counts, expert by expert and block by block, gives the place of each block's first choice.
3. `_tiles`: one prefix sum more, over tiles of at most `tile_rows` choices per expert.
4. `_scatter`: each choice writes itself to place + rank, and the first of each tile the tile's expert.

No atomics, so that the order is always the same one; no host synchronisation, so that the number of tiles on the host
is an upper bound and later ones are empty. Limits: the counts take 4 (E + 1) M / BLOCK bytes. Where they would be more
than 32 MiB, `torch.sort` does step 1, 2 and 4.

M choices, E experts, B blocks of choices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fff.ops.expert_order import expert_order

BLOCK, PART = 64, 32
MAX_COUNTS = 2**23


class TiledOrder(NamedTuple):
    """All int32; E + 1 groups, the last of them the choices that are left out.

    order: (M,) choices sorted by expert, equal ones as they come.  offset: (E + 2,) where each group begins in it.
    tile_start: (E + 2,) the first tile of each group; the last entry is the number of tiles.
    tile_group: (tiles,) group of each tile, as many entries as there may be tiles; undefined after the last one.
    """

    order: Tensor
    offset: Tensor
    tile_start: Tensor
    tile_group: Tensor


@triton.jit
def _group(expert, choice, num_choices, num_experts):
    """Group of each choice; one that no choice has after the last of them."""
    e = tl.load(expert + choice, mask=choice < num_choices, other=0).to(tl.int32)
    e = tl.where((e < 0) | (e >= num_experts), num_experts, e)
    return tl.where(choice < num_choices, e, num_experts + 1)


# Sizes that change with the batch: no kernel of its own for those that are 1 or multiples of 16.
@triton.jit(do_not_specialize=["num_choices", "num_blocks"])
def _count(
    expert,  # (M,)
    rank,  # (M,)
    count,  # (E + 1, B), zeros
    num_choices,
    num_experts,
    num_blocks,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    block = tl.program_id(0)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    group = _group(expert, choice, num_choices, num_experts)
    before = tl.zeros([BLOCK], tl.int32)
    after = tl.zeros([BLOCK], tl.int32)
    for start in range(0, BLOCK, PART):
        other = block * BLOCK + start + tl.arange(0, PART)
        same = group[:, None] == _group(expert, other, num_choices, num_experts)[None, :]
        before += tl.sum((same & (other[None, :] < choice[:, None])).to(tl.int32), 1)
        after += tl.sum((same & (other[None, :] > choice[:, None])).to(tl.int32), 1)
    there = choice < num_choices
    tl.store(rank + choice, before, mask=there)
    tl.store(count + group * num_blocks + block, before + 1, mask=there & (after == 0))


@triton.jit(do_not_specialize=["stride"])
def _tiles(
    place,  # (E + 2,), each `stride` apart: choices before each group
    stride,
    offset,  # (E + 2,)
    tile_start,  # (E + 2,)
    num_experts,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.zeros([], tl.int32)
    for start in range(0, num_experts + 2, BLOCK):
        group = start + tl.arange(0, BLOCK)
        begin = tl.load(place + group * stride, mask=group < num_experts + 2, other=0)
        end = tl.load(place + (group + 1) * stride, mask=group < num_experts + 1, other=0)
        number = tl.where(group < num_experts + 1, (end - begin + TILE - 1) // TILE, 0)
        tl.store(offset + group, begin, mask=group < num_experts + 2)
        tl.store(tile_start + group, tiles + tl.cumsum(number, 0) - number, mask=group < num_experts + 2)
        tiles += tl.sum(number, 0)


@triton.jit(do_not_specialize=["num_choices", "num_blocks"])
def _scatter(
    expert,  # (M,)
    rank,  # (M,)
    place,  # (E + 1, B)
    offset,  # (E + 2,)
    tile_start,  # (E + 2,)
    order,  # (M,)
    tile_group,  # (tiles,)
    num_choices,
    num_experts,
    num_blocks,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    there = choice < num_choices
    group = _group(expert, choice, num_choices, num_experts)
    position = tl.load(place + group * num_blocks + block, mask=there, other=0) + tl.load(rank + choice, mask=there)
    tl.store(order + position, choice, mask=there)
    within = position - tl.load(offset + group, mask=there, other=0)
    tile = tl.load(tile_start + group, mask=there, other=0) + within // TILE
    tl.store(tile_group + tile, group, mask=there & (within % TILE == 0))


def max_tiles(num_choices: int, num_experts: int, tile_rows: int) -> int:
    """Most tiles that there can be: every group but the full tiles has one that is not full."""
    return num_choices // tile_rows + min(num_choices, num_experts + 1)


def tiled_order(expert: Tensor, num_experts: int, tile_rows: int) -> TiledOrder:
    """expert: (M,) of any integer type; what is not 0 .. E - 1 is left out. Launches on the current device."""
    num_choices = expert.shape[0]
    num_blocks = triton.cdiv(num_choices, BLOCK)
    most = max_tiles(num_choices, num_experts, tile_rows)

    def empty(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=expert.device)

    offset, tile_start = empty(num_experts + 2), empty(num_experts + 2)
    if (num_experts + 1) * num_blocks > MAX_COUNTS:
        order, place = expert_order(torch.where(expert < num_experts, expert, -1), num_experts)
        place = torch.cat([place, place.new_full([1], num_choices)]).to(torch.int32)
        _tiles[(1,)](place, 1, offset, tile_start, num_experts, TILE=tile_rows, BLOCK=1024)
        tile = torch.arange(most, device=expert.device, dtype=torch.int32)
        tile_group = torch.searchsorted(tile_start[1:], tile, right=True, out_int32=True)
        return TiledOrder(order.to(torch.int32), offset, tile_start, tile_group)
    rank, order, tile_group = empty(num_choices), empty(num_choices), empty(most)
    # One zero in front: the prefix sum at a place is then what lies before it.
    count = torch.zeros(1 + (num_experts + 1) * num_blocks, dtype=torch.int32, device=expert.device)
    sizes = num_choices, num_experts, num_blocks
    if num_choices:
        _count[(num_blocks,)](expert, rank, count[1:], *sizes, BLOCK=BLOCK, PART=PART, num_warps=4)
    place = count.cumsum(0, dtype=torch.int32)
    _tiles[(1,)](place, num_blocks, offset, tile_start, num_experts, TILE=tile_rows, BLOCK=1024)
    if num_choices:
        pointers = expert, rank, place, offset, tile_start, order, tile_group
        _scatter[(num_blocks,)](*pointers, *sizes, TILE=tile_rows, BLOCK=BLOCK)
    return TiledOrder(order, offset, tile_start, tile_group)
