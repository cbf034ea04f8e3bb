"""Triton kernels of attention of all tokens of a sequence to one another, on the QKV product.

A head of 72 would take tiles of 128. It is taken as 64 + 8 columns instead, the 8 padded to 16, the
least a matrix instruction takes: MAIN and TAIL below. A tile of rows of a head is a tuple of these
parts, (main, tail), or (main,) where there is no tail.

Of each row of scores two numbers are kept. Their rows are rounded up to whole tiles, so that tiles
are full and aligned; absent queries have a log-sum of infinity there, and so no weight.

No two programs add to one place, so results are the same bits at every run. The price is that the
backward computes the scores twice, once per sum over keys and once per sum over queries.

Letters: B batch, N tokens, R the same rounded up, A heads, E size per head.
"""

# Triton's own types say little about what a kernel may do.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from longtake.ops.triton_language import tl, triton


@triton.jit
def _part(
    rows,
    left,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    stride: tl.constexpr,
    E: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Offsets of a head's columns from FIRST on in these rows, and which of them are there."""
    columns = FIRST + tl.arange(0, WIDTH)
    offsets = rows[:, None] * stride + columns[None, :]
    is_there = tl.full(offsets.shape, True, tl.int1)
    if MASKED:
        is_there = is_there & (rows < left)[:, None]
    if FIRST + WIDTH > E:
        # Written so that the compiler sees that 8 neighbours at a time are there or not.
        is_there = is_there & (tl.arange(0, WIDTH) < E - FIRST)[None, :]
    return offsets, is_there


@triton.jit
def _load(
    base,
    rows,
    left,
    stride: tl.constexpr,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """These rows of a head; if MASKED, zeros from row `left` on."""
    offsets, is_there = _part(rows, left, 0, MAIN, stride, E, MASKED)
    main = tl.load(base + offsets, mask=is_there, other=0.0)
    if TAIL > 0:
        offsets, is_there = _part(rows, left, MAIN, TAIL, stride, E, MASKED)
        tile = (main, tl.load(base + offsets, mask=is_there, other=0.0))
    else:
        tile = (main,)
    return tile


@triton.jit
def _store(
    base,
    rows,
    left,
    tile,
    stride: tl.constexpr,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    MASKED: tl.constexpr,
):
    offsets, is_there = _part(rows, left, 0, MAIN, stride, E, MASKED)
    tl.store(base + offsets, tile[0], mask=is_there)
    if TAIL > 0:
        offsets, is_there = _part(rows, left, MAIN, TAIL, stride, E, MASKED)
        tl.store(base + offsets, tile[1], mask=is_there)


@triton.jit
def _zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    main = tl.zeros((ROWS, MAIN), tl.float32)
    return (main, tl.zeros((ROWS, TAIL), tl.float32)) if TAIL > 0 else (main,)


@triton.jit
def _scaled(tile, factor, TAIL: tl.constexpr):
    return (tile[0] * factor, tile[1] * factor) if TAIL > 0 else (tile[0] * factor,)


@triton.jit
def _dot_rows(a, b, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T of two tiles in float32, (rows of a, rows of b)."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if TAIL > 0:
        product = tl.dot(a[1], tl.trans(b[1]), product, input_precision=PRECISION)
    return product


@triton.jit
def _add_product(sums, weights, tile, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """sums + weights tile, where sums is a tile in float32."""
    weights = weights.to(tile[0].dtype)
    main = tl.dot(weights, tile[0], sums[0], input_precision=PRECISION)
    if TAIL > 0:
        sums = (main, tl.dot(weights, tile[1], sums[1], input_precision=PRECISION))
    else:
        sums = (main,)
    return sums


@triton.jit
def _row_sums(a, b, TAIL: tl.constexpr):
    """Sums over the head of the product of two tiles, in float32."""
    sums = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), axis=1)
    if TAIL > 0:
        sums += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), axis=1)
    return sums


@triton.jit
def _locate(N, R, A, BLOCK: tl.constexpr):
    """Batch, head and first row of this program, and where the numbers of its head's rows begin.
    The blocks of one head run side by side, as all of them read the same rows."""
    blocks = tl.cdiv(N, BLOCK)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    return sequence // A, sequence % A, tl.program_id(0) % blocks * BLOCK, sequence * R


@triton.jit
def _full_blocks(N, BLOCK: tl.constexpr):
    """How many of N rows lie in full blocks. As int64, so that offsets from it are, too."""
    return tl.full((), N, tl.int64) // BLOCK * BLOCK


