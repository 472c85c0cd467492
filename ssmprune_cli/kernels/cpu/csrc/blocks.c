/* Several Mamba blocks in a row: add the last output to the residual stream, RMSNorm, the large projection, the inside of
 * the block, the projection back. A few samples for each thread go through all blocks before the next ones start.
 * Glossary: fused_op.py.
 */
#include "inner.h"
#include "rows.h"

/* hidden, residual, out, stream (B, L, d); ungated (B, L, E), of the last block, or none; context (B, M, d), of root mean
 * square 1; gap_delta (blocks, G, E); mass (blocks); the rest as in inner.h. `parameters` (blocks, each) are as
 * packing.pack_block lays them out for `parts` and `eight_bits`: 1 for the large weights in eight bits, 2 for x_weight too. */
ARGUMENTS(Blocks,
    const float *hidden, *residual, *context, *gap, *gap_delta, *size, *mass, *parameters;
    float *out, *stream, *ungated;
    const int64_t *sources, *slots, *cells, *read;
    int64_t blocks, each, batch, length, dim, channels, state, width, rank, directions, others, threads, parts, tiles;
    int64_t eight_bits, dots, tokens, steps;
    double scale, eps;
);
DESCRIBE(Blocks)

#define SHARE (1 << 21) /* floats of scratch memory for a thread's samples: more of them read the weights less often */
#define PIECE 512 /* tokens that go through a block together, where it only looks back: in whole chunks of the scan */
#define PANEL 64 /* columns of a weight that lie together: a panel stays in the caches while rows pass by it */

/* Rows `start` ... `stop` of out = x . weight, which has panels of PANEL columns. A panel meets all of the rows. */
INLINE void panels_of_rows(int way, Rows x, const float *weight, Rows out, int64_t start, int64_t stop) {
    int64_t K = x.columns, words = way == FLOATS ? K : tiled_step(K, 1) / 16; /* of a column */
    int64_t tiles = (stop - start + TILE_ROWS - 1) / TILE_ROWS;
    int64_t ahead = tiles ? (words * PANEL / 16 + tiles - 1) / tiles * 16 : 0; /* of the next panel, asked for by each tile */
    for (int64_t n = 0; n < out.columns; n += PANEL, weight += words * PANEL)
        for (int64_t row = start, tile = 0; row < stop; row += TILE_ROWS, tile++) {
            for (int64_t i = 0; i < ahead; i += 16)
                __builtin_prefetch(weight + words * PANEL + tile * ahead + i, 0, 2);
            float *from[TILE_ROWS], *to[TILE_ROWS];
            place(x, row, stop, 0, TILE_ROWS, from), place(out, row, stop, n, TILE_ROWS, to);
            if (out.columns - n >= PANEL) product(way, (const float *const *)from, weight, K, PANEL, to);
            else product(way, (const float *const *)from, weight, K, out.columns - n, to);
        }
}

/* The same of any number of rows, some at a time: each panel reads these again, so they have to stay in the caches. */
INLINE void panels(int way, Rows x, const float *weight, Rows out, int64_t start, int64_t stop) {
    for (int64_t row = start; row < stop; row += PIECE)
        panels_of_rows(way, x, weight, out, row, row + PIECE < stop ? row + PIECE : stop);
}

static void project(int64_t way, const Inner *a, Rows x, const float *weight, Rows out, int64_t start, int64_t stop) {
    if (way == TILES) tiled(x, weight, 0, out, start, stop, a->parts, a->rows);
    else if (way == BYTES) eight_bit(x, weight, 0, out, start, stop, (int)a->dots, (float *)a->rows);
    else if (way == PAIRS) panels(PAIRS, x, weight, out, start, stop);
    else panels(FLOATS, x, weight, out, start, stop);
}

/* The way of x_weight, if large weights go `way`. */
INLINE int64_t x_way(const Blocks *a, int64_t way) { return a->eight_bits == 1 ? FLOATS : way; }

