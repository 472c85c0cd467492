#include "amx.h"

#if AMX
#ifdef EMULATED_AMX
#define TILED
static int ask(void) { return 2; }
#else
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TILED __attribute__((target("amx-tile")))
#define REQUEST_PERMISSION 0x1023 /* of arch_prctl, for one part of the processor's state */
#define TILE_DATA 18

/* 1 for tiles of bfloat16, 2 for those of bytes, or both. */
static int ask(void) {
    unsigned a, b, c, d, more;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1)) return 0; /* AMX-TILE */
    int bfloat16 = __get_cpuid_count(7, 1, &more, &b, &c, &a) && more >> 5 & d >> 22 & 1; /* AVX512-BF16 and AMX-BF16 */
    int bytes = d >> 25 & 1;                                                              /* AMX-INT8 */
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? 0 : bfloat16 | bytes << 1;
}
#endif

static int asked(void) {
    static int answer = -1; /* asking takes a virtual machine longer than many a product */
    if (answer < 0) answer = ask();
    return answer;
}

int tiles_available(void) { return asked() & 1; }
int byte_tiles_available(void) { return asked() >> 1; }

TILED void tiles_begin(int64_t count, int64_t depth) {
    uint8_t first = (uint8_t)first_rows(count), second = (uint8_t)(count - first);
    volatile struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } eight = {.palette = 1}; /* volatile: compilers do not know that all of it is read */
    for (int tile = 0; tile < 8; tile++) {
        eight.rows[tile] = tile >= 6 ? (uint8_t)depth : tile % 2 ? second : first;
        eight.row_bytes[tile] = !eight.rows[tile] ? 0 : tile / 2 == 2 ? (uint16_t)(4 * depth) : 64;
    }
    _tile_loadconfig((const void *)&eight);
}

TILED void tiles_end(void) { _tile_release(); }
#else
int tiles_available(void) { return 0; }
int byte_tiles_available(void) { return 0; }
void tiles_begin(int64_t count, int64_t depth) { (void)count, (void)depth; }
void tiles_end(void) {}
#endif
