#include "inner.h"

DESCRIBE(Inner)

/* Row t of u (S, E) of sample b: the mean of its cell, and the token's own values to row t of `own`. `sources` (T, K) are of
 * all its tokens. Returns whether a source is missing, or a cell is none. */
INLINE int pool_cell(const Inner *a, const Conv *conv, int64_t b, int64_t t, const int64_t *sources, int half, float *u,
                     float *own) {
    const int64_t *ends = a->cells + b * a->length;
    int64_t E = a->channels, start = t ? ends[t - 1] : 0, stop = ends[t], read = a->read[b * a->length + t];
    if (start < 0 || stop > a->tokens || read < start || read >= stop) return 1;
    for (int64_t j = start; j < stop; j++)
        if (outside(conv, sources + j * a->width)) return 1;
    float mass = (float)a->mass, live = 1.0f / (1.0f + mass * (a->size[b * a->length + t] - 1.0f)), frozen = mass * live;
    for (int64_t c = 0; c < E; c += SLAB) {
        vf mean[UNROLL] = {{0}};
        for (int64_t j = start; j < stop; j++) {
            vf y[UNROLL] = {{0}};
            convolve_sources(conv, b, sources + j * a->width, c, half, y);
            silu(y);
            STAGE mean[i] += y[i] * (j == read ? live : frozen);
            if (j == read) { FOR_SLAB(E, c, store(own, t * E + c + i * W, y[i], lanes, 0)) }
        }
        FOR_SLAB(E, c, store(u, t * E + c + i * W, mean[i], lanes, 0))
    }
    return 0;
}

/* `together` steps in direction g, the first at `row` of those of the samples from `first` on; `stop` is past the last. */
INLINE int feed_tile(const Inner *a, int64_t g, int64_t first, int64_t row, int64_t together, int64_t stop, int half, int way,
                     float *scratch, int64_t size) {
    int64_t E = a->channels, K = a->width, L = a->length, S = a->steps, stride = padded(a);
    Parameters p = parameters_of(a, g);
    int64_t before = a->before;
    Conv conv = {.x = (const float *)a->xz - before * a->xz_l, .context = a->context, .taps = p.taps, .bias = p.conv_bias, .length = before + L, .channels = E,
                 .width = K, .x_b = a->xz_b, .x_l = a->xz_l, .context_b = a->context_b, .context_l = a->context_l,
                 .others = a->others, .reverse = g};
    const float *from[MOST_ROWS];
    float *to[MOST_ROWS];
    for (int64_t r = 0; r < together; r++) {
        int64_t at = row + r < stop ? row + r : stop - 1; /* the last one again */
        int64_t b = first + at / S, t = at % S;
        float *own = scratch + at / S * size, *u = own + g * S * E;
        const int64_t *sources = a->sources ? a->sources + (g * a->batch + b) * a->tokens * K : 0;
        from[r] = u + t * E, to[r] = own + a->directions * S * E + (g * S + t) * stride;
        if (row + r > at) continue;
        if (a->cells) {
            if (pool_cell(a, &conv, b, t, sources, half, u, own + own_at(a) + g * L * E)) return 1;
            continue;
        }
        if (sources) sources += t * K;
        if (sources && outside(&conv, sources)) return 1;
        for (int64_t c = 0; c < E; c += SLAB) {
            vf y[UNROLL] = {{0}};
            if (sources) convolve_sources(&conv, b, sources, c, half, y);
            else convolve(&conv, b, before + t, c, half, y);
            write_silu(u, t, E, c, 0, y);
        }
    }
    if (way == TILES) {
        tile_rows(from, together, E, a->parts, a->rows);
        tile_columns(a->rows, together, p.x_weight, 0, E, 0, padded(a), a->parts, to);
    } else if (way == BYTES) {
        float *scales = (float *)a->rows + together * byte_step(E) / 4, *there[MOST_ROWS];
        byte_rows(from, together, E, (int)a->dots, (uint8_t *)a->rows, scales);
        for (int64_t n = 0; n < projected(a); n += BYTE_PANEL) {
            const float *panel = p.x_weight + n / BYTE_PANEL * byte_panel(E);
            int64_t left = projected(a) - n;
            for (int64_t r = 0; r < together; r++) there[r] = to[r] + n;
            byte_product((uint8_t *)a->rows, scales, together, panel, 0, E, left < BYTE_PANEL ? left : BYTE_PANEL,
                         (int)a->dots, there);
        }
    } else {
        product(way, from, p.x_weight, E, projected(a), to);
    }
    return 0;
}

