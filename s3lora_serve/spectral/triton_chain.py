"""All r×r work between and after the two passes, as two Triton kernels: the twin of `gram`.

A program holds the matrices of one factor, or of one module, in registers. All is float64. Matrices
are padded from r to R, a power of two: with the identity where they are factored, else with zeros.
"""

import triton
import triton.language as tl

CONVERGED = tl.constexpr(2.0**-50)
"""Norm of the elements beside the diagonal over that of the matrix. Rounding leaves less than that
in matrices of up to 64 rows; what is left enters the error bound in any case."""

MAX_SWEEPS = tl.constexpr(15)
"""Of Jacobi's method, which converges quadratically. Measured: 6 to 9 for ranks up to 64."""

FIELDS = tl.constexpr(5)
"""Of a solution, besides its singular values."""


@triton.jit
def square_index(R: tl.constexpr):
    """Offsets of the elements of a stored (R, R) matrix."""
    return tl.arange(0, R)[:, None] * R + tl.arange(0, R)[None, :]


@triton.jit
def save(out, number, matrix, R: tl.constexpr):
    """Store an (R, R) matrix as the `number`-th of `out`."""
    tl.store(out + number.to(tl.int64) * R * R + square_index(R), matrix)


@triton.jit
def _loaded_sum(matrices, first, count, R: tl.constexpr):
    """The sum of `count` stored matrices, always in the same order."""
    total = tl.zeros((R, R), tl.float64)
    for number in range(count):
        total += tl.load(matrices + (first + number).to(tl.int64) * R * R + square_index(R))
    return total


@triton.jit
def _diagonal(matrix, axis: tl.constexpr, R: tl.constexpr):
    """The diagonal, in the layout of a sum over `axis`."""
    same = tl.arange(0, R)[:, None] == tl.arange(0, R)[None, :]
    return tl.sum(tl.where(same, matrix, 0.0), axis)


@triton.jit
def _product(left, right):
    return tl.dot(left, right, out_dtype=tl.float64)


@triton.jit
def _norm(matrix):
    """The Frobenius norm."""
    return tl.sqrt(tl.sum(tl.sum(matrix * matrix, 1), 0))


@triton.jit
def _spectral_norm(matrix):
    """Schatten 8-norm of a symmetric matrix: 1 to r^(1/8) times its spectral norm."""
    size = tl.maximum(_norm(matrix), 1e-300)
    unit = matrix / size
    square = _product(unit, unit)
    return size * tl.sqrt(tl.sqrt(_norm(_product(square, square))))


@triton.jit
def _padded(matrix, rank, R: tl.constexpr):
    """The matrix with the identity beyond r, which makes it definite if it was within r."""
    rows, columns = tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
    return tl.where((rows == columns) & (rows >= rank), 1.0, matrix)


@triton.jit
def _cholesky(matrix, R: tl.constexpr):
    """L with `L·Lᵀ = matrix`, and how many pivots were not positive: L is meaningless then."""
    index, columns = tl.arange(0, R), tl.arange(0, R)[None, :]
    lower = tl.zeros((R, R), tl.float64)
    failed = 0
    for j in range(R):
        column = tl.sum(tl.where(columns == j, matrix, 0.0), 1)
        pivot = tl.sum(tl.where(index == j, column, 0.0), 0)
        positive = pivot > 0
        failed += tl.where(positive, 0, 1)
        column = tl.where(index >= j, column, 0.0) / tl.sqrt(tl.where(positive, pivot, 1.0))
        lower = tl.where(columns == j, column[:, None], lower)
        matrix -= column[:, None] * column[None, :]
    return lower, failed


@triton.jit
def _inverse(lower, R: tl.constexpr):
    """The inverse of a lower triangular matrix, by forward substitution."""
    rows, columns = tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
    found = (rows == columns).to(tl.float64)
    for j in range(R):
        column = tl.sum(tl.where(columns == j, lower, 0.0), 1)
        pivot = tl.sum(tl.where(tl.arange(0, R) == j, column, 0.0), 0)
        row = tl.sum(tl.where(rows == j, found, 0.0), 0) / pivot
        below = tl.where(rows > j, column[:, None], 0.0)
        found = tl.where(rows == j, row[None, :], found - below * row[None, :])
    return found


