"""Triton kernels of the attention on a GPU: sums over positions, softmax statistics, and the gradient.

Each kernel covers the whole batch: frame f is one of B·T and belongs to clip f // T. A program processes a range of
channels of a frame or of a clip. Sums have a fixed order, so a repeated call gives the same bits.
The formulas are those of `docs/attention.md`; `fused_gpu.py` launches the kernels.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(x, FAST_TANH: tl.constexpr):
    """Tanh. FAST_TANH uses the GPU's instruction, with a relative error of 2^-11, half a step of float16."""
    if FAST_TANH:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    e = tl.exp(-2 * tl.abs(x))
    size = (1 - e) / (1 + e)
    return tl.where(x < 0, -size, size)


@triton.jit
def halve_weights(weight, halved, scale, dim, LANES: tl.constexpr):
    """Convert a row of weights (D, D) to half precision, scaled down by a power of two if one exceeds its range."""
    row = tl.program_id(0)
    c = tl.arange(0, LANES)
    values = tl.load(weight + row * dim + c, mask=c < dim, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 0)
    field = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.where(field == 255, 0, tl.maximum(field - 126 - 15, 0))  # inf and NaN stay
    down = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(halved + row * dim + c, (values * down).to(halved.dtype.element_ty), mask=c < dim)
    tl.store(scale + row, 1 / down)


