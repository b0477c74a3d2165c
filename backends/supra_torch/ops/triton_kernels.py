"""The Triton kernel of causal linear attention, both its forward and its backward pass.

Let L(q, k, v) be the operator and R the same, run backward in time. Then::

    o = L(q, k, v)      dq = L(do, v, k)      dk = R(v, do, q)      dv = R(k, q, do)

so the kernel runs once for the output and three times for the gradients, each time over a
query, a key and a value *in its role*. Nothing but these operands is read: no chunk states, no
head-first copies, no repeated key/value heads. A program walks over the chunks of one sequence
(or one segment of it) for one head and one block of value columns, the state in registers.

With e_i the number of valid tokens of the chunk up to row i, n = e at the chunk's end, and S
the state at the chunk's border, a chunk of L is::

    P_ij = gamma^(e_i - e_j) (q_i . k_j)   for valid j <= i
    o_i  = sum_j P_ij v_j + gamma^(e_i) q_i S
    S   <- gamma^n S + sum_j gamma^(n - e_j) k_j^T v_j   over valid j

and of R, whose rows are the keys' tokens and whose columns the queries'::

    P_ij = gamma^(e_j - e_i) (q_i . k_j)   for j >= i
    o_i  = sum_j P_ij v_j + gamma^(n - e_i) q_i S
    S   <- gamma^n S + sum_j gamma^(e_j) k_j^T v_j

Normalised by the sum, o = N / D: N is L, and D is L with values of one. With the widened
gradient [dN, dD] = [do / D, dsums - (do . o) / D] in the place of do, and v with a column of
ones, the identities hold as they stand; the column costs one number a row in P and a vector in
the state. The gradient of ln gamma needs no pass of its own: it is
sum_t n_t (q_t . dq_t - k_t . dk_t) + n_T (S_T . dS_T), n_t the valid tokens up to t.

Only loaded operands are transposed, never a product: Triton 3.4 to 3.7.0 could return wrong
results on Hopper for a transposed wgmma result that feeds another product. Checked against
float64 in Triton's interpreter and on an H200, and compiled ahead of time for others.
"""

import triton
import triton.language as tl


@triton.jit
def _place(borders, sequence, T, segment, segment_length):
    """Where a program's tokens lie: the sequence's first row, and its part (begin, end) of it."""
    row = tl.zeros((), tl.int64)
    length = T
    if borders is not None:
        row += tl.load(borders + sequence)
        length = (tl.load(borders + sequence + 1) - row).to(tl.int32)
    begin = segment * segment_length
    return row, begin, tl.maximum(tl.minimum(begin + segment_length, length), begin)


@triton.jit
def _chunk_ages(counted, left, rows):
    """Of a chunk with ``left`` tokens: valid tokens up to each row, at its end, and validity.

    ``counted``: valid tokens before the chunk, then up to each of its rows; None: all are valid.
    """
    # Rows past the end must not count on: gamma^(n - e) would grow.
    upto = tl.minimum(rows + 1, left)
    if counted is None:
        age = upto
        count = tl.max(upto, 0)
        valid = rows < left
    else:
        before = tl.load(counted)
        age = tl.load(counted + upto) - before
        count = tl.max(age, 0)
        valid = age != tl.load(counted + tl.minimum(rows, left)) - before
    return age.to(tl.float32), count.to(tl.float32), valid


