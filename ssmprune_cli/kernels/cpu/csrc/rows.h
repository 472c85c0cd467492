/* Passes over rows of channels. */
#ifndef SSMPRUNE_ROWS_H
#define SSMPRUNE_ROWS_H
#include "vectors.h"

ARGUMENTS(Norm,
    const void *hidden;
    const float *residual;
    const void *weight; /* of the type of `normed` */
    float *stream;
    void *normed;
    int64_t rows, channels, half_in, half_out, threads;
    double eps;
);

INLINE void norm_row(const Norm *a, int64_t row, int half_in, int half_out) {
    int64_t E = a->channels, at = row * E;
    vf square[UNROLL] = {{0}};
    for (int64_t c = 0; c < E; c += SLAB) {
        vf x[UNROLL] = {{0}};
        FOR_SLAB(E, c, x[i] = load(a->hidden, at + c + i * W, lanes, half_in))
        if (a->residual) { FOR_SLAB(E, c, x[i] += load(a->residual, at + c + i * W, lanes, 0)) }
        FOR_SLAB(E, c, square[i] += x[i] * x[i]; store(a->stream, at + c + i * W, x[i], lanes, 0))
    }
    vf total = {0};
    STAGE total += square[i];
    vf scale = splat(1.0f / __builtin_sqrtf(sum_lanes(total) / (float)E + (float)a->eps));
    for (int64_t c = 0; c < E; c += SLAB) {
        vf y[UNROLL] = {{0}};
        FOR_SLAB(E, c, y[i] = load(a->stream, at + c + i * W, lanes, 0) * scale * load(a->weight, c + i * W, lanes, half_out))
        FOR_SLAB(E, c, store(a->normed, at + c + i * W, y[i], lanes, half_out))
    }
}

/* (y_0 + y_1 + ...) silu(z) scale, and its gradients dy and dz. */
ARGUMENTS(Gate,
    const void *y[4], *z, *grad;
    void *out, *dy, *dz;
    int64_t batch, length, channels, count, z_b, z_l, half, threads;
    double scale;
);

/* The sum at rows `from` ... `to` of `out`. */
void gate_rows(const Gate *a, int64_t from, int64_t to);
#endif
