/* Intel's registers for matrices (AMX), which its server processors have: eight tiles of at most 16 rows of 64 bytes.
 *
 * Here is what products of bfloat16 (tiles.h) and of bytes (bytes.h) share. Both multiply two tiles of tokens by two of
 * weights: tiles 0 to 3 are sums, 4 and 5 tokens, 6 and 7 weights. Intel's Software Developer's Manual, volume 2, says
 * what each instruction does. EMULATED_AMX is the header of the tests' in which C functions do it instead. */
#ifndef SSMPRUNE_AMX_H
#define SSMPRUNE_AMX_H
#include "threads.h"

#ifdef EMULATED_AMX
#define AMX 1
#include EMULATED_AMX
#elif W == 16 && defined(__AVX512F__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define AMX 1
#else
#define AMX 0
#endif

#define MOST_ROWS 32 /* tokens that are together, at most */

/* Whether the processor and the system can multiply tiles of bfloat16, and of bytes. */
int tiles_available(void);
int byte_tiles_available(void);

/* Before a thread multiplies groups of `count` tokens, and after it did. A tile of tokens has 4 `depth` bytes a row, and one
 * of weights `depth` rows. */
void tiles_begin(int64_t count, int64_t depth);
void tiles_end(void);

/* Tokens of a group, if those from `start` to `stop` are in as few groups of one size as there can be. */
INLINE int64_t group_size(int64_t start, int64_t stop) {
    int64_t groups = (stop - start + MOST_ROWS - 1) / MOST_ROWS;
    return groups ? (stop - start + groups - 1) / groups : 0;
}

/* Rows of the first of the two tiles that `count` tokens are in. They share the tokens evenly: a product takes as long as
 * a tile has rows, but less than 13 are no quicker, as four products side by side then wait for their sums. */
INLINE int64_t first_rows(int64_t count) { return count > 16 ? (count + 1) / 2 : count; }
#endif
