/* The gradients of the aligned selective scan. States come from the forward pass at the start of every chunk and
 * are recomputed inside it.
 *
 * A sample's channel blocks go through one chunk together before any goes on to the next: the sums over channels that dB
 * and dC need are then the size of a chunk, and stay in L1.
 */
#include "scan.h"
#include "threads.h"

#define PAIR 2 /* states at a time on the way back; more do not fit into registers */

/* What a block of channels carries from chunk to chunk on the way back; N vectors of `carry` and dA. */
typedef struct { vf *carry, *dA, dD, dbias, dgap_delta; } Carried;

typedef struct { vf drive[CHUNK], y[CHUNK], through[CHUNK], ddrive[CHUNK], ddecay[CHUNK]; } Work;

/* `count` states through a chunk and back. `through` is what the output's gradient sends to y. Adds C . h to y. */
INLINE void back_and_forth(const Scan *a, const Tokens *x, const Block *k, Work *w, const vf *before, Carried *carried,
                           vf *sums, int m, int64_t b_at, int64_t c_at, int way, int size, int safe, int count, int half) {
    vf factors[PAIR][CHUNK], states[PAIR][CHUNK + 1], carry[PAIR], dA[PAIR];
    for (int n = 0; n < count; n++) {
        decay_factors(x->decay, k->A[m + n], size, safe, factors[n]);
        states[n][0] = carry[n] = before[n];
    }
    for (int j = 0; j < size; j++) {
        vf y = w->y[j];
        for (int n = 0; n < count; n++) {
            carry[n] = factors[n][j] * carry[n] + w->drive[j] * load_one(a->B, b_at + j * way * a->B_l + n, half);
            states[n][j + 1] = carry[n];
            y += carry[n] * load_one(a->C, c_at + j * way * a->C_l + n, half);
        }
        w->y[j] = y;
    }
    for (int n = 0; n < count; n++) carry[n] = carried->carry[m + n], dA[n] = carried->dA[m + n];
    for (int j = size - 1; j >= 0; j--) {
        vf through = w->through[j], drive = w->drive[j], decay = x->decay[j], ddrive = w->ddrive[j], ddecay = w->ddecay[j];
        for (int n = 0; n < count; n++) {
            vf *dB = sums + 2 * (m + n) * CHUNK + j, *dC = dB + CHUNK;
            vf dh = carry[n] + through * load_one(a->C, c_at + j * way * a->C_l + n, half);
            *dB += dh * drive;
            *dC += through * states[n][j + 1];
            ddrive += dh * load_one(a->B, b_at + j * way * a->B_l + n, half);
            carry[n] = dh * factors[n][j];
            vf dexponent = carry[n] * states[n][j];
            ddecay += dexponent * k->A[m + n];
            dA[n] += dexponent * decay;
        }
        w->ddrive[j] = ddrive, w->ddecay[j] = ddecay;
    }
    for (int n = 0; n < count; n++) carried->carry[m + n] = carry[n], carried->dA[m + n] = dA[n];
}

/* One chunk of one block. `sums` holds dB and dC of the chunk lane by lane: [N][2][CHUNK]. */
INLINE void backward_chunk(const Scan *a, int64_t b, int64_t start, int64_t c, int lanes, int N, int half,
                           const Block *k, Carried *carried, vf *sums) {
    Tokens x;
    Work w;
    vf grad[CHUNK], z[CHUNK], gate[CHUNK];
    int way = a->reverse ? -1 : 1;
    int size = a->length - start < CHUNK ? (int)(a->length - start) : CHUNK;
    int64_t first = a->reverse ? a->length - 1 - start : start;
    int64_t at = (b * a->length + first) * a->channels + c, step = way * a->channels;
    int safe = read_tokens(a, b, first, way, size, c, lanes, half, k, 0, &x);
    for (int j = 0; j < size; j++) {
        w.drive[j] = x.step[j] * x.u[j], w.y[j] = k->D * x.u[j];
        w.through[j] = grad[j] = load(a->grad, at + j * step, lanes, half);
        w.ddrive[j] = w.ddecay[j] = (vf){0};
    }
    if (a->z) {
        for (int j = 0; j < CHUNK; j++)
            gate[j] = z[j] = load(a->z, b * a->z_b + row_of(first, way, size, j) * a->z_l + c, lanes, half);
        for (int j = 0; j < size; j += UNROLL) sigmoid(gate + j);
        for (int j = 0; j < size; j++) w.through[j] *= z[j] * gate[j];
    }
    for (int m = 0; m < N; m += PAIR) {
        int64_t b_at = b * a->B_b + first * a->B_l + m, c_at = b * a->C_b + first * a->C_l + m;
        int count = N - m < PAIR ? N - m : PAIR;
        vf before[PAIR];
        for (int n = 0; n < count; n++)
            before[n] = load(a->states, state_at(a, b, start, c) + (m + n) * a->channels, lanes, 0);
        if (count == PAIR) back_and_forth(a, &x, k, &w, before, carried, sums, m, b_at, c_at, way, size, safe, PAIR, half);
        else back_and_forth(a, &x, k, &w, before, carried, sums, m, b_at, c_at, way, size, safe, 1, half);
    }
    if (a->z)
        for (int j = 0; j < size; j++) {
            vf slope = gate[j] * (1.0f + z[j] * (1.0f - gate[j]));
            store(a->dz, at + j * step, grad[j] * w.y[j] * slope, lanes, half);
        }
    for (int j = 0; j < size; j++) {
        carried->dD += w.through[j] * x.u[j];
        store(a->du, at + j * step, w.ddrive[j] * x.step[j] + k->D * w.through[j], lanes, half);
        w.ddecay[j] *= 1.0f / LOG2E; /* A is in units of log 2 */
    }
    if (a->shift)
        for (int j = 0; j < size; j++) store(a->dshift, at + j * step, w.ddecay[j], lanes, half);
    for (int j = 0; j < size; j++) {
        vf dstep = w.ddrive[j] * x.u[j] + w.ddecay[j];
        if (a->gap) {
            vf gap = splat(a->gap[b * a->gap_b + (first + j * way) * a->gap_l]);
            if (a->gap_delta) carried->dgap_delta += w.ddecay[j] * gap;
            else dstep += w.ddecay[j] * gap;
        }
        w.ddrive[j] = dstep;
    }
    if (a->softplus) {
        for (int j = 0; j < size; j += UNROLL) sigmoid(x.raw + j);
        for (int j = 0; j < size; j++) w.ddrive[j] *= x.raw[j];
    }
    for (int j = 0; j < size; j++) {
        carried->dbias += w.ddrive[j];
        store(a->ddelta, at + j * step, w.ddrive[j], lanes, half);
    }
}