@triton.jit
def _within(inside, columns, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """``inside`` and columns < SIZE; without the comparison where no block reaches beyond."""
    if SIZE % BLOCK != 0:
        inside = inside & (columns < SIZE)
    return inside


@triton.jit
def _advance(
    state, vector, kt, v, weight, vector_weight, kept,
    ROLE: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """State and vector at the chunk's far border.

    The weights stand at the values, so that the keys need not pass through registers.
    """
    weighted = (v * weight[:, None]).to(v.dtype)
    state = tl.dot(kt, weighted, acc=state * kept, input_precision="tf32")
    if NORMALISE:
        if ROLE == "output":
            ones = tl.where(tl.arange(0, 16)[None, :] == 0, vector_weight[:, None], 0.0)
            vector = tl.dot(kt, ones.to(kt.dtype), acc=vector * kept, input_precision="tf32")
        elif ROLE != "dv":
            vector = vector * kept + tl.sum(v * vector_weight[:, None], 0)
    return state, vector


@triton.jit
def _widened(vector, ROLE: tl.constexpr):
    """The vector as it is carried from chunk to chunk.

    The output's belongs to the keys' channels: as the first column of a narrow matrix tensor
    cores read and write it, and queries and keys stay in shared memory.
    """
    if ROLE == "output":
        vector = tl.where(tl.arange(0, 16)[None, :] == 0, vector[:, None], 0.0)
    return vector


@triton.jit
def _narrowed(vector, ROLE: tl.constexpr):
    """The inverse of :func:`_widened`."""
    if ROLE == "output":
        vector = tl.sum(vector, 1)
    return vector


@triton.jit
def _read(q, state):
    """q (rows, K) times the state (K, V)."""
    if q.dtype == tl.float16:
        # A sum over many tokens may be beyond float16.
        return tl.dot(q.to(tl.float32), state, input_precision="tf32")
    return tl.dot(q, state.to(q.dtype), input_precision="tf32")


@triton.jit
def segment_kernel(
    k, v, log2_decay, counted, borders, scale, shift, states, vectors, tokens,
    T, H, segments, segment_length, k_group, v_group, k_b, k_t, k_h, v_b, v_t, v_h,
    ROLE: tl.constexpr, NORMALISE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What each segment adds to the state at its far border.

    states (N, H, segments, K, V); vectors (N, H, segments, K, or V where it belongs to values);
    tokens (N, segments), the valid ones.
    """
    BACKWARD: tl.constexpr = ROLE == "dk" or ROLE == "dv"
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    block = program % BLOCKS
    segment = (program // BLOCKS) % segments
    head = (program // (BLOCKS * segments)) % H
    sequence = program // (BLOCKS * segments * H)
    row, begin, end = _place(borders, sequence, T, segment, segment_length)
    batch = (sequence if borders is None else 0 * sequence).to(tl.int64)
    lg = tl.load(log2_decay + head)

    rows = tl.arange(0, BLOCK_T)
    channels = tl.arange(0, BLOCK_K)
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    k += batch * k_b + (head // k_group).to(tl.int64) * k_h
    v += batch * v_b + (head // v_group).to(tl.int64) * v_h
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    vector = _widened(tl.zeros((BLOCK_K if ROLE == "output" else BLOCK_V,), tl.float32), ROLE)
    seen = tl.zeros((), tl.float32)
    if segment == (0 if BACKWARD else segments - 1):
        end = begin  # Nothing comes after it.
    chunks = tl.cdiv(end - begin, BLOCK_T)
    for index in range(chunks):
        chunk = chunks - 1 - index if BACKWARD else index
        start = begin + chunk * BLOCK_T
        here = row + start
        inside = rows < end - start
        age, count, valid = _chunk_ages(
            None if counted is None else counted + batch * (T + 1) + here, end - start, rows
        )
        kt = tl.load(
            k + here * k_t + rows[None, :] * k_t + channels[:, None],
            mask=_within(inside[None, :], channels[:, None], K, BLOCK_K), other=0.0,
        )  # fmt: skip
        values = tl.load(
            v + here * v_t + rows[:, None] * v_t + columns[None, :],
            mask=_within(inside[:, None], columns[None, :], V, BLOCK_V), other=0.0,
        )  # fmt: skip
        if BACKWARD:
            weight = tl.exp2(lg * age)
            vector_weight = weight
            if NORMALISE:
                at = (batch * T + here) * H + head + rows * H
                if ROLE == "dk":
                    vector_weight *= tl.load(shift + at, mask=inside, other=0.0)
                weight *= tl.load(scale + at, mask=inside, other=0.0)
        else:
            weight = tl.where(valid, tl.exp2(lg * (count - age)), 0.0)
            vector_weight = weight
        state, vector = _advance(
            state, vector, kt, values, weight, vector_weight, tl.exp2(lg * count),
            ROLE, NORMALISE,
        )  # fmt: skip
        seen += count

    place = (sequence.to(tl.int64) * H + head) * segments + segment
    tl.store(
        states + place * (K * V) + channels[:, None] * V + columns[None, :], state,
        mask=(channels < K)[:, None] & (columns < V)[None, :],
    )  # fmt: skip
    if NORMALISE:
        if ROLE != "dv":
            size: tl.constexpr = K if ROLE == "output" else V
            places = channels if ROLE == "output" else columns
            tl.store(vectors + place * size + places, _narrowed(vector, ROLE), mask=places < size)
    tl.store(tokens + sequence * segments + segment, seen)


@triton.jit
def scan_kernel(
    q, k, v, output, log2_decay, counted, borders, scale, shift, sums,
    initial, initial_vector, final, final_vector, states, vectors, tokens, partner, dots,
    T, H, segments, segment_length, q_group, k_group, v_group, partner_group,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, partner_b, partner_t, partner_h,
    state_k, state_v, final_k, final_v, dots_block,
    ROLE: tl.constexpr, NORMALISE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """L for the roles output and dq, R for dk and dv; shapes as its launcher, ``_scan``, says."""
    BACKWARD: tl.constexpr = ROLE == "dk" or ROLE == "dv"
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    block = program % BLOCKS
    segment = (program // BLOCKS) % segments
    head = (program // (BLOCKS * segments)) % H
    sequence = program // (BLOCKS * segments * H)
    row, begin, end = _place(borders, sequence, T, segment, segment_length)
    batch = (sequence if borders is None else 0 * sequence).to(tl.int64)
    lg = tl.load(log2_decay + head)

    rows = tl.arange(0, BLOCK_T)
    channels = tl.arange(0, BLOCK_K)
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    inner = _within(channels[:, None] >= 0, channels[:, None], K, BLOCK_K)
    inner = _within(inner, columns[None, :], V, BLOCK_V)
    q += batch * q_b + (head // q_group).to(tl.int64) * q_h
    k += batch * k_b + (head // k_group).to(tl.int64) * k_h
    v += batch * v_b + (head // v_group).to(tl.int64) * v_h
    output += (batch * T * H + head) * V
    if dots is not None:
        partner += batch * partner_b + (head // partner_group).to(tl.int64) * partner_h
        dots += block.to(tl.int64) * dots_block + batch * T * H + head
    if NORMALISE:
        if ROLE == "output":
            sums += batch * T * H + head
        else:
            scale += batch * T * H + head
            if ROLE != "dv":
                shift += batch * T * H + head

    # The state before the first chunk: what was given, and what earlier segments added.
    size: tl.constexpr = K if ROLE == "output" else V
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    places = channels if ROLE == "output" else columns
    vector = tl.zeros((BLOCK_K if ROLE == "output" else BLOCK_V,), tl.float32)
    matrix = sequence.to(tl.int64) * H + head
    if initial is not None:
        state += tl.load(
            initial + matrix * (K * V) + channels[:, None] * state_k + columns[None, :] * state_v,
            mask=inner, other=0.0,
        )  # fmt: skip
        if NORMALISE and ROLE != "dv":
            vector += tl.load(
                initial_vector + matrix * size + places,
                mask=places < size, other=0.0,
            )  # fmt: skip
    if states is not None:
        for earlier in range(segments - 1 - segment if BACKWARD else segment):
            other = segments - 1 - earlier if BACKWARD else earlier
            kept = tl.exp2(lg * tl.load(tokens + sequence * segments + other))
            place = (sequence.to(tl.int64) * H + head) * segments + other
            state = state * kept + tl.load(
                states + place * (K * V) + channels[:, None] * V + columns[None, :],
                mask=inner, other=0.0,
            )  # fmt: skip
            if NORMALISE and ROLE != "dv":
                vector = vector * kept + tl.load(
                    vectors + place * size + places,
                    mask=places < size, other=0.0,
                )  # fmt: skip

    vector = _widened(vector, ROLE)
    chunks = tl.cdiv(end - begin, BLOCK_T)
    for index in range(chunks):
        chunk = chunks - 1 - index if BACKWARD else index
        start = begin + chunk * BLOCK_T
        here = row + start
        inside = rows < end - start
        age, count, valid = _chunk_ages(
            None if counted is None else counted + batch * (T + 1) + here, end - start, rows
        )
        queries = tl.load(
            q + here * q_t + rows[:, None] * q_t + channels[None, :],
            mask=_within(inside[:, None], channels[None, :], K, BLOCK_K), other=0.0,
        )  # fmt: skip
        kt = tl.load(
            k + here * k_t + rows[None, :] * k_t + channels[:, None],
            mask=_within(inside[None, :], channels[:, None], K, BLOCK_K), other=0.0,
        )  # fmt: skip
        values = tl.load(
            v + here * v_t + rows[:, None] * v_t + columns[None, :],
            mask=_within(inside[:, None], columns[None, :], V, BLOCK_V), other=0.0,
        )  # fmt: skip

        scores = tl.dot(queries, kt, input_precision="tf32")
        if BACKWARD:
            distance = age[None, :] - age[:, None]
            reading, weight = tl.exp2(lg * (count - age)), tl.exp2(lg * age)
            vector_weight = weight
            if NORMALISE:
                column_scale = tl.load(scale + here * H + rows * H, mask=inside, other=0.0)
                scores *= column_scale[None, :]
                if ROLE == "dk":
                    column_shift = tl.load(shift + here * H + rows * H, mask=inside, other=0.0)
                    scores += column_shift[None, :]
                    vector_weight = weight * column_shift
                weight *= column_scale
        else:
            distance = age[:, None] - tl.where(valid, age, 1e30)[None, :]
            reading = tl.exp2(lg * age)
            weight = tl.where(valid, tl.exp2(lg * (count - age)), 0.0)
            vector_weight = weight
            if NORMALISE and ROLE == "dq":
                row_scale = tl.load(scale + here * H + rows * H, mask=inside, other=0.0)
                row_shift = tl.load(shift + here * H + rows * H, mask=inside, other=0.0)
                scores = scores * row_scale[:, None] + row_shift[:, None]
        # Ages grow with valid tokens, so a negative distance is one into the future.
        scores *= tl.where(distance >= 0.0, tl.exp2(lg * distance), 0.0)

        out = _read(queries, state)
        if NORMALISE:
            if ROLE == "dq":
                out = out * row_scale[:, None] + row_shift[:, None] * vector[None, :]
            elif ROLE == "dk":
                out += vector[None, :]
        out = tl.dot(
            scores.to(values.dtype), values, acc=out * reading[:, None], input_precision="tf32"
        )
        if NORMALISE and ROLE == "output":
            past = tl.sum(_read(queries, vector), 1)
            total = tl.sum(scores, 1) + reading * past
            # Where nothing was written both are zero.
            out /= tl.where(total == 0.0, 1.0, total)[:, None]
            if block == 0:
                tl.store(sums + here * H + rows * H, total, mask=inside)
        if BACKWARD:
            out = tl.where(valid[:, None], out, 0.0)
        stored = _within(inside[:, None], columns[None, :], V, BLOCK_V)
        tl.store(
            output + here * (H * V) + rows[:, None] * (H * V) + columns[None, :],
            out.to(output.dtype.element_ty), mask=stored,
        )  # fmt: skip
        if dots is not None:
            other = tl.load(
                partner + here * partner_t + rows[:, None] * partner_t + columns[None, :],
                mask=stored, other=0.0,
            )  # fmt: skip
            tl.store(dots + here * H + rows * H, tl.sum(out * other.to(tl.float32), 1), mask=inside)
        state, vector = _advance(
            state, vector, kt, values, weight, vector_weight, tl.exp2(lg * count),
            ROLE, NORMALISE,
        )  # fmt: skip

    # The same strides under other names: else the compiler would hold every address over the loop.
    if final is not None:
        if segment == (0 if BACKWARD else segments - 1):
            tl.store(
                final + matrix * (K * V) + channels[:, None] * final_k + columns[None, :] * final_v,
                state, mask=inner,
            )  # fmt: skip
            if NORMALISE and ROLE != "dv":
                if block == 0 or ROLE != "output":
                    tl.store(
                        final_vector + matrix * size + places,
                        _narrowed(vector, ROLE), mask=places < size,
                    )  # fmt: skip


@triton.jit
def widen_kernel(
    do, output, sums, dsums, scale, shift, count, V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """scale = 1 / D and shift = dD of each row, from do, o (rows, V) and the sums D."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_V)
    inside = rows < count
    at = rows[:, None] * V + columns[None, :]
    both = inside[:, None] & (columns < V)[None, :]
    product = tl.load(do + at, mask=both, other=0.0).to(tl.float32)
    product *= tl.load(output + at, mask=both, other=0.0).to(tl.float32)
    total = tl.load(sums + rows, mask=inside, other=1.0)
    inverse = tl.where(total == 0.0, 0.0, 1.0) / tl.where(total == 0.0, 1.0, total)
    change = -tl.sum(product, 1) * inverse
    if dsums is not None:
        change += tl.load(dsums + rows, mask=inside, other=0.0)
    tl.store(scale + rows, inverse, mask=inside)
    tl.store(shift + rows, change, mask=inside)