/* Tokens of a sequence that are in scratch memory at a time. Of a long one, pieces follow one another through each block, so
 * that they stay in the caches, and no memory of the sequence's length is asked of the system. Not where a scan comes back
 * from the end, or tokens have their inputs elsewhere. */
INLINE int64_t piece_of(const Blocks *a) {
    int whole = a->directions > 1 || a->sources || a->slots || a->cells || a->others || a->steps != a->length;
    return whole || a->length < PIECE ? a->length : PIECE;
}

/* Floats of scratch memory that a sample takes. */
INLINE int64_t scratch_of(const Blocks *a) {
    int64_t L = piece_of(a), E = a->channels, d = a->dim, M = a->others, pieces = L < a->length;
    Inner inner = {.length = L, .channels = E, .state = a->state, .rank = a->rank, .directions = a->directions,
                   .steps = pieces ? L : a->steps, .cells = a->cells};
    int64_t size = inner_scratch(&inner) + L * (2 * E + d) + M * (E + d);
    size += a->slots ? L * E : 0;                                   /* outputs then have other rows than inputs */
    size += pieces ? (a->width - 1) * 2 * E + a->state * E : 0; /* what goes over from piece to piece */
    return (size + 15) / 16 * 16;
}

/* The last rows of x to the front of it, for the convolution of the next piece; zeros for that of the first one. */
static void look_back(const Inner *a, int64_t first, int64_t count) {
    int64_t start, stop;
    own_share(count, &start, &stop);
    for (int64_t sample = start; sample < stop; sample++)
        for (int64_t row = 0; row < a->before; row++) {
            float *xz = (float *)a->xz + (first + sample) * a->xz_b, *to = xz + (row - a->before) * a->xz_l;
            const float *from = xz + (a->length - a->before + row) * a->xz_l;
            for (int64_t c = 0; c < a->channels; c++) to[c] = a->begun ? from[c] : 0;
        }
}

/* Tokens `from` ... `from + n` of the samples `first` ... `first + count` through one block, by one of the threads that do it
 * together. */
