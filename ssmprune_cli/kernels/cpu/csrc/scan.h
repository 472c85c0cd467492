/* What the forward and the backward scan share: their arguments, and a chunk of tokens of one block of W channels. */
#ifndef SSMPRUNE_SCAN_H
#define SSMPRUNE_SCAN_H
#include "vectors.h"

/* Activations (u, delta, B, C, z, shift, y and their gradients) are float32 or, with `half`, bfloat16; dB and dC and
 * all the rest are float32. Strides in elements: batch and row of each (B, L, .) input, whose last dimension is dense;
 * channel and state of A. */
ARGUMENTS(Scan,
    const void *u, *delta, *B, *C, *z, *shift, *grad;
    void *y, *du, *ddelta, *dz, *dshift;
    const float *A, *D, *bias, *gap, *gap_delta;
    float *dA, *dB, *dC, *dD, *dbias, *dgap_delta;
    const int64_t *slots; /* (B, L): the row of y where a token's output goes, -1 for a token that nobody reads */
    const int64_t *visits; /* (B, L): the row of u, y and `sum` that each step takes, if it is not its own; forward only */
    /* For inner.c, forward only. Of `rank` (L, R) `dt_weight` (R, E) makes delta, instead of reading it; `sum` (L, E) is
     * added to the output before the gate, which is times `scale`; what comes before the gate goes to `ungated` (L, E)
     * too; z and y are bfloat16 if `half_out` says so. D is times `skip` (L, E), if it is there, and not u. Steps grow by
     * 1 + mass (size - 1) of their `size` (L): what they put into the state, and their decay if there is no gap. With
     * `slots`, z and `ungated` have rows as y has, unless outputs `stay` in the rows of their tokens. */
    const float *rank, *dt_weight, *sum, *skip, *size;
    float *ungated;
    float *states; /* (B, chunks, N, E): before each chunk, which the forward pass keeps for the backward pass, or none */
    const float *initial; /* (B, N, E): the state before the first token in scan direction, or none for zeros */
    float *last;          /* (B, N, E): the state after the last one, if it is wanted */
    const float *dlast;   /* (B, N, E): its gradient, or none for zeros */
    float *dinitial;      /* (B, N, E), if it is wanted */
    int64_t batch, length, channels, state;
    int64_t u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, shift_b, shift_l, gap_b, gap_l, A_c, A_n;
    int64_t softplus, reverse, half, half_out, threads, groups, outputs, rank_l, R, stay;
    double scale, mass;
);

/* Channels `c` ... of sample `b`: the parameters of one block. A (N vectors, elsewhere) is in units of log 2. */
typedef struct { vf bias, D, gap_delta, *A; float steepest; } Block;

INLINE void read_block(const Scan *a, int64_t c, int lanes, int N, Block *k) {
    vf steepest = {0};
    for (int n = 0; n < N; n++) {
        vf A = {0};
        if (a->A_c == 1) A = load(a->A, c + n * a->A_n, lanes, 0);
        else for (int i = 0; i < lanes; i++) A[i] = a->A[(c + i) * a->A_c + n * a->A_n];
        k->A[n] = A *= LOG2E;
        steepest = pick(absolute(A) > steepest, absolute(A), steepest);
    }
    k->steepest = 0;
    for (int i = 0; i < W; i++) k->steepest = steepest[i] > k->steepest ? steepest[i] : k->steepest;
    k->bias = a->bias ? load(a->bias, c, lanes, 0) : (vf){0};
    k->D = a->D ? load(a->D, c, lanes, 0) : (vf){0};
    k->gap_delta = a->gap_delta ? load(a->gap_delta, c, lanes, 0) : (vf){0};
}

/* Up to CHUNK tokens in scan order, `first` being the first one's place and `way` the direction. */
#define CHUNK 16
/* States that go through a chunk together, and tokens whose steps are made together: what registers hold. */
#define GROUP (W == 16 ? 16 : UNROLL)
typedef struct { vf raw[CHUNK], step[CHUNK], decay[CHUNK], u[CHUNK]; } Tokens;

