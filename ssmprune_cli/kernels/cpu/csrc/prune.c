/* A prune point: the scores of its tokens, their order, and the move that parts them. Glossary: ops/prune.py. */
#include "threads.h"

enum { CLIP, MEAN, L1, L2 };

/* score (rows) = the mean over channels of the sum of y (count, rows, E), of what `kind` makes of it first. */
ARGUMENTS(Score,
    const float *y[4];
    float *score;
    int64_t rows, channels, count, kind, threads;
);
DESCRIBE(Score)

INLINE float score_row(const Score *a, int64_t row, int kind) {
    int64_t E = a->channels, at = row * E;
    vf total[UNROLL] = {{0}};
    for (int64_t c = 0; c < E; c += SLAB) {
        vf y[UNROLL] = {{0}};
        FOR_SLAB(E, c, y[i] = load(a->y[0], at + c + i * W, lanes, 0))
        for (int64_t k = 1; k < a->count; k++) { FOR_SLAB(E, c, y[i] += load(a->y[k], at + c + i * W, lanes, 0)) }
        STAGE {
            if (kind == CLIP) y[i] = at_least(y[i], 0.0f);
            if (kind == L1) y[i] = absolute(y[i]);
            if (kind == L2) y[i] *= y[i];
        }
        STAGE total[i] += y[i];
    }
    for (int i = 1; i < UNROLL; i++) total[0] += total[i];
    float mean = sum_lanes(total[0]) / (float)E;
    return kind == L2 ? __builtin_sqrtf(mean) : mean;
}

int score_tokens(const Score *a) {
#pragma omp parallel for num_threads(team(a->threads)) schedule(static)
    for (int64_t row = 0; row < a->rows; row++) {
        switch (a->kind) {
        case CLIP: a->score[row] = score_row(a, row, CLIP); break;
        case MEAN: a->score[row] = score_row(a, row, MEAN); break;
        case L1: a->score[row] = score_row(a, row, L1); break;
        default: a->score[row] = score_row(a, row, L2);
        }
    }
    return 0;
}

/* score, positions, live (B, L); order (B, ordered), with `ordered` the count or L. `live` may be missing. */
ARGUMENTS(Order,
    const float *score;
    const int64_t *positions, *protected;
    const uint8_t *live;
    int64_t *order;
    int64_t batch, length, count, ordered, protections, threads;
);
DESCRIBE(Order)

/* An integer of the same order as the score, a NaN as the lowest. No finite score is above HIGHEST or below -HIGHEST. */
INLINE int32_t key_of(float score) {
    const float HIGHEST = 3.40282347e38f;
    score = score != score || score < -HIGHEST ? -HIGHEST : score;
    score = (score > HIGHEST ? HIGHEST : score) + 0.0f; /* zeros of both signs are equal: -0 + 0 is 0 */
    int32_t bits;
    memcpy(&bits, &score, sizeof bits);
    return bits < 0 ? bits ^ INT32_MAX : bits;
}

INLINE int64_t at_least_so_high(const int32_t *key, int64_t length, int32_t threshold) {
    int32_t count = 0;
    for (int64_t t = 0; t < length; t++) count += key[t] >= threshold;
    return count;
}

static void order_sample(const Order *a, int64_t b, int32_t *key) {
    int64_t L = a->length;
    const int64_t *positions = a->positions + b * L;
    for (int64_t t = 0; t < L; t++) key[t] = key_of(a->score[b * L + t]);
    for (int64_t p = 0; p < a->protections; p++) {
        for (int64_t t = 0; t < L; t++) key[t] = positions[t] == a->protected[p] ? INT32_MAX : key[t];
    }
    for (int64_t t = 0; a->live && t < L; t++) key[t] = a->live[b * L + t] ? key[t] : INT32_MIN;
    /* The highest threshold that `count` keys reach: its sign, then bit by bit. Counting takes less than sorting. */
    int32_t threshold = at_least_so_high(key, L, 0) >= a->count ? 0 : INT32_MIN;
    for (int32_t bit = 1 << 30; bit; bit >>= 1) {
        if (at_least_so_high(key, L, threshold + bit) >= a->count) threshold += bit;
    }
    int64_t ties = a->count; /* of the tokens at the threshold the first ones stay */
    for (int64_t t = 0; t < L; t++) ties -= key[t] > threshold;
    int64_t *best = a->order + b * a->ordered, *rest = a->ordered > a->count ? best + a->count : 0;
    for (int64_t t = 0; t < L; t++) {
        if (key[t] > threshold || (key[t] == threshold && ties-- > 0)) *best++ = t;
        else if (rest) *rest++ = t;
    }
}

