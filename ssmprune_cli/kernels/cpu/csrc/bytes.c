#include "bytes.h"

typedef int16_t vs __attribute__((vector_size(W * 4))); /* pairs */
typedef uint8_t vb __attribute__((vector_size(W)));

#define LEAST_SCALE 1.17549435e-38f /* below, floats have fewer bits: such a token is zero */
#define MOST_VECTORS (W == 16 ? 4 : 3) /* of sums that are in registers together */
#define ROWS _Pragma("GCC unroll 8") for (int r = 0; r < BYTE_TOKENS; r++)
#define VECTORS _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++)

/* The nearest integers, ties to even. Not by adding MAGIC: a compiler may make one rounding of that and the product before
 * it, and every level has to give the same integers. */
INLINE vi rounded(vf x) {
#if W == 16 && defined(__AVX512F__)
    return (vi)_mm512_cvtps_epi32((__m512)x);
#elif W == 8 && defined(__AVX2__)
    return (vi)_mm256_cvtps_epi32((__m256)x);
#elif W == 4 && defined(__SSE2__)
    return (vi)_mm_cvtps_epi32((__m128)x);
#else
    vi nearest;
    for (int i = 0; i < W; i++) nearest[i] = (int32_t)__builtin_rintf(x[i]);
    return nearest;
#endif
}

INLINE vi larger(vi a, vi b) {
#if W == 16 && defined(__AVX512F__)
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif W == 8 && defined(__AVX2__)
    return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    vi above = a > b;
    return (above & a) | (~above & b);
#endif
}

/* The last tile has as many fours as the others: before its own, those that the last but one has are zero here, while the
 * weight's are read again. So nothing of a weight is read beyond its end. */
static void fill_last_tile(int64_t K, uint8_t *bytes) {
    int64_t own = quads(K) % 16 * 4;
    if (quads(K) < 16 || !own) return;
    uint8_t *last = bytes + byte_step(K) - 64;
    memmove(last + 64 - own, last, (size_t)own);
    memset(last, 0, (size_t)(64 - own));
}

/* The bits of the largest of |x| (K), which are in the order of the values: those of what is not finite come last. */
INLINE uint32_t largest_of(const float *x, int64_t K) {
    vi most[UNROLL] = {{0}};
    for (int64_t k = 0; k < K; k += SLAB) {
        FOR_SLAB(K, k, most[i] = larger((vi)absolute(load(x, k + i * W, lanes, 0)), most[i]))
    }
    vi all = larger(larger(most[0], most[1]), larger(most[2], most[3]));
    uint32_t bits = 0;
    for (int i = 0; i < W; i++) bits = (uint32_t)all[i] > bits ? (uint32_t)all[i] : bits;
    return bits;
}

/* W values in eight bits, with 128 added. */
INLINE vb in_bytes(vf x, float factor) { return __builtin_convertvector((vu)rounded(x * factor) + 128, vb); }

void byte_rows(const float *const *x, int64_t count, int64_t K, int dots, uint8_t *bytes, float *scales) {
    for (int64_t r = 0; r < count; r++, bytes += byte_step(K)) {
        union { uint32_t bits; float value; } largest = {largest_of(x[r], K)};
        int finite = largest.bits < 0x7F800000;
        float scale = finite ? largest.value / 127.0f : 0;
        if (!(scale >= LEAST_SCALE)) scale = 0;
        float factor = scale > 0 ? 1.0f / scale : 0;
        scales[r] = finite ? scale : __builtin_nanf("");
        int64_t k = 0;
        for (; k + W <= K; k += W) {
            vb eight = in_bytes(load(x[r], k, W, 0), factor);
            memcpy(bytes + k, &eight, W);
        }
        if (k < K) {
            vb eight = in_bytes(load(x[r], k, (int)(K - k), 0), factor);
            memcpy(bytes + k, &eight, (size_t)(4 * quads(K) - k));
        }
        if (dots == TILES_OF_BYTES) fill_last_tile(K, bytes);
    }
}

