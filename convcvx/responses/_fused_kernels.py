"""Convolution, activation and pooling of one tile after the other, in registers.

A tile is a few neighbouring positions of one pooling cell, along a row or a column, times two vectors of filters. Its
responses are summed up tap by tap (an entry of the kernel, times the pixels that the positions see through it),
activated, and added to the cell without ever being written to memory; only their signs are, a bit each, which is all
that the adjoint needs. Where a cell takes its maximum, the bit says whether a response is larger than zero and all
before it in the cell: the last such is the maximum, and the adjoint, which goes through tiles and positions backwards,
meets it first. The vector code is written out as LLVM IR, for whatever vectors the machine has: what compilers make of
loops over a small image is several times as slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic
from numba.np.numpy_support import as_dtype

from convcvx.machine.jit import njit

VECTORS = 2
"""Vectors of filters in a tile at most."""
POSITIONS = 6
"""Positions in a tile at most: the twelve running sums of two vectors keep both multipliers of a core busy, and with
what they need they fit into the sixteen vector registers of AVX2."""
_FEATURES: str = getattr(config, "CPU_FEATURES", None) or binding.get_host_cpu_features().flatten()
VECTOR_BITS = 512 if "+avx512f" in _FEATURES else 256

_INDEX = ir.IntType(64)
_BITS = ir.IntType(16)
"""Signs of one vector of responses, whatever its length."""


def lanes(itemsize: int) -> int:
    """Filters in one vector."""
    return VECTOR_BITS // (8 * itemsize)


def _at(number: int) -> ir.Constant:
    return ir.Constant(_INDEX, number)


class _Vectors:
    """Vector instructions on the entries of a C-contiguous array."""

    def __init__(self, context: Any, builder: ir.IRBuilder, array_type: types.Array, value: ir.Value) -> None:
        array = context.make_array(array_type)(context, builder, value)
        self._builder, self._data, self.size = builder, array.data, array.nitems
        self.lanes = lanes(as_dtype(array_type.dtype).itemsize)
        self.type = ir.VectorType(context.get_data_type(array_type.dtype), self.lanes)

    def _pointer(self, index: ir.Value) -> ir.Value:
        return self._builder.gep(self._data, [index])

    def entry(self, index: ir.Value) -> ir.Value:
        return self._builder.load(self._pointer(index))

    def put(self, value: ir.Value, index: ir.Value) -> None:
        self._builder.store(value, self._pointer(index))

    def spread(self, index: ir.Value) -> ir.Value:
        """One entry in every lane."""
        undefined = ir.Constant(self.type, ir.Undefined)
        first = self._builder.insert_element(undefined, self.entry(index), ir.Constant(ir.IntType(32), 0))
        return self._builder.shuffle_vector(
            first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        )

    def _vector_pointer(self, first: ir.Value, number: int) -> ir.Value:
        index = self._builder.add(first, _at(number * self.lanes))
        return self._builder.bitcast(self._pointer(index), self.type.as_pointer())

    def load(self, first: ir.Value, number: int) -> ir.Value:
        """Vector `number` of those that begin at entry `first`."""
        return self._builder.load(self._vector_pointer(first, number), align=4)

    def store(self, value: ir.Value, first: ir.Value, number: int) -> None:
        self._builder.store(value, self._vector_pointer(first, number), align=4)

    def add(self, value: ir.Value, first: ir.Value, number: int) -> None:
        self.store(self._builder.fadd(self.load(first, number), value), first, number)


def _multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a·b + c, one instruction where the machine has it."""
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


@contextmanager
def _case(builder: ir.IRBuilder, switch: ir.SwitchInstr, value: int, end: ir.Block) -> Iterator[None]:
    block = builder.append_basic_block(f"positions{value}")
    switch.add_case(_at(value), block)
    builder.position_at_end(block)
    yield
    builder.branch(end)


def _each_length(builder: ir.IRBuilder, length: ir.Value, body: Callable[[int], None]) -> None:
    """`body` written out for tiles of every number of positions, and the choice between them."""
    end = builder.append_basic_block("end")
    switch = builder.switch(length, end)
    for count in range(1, POSITIONS + 1):
        with _case(builder, switch, count, end):
            body(count)
    builder.position_at_end(end)