@triton.jit
def _rotation(matrix, turn, R: tl.constexpr):
    """R/2 disjoint Givens rotations that make as many pairs of elements zero, and those pairs.

    The pairs of turns 0 to R − 2 are a round-robin tournament: each two indices meet once.
    """
    rows, columns = tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
    last = R - 1
    partner = (2 * turn - rows + 2 * last) % last
    partner = tl.where(rows == turn, last, tl.where(rows == last, turn, partner))
    pairs = partner == columns
    element = tl.sum(tl.where(pairs, matrix, 0.0), 1)
    other = tl.sum(tl.where(pairs, _diagonal(matrix, 0, R)[None, :], 0.0), 1)
    before = tl.sum(tl.where(pairs & (rows < columns), 1, 0), 1) > 0
    nonzero = element != 0
    cotangent = (other - _diagonal(matrix, 1, R)) / tl.where(nonzero, 2 * element, 1.0)
    positive = (cotangent > 0) | ((cotangent == 0) & before)
    tangent = 1.0 / (tl.abs(cotangent) + tl.sqrt(1.0 + cotangent * cotangent))
    tangent = tl.where(nonzero, tl.where(positive, tangent, -tangent), 0.0)
    cosine = 1.0 / tl.sqrt(1.0 + tangent * tangent)
    sines = tl.where(pairs, (tangent * cosine)[:, None], 0.0)
    return tl.where(rows == columns, cosine[:, None], sines), pairs


@triton.jit
def _eigenvalues(matrix, R: tl.constexpr):
    """All eigenvalues of a symmetric matrix, in no order, by Jacobi's method with parallel turns.

    Also the Frobenius norm of what is left beside the diagonal, which bounds the error of each.
    (R, R) -> (R,), ().
    """
    same = tl.arange(0, R)[:, None] == tl.arange(0, R)[None, :]
    size = _norm(matrix)
    rest = _norm(tl.where(same, 0.0, matrix))
    sweeps = 0
    while (rest > CONVERGED * size) & (sweeps < MAX_SWEEPS):
        for turn in range(R - 1):
            rotation, pairs = _rotation(matrix, turn, R)
            matrix = _product(tl.trans(rotation), _product(matrix, rotation))
            matrix = tl.where(pairs, 0.0, matrix)
            # Both elements of a pair give one rotation only while they are equal to the last bit.
            matrix = (matrix + tl.trans(matrix)) * 0.5
        rest = _norm(tl.where(same, 0.0, matrix))
        sweeps += 1
    return _diagonal(matrix, 1, R), rest


