/* Depthwise convolutions with SiLU: causal along the sequence, and over a grid of kept tokens. */
#include "conv.h"
#include "threads.h"

DESCRIBE(Conv)

INLINE void conv_row(const Conv *a, int64_t row, int half) {
    for (int64_t c = 0; c < a->channels; c += SLAB) {
        vf y[UNROLL] = {{0}};
        int64_t b = row / a->length, t = row % a->length, last = a->reverse ? t + a->width - 1 : t;
        STAGE fetch(a->x, b * a->x_b + (last + AHEAD) * a->x_l + c + i * W, half);
        convolve(a, b, t, c, half, y);
        write_silu(a->y, row, a->channels, c, half, y);
    }
}

void conv_rows(const Conv *a, int64_t from, int64_t to) {
    for (int64_t row = from; row < to; row++) {
        if (a->half) conv_row(a, row, 1);
        else conv_row(a, row, 0);
    }
}

/* Returns 0. */
int conv_forward(const Conv *a) {
#pragma omp parallel num_threads(team(a->threads))
    {
        int64_t from, to;
        own_share(a->batch * a->length, &from, &to);
        conv_rows(a, from, to);
    }
    return 0;
}

/* Returns 1 for a source that is not there. */
INLINE int sparse_row(const Conv *a, int64_t row, int half) {
    const int64_t *sources = a->positions + row * a->width;
    if (outside(a, sources)) return 1;
    for (int64_t c = 0; c < a->channels; c += SLAB) {
        vf y[UNROLL] = {{0}};
        convolve_sources(a, row / a->length, sources, c, half, y);
        write_silu(a->y, row, a->channels, c, half, y);
    }
    return 0;
}

int sparse_conv_rows(const Conv *a, int64_t from, int64_t to) {
    int missing = 0;
    for (int64_t row = from; row < to; row++) {
        if (a->half) missing |= sparse_row(a, row, 1);
        else missing |= sparse_row(a, row, 0);
    }
    return missing ? 2 : 0;
}

/* Returns 0, or 2 for a source that is not there. */
int sparse_conv_forward(const Conv *a) {
    int failed = 0;
#pragma omp parallel num_threads(team(a->threads)) reduction(|: failed)
    {
        int64_t from, to;
        own_share(a->batch * a->length, &from, &to);
        failed |= sparse_conv_rows(a, from, to);
    }
    return failed;
}

/* Of `y`, a convolution whose output is row `row`, the gradient before its SiLU. */
INLINE void before_silu(const Conv *a, int64_t row, int64_t c, int half, const vf *y, vf *d) {
    vf gate[UNROLL];
    int64_t at = row * a->channels + c;
    STAGE gate[i] = y[i];
    sigmoid(gate);
    STAGE d[i] = gate[i] * (1.0f + y[i] * (1.0f - gate[i]));
    FOR_SLAB(a->channels, c, d[i] *= load(a->grad, at + i * W, lanes, half))
}

INLINE void store_sums(const Conv *a, int64_t b, int64_t c, int64_t taps, vf (*dtaps)[UNROLL], const vf *dbias) {
    for (int64_t k = 0; k < taps; k++) {
        float *out = a->dtaps + (b * taps + k) * a->channels + c;
        FOR_SLAB(a->channels, c, store(out, i * W, dtaps[k][i], lanes, 0))
    }
    FOR_SLAB(a->channels, c, store(a->dbias, b * a->channels + c + i * W, dbias[i], lanes, 0))
}

/* dtaps (B, K, E) and dbias (B, E) are per sample; the caller adds them up. dx is written whole. `dy` (L, SLAB) is the
 * gradient before the SiLU. */
INLINE void backward_slab(const Conv *a, int64_t b, int64_t c, int half, vf *dy) {
    vf dbias[UNROLL] = {{0}}, dtaps[MAX_INNER][UNROLL];
    memset(dtaps, 0, sizeof dtaps);
    for (int64_t t = 0; t < a->length; t++) {
        vf y[UNROLL] = {{0}}, *d = dy + t * UNROLL;
        convolve(a, b, t, c, half, y);
        before_silu(a, b * a->length + t, c, half, y, d);
        STAGE dbias[i] += d[i];
        for (int64_t k = 0; k < a->width; k++) {
            int64_t s = source(a, t, k), x_at = b * a->x_b + s * a->x_l + c;
            if (s < 0 || s >= a->length) continue;
            FOR_SLAB(a->channels, c, dtaps[k][i] += d[i] * load(a->x, x_at + i * W, lanes, half))
        }
    }
    for (int64_t s = 0; s < a->length; s++) {
        vf dx[UNROLL] = {{0}};
        for (int64_t k = 0; k < a->width; k++) {
            int64_t t = 2 * s - source(a, s, k); /* the output that meets s through tap k */
            if (t < 0 || t >= a->length) continue;
            const float *taps = a->taps + k * a->channels + c;
            FOR_SLAB(a->channels, c, dx[i] += load(taps, i * W, lanes, 0) * dy[t * UNROLL + i])
        }
        FOR_SLAB(a->channels, c, store(a->dx, (b * a->length + s) * a->channels + c + i * W, dx[i], lanes, half))
    }
    store_sums(a, b, c, a->width, dtaps, dbias);
}