@intrinsic
def _respond_tile(
    typing,
    length,
    images,
    pixel,
    stride,
    taps,
    weights,
    first,
    scales,
    scale,
    skip,
    pooled,
    cell,
    signs,
    sign,
    below,
    maximum,
):
    """Add the activated responses of `length` positions to their cell, and keep their signs.

    Unless `maximum` is None, have the largest of them in the cell. Every array comes with the index of its first entry
    that belongs to the tile.
    """
    arrays = images, pixel, stride, taps, weights, first, scales, scale, skip, pooled, cell, signs, sign
    arguments = length, *arrays, below, maximum
    largest = not isinstance(maximum, types.NoneType)

    def code(context, builder, signature, values):
        length, images, pixel, stride, taps, weights, first, scales, scale, skip, pooled, cell, signs, sign, below = (
            _Vectors(context, builder, kind, value) if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args[:-1], values[:-1], strict=True)
        )
        zero = ir.Constant(weights.type, [0.0] * weights.lanes)
        width = VECTORS * weights.lanes

        def body(count: int) -> None:
            sums = [[cgutils.alloca_once(builder, weights.type) for _ in range(VECTORS)] for _ in range(count)]
            for slot in chain(*sums):
                builder.store(zero, slot)
            steps = [builder.mul(stride, _at(t)) for t in range(count)]
            with cgutils.for_range(builder, taps.size) as loop:
                at = builder.add(pixel, taps.entry(loop.index))
                line = builder.add(first, builder.mul(loop.index, _at(width)))
                kernels = [weights.load(line, v) for v in range(VECTORS)]
                for step, row in zip(steps, sums, strict=True):
                    x = images.spread(builder.add(at, step))
                    for kernel, slot in zip(kernels, row, strict=True):
                        builder.store(_multiply_add(builder, x, kernel, builder.load(slot)), slot)
            constants = builder.add(first, builder.mul(taps.size, _at(width)))
            slope = below.spread(_at(0)) if isinstance(below, _Vectors) else None
            for v in range(VECTORS):
                bias = weights.load(constants, v)
                total = pooled.load(cell, v)
                for t, row in enumerate(sums):
                    value = builder.load(row[v])
                    if isinstance(scales, _Vectors):
                        scaling = scales.spread(builder.add(scale, builder.mul(skip, _at(t))))
                        value = _multiply_add(builder, value, scaling, bias)
                    else:
                        value = builder.fadd(value, bias)
                    active = builder.fcmp_ordered(">", value, total if largest else zero)
                    negative = zero if slope is None else builder.fmul(value, slope)
                    counted = builder.select(active, value, total if largest else negative)
                    total = counted if largest else builder.fadd(total, counted)
                    bits = builder.bitcast(active, ir.IntType(weights.lanes))
                    bits = bits if weights.lanes == _BITS.width else builder.zext(bits, _BITS)
                    signs.put(bits, builder.add(sign, _at(t * VECTORS + v)))
                pooled.store(total, cell, v)

        _each_length(builder, length, body)
        return context.get_dummy_value()

    return types.void(*arguments), code


@intrinsic
def _pull_back_tile(
    typing,
    length,
    images,
    pixel,
    stride,
    taps,
    gradient,
    first,
    scales,
    scale,
    skip,
    slopes,
    cell,
    signs,
    sign,
    below,
    maximum,
):
    """Add to the gradient in the kernels what `length` positions of one cell contribute: the adjoint of the above."""
    arrays = images, pixel, stride, taps, gradient, first, scales, scale, skip, slopes, cell, signs, sign
    arguments = length, *arrays, below, maximum
    largest = not isinstance(maximum, types.NoneType)

    def code(context, builder, signature, values):
        length, images, pixel, stride, taps, gradient, first, scales, scale, skip, slopes, cell, signs, sign, below = (
            _Vectors(context, builder, kind, value) if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args[:-1], values[:-1], strict=True)
        )
        zero = ir.Constant(gradient.type, [0.0] * gradient.lanes)
        width = VECTORS * gradient.lanes
        mask = ir.VectorType(ir.IntType(1), gradient.lanes)

        def body(count: int) -> None:
            constants = builder.add(first, builder.mul(taps.size, _at(width)))
            steps = [builder.mul(stride, _at(t)) for t in range(count)]
            active = [[zero] * VECTORS for _ in range(count)]
            for v in range(VECTORS):
                slope = slopes.load(cell, v)
                negative = builder.fmul(slope, below.spread(_at(0))) if isinstance(below, _Vectors) else zero
                constant = zero
                for t in reversed(range(count)) if largest else range(count):
                    bits = signs.entry(builder.add(sign, _at(t * VECTORS + v)))
                    bits = bits if gradient.lanes == _BITS.width else builder.trunc(bits, ir.IntType(gradient.lanes))
                    counts = builder.bitcast(bits, mask)
                    value = builder.select(counts, slope, negative)
                    if largest:  # what is before it in the cell counts for nothing any more
                        slope = builder.select(counts, zero, slope)
                    constant = builder.fadd(constant, value)
                    if isinstance(scales, _Vectors):
                        scaling = scales.spread(builder.add(scale, builder.mul(skip, _at(t))))
                        value = builder.fmul(value, scaling)
                    active[t][v] = value
                gradient.add(constant, constants, v)
                if largest:
                    slopes.store(slope, cell, v)
            with cgutils.for_range(builder, taps.size) as loop:
                at = builder.add(pixel, taps.entry(loop.index))
                line = builder.add(first, builder.mul(loop.index, _at(width)))
                pixels = [images.spread(builder.add(at, step)) for step in steps]
                for v in range(VECTORS):
                    total = gradient.load(line, v)
                    for x, row in zip(pixels, active, strict=True):
                        total = _multiply_add(builder, x, row[v], total)
                    gradient.store(total, line, v)

        _each_length(builder, length, body)
        return context.get_dummy_value()

    return types.void(*arguments), code