static int through(const Blocks *a, int64_t way, int64_t block, int64_t first, int64_t count, int64_t from, int64_t n,
                   float *scratch, int64_t size, uint16_t *rows) {
    int64_t L = a->length, d = a->dim, E = a->channels, M = a->others, pieces = n < L, start, stop;
    int64_t piece = piece_of(a), context_start, context_stop, weight = weight_size(d, E, way, a->parts);
    const float *norm = a->parameters + block * a->each, *in = norm + d, *back = in + 2 * weight;
    Inner inner = {.batch = a->batch, .length = n, .channels = E, .state = a->state, .width = a->width, .rank = a->rank,
                   .directions = a->directions, .others = M, .scale = a->scale, .sources = a->sources, .slots = a->slots,
                   .cells = a->cells, .read = a->read, .tokens = pieces ? n : a->tokens, .steps = pieces ? n : a->steps,
                   .xz_b = size, .xz_l = 2 * E, .y_b = size, .context_b = size, .context_l = E, .way = x_way(a, way),
                   .parts = a->parts, .dots = a->dots, .rows = rows, .whole = pieces ? L : 0,
                   .before = pieces ? a->width - 1 : 0, .begun = from > 0};
    Inner room = inner;
    if (pieces) room.length = room.steps = piece;
    float *u = scratch, *xz = u + inner_scratch(&room) + inner.before * 2 * E, *normed = xz + piece * 2 * E;
    float *context = normed + piece * d, *unit = context + M * E;
    float *y = a->slots ? unit + M * d : u + (a->directions - 1) * n * E;
    if (pieces) inner.carry = context - u;
    int64_t at = first * L + from;
    Rows tokens = {normed, d, n, size, d}, gated = {y, E, n, size, E};
    Rows x = {xz, E, n, size, 2 * E}, z = {xz + E, E, n, size, 2 * E}, both = {xz, 2 * E, n, size, 2 * E};
    Rows seen = {unit, d, M, size, d}, seen_x = {context, E, M, size, E}, out = {a->out + at * d, d, n, L * d, d};
    /* The samples are counted from `first` here, and from 0 there. */
    inner.xz = xz - first * size, inner.y = y - first * size, inner.context = a->context ? context - first * size : 0;
    inner.parameters = back + weight_size(E, d, way, a->parts);
    inner.gap = a->gap ? a->gap + from : 0, inner.size = a->size ? a->size + from : 0;
    if (block == a->blocks - 1 && a->ungated) inner.ungated = a->ungated + from * E;
    inner.gap_delta = a->gap_delta ? a->gap_delta + block * a->directions * E : 0;
    inner.mass = a->mass ? a->mass[block] : 0;
    own_share(count * n, &start, &stop);
    own_share(count * M, &context_start, &context_stop);
    for (int64_t row = start; row < stop; row++) {
        int64_t there = (at + row / n * L + row % n) * d;
        const float *residual = block ? a->stream : a->residual;
        Norm one = {.hidden = (block ? a->out : a->hidden) + there, .residual = residual ? residual + there : 0,
                    .weight = norm, .stream = a->stream + there, .normed = normed + row / n * size + row % n * d,
                    .channels = d, .eps = a->eps};
        norm_row(&one, 0, 0, 0);
    }
    for (int64_t row = context_start; row < context_stop; row++)
        for (int64_t c = 0; c < d; c++)
            unit[row / M * size + row % M * d + c] = a->context[(first * M + row) * d + c] * norm[c];
    if (way == FLOATS || E % (way == BYTES ? BYTE_PANEL : 16)) { /* not one weight: there is a gap between them */
        project(way, &inner, tokens, in, x, start, stop);
        project(way, &inner, tokens, in + weight, z, start, stop);
    } else {
        project(way, &inner, tokens, in, both, start, stop);
    }
    project(way, &inner, seen, in, seen_x, context_start, context_stop);
    if (!from) look_back(&inner, first, count);
#pragma omp barrier
    int failed = 2 * feed_rows(&inner, first, count, scratch, size);
#pragma omp barrier
    inner.begun = 1;
    if (from + n < L) look_back(&inner, first, count); /* scans read the other half of xz */
    inner.begun = from > 0;
    failed |= scan_channels(&inner, first, count, scratch, size);
#pragma omp barrier
    project(way, &inner, gated, back, out, start, stop);
    return failed;
}

/* With `parts` and without `tiles`, products of bfloat16 matrices by the processor, parts is 1. Returns 0, 1 when memory ran
 * out, or 2 for a source that is not there or a cell that is none. */
int mamba_blocks(const Blocks *a) {
    int64_t size = scratch_of(a), piece = piece_of(a);
    if (!a->batch || !a->length) return 0;
    int64_t threads = team(a->threads), each = size < SHARE ? SHARE / size : 1;
    int64_t together = threads * each < a->batch ? threads * each : a->batch;
    int64_t way = a->eight_bits ? BYTES : !a->parts ? FLOATS : a->tiles ? TILES : PAIRS;
    int64_t widest = a->channels > a->dim ? a->channels : a->dim;
    int64_t rows_of_thread = way == TILES ? tiled_room(widest, a->parts) : way == BYTES ? byte_room(widest) : 0;
    float *scratch = aligned_alloc(64, (size_t)(together * size + threads * rows_of_thread + 16) * sizeof(float));
    int failed = !scratch;
#pragma omp parallel num_threads(threads) reduction(|: failed)
    {
        for (int64_t first = 0; first < a->batch && scratch; first += together) {
            int64_t count = a->batch - first < together ? a->batch - first : together;
            uint16_t *rows = (uint16_t *)(scratch + together * size + omp_get_thread_num() * rows_of_thread);
            for (int64_t block = 0; block < a->blocks; block++)
                for (int64_t from = 0; from < a->length; from += piece) {
                    int64_t n = a->length - from < piece ? a->length - from : piece;
                    failed |= through(a, way, block, first, count, from, n, scratch, size, rows);
                }
#pragma omp barrier
        }
        if (way == TILES || (way == BYTES && a->dots == TILES_OF_BYTES)) tiles_end();
    }
    free(scratch);
    return failed;
}