/* Returns 0, or 1 when memory ran out. */
int order_tokens(const Order *a) {
    int threads = team(a->threads);
    int32_t *keys = malloc((size_t)threads * (size_t)a->length * sizeof *keys + 1);
    if (!keys) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < a->batch; b++) order_sample(a, b, keys + omp_get_thread_num() * a->length);
    free(keys);
    return 0;
}

/* hidden, residual (B, L, d), older (B, others, d), order (B, ordered); kept_* (B, count, d), gaps (2, B, count), dropped
 * (B, ordered - count + others, d), and positions of all. residual_* and older_* may be missing. */
ARGUMENTS(Move,
    const float *hidden, *residual, *older;
    const int64_t *positions, *order, *older_positions;
    float *kept_hidden, *kept_residual, *gaps, *dropped;
    int64_t *kept_positions, *dropped_positions;
    int64_t batch, length, channels, count, ordered, others, hidden_b, hidden_l, residual_b, residual_l, threads;
);
DESCRIBE(Move)

/* Row r of sample b, counted in its kept, dropped and older tokens. Returns whether it is not there. */
static int move_row(const Move *a, int64_t b, int64_t r) {
    int64_t d = a->channels, K = a->count, kept = b * K + r, left = b * (a->ordered - K + a->others) + r - K;
    size_t bytes = (size_t)d * sizeof(float);
    if (r >= a->ordered) {
        int64_t from = b * a->others + r - a->ordered;
        memcpy(a->dropped + left * d, a->older + from * d, bytes);
        a->dropped_positions[left] = a->older_positions[from];
        return 0;
    }
    int64_t row = a->order[b * a->ordered + r];
    if (row < 0 || row >= a->length) return 1;
    const float *hidden = a->hidden + b * a->hidden_b + row * a->hidden_l;
    const float *residual = a->residual ? a->residual + b * a->residual_b + row * a->residual_l : 0;
    int64_t position = a->positions[b * a->length + row];
    if (r < K) {
        memcpy(a->kept_hidden + kept * d, hidden, bytes);
        if (residual) memcpy(a->kept_residual + kept * d, residual, bytes);
        a->kept_positions[kept] = position;
        return 0;
    }
    float *restrict stream = a->dropped + left * d;
    a->dropped_positions[left] = position;
    if (residual) for (int64_t c = 0; c < d; c++) stream[c] = residual[c] + hidden[c];
    else memcpy(stream, hidden, bytes);
    return 0;
}

/* Positions between each kept token of sample b and the one before it; then likewise in reverse. */
static void find_gaps(const Move *a, int64_t b) {
    int64_t K = a->count;
    const int64_t *positions = a->kept_positions + b * K;
    float *ahead = a->gaps + b * K, *back = ahead + a->batch * K;
    if (K) ahead[0] = back[K - 1] = 0;
    for (int64_t t = 1; t < K; t++) ahead[t] = back[t - 1] = (float)(positions[t] - positions[t - 1] - 1);
}

/* Returns 0, or 2 for a row that is not there. */
int move_tokens(const Move *a) {
    int64_t rows = a->ordered + a->others;
    int missing = 0;
#pragma omp parallel num_threads(team(a->threads)) reduction(|: missing)
    {
        int64_t from, to;
        own_share(a->batch * rows, &from, &to);
        for (int64_t item = from; item < to; item++) missing |= move_row(a, item / rows, item % rows);
    }
    for (int64_t b = 0; b < (missing ? 0 : a->batch); b++) find_gaps(a, b);
    return missing ? 2 : 0;
}