@njit(nogil=True, cache=True)
def respond(images, taps, tiles, weights, scales, pooled, signs, kept, below, maximum):
    """Sums over cells of activated responses, added to `pooled`; or the largest of each cell and `pooled`.

    Parameters
    ----------
    images : (n, entries)
    taps : (h,) int64
        Where in an image the taps of a position lie, from where the position lies.
    tiles : (T, 7) int64
        Cell, place in an image, number among the positions, how many positions, how many in the tiles before; from one
        position of the tile to the next the steps in place and in number.
    weights : (B, h + 1, VECTORS times lanes)
        Kernels in blocks of filters; the last row is added to every response.
    scales : (n, K) or None
        What responses are multiplied with before that.
    pooled : (n, P, B, VECTORS times lanes)
    signs : (n, B, VECTORS times the positions of all tiles) uint16
        Bits that say which responses are positive; unless `kept`, (1, 1, VECTORS times POSITIONS) to write over.
    below : (1,) or None
        What negative responses are multiplied with; None for the ReLU, which makes them 0.
    maximum : True or None
        None for sums: code is compiled for either. Of maxima `below` has no say.
    """
    n, cells, blocks, width = pooled.shape
    for block in range(blocks):
        first = block * (len(taps) + 1) * width
        for i in range(n):
            for t in range(len(tiles)):
                cell, place, position, length, before, stride, skip = tiles[t]
                sign = ((i * blocks + block) * signs.shape[2] + before * VECTORS) if kept else 0
                pixel, scale = i * images.shape[1] + place, 0
                if scales is not None:
                    scale = i * scales.shape[1] + position
                at = ((i * cells + cell) * blocks + block) * width
                _respond_tile(  # type: ignore[call-arg]
                    length,
                    images,
                    pixel,
                    stride,
                    taps,
                    weights,
                    first,
                    scales,
                    scale,
                    skip,
                    pooled,
                    at,
                    signs,
                    sign,
                    below,
                    maximum,
                )


@njit(nogil=True, cache=True)
def pull_back(images, taps, tiles, gradient, scales, slopes, signs, below, maximum):
    """Gradient in the weights, added to `gradient`, of the product of `slopes` and what `respond` gives.

    `slopes` are used up where each goes to the `maximum` of its cell alone.
    """
    n, cells, blocks, width = slopes.shape
    for block in range(blocks):
        first = block * (len(taps) + 1) * width
        for i in range(n):
            for step in range(len(tiles)):
                t = step if maximum is None else len(tiles) - 1 - step
                cell, place, position, length, before, stride, skip = tiles[t]
                sign = (i * blocks + block) * signs.shape[2] + before * VECTORS
                pixel, scale = i * images.shape[1] + place, 0
                if scales is not None:
                    scale = i * scales.shape[1] + position
                at = ((i * cells + cell) * blocks + block) * width
                _pull_back_tile(  # type: ignore[call-arg]
                    length,
                    images,
                    pixel,
                    stride,
                    taps,
                    gradient,
                    first,
                    scales,
                    scale,
                    skip,
                    slopes,
                    at,
                    signs,
                    sign,
                    below,
                    maximum,
                )