/* The same with sources. What the rows (L + M, SLAB) of x and of context get is added up in `rows`. */
INLINE int sparse_backward_slab(const Conv *a, int64_t b, int64_t c, int half, vf *rows) {
    vf dbias[UNROLL] = {{0}}, dtaps[MAX_INNER][UNROLL];
    int64_t count = a->length + a->others;
    memset(dtaps, 0, sizeof dtaps);
    memset(rows, 0, (size_t)(count * UNROLL) * sizeof(vf));
    for (int64_t t = 0; t < a->length; t++) {
        const int64_t *sources = a->positions + (b * a->length + t) * a->width;
        vf y[UNROLL] = {{0}}, d[UNROLL] = {{0}};
        if (outside(a, sources)) return 2;
        convolve_sources(a, b, sources, c, half, y);
        before_silu(a, b * a->length + t, c, half, y, d);
        STAGE dbias[i] += d[i];
        for (int64_t k = 0; k < a->width; k++) {
            int64_t at;
            if (sources[k] < 0) continue;
            const void *met = row_among(a, b, sources[k], &at);
            const float *taps = a->taps + k * a->channels + c;
            vf *row = rows + sources[k] * UNROLL;
            FOR_SLAB(a->channels, c, dtaps[k][i] += d[i] * load(met, at + c + i * W, lanes, half))
            FOR_SLAB(a->channels, c, row[i] += load(taps, i * W, lanes, 0) * d[i])
        }
    }
    for (int64_t s = 0; s < count; s++) {
        void *out = s < a->length ? a->dx : a->dcontext;
        int64_t at = s < a->length ? b * a->length + s : b * a->others + s - a->length;
        FOR_SLAB(a->channels, c, store(out, at * a->channels + c + i * W, rows[s * UNROLL + i], lanes, half))
    }
    store_sums(a, b, c, a->width, dtaps, dbias);
    return 0;
}

/* Slabs of `count` rows of scratch memory each. Returns 0, 1 when memory ran out, or 2 for a source that is not there. */
INLINE int all_slabs_back(const Conv *a, int64_t count, int sparse) {
    int64_t slabs = (a->channels + SLAB - 1) / SLAB;
    int failed = 0;
#pragma omp parallel num_threads(team(a->threads)) reduction(|: failed)
    {
        vf *rows = aligned_alloc(sizeof(vf), (size_t)(count > 0 ? count : 1) * UNROLL * sizeof(vf));
        failed = !rows;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < a->batch * slabs; item++) {
            int64_t b = item / slabs, c = item % slabs * SLAB;
            if (!rows) continue;
            if (sparse) failed |= a->half ? sparse_backward_slab(a, b, c, 1, rows) : sparse_backward_slab(a, b, c, 0, rows);
            else if (a->half) backward_slab(a, b, c, 1, rows);
            else backward_slab(a, b, c, 0, rows);
        }
        free(rows);
    }
    return failed;
}

int conv_backward(const Conv *a) { return all_slabs_back(a, a->length, 0); }

int sparse_conv_backward(const Conv *a) { return all_slabs_back(a, a->length + a->others, 1); }

/* The kept token at each place of the grid, -1 for none. Returns 1 for a position outside it. */
static int fill_places(const Conv *a, int64_t b, int64_t *places) {
    int64_t size = a->rows * a->columns, outside = 0;
    for (int64_t i = 0; i < size; i++) places[i] = a->positions ? -1 : i;
    for (int64_t i = 0; a->positions && i < a->length; i++) {
        int64_t position = a->positions[b * a->length + i];
        if (position < 0 || position >= size) outside = 1;
        else places[position] = i;
    }
    return (int)outside;
}

/* `body` for each token `from` that tap k of the output at `position` meets. */
#define FOR_NEIGHBOURS(a, position, places, body)                                                   \
    do {                                                                                            \
        int64_t reach = (a)->width / 2, row = (position) / (a)->columns, column = (position) % (a)->columns; \
        for (int64_t r = row < reach ? -row : -reach; r <= reach && row + r < (a)->rows; r++)       \
            for (int64_t s = column < reach ? -column : -reach; s <= reach && column + s < (a)->columns; s++) { \
                int64_t from = (places)[(row + r) * (a)->columns + column + s];                     \
                int64_t k = (r + reach) * (a)->width + s + reach;                                   \
                if (from >= 0) { body }                                                             \
            }                                                                                       \
    } while (0)