void pack_bytes(const int8_t *values, const float *scales, int64_t K, int64_t P, float *weight) {
    memset(weight, 0, (size_t)byte_size(K, P) * sizeof(float));
    for (int64_t p = 0; p < P; p++, values += K) {
        float *panel = weight + p / BYTE_PANEL * byte_panel(K), *end = panel + BYTE_PANEL * quads(K);
        int8_t *own = (int8_t *)(panel + p % BYTE_PANEL);
        int32_t sum = 0;
        for (int64_t k = 0; k < K; k++) {
            own[k / 4 * BYTE_PANEL * 4 + k % 4] = values[k];
            sum += values[k];
        }
        sum *= 128;
        end[p % BYTE_PANEL] = scales[p];
        memcpy(end + BYTE_PANEL + p % BYTE_PANEL, &sum, sizeof sum);
    }
}

INLINE int32_t four(const uint8_t *bytes, int64_t k) {
    int32_t word;
    memcpy(&word, bytes + 4 * k, 4);
    return word;
}

/* Of each lane, the sum of both products of 16-bit values. */
INLINE vi products_of_pairs(vi a, vi b) {
#if W == 16 && defined(__AVX512BW__)
    return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif W == 8 && defined(__AVX2__)
    return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif W == 4 && defined(__SSE2__)
    return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

/* The sums of W * vectors outputs from `weight` on. */
INLINE void sums_of_pairs(const uint8_t *bytes, int64_t step, const float *weight, int64_t K, int vectors,
                          vi sum[][MOST_VECTORS]) {
    vi even[MOST_VECTORS], odd[MOST_VECTORS];
    ROWS VECTORS sum[r][v] = (vi){0};
    for (int64_t k = 0; k < quads(K); k++, weight += BYTE_PANEL) {
        VECTORS {
            vi w = (vi)load(weight, v * W, W, 0);
            even[v] = (vi)((vs)(w << 8) >> 8), odd[v] = (vi)((vs)w >> 8);
        }
        ROWS {
            int32_t word = four(bytes + r * step, k);
            vi first = (vi){0} + (word & 0x00FF00FF), second = (vi){0} + (word >> 8 & 0x00FF00FF);
            VECTORS sum[r][v] += products_of_pairs(even[v], first) + products_of_pairs(odd[v], second);
        }
    }
}

/* Outputs from the sums, `at` columns into the panel, whose scales are at `end`. */
INLINE void write_sums(vi sum[][MOST_VECTORS], const float *scales, const float *end, const float *bias, int64_t at,
                       int64_t columns, int vectors, float *const *out) {
    if (!bias && columns - at >= vectors * W) { /* what blocks ask for, without a branch for each vector */
        VECTORS ROWS store(out[r], at + v * W, scaled(sum[r][v], scales[r], end, at + v * W, 0, W), W, 0);
        return;
    }
    VECTORS {
        int64_t n = at + v * W, left = columns - n;
        int lanes = left < W ? (int)left : W;
        if (lanes <= 0) break;
        ROWS store(out[r], n, scaled(sum[r][v], scales[r], end, n, bias, lanes), lanes, 0);
    }
}

typedef void Product(const uint8_t *bytes, const float *scales, const float *panel, const float *bias, int64_t K,
                     int64_t columns, float *const *out);

static void by_pairs(const uint8_t *bytes, const float *scales, const float *panel, const float *bias, int64_t K,
                     int64_t columns, float *const *out) {
    vi sum[BYTE_TOKENS][MOST_VECTORS];
    for (int64_t at = 0; at < columns; at += 2 * W) {
        sums_of_pairs(bytes, byte_step(K), panel + at, K, 2, sum);
        write_sums(sum, scales, panel + BYTE_PANEL * quads(K), bias, at, columns, 2, out);
    }
}

/* The same by `dot`, which adds products of fours of bytes, the first of which are unsigned, to a vector of sums. It is an
 * instruction that only functions compiled for some `features` have, so each gets a copy of the whole. */
#define PRODUCT_OF_FOURS(name, features, dot)                                                                            \
    features INLINE void name##_sums(const uint8_t *bytes, int64_t step, const float *weight, int64_t K, int vectors,    \
                                     vi sum[][MOST_VECTORS]) {                                                           \
        vi w[MOST_VECTORS];                                                                                              \
        ROWS VECTORS sum[r][v] = (vi){0};                                                                                \
        for (int64_t k = 0; k < quads(K); k++, weight += BYTE_PANEL) {                                                   \
            VECTORS w[v] = (vi)load(weight, v * W, W, 0);                                                                \
            ROWS {                                                                                                       \
                vi token = (vi){0} + four(bytes + r * step, k);                                                          \
                VECTORS sum[r][v] = dot(sum[r][v], token, w[v]);                                                         \
            }                                                                                                            \
        }                                                                                                                \
    }                                                                                                                    \
    features static void name(const uint8_t *bytes, const float *scales, const float *panel, const float *bias,          \
                              int64_t K, int64_t columns, float *const *out) {                                           \
        vi sum[BYTE_TOKENS][MOST_VECTORS];                                                                               \
        const float *end = panel + BYTE_PANEL * quads(K);                                                                \
        for (int64_t at = 0; at < columns; at += MOST_VECTORS * W) {                                                     \
            SUMS_OF(name, columns - at > 3 * W ? MOST_VECTORS : columns - at > 2 * W ? 3 : columns - at > W ? 2 : 1)     \
        }                                                                                                                \
    }