@triton.jit
def _forward_step(
    sums,
    total,
    highest,
    q,
    k_base,
    left,
    scale_log2,
    stride_N: tl.constexpr,
    stride_3: tl.constexpr,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds a block of keys, after scaling the sums so far to the new highest score of each row."""
    keys = tl.arange(0, BLOCK_K)
    k = _load(k_base, keys, left, stride_N, E, MAIN, TAIL, MASKED)
    v = _load(k_base + stride_3, keys, left, stride_N, E, MAIN, TAIL, MASKED)
    scores = _dot_rows(q, k, TAIL, PRECISION)
    if MASKED:
        scores = tl.where((keys < left)[None, :], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_highest[:, None])
    rescale = tl.exp2(highest - new_highest)
    total = total * rescale + tl.sum(weights, axis=1)
    sums = _scaled(sums, rescale[:, None], TAIL)
    return _add_product(sums, weights, v, TAIL, PRECISION), total, new_highest


@triton.jit
def flash_attention_forward(
    qkv,  # (B, N, 3, A, E)
    out,  # (B, N, A, E) contiguous
    lse,  # (B, A, R), base 2
    N,
    R,
    stride_B,
    scale_log2,  # log2(e) / sqrt(E)
    # As constants, these are known to keep 16-byte loads aligned, and take no registers.
    stride_N: tl.constexpr,
    stride_3: tl.constexpr,
    stride_A: tl.constexpr,
    A: tl.constexpr,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_Q: tl.constexpr,  # BLOCK_Q divides N
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = P v with P = softmax(q k^T scale)."""
    batch, head, first, numbers = _locate(N, R, A, BLOCK_Q)
    rows, left = tl.arange(0, BLOCK_Q), N - first
    q_base = qkv + batch * stride_B + head * stride_A
    k_base = q_base + stride_3
    q_base += first.to(tl.int64) * stride_N
    q = _load(q_base, rows, left, stride_N, E, MAIN, TAIL, not EVEN_Q)

    sums = _zeros(BLOCK_Q, MAIN, TAIL)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    highest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    full = _full_blocks(N, BLOCK_K)
    # An incomplete block is the last, and goes first: after the loop, its matrix instructions would
    # make the compiler run those of the loop one by one.
    if not EVEN_K:
        sums, total, highest = _forward_step(
            sums, total, highest, q, k_base + full * stride_N, N - full, scale_log2,
            stride_N, stride_3, E, MAIN, TAIL, BLOCK_K, True, PRECISION,
        )  # fmt: skip
    for start in tl.range(0, full, BLOCK_K):
        sums, total, highest = _forward_step(
            sums, total, highest, q, k_base + start * stride_N, BLOCK_K, scale_log2,
            stride_N, stride_3, E, MAIN, TAIL, BLOCK_K, False, PRECISION,
        )  # fmt: skip

    out += (batch * N + first) * (A * E) + head * E
    sums = _scaled(sums, (1.0 / total)[:, None], TAIL)
    _store(out, rows, left, sums, A * E, E, MAIN, TAIL, not EVEN_Q)
    lse_rows = tl.where(rows < left, highest + tl.log2(total), float("inf"))
    tl.store(lse + numbers + first + rows, lse_rows)


@triton.jit
def _query_gradient_step(
    dq,
    q,
    dout,
    lse,
    delta,
    k_base,
    left,
    scale_log2,
    stride_N: tl.constexpr,
    stride_3: tl.constexpr,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds a block of keys."""
    keys = tl.arange(0, BLOCK_K)
    k = _load(k_base, keys, left, stride_N, E, MAIN, TAIL, MASKED)
    v = _load(k_base + stride_3, keys, left, stride_N, E, MAIN, TAIL, MASKED)
    scores = _dot_rows(q, k, TAIL, PRECISION)
    if MASKED:  # or the weights of absent keys could be infinite, and infinity times zero is NaN
        scores = tl.where((keys < left)[None, :], scores, float("-inf"))
    weights = tl.exp2(scores * scale_log2 - lse[:, None])
    dweights = _dot_rows(dout, v, TAIL, PRECISION)
    return _add_product(dq, weights * (dweights - delta[:, None]), k, TAIL, PRECISION)


@triton.jit
def flash_attention_query_gradient(
    dout,  # (B, N, A, E) contiguous
    out,  # (B, N, A, E) contiguous
    qkv,  # (B, N, 3, A, E)
    lse,  # (B, A, R), base 2
    delta,  # (B, A, R), written: the sum over E of dout * out
    dqkv,  # (B, N, 3, A, E) contiguous; the part of q is written
    N,
    R,
    stride_B,
    scale,  # 1 / sqrt(E)
    scale_log2,
    stride_N: tl.constexpr,
    stride_3: tl.constexpr,
    stride_A: tl.constexpr,
    A: tl.constexpr,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dS = P (dout v^T - delta), dq = dS k scale."""
    batch, head, first, numbers = _locate(N, R, A, BLOCK_Q)
    rows, left = tl.arange(0, BLOCK_Q), N - first
    offset = (batch * N + first) * (A * E) + head * E
    dout_rows = _load(dout + offset, rows, left, A * E, E, MAIN, TAIL, not EVEN_Q)
    out_rows = _load(out + offset, rows, left, A * E, E, MAIN, TAIL, not EVEN_Q)
    delta_rows = _row_sums(dout_rows, out_rows, TAIL)
    tl.store(delta + numbers + first + rows, delta_rows)
    lse_rows = tl.load(lse + numbers + first + rows)
    q_base = qkv + batch * stride_B + head * stride_A
    k_base = q_base + stride_3
    q_base += first.to(tl.int64) * stride_N
    q = _load(q_base, rows, left, stride_N, E, MAIN, TAIL, not EVEN_Q)

    dq = _zeros(BLOCK_Q, MAIN, TAIL)
    full = _full_blocks(N, BLOCK_K)
    if not EVEN_K:
        dq = _query_gradient_step(
            dq, q, dout_rows, lse_rows, delta_rows, k_base + full * stride_N,
            N - full, scale_log2, stride_N, stride_3, E, MAIN, TAIL, BLOCK_K, True, PRECISION,
        )  # fmt: skip
    for start in tl.range(0, full, BLOCK_K):
        dq = _query_gradient_step(
            dq, q, dout_rows, lse_rows, delta_rows, k_base + start * stride_N,
            BLOCK_K, scale_log2, stride_N, stride_3, E, MAIN, TAIL, BLOCK_K, False, PRECISION,
        )  # fmt: skip
    dqkv += (batch * N + first) * (3 * A * E) + head * E
    _store(dqkv, rows, left, _scaled(dq, scale, TAIL), 3 * A * E, E, MAIN, TAIL, not EVEN_Q)


@triton.jit
def _key_value_gradient_step(
    dk,
    dv,
    k,
    v,
    q_base,
    dout_base,
    lse,
    delta,
    left,
    scale_log2,
    stride_N: tl.constexpr,
    dout_stride_N: tl.constexpr,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds a block of queries.

    Scores have keys in rows here, so that P^T and dS^T enter their products from registers. What
    comes of absent keys may overflow; it stays in their rows, which are not stored.
    """
    rows = tl.arange(0, BLOCK_Q)
    q = _load(q_base, rows, left, stride_N, E, MAIN, TAIL, MASKED)
    dout = _load(dout_base, rows, left, dout_stride_N, E, MAIN, TAIL, MASKED)
    lse_rows = tl.load(lse + rows)
    delta_rows = tl.load(delta + rows)
    scores = _dot_rows(k, q, TAIL, PRECISION)
    weights = tl.exp2(scores * scale_log2 - lse_rows[None, :])
    dv = _add_product(dv, weights, dout, TAIL, PRECISION)
    dweights = _dot_rows(v, dout, TAIL, PRECISION)
    dscores = weights * (dweights - delta_rows[None, :])
    return _add_product(dk, dscores, q, TAIL, PRECISION), dv


@triton.jit
def flash_attention_key_value_gradient(
    dout,  # (B, N, A, E) contiguous
    qkv,  # (B, N, 3, A, E)
    lse,  # (B, A, R), base 2
    delta,  # (B, A, R)
    dqkv,  # (B, N, 3, A, E) contiguous; the parts of k and v are written
    N,
    R,
    stride_B,
    scale,
    scale_log2,
    stride_N: tl.constexpr,
    stride_3: tl.constexpr,
    stride_A: tl.constexpr,
    A: tl.constexpr,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dv = P^T dout, dk = dS^T q scale."""
    batch, head, first, numbers = _locate(N, R, A, BLOCK_K)
    rows, left = tl.arange(0, BLOCK_K), N - first
    q_base = qkv + batch * stride_B + head * stride_A
    k_base = q_base + stride_3 + first.to(tl.int64) * stride_N
    k = _load(k_base, rows, left, stride_N, E, MAIN, TAIL, not EVEN_K)
    v = _load(k_base + stride_3, rows, left, stride_N, E, MAIN, TAIL, not EVEN_K)
    dout += batch * N * (A * E) + head * E
    lse += numbers
    delta += numbers

    dk = _zeros(BLOCK_K, MAIN, TAIL)
    dv = _zeros(BLOCK_K, MAIN, TAIL)
    full = _full_blocks(N, BLOCK_Q)
    if not EVEN_Q:
        dk, dv = _key_value_gradient_step(
            dk, dv, k, v, q_base + full * stride_N,
            dout + full * (A * E), lse + full, delta + full, N - full, scale_log2,
            stride_N, A * E, E, MAIN, TAIL, BLOCK_Q, True, PRECISION,
        )  # fmt: skip
    for start in tl.range(0, full, BLOCK_Q):
        dk, dv = _key_value_gradient_step(
            dk, dv, k, v, q_base + start * stride_N,
            dout + start * (A * E), lse + start, delta + start, BLOCK_Q, scale_log2,
            stride_N, A * E, E, MAIN, TAIL, BLOCK_Q, False, PRECISION,
        )  # fmt: skip
    dqkv += (batch * N + first) * (3 * A * E) + head * E
    dk = _scaled(dk, scale, TAIL)
    _store(dqkv + A * E, rows, left, dk, 3 * A * E, E, MAIN, TAIL, not EVEN_K)
    _store(dqkv + 2 * A * E, rows, left, dv, 3 * A * E, E, MAIN, TAIL, not EVEN_K)
