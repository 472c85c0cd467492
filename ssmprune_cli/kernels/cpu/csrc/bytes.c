#include "bytes.h"

typedef int16_t vs __attribute__((vector_size(W * 4))); /* pairs */
typedef uint8_t vb __attribute__((vector_size(W)));

#define LEAST_SCALE 1.17549435e-38f /* below, floats have fewer bits: such a token is zero */
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

void byte_rows(const float *const *x, int64_t count, int64_t K, uint8_t *bytes, float *scales) {
    for (int64_t r = 0; r < count; r++, bytes += 4 * quads(K)) {
        vf most = {0}, rest = {0};
        for (int64_t k = 0; k < K; k += W) {
            vf v = load(x[r], k, K - k < W ? (int)(K - k) : W, 0);
            most = pick(absolute(v) > most, absolute(v), most);
            rest += v - v; /* not a number beside an infinity too */
        }
        float largest = 0, nothing = sum_lanes(rest);
        for (int i = 0; i < W; i++) largest = most[i] > largest ? most[i] : largest;
        float scale = largest / 127.0f;
        if (!(scale >= LEAST_SCALE)) scale = 0;
        float factor = scale > 0 ? 1.0f / scale : 0;
        scales[r] = scale + nothing;
        for (int64_t k = 0; k < 4 * quads(K); k += W) {
            int64_t left = K - k, room = 4 * quads(K) - k;
            vf v = load(x[r], k, left < W ? (int)(left > 0 ? left : 0) : W, 0) * factor;
            vb eight = __builtin_convertvector((vu)rounded(v) + 128, vb);
            memcpy(bytes + k, &eight, room < W ? (size_t)room : W);
        }
    }
}

INLINE uint32_t four(const uint8_t *bytes, int64_t k) {
    uint32_t word;
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
                          vi sum[][4]) {
    vi even[4], odd[4];
    ROWS VECTORS sum[r][v] = (vi){0};
    for (int64_t k = 0; k < quads(K); k++, weight += BYTE_PANEL) {
        VECTORS {
            vi w = (vi)load(weight, v * W, W, 0);
            even[v] = (vi)((vs)(w << 8) >> 8), odd[v] = (vi)((vs)w >> 8);
        }
        ROWS {
            uint32_t word = four(bytes + r * step, k);
            vi first = (vi){0} + (int32_t)(word & 0x00FF00FF), second = (vi){0} + (int32_t)(word >> 8 & 0x00FF00FF);
            VECTORS sum[r][v] += products_of_pairs(even[v], first) + products_of_pairs(odd[v], second);
        }
    }
}

/* Outputs from the sums, `at` columns into the panel. The product is rounded before a bias is added: in one rounding, as a
 * compiler makes of both in some places, an output would depend on which token of the group it is of. */
INLINE void scaled(vi sum[][4], const float *scales, const float *end, const float *bias, int64_t at, int64_t columns,
                   int vectors, float *const *out) {
    VECTORS {
        int64_t n = at + v * W, left = columns - n;
        int lanes = left < W ? (int)left : W;
        if (lanes <= 0) break;
        vf scale = load(end, n, W, 0), shift = load(end, BYTE_PANEL + n, W, 0);
        vf plus = bias ? load(bias, n, lanes, 0) : (vf){0};
        ROWS {
            vf total = __builtin_convertvector(sum[r][v] - (vi)shift, vf) * (scale * scales[r]);
            if (bias) {
                __asm__("" : "+m"(total));
                total += plus;
            }
            store(out[r], n, total, lanes, 0);
        }
    }
}

#if W == 16 && defined(__AVX512F__) && (defined(__clang__) ? __clang_major__ >= 8 : __GNUC__ >= 9)
#include <cpuid.h>
#define DOTS __attribute__((target("avx512vnni")))

int byte_products_available(void) {
    static int answer = -1; /* asking takes a virtual machine longer than many a product */
    unsigned a, b, c, d;
    if (answer < 0) answer = __get_cpuid_count(7, 0, &a, &b, &c, &d) && c >> 11 & 1;
    return answer;
}

DOTS INLINE void sums_of_fours(const uint8_t *bytes, int64_t step, const float *weight, int64_t K, int vectors,
                               vi sum[][4]) {
    vi w[4];
    ROWS VECTORS sum[r][v] = (vi){0};
    for (int64_t k = 0; k < quads(K); k++, weight += BYTE_PANEL) {
        VECTORS w[v] = (vi)load(weight, v * W, W, 0);
        ROWS {
            __m512i token = _mm512_set1_epi32((int32_t)four(bytes + r * step, k));
            VECTORS sum[r][v] = (vi)_mm512_dpbusd_epi32((__m512i)sum[r][v], token, (__m512i)w[v]);
        }
    }
}

DOTS static void by_fours(const uint8_t *bytes, const float *scales, const float *panel, const float *bias, int64_t K,
                          int64_t columns, float *const *out) {
    vi sum[BYTE_TOKENS][4];
    const float *end = panel + BYTE_PANEL * quads(K);
#define SUMS(vectors)                                                     \
    do {                                                                  \
        sums_of_fours(bytes, 4 * quads(K), panel, K, vectors, sum);       \
        scaled(sum, scales, end, bias, 0, columns, vectors, out);         \
    } while (0)
    if (columns > 48) SUMS(4);
    else if (columns > 32) SUMS(3);
    else if (columns > 16) SUMS(2);
    else SUMS(1);
#undef SUMS
}
#else
int byte_products_available(void) { return 0; }
static void by_fours(const uint8_t *bytes, const float *scales, const float *panel, const float *bias, int64_t K,
                     int64_t columns, float *const *out) {
    (void)bytes, (void)scales, (void)panel, (void)bias, (void)K, (void)columns, (void)out;
}
#endif

void byte_product(const uint8_t *bytes, const float *scales, const float *panel, const float *bias, int64_t K,
                  int64_t columns, int dots, float *const *out) {
    if (dots) {
        by_fours(bytes, scales, panel, bias, K, columns, out);
        return;
    }
    vi sum[BYTE_TOKENS][4];
    for (int64_t at = 0; at < columns; at += 2 * W) {
        sums_of_pairs(bytes, 4 * quads(K), panel + at, K, 2, sum);
        scaled(sum, scales, panel + BYTE_PANEL * quads(K), bias, at, columns, 2, out);
    }
}