/* With a count that is a constant in each case. */
#define SUMS_OF(name, count)                                                         \
    switch (count) {                                                                 \
    case 1: SUMS(name, 1); break;                                                    \
    case 2: SUMS(name, 2); break;                                                    \
    case 3: SUMS(name, 3); break;                                                    \
    default: SUMS(name, MOST_VECTORS);                                               \
    }
#define SUMS(name, vectors)                                                          \
    name##_sums(bytes, byte_step(K), panel + at, K, vectors, sum);                   \
    write_sums(sum, scales, end, bias, at, columns, vectors, out)

/* The best product of fours that the processor has, or none. */
#ifdef EMULATED_AMX
PRODUCT_OF_FOURS(by_fours, , emulated_dot)
static Product *product_of_fours(void) { return by_fours; }
#elif W == 16 && defined(__AVX512F__) && (defined(__clang__) ? __clang_major__ >= 8 : __GNUC__ >= 9)
#define DOT(sum, token, w) (vi)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(token), (__m512i)(w))
PRODUCT_OF_FOURS(by_fours, __attribute__((target("avx512vnni"))), DOT)
static Product *product_of_fours(void) { return __builtin_cpu_supports("avx512vnni") ? by_fours : 0; }
#elif W == 8 && defined(__AVX2__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#include <cpuid.h>
#define DOT(sum, token, w) (vi)_mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(token), (__m256i)(w))
#define DOT_512(sum, token, w) (vi)_mm256_dpbusd_epi32((__m256i)(sum), (__m256i)(token), (__m256i)(w))
PRODUCT_OF_FOURS(by_fours, __attribute__((target("avxvnni"))), DOT)
PRODUCT_OF_FOURS(by_fours_of_512, __attribute__((target("avx512vnni,avx512vl"))), DOT_512) /* before AVX-VNNI was there */

static Product *product_of_fours(void) {
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1) return by_fours; /* AVX-VNNI */
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") ? by_fours_of_512 : 0;
}
#else
static Product *product_of_fours(void) { return 0; }
#endif

static Product *known_product_of_fours(void) {
    static Product *answer;
    static int asked; /* asking takes a virtual machine longer than many a product */
    if (!__atomic_load_n(&asked, __ATOMIC_ACQUIRE)) { /* by more than one thread, maybe: their answers are the same */
        __atomic_store_n(&answer, product_of_fours(), __ATOMIC_RELAXED);
        __atomic_store_n(&asked, 1, __ATOMIC_RELEASE);
    }
    return __atomic_load_n(&answer, __ATOMIC_RELAXED);
}

int best_dots(int most) {
    if (most >= TILES_OF_BYTES && byte_tiles_available()) return TILES_OF_BYTES;
    return most >= FOURS_OF_BYTES && known_product_of_fours() ? FOURS_OF_BYTES : PAIRS_OF_BYTES;
}

void byte_product(const uint8_t *bytes, const float *scales, int64_t count, const float *panel, const float *bias, int64_t K,
                  int64_t columns, int dots, float *const *out) {
    if (dots == TILES_OF_BYTES) byte_tile_product(bytes, scales, count, panel, bias, K, columns, out);
    else if (dots == FOURS_OF_BYTES) known_product_of_fours()(bytes, scales, panel, bias, K, columns, out);
    else by_pairs(bytes, scales, panel, bias, K, columns, out);
}
