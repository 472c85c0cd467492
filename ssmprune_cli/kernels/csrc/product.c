/* Products of bfloat16 matrices by AMX, which Intel's server processors have. Its registers hold tiles of 16 rows of 64
 * bytes; one instruction multiplies 16 x 32 by 32 x 16 bfloat16 values and adds to 16 x 16 sums in float32. */
#include "product.h"

#if W == 16 && defined(__AVX512F__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TILED __attribute__((target("amx-tile,amx-bf16,avx512bf16")))
#define REQUEST_PERMISSION 0x1023 /* of arch_prctl, for one part of the processor's state */
#define TILE_DATA 18

int tiles_available(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & d >> 24 & 1)) return 0; /* AMX-BF16 and AMX-TILE */
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return 0;            /* AVX512-BF16 */
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

TILED void tiles_begin(void) {
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } eight = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&eight);
}

TILED void tiles_end(void) { _tile_release(); }

/* Not inline: compilers do not know what a tile's load reads, and only at a call is everything in memory. */
TILED void round_rows(const float *const *x, int64_t K, uint16_t *rounded) {
    for (int r = 0; r < MOST_ROWS; r++, rounded += K)
        for (int64_t k = 0; k < K; k += 32) {
            __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x[r] + k + 16), _mm512_loadu_ps(x[r] + k));
            memcpy(rounded + k, &both, sizeof both);
        }
}

/* Floats from each row to the next, or 0 if they are not evenly apart. */
static int64_t step_of(float *const *out) {
    int64_t step = out[1] - out[0];
    for (int r = 2; r < MOST_ROWS; r++)
        if (out[r] - out[r - 1] != step) return 0;
    return step;
}

TILED void tile_product(const uint16_t *rounded, const float *weight, int64_t K, int64_t P, float *const *out) {
    int64_t columns = pair_columns_of(P), step = step_of(out);
    float block[MOST_ROWS * 32] __attribute__((aligned(64)));
    for (int64_t n = 0; n < columns; n += 32) {
        int both = columns - n > 16; /* or the last 16 columns */
        float *to = step ? out[0] + n : block;
        int64_t to_bytes = (step ? step : 32) * 4;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < K; k += 32) {
            const float *w = weight + k / 2 * columns + n;
            _tile_loadd(4, rounded + k, K * 2);
            _tile_loadd(5, rounded + 16 * K + k, K * 2);
            _tile_loadd(6, w, columns * 4);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if (!both) continue;
            _tile_loadd(7, w + 16, columns * 4);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, to, to_bytes);
        _tile_stored(1, (char *)to + 16 * to_bytes, to_bytes);
        if (both) {
            _tile_stored(2, to + 16, to_bytes);
            _tile_stored(3, (char *)(to + 16) + 16 * to_bytes, to_bytes);
        }
        for (int r = 0; r < MOST_ROWS && !step; r++) memcpy(out[r] + n, block + r * 32, both ? 128 : 64);
    }
}
#else
int tiles_available(void) { return 0; }
void tiles_begin(void) {}
void tiles_end(void) {}
void round_rows(const float *const *x, int64_t K, uint16_t *rounded) { (void)x, (void)K, (void)rounded; }
void tile_product(const uint16_t *rounded, const float *weight, int64_t K, int64_t P, float *const *out) {
    (void)rounded, (void)weight, (void)K, (void)P, (void)out;
}
#endif