INLINE void convolve_grid(const Conv *a, int64_t b, int64_t position, int64_t c, int half, const int64_t *places, vf *y) {
    if (a->bias) { FOR_SLAB(a->channels, c, y[i] = load(a->bias, c + i * W, lanes, 0)) }
    FOR_NEIGHBOURS(a, position, places, {
        int64_t at = b * a->x_b + from * a->x_l + c;
        const float *taps = a->taps + k * a->channels + c;
        FOR_SLAB(a->channels, c, y[i] += load(taps, i * W, lanes, 0) * load(a->x, at + i * W, lanes, half))
    });
}

INLINE void grid_slab(const Conv *a, int64_t b, int64_t c, int half, const int64_t *places) {
    for (int64_t t = 0; t < a->outputs; t++) {
        vf y[UNROLL] = {{0}};
        convolve_grid(a, b, a->positions ? a->positions[b * a->length + t] : t, c, half, places, y);
        write_silu(a->y, b * a->outputs + t, a->channels, c, half, y);
    }
}

/* dtaps (B, K * K, E) and dbias (B, E) are per sample. What the tokens (L, SLAB) get is added up in `rows`. */
INLINE void grid_backward_slab(const Conv *a, int64_t b, int64_t c, int half, const int64_t *places, vf *rows) {
    vf dbias[UNROLL] = {{0}}, dtaps[MAX_INNER][UNROLL];
    memset(dtaps, 0, sizeof dtaps);
    memset(rows, 0, (size_t)(a->length * UNROLL) * sizeof(vf));
    for (int64_t t = 0; t < a->outputs; t++) {
        int64_t position = a->positions ? a->positions[b * a->length + t] : t;
        vf y[UNROLL] = {{0}}, d[UNROLL] = {{0}};
        convolve_grid(a, b, position, c, half, places, y);
        before_silu(a, b * a->outputs + t, c, half, y, d);
        STAGE dbias[i] += d[i];
        FOR_NEIGHBOURS(a, position, places, {
            int64_t at = b * a->x_b + from * a->x_l + c;
            const float *taps = a->taps + k * a->channels + c;
            vf *sum = rows + from * UNROLL;
            FOR_SLAB(a->channels, c, dtaps[k][i] += d[i] * load(a->x, at + i * W, lanes, half))
            FOR_SLAB(a->channels, c, sum[i] += load(taps, i * W, lanes, 0) * d[i])
        });
    }
    for (int64_t t = 0; t < a->length; t++) {
        int64_t at = (b * a->length + t) * a->channels + c;
        FOR_SLAB(a->channels, c, store(a->dx, at + i * W, rows[t * UNROLL + i], lanes, half))
    }
    store_sums(a, b, c, a->width * a->width, dtaps, dbias);
}

/* Over a grid of rows x columns of which the tokens `positions` (B, L) are there, for the first
 * `outputs` of them; taps (K * K, E), K odd, zero padding.
 * Returns 0, 1 when memory ran out, or 2 for a position outside the grid. */
INLINE int all_slabs_of_grid(const Conv *a, int back) {
    int64_t slabs = (a->channels + SLAB - 1) / SLAB;
    int failed = 0;
#pragma omp parallel num_threads(team(a->threads)) reduction(|: failed)
    {
        int64_t *places = malloc((size_t)(a->rows * a->columns) * sizeof *places), filled = -1;
        vf *rows = aligned_alloc(sizeof(vf), (size_t)(back && a->length ? a->length : 1) * UNROLL * sizeof(vf));
        int ready = places && rows;
        failed = !ready;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < a->batch * slabs; item++) {
            int64_t b = item / slabs, c = item % slabs * SLAB;
            if (!ready) continue;
            if (b != filled && fill_places(a, b, places)) failed |= 2;
            filled = b;
            if (failed & 2) continue;
            if (!back && a->half) grid_slab(a, b, c, 1, places);
            else if (!back) grid_slab(a, b, c, 0, places);
            else if (a->half) grid_backward_slab(a, b, c, 1, places, rows);
            else grid_backward_slab(a, b, c, 0, places, rows);
        }
        free(places);
        free(rows);
    }
    return failed;
}

int grid_conv_item(const Conv *a, int64_t item) {
    int64_t slabs = (a->channels + SLAB - 1) / SLAB, b = item / slabs, *places;
    places = malloc((size_t)(a->rows * a->columns + 1) * sizeof *places);
    if (!places) return 1;
    int outside = fill_places(a, b, places);
    if (!outside) grid_slab(a, b, item % slabs * SLAB, 0, places);
    free(places);
    return 2 * outside;
}

int grid_conv_forward(const Conv *a) { return all_slabs_of_grid(a, 0); }

int grid_conv_backward(const Conv *a) { return all_slabs_of_grid(a, 1); }
