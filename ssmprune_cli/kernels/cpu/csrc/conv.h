/* Depthwise convolutions with SiLU: their arguments, and what one token's slab of channels takes. Taps are (K, E):
 * neighbouring channels lie side by side in every array. */
#ifndef SSMPRUNE_CONV_H
#define SSMPRUNE_CONV_H
#include "vectors.h"

ARGUMENTS(Conv,
    const void *x, *context, *grad;
    void *y, *dx, *dcontext;
    const float *taps, *bias;
    float *dtaps, *dbias;
    const int64_t *positions;
    int64_t batch, length, channels, width, x_b, x_l, context_b, context_l, others, rows, columns, outputs;
    int64_t reverse, half, threads;
);

/* The token that tap k of the output at t meets. */
INLINE int64_t source(const Conv *a, int64_t t, int64_t k) {
    return a->reverse ? t + a->width - 1 - k : t - a->width + 1 + k;
}

/* The convolution before its SiLU, for token t of sample b. */
INLINE void convolve(const Conv *a, int64_t b, int64_t t, int64_t c, int half, vf *y) {
    FOR_SLAB(a->channels, c, y[i] = load(a->bias, c + i * W, lanes, 0))
    for (int64_t k = 0; k < a->width; k++) {
        int64_t s = source(a, t, k), at = b * a->x_b + s * a->x_l + c;
        if (s < 0 || s >= a->length) continue;
        const float *taps = a->taps + k * a->channels + c;
        FOR_SLAB(a->channels, c, y[i] += load(taps, i * W, lanes, 0) * load(a->x, at + i * W, lanes, half))
    }
}

/* Row s of x followed by context: which of the two it is in, and where in it. */
INLINE const void *row_among(const Conv *a, int64_t b, int64_t s, int64_t *at) {
    *at = s < a->length ? b * a->x_b + s * a->x_l : b * a->context_b + (s - a->length) * a->context_l;
    return s < a->length ? a->x : a->context;
}

/* The same when tap k of the token meets row sources[k] of x followed by context, or nothing for -1. */
INLINE void convolve_sources(const Conv *a, int64_t b, const int64_t *sources, int64_t c, int half, vf *y) {
    FOR_SLAB(a->channels, c, y[i] = load(a->bias, c + i * W, lanes, 0))
    for (int64_t k = 0; k < a->width; k++) {
        int64_t at;
        if (sources[k] < 0) continue;
        const void *rows = row_among(a, b, sources[k], &at);
        const float *taps = a->taps + k * a->channels + c;
        FOR_SLAB(a->channels, c, y[i] += load(taps, i * W, lanes, 0) * load(rows, at + c + i * W, lanes, half))
    }
}

/* Whether one of the K sources is a row that is not there. */
INLINE int outside(const Conv *a, const int64_t *sources) {
    for (int64_t k = 0; k < a->width; k++)
        if (sources[k] < -1 || sources[k] >= a->length + a->others) return 1;
    return 0;
}

/* y becomes silu(y). */
INLINE void silu(vf *y) {
    vf gate[UNROLL];
    STAGE gate[i] = y[i];
    sigmoid(gate);
    STAGE y[i] *= gate[i];
}

/* A part of a convolution: rows `from` ... `to` of y. Returns 2 for a source that is not there. */
void conv_rows(const Conv *a, int64_t from, int64_t to);
int sparse_conv_rows(const Conv *a, int64_t from, int64_t to);
/* Over a grid: a slab of channels of one sample, of batch times slabs. Returns 0, 1 when memory ran out, or 2 for a position
 * outside the grid. */
int grid_conv_item(const Conv *a, int64_t item);

/* silu(y) to row `row` of `out` (., E). */
INLINE void write_silu(void *out, int64_t row, int64_t channels, int64_t c, int half, vf *y) {
    silu(y);
    FOR_SLAB(channels, c, store(out, row * channels + c + i * W, y[i], lanes, half))
}
#endif