/* N states (N, E) of sample b at channels c ...; zeros if there are none. */
INLINE void read_states(const Scan *a, const float *data, int64_t b, int64_t c, int lanes, vf *h) {
    for (int64_t n = 0; n < a->state; n++)
        h[n] = data ? load(data, (b * a->state + n) * a->channels + c, lanes, 0) : (vf){0};
}

INLINE void write_states(const Scan *a, float *data, int64_t b, int64_t c, int lanes, const vf *h) {
    for (int64_t n = 0; data && n < a->state; n++) store(data, (b * a->state + n) * a->channels + c, h[n], lanes, 0);
}

/* Where state 0 of the chunk from `start` on (in scan order) is in `states`, for channels c ... */
INLINE int64_t state_at(const Scan *a, int64_t b, int64_t start, int64_t c) {
    return ((b * ((a->length + CHUNK - 1) / CHUNK) + start / CHUNK) * a->state) * a->channels + c;
}

/* A load that also fetches the next block's part of the row, which is read after this one's chunk. */
INLINE vf load_ahead(const void *data, int64_t at, int lanes, int half) {
    if (lanes == W) fetch(data, at + W, half);
    return load(data, at, lanes, half);
}

/* The row of token j of a chunk; those after its end repeat the last one. */
INLINE int64_t row_of(int64_t first, int way, int size, int j) { return first + (j < size ? j : size - 1) * way; }

/* The row of u, y and `sum` that step `row` of sample b takes. */
INLINE int64_t visited(const Scan *a, int64_t b, int64_t row) { return a->visits ? a->visits[b * a->length + row] : row; }

/* The rank values of a chunk's tokens, (R, CHUNK). */
INLINE void gather_ranks(const Scan *a, int64_t first, int way, int size, float *ranks) {
    for (int j = 0; j < CHUNK; j++)
        for (int64_t r = 0; r < a->R; r++) ranks[r * CHUNK + j] = a->rank[row_of(first, way, size, j) * a->rank_l + r];
}

/* The steps that they give for W channels. */
INLINE void project_steps(const Scan *a, const float *ranks, int64_t c, int lanes, vf bias, vf *step) {
    for (int from = 0; from < CHUNK; from += GROUP) {
        vf sum[GROUP];
#pragma GCC unroll 16
        for (int j = 0; j < GROUP; j++) sum[j] = bias;
        for (int64_t r = 0; r < a->R; r++) {
            vf weight = load(a->dt_weight, r * a->channels + c, lanes, 0);
#pragma GCC unroll 16
            for (int j = 0; j < GROUP; j++) sum[j] += weight * ranks[r * CHUNK + from + j];
        }
#pragma GCC unroll 16
        for (int j = 0; j < GROUP; j++) step[from + j] = sum[j];
    }
}

/* Raw steps, steps (grown), decay times and inputs; places after `size` repeat the last token. With `ranks`, they give the steps.
 * Returns whether every exponent is far from overflow. */
INLINE int read_tokens(const Scan *a, int64_t b, int64_t first, int way, int size, int64_t c, int lanes, int half,
                       const Block *k, const float *ranks, Tokens *x) {
    vi outside = {0};
    if (ranks) project_steps(a, ranks, c, lanes, k->bias, x->raw);
    for (int j = 0; j < size; j += UNROLL) {
        vf step[UNROLL];
        int64_t row[UNROLL];
        STAGE row[i] = row_of(first, way, size, j + i);
        STAGE x->u[j + i] = load_ahead(a->u, b * a->u_b + visited(a, b, row[i]) * a->u_l + c, lanes, half);
        if (ranks) STAGE step[i] = x->raw[j + i];
        else STAGE step[i] = k->bias + load_ahead(a->delta, b * a->delta_b + row[i] * a->delta_l + c, lanes, half);
        STAGE x->raw[j + i] = step[i];
        if (a->softplus) softplus(step);
        vf decay[UNROLL];
        STAGE decay[i] = step[i];
        if (a->size) {
            STAGE step[i] *= 1.0f + (float)a->mass * (a->size[row[i]] - 1.0f);
            if (!a->gap) STAGE decay[i] = step[i];
        }
        STAGE x->step[j + i] = step[i];
        if (a->shift) STAGE decay[i] += load_ahead(a->shift, b * a->shift_b + row[i] * a->shift_l + c, lanes, half);
        if (a->gap) STAGE decay[i] += a->gap[b * a->gap_b + row[i] * a->gap_l] * (a->gap_delta ? k->gap_delta : decay[i]);
        STAGE x->decay[j + i] = decay[i];
        if (BOUNDED) STAGE outside |= ~(absolute(decay[i]) * k->steepest < 126.0f);
    }
    int any = 0;
    for (int i = 0; BOUNDED && i < W; i++) any |= outside[i];
    return !any;
}

