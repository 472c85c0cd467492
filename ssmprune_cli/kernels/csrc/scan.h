/* What the forward and the backward scan share: their arguments, and a chunk of tokens of one block of W channels. */
#ifndef SSMPRUNE_SCAN_H
#define SSMPRUNE_SCAN_H
#include "vectors.h"

/* Activations (u, delta, B, C, z, shift, y and their gradients) are float32 or, with `half`, bfloat16; dB and dC and
 * all the rest are float32. Strides in elements: batch and row of each (B, L, .) input; the last dimension is dense. */
typedef struct {
    const void *u, *delta, *B, *C, *z, *shift, *grad;
    void *y, *du, *ddelta, *dz, *dshift;
    const float *A, *D, *bias, *gap, *gap_delta;
    float *dA, *dB, *dC, *dD, *dbias, *dgap_delta;
    const int64_t *slots; /* (B, L): the row of y where a token's output goes, -1 for a token that nobody reads */
    int64_t batch, length, channels, state;
    int64_t u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, shift_b, shift_l, gap_b, gap_l;
    int64_t softplus, reverse, half, threads, groups, outputs;
} Scan;

/* Channels `c` ... of sample `b`: the parameters of one block. A (N vectors) is in units of log 2. */
typedef struct { vf A[MAX_INNER], bias, D, gap_delta; float steepest; } Block;

INLINE void read_block(const Scan *a, int64_t c, int lanes, int N, Block *k) {
    vf steepest = {0};
    for (int n = 0; n < N; n++) {
        vf A = {0};
        for (int i = 0; i < lanes; i++) A[i] = a->A[(c + i) * N + n];
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
typedef struct { vf raw[CHUNK], step[CHUNK], decay[CHUNK], u[CHUNK]; } Tokens;

/* Raw steps, steps, decay times and inputs. Returns whether every exponent is far from overflow. */
INLINE int read_tokens(const Scan *a, int64_t b, int64_t first, int way, int size, int64_t c, int lanes, int half,
                       const Block *k, Tokens *x) {
    for (int j = 0; j < size; j++) {
        x->raw[j] = load(a->delta, b * a->delta_b + (first + j * way) * a->delta_l + c, lanes, half) + k->bias;
        x->u[j] = load(a->u, b * a->u_b + (first + j * way) * a->u_l + c, lanes, half);
    }
    for (int j = 0; j < size; j++) x->step[j] = x->raw[j];
    if (a->softplus)
        for (int j = 0; j < size; j += UNROLL) softplus(x->step + j);
    for (int j = 0; j < size; j++) x->decay[j] = x->step[j];
    if (a->shift)
        for (int j = 0; j < size; j++)
            x->decay[j] += load(a->shift, b * a->shift_b + (first + j * way) * a->shift_l + c, lanes, half);
    if (a->gap)
        for (int j = 0; j < size; j++)
            x->decay[j] += a->gap[b * a->gap_b + (first + j * way) * a->gap_l] * (a->gap_delta ? k->gap_delta : x->step[j]);
    vi outside = {0};
    for (int j = 0; j < size; j++) outside |= ~(absolute(x->decay[j]) * k->steepest < 126.0f);
    int any = 0;
    for (int i = 0; i < W; i++) any |= outside[i];
    return !any;
}

/* States are worked on in groups: each alone would wait for its own last value. */
#define GROUP 4

/* exp(decay A) of the chunk for one state. */
INLINE void decay_factors(const vf *decay, vf A, int size, int safe, vf *out) {
    if (safe)
        for (int j = 0; j < size; j += UNROLL) exp2_of_products(decay + j, A, out + j);
    else
        for (int j = 0; j < size; j += UNROLL) exp2_of_any_products(decay + j, A, out + j);
}
#endif
