/* Products of integers: rows of floats as integers of one byte with one scale a row, and dot products with weights of
 * one byte. The sums are exact, so their order does not matter.
 *
 * Four inputs are multiplied at once: in a panel, each output's weights of four inputs are neighbours. */
#ifndef BILD_INTEGERS_H
#define BILD_INTEGERS_H

#include "vectors.h"

typedef ivec unaligned_ivec __attribute__((aligned(4), may_alias));

/* Rows of integers within 127, each with its scale. */
typedef struct {
    int8_t *values; /* (rows, width) */
    int64_t width;  /* a multiple of LANES; zeros beyond the inputs */
    float *scales;  /* (rows) */
    int32_t *sums;  /* (rows): of a row's integers */
} Integers;

static inline int64_t integer_width(int64_t in) { return (in + 63) / 64 * 64; }

/* Floats that a block for such rows must have. */
static inline int64_t integer_room(int64_t rows, int64_t in) { return rows * (integer_width(in) / 4 + 2); }

static inline Integers integers_in(float *block, int64_t rows, int64_t in) {
    float *scales = block + rows * integer_width(in) / 4;
    return (Integers){(int8_t *)block, integer_width(in), scales, (int32_t *)(scales + rows)};
}

/* Row r of `to` from x (n): the nearest integers, after the largest magnitude has become 127. The scale is not a number
 * if any of x is none, or infinite. engines/precision.py does the same. */
static void to_integers(const float *x, int64_t n, const Integers *to, int64_t r) {
    vec top = {0}, broken = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        vec v = n - i < LANES ? load_part(x + i, n - i) : *(const vec *)(x + i);
        vec size = (vec)((ivec)v & 0x7fffffff);
        top = choose(size > top, size, top);
        broken += v * 0.0f;
    }
    float max = vec_max(top);
    max = max < 1e-30f ? 1e-30f : max;
    vec inverse = broadcast(127.0f / max);
    uvec sum = {0}; /* unsigned, as it may overflow where x is broken */
    int8_t *row = to->values + r * to->width;
    for (int64_t i = 0; i < to->width; i += LANES) {
        vec v = n - i < LANES ? load_part(x + i, n - i) : *(const vec *)(x + i);
        ivec nearest = (ivec)((uvec)(v * inverse + 12582912.0f) - 0x4b400000); /* the low bits of 1.5 * 2^23 plus an integer */
        store_bytes(row + i, nearest);
        sum += (uvec)nearest;
    }
    uint32_t total = 0;
    for (int lane = 0; lane < LANES; lane++) total += sum[lane];
    to->scales[r] = vec_sum(broken) == 0 ? max / 127 : NAN;
    to->sums[r] = (int32_t)total;
}

/* The weights of LANES outputs and four inputs, as add_products wants them. */
static inline __attribute__((always_inline)) ivec load_quads(const int8_t *weight) {
    ivec w = *(const unaligned_ivec *)weight;
#ifdef UNSIGNED_BY_SIGNED
    w ^= (int32_t)0x80808080; /* plus 128 */
#endif
    return w;
}

/* What a sum begins with. */
static inline ivec first_sum(int32_t sum_of_inputs) {
#ifdef UNSIGNED_BY_SIGNED
    return (ivec)(-128 * (uint32_t)sum_of_inputs - (uvec){0});
#else
    (void)sum_of_inputs;
    return (ivec){0};
#endif
}

/* Adds to each output's sum its products with four inputs, the bytes of x. */
static inline __attribute__((always_inline)) ivec add_products(ivec sum, ivec w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX512BW__)
    __m512i inputs = _mm512_set1_epi32(x), zero = _mm512_setzero_si512();
    inputs = _mm512_mask_sub_epi8(inputs, _mm512_movepi8_mask((__m512i)w), zero, inputs);
    __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8((__m512i)w), inputs); /* 2 * 127 * 127 fits in 16 bits */
    return sum + (ivec)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVXVNNI__)
    return (ivec)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, _mm256_set1_epi32(x));
#elif defined(__AVX2__)
    __m256i inputs = _mm256_sign_epi8(_mm256_set1_epi32(x), (__m256i)w);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), inputs); /* 2 * 127 * 127 fits in 16 bits */
    return sum + (ivec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    for (int shift = 0; shift < 32; shift += 8)
        sum += ((ivec)((uvec)w << (24 - shift)) >> 24) * (int32_t)(int8_t)((uint32_t)x >> shift);
    return sum;
#endif
}

#endif
