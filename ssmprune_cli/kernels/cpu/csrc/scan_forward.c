/* The aligned selective scan, forward. Layout is channels-last. A vector holds W neighbouring channels of one token. For a
 * chunk of tokens at a time, GROUP states of these channels go through it in registers: nothing of size B*L*E*N is ever
 * stored. Glossary: as in op.py.
 */
#include "scan.h"
#include "threads.h"

DESCRIBE(Scan)

/* One block of channels, and what it carries from chunk to chunk: N vectors. */
typedef struct { Block k; vf *h; } Column;

/* Up to CHUNK tokens in scan order, which starts at token `first`. */
typedef struct { int64_t start, first; int size; const float *ranks; } Chunk;

/* Moves the outputs of the tokens that are read to the front of y. Their rows, the last one again up to a whole STAGE, and
 * how many there are. */
INLINE int place_outputs(const Scan *a, int64_t b, int64_t first, int way, int size, const int64_t *slots, vf *y,
                         int64_t *rows) {
    int count = size;
    if (slots) {
        count = 0;
        for (int j = 0; j < size; j++)
            if (slots[j * way] >= 0) rows[count] = a->stay ? first + j * way : slots[j * way], y[count++] = y[j];
    } else {
        for (int j = 0; j < size; j++) rows[j] = visited(a, b, first + j * way);
    }
    for (int j = count; j % UNROLL && count; j++) rows[j] = rows[count - 1];
    return count;
}

INLINE void forward_chunk(const Scan *a, int64_t b, Chunk of, int64_t c, int lanes, int N, int half, int half_out,
                          Column *column) {
    const Block *k = &column->k;
    Tokens x;
    vf drive[CHUNK], y[CHUNK];
    int way = a->reverse ? -1 : 1, size = of.size;
    int64_t first = of.first;
    if (a->states)
        for (int n = 0; n < N; n++)
            store(a->states, state_at(a, b, of.start, c) + n * a->channels, column->h[n], lanes, 0);
    const int64_t *slots = a->slots ? a->slots + b * a->length + first : 0;
    int safe = read_tokens(a, b, first, way, size, c, lanes, half, k, of.ranks, &x);
    for (int j = 0; j < size; j++) drive[j] = x.step[j] * x.u[j];
    if (a->skip) for (int j = 0; j < size; j++) y[j] = k->D * load(a->skip, (first + j * way) * a->channels + c, lanes, 0);
    else for (int j = 0; j < size; j++) y[j] = k->D * x.u[j];
    advance_all(a, k, x.decay, drive, column->h, y, slots, b * a->B_b + first * a->B_l, b * a->C_b + first * a->C_l, way,
                size, N, safe, half);
    if (a->sum)
        for (int j = 0; j < size; j++) y[j] += load(a->sum, visited(a, b, first + j * way) * a->channels + c, lanes, 0);
    int64_t rows[CHUNK]; /* of the outputs */
    int count = place_outputs(a, b, first, way, size, slots, y, rows);
    if (a->ungated)
        for (int j = 0; j < count; j++) store(a->ungated, rows[j] * a->channels + c, y[j], lanes, 0);
    if (a->z)
        for (int j = 0; j < count; j += UNROLL) {
            vf gate[UNROLL];
            STAGE gate[i] = load_ahead(a->z, b * a->z_b + rows[j + i] * a->z_l + c, lanes, half_out);
            STAGE y[j + i] *= gate[i] * (float)a->scale;
            sigmoid(gate);
            STAGE y[j + i] *= gate[i];
        }
    for (int j = 0; j < count; j++) store(a->y, (b * a->outputs + rows[j]) * a->channels + c, y[j], lanes, half_out);
}

/* All blocks go through one chunk together before any goes on to the next: memory is then read row by row. */
int scan_forward_group(const Scan *a, int64_t b, int64_t from, int64_t to) {
    int N = (int)a->state, half = (int)a->half, half_out = (int)a->half_out;
    size_t room = (size_t)(to - from) * (sizeof(Column) + (size_t)(2 * N) * sizeof(vf));
    Column *columns = aligned_alloc(sizeof(vf), room + (size_t)(a->R + 1) * CHUNK * sizeof(float));
    if (!columns) return 1;
    vf *vectors = (vf *)(columns + (to - from));
    float *ranks = (float *)(vectors + (to - from) * 2 * N);
    for (int64_t i = from; i < to; i++) {
        Column *column = columns + i - from;
        int64_t left = a->channels - i * W;
        int lanes = left < W ? (int)left : W;
        column->k.A = vectors + (i - from) * 2 * N, column->h = column->k.A + N;
        read_block(a, i * W, lanes, N, &column->k);
        read_states(a, a->initial, b, i * W, lanes, column->h);
    }
    for (int64_t start = 0; start < a->length; start += CHUNK) {
        Chunk of = {start, a->reverse ? a->length - 1 - start : start, CHUNK, a->rank ? ranks : 0};
        if (a->length - start < CHUNK) of.size = (int)(a->length - start);
        if (a->rank) gather_ranks(a, of.first, a->reverse ? -1 : 1, of.size, ranks);
        for (int64_t i = from; i < to; i++) {
            int64_t c = i * W, left = a->channels - c;
            int lanes = left < W ? (int)left : W;
            Column *column = columns + i - from;
            if (lanes == W && N == 16 && !half && !half_out) forward_chunk(a, b, of, c, W, 16, 0, 0, column);
            else if (lanes == W && N == 16 && !half) forward_chunk(a, b, of, c, W, 16, 0, 1, column);
            else if (lanes == W && N == 16) forward_chunk(a, b, of, c, W, 16, 1, 1, column);
            else forward_chunk(a, b, of, c, lanes, N, half, half_out, column);
        }
    }
    for (int64_t i = from; a->last && i < to; i++) {
        int64_t left = a->channels - i * W;
        write_states(a, a->last, b, i * W, left < W ? (int)left : W, columns[i - from].h);
    }
    free(columns);
    return 0;
}

/* Returns 0, or 1 when memory ran out. */
int scan_forward(const Scan *a) {
    int64_t blocks = (a->channels + W - 1) / W;
    int failed = 0;
#pragma omp parallel for num_threads(team(a->threads)) schedule(static) reduction(|: failed)
    for (int64_t item = 0; item < a->batch * a->groups; item++) {
        int64_t from, to;
        share(blocks, item % a->groups, a->groups, &from, &to);
        failed |= scan_forward_group(a, item / a->groups, from, to);
    }
    return failed;
}
