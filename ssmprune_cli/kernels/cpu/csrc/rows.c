/* What is left of a block once scan and convolution are fast: passes over rows of channels, each in one go. */
#include "rows.h"
#include "threads.h"

DESCRIBE(Norm)

/* stream = hidden + residual, normed = weight * stream / root mean square of a row. */
int add_rms_norm(const Norm *a) {
#pragma omp parallel for num_threads(team(a->threads)) schedule(static)
    for (int64_t row = 0; row < a->rows; row++) norm_row(a, row, (int)a->half_in, (int)a->half_out);
    return 0;
}

ARGUMENTS(NormBack,
    const void *normed, *weight; /* the gradient of `normed`, and the weight: of one type */
    const float *stream, *d_stream;
    float *d_sum, *d_weight; /* d_weight (groups, E): each group of rows has a sum of its own */
    int64_t rows, channels, half, threads, groups;
    double eps;
);
DESCRIBE(NormBack)

INLINE void norm_back_row(const NormBack *a, int64_t row, float *d_weight, int half) {
    int64_t E = a->channels, at = row * E;
    vf square[UNROLL] = {{0}}, product[UNROLL] = {{0}};
    for (int64_t c = 0; c < E; c += SLAB) {
        vf x[UNROLL] = {{0}}, g[UNROLL] = {{0}};
        FOR_SLAB(E, c, x[i] = load(a->stream, at + c + i * W, lanes, 0))
        FOR_SLAB(E, c, g[i] = load(a->normed, at + c + i * W, lanes, half) * load(a->weight, c + i * W, lanes, half))
        STAGE square[i] += x[i] * x[i], product[i] += x[i] * g[i];
    }
    for (int i = 1; i < UNROLL; i++) square[0] += square[i], product[0] += product[i];
    float scale = 1.0f / __builtin_sqrtf(sum_lanes(square[0]) / (float)E + (float)a->eps);
    float along = sum_lanes(product[0]) * scale * scale / (float)E; /* what only stretches a row has no effect */
    for (int64_t c = 0; c < E; c += SLAB) {
        vf x[UNROLL] = {{0}}, g[UNROLL] = {{0}}, d[UNROLL] = {{0}};
        FOR_SLAB(E, c, x[i] = load(a->stream, at + c + i * W, lanes, 0); g[i] = load(a->normed, at + c + i * W, lanes, half))
        FOR_SLAB(E, c, d[i] = g[i] * load(a->weight, c + i * W, lanes, half))
        FOR_SLAB(E, c, d[i] = load(a->d_stream, at + c + i * W, lanes, 0) + scale * (d[i] - along * x[i]))
        FOR_SLAB(E, c, store(a->d_sum, at + c + i * W, d[i], lanes, 0))
        FOR_SLAB(E, c, store(d_weight, c + i * W, load(d_weight, c + i * W, lanes, 0) + g[i] * x[i] * scale, lanes, 0))
    }
}

int add_rms_norm_backward(const NormBack *a) {
#pragma omp parallel for num_threads(team(a->threads)) schedule(static)
    for (int64_t group = 0; group < a->groups; group++) {
        float *d_weight = a->d_weight + group * a->channels;
        int64_t start, stop;
        share(a->rows, group, a->groups, &start, &stop);
        if (a->channels) memset(d_weight, 0, (size_t)a->channels * sizeof(float));
        for (int64_t row = start; row < stop; row++) {
            if (a->half) norm_back_row(a, row, d_weight, 1);
            else norm_back_row(a, row, d_weight, 0);
        }
    }
    return 0;
}

DESCRIBE(Gate)

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

INLINE void gate_back_row(const Gate *a, int64_t row, int half) {
    int64_t E = a->channels, at = row * E, z_at = row / a->length * a->z_b + row % a->length * a->z_l;
    for (int64_t c = 0; c < E; c += SLAB) {
        vf z[UNROLL] = {{0}}, gate[UNROLL], y[UNROLL] = {{0}}, g[UNROLL] = {{0}};
        FOR_SLAB(E, c, z[i] = load(a->z, z_at + c + i * W, lanes, half); y[i] = load(a->y[0], at + c + i * W, lanes, half))
        for (int64_t k = 1; k < a->count; k++) { FOR_SLAB(E, c, y[i] += load(a->y[k], at + c + i * W, lanes, half)) }
        FOR_SLAB(E, c, g[i] = load(a->grad, at + c + i * W, lanes, half))
        STAGE gate[i] = z[i];
        sigmoid(gate);
        STAGE g[i] *= gate[i] * (float)a->scale;
        FOR_SLAB(E, c, store(a->dy, at + c + i * W, g[i] * z[i], lanes, half))
        FOR_SLAB(E, c, store(a->dz, at + c + i * W, g[i] * y[i] * (1.0f + z[i] * (1.0f - gate[i])), lanes, half))
    }
}

/* y (outer, columns) = the sums over `count` of x (outer, count, columns), one after the other: in an order of their own,
 * whatever the threads. */
ARGUMENTS(Sum,
    const float *x;
    float *y;
    int64_t outer, count, columns, threads;
);
DESCRIBE(Sum)

int sum_parts(const Sum *a) {
    int64_t slabs = (a->columns + SLAB - 1) / SLAB;
#pragma omp parallel for num_threads(team(a->threads)) schedule(static)
    for (int64_t item = 0; item < a->outer * slabs; item++) {
        int64_t c = item % slabs * SLAB, at = item / slabs * a->count * a->columns + c;
        vf total[UNROLL] = {{0}};
        for (int64_t k = 0; k < a->count; k++, at += a->columns) {
            FOR_SLAB(a->columns, c, total[i] += load(a->x, at + i * W, lanes, 0))
        }
        FOR_SLAB(a->columns, c, store(a->y, item / slabs * a->columns + c + i * W, total[i], lanes, 0))
    }
    return 0;
}

void gate_rows(const Gate *a, int64_t from, int64_t to) {
    for (int64_t row = from; row < to; row++) {
        if (a->half) gate_row(a, row, 1);
        else gate_row(a, row, 0);
    }
}

int gated_sum(const Gate *a) {
#pragma omp parallel num_threads(team(a->threads))
    {
        int64_t from, to;
        own_share(a->batch * a->length, &from, &to);
        gate_rows(a, from, to);
    }
    return 0;
}

int gated_sum_backward(const Gate *a) {
#pragma omp parallel for num_threads(team(a->threads)) schedule(static)
    for (int64_t row = 0; row < a->batch * a->length; row++) {
        if (a->half) gate_back_row(a, row, 1);
        else gate_back_row(a, row, 0);
    }
    return 0;
}