int feed_rows(const Inner *a, int64_t first, int64_t count, float *scratch, int64_t size) {
    int64_t start, stop;
    int missing = 0, way = (int)a->way;
    own_share(count * a->steps, &start, &stop);
    int64_t together = way == TILES ? group_size(start, stop) : TILE_ROWS;
    if (way == BYTES) together = byte_together(start, stop, (int)a->dots);
    if (way == TILES && together) tiles_begin(together, 16);
    if (way == BYTES && a->dots == TILES_OF_BYTES && together) tiles_begin(together, byte_depth(a->channels));
    for (int64_t row = start; row < stop; row += together)
        for (int64_t g = 0; g < a->directions; g++) {
            if (a->half) missing |= feed_tile(a, g, first, row, TILE_ROWS, stop, 1, FLOATS, scratch, size);
            else if (way == FLOATS) missing |= feed_tile(a, g, first, row, TILE_ROWS, stop, 0, FLOATS, scratch, size);
            else missing |= feed_tile(a, g, first, row, together, stop, 0, way, scratch, size);
        }
    return missing;
}

/* The scans of sample b for the channel blocks `from` ... `to`. The first one's outputs take the place of its inputs. */
static int scan_all(const Inner *a, int64_t b, int64_t from, int64_t to, float *u) {
    int64_t E = a->channels, N = a->state, R = a->rank, S = a->steps, stride = padded(a), G = a->directions;
    int64_t size = a->half ? 2 : 4, row = a->whole ? a->whole : S;
    int failed = 0;
    for (int64_t g = 0; g < G; g++) {
        float *input = u + g * S * E, *own = u + G * S * E + g * S * stride;
        Parameters p = parameters_of(a, g);
        Scan scan = {.u = input, .u_l = E, .rank = own, .rank_l = stride, .R = R, .dt_weight = p.dt_weight, .B = own + R,
                     .B_l = stride, .C = own + R + N, .C_l = stride, .A = p.A, .A_c = 1, .A_n = E, .D = p.D,
                     .bias = p.dt_bias, .y = input, .batch = 1, .length = S, .channels = E, .state = N, .softplus = 1,
                     .reverse = g, .outputs = S, .scale = a->scale, .mass = a->mass, .stay = g < G - 1};
        if (a->gap) scan.gap = a->gap + (g * a->batch + b) * row, scan.gap_l = 1;
        if (a->size) scan.size = a->size + b * row;
        if (a->slots) scan.slots = a->slots + b * S;
        if (a->cells) scan.skip = u + own_at(a) + g * S * E;
        if (a->gap_delta) scan.gap_delta = a->gap_delta + g * E;
        if (a->carry) scan.last = u + a->carry, scan.initial = a->begun ? scan.last : 0;
        if (g) scan.sum = u;
        if (g == G - 1) {
            scan.z = (const char *)a->xz + (b * a->xz_b + E) * size, scan.z_l = a->xz_l;
            scan.y = (char *)a->y + b * a->y_b * size, scan.half_out = a->half;
            if (a->ungated) scan.ungated = a->ungated + b * (a->whole ? row : a->length) * E;
        }
        failed |= scan_forward_group(&scan, 0, from, to);
    }
    return failed;
}

static int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }

int scan_channels(const Inner *a, int64_t first, int64_t count, float *scratch, int64_t size) {
    /* Groups of channels: as few as give every thread the same work. */
    int64_t threads = omp_get_num_threads(), groups = threads / common_divisor(count, threads);
    int64_t blocks = (a->channels + W - 1) / W, start, stop;
    int failed = 0;
    own_share(count * groups, &start, &stop);
    for (int64_t item = start; item < stop; item++) {
        int64_t b = item / groups, from, to;
        share(blocks, item % groups, groups, &from, &to);
        failed |= scan_all(a, first + b, from, to, scratch + b * size);
    }
    return failed;
}

/* Returns 0, 1 when memory ran out, or 2 for a source that is not there or a cell that is none. */
int mamba_inner(const Inner *a) {
    int64_t threads = team(a->threads), together = threads < a->batch ? threads : a->batch, size = inner_scratch(a);
    float *scratch = aligned_alloc(64, (size_t)(together * size + 16) * sizeof(float));
    int failed = !scratch;
#pragma omp parallel num_threads(threads) reduction(|: failed)
    for (int64_t first = 0; first < a->batch && scratch; first += together) {
        int64_t count = a->batch - first < together ? a->batch - first : together;
        failed |= 2 * feed_rows(a, first, count, scratch, size);
#pragma omp barrier
        failed |= scan_channels(a, first, count, scratch, size);
#pragma omp barrier
    }
    free(scratch);
    return failed;
}
