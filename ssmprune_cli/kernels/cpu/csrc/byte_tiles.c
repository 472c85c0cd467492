/* Products of bytes by AMX: one instruction multiplies 16 tokens of 64 bytes by 16 outputs and adds to 16 x 16 sums. */
#include "bytes.h"

#if AMX
#ifdef EMULATED_AMX
#define TILED
#else
#define TILED __attribute__((target("amx-tile,amx-int8")))
#endif

/* The sums of `count` tokens, which fill one tile or, if they are `tall`, two, and 16 or, if they are `wide`, 32 outputs
 * from `weight` on, (MOST_ROWS, 32). Tokens are the unsigned factors, the first ones. */
TILED INLINE void sums_of_tiles(const uint8_t *bytes, int64_t above, const float *weight, int64_t K, int tall, int wide,
                                int32_t *sums) {
    int64_t step = byte_step(K), last = quads(K) - byte_depth(K);
    const uint8_t *below = bytes + above * step;
    _tile_zero(0);
    if (tall) _tile_zero(1);
    if (wide) _tile_zero(2);
    if (tall && wide) _tile_zero(3);
    for (int64_t k = 0; k < step / 64; k++, bytes += 64, below += 64) {
        const float *tile = weight + (16 * k < last ? 16 * k : last) * BYTE_PANEL;
        _tile_loadd(4, bytes, step);
        _tile_loadd(6, tile, BYTE_PANEL * 4);
        _tile_dpbusd(0, 4, 6);
        if (tall) {
            _tile_loadd(5, below, step);
            _tile_dpbusd(1, 5, 6);
        }
        if (wide) {
            _tile_loadd(7, tile + 16, BYTE_PANEL * 4);
            _tile_dpbusd(2, 4, 7);
            if (tall) _tile_dpbusd(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 128);
    if (tall) _tile_stored(1, sums + above * 32, 128);
    if (wide) _tile_stored(2, sums + 16, 128);
    if (tall && wide) _tile_stored(3, sums + above * 32 + 16, 128);
}

/* Outputs from the sums: `columns` of them, at most 32. */
INLINE void write_tiles(const int32_t *sums, const float *scales, int64_t count, const float *end, const float *bias,
                        int64_t at, int64_t columns, float *const *out) {
    for (int64_t r = 0; r < count; r++)
        for (int64_t v = 0; v < columns; v += W) {
            int lanes = columns - v < W ? (int)(columns - v) : W;
            store(out[r], at + v, scaled((vi)load(sums, r * 32 + v, W, 0), scales[r], end, at + v, bias, lanes), lanes, 0);
        }
}

/* Not inline: compilers do not know what a tile's load reads, and only at a call is everything in memory. */
TILED void byte_tile_product(const uint8_t *bytes, const float *scales, int64_t count, const float *panel, const float *bias,
                             int64_t K, int64_t columns, float *const *out) {
    int32_t sums[MOST_ROWS * 32] __attribute__((aligned(64)));
    const float *end = panel + BYTE_PANEL * quads(K);
    int64_t above = first_rows(count);
    for (int64_t at = 0; at < columns; at += 32) {
        int64_t left = columns - at;
        int tall = count > above, wide = left > 16;
        if (tall && wide) sums_of_tiles(bytes, above, panel + at, K, 1, 1, sums);
        else sums_of_tiles(bytes, above, panel + at, K, tall, wide, sums);
        if (left >= 32 && !bias) write_tiles(sums, scales, count, end, 0, at, 32, out);
        else write_tiles(sums, scales, count, end, bias, at, left < 32 ? left : 32, out);
    }
}
#else
void byte_tile_product(const uint8_t *bytes, const float *scales, int64_t count, const float *panel, const float *bias,
                       int64_t K, int64_t columns, float *const *out) {
    (void)bytes, (void)scales, (void)count, (void)panel, (void)bias, (void)K, (void)columns, (void)out;
}
#endif