@triton.jit(do_not_specialize=["rank", "parts"])
def factorise(
    partials, parts, grams, lowers, stats, rank,
    UNIT: tl.constexpr, ZERO_ROW: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Sum the Gram matrix of one factor and factor it; see `gram.cholesky`.

    Stores G and L (slots, R, R), and the trace and the relative error (slots, 2).
    """
    slot = tl.program_id(0)
    real = tl.arange(0, R) < rank
    inside = real[:, None] & real[None, :]
    G = _loaded_sum(partials, slot * parts, parts, R)
    trace = tl.sum(_diagonal(G, 1, R), 0)
    row_share, column_share = _diagonal(G, 1, R) / trace, _diagonal(G, 0, R) / trace
    rows = tl.sqrt(tl.where(row_share > 1e-300, row_share, 1e-300))
    columns = tl.sqrt(tl.where(column_share > 1e-300, column_share, 1e-300))
    scaled = G / trace / rows[:, None] / columns[None, :]
    lower, failed = _cholesky(_padded(scaled, rank, R), R)
    inverse = _inverse(lower, R)
    inverse_norm = _spectral_norm(tl.where(inside, _product(tl.trans(inverse), inverse), 0.0))
    error = UNIT * (_spectral_norm(scaled) * inverse_norm + tl.sqrt(rank * inverse_norm))
    smallest = tl.min(tl.where(real, rows, 1.0), 0)
    known = (smallest * smallest > ZERO_ROW * ZERO_ROW * inverse_norm) & (failed == 0)
    known = known & (trace > 0) & (trace < float("inf")) & (error < float("inf"))
    save(grams, slot, G, R)
    save(lowers, slot, tl.where(inside, lower * rows[:, None], 0.0), R)
    tl.store(stats + 2 * slot, trace)
    tl.store(stats + 2 * slot + 1, tl.where(known, error, float("inf")))


@triton.jit
def _totals(sums, slot, parts):
    """The sum of the norms of one factor's rows, and the number of rows lost."""
    norms, lost = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    for part in range(parts):
        norms += tl.load(sums + 2 * (slot * parts + part))
        lost += tl.load(sums + 2 * (slot * parts + part) + 1)
    return norms, lost


@triton.jit
def _uncertainty(P, Q, rank, R: tl.constexpr):
    """See `gram._uncertainty`: the sum of two products of norms, in the best inner scaling."""
    real = tl.arange(0, R) < rank
    row = _diagonal(Q, 1, R) / tl.where(real, _diagonal(P, 1, R), 1.0)
    column = _diagonal(Q, 0, R) / tl.where(real, _diagonal(P, 0, R), 1.0)
    row = tl.sqrt(tl.sqrt(tl.minimum(tl.maximum(row, 1e-60), 1e60)))
    column = tl.sqrt(tl.sqrt(tl.minimum(tl.maximum(column, 1e-60), 1e60)))
    P, Q = P * row[:, None] * column[None, :], Q / row[:, None] / column[None, :]
    return _norm(P) * _spectral_norm(Q) + _spectral_norm(P) * _norm(Q)


@triton.jit(do_not_specialize=["rank", "parts"])
def spectrum(
    partials, sums, parts, counts, grams, stats, out, rank,
    UNIT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The solution of one module; see `gram.Solution`.

    `counts` (slots,) are numbers of rows. Stores (modules, R + FIELDS): singular values in no
    order, means of the row norms and of the column norms, ‖B·A‖_F, ‖B‖_F·‖A‖_F, error bound.
    """
    module = tl.program_id(0).to(tl.int64)
    b, a = 2 * module, 2 * module + 1
    trace_b, error_b = tl.load(stats + 2 * b), tl.load(stats + 2 * b + 1)
    trace_a, error_a = tl.load(stats + 2 * a), tl.load(stats + 2 * a + 1)
    rows, rows_lost = _totals(sums, b, parts)
    columns, columns_lost = _totals(sums, a, parts)
    P = _loaded_sum(partials, b * parts, parts, R) / trace_a
    Q = _loaded_sum(partials, a * parts, parts, R) / trace_b
    C, failed = _cholesky(_padded(P, rank, R), R)
    inner = _product(tl.trans(C), _product(Q, C))
    squares, rest = _eigenvalues((inner + tl.trans(inner)) * 0.5, R)
    real = tl.arange(0, R) < rank
    values = tl.where(real, tl.sqrt(tl.maximum(squares, 0.0)), 0.0)
    delta = UNIT * _uncertainty(P, Q, rank, R) + rest
    errors = tl.where(
        squares > delta, values - tl.sqrt(tl.maximum(squares - delta, 0.0)), tl.sqrt(delta)
    )
    total = tl.sum(values, 0)
    error = tl.sum(tl.where(real, errors, 0.0), 0) / total + error_a + error_b
    bound = tl.max(values, 0) / total * error
    known = (failed == 0) & (rows_lost + columns_lost == 0) & (bound < float("inf"))
    inner_product = tl.load(grams + b * R * R + square_index(R))
    inner_product *= tl.load(grams + a * R * R + square_index(R))
    square = tl.maximum(tl.sum(tl.sum(inner_product, 1), 0), 0.0)
    to = out + module * (R + FIELDS)
    tl.store(to + tl.arange(0, R), values)
    tl.store(to + R, rows / tl.load(counts + b) * tl.sqrt(trace_a))
    tl.store(to + R + 1, columns / tl.load(counts + a) * tl.sqrt(trace_b))
    tl.store(to + R + 2, tl.sqrt(square))
    tl.store(to + R + 3, tl.sqrt(trace_a * trace_b))
    tl.store(to + R + 4, tl.where(known, bound, float("inf")))
