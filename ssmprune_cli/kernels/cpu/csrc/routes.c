/* Scans of the same tokens along several routes, and the sum of their outputs. Glossary: routes_op.py. */
#include "scan.h"
#include "threads.h"

/* u, y (B, L, E); projected (B, L, slices, R + 2N), of all routes or of each; extra (G, 1 or B, L, N); gap (G, B, L);
 * gap_delta (G, E); order and rows (G, 1 or B, L). extra_b, order_b and rows_b are 0 if all samples share them.
 * `parameters` of each route: dt_weight (R, E), A (N, E), the steps' bias and D (E). */
ARGUMENTS(Routed,
    const float *u, *projected, *parameters, *extra, *gap, *gap_delta;
    float *y;
    const int64_t *order, *rows;
    int64_t batch, length, channels, state, rank, routes, slices, u_b, u_l, order_b, rows_b, extra_b, threads, groups;
);
DESCRIBE(Routed)

/* Where the steps of route g are for sample b, in (G, 1 or B, L). */
INLINE const int64_t *steps_of(const Routed *a, const int64_t *of_all, int64_t each, int64_t g, int64_t b) {
    return of_all + g * a->length * (each ? a->batch : 1) + b * each;
}

/* What each step of route g takes from the projected tokens of sample b, (L, R + 2N). Returns whether one is missing. */
static int gather_steps(const Routed *a, int64_t b, int64_t g, float *steps) {
    int64_t L = a->length, N = a->state, R = a->rank, P = R + 2 * N, missing = 0;
    const float *extra = a->extra ? a->extra + g * L * N * (a->extra_b ? a->batch : 1) + b * a->extra_b : 0;
    const int64_t *rows = a->rows ? steps_of(a, a->rows, a->rows_b, g, b) : 0;
    for (int64_t t = 0; t < L; t++, steps += P) {
        int64_t row = rows ? rows[t] : t;
        if (row < 0 || row >= L) { missing = 1; continue; }
        memcpy(steps, a->projected + ((b * L + row) * a->slices + (a->slices > 1 ? g : 0)) * P, (size_t)P * sizeof(float));
        for (int64_t n = 0; extra && n < N; n++) steps[R + n] += extra[t * N + n];
    }
    return (int)missing;
}

/* Sample b, the blocks of channels `from` ... `to`. Each route adds to what those before it gave. */
static int scan_routes(const Routed *a, int64_t b, int64_t from, int64_t to, float *steps, char *seen) {
    int64_t L = a->length, E = a->channels, N = a->state, R = a->rank, P = R + 2 * N;
    float *y = a->y + b * L * E;
    for (int64_t g = 0; g < a->routes; g++) {
        const int64_t *order = steps_of(a, a->order, a->order_b, g, b);
        memset(seen, 0, (size_t)L);
        for (int64_t t = 0; t < L; t++) {
            if (order[t] < 0 || order[t] >= L || seen[order[t]]) return 2;
            seen[order[t]] = 1;
        }
        if (gather_steps(a, b, g, steps)) return 2;
        const float *dt_weight = a->parameters + g * E * (R + N + 2), *A = dt_weight + R * E, *bias = A + N * E;
        Scan scan = {.u = a->u + b * a->u_b, .u_l = a->u_l, .rank = steps, .rank_l = P, .R = R, .dt_weight = dt_weight,
                     .B = steps + R, .B_l = P, .C = steps + R + N, .C_l = P, .A = A, .A_c = 1, .A_n = E, .bias = bias,
                     .D = bias + E, .visits = order, .sum = g ? y : 0, .y = y, .batch = 1, .length = L, .channels = E,
                     .state = N, .softplus = 1, .outputs = L, .scale = 1};
        if (a->gap) scan.gap = a->gap + (g * a->batch + b) * L, scan.gap_l = 1;
        if (a->gap_delta) scan.gap_delta = a->gap_delta + g * E;
        if (scan_forward_group(&scan, 0, from, to)) return 1;
    }
    return 0;
}

/* Returns 0, 1 when memory ran out, or 2 for a token that is not there or visited twice. */
int routed_scans(const Routed *a) {
    int64_t blocks = (a->channels + W - 1) / W, each = a->length * (a->rank + 2 * a->state);
    int threads = team(a->threads);
    float *steps = malloc((size_t)threads * ((size_t)each * sizeof(float) + (size_t)a->length) + 1);
    char *seen = (char *)(steps + threads * each);
    int failed = !steps;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(|: failed)
    for (int64_t item = 0; item < (steps ? a->batch * a->groups : 0); item++) {
        int64_t from, to;
        share(blocks, item % a->groups, a->groups, &from, &to);
        failed |= scan_routes(a, item / a->groups, from, to, steps + omp_get_thread_num() * each,
                              seen + omp_get_thread_num() * a->length);
    }
    free(steps);
    return failed;
}
