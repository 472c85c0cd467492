#include "tiles.h"

#if W == 16 && AMX && !defined(EMULATED_AMX)
#define TILED __attribute__((target("amx-tile,amx-bf16,avx512bf16")))

/* The first `count` of 16 values. */
INLINE __mmask16 some(int64_t count) { return count >= 16 ? 0xFFFF : count > 0 ? (__mmask16)((1 << count) - 1) : 0; }

/* 32 inputs of a token. One part is rounded; of three, each takes the next bits, so that nothing is left. */
TILED INLINE void tile_row(__m512i low, __m512i high, int64_t parts, uint16_t *to) {
    static const uint16_t alternate[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    if (parts == 1) {
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_loadu_si512(alternate), both));
        return;
    }
    const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000);
    for (int64_t part = 0; part < parts; part++, to += 2 * TILE) {
        _mm512_storeu_si512(to, _mm512_srli_epi32(low, 16) | (high & upper));
        low = (__m512i)((__m512)low - (__m512)(low & upper)), high = (__m512i)((__m512)high - (__m512)(high & upper));
    }
}

/* Not inline: compilers do not know what a tile's load reads, and only at a call is everything in memory. */
TILED void tile_rows(const float *const *x, int64_t count, int64_t K, int64_t parts, uint16_t *rows) {
    for (int64_t r = 0; r < count; r++) {
        uint16_t *to = rows + r * 32;
        int64_t k = 0;
        for (; k + 32 <= K; k += 32, to += parts * 2 * TILE)
            tile_row(_mm512_loadu_si512(x[r] + k), _mm512_loadu_si512(x[r] + k + 16), parts, to);
        if (k < K) {
            __m512i low = _mm512_maskz_loadu_epi32(some(K - k), x[r] + k);
            tile_row(low, _mm512_maskz_loadu_epi32(some(K - k - 16), x[r] + k + 16), parts, to);
        }
    }
}

#define TOKENS(part)                                                              \
    do {                                                                          \
        _tile_loadd(4, tokens + (part) * 2 * TILE, 64);                           \
        if (tall) _tile_loadd(5, tokens + (part) * 2 * TILE + split, 64);         \
    } while (0)
#define WEIGHTS(part)                                                             \
    do {                                                                          \
        _tile_loadd(6, first + (part) * TILE, 64);                                \
        if (wide) _tile_loadd(7, second + (part) * TILE, 64);                     \
    } while (0)
#define MULTIPLY                                                                  \
    do {                                                                          \
        _tile_dpbf16ps(0, 4, 6);                                                  \
        if (tall) _tile_dpbf16ps(1, 5, 6);                                        \
        if (wide) _tile_dpbf16ps(2, 4, 7);                                        \
        if (tall && wide) _tile_dpbf16ps(3, 5, 7);                                \
    } while (0)

/* Of three parts, the products that are below 24 bits are left out. The order is one in which few tiles are loaded. */
TILED INLINE void multiply(const uint16_t *tokens, int64_t split, const uint16_t *first, const uint16_t *second, int64_t K,
                           int64_t parts, int tall, int wide) {
    for (int64_t k = 0; k < K; k += 32, tokens += parts * 2 * TILE, first += parts * TILE, second += parts * TILE) {
        if (parts == 1) {
            TOKENS(0); WEIGHTS(0); MULTIPLY;
            continue;
        }
        TOKENS(2); WEIGHTS(0); MULTIPLY;
        TOKENS(1); MULTIPLY;
        WEIGHTS(1); MULTIPLY;
        TOKENS(0); MULTIPLY;
        WEIGHTS(2); MULTIPLY;
        WEIGHTS(0); MULTIPLY;
    }
}

TILED void tile_product(const uint16_t *rows, int64_t count, const float *weight, const float *bias, int64_t columns,
                        int64_t K, int64_t parts, float *const *out, int64_t step, int64_t n) {
    const uint16_t *first = (const uint16_t *)weight, *second = (const uint16_t *)(weight + tiled_step(K, parts));
    int64_t above = first_rows(count), split = above * 32;
    int tall = count > above, wide = columns > 16;
    float block[MOST_ROWS * 32] __attribute__((aligned(64)));
    float *to = step ? out[0] + n : block;
    int64_t to_bytes = (step ? step : 32) * 4;
    char *below = (char *)to + above * to_bytes;
    if (bias) { /* one row, again and again */
        _tile_loadd(0, bias, 0);
        if (tall) _tile_loadd(1, bias, 0);
        if (wide) _tile_loadd(2, bias + 16, 0);
        if (tall && wide) _tile_loadd(3, bias + 16, 0);
    } else {
        _tile_zero(0);
        if (tall) _tile_zero(1);
        if (wide) _tile_zero(2);
        if (tall && wide) _tile_zero(3);
    }
    if (parts == 1) multiply(rows, split, first, second, K, 1, tall, wide);
    else if (tall && wide) multiply(rows, split, first, second, K, 3, 1, 1);
    else multiply(rows, split, first, second, K, 3, tall, wide);
    _tile_stored(0, to, to_bytes);
    if (tall) _tile_stored(1, below, to_bytes);
    if (wide) _tile_stored(2, to + 16, to_bytes);
    if (tall && wide) _tile_stored(3, below + 64, to_bytes);
    for (int64_t r = 0; r < count && !step; r++) memcpy(out[r] + n, block + r * 32, wide ? 128 : 64);
}

void tile_product_in_part(const uint16_t *rows, int64_t count, const float *weight, const float *bias, int64_t columns,
                          int64_t K, int64_t parts, float *const *out, int64_t n) {
    float block[MOST_ROWS * 32] __attribute__((aligned(64))), last[32] = {0}, *to[] = {block};
    if (bias) bias = memcpy(last, bias, (size_t)columns * sizeof(float));
    tile_product(rows, count, weight, bias, columns > 16 ? 32 : 16, K, parts, to, 32, 0);
    for (int64_t r = 0; r < count; r++) memcpy(out[r] + n, block + r * 32, (size_t)columns * sizeof(float));
}
#else
void tile_rows(const float *const *x, int64_t count, int64_t K, int64_t parts, uint16_t *rows) {
    (void)x, (void)count, (void)K, (void)parts, (void)rows;
}
void tile_product(const uint16_t *rows, int64_t count, const float *weight, const float *bias, int64_t columns, int64_t K,
                  int64_t parts, float *const *out, int64_t step, int64_t n) {
    (void)step, (void)rows, (void)count, (void)weight, (void)bias, (void)columns, (void)K, (void)parts, (void)out, (void)n;
}
void tile_product_in_part(const uint16_t *rows, int64_t count, const float *weight, const float *bias, int64_t columns,
                          int64_t K, int64_t parts, float *const *out, int64_t n) {
    (void)rows, (void)count, (void)weight, (void)bias, (void)columns, (void)K, (void)parts, (void)out, (void)n;
}
#endif