/* The blocks `from` ... `to` of sample b; item counts (sample, group of blocks). Returns 1 when memory runs out. */
static int backward_group(const Scan *a, int64_t item, int64_t b, int64_t from, int64_t to) {
    int64_t L = a->length, N = a->state, count = to - from, chunks = (L + CHUNK - 1) / CHUNK;
    if (count == 0) {
        if (L * N == 0) return 0;
        memset(a->dB + item * L * N, 0, (size_t)(L * N) * sizeof(float));
        memset(a->dC + item * L * N, 0, (size_t)(L * N) * sizeof(float));
        return 0;
    }
    Carried *carried = aligned_alloc(sizeof(vf), (size_t)count * sizeof(Carried));
    Block *blocks = aligned_alloc(sizeof(vf), (size_t)count * sizeof(Block));
    vf *vectors = aligned_alloc(sizeof(vf), (size_t)((count * 3 + 2 * CHUNK) * N + 1) * sizeof(vf));
    int failed = !carried || !blocks || !vectors;
    if (!failed) {
        vf *sums = vectors + count * 3 * N;
        memset(carried, 0, (size_t)count * sizeof(Carried));
        memset(vectors, 0, (size_t)(count * 3 * N) * sizeof(vf));
        for (int64_t k = 0; k < count; k++) {
            int64_t c = (from + k) * W;
            int lanes = a->channels - c < W ? (int)(a->channels - c) : W;
            blocks[k].A = vectors + k * 3 * N, carried[k].carry = blocks[k].A + N, carried[k].dA = blocks[k].A + 2 * N;
            read_block(a, c, lanes, (int)N, blocks + k);
            read_states(a, a->dlast, b, c, lanes, carried[k].carry);
        }
        for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
            int64_t start = chunk * CHUNK;
            memset(sums, 0, (size_t)(2 * N * CHUNK) * sizeof(vf));
            for (int64_t k = 0; k < count; k++) {
                int64_t c = (from + k) * W;
                int lanes = a->channels - c < W ? (int)(a->channels - c) : W;
                if (lanes == W && N == 16 && !a->half)
                    backward_chunk(a, b, start, c, W, 16, 0, blocks + k, carried + k, sums);
                else
                    backward_chunk(a, b, start, c, lanes, (int)N, (int)a->half, blocks + k, carried + k, sums);
            }
            for (int64_t j = 0; j < CHUNK && start + j < L; j++) {
                int64_t t = a->reverse ? L - 1 - start - j : start + j;
                for (int64_t n = 0; n < N; n++) {
                    a->dB[(item * L + t) * N + n] = sum_lanes(sums[2 * n * CHUNK + j]);
                    a->dC[(item * L + t) * N + n] = sum_lanes(sums[(2 * n + 1) * CHUNK + j]);
                }
            }
        }
        for (int64_t k = 0; k < count; k++) {
            int64_t c = (from + k) * W;
            int lanes = a->channels - c < W ? (int)(a->channels - c) : W;
            for (int64_t n = 0; n < N; n++)
                for (int i = 0; i < lanes; i++) a->dA[(b * a->channels + c + i) * N + n] = carried[k].dA[n][i];
            write_states(a, a->dinitial, b, c, lanes, carried[k].carry);
            store(a->dD, b * a->channels + c, carried[k].dD, lanes, 0);
            store(a->dbias, b * a->channels + c, carried[k].dbias, lanes, 0);
            store(a->dgap_delta, b * a->channels + c, carried[k].dgap_delta, lanes, 0);
        }
    }
    free(carried);
    free(blocks);
    free(vectors);
    return failed;
}

/* Every (sample, group of channel blocks) writes sums of its own; the caller adds them up, in an order that is fixed.
 * Returns 0, or 1 when memory ran out. */
int scan_backward(const Scan *a) {
    int64_t blocks = (a->channels + W - 1) / W;
    int failed = 0;
#pragma omp parallel for num_threads(team(a->threads)) schedule(static) reduction(|: failed)
    for (int64_t item = 0; item < a->batch * a->groups; item++) {
        int64_t from, to;
        share(blocks, item % a->groups, a->groups, &from, &to);
        failed |= backward_group(a, item, item / a->groups, from, to);
    }
    return failed;
}
