/* What lies between the two large projections of a Mamba block: for each direction the convolution, the projection to the
 * scan's step sizes, B and C, and the scan; then the sum of the directions and the gate.
 *
 * As many samples as there are threads go through it together, so that nothing in between leaves the caches. Of a sample
 * that several threads share, each takes rows at first, and then channels. Glossary: inner_op.py.
 */
#include "conv.h"
#include "scan.h"

/* xz is (B, L, 2E), context (B, M, E), gap (G, B, L), gap_delta (G, E), sources (G, B, L, K). The second of the G
 * directions scans in reverse. `parameters` are as inner_op.pack_inner lays them out. */
typedef struct {
    const void *xz, *context;
    void *y;
    const float *parameters, *gap, *gap_delta;
    const int64_t *sources;
    int64_t batch, length, channels, state, width, rank, directions, others, xz_b, xz_l, context_b, context_l;
    int64_t half, threads;
    double scale;
} Inner;

/* The parameters of one direction. P = R + 2N. */
typedef struct {
    const float *taps, *x_weight, *dt_weight, *A;  /* (K, E), (E, P), (R, E), (N, E) */
    const float *conv_bias, *dt_bias, *D;          /* (E) */
} Parameters;

/* Tokens and vectors of outputs that are in registers together during a matrix product. */
#define TILE_ROWS (W == 16 ? 6 : 4)
#define TILE_VECTORS (W == 16 ? 4 : 3)

static int64_t projected(const Inner *a) { return a->rank + 2 * a->state; }

static Parameters parameters_of(const Inner *a, int64_t g) {
    int64_t E = a->channels, each = E * (a->width + projected(a) + a->rank + a->state + 3);
    Parameters p;
    p.taps = a->parameters + g * each;
    p.x_weight = p.taps + a->width * E;
    p.dt_weight = p.x_weight + projected(a) * E;
    p.A = p.dt_weight + a->rank * E;
    p.conv_bias = p.A + a->state * E;
    p.dt_bias = p.conv_bias + E;
    p.D = p.dt_bias + E;
    return p;
}

/* Floats from one token's projection to the next, in whole vectors. */
static int64_t padded(const Inner *a) { return (projected(a) + W - 1) / W * W; }

/* out[r] (padded) = u[r] (E) . weight (E, P) for TILE_ROWS tokens, columns n ... n + vectors * W. */
INLINE void project_columns(const float *const *u, const float *weight, int64_t E, int64_t P, int64_t n, int vectors,
                            float *const *out) {
    vf sum[TILE_ROWS][TILE_VECTORS], w[TILE_VECTORS];
    int64_t past = n + vectors * W - P; /* columns that are not there: the next row's first ones, or beyond the end */
    int64_t inside = past > 0 ? E - (past + P - 1) / P : E;
#define ROWS _Pragma("GCC unroll 8") for (int r = 0; r < TILE_ROWS; r++)
#define VECTORS _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++)
    ROWS VECTORS sum[r][v] = (vf){0};
    for (int64_t e = 0; e < inside; e++) {
        VECTORS w[v] = load(weight, e * P + n + v * W, W, 0);
        ROWS VECTORS sum[r][v] += w[v] * u[r][e];
    }
    for (int64_t e = inside < 0 ? 0 : inside; e < E; e++)
        for (int v = 0; v < vectors; v++) {
            int64_t left = P - n - v * W;
            vf last = load(weight, e * P + n + v * W, left < W ? (int)left : W, 0);
            for (int r = 0; r < TILE_ROWS; r++) sum[r][v] += last * u[r][e];
        }
    ROWS VECTORS store(out[r], n + v * W, sum[r][v], W, 0);
#undef ROWS
#undef VECTORS
}

INLINE void project(const float *const *u, const float *weight, int64_t E, int64_t P, float *const *out) {
    int64_t n = 0;
    for (; P - n > (TILE_VECTORS - 1) * W; n += TILE_VECTORS * W) project_columns(u, weight, E, P, n, TILE_VECTORS, out);
    if (P - n > 2 * W) project_columns(u, weight, E, P, n, 3, out);
    else if (P - n > W) project_columns(u, weight, E, P, n, 2, out);
    else if (P > n) project_columns(u, weight, E, P, n, 1, out);
}

/* TILE_ROWS tokens of sample b from `first` on, in direction g: their u (L, E), and their rank values, B and C. Returns
 * whether a source is missing. */
