/* What csrc/ uses of AMX, and the dot product of AVX-VNNI, in plain C: so that what is made of them is tested on any
 * processor. After the operations in Intel's Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TDPBUSD,
 * TILESTORED, TILEZERO, TILERELEASE and VPDPBUSD. What the processor would refuse is kept in `emulated_fault`. */
#ifndef EMULATED_AMX_H
#define EMULATED_AMX_H

typedef struct { int rows, row_bytes; uint8_t data[16][64]; } EmulatedTile;
__attribute__((weak)) _Thread_local EmulatedTile emulated_tiles[8];
__attribute__((weak)) _Thread_local int emulated_configured;
__attribute__((weak)) const char *emulated_fault;
__attribute__((weak)) int64_t emulated_products; /* by tiles, of all threads: that they were used at all */
__attribute__((weak)) int64_t emulated_open;     /* threads that have configured tiles and not released them */

#define MUST(what) \
    if (!(what)) emulated_fault = #what

INLINE void emulated_loadconfig(const uint8_t *memory) {
    MUST(memory[0] == 1 && memory[1] == 0); /* the palette, and no row to start again from */
    for (int i = 2; i < 16; i++) MUST(memory[i] == 0);
    for (int i = 32; i < 48; i++) MUST(memory[i] == 0);
    for (int i = 56; i < 64; i++) MUST(memory[i] == 0);
    memset(emulated_tiles, 0, sizeof emulated_tiles);
    for (int i = 0; i < 8; i++) {
        EmulatedTile *tile = emulated_tiles + i;
        tile->row_bytes = memory[16 + 2 * i] | memory[17 + 2 * i] << 8, tile->rows = memory[48 + i];
        MUST(tile->rows <= 16 && tile->row_bytes <= 64);
        MUST((tile->rows == 0) == (tile->row_bytes == 0));
    }
    if (!emulated_configured) __atomic_add_fetch(&emulated_open, 1, __ATOMIC_RELAXED);
    emulated_configured = 1;
}

INLINE void emulated_release(void) {
    memset(emulated_tiles, 0, sizeof emulated_tiles);
    if (emulated_configured) __atomic_sub_fetch(&emulated_open, 1, __ATOMIC_RELAXED);
    emulated_configured = 0;
}

INLINE void emulated_zero(int i) {
    MUST(emulated_configured && emulated_tiles[i].rows);
    memset(emulated_tiles[i].data, 0, sizeof emulated_tiles[i].data);
}

INLINE void emulated_loadd(int i, const void *from, int64_t step) {
    EmulatedTile *tile = emulated_tiles + i;
    MUST(emulated_configured && tile->rows);
    memset(tile->data, 0, sizeof tile->data);
    for (int r = 0; r < tile->rows; r++) memcpy(tile->data[r], (const char *)from + r * step, (size_t)tile->row_bytes);
}

INLINE void emulated_stored(int i, void *to, int64_t step) {
    const EmulatedTile *tile = emulated_tiles + i;
    MUST(emulated_configured && tile->rows);
    for (int r = 0; r < tile->rows; r++) memcpy((char *)to + r * step, tile->data[r], (size_t)tile->row_bytes);
}

/* c += the products of fours of bytes, those of `a` unsigned, those of `b` signed. */
INLINE int32_t emulated_four(int32_t c, const uint8_t *a, const uint8_t *b) {
    for (int i = 0; i < 4; i++) c += a[i] * (int8_t)b[i];
    return c;
}

INLINE void emulated_dpbusd(int sums, int first, int second) {
    EmulatedTile *c = emulated_tiles + sums, *a = emulated_tiles + first, *b = emulated_tiles + second;
    MUST(emulated_configured && sums != first && sums != second && first != second);
    MUST(c->rows && a->rows && b->rows && c->row_bytes % 4 == 0 && a->row_bytes % 4 == 0 && b->row_bytes % 4 == 0);
    MUST(c->rows == a->rows && a->row_bytes == 4 * b->rows && b->row_bytes == c->row_bytes);
    for (int m = 0; m < c->rows; m++)
        for (int k = 0; k < a->row_bytes / 4; k++)
            for (int n = 0; n < c->row_bytes / 4; n++) {
                int32_t sum;
                memcpy(&sum, c->data[m] + 4 * n, 4);
                sum = emulated_four(sum, a->data[m] + 4 * k, b->data[k] + 4 * n);
                memcpy(c->data[m] + 4 * n, &sum, 4);
            }
    __atomic_add_fetch(&emulated_products, 1, __ATOMIC_RELAXED);
}

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#define _tile_loadconfig(memory) emulated_loadconfig(memory)
#define _tile_release() emulated_release()
#define _tile_zero(tile) emulated_zero(tile)
#define _tile_loadd(tile, from, step) emulated_loadd(tile, from, step)
#define _tile_stored(tile, to, step) emulated_stored(tile, to, step)
#define _tile_dpbusd(sums, first, second) emulated_dpbusd(sums, first, second)

INLINE vi emulated_dot(vi sums, vi first, vi second) {
    uint8_t a[W * 4], b[W * 4];
    memcpy(a, &first, sizeof a), memcpy(b, &second, sizeof b);
    for (int i = 0; i < W; i++) sums[i] = emulated_four(sums[i], a + 4 * i, b + 4 * i);
    return sums;
}
#endif
