/* What is left of a block once scan and convolution are fast: passes over rows of channels, each in one go. */
#include "rows.h"

/* stream = hidden + residual, normed = weight * stream / root mean square of a row. */
int add_rms_norm(const Norm *a) {
#pragma omp parallel for num_threads(a->threads) schedule(static)
    for (int64_t row = 0; row < a->rows; row++) norm_row(a, row, (int)a->half_in, (int)a->half_out);
    return 0;
}

typedef struct {
    const void *y[4], *z;
    void *out;
    int64_t batch, length, channels, count, z_b, z_l, half, threads;
    double scale;
} Gate;

INLINE void gate_row(const Gate *a, int64_t row, int half) {
    int64_t E = a->channels, at = row * E, z_at = row / a->length * a->z_b + row % a->length * a->z_l;
    for (int64_t c = 0; c < E; c += SLAB) {
        vf z[UNROLL] = {{0}}, gate[UNROLL], y[UNROLL] = {{0}};
        STAGE fetch(a->z, z_at + AHEAD * a->z_l + c + i * W, half);
        FOR_SLAB(E, c, z[i] = load(a->z, z_at + c + i * W, lanes, half); y[i] = load(a->y[0], at + c + i * W, lanes, half))
        STAGE gate[i] = z[i];
        sigmoid(gate);
        for (int64_t k = 1; k < a->count; k++) { FOR_SLAB(E, c, y[i] += load(a->y[k], at + c + i * W, lanes, half)) }
        FOR_SLAB(E, c, store(a->out, at + c + i * W, y[i] * z[i] * gate[i] * (float)a->scale, lanes, half))
    }
}

/* (y_0 + y_1 + ...) silu(z) scale */
int gated_sum(const Gate *a) {
#pragma omp parallel for num_threads(a->threads) schedule(static)
    for (int64_t row = 0; row < a->batch * a->length; row++) {
        if (a->half) gate_row(a, row, 1);
        else gate_row(a, row, 0);
    }
    return 0;
}