/* exp(decay A) of the chunk for one state. */
INLINE void decay_factors(const vf *decay, vf A, int size, int safe, vf *out) {
    if (safe)
        for (int j = 0; j < size; j += UNROLL) exp2_of_products(decay + j, A, out + j);
    else
        for (int j = 0; j < size; j += UNROLL) exp2_of_any_products(decay + j, A, out + j);
}

/* `count` states from `h` on, with decay rates A, through a chunk. With `y`, C . h of each token is added to it, but for a
 * token that `slots` says nobody reads. B and C: these states' elements of the chunk's first token, at b_at and c_at. */
INLINE void advance(const Scan *a, const vf *A, const vf *decay, const vf *drive, vf *h, vf *y, const int64_t *slots,
                    int64_t b_at, int64_t c_at, int way, int size, int count, int safe, int half) {
    vf g[GROUP], factors[UNROLL][CHUNK];
    int few = count < UNROLL;
    for (int n = 0; n < count; n++) g[n] = h[n];
    if (few)
        for (int n = 0; n < count; n++) decay_factors(decay, A[n], size, safe, factors[n]);
    for (int j = 0; j < size; j++, b_at += way * a->B_l, c_at += way * a->C_l) {
        vf x = drive[j], even = {0}, odd = {0}, f[UNROLL];
        int read = y && !(slots && slots[j * way] < 0);
#pragma GCC unroll 16
        for (int n = 0; n < count; n++) {
            if (n % UNROLL == 0 && !few) {
                if (safe) exp2_of_products(A + n, decay[j], f);
                else exp2_of_any_products(A + n, decay[j], f);
            }
            g[n] = (few ? factors[n][j] : f[n % UNROLL]) * g[n] + x * load_one(a->B, b_at + n, half);
        }
        if (!read) continue;
#pragma GCC unroll 16
        for (int n = 0; n < count; n++) {
            if (n & 1) odd += g[n] * load_one(a->C, c_at + n, half);
            else even += g[n] * load_one(a->C, c_at + n, half);
        }
        y[j] += even + odd;
    }
    for (int n = 0; n < count; n++) h[n] = g[n];
}

/* All N states through a chunk: as many at a time as there are registers for. */
INLINE void advance_all(const Scan *a, const Block *k, const vf *decay, const vf *drive, vf *h, vf *y,
                        const int64_t *slots, int64_t b_at, int64_t c_at, int way, int size, int N, int safe, int half) {
    int n = 0;
#define ADVANCE(count, safe) \
    advance(a, k->A + n, decay, drive, h + n, y, slots, b_at + n, c_at + n, way, size, count, safe, half)
    for (; safe && n + GROUP <= N; n += GROUP) ADVANCE(GROUP, 1);
    for (; n + UNROLL <= N; n += UNROLL) ADVANCE(UNROLL, 0);
    if (n < N) ADVANCE(N - n, safe);
#undef ADVANCE
}

/* The blocks `from` ... `to` of sample b, forward. Returns 1 when memory runs out. */
int scan_forward_group(const Scan *a, int64_t b, int64_t from, int64_t to);
#endif
