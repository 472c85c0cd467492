/* Several Mamba blocks in a row: add the last output to the residual stream, RMSNorm, the large projection, the inside of
 * the block, the projection back. A few samples for each thread go through all blocks before the next ones start.
 * Glossary: fused_op.py.
 */
#include <omp.h>
#include "inner.h"
#include "rows.h"

/* hidden, residual, out, stream (B, L, d); ungated (B, L, E), of the last block, or none; context (B, M, d), of root mean
 * square 1; gap (G, B, L); gap_delta (blocks, G, E); sources (G, B, L, K). `parameters` of each block are as inputs.pack_block lays them out. */
typedef struct {
    const float *hidden, *residual, *context, *gap, *gap_delta;
    float *out, *stream, *ungated;
    const float *const *parameters;
    const int64_t *sources;
    int64_t blocks, batch, length, dim, channels, state, width, rank, directions, others, threads;
    double scale, eps;
} Blocks;

#define SHARE (1 << 21) /* floats of scratch memory for a thread's samples: more of them read the weights less often */
#define PANEL 64 /* columns of a weight that lie together: a panel stays in the caches while rows pass by it */

/* Rows `start` ... `stop` of out (., N) = x (., K) . weight, which has panels (K, PANEL). Rows are `x_l` and `out_l` apart
 * in a sample of L, and samples `x_b` and `out_b`. */
static void panels(const float *x, int64_t x_b, int64_t x_l, int64_t K, const float *weight, int64_t N, float *out,
                   int64_t out_b, int64_t out_l, int64_t L, int64_t start, int64_t stop) {
    int64_t tiles = (stop - start + TILE_ROWS - 1) / TILE_ROWS;
    int64_t ahead = tiles ? (K * PANEL / 16 + tiles - 1) / tiles * 16 : 0; /* a tile asks for its part of the next panel */
    for (int64_t n = 0; n < N; n += PANEL, weight += K * PANEL)
        for (int64_t row = start, tile = 0; row < stop; row += TILE_ROWS, tile++) {
            for (int64_t i = 0; i < ahead; i += 16) __builtin_prefetch(weight + K * PANEL + tile * ahead + i, 0, 2);
            const float *from[TILE_ROWS];
            float *to[TILE_ROWS];
            for (int r = 0; r < TILE_ROWS; r++) {
                int64_t at = row + r < stop ? row + r : stop - 1, b = at / L, t = at % L;
                from[r] = x + b * x_b + t * x_l, to[r] = out + b * out_b + t * out_l + n;
            }
            if (N - n >= PANEL) product(from, weight, K, PANEL, to);
            else product(from, weight, K, N - n, to);
        }
}

/* The samples `first` ... `first + count` through all blocks, by thread `t` of those that do it together. */
static int pass(const Blocks *a, int64_t first, int64_t count, int64_t t, float *scratch, int64_t size) {
    int64_t L = a->length, d = a->dim, E = a->channels, M = a->others, start, stop, context_start, context_stop;
    Inner inner = {.batch = a->batch, .length = L, .channels = E, .state = a->state, .width = a->width, .rank = a->rank,
                   .directions = a->directions, .others = M, .threads = a->threads, .scale = a->scale, .gap = a->gap,
                   .sources = a->sources, .xz_b = size, .xz_l = 2 * E, .y_b = size, .context_b = size, .context_l = E};
    float *u = scratch, *y = u + (a->directions - 1) * L * E, *xz = u + inner_scratch(&inner), *normed = xz + L * 2 * E;
    float *context = normed + L * d, *unit = context + M * E;
    /* The samples are counted from `first` here, and from 0 there. */
    inner.xz = xz - first * size, inner.y = y - first * size, inner.context = a->context ? context - first * size : 0;
    int failed = 0;
    share(count * L, t, a->threads, &start, &stop);
    share(count * M, t, a->threads, &context_start, &context_stop);
    for (int64_t block = 0; block < a->blocks; block++) {
        const float *norm = a->parameters[block], *in = norm + d, *back = in + 2 * E * d;
        inner.parameters = back + d * E;
        if (block == a->blocks - 1) inner.ungated = a->ungated;
        inner.gap_delta = a->gap_delta ? a->gap_delta + block * a->directions * E : 0;
        for (int64_t row = start; row < stop; row++) {
            int64_t at = (first * L + row) * d;
            const float *residual = block ? a->stream : a->residual;
            Norm one = {.hidden = (block ? a->out : a->hidden) + at, .residual = residual ? residual + at : 0, .weight = norm,
                        .stream = a->stream + at, .normed = normed + row / L * size + row % L * d, .channels = d,
                        .eps = a->eps};
            norm_row(&one, 0, 0, 0);
        }
        panels(normed, size, d, d, in, E, xz, size, 2 * E, L, start, stop);
        panels(normed, size, d, d, in + E * d, E, xz + E, size, 2 * E, L, start, stop);
        for (int64_t row = context_start; row < context_stop; row++)
            for (int64_t c = 0; c < d; c++)
                unit[row / M * size + row % M * d + c] = a->context[(first * M + row) * d + c] * norm[c];
        if (M) panels(unit, size, d, d, in, E, context, size, E, M, context_start, context_stop);
#pragma omp barrier
        failed |= 2 * feed_rows(&inner, first, count, t, scratch, size);
#pragma omp barrier
        failed |= scan_channels(&inner, first, count, t, scratch, size);
#pragma omp barrier
        panels(y, size, E, E, back, d, a->out + first * L * d, L * d, d, L, start, stop);
    }
    return failed;
}

/* d and E must be multiples of 16. Returns 0, 1 when memory ran out, or 2 for a source that is not there. */
int mamba_blocks(const Blocks *a) {
    Inner inner = {.length = a->length, .channels = a->channels, .state = a->state, .rank = a->rank,
                   .directions = a->directions};
    int64_t size = inner_scratch(&inner) + a->length * (2 * a->channels + a->dim) + a->others * (a->channels + a->dim);
    int64_t each = size < SHARE ? SHARE / size : 1, together = a->threads * each < a->batch ? a->threads * each : a->batch;
    float *scratch = aligned_alloc(64, (size_t)(together * size) * sizeof(float));
    int failed = !scratch;
#pragma omp parallel num_threads(a->threads) reduction(|: failed)
    for (int64_t first = 0; first < a->batch && scratch; first += together) {
        int64_t count = a->batch - first < together ? a->batch - first : together;
        failed |= pass(a, first, count, omp_get_thread_num(), scratch, size);
#pragma omp barrier
    }
    free(scratch);
    return failed;
}