INLINE int feed(const Inner *a, int64_t b, int64_t g, int64_t first, int half, float *u, float *values) {
    int64_t E = a->channels, K = a->width, L = a->length, P = projected(a), stride = padded(a);
    Parameters p = parameters_of(a, g);
    Conv conv = {.x = a->xz, .context = a->context, .taps = p.taps, .bias = p.conv_bias, .length = L, .channels = E,
                 .width = K, .x_b = a->xz_b, .x_l = a->xz_l, .context_b = a->context_b, .context_l = a->context_l,
                 .others = a->others, .reverse = g};
    const float *from[TILE_ROWS];
    float *to[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++) {
        int64_t t = first + r < L ? first + r : L - 1; /* the last one again */
        const int64_t *sources = a->sources ? a->sources + ((g * a->batch + b) * L + t) * K : 0;
        from[r] = u + t * E, to[r] = values + t * stride;
        if (first + r > t) continue;
        if (sources && outside(&conv, sources)) return 1;
        for (int64_t c = 0; c < E; c += SLAB) {
            vf y[UNROLL] = {{0}};
            if (sources) convolve_sources(&conv, b, sources, c, half, y);
            else convolve(&conv, b, t, c, half, y);
            write_silu(u, t, E, c, 0, y);
        }
    }
    project(from, p.x_weight, E, P, to);
    return 0;
}

/* The scans of sample b for the channel blocks `from` ... `to`. The first one's outputs take the place of its inputs. */
static int scan_all(const Inner *a, int64_t b, int64_t from, int64_t to, float *u, float *values) {
    int64_t E = a->channels, N = a->state, R = a->rank, L = a->length, stride = padded(a), G = a->directions;
    int64_t size = a->half ? 2 : 4;
    int failed = 0;
    for (int64_t g = 0; g < G; g++) {
        float *input = u + g * L * E, *own = values + g * L * stride;
        Parameters p = parameters_of(a, g);
        Scan scan = {.u = input, .u_l = E, .rank = own, .rank_l = stride, .R = R, .dt_weight = p.dt_weight, .B = own + R,
                     .B_l = stride, .C = own + R + N, .C_l = stride, .A = p.A, .A_c = 1, .A_n = E, .D = p.D,
                     .bias = p.dt_bias, .y = input, .batch = 1, .length = L, .channels = E, .state = N, .softplus = 1,
                     .reverse = g, .outputs = L, .scale = a->scale};
        if (a->gap) scan.gap = a->gap + (g * a->batch + b) * L, scan.gap_l = 1;
        if (a->gap_delta) scan.gap_delta = a->gap_delta + g * E;
        if (g) scan.sum = u;
        if (g == G - 1) {
            scan.z = (const char *)a->xz + (b * a->xz_b + E) * size, scan.z_l = a->xz_l;
            scan.y = (char *)a->y + b * L * E * size, scan.half_out = a->half;
        }
        failed |= scan_forward_group(&scan, 0, from, to);
    }
    return failed;
}

static int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }

/* Returns 0, 1 when memory ran out, or 2 for a source that is not there. */
int mamba_inner(const Inner *a) {
    int64_t L = a->length, G = a->directions, blocks = (a->channels + W - 1) / W;
    int64_t together = a->threads < a->batch ? a->threads : a->batch, tiles = (L + TILE_ROWS - 1) / TILE_ROWS;
    int64_t inputs = G * L * a->channels, size = (inputs + G * L * padded(a) + 15) / 16 * 16;
    float *scratch = aligned_alloc(64, (size_t)(together * size + 16) * sizeof(float));
    int failed = !scratch;
#pragma omp parallel num_threads(a->threads) reduction(|: failed)
    for (int64_t first = 0; first < a->batch && scratch; first += together) {
        int64_t count = a->batch - first < together ? a->batch - first : together;
        int64_t groups = a->threads / common_divisor(count, a->threads);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < count * tiles; item++) {
            float *u = scratch + item / tiles * size;
            for (int64_t g = 0; g < G; g++) {
                float *to = u + g * L * a->channels, *values = u + inputs + g * L * padded(a);
                int64_t b = first + item / tiles, row = item % tiles * TILE_ROWS;
                if (a->half) failed |= 2 * feed(a, b, g, row, 1, to, values);
                else failed |= 2 * feed(a, b, g, row, 0, to, values);
            }
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < count * groups; item++) {
            int64_t group = item % groups;
            float *u = scratch + item / groups * size;
            failed |= scan_all(a, first + item / groups, blocks * group / groups, blocks * (group + 1) / groups, u, u + inputs);
        }
    }
    free(scratch);
    return failed;
}