# fmt: off
@triton.jit
def sum_frames(
    keys, scale, bias, guide, values, sums, peaks, frames, positions, dim, STORE: tl.constexpr,
    MOMENTS: tl.constexpr, PEAKS: tl.constexpr, FAST_TANH: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, STAGES: tl.constexpr,
):
    """Sums over a frame's positions of e, e·p and e·v, and with MOMENTS of e·p² and e·p·v: `sums` (B·T, 3 or 5, D).

    `keys` (B·T·S, D) contains the product of tokens and weights. With STORE it is overwritten by
    p = tanh(scale · product + bias), rounded to the stored type. v are `values` (B·T·S, D): the tokens, or a
    student's keys. `peaks` (B·T, D) receives the largest |v| with PEAKS. EVEN: S is a multiple of ROWS and D of
    LANES, so no mask is needed. STAGES is the number of rounds of loads in flight.
    """
    frame = tl.program_id(0)
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    is_channel = c < dim
    a = tl.load(guide + (frame // frames).to(tl.int64) * dim + c, mask=is_channel, other=0.0)
    up = tl.load(scale + c, mask=is_channel, other=0.0)
    b = tl.load(bias + c, mask=is_channel, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, LANES], tl.float32)
    key, token, square, crossed, peak = total, total, total, total, total
    for first in tl.range(0, positions, ROWS, num_stages=STAGES):
        s = first + tl.arange(0, ROWS)
        inside = EVEN or (s[:, None] < positions) & is_channel[None, :]
        at = (frame.to(tl.int64) * positions + s[:, None]) * dim + c[None, :]
        x = tl.load(keys + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        half = _tanh(x * up[None, :] + b[None, :], FAST_TANH).to(keys.dtype.element_ty)
        if STORE:
            tl.store(keys + at, half, mask=inside)
        p = half.to(tl.float32)
        e = tl.exp(p * a[None, :])
        if not EVEN:
            e = tl.where(inside, e, 0.0)
        ep, ev = e * p, e * v
        total += e
        key += ep
        token += ev
        if MOMENTS:
            square += ep * p
            crossed += ev * p
        if PEAKS:
            peak = tl.maximum(peak, tl.abs(v))
    to = sums + frame.to(tl.int64) * (5 if MOMENTS else 3) * dim + c
    tl.store(to, tl.sum(total, 0), mask=is_channel)
    tl.store(to + dim, tl.sum(key, 0), mask=is_channel)
    tl.store(to + 2 * dim, tl.sum(token, 0), mask=is_channel)
    if MOMENTS:
        tl.store(to + 3 * dim, tl.sum(square, 0), mask=is_channel)
        tl.store(to + 4 * dim, tl.sum(crossed, 0), mask=is_channel)
    if PEAKS:
        tl.store(peaks + frame.to(tl.int64) * dim + c, tl.max(peak, 0), mask=is_channel)
# fmt: on


@triton.jit
def _read(sums, frame, k, c, dim, COUNT: tl.constexpr, other):
    """Load sum k of a frame."""
    return tl.load(sums + (frame.to(tl.int64) * COUNT + k) * dim + c, mask=c < dim, other=other)


@triton.jit
def pool_frames(
    sums,
    guide,
    pooled,
    normaliser,
    slopes,
    stats,
    frames,
    dim,
    MOMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Pooled tokens (B, D) from the sums; with MOMENTS also their derivative with respect to the guide.

    For backward: Z, q and P in `stats` (3, B·T, D), and the sum of exponentials over frames in `normaliser` (B, D).
    """
    COUNT: tl.constexpr = 5 if MOMENTS else 3
    clip = tl.program_id(0)
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    own = clip.to(tl.int64) * dim + c
    stride = tl.num_programs(0).to(tl.int64) * frames * dim
    a = tl.load(guide + own, mask=c < dim, other=0.0)
    exponentials = tl.zeros([LANES], tl.float32)
    weighted, score_slope, slope = exponentials, exponentials, exponentials
    for t in range(frames):
        frame = clip * frames + t
        at = frame.to(tl.int64) * dim + c
        total = _read(sums, frame, 0, c, dim, COUNT, 1.0)
        key = _read(sums, frame, 1, c, dim, COUNT, 0.0) / total
        token = _read(sums, frame, 2, c, dim, COUNT, 0.0) / total
        e = tl.exp(key * a)
        exponentials += e
        weighted += e * token
        if MOMENTS:
            square = _read(sums, frame, 3, c, dim, COUNT, 0.0) / total
            crossed = _read(sums, frame, 4, c, dim, COUNT, 0.0) / total
            frame_score_slope = key + a * (square - key * key)
            score_slope += e * frame_score_slope
            slope += e * (crossed - key * token + token * frame_score_slope)
            tl.store(stats + at, total, mask=c < dim)
            tl.store(stats + stride + at, key, mask=c < dim)
            tl.store(stats + 2 * stride + at, token, mask=c < dim)
    mean = weighted / exponentials
    tl.store(pooled + own, mean, mask=c < dim)
    tl.store(normaliser + own, exponentials, mask=c < dim)
    if MOMENTS:
        tl.store(slopes + own, (slope - mean * score_slope) / exponentials, mask=c < dim)


@triton.jit
def compare_frames(
    sums,
    teacher_sums,
    guide,
    teacher_guide,
    normaliser,
    divergence,
    slopes,
    teacher_stats,
    first_clip,
    stride_of_slopes,
    frames,
    dim,
    MOMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Parts of the two divergences by channel (2, E, D), and with MOMENTS their derivatives by the guide.

    `sums`, `guide`, `normaliser` and `slopes` (3, B, D) are the student's, of all clips; those from `first_clip` have
    a teacher. `teacher_stats` (2, E·T, D) receives the teacher's Z and frame weights.
    """
    COUNT: tl.constexpr = 5 if MOMENTS else 3
    e = tl.program_id(0)
    clip = first_clip + e
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    stride = tl.num_programs(0).to(tl.int64) * dim
    a = tl.load(guide + clip * dim + c, mask=c < dim, other=0.0)
    teacher_a = tl.load(teacher_guide + e * dim + c, mask=c < dim, other=0.0)
    ours = tl.load(normaliser + clip * dim + c, mask=c < dim, other=1.0)
    theirs = tl.zeros([LANES], tl.float32)
    for t in range(frames):
        total = _read(teacher_sums, e * frames + t, 0, c, dim, 3, 1.0)
        key = _read(teacher_sums, e * frames + t, 1, c, dim, 3, 0.0)
        theirs += tl.exp(key / total * teacher_a)
    spatial = tl.zeros([LANES], tl.float32)
    temporal, of_spatial, of_temporal = spatial, spatial, spatial
    for t in range(frames):
        frame, other = clip * frames + t, e * frames + t
        total = _read(sums, frame, 0, c, dim, COUNT, 1.0)
        key = _read(sums, frame, 1, c, dim, COUNT, 0.0) / total
        teacher_total = _read(teacher_sums, other, 0, c, dim, 3, 1.0)
        teacher_key = _read(teacher_sums, other, 1, c, dim, 3, 0.0) / teacher_total
        crossed = _read(teacher_sums, other, 2, c, dim, 3, 0.0) / teacher_total
        weight = tl.exp(teacher_key * teacher_a) / theirs
        spatial += teacher_key * teacher_a - crossed * a + tl.log(total) - tl.log(teacher_total)
        temporal += weight * (teacher_key * teacher_a - key * a)
        if MOMENTS:
            square = _read(sums, frame, 3, c, dim, COUNT, 0.0) / total
            of_spatial += key - crossed
            of_temporal += (tl.exp(key * a) / ours - weight) * (key + a * (square - key * key))
            at = other.to(tl.int64) * dim + c
            tl.store(teacher_stats + at, teacher_total, mask=c < dim)
            tl.store(teacher_stats + stride * frames + at, weight, mask=c < dim)
    at = e * dim + c
    tl.store(divergence + at, spatial, mask=c < dim)
    tl.store(divergence + stride + at, temporal + tl.log(ours) - tl.log(theirs), mask=c < dim)
    if MOMENTS:
        own = slopes + stride_of_slopes + clip * dim + c
        tl.store(own, of_spatial, mask=c < dim)
        tl.store(own + stride_of_slopes, of_temporal, mask=c < dim)


# fmt: off
@triton.jit
def find_factors(
    stats, teacher_stats, guide, teacher_guide, pooled, normaliser, peak, pooled_grad, divergence_grad, factors,
    teacher_factor, bound, first_clip, num_with_teacher, teacher_stride, frames, dim, LANES: tl.constexpr,
):
    """Factors f (3, B·T, D) and f' (E·T, D) of `differentiate`, and an upper bound (B, D) of its result.

    `pooled_grad` (B, D) and `divergence_grad` (2, E) are gradients; `peak` is the largest |v| of all tokens.
    """
    clip = tl.program_id(0)
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    own = clip.to(tl.int64) * dim + c
    stride = tl.num_programs(0).to(tl.int64) * frames * dim
    has_teacher = clip >= first_clip
    e = tl.where(has_teacher, clip - first_clip, 0)
    theirs = (c < dim) & has_teacher
    a = tl.load(guide + own, mask=c < dim, other=0.0)
    teacher_a = tl.load(teacher_guide + e * dim + c, mask=theirs, other=0.0)
    mean = tl.load(pooled + own, mask=c < dim, other=0.0)
    exponentials = tl.load(normaliser + own, mask=c < dim, other=1.0)
    gradient = tl.load(pooled_grad + own, mask=c < dim, other=0.0)
    of_constant = tl.load(divergence_grad + e, mask=has_teacher, other=0.0) * a
    of_weights = tl.load(divergence_grad + num_with_teacher + e, mask=has_teacher, other=0.0)
    largest = tl.load(peak)
    most = tl.zeros([LANES], tl.float32)
    for t in range(frames):
        at = (clip * frames + t).to(tl.int64) * dim + c
        teacher_at = (e * frames + t).to(tl.int64) * dim + c
        total = tl.load(stats + at, mask=c < dim, other=1.0)
        key = tl.load(stats + stride + at, mask=c < dim, other=0.0)
        token = tl.load(stats + 2 * stride + at, mask=c < dim, other=0.0)
        teacher_total = tl.load(teacher_stats + teacher_at, mask=theirs, other=1.0)
        teacher_weight = tl.load(teacher_stats + teacher_stride + teacher_at, mask=theirs, other=0.0)
        weight = tl.exp(key * a) / exponentials
        share = weight * gradient
        of_key = a * (of_weights * (weight - teacher_weight) + share * (token - mean))
        of_token = a * share
        constant = (of_constant + of_key * (1 - a * key) - of_token * token) / total
        of_key = of_key * a / total
        of_token = of_token / total
        teacher_term = of_constant / teacher_total
        tl.store(factors + at, constant, mask=c < dim)
        tl.store(factors + stride + at, of_key, mask=c < dim)
        tl.store(factors + 2 * stride + at, of_token, mask=c < dim)
        tl.store(teacher_factor + teacher_at, teacher_term, mask=theirs)
        inner = tl.abs(constant) + tl.abs(of_key) + tl.abs(of_token) * largest
        both = tl.exp(tl.abs(a)) * inner + tl.exp(tl.abs(teacher_a)) * tl.abs(teacher_term)
        most = tl.maximum(most, both, propagate_nan=tl.PropagateNan.ALL)
    tl.store(bound + own, most, mask=c < dim)
# fmt: on


@triton.jit
def differentiate(
    keys,
    tokens,
    guide,
    factors,
    teacher_keys,
    teacher_guide,
    teacher_factor,
    scale,
    out,
    sums,
    stride,
    first_frame,
    frames,
    positions,
    dim,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradient of the keys' linear map, (1 − p²)·(e·(f₀ + f₁·p + f₂·v) − f'·e'), times `scale` (D,), into `out`.

    `out` may be `keys`. `sums` (B·T, D) receives the sums over positions, without the scale. Frames from `first_frame`
    have a teacher. EVEN and STAGES are as in `sum_frames`.
    """
    frame = tl.program_id(0)
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    has_teacher = frame >= first_frame
    other = tl.where(has_teacher, frame - first_frame, 0)
    theirs = (c < dim) & has_teacher
    own = frame.to(tl.int64) * dim + c
    a = tl.load(guide + (frame // frames).to(tl.int64) * dim + c, mask=c < dim, other=0.0)
    constant = tl.load(factors + own, mask=c < dim, other=0.0)
    of_key = tl.load(factors + stride + own, mask=c < dim, other=0.0)
    of_token = tl.load(factors + 2 * stride + own, mask=c < dim, other=0.0)
    teacher_a = tl.load(teacher_guide + other // frames * dim + c, mask=theirs, other=0.0)
    teacher_term = tl.load(teacher_factor + other.to(tl.int64) * dim + c, mask=theirs, other=0.0)
    up = tl.load(scale + c, mask=c < dim, other=0.0)
    total = tl.zeros([ROWS, LANES], tl.float32)
    for first in tl.range(0, positions, ROWS, num_stages=STAGES):
        s = first + tl.arange(0, ROWS)
        inside = EVEN or (s[:, None] < positions) & (c[None, :] < dim)
        at = (frame.to(tl.int64) * positions + s[:, None]) * dim + c[None, :]
        teacher_at = (other.to(tl.int64) * positions + s[:, None]) * dim + c[None, :]
        p = tl.load(keys + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(tokens + at, mask=inside, other=0.0).to(tl.float32)
        q = tl.load(teacher_keys + teacher_at, mask=inside & has_teacher, other=0.0).to(tl.float32)
        gradient = tl.exp(p * a[None, :]) * (constant[None, :] + of_key[None, :] * p + of_token[None, :] * v)
        gradient -= tl.exp(q * teacher_a[None, :]) * teacher_term[None, :]
        gradient *= 1 - p * p
        if not EVEN:
            gradient = tl.where(inside, gradient, 0.0)
        tl.store(out + at, (gradient * up[None, :]).to(out.dtype.element_ty), mask=inside)
        total += gradient
    tl.store(sums + own, tl.sum(total, 0), mask=c < dim)
